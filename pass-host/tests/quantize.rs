//! From weights to a file for the device and back: what is promised, what is refused.

#[expect(dead_code, reason = "some helpers serve other tests")]
mod program;

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use pass_edge::format::Mode;
use pass_edge::model::Model;
use program::{expect_code, finish, photos, stderr, train};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

fn pass_host(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pass-host"));
    command.args(arguments);
    finish(command)
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_run_becomes_a_file_that_keeps_its_promise_and_only_for_its_own_weights() {
    let folder = tempfile::tempdir().expect("a folder");
    let (run, other) = (folder.path().join("run"), folder.path().join("other"));
    expect_code(&finish(train(&run, 3, &[], &[])), 0);
    expect_code(&finish(train(&other, 3, &[], &["--seed", "7"])), 0);
    let photos = photos();
    for mode in ["exact", "fast"] {
        let out = folder.path().join(format!("{mode}.pass"));
        let arguments =
            ["quantize", text(&run), "--calibrate", text(&photos), "--images", "6", "--mode", mode];
        let output = pass_host(&[&arguments[..], &["--out", text(&out), "--json"]].concat());
        expect_code(&output, 0);
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
        assert!(report["fidelity"]["mean"].as_f64() > Some(0.998), "{report}");
        assert_eq!(
            (report["blocks"].as_array().map(Vec::len), report["mode"].as_str()),
            (Some(2), Some(mode))
        );
        let file = fs::read(&out).expect("the file");
        let model = Model::from_bytes(&file).expect("a model");
        assert_eq!(model.mode(), if mode == "fast" { Mode::Fast } else { Mode::Exact });
        assert_eq!((model.contract().images, model.pca().is_some()), (6, true));
        let promised = f64::from(model.contract().mean_cosine);
        assert!((report["fidelity"]["mean"].as_f64().expect("a number") - promised).abs() < 1e-6);

        let verify = |weights: &Path| {
            pass_host(&[
                "verify",
                text(&out),
                "--against",
                text(weights),
                "--images",
                text(&photos),
                "--limit",
                "8",
            ])
        };
        let output = verify(&run);
        expect_code(&output, 0);
        assert!(stdout(&output).contains("kept"), "{}", stdout(&output));
        let output = verify(&other);
        expect_code(&output, 1);
        assert!(stdout(&output).contains("NOT kept"), "{}", stdout(&output));
    }
    // the same command writes the same bytes
    let [first, second] = ["first.pass", "second.pass"].map(|name| {
        let out = folder.path().join(name);
        let arguments =
            ["quantize", text(&run), "--calibrate", text(&photos), "--images", "4", "--out", text(&out)];
        expect_code(
            &pass_host(
                &[&arguments[..], &["--threads", if name == "first.pass" { "1" } else { "2" }]].concat(),
            ),
            0,
        );
        fs::read(out).expect("the file")
    });
    assert!(first == second, "the number of threads changes nothing");

    let damaged = folder.path().join("damaged.pass");
    let mut bytes = first;
    let place = bytes.len() / 2;
    bytes[place] ^= 1;
    fs::write(&damaged, &bytes).expect("written");
    let output = pass_host(&["verify", text(&damaged), "--against", text(&run), "--images", text(&photos)]);
    expect_code(&output, 1);
    assert!(
        stderr(&output).contains("damaged.pass") && stderr(&output).contains("checksum"),
        "{}",
        stderr(&output)
    );

    let none = folder.path().join("none.pass");
    let arguments =
        ["quantize", text(&run), "--calibrate", text(&photos), "--images", "4", "--min-cosine", "1.0"];
    let output = pass_host(&[&arguments[..], &["--out", text(&none)]].concat());
    expect_code(&output, 1);
    let message = stderr(&output);
    assert!(message.contains("expected at least 1") && message.contains("nothing was written"), "{message}");
    let left: Vec<_> =
        fs::read_dir(folder.path()).expect("the folder").flatten().map(|entry| entry.file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().contains("none")), "{left:?}");
}

/// The file with one bit of the patch embedding's first scale changed and a checksum that fits.
fn with_another_scale(file: &[u8]) -> Vec<u8> {
    let model = Model::from_bytes(file).expect("a model");
    let architecture = model.architecture();
    let header = u32::from_le_bytes(file[12..16].try_into().expect("four bytes")) as usize;
    let weights = (16 + header).next_multiple_of(64);
    let scale = weights + architecture.dim() * architecture.patch_inputs();
    let mut changed = file[..file.len() - 8].to_vec();
    changed[scale + 2] ^= 0x40;
    let checksum = xxhash_rust::xxh3::xxh3_64(&changed);
    changed.extend(checksum.to_le_bytes());
    changed
}

#[test]
fn a_scale_that_changed_before_the_checksum_was_made_fails_the_self_test() {
    let folder = tempfile::tempdir().expect("a folder");
    let (weights, out) = (folder.path().join("vit.safetensors"), folder.path().join("vit.pass"));
    timm(&weights, |_| {});
    let photos = photos();
    let arguments = ["quantize", text(&weights), "--calibrate", text(&photos), "--images", "2"];
    let output = pass_host(&[&arguments[..], &["--heads", "2", "--out", text(&out)]].concat());
    expect_code(&output, 0);
    fs::write(&out, with_another_scale(&fs::read(&out).expect("the file"))).expect("written");
    let arguments = ["verify", text(&out), "--against", text(&weights), "--images", text(&photos)];
    let output = pass_host(&[&arguments[..], &["--heads", "2", "--limit", "2"]].concat());
    expect_code(&output, 1);
    let message = stderr(&output);
    assert!(message.contains("self-test") && message.contains("vit.pass"), "{message}");
}

