//! Crops made by the kernels against those of the processor, bit for bit, on photos and on odd sizes: run by the emulator, or
//! with `PASS_DEVICE=cuda` on the first GPU.

use std::ops::Range;

use super::Uploader;
use super::kernel_tests::device;
use crate::config::AugmentConfig;
use crate::data::augment::{
    Augmenter, CropBox, CropPlan, DeviceCrops, GLOBAL_CROPS, Jitter, Planes, normalize_into, plans,
};
use crate::data::decode::{Rgb8Image, decode_rgb};
use crate::random::{Purpose, Stream};
use candle_core::{DType, Tensor};

const PHOTOS: [&[u8]; 3] = [
    include_bytes!("../../../fixtures/photos/clothing/001.jpg"),
    include_bytes!("../../../fixtures/photos/clothing/002.jpg"),
    include_bytes!("../../../fixtures/photos/grocery/001.jpg"),
];

fn noise(width: u32, height: u32) -> Rgb8Image {
    let mut stream = Stream::new(4, Purpose::Subset, &[u64::from(width), u64::from(height)]);
    let data = (0..width * height * 3).map(|_| stream.bits() as u8).collect();
    Rgb8Image { width, height, data }
}

/// An image at `1/reduction` of the size that its crops are drawn for.
struct Case {
    image: Rgb8Image,
    reduction: u32,
    plans: Vec<CropPlan>,
}

impl Case {
    fn photo(number: usize, reduction: u32, config: &AugmentConfig) -> Self {
        let image = decode_rgb(PHOTOS[number % PHOTOS.len()], 10.0).unwrap();
        // the last pixel of a reduced image may be one of the full size
        let full = |side: u32| (side - 1) * reduction + 1;
        let plans = plans(config, 3, 1, number as u64, full(image.width), full(image.height));
        Self { image, reduction, plans }
    }

    fn noise(width: u32, height: u32, number: u64, config: &AugmentConfig) -> Self {
        let plans = plans(config, 3, 1, number, width, height);
        Self { image: noise(width, height), reduction: 1, plans }
    }

    /// The crops of the processor as bytes.
    fn planes(&self) -> Vec<Planes> {
        let mut augmenter = Augmenter::default();
        let apply = |plan| {
            let mut planes = Planes::default();
            augmenter.apply_into(&self.image, self.reduction, plan, &mut planes);
            planes
        };
        self.plans.iter().map(apply).collect()
    }

