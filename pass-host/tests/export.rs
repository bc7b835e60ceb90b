//! What `pass-host export` writes for others, and what it refuses. The libraries themselves are in `tests/export_check.py`.

#[expect(dead_code, reason = "some helpers serve other tests")]
mod program;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::LazyLock;

use program::{expect_code, finish, photos, stderr, train};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

fn pass_host(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pass-host"));
    command.args(arguments);
    finish(command)
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// A run that all tests share; its folder stays until the process ends.
fn run() -> &'static Path {
    static RUN: LazyLock<(tempfile::TempDir, PathBuf)> = LazyLock::new(|| {
        let folder = tempfile::tempdir().expect("a folder");
        let run = folder.path().join("run");
        expect_code(&finish(train(&run, 1, &[], &[])), 0);
        (folder, run)
    });
    &RUN.1
}

fn export(weights: &Path, form: &str, out: &Path, flags: &[&str]) -> Output {
    pass_host(&[&["export", text(weights), "--to", form, "--out", text(out)][..], flags].concat())
}

/// Shapes by name of a safetensors file.
fn shapes(path: &Path) -> BTreeMap<String, Vec<usize>> {
    let bytes = fs::read(path).expect("weights");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    file.tensors().into_iter().map(|(name, tensor)| (name, tensor.shape().to_vec())).collect()
}

/// A backbone with timm's names and a class token; `more` tensors beside it.
fn timm_file(path: &Path, more: &[(&str, Vec<usize>)]) {
    let (dim, hidden) = (32, 64);
    let mut all: Vec<(String, Vec<usize>)> = vec![
        ("patch_embed.proj.weight".into(), vec![dim, 3, 16, 16]),
        ("patch_embed.proj.bias".into(), vec![dim]),
        ("pos_embed".into(), vec![1, 17, dim]),
        ("cls_token".into(), vec![1, 1, dim]),
        ("norm.weight".into(), vec![dim]),
        ("norm.bias".into(), vec![dim]),
    ];
    for (layer, shape) in [
        ("norm1", vec![dim]),
        ("norm2", vec![dim]),
        ("attn.qkv", vec![3 * dim, dim]),
        ("attn.proj", vec![dim, dim]),
        ("mlp.fc1", vec![hidden, dim]),
        ("mlp.fc2", vec![dim, hidden]),
    ] {
        all.push((format!("blocks.0.{layer}.bias"), shape[..1].to_vec()));
        all.push((format!("blocks.0.{layer}.weight"), shape));
    }
    all.extend(more.iter().map(|(name, shape)| ((*name).to_owned(), shape.clone())));
    let values = vec![0_u8; 4 * all.iter().map(|(_, shape)| shape.iter().product::<usize>()).max().unwrap()];
    let tensors = all.iter().map(|(name, shape)| {
        let bytes = &values[..4 * shape.iter().product::<usize>()];
        (name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes).expect("a tensor"))
    });
    fs::write(path, safetensors::serialize(tensors, None).expect("a file")).expect("write");
}

#[test]
fn a_card_says_what_lies_beside_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("vit.onnx");
    let output = export(run(), "onnx", &out, &["--json"]);
    expect_code(&output, 0);
    let told: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!(told["card"].as_str(), Some(text(&folder.path().join("vit.onnx.md"))));
    let card = fs::read_to_string(folder.path().join("vit.onnx.md")).expect("the card");
    let bytes = fs::metadata(&out).expect("the graph").len();
    for expected in [
        "dino with the patch objective PASS at step 1",
        "Images: `photos`",
        "[0.485, 0.456, 0.406]",
        "patch_tokens` [batch, N, 32]",
        "aggregation head",
        "InferenceSession('vit.onnx')",
        &format!("| vit.onnx | {bytes} |"),
        "Licence: to be filled in",
    ] {
        assert!(card.contains(expected), "`{expected}` in\n{card}");
    }
    assert_eq!(fs::read_dir(folder.path()).expect("the folder").count(), 2, "nothing unfinished");
}

