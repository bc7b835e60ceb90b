//! `info`, `verify`, `completions`, and flags that cannot be.

use std::fs;

use pass_edge::format::Mode;
use pass_edge::kernels::Kernel;
use pass_edge::model::Model;
use serde_json::Value;

use crate::harness::{Place, TINY, expect_code, model, stderr, stdout};
use crate::random_vit::FloatVit;

#[test]
fn info_tells_what_the_file_says() {
    let place = Place::new();
    let output = place.run(&["info", "tiny.pass", "--json", "--threads", "2"]);
    expect_code(&output, 0);
    let info: Value = serde_json::from_slice(&output.stdout).expect("one object");
    assert_eq!(info["architecture"]["dim"], 32);
    assert_eq!(info["image_size"], serde_json::json!([16, 16]));
    assert_eq!(info["block_cosines"].as_array().map(Vec::len), Some(2));
    assert_eq!(info["mode"], "exact");
    assert_eq!(info["file_bytes"], model().len());
    fs::write(
        place.path("fast.pass"),
        FloatVit { mode: Mode::Fast, ..FloatVit::random(TINY, 3) }.quantized(),
    )
    .expect("written");
    let text = stdout(&place.run(&["info", "fast.pass"]));
    assert!(text.contains("fast\n"), "{text}");
    assert!(text.contains("4 patches (2 × 2)"), "{text}");
}

#[test]
fn verify_accepts_a_good_file_with_every_kernel() {
    let place = Place::new();
    expect_code(&place.run(&["verify", "tiny.pass"]), 0);
    let output = place.run(&["verify", "tiny.pass", "--all-kernels", "--threads", "2", "--json"]);
    expect_code(&output, 0);
    let report: Value = serde_json::from_slice(&output.stdout).expect("one object");
    assert_eq!(report["kernels"].as_array().map(Vec::len), Some(Kernel::available().count()));
}

/// A file with a scale changed and a right checksum: only the self-test can tell.
#[test]
fn verify_fails_on_a_changed_scale() {
    let place = Place::new();
    let vit = FloatVit::random(TINY, 3);
    let mut bytes = vit.quantized();
    let scales: Vec<u8> = vit.tensor("norm.weight").iter().flat_map(|scale| scale.to_le_bytes()).collect();
    let at = bytes.windows(scales.len()).position(|window| window == scales).expect("in the file");
    // bit 0 of the exponent: twice or half as large
    bytes[at + 2] ^= 0x80;
    let end = bytes.len() - 8;
    let checksum = xxhash_rust::xxh3::xxh3_64(&bytes[..end]);
    bytes[end..].copy_from_slice(&checksum.to_le_bytes());
    fs::write(place.path("bad.pass"), &bytes).expect("written");

    let promised = Model::from_bytes(&bytes).expect("valid").self_test().digest;
    for command in
        [&["verify", "bad.pass", "--kernel", "scalar"][..], &["verify", "bad.pass", "--all-kernels"]]
    {
        let output = place.run(command);
        expect_code(&output, 1);
        assert!(stdout(&output).starts_with("MISMATCH"), "{}", stdout(&output));
        let message = stderr(&output);
        for part in ["bad.pass", "kernel `scalar`", &format!("{promised:016x}"), "hint:"] {
            assert!(message.contains(part), "`{part}` in\n{message}");
        }
    }
}

#[test]
fn a_damaged_file_and_a_missing_one_are_errors_with_the_path() {
    let place = Place::new();
    let mut bytes = model();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(place.path("damaged.pass"), &bytes).expect("written");
    fs::write(place.path("empty.pass"), b"").expect("written");
    for (file, reason) in
        [("damaged.pass", "checksum"), ("empty.pass", "not a .pass file"), ("absent.pass", "No such file")]
    {
        for command in ["verify", "info"] {
            let output = place.run(&[command, file]);
            expect_code(&output, 1);
            let message = stderr(&output);
            assert!(message.contains(file) && message.contains(reason), "{message}");
        }
    }
}

#[test]
fn kernels_that_are_not_there_are_refused_with_a_list() {
    let place = Place::new();
    let foreign = if cfg!(target_arch = "x86_64") { "i8mm" } else { "avx2" };
    let output = place.run(&["verify", "tiny.pass", "--kernel", foreign]);
    expect_code(&output, 2);
    assert!(stderr(&output).contains("available here: auto, scalar"), "{}", stderr(&output));
    let output = place.run(&["verify", "tiny.pass", "--kernel", "mmx"]);
    expect_code(&output, 2);
    assert!(stderr(&output).contains("avx512_vnni"), "{}", stderr(&output));
    expect_code(&place.run(&["verify", "tiny.pass", "--threads", "0"]), 2);
}

#[test]
fn completions_name_the_commands() {
    let output = Place::new().run(&["completions", "bash"]);
    expect_code(&output, 0);
    assert!(stdout(&output).contains("verify"));
}