    fn for_device(&self) -> DeviceCrops {
        DeviceCrops::of_image(self.image.clone(), self.reduction, &self.plans)
    }
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

/// What the processor makes of crop `crops` of the cases `images`, crop by crop.
fn expected(cases: &[Case], crops: Range<usize>, images: &Range<usize>, config: &AugmentConfig) -> Vec<f32> {
    let planes: Vec<Vec<Planes>> = cases.iter().map(Case::planes).collect();
    let mut all = Vec::new();
    for crop in crops {
        for image in images.clone() {
            let planes = &planes[image][crop];
            let mut values = vec![0.0; planes.data().len()];
            normalize_into(planes, config.mean, config.std, &mut values);
            all.extend(values);
        }
    }
    all
}

/// Makes the crops of all cases on the device, some of them from images and some from finished crops, and compares.
fn check(cases: &[Case], config: &AugmentConfig) {
    let mut uploader = Uploader::new(&device()).unwrap();
    let images = 0..cases.len();
    let finished = cases.iter().map(|case| DeviceCrops::finished(&case.planes())).collect::<Vec<_>>();
    let raw = cases.iter().map(Case::for_device).collect::<Vec<_>>();
    let mixed = images.clone().map(|i| if i % 2 == 0 { raw[i].clone() } else { finished[i].clone() });
    for (what, batch) in [("images", raw.clone()), ("a mixture", mixed.collect())] {
        let upload = uploader.send(&batch).unwrap().unwrap();
        let all = GLOBAL_CROPS + config.local_crops;
        for (crops, size) in [(0..GLOBAL_CROPS, config.global_size), (GLOBAL_CROPS..all, config.local_size)] {
            let expected = expected(cases, crops.clone(), &images, config);
            let made = upload.crops(crops.clone(), &images, size, config, DType::F32).unwrap();
            assert_eq!(made.dims(), [crops.len() * cases.len(), 3, size, size]);
            let made = numbers(&made);
            if let Some(first) = made.iter().zip(&expected).position(|(a, b)| a.to_bits() != b.to_bits()) {
                let (crop, place) = (first / (3 * size * size), first % (3 * size * size));
                let plan = &cases[crop % cases.len()].plans[crops.start + crop / cases.len()];
                panic!("{what}: value {place} of crop {crop}: {} {}; {plan:?}", made[first], expected[first]);
            }
            let half = upload.crops(crops, &images, size, config, DType::BF16).unwrap();
            let rounded = Tensor::new(&expected[..], &candle_core::Device::Cpu).unwrap();
            assert_eq!(numbers(&half), numbers(&rounded.to_dtype(DType::BF16).unwrap()), "{what} in bf16");
        }
    }
}

#[test]
fn photos_have_the_same_crops_on_the_device() {
    let config = AugmentConfig { global_size: 56, local_size: 24, ..AugmentConfig::default() };
    let cases: Vec<_> = (0..9).map(|i| Case::photo(i, [1, 2, 4][i / 3], &config)).collect();
    check(&cases, &config);
}

#[test]
fn every_switch_gives_the_same_crops_on_the_device() {
    let always = AugmentConfig {
        global_size: 40,
        local_size: 16,
        local_crops: 1,
        flip: 1.0,
        jitter: 1.0,
        brightness: 1.0,
        contrast: 1.0,
        saturation: 1.0,
        hue: 0.5,
        gray: 0.0,
        blur: [1.0; 3],
        // boxes that reach over several pixels
        blur_radius: [0.01, 9.0],
        solarize: 1.0,
        ..AugmentConfig::default()
    };
    let gray = AugmentConfig { gray: 1.0, hue: 0.01, ..always.clone() };
    for config in [always, gray] {
        let cases: Vec<_> = (0..6).map(|i| Case::photo(i, 1, &config)).collect();
        check(&cases, &config);
    }
}

#[test]
fn images_of_any_size_have_the_same_crops_on_the_device() {
    let config = AugmentConfig { global_size: 24, local_size: 8, ..AugmentConfig::default() };
    let sizes = [(1, 1), (1, 300), (300, 1), (2, 3), (33, 47), (30, 400), (400, 30), (24, 24)];
    let cases: Vec<_> =
        sizes.iter().zip(0..).map(|(&(width, height), i)| Case::noise(width, height, i, &config)).collect();
    check(&cases, &config);
}

#[test]
fn crops_of_the_size_of_training_are_the_same_on_the_device() {
    let config = AugmentConfig { local_crops: 1, ..AugmentConfig::default() };
    check(&[Case::photo(0, 1, &config), Case::photo(5, 1, &config)], &config);
}

/// Every hue of every color, and every blend: all that could be rounded differently.
#[test]
fn every_color_jitters_alike() {
    let side = 64;
    // 64 x 64 pixels take every 4th red and green, four images every blue of the diagonal
    let config = AugmentConfig { global_size: side, local_crops: 0, ..AugmentConfig::default() };
    let size = side as u32;
    let cases = (0..12u32).map(|number| {
        let pixel = |i: u32| {
            let (red, green) = (i % size * 4 + number % 4, i / size * 4 + number / 4);
            [red as u8, green as u8, (red * 3 + green * 5 + number * 85) as u8]
        };
        let image = Rgb8Image { width: size, height: size, data: (0..size * size).flat_map(pixel).collect() };
        let part = f64::from(number) / 12.0;
        let plan = |jitter| CropPlan {
            region: CropBox { left: 0, top: 0, width: size, height: size },
            size: side,
            flip: false,
            jitter: Some(jitter),
            gray: false,
            blur: None,
            solarize: false,
        };
        let hue = Jitter::Hue(part - 0.5);
        let (contrast, saturation) = (Jitter::Contrast(0.3 + part), Jitter::Saturation(1.7 - part));
        let plans = vec![
            plan([hue, contrast, saturation, Jitter::Brightness(0.6 + part)]),
            plan([saturation, Jitter::Brightness(1.4 - part), contrast, hue]),
        ];
        Case { image, reduction: 1, plans }
    });
    check(&cases.collect::<Vec<_>>(), &config);
}

#[test]
fn batches_arrive_in_order_and_parts_of_them_are_parts() {
    let config = AugmentConfig { global_size: 16, local_size: 8, ..AugmentConfig::default() };
    let batch = |number: u64| -> Vec<Case> {
        (0..4).map(|i| Case::noise(20 + number as u32 * 7, 30, number * 4 + i, &config)).collect()
    };
    let mut uploader = Uploader::new(&device()).unwrap();
    let send = |uploader: &mut Uploader, number| {
        let crops: Vec<_> = batch(number).iter().map(Case::for_device).collect();
        uploader.send(&crops).unwrap().unwrap()
    };
    let mut ahead = send(&mut uploader, 0);
    for number in 0..5 {
        // both slots are taken: the next is on its way while this one is read
        let next = send(&mut uploader, number + 1);
        let upload = std::mem::replace(&mut ahead, next);
        assert_eq!(upload.images(), 4);
        for images in [0..4, 0..2, 2..4, 3..4] {
            let made = upload.crops(2..4, &images, 8, &config, DType::F32).unwrap();
            assert_eq!(numbers(&made), expected(&batch(number), 2..4, &images, &config), "batch {number}");
        }
    }
}

#[test]
fn a_stopped_uploader_waits_for_no_slot() {
    let config = AugmentConfig { global_size: 8, local_size: 8, ..AugmentConfig::default() };
    let crops = [Case::noise(9, 9, 0, &config).for_device()];
    let mut uploader = Uploader::new(&device()).unwrap();
    let held = [(), ()].map(|()| uploader.send(&crops).unwrap().unwrap());
    let stop = uploader.stop();
    let waiting = std::thread::spawn(move || uploader.send(&crops).unwrap().is_none());
    stop.stop();
    assert!(waiting.join().unwrap());
    drop(held);
}
