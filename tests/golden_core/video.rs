//! Label propagation, frame preparation and mask metrics.

use pass_core::frame::{MEAN, STD_OF_VIDEO_EVALUATION, normalize_into, prepared_size, resize_bilinear_into};
use pass_core::propagation::{
    Clip, ClipShape, Propagation, one_hot_into, resize_nearest_into, segment_into, segment_scratch_len,
};
use pass_core::segmentation_metrics::{contour_accuracy, contour_tolerance, region_similarity};
use pass_core::shape::{PatchGrid, Tokens};
use pass_tests::{Golden, GoldenFile, Tolerance};
use serde_json::Value;

fn whole(value: &Value, key: &str) -> usize {
    value[key].as_u64().unwrap_or_else(|| panic!("`{key}`: whole number expected in {value}")) as usize
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("`{key}`: number expected in {value}"))
}

fn pair(value: &Value, key: &str) -> (usize, usize) {
    let sides: [usize; 2] = serde_json::from_value(value[key].clone())
        .unwrap_or_else(|error| panic!("`{key}`: two sides expected in {value}: {error}"));
    (sides[0], sides[1])
}

/// `[C, N]` to `[N, C]`, or back with the sizes swapped.
fn transposed(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    assert_eq!(values.len(), rows * columns);
    (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column])).collect()
}

fn bytes(file: &GoldenFile<'_>, name: &str) -> Vec<u8> {
    let pixel = |&value: &f32| {
        assert!((0.0..=255.0).contains(&value) && value.fract() == 0.0, "{name}: {value} is no byte");
        value as u8
    };
    file.given(name).0.iter().map(pixel).collect()
}

pub(super) fn video_propagation(golden: &Golden) {
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
        let mut frames = features.chunks_exact(n * dim).map(|frame| Tokens::new(frame, n, dim).unwrap());

        let shape = ClipShape::new(rule, grid, dim, classes).expect("sizes of the set");
        let (mut features, mut labels) = (vec![0.0; shape.features_len()], vec![0.0; shape.labels_len()]);
        let first_labels = transposed(first, classes, n);
        let mut clip = Clip::new(
            shape,
            &mut features,
            &mut labels,
            frames.next().expect("a first frame"),
            &first_labels,
        )
        .expect("first frame");
        let mut scratch = vec![f32::NAN; shape.scratch_len()];
        for (index, frame) in (1..).zip(frames) {
            let mut soft = vec![f32::NAN; n * classes];
            clip.set_target(frame).expect("target");
            clip.propagate_into(0..n, &mut scratch, &mut soft).expect("propagation");
            file.check(&name(&format!("propagated{index}")), &transposed(&soft, n, classes));
            clip.keep_target(&soft).expect("labels");

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

pub(super) fn video_frame(golden: &Golden) {
    let file = golden.file("video_frame.safetensors");
    let tolerance = Tolerance::absolute(number(file.entry(), "frame_atol"));
    let (short_side, patch) = (file.hyper_usize("short_side"), file.hyper_usize("patch"));
    let cases: Vec<_> =
        file.names().iter().filter_map(|name| Some(name.strip_suffix(".rgb")?.to_owned())).collect();
    for case in cases {
        let name = |part: &str| format!("{case}.{part}");
        let rgb = bytes(&file, &name("rgb"));
        let shape = file.given(&name("rgb")).1;
        let size = (shape[0], shape[1]);
        let (height, width) = prepared_size(size, short_side).expect("a prepared size");
        let mut resized = vec![0; 3 * height * width];
        resize_bilinear_into(&rgb, size, 3, (height, width), &mut resized).expect("resized");
        let mut frame = vec![0.0; 3 * height * width];
        normalize_into(&resized, MEAN, STD_OF_VIDEO_EVALUATION, &mut frame).expect("normalized");
        file.check_with(&name("frame"), &frame, tolerance);

        let mask = bytes(&file, &name("mask"));
        let (rows, columns) = (height / patch, width / patch);
        let mut small = vec![0; rows * columns];
        resize_nearest_into(&mask, size, (rows, columns), &mut small).expect("small mask");
        let classes = usize::from(*small.iter().max().expect("a mask")) + 1;
        let mut labels = vec![0.0; small.len() * classes];
        one_hot_into(&small, classes, &mut labels).expect("labels");
        file.check(&name("first_segmentation"), &transposed(&labels, small.len(), classes));
    }
}

pub(super) fn video_metrics(golden: &Golden) {
    let file = golden.file("video_metrics.safetensors");
    let (truth, prediction) = (bytes(&file, "truth"), bytes(&file, "prediction"));
    let &[_, height, width] = file.given("truth").1 else { panic!("masks are [frames, H, W]") };
    assert_eq!(contour_tolerance((height, width)), whole(file.entry(), "radius"));
    let pixels = height * width;
    let mut scratch = vec![0; pixels];
    let (mut similarity, mut accuracy) = (vec![], vec![]);
    for (truth, prediction) in truth.chunks_exact(pixels).zip(prediction.chunks_exact(pixels)) {
        similarity.push(region_similarity(truth, prediction, 1).expect("J") as f32);
        let found = contour_accuracy(truth, prediction, (height, width), 1, &mut scratch);
        accuracy.push(found.expect("F") as f32);
    }
    file.check("J", &similarity);
    file.check("F", &accuracy);
}
