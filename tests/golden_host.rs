//! The golden set in the trainer: with the fused operations and with their compositions; label propagation.
//! `PASS_DEVICE=cuda` computes on a GPU; the feature `_emulator` adds the CUDA kernels on the CPU.

#[path = "golden_host/architecture.rs"]
mod architecture;
#[path = "golden_host/objective.rs"]
mod objective;
#[path = "golden_host/tiny.rs"]
mod tiny;
#[path = "golden_host/video.rs"]
mod video;

use candle_core::Tensor;
use pass_host::ops::Ops;
use pass_tests::{Golden, GoldenFile, device};

use architecture::{drop_path, full_arch, init_stats, pos_embed};
use objective::{class_attention, loss, matching, neighbours, neighbours_json, schedules, schedules_json};
use tiny::{tiny_forward, tiny_loss_grads, tiny_train, tiny_weights};
use video::video_propagation;

pass_tests::golden_suite! {
    elsewhere: ["augment.safetensors", "video_frame.safetensors", "video_metrics.safetensors"];
    neighbours: "neighbours.safetensors",
    neighbours_json: "neighbours.json",
    matching: "matching.safetensors",
    class_attention: "class_attention.safetensors",
    loss: "loss.safetensors",
    schedules: "schedules.safetensors",
    schedules_json: "schedules.json",
    drop_path: "drop_path.safetensors",
    pos_embed: "pos_embed.safetensors",
    full_arch: "full_arch.safetensors",
    init_stats: "init_stats.json",
    tiny_weights: "tiny_weights.safetensors",
    tiny_forward: "tiny_forward.safetensors",
    tiny_loss_grads: "tiny_loss_grads.safetensors",
    tiny_train: "tiny_train.safetensors",
    video_propagation: "video_propagation.safetensors",
}

/// Every way to compute an operation.
fn all_ops() -> Vec<Ops> {
    pass_tests::all_ops().into_iter().map(Ops::from).collect()
}

/// A tensor of the file on the device of the tests.
fn tensor(file: &GoldenFile<'_>, name: &str) -> Tensor {
    let (data, shape) = file.tensor(name);
    Tensor::from_slice(data, shape, device()).expect("shape from the manifest")
}

/// All values in row-major order.
fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.contiguous().and_then(|t| t.flatten_all()).and_then(|t| t.to_vec1()).expect("f32 tensor")
}

/// Checks `name` against a tensor.
fn check(file: &GoldenFile<'_>, name: &str, actual: &Tensor) {
    file.check(name, &values(actual));
}

/// Runs a fallible body; candle errors fail the test.
fn ok<T>(result: candle_core::Result<T>) -> T {
    result.unwrap_or_else(|error| panic!("{error}"))
}

/// `HxW` or `NAME_HxW` -> (prefix, height, width).
fn size_suffix(name: &str) -> (&str, usize, usize) {
    let (prefix, size) = name.rsplit_once('_').unwrap_or(("", name));
    let (height, width) = size.split_once('x').unwrap_or_else(|| panic!("`{name}` does not end in HxW"));
    let number = |text: &str| text.parse().unwrap_or_else(|_| panic!("`{name}` does not end in HxW"));
    (prefix, number(height), number(width))
}

/// The part of every tensor name before the first dot, once each, sorted.
fn cases(file: &GoldenFile<'_>) -> Vec<String> {
    let mut cases: Vec<String> = file
        .names()
        .iter()
        .filter_map(|name| name.split_once('.'))
        .map(|(case, _)| case.to_owned())
        .collect();
    cases.sort();
    cases.dedup();
    cases
}

#[test]
fn sizes_are_read_from_names() {
    assert_eq!(size_suffix("vit_tiny_224x96"), ("vit_tiny", 224, 96));
    assert_eq!(size_suffix("6x7"), ("", 6, 7));
    assert!(!cases(&Golden::open().file("matching.safetensors")).is_empty());
}