/// A network with timm's names: class token, registers, LayerScale, final norm; positions 3x3.
fn timm(path: &Path, change: impl FnOnce(&mut HashMap<String, (Vec<usize>, Vec<f32>)>)) {
    let (dim, hidden, patch) = (32, 64, 4);
    let mut tensors = HashMap::new();
    let mut state = 1_u32;
    let mut add = |name: &str, shape: &[usize], mean: f32, spread: f32| {
        let values = (0..shape.iter().product()).map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            mean + spread * ((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
        });
        tensors.insert(name.to_owned(), (shape.to_vec(), values.collect()));
    };
    add("cls_token", &[1, 1, dim], 0.0, 1.0);
    add("reg_token", &[1, 2, dim], 0.0, 1.0);
    add("pos_embed", &[1, 10, dim], 0.0, 0.5);
    add("patch_embed.proj.weight", &[dim, 3, patch, patch], 0.0, 0.3);
    add("patch_embed.proj.bias", &[dim], 0.0, 0.1);
    for block in 0..2 {
        for (name, outputs, inputs) in [
            ("attn.qkv", 3 * dim, dim),
            ("attn.proj", dim, dim),
            ("mlp.fc1", hidden, dim),
            ("mlp.fc2", dim, hidden),
        ] {
            add(&format!("blocks.{block}.{name}.weight"), &[outputs, inputs], 0.0, 0.3);
            add(&format!("blocks.{block}.{name}.bias"), &[outputs], 0.0, 0.1);
        }
        for name in ["norm1", "norm2"] {
            add(&format!("blocks.{block}.{name}.weight"), &[dim], 1.0, 0.2);
            add(&format!("blocks.{block}.{name}.bias"), &[dim], 0.0, 0.2);
        }
        for name in ["ls1", "ls2"] {
            add(&format!("blocks.{block}.{name}.gamma"), &[dim], 0.5, 0.2);
        }
    }
    add("norm.weight", &[dim], 1.0, 0.2);
    add("norm.bias", &[dim], 0.0, 0.2);
    change(&mut tensors);
    let bytes: HashMap<String, (Vec<usize>, Vec<u8>)> = tensors
        .into_iter()
        .map(|(name, (shape, values))| {
            (name, (shape, values.iter().flat_map(|value| value.to_le_bytes()).collect()))
        })
        .collect();
    let views = bytes.iter().map(|(name, (shape, bytes))| {
        (name, TensorView::new(Dtype::F32, shape.clone(), bytes).expect("a tensor"))
    });
    safetensors::serialize_to_file(views, None, path).expect("written");
}

#[test]
fn class_token_registers_and_layer_scale_are_quantized() {
    let folder = tempfile::tempdir().expect("a folder");
    let (weights, out) = (folder.path().join("vit.safetensors"), folder.path().join("vit.pass"));
    timm(&weights, |_| {});
    let photos = photos();
    let arguments =
        ["quantize", text(&weights), "--calibrate", text(&photos), "--images", "6", "--heads", "2"];
    let output = pass_host(&[&arguments[..], &["--size", "24x20", "--out", text(&out)]].concat());
    expect_code(&output, 0);
    let notes = stderr(&output);
    assert!(
        notes.contains("35 of 35 tensors") && notes.contains("positions resized from 3x3 to 6x5"),
        "{notes}"
    );
    let file = fs::read(&out).expect("the file");
    let model = Model::from_bytes(&file).expect("a model");
    let architecture = model.architecture();
    assert_eq!((architecture.grid, architecture.tokens(), architecture.final_norm), ((6, 5), 33, true));
    assert!(architecture.layer_scale_folded && model.contract().mean_cosine > 0.999);
    let output = pass_host(&[
        "verify",
        text(&out),
        "--against",
        text(&weights),
        "--images",
        text(&photos),
        "--limit",
        "5",
        "--heads",
        "2",
    ]);
    expect_code(&output, 0);
}

#[test]
fn weights_that_are_none_are_refused_by_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let weights = folder.path().join("vit.safetensors");
    let photos = photos();
    let refused = |arguments: &[&str], code: i32, words: &[&str]| {
        let out = folder.path().join("vit.pass");
        let all =
            ["quantize", text(&weights), "--calibrate", text(&photos), "--out", text(&out), "--images", "2"];
        let output = pass_host(&[&all[..], arguments].concat());
        expect_code(&output, code);
        let message = stderr(&output);
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
        assert!(!out.exists());
    };
    timm(&weights, |tensors| drop(tensors.remove("blocks.1.mlp.fc2.bias")));
    refused(&["--heads", "2"], 1, &["vit.safetensors", "blocks.1.mlp.fc2.bias", "missing"]);
    timm(&weights, |tensors| drop(tensors.insert("head.weight".into(), (vec![1], vec![0.0]))));
    refused(&["--heads", "2"], 1, &["`head.weight`", "not part of this model"]);
    timm(&weights, |tensors| drop(tensors.insert("norm.bias".into(), (vec![31], vec![0.0; 31]))));
    refused(&["--heads", "2"], 1, &["norm.bias", "[32]", "[31]"]);
    timm(&weights, |tensors| drop(tensors.insert("norm.bias".into(), (vec![32], vec![f32::NAN; 32]))));
    refused(&["--heads", "2"], 1, &["norm.bias", "finite"]);
    timm(&weights, |_| {});
    refused(&["--heads", "3"], 1, &["heads", "divisor"]);
    refused(&["--size", "30"], 1, &["30x30", "patch size 4"]);
    refused(&["--mode", "slow"], 2, &["slow", "exact"]);
    refused(&["--min-cosine", "2"], 2, &["--min-cosine"]);
    fs::write(&weights, b"not weights").expect("written");
    refused(&[], 1, &["vit.safetensors"]);
}
