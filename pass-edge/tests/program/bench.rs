//! `bench`: its numbers are numbers, and memory stays what it promises.

use std::fs;

use pass_edge::format::Architecture;
use pass_edge::kernels::Kernel;
use serde_json::Value;

use crate::harness::{Place, expect_code, stdout};
use crate::random_vit::FloatVit;

#[test]
fn every_kernel_is_measured() {
    let place = Place::new();
    let output =
        place.run(&["bench", "tiny.pass", "--all-kernels", "--rounds", "3", "--json", "--threads", "2"]);
    expect_code(&output, 0);
    let report: Value = serde_json::from_slice(&output.stdout).expect("one object");
    let kernels = report["kernels"].as_array().expect("a list");
    assert_eq!(kernels.len(), Kernel::available().count());
    for kernel in kernels {
        for key in ["best_ms", "median_ms", "p95_ms", "images_per_s", "gmac_per_s"] {
            assert!(kernel[key].as_f64().is_some_and(|value| value > 0.0), "{key} in {kernel}");
        }
    }
    assert_eq!((&report["threads"], &report["rounds"]), (&2.into(), &3.into()));
    let text = stdout(&place.run(&["bench", "tiny.pass", "--kernel", "scalar", "--rounds", "1"]));
    assert!(text.contains("images/s") && text.contains("scalar"), "{text}");
    expect_code(&place.run(&["bench", "tiny.pass", "--rounds", "0"]), 2);
}

/// The model is mapped, not copied, and nothing grows.
#[cfg(target_os = "linux")]
#[test]
fn resident_memory_is_the_model_file_and_six_mebibytes() {
    let place = Place::new();
    let architecture = Architecture { depth: 4, ..Architecture::vit_small(16, (14, 14)) };
    let model = FloatVit::random(architecture, 1).quantized();
    fs::write(place.path("small.pass"), &model).expect("written");
    let output = place.run(&["bench", "small.pass", "--rounds", "2", "--json", "--threads", "2"]);
    expect_code(&output, 0);
    let report: Value = serde_json::from_slice(&output.stdout).expect("one object");
    let resident = report["rss_bytes"].as_u64().expect("known on Linux");
    // the promise is about release builds; one with checks in it has more code, whose pages count
    let code = if cfg!(debug_assertions) { 1 << 20 } else { 0 };
    let most = model.len() as u64 + (6 << 20) + code;
    assert!(resident <= most, "{resident} bytes resident, {most} allowed");
}
