//! Label propagation over the clips of the set, whoever computes it.

use pass_core::propagation::{ClipShape, Propagation, segment_into, segment_scratch_len};
use pass_core::shape::PatchGrid;
use serde_json::Value;

use crate::{Golden, Tolerance};

/// The whole number `key` of an entry.
pub fn whole(value: &Value, key: &str) -> usize {
    value[key].as_u64().unwrap_or_else(|| panic!("`{key}`: whole number expected in {value}")) as usize
}

/// The number `key` of an entry.
pub fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("`{key}`: number expected in {value}"))
}

fn pair(value: &Value, key: &str) -> (usize, usize) {
    let sides: [usize; 2] = serde_json::from_value(value[key].clone())
        .unwrap_or_else(|error| panic!("`{key}`: two sides expected in {value}: {error}"));
    (sides[0], sides[1])
}

/// `[rows, columns]` to `[columns, rows]`.
pub fn transposed(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    assert_eq!(values.len(), rows * columns);
    (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column])).collect()
}

/// Checks the soft labels and the masks of every frame of every clip. `propagate` gets the frames `[N, D]` of a clip, first
/// frame first, and the labels of that one `[N, C]`; it gives the soft labels `[N, C]` of each of the others.
pub fn check_propagation(golden: &Golden, propagate: impl Fn(ClipShape, &[&[f32]], &[f32]) -> Vec<Vec<f32>>) {
    let file = golden.file("video_propagation.safetensors");
    let (height, width) = pair(file.entry(), "grid");
    let grid = PatchGrid::new(height, width).expect("the grid of the set");
    let n = grid.n_patches();
    let mismatch = number(file.entry(), "label_mismatch_fraction");
    for (case, sizes) in file.cases().as_object().expect("cases by name") {
        let name = |part: &str| format!("{case}.{part}");
        let rule = Propagation {
            previous_frames: whole(sizes, "previous_frames"),
            radius: whole(sizes, "mask_radius"),
            top_k: whole(sizes, "topk"),
            temperature: number(sizes, "temperature") as f32,
        };
        let (features, shape) = file.tensor(&name("features"));
        let dim = shape[2];
        let (first, shape) = file.tensor(&name("first_segmentation"));
        let classes = shape[1];
        let shape = ClipShape::new(rule, grid, dim, classes).expect("sizes of the set");
        let frames: Vec<_> = features.chunks_exact(n * dim).collect();
        let found = propagate(shape, &frames, &transposed(first, classes, n));
        assert_eq!(found.len() + 1, frames.len(), "{case}: labels of every frame but the first");
        for (index, soft) in (1..).zip(found) {
            file.check(&name(&format!("propagated{index}")), &transposed(&soft, n, classes));
            let size = pair(sizes, "output_size");
            let mut mask = vec![0; size.0 * size.1];
            let mut scratch = vec![f32::NAN; segment_scratch_len(grid, classes)];
            let scale = whole(sizes, "patch_size");
            segment_into(&soft, grid, classes, scale, size, &mut scratch, &mut mask).expect("mask");
            let mask: Vec<f32> = mask.into_iter().map(f32::from).collect();
            let found = file.compare(&name(&format!("labels{index}")), &mask, Tolerance::EXACT);
            let differing = (found.compared - found.within) as f64 / found.compared as f64;
            assert!(differing <= mismatch, "{case} labels{index}: {differing} of the pixels differ");
        }
    }
}
