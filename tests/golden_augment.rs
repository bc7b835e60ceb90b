//! The image operations of the augmentation against the golden set.

use pass_host::config::AugmentConfig;
use pass_host::data::Rgb8Image;
use pass_host::data::augment::{
    CropBox, Planes, Resampler, adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation,
    gaussian_blur, grayscale, normalize_into, solarize,
};
use pass_tests::{Golden, GoldenFile, Tolerance};

#[test]
fn augmentation_operations_match_the_golden_set() {
    let golden = Golden::open();
    augment(&golden);
    golden.assert_covered("augment.safetensors");
}

/// Levels two correct 8-bit implementations may differ by; the note of the entry grants the hue twice as many.
fn gray_levels(file: &GoldenFile<'_>, name: &str) -> Tolerance {
    let levels = file.entry()["atol_grey_levels"].as_f64().expect("`atol_grey_levels` of the entry");
    Tolerance::absolute(if has_hue(name) { 2.0 * levels } else { levels })
}

fn has_hue(name: &str) -> bool {
    name.split('_')
        .any(|part| part == "hue" || part.strip_prefix('h').is_some_and(|f| f.parse::<f64>().is_ok()))
}

fn augment(golden: &Golden) {
    let file = golden.file("augment.safetensors");
    let (values, shape) = file.tensor("image");
    let [height, width, 3] = *shape else { panic!("image: [height, width, 3] expected, found {shape:?}") };
    let image = Rgb8Image {
        width: width as u32,
        height: height as u32,
        data: values.iter().map(|&value| value as u8).collect(),
    };
    for name in file.names() {
        if name == "image" {
            continue;
        }
        if name == "normalised" {
            let config = AugmentConfig::default();
            let mut out = vec![0.0; 3 * width * height];
            let planes = Planes::from_interleaved(width, height, &image.data);
            normalize_into(&planes, config.mean, config.std, &mut out);
            file.check_with(name, &out, Tolerance::absolute(1e-6));
            continue;
        }
        let planes = apply(&file, name, &image);
        let bytes: Vec<f32> = planes.to_interleaved().into_iter().map(f32::from).collect();
        assert_eq!(file.spec(name).shape, [planes.height(), planes.width(), 3], "{name}");
        file.check_with(name, &bytes, gray_levels(&file, name));
    }
}

/// Applies the operation that an entry is named after.
fn apply(file: &GoldenFile<'_>, name: &str, image: &Rgb8Image) -> Planes {
    let mut planes = Planes::from_interleaved(image.width as usize, image.height as usize, &image.data);
    let crop = &file.entry()["crops"][name];
    if crop.is_object() {
        let number = |key: &str| {
            crop[key].as_u64().unwrap_or_else(|| panic!("crops.{name}.{key}: whole number expected")) as u32
        };
        let region = CropBox {
            left: number("left"),
            top: number("top"),
            width: number("width"),
            height: number("height"),
        };
        let size = number("size") as usize;
        Resampler::default().crop_resize(image, region, 1, size, size, &mut planes);
        return planes;
    }
    let (operation, factors) = name.split_once('_').unwrap_or((name, ""));
    let factor = || factors.parse::<f64>().unwrap_or_else(|_| panic!("{name}: no factor in the name"));
    match operation {
        "hflip" => planes.flip(),
        "brightness" => adjust_brightness(&mut planes, factor()),
        "contrast" => adjust_contrast(&mut planes, factor()),
        "saturation" => adjust_saturation(&mut planes, factor()),
        "hue" => adjust_hue(&mut planes, factor()),
        "grayscale" => grayscale(&mut planes),
        "solarize" => solarize(&mut planes, 128),
        "blur" => gaussian_blur(&mut planes, factor(), &mut Planes::default()),
        "jitter" => {
            for step in factors.split('_') {
                let (letter, factor) = step.split_at(1);
                let factor = factor.parse().unwrap_or_else(|_| panic!("{name}: `{step}` has no factor"));
                match letter {
                    "b" => adjust_brightness(&mut planes, factor),
                    "c" => adjust_contrast(&mut planes, factor),
                    "s" => adjust_saturation(&mut planes, factor),
                    "h" => adjust_hue(&mut planes, factor),
                    _ => panic!("{name}: unknown step `{step}`"),
                }
            }
        }
        _ => panic!("no test knows the entry `{name}`"),
    }
    planes
}
