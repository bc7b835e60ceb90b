//! Label propagation, frame preparation and mask metrics.

use pass_core::frame::{MEAN, STD_OF_VIDEO_EVALUATION, normalize_into, prepared_size, resize_bilinear_into};
use pass_core::propagation::{Clip, one_hot_into, resize_nearest_into};
use pass_core::segmentation_metrics::{contour_accuracy, contour_tolerance, region_similarity};
use pass_core::shape::Tokens;
use pass_tests::video::{check_propagation, number, transposed, whole};
use pass_tests::{Golden, GoldenFile, Tolerance};

fn bytes(file: &GoldenFile<'_>, name: &str) -> Vec<u8> {
    let pixel = |&value: &f32| {
        assert!((0.0..=255.0).contains(&value) && value.fract() == 0.0, "{name}: {value} is no byte");
        value as u8
    };
    file.given(name).0.iter().map(pixel).collect()
}

pub(super) fn video_propagation(golden: &Golden) {
    check_propagation(golden, |shape, frames, first_labels| {
        let n = shape.grid().n_patches();
        let (mut features, mut labels) = (vec![0.0; shape.features_len()], vec![0.0; shape.labels_len()]);
        let mut frames = frames.iter().map(|frame| Tokens::new(frame, n, shape.dim()).expect("a frame"));
        let first = frames.next().expect("a first frame");
        let mut clip =
            Clip::new(shape, &mut features, &mut labels, first, first_labels).expect("first frame");
        let mut scratch = vec![f32::NAN; shape.scratch_len()];
        let label = |frame| {
            let mut soft = vec![f32::NAN; shape.frame_labels_len()];
            clip.set_target(frame).expect("target");
            clip.propagate_into(0..n, &mut scratch, &mut soft).expect("propagation");
            clip.keep_target(&soft).expect("labels");
            soft
        };
        frames.map(label).collect()
    });
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
