use super::*;
use crate::format::generated_pixel;
use crate::image::{Plane, YuvColor};
use proptest::prelude::*;
use std::vec;
use std::vec::Vec;

fn noise(seed: u64, count: usize) -> Vec<u8> {
    (0..count as u64).map(|index| generated_pixel(seed, index)).collect()
}

fn resize(resize: &Resize, image: &Image<'_>, kernel: Kernel) -> Vec<u8> {
    let len = resize.scratch_len();
    let (mut words, mut bytes) = (vec![-7; len.words], vec![99; len.bytes]);
    let mut out = vec![1; 3 * resize.target().0 * resize.target().1];
    let mut scratch = ResizeScratch { words: &mut words, bytes: &mut bytes };
    let size = resize.resize_into(image, kernel, &mut scratch, &mut out).unwrap().size();
    assert_eq!(size, resize.target());
    out
}

/// One axis by its definition, in f64, without rounding between the passes.
fn weights(from: usize, to: usize, index: usize, filter: Filter) -> Vec<f64> {
    let scale = from as f64 / to as f64;
    let wide = scale.max(1.0);
    let center = (index as f64 + 0.5) * scale;
    let shape = |x: f64| match (filter, x.abs()) {
        (Filter::Bilinear, x) if x < 1.0 => 1.0 - x,
        (Filter::Bicubic, x) if x < 1.0 => 1.5 * x.powi(3) - 2.5 * x.powi(2) + 1.0,
        (Filter::Bicubic, x) if x < 2.0 => -0.5 * x.powi(3) + 2.5 * x.powi(2) - 4.0 * x + 2.0,
        _ => 0.0,
    };
    let all: Vec<f64> = (0..from).map(|pixel| shape((pixel as f64 + 0.5 - center) / wide)).collect();
    let sum: f64 = all.iter().sum();
    all.into_iter().map(|weight| weight / sum).collect()
}

/// The plain twin: every pixel of the source counts, whatever its weight.
fn twin(rgb: &[u8], source: (usize, usize), target: (usize, usize), fit: Fit, filter: Filter) -> Vec<f64> {
    let around = |share: f64| {
        let wanted = (share * target.0 as f64, share * target.1 as f64);
        let (wanted_height, wanted_width) = (wanted.0.round(), wanted.1.round());
        let (height, width) = (source.0 as f64, source.1 as f64);
        if width * wanted_height <= height * wanted_width {
            ((wanted_width * height / width + 1e-9).floor() as usize, wanted_width as usize)
        } else {
            (wanted_height as usize, (wanted_height * width / height + 1e-9).floor() as usize)
        }
    };
    let (height, width) = match fit {
        Fit::Stretch => target,
        Fit::Cover => around(1.0),
        Fit::CenterCrop => around(8.0 / 7.0),
    };
    let offset = |whole: usize, part: usize| ((whole - part) as f64 / 2.0).round_ties_even() as usize;
    let (top, left) = (offset(height, target.0), offset(width, target.1));
    let used = |weights: Vec<f64>| -> Vec<(usize, f64)> {
        weights.into_iter().enumerate().filter(|(_, weight)| *weight != 0.0).collect()
    };
    let columns: Vec<_> = (0..target.1).map(|x| used(weights(source.1, width, left + x, filter))).collect();
    let mut out = Vec::new();
    for y in 0..target.0 {
        let rows = used(weights(source.0, height, top + y, filter));
        for columns in &columns {
            for channel in 0..3 {
                let mut sum = 0.0;
                for (row, row_weight) in &rows {
                    for (column, weight) in columns {
                        let pixel = rgb[3 * (row * source.1 + column) + channel];
                        sum += row_weight * weight * f64::from(pixel);
                    }
                }
                out.push(sum.clamp(0.0, 255.0));
            }
        }
    }
    out
}

/// Within what two roundings and a clamp between them can do to noise.
fn check(source: (usize, usize), target: (usize, usize), fit: Fit, filter: Filter, tolerance: f64) {
    let rgb = noise(source.0 as u64 + 7 * source.1 as u64, 3 * source.0 * source.1);
    let image = Image::new(&rgb, source, 3 * source.1, PixelOrder::Rgb).unwrap();
    let plan = Resize::new(source, target, fit, filter).unwrap();
    let expected = twin(&rgb, source, target, fit, filter);
    let reference = resize(&plan, &image, Kernel::Scalar);
    for (at, (found, expected)) in reference.iter().zip(&expected).enumerate() {
        let difference = (f64::from(*found) - expected).abs();
        assert!(
            difference <= tolerance,
            "{source:?} to {target:?}, {fit:?}, {filter:?}: byte {at} is {found}, expected {expected:.2}"
        );
    }
    for kernel in Kernel::available() {
        assert_eq!(resize(&plan, &image, kernel), reference, "{}", kernel.name());
    }
}

const FITS: [Fit; 3] = [Fit::CenterCrop, Fit::Cover, Fit::Stretch];