#[test]
fn transformers_get_a_folder_for_a_class_with_a_class_token_and_one_for_a_class_without() {
    let folder = tempfile::tempdir().expect("a folder");
    for (form, class, width, tokens) in
        [("huggingface", "ViTModel", 34, 17), ("huggingface-ijepa", "IJepaModel", 32, 16)]
    {
        let out = folder.path().join(form);
        expect_code(&export(run(), form, &out, &[]), 0);
        let config: serde_json::Value =
            serde_json::from_slice(&fs::read(out.join("config.json")).expect("a config")).expect("JSON");
        assert_eq!(config["architectures"][0], class);
        assert_eq!(config["hidden_size"], width);
        let shapes = shapes(&out.join("model.safetensors"));
        assert_eq!(shapes["embeddings.position_embeddings"], [1, tokens, width]);
        assert_eq!(shapes["encoder.layer.1.attention.attention.key.weight"], [width, width]);
        assert_eq!(shapes.contains_key("embeddings.cls_token"), class == "ViTModel");
        // two blocks of sixteen tensors, patch embedding, positions, norm, perhaps the class token
        assert_eq!(shapes.len(), 2 * 16 + 2 + 1 + 2 + usize::from(class == "ViTModel"));
        assert!(out.join("preprocessor_config.json").exists() && out.join("README.md").exists());
    }
}

#[test]
fn openmmlab_gets_its_names() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("mmseg.safetensors");
    let output = export(run(), "mmsegmentation", &out, &[]);
    expect_code(&output, 0);
    assert!(String::from_utf8_lossy(&output.stdout).contains("with_cls_token=False"));
    let shapes_of = shapes(&out);
    assert_eq!(shapes_of["layers.1.attn.attn.in_proj_weight"], [96, 32]);
    assert_eq!(shapes_of["layers.0.ffn.layers.0.0.bias"], shapes_of["layers.0.ffn.layers.0.0.weight"][..1]);
    assert_eq!(shapes_of["pos_embed"], [1, 17, 32]);
    assert!(
        ["ln1.weight", "layers.0.ln2.bias", "cls_token"].iter().all(|name| shapes_of.contains_key(*name))
    );

    let out = folder.path().join("mmdet.safetensors");
    expect_code(&export(run(), "mmdetection", &out, &[]), 0);
    let shapes = shapes(&out);
    assert_eq!(shapes["pos_embed"], [1, 16, 32]);
    assert!(!shapes.contains_key("cls_token") && !shapes.contains_key("norm.weight"));
}

#[test]
fn a_backbone_with_a_class_token_goes_through_timm_unchanged() {
    let folder = tempfile::tempdir().expect("a folder");
    let (file, out) = (folder.path().join("vit.safetensors"), folder.path().join("again.safetensors"));
    timm_file(&file, &[]);
    expect_code(&export(&file, "timm", &out, &["--heads", "2"]), 0);
    assert_eq!(shapes(&file), shapes(&out));
    timm_file(&file, &[("reg_token", vec![1, 2, 32])]);
    expect_code(&export(&file, "timm", &out, &["--heads", "2"]), 0);
    assert_eq!(
        (&shapes(&out)["pos_embed"][..], &shapes(&out)["reg_token"][..]),
        (&[1, 16, 32][..], &[1, 2, 32][..])
    );
}

