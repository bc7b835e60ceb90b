//! `viz` on a tiny trained network: pages, and errors that name what is wrong.

#[expect(dead_code, reason = "some helpers serve other tests")]
mod program;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::LazyLock;

use candle_core::{Device, Tensor};
use pass_host::data::decode::{Rgb8Image, decode_rgb};
use pass_host::model::encoder::{Encoder, EncoderOptions};
use program::{expect_code, finish, photos, stderr, train};

/// A run of three steps, made once.
static RUN: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let dir = tempfile::tempdir().expect("a temporary folder");
    expect_code(&finish(train(&dir.path().join("tiny"), 3, &[], &[])), 0);
    dir
});

fn run() -> PathBuf {
    RUN.path().join("tiny")
}

fn photo(name: &str) -> String {
    photos().join(name).to_str().expect("a path in UTF-8").to_owned()
}

fn viz(out: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pass-host"));
    command.arg("viz").args(arguments).arg("--out").arg(out).args(["--device", "cpu", "--json"]);
    finish(command)
}

/// The page that was written.
#[track_caller]
fn page(out: &Path, arguments: &[&str]) -> (Rgb8Image, serde_json::Value) {
    let output = viz(out, arguments);
    expect_code(&output, 0);
    let summary: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    let file = summary["file"].as_str().expect("a file");
    let image = decode_rgb(&std::fs::read(file).expect("the page"), 50.0).expect("a PNG");
    assert_eq!(summary["size"], serde_json::json!([image.width, image.height]));
    (image, summary)
}

#[test]
fn every_picture_is_drawn_at_any_size() {
    let run = run();
    let (weights, random) = (run.to_str().unwrap().to_owned(), format!("random:{}", run.display()));
    let out = tempfile::tempdir().unwrap();
    let (a, b) = (photo("clothing/000.jpg"), photo("grocery/001.jpg"));
    for size in ["64", "40x104"] {
        for kind in ["top-patches", "attention", "positives", "pca"] {
            let both = [kind, &a, &b, "--weights", &weights, "--weights", &random, "--size", size];
            let (image, summary) = page(out.path(), &both);
            assert_eq!(summary["file"], out.path().join(format!("{kind}.png")).to_str().unwrap());
            assert_eq!(summary["images"].as_array().unwrap().len(), 2);
            assert!(image.width >= 900 && image.height > 400, "{kind}: {}x{}", image.width, image.height);
        }
    }
    // drawing has no randomness
    let one = ["pca", &a, "--weights", &weights, "--size", "64", "--panel", "64"];
    assert!(page(out.path(), &one).0 == page(out.path(), &one).0);
    for flags in [&["pca", "--no-foreground", "--enlarge", "nearest"][..], &["pca", "--swap-foreground"]] {
        page(out.path(), &[flags, &[&a, "--weights", &weights]].concat());
    }
    for flags in [
        &["top-patches", "--per-head", "--query", "0,0", "--at", "100,60", "--share", "0.25"][..],
        &["attention", "--per-head", "--enlarge", "nearest"],
        &["positives", "--window", "5", "--k", "9", "--border", "clip", "--query", "0,0"],
    ] {
        page(out.path(), &[flags, &[&a, "--weights", &weights, "--size", "64"]].concat());
    }
}

#[test]
fn wrong_requests_say_what_is_wrong() {
    let run = run();
    let weights = run.to_str().unwrap();
    let out = tempfile::tempdir().unwrap();
    let text = out.path().join("text.jpg");
    std::fs::write(&text, "no image").unwrap();
    let photo = photo("clothing/000.jpg");
    let cases: [(&[&str], i32, &str); 9] = [
        (
            &["top-patches", &photo, "--weights", weights, "--query", "99,0"],
            1,
            "query patch (99, 0) of image",
        ),
        (
            &["top-patches", &photo, "--weights", weights, "--at", "9999,0"],
            1,
            "query pixel (9999, 0) of image",
        ),
        (&["pca", text.to_str().unwrap(), "--weights", weights], 1, "cannot decode image"),
        (&["pca", "nowhere.jpg", "--weights", weights], 1, "nowhere.jpg"),
        (&["pca", &photo, "--weights", "nowhere"], 1, "no weights at `nowhere`"),
        (&["pca", &photo, "--weights", weights, "--size", "0x4"], 2, "height x width"),
        (&["pca", &photo, "--weights", weights, "--size", "6000x6000"], 1, "expected at most 8192"),
        (&["positives", &photo, "--weights", weights, "--k", "9"], 2, "expected 1 to 8"),
        (
            &["pca", &photo, "--weights", weights, "--label", "a", "--label", "b"],
            2,
            "2 `--label` for 1 `--weights`",
        ),
    ];
    for (arguments, code, words) in cases {
        let output = viz(out.path(), arguments);
        expect_code(&output, code);
        assert!(stderr(&output).contains(words), "{arguments:?}: {}", stderr(&output));
    }
    assert!(std::fs::read_dir(out.path()).unwrap().count() == 1, "nothing was written");
}

#[test]
fn weights_without_an_aggregation_head_have_no_positives() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("timm.safetensors");
    let mut export = Command::new(env!("CARGO_BIN_EXE_pass-host"));
    export.arg("export").arg(run()).args(["--to", "timm", "--out"]).arg(&file);
    expect_code(&finish(export), 0);
    let (weights, photo) = (file.to_str().unwrap(), photo("grocery/000.jpg"));
    for kind in ["positives", "attention"] {
        let output = viz(dir.path(), &[kind, &photo, "--weights", weights, "--heads", "2"]);
        expect_code(&output, 1);
        assert!(stderr(&output).contains("weights `timm` have no aggregation head"), "{}", stderr(&output));
    }
    page(dir.path(), &["top-patches", &photo, "--weights", weights, "--heads", "2", "--size", "64"]);
}

#[test]
fn attention_weights_are_those_of_the_head() {
    let encoder = Encoder::open(run().to_str().unwrap(), &EncoderOptions::default(), &Device::Cpu).unwrap();
    let images = Tensor::arange(0f32, 3.0 * 32.0 * 48.0, &Device::Cpu).unwrap();
    let images = ((images.reshape((1, 3, 32, 48)).unwrap() / 2000.0).unwrap()).sin().unwrap();
    let found = encoder.patch_features(&images).unwrap();
    assert_eq!(found.grid, (4, 6));
    let head = encoder.aggregation().expect("own weights have a head");
    let blocks = head.attention_weights(&found.features).unwrap();
    assert_eq!(blocks.len(), 2);
    for block in &blocks {
        assert_eq!(block.dims(), [1, 2, 1, 25]);
        for sum in block.sum(3).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap() {
            assert!((sum - 1.0).abs() < 1e-5, "{sum}");
        }
    }
    // other features in another order: the weights go with them
    let order = [7u32, 3, 11];
    let pick = |order: &[u32]| {
        let index = Tensor::new(order, &Device::Cpu).unwrap();
        let weights = head.attention_weights(&found.features.index_select(&index, 1).unwrap()).unwrap();
        weights[1].flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let (one, other) = (pick(&order), pick(&[11, 7, 3]));
    for head in 0..2 {
        let at = |values: &[f32], place: usize| values[4 * head + place];
        assert!((at(&one, 0) - at(&other, 0)).abs() < 1e-6, "the token itself");
        for (from, to) in [(1, 2), (2, 3), (3, 1)] {
            assert!((at(&one, from) - at(&other, to)).abs() < 1e-6, "head {head}");
        }
    }
}