#[test]
fn every_size_and_fit_agrees_with_real_numbers() {
    let sources: &[_] = if cfg!(miri) {
        &[(1, 1), (9, 5)]
    } else {
        &[(1, 1), (1, 40), (40, 1), (2, 3), (16, 16), (17, 33), (90, 31), (31, 90), (200, 20), (64, 48)]
    };
    for source in sources {
        for target in [(1, 1), (16, 16), (14, 28), (33, 7)] {
            for fit in FITS {
                // a pass is off by half a step; bicubic weights add up to 1.25 in magnitude
                check(*source, target, fit, Filter::Bilinear, 1.01);
            }
        }
    }
}

#[test]
fn bicubic_agrees_with_real_numbers_where_nothing_is_clamped() {
    // smooth enough that no value leaves 0 to 255 between the passes
    for source in [(60, 80), (80, 60), (20, 90), (90, 20), (5, 5)] {
        let rgb: Vec<u8> = noise(3, 3 * source.0 * source.1).iter().map(|byte| 96 + byte / 4).collect();
        let image = Image::new(&rgb, source, 3 * source.1, PixelOrder::Rgb).unwrap();
        for target in [(16, 16), (14, 28), (33, 7)] {
            for fit in FITS {
                let plan = Resize::new(source, target, fit, Filter::Bicubic).unwrap();
                let expected = twin(&rgb, source, target, fit, Filter::Bicubic);
                let reference = resize(&plan, &image, Kernel::Scalar);
                for (found, expected) in reference.iter().zip(expected) {
                    assert!((f64::from(*found) - expected).abs() < 1.2, "{source:?} to {target:?}, {fit:?}");
                }
                for kernel in Kernel::available() {
                    assert_eq!(resize(&plan, &image, kernel), reference, "{}", kernel.name());
                }
            }
        }
    }
}

/// Height and width.
type Size = (usize, usize);

/// Source and target, and what Pillow 13.0.0 makes of the noise of seed 11: `xxh3_64` of
/// `Image.fromarray(noise).resize((width, height), filter).tobytes()` for BILINEAR and BICUBIC.
const PILLOW: [(Size, Size, [u64; 2]); 9] = [
    ((48, 64), (16, 16), [0x13cad61bfd88d35a, 0xd4a4376037193f98]),
    ((90, 31), (14, 28), [0x5a2b0850f2dd43f1, 0xd9568f3c3e39e004]),
    ((31, 90), (33, 7), [0xaefb21b9b94ee77e, 0xb4e0904366ff38b0]),
    ((200, 20), (16, 16), [0xab7f848081f188a0, 0xefb0238a2a02a9e8]),
    ((20, 200), (16, 16), [0x9ade58e02ee1b567, 0xc51770e2f0f863a3]),
    ((5, 7), (16, 16), [0xe93f581d2eefdb4d, 0x15835f0bd93d9fe8]),
    ((1, 1), (3, 2), [0x9186c1c414dc25be, 0x9186c1c414dc25be]),
    ((240, 320), (56, 56), [0xd7585fe67ceb6d0d, 0x6ffa968a4299d579]),
    ((17, 33), (17, 40), [0x7b93e45cd97f0417, 0x6add85b9549bc565]),
];

#[test]
fn bytes_are_those_of_pillow() {
    for (source, target, digests) in PILLOW {
        let rgb = noise(11, 3 * source.0 * source.1);
        let image = Image::new(&rgb, source, 3 * source.1, PixelOrder::Rgb).unwrap();
        for (filter, digest) in [Filter::Bilinear, Filter::Bicubic].into_iter().zip(digests) {
            let plan = Resize::new(source, target, Fit::Stretch, filter).unwrap();
            let found = xxhash_rust::xxh3::xxh3_64(&resize(&plan, &image, Kernel::best()));
            assert_eq!(found, digest, "{source:?} to {target:?}, {filter:?}");
        }
    }
}

#[test]
fn the_same_size_gives_the_same_pixels() {
    let rgb = noise(5, 3 * 24 * 40);
    let image = Image::new(&rgb, (24, 40), 120, PixelOrder::Rgb).unwrap();
    for filter in [Filter::Bilinear, Filter::Bicubic] {
        for fit in [Fit::Cover, Fit::Stretch] {
            let plan = Resize::new((24, 40), (24, 40), fit, filter).unwrap();
            assert!(plan.is_identity());
            assert_eq!(resize(&plan, &image, Kernel::Scalar), rgb);
        }
        assert!(!Resize::new((24, 40), (24, 40), Fit::CenterCrop, filter).unwrap().is_identity());
    }
}

#[test]
fn the_center_view_is_that_of_the_trainer() {
    let plan = Resize::new((480, 640), (224, 224), Fit::CenterCrop, Filter::Bicubic).unwrap();
    assert_eq!((plan.rows.to(), plan.columns.to()), (256, 341));
    for side in 1..=MOST_TARGET {
        assert_eq!(with_margin(side), (side as f64 / 0.875).round() as usize);
    }
}

