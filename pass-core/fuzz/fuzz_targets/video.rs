//! Propagation, masks, frames and mask metrics with any sizes and any bit patterns: every function returns, none panics,
//! and labels stay what they are promised to be. `cargo fuzz run video` in `pass-core`.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pass_core::frame::{MEAN, STD, normalize_into, prepared_size, resize_bilinear_into};
use pass_core::propagation::{
    Clip, ClipShape, Propagation, one_hot_into, resize_nearest_into, segment_into, segment_scratch_len,
};
use pass_core::segmentation_metrics::{Statistics, contour_accuracy, region_similarity};
use pass_core::shape::{PatchGrid, Tokens};

#[derive(Arbitrary, Debug)]
struct Input {
    grid: (u8, u8),
    size: (u8, u8),
    huge: (usize, usize, usize),
    previous_frames: usize,
    radius: usize,
    top_k: usize,
    small: bool,
    temperature: f32,
    dim: u8,
    classes: u8,
    scale: u8,
    cut: (u8, u8),
    /// Elements taken off a buffer: 0 fits.
    missing: u8,
    values: Vec<f32>,
    bytes: Vec<u8>,
}

impl Input {
    fn numbers(&self, len: usize, start: usize) -> Vec<f32> {
        self.values.iter().copied().chain([0.5]).cycle().skip(start).take(len).collect()
    }

    fn pixels(&self, len: usize) -> Vec<u8> {
        self.bytes.iter().copied().chain([1]).cycle().take(len).collect()
    }
}

fuzz_target!(|input: Input| {
    let missing = usize::from(input.missing % 8 / 7);
    let _ = prepared_size((input.huge.0, input.huge.1), input.huge.2);
    let (height, width) = (usize::from(input.grid.0 % 7), usize::from(input.grid.1 % 40));
    let size = (usize::from(input.size.0 % 24), usize::from(input.size.1 % 24));

    let mask = input.pixels(size.0 * size.1);
    let rgb = input.pixels((3 * size.0 * size.1).saturating_sub(missing));
    let mut resized = vec![0; 3 * height * width];
    if resize_bilinear_into(&rgb, size, 3, (height, width), &mut resized).is_ok() {
        normalize_into(&resized, MEAN, STD, &mut vec![0.0; resized.len()]).expect("whole pixels");
    }
    let mut patches = vec![0; height * width];
    if resize_nearest_into(&mask, size, (height, width), &mut patches).is_ok() {
        assert!(patches.iter().all(|label| mask.contains(label)));
    }
    let object = input.bytes.first().copied().unwrap_or(0);
    let j = region_similarity(&mask, &mask, object).expect("of one size");
    let f = contour_accuracy(&mask, &mask, size, object, &mut vec![0; mask.len()]).expect("of one size");
    assert_eq!((j, f), (1.0, 1.0), "a mask agrees with itself");
    let shifted: Vec<u8> = mask.iter().rev().copied().collect();
    let f = contour_accuracy(&mask, &shifted, size, object, &mut vec![0; mask.len()]).expect("of one size");
    assert!((0.0..=1.0).contains(&f));
    let _ = Statistics::of(&[j, f][missing..]);

    let Ok(grid) = PatchGrid::new(height, width) else { return };
    let (n, dim, classes) = (grid.n_patches(), usize::from(input.dim % 20), usize::from(input.classes % 5));
    let limit = |value: usize, limit: usize| if input.small { value % limit } else { value };
    let rule = Propagation {
        previous_frames: limit(input.previous_frames, 4),
        radius: limit(input.radius, 9),
        top_k: limit(input.top_k, 9),
        temperature: input.temperature,
    };
    let Ok(shape) = ClipShape::new(rule, grid, dim, classes) else { return };
    if shape.features_len().max(shape.labels_len()) > 1 << 18 {
        return;
    }
    patches.iter_mut().for_each(|label| *label %= 6);
    let mut first = vec![0.0; n * classes];
    if one_hot_into(&patches, classes, &mut first).is_err() {
        return;
    }
    let mut features = vec![f32::NAN; shape.features_len().saturating_sub(missing)];
    let mut labels = vec![f32::NAN; shape.labels_len()];
    let frame = input.numbers(n * dim, 0);
    let Ok(mut clip) =
        Clip::new(shape, &mut features, &mut labels, Tokens::new(&frame, n, dim).expect("tokens"), &first)
    else {
        return;
    };
    let mut scratch = vec![f32::NAN; shape.scratch_len()];
    let mut soft = vec![f32::NAN; n * classes];
    for number in 1..4 {
        let frame = input.numbers(n * dim, number);
        clip.set_target(Tokens::new(&frame, n, dim).expect("tokens")).expect("a target");
        let cut = usize::from(input.cut.0) % (n + 1);
        let (one, two) = soft.split_at_mut(cut * classes);
        clip.propagate_into(0..cut, &mut scratch, one).expect("patches");
        clip.propagate_into(cut..n, &mut scratch, two).expect("patches");
        for labels in soft.chunks_exact(classes) {
            let sum: f32 = labels.iter().sum();
            assert!(labels.iter().all(|label| (0.0..1.001).contains(label)), "{labels:?}");
            assert!(sum == 0.0 || (sum - 1.0).abs() < 1e-3, "{labels:?}");
        }
        let (start, end) = (usize::from(input.cut.1), usize::from(input.cut.0));
        let _ = clip.propagate_into(start..end, &mut scratch, &mut vec![0.0; 9]);
        clip.keep_target(&soft).expect("labels");
        let mut out = vec![0; size.0 * size.1];
        let mut scratch = vec![f32::NAN; segment_scratch_len(grid, classes)];
        let scale = usize::from(input.scale % 9);
        if segment_into(&soft, grid, classes, scale, size, &mut scratch, &mut out).is_ok() {
            assert!(out.iter().all(|&label| usize::from(label) < classes));
        }
    }
});