#[test]
fn what_cannot_be_written_is_explained_and_nothing_is_left() {
    let folder = tempfile::tempdir().expect("a folder");
    let place = |name: &str| folder.path().join(name);
    timm_file(&place("vit.safetensors"), &[]);
    timm_file(&place("registers.safetensors"), &[("reg_token", vec![1, 2, 32])]);
    let resnet = [(
        "layer1.0.conv1.weight".to_owned(),
        TensorView::new(Dtype::F32, vec![1], &[0; 4]).expect("a tensor"),
    )];
    fs::write(place("resnet.safetensors"), safetensors::serialize(resnet, None).expect("a file"))
        .expect("write");
    fs::write(place("broken.pass"), b"\x89PASS\r\n\x1a and no more").expect("write");
    let model = place("model.pass");
    let output = pass_host(&[
        "quantize",
        text(run()),
        "--calibrate",
        text(&photos()),
        "--images",
        "2",
        "--out",
        text(&model),
    ]);
    expect_code(&output, 0);
    let vit = place("vit.safetensors");
    for (weights, form, flags, expected) in [
        (&place("resnet.safetensors"), "onnx", vec![], "is a ResNet: expected a Vision Transformer"),
        (&vit, "safetensors", vec![], "aggregation head"),
        (&vit, "huggingface-ijepa", vec![], "no place for a class token"),
        (&place("registers.safetensors"), "huggingface", vec![], "no place for register tokens"),
        (&place("registers.safetensors"), "mmsegmentation", vec![], "no place for register tokens"),
        (&vit, "onnx", vec!["--size", "15x200"], "expected at least one patch of 16 pixels, found 15x200"),
        (&vit, "onnx", vec!["--quantized", text(&model)], "depth: expected 1, found 2"),
        (
            &run().to_owned(),
            "onnx",
            vec!["--quantized", text(&model), "--size", "96"],
            "positions for 32x32 pixels, found 96x96",
        ),
        (&run().to_owned(), "onnx", vec!["--quantized", text(&model), "--dynamic-grid"], "found any"),
        (&run().to_owned(), "onnx", vec!["--quantized", "nowhere.pass"], "nowhere.pass"),
        (&vit, "onnx", vec!["--heads", "5"], "a divisor of the width"),
    ] {
        let out = place("out");
        let output = export(weights, form, &out, &flags);
        expect_code(&output, 1);
        assert!(stderr(&output).contains(expected), "`{expected}` in {}", stderr(&output));
        assert!(!out.exists() && !place("out.md").exists(), "{expected}");
    }
    let broken = place("broken.pass");
    let output = export(run(), "onnx", &place("out"), &["--quantized", text(&broken)]);
    expect_code(&output, 1);
    assert!(stderr(&output).contains("broken.pass"), "{}", stderr(&output));
    // a file where a folder belongs
    let output = export(run(), "huggingface", &vit, &[]);
    expect_code(&output, 1);
    assert!(stderr(&output).contains("cannot make the folder"), "{}", stderr(&output));
}

#[test]
fn int8_graphs_have_the_integers_of_their_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let (model, images) = (folder.path().join("model.pass"), photos());
    let output = pass_host(&[
        "quantize",
        text(run()),
        "--calibrate",
        text(&images),
        "--images",
        "2",
        "--out",
        text(&model),
    ]);
    expect_code(&output, 0);
    let bytes = |flags: &[&str]| {
        let out = folder.path().join("vit.onnx");
        let flags = [&["--quantized", text(&model)], flags].concat();
        expect_code(&export(run(), "onnx", &out, &flags), 0);
        let card = fs::read_to_string(folder.path().join("vit.onnx.md")).expect("the card");
        assert!(card.contains("mean cosine of patch tokens"), "{card}");
        (fs::read(&out).expect("the graph"), card)
    };
    let count =
        |bytes: &[u8], word: &[u8]| bytes.windows(word.len()).filter(|window| window == &word).count();
    let (per_token, card) = bytes(&[]);
    assert!(card.contains("a scale per token"));
    assert!(count(&per_token, b"ReduceMax") > 0);
    let (constant, card) = bytes(&["--calibrate", text(&images)]);
    assert!(card.contains("one constant scale, measured on photos"));
    assert_eq!(count(&constant, b"ReduceMax"), 0);
}

#[test]
fn features_leave_out_what_no_patch_covers() {
    let folder = tempfile::tempdir().expect("a folder");
    let images = photos().join("grocery");
    let features = |size: &str| {
        let out = folder.path().join("features.safetensors");
        let output = pass_host(&[
            "features",
            text(&images),
            "--weights",
            text(run()),
            "--size",
            size,
            "--out",
            text(&out),
        ]);
        (output, out)
    };
    let (output, out) = features("40x70");
    expect_code(&output, 0);
    assert_eq!(shapes(&out)["features"][1..], [5 * 8, 32]);
    let (output, _) = features("40x7");
    expect_code(&output, 1);
    assert!(stderr(&output).contains("at least 8 pixels, one patch, found 40x7"), "{}", stderr(&output));
}