#[test]
fn the_order_of_bytes_changes_nothing() {
    let (height, width) = (21, 35);
    let rgb = noise(8, 3 * height * width);
    let bgr: Vec<u8> = rgb.as_chunks::<3>().0.iter().flat_map(|[r, g, b]| [*b, *g, *r]).collect();
    let plan = Resize::new((height, width), (16, 16), Fit::Cover, Filter::Bicubic).unwrap();
    let from = |bytes, order| {
        resize(&plan, &Image::new(bytes, (height, width), 3 * width, order).unwrap(), Kernel::best())
    };
    assert_eq!(from(&rgb, PixelOrder::Rgb), from(&bgr, PixelOrder::Bgr));

    let gray = Image::new(&rgb, (height, width), width, PixelOrder::Gray).unwrap();
    assert!(resize(&plan, &gray, Kernel::best()).as_chunks::<3>().0.iter().all(|[r, g, b]| r == g && g == b));
}

#[test]
fn nv12_of_one_color_stays_that_color() {
    let (luma, chroma) = (vec![81; 31 * 45], [90, 240].repeat(16 * 23));
    let planes = (Plane { bytes: &luma, stride: 45 }, Plane { bytes: &chroma, stride: 46 });
    let image = Image::nv12(planes.0, planes.1, (31, 45), YuvColor::Bt601).unwrap();
    for fit in FITS {
        let plan = Resize::new((31, 45), (16, 16), fit, Filter::Bicubic).unwrap();
        let rgb = resize(&plan, &image, Kernel::best());
        assert!(rgb.as_chunks::<3>().0.iter().all(|pixel| *pixel == [254, 0, 0]), "{:?}", &rgb[..3]);
    }
}

#[test]
fn hostile_sizes_and_short_buffers_are_errors() {
    for (source, target) in [
        ((0, 5), (16, 16)),
        ((5, 0), (16, 16)),
        ((5, 5), (0, 16)),
        ((5, 5), (16, usize::MAX)),
        ((usize::MAX, 5), (16, 16)),
        ((65_536, 65_536), (16, 16)),
    ] {
        assert!(matches!(
            Resize::new(source, target, Fit::Cover, Filter::Bilinear),
            Err(Error::OutOfRange { min: 1, .. })
        ));
    }
    // the longest accepted sides are computed, not overflowed
    for source in [(1, MOST_SOURCE), (MOST_SOURCE, 1), (MOST_SOURCE, MOST_SOURCE)] {
        for target in [(1, MOST_TARGET), (MOST_TARGET, 1), (1, 1)] {
            for fit in FITS {
                Resize::new(source, target, fit, Filter::Bicubic).unwrap().scratch_len();
            }
        }
    }
    let plan = Resize::new((4, 4), (2, 2), Fit::Cover, Filter::Bilinear).unwrap();
    let len = plan.scratch_len();
    let pixels = [0; 48];
    let attempt = |size: (usize, usize), words: usize, bytes: usize, out: usize| {
        let image = Image::new(&pixels, size, 3 * size.1, PixelOrder::Rgb).unwrap();
        let mut scratch = (vec![0; words], vec![0; bytes]);
        let mut scratch = ResizeScratch { words: &mut scratch.0, bytes: &mut scratch.1 };
        plan.resize_into(&image, Kernel::Scalar, &mut scratch, &mut vec![0; out]).is_ok()
    };
    assert!(attempt((4, 4), len.words, len.bytes, 12));
    assert!(!attempt((4, 3), len.words, len.bytes, 12));
    assert!(!attempt((3, 4), len.words, len.bytes, 12));
    assert!(!attempt((4, 4), len.words - 1, len.bytes, 12));
    assert!(!attempt((4, 4), len.words, len.bytes - 1, 12));
    assert!(!attempt((4, 4), len.words, len.bytes, 11));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 48 }))]
    #[test]
    fn any_size_becomes_any_size(h in 1_usize..70, w in 1_usize..70, th in 1_usize..40, tw in 1_usize..40, fit in 0_usize..3) {
        check((h, w), (th, tw), FITS[fit], Filter::Bilinear, 1.01);
    }

    #[test]
    fn windows_stay_within_the_source_and_their_bound(from in 1_usize..3000, to in 1_usize..3000) {
        for filter in [Filter::Bilinear, Filter::Bicubic] {
            let axis = Axis::new(from, to, to, filter);
            for index in [0, to / 3, to / 2, to - 1] {
                let window = axis.window(index);
                let mut weights = vec![0; axis.taps()];
                prop_assert!(window.count >= 1 && window.count <= axis.taps());
                prop_assert!(window.first + window.count <= from);
                window.weights_into(&mut weights);
                let sum: i64 = weights[..window.count].iter().map(|weight| i64::from(*weight)).sum();
                prop_assert!((sum - (1 << 22)).unsigned_abs() as usize <= window.count);
            }
        }
    }
}
