//! What leaves a run: features and exported weights, from the run, a checkpoint and an exported file.

#[expect(dead_code, reason = "some helpers serve other tests")]
mod program;

use std::fs;
use std::path::Path;
use std::process::Command;

use program::{expect_code, finish, latest, photos, stderr, train};
use safetensors::SafeTensors;

fn pass_host(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pass-host"));
    command.args(arguments);
    command
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// Shape and values of the only tensor of a features file.
fn features(path: &Path) -> (Vec<usize>, Vec<f32>) {
    let bytes = fs::read(path).expect("features");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let tensor = file.tensor("features").expect("a tensor called features");
    let values = tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four bytes")));
    (tensor.shape().to_vec(), values.collect())
}

#[test]
fn features_agree_wherever_the_weights_come_from() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = folder.path().join("run");
    expect_code(&finish(train(&run, 3, &[], &[])), 0);
    let exported = folder.path().join("teacher.safetensors");
    let output = finish(pass_host(&["export", text(&run), "--to", "safetensors", "--out", text(&exported)]));
    expect_code(&output, 0);

    let images = photos().join("grocery");
    let checkpoint = latest(&run);
    let mut results = Vec::new();
    for (index, weights) in [run.as_path(), &checkpoint, &exported].into_iter().enumerate() {
        let out = folder.path().join(format!("features-{index}.safetensors"));
        let output =
            finish(pass_host(&["features", text(&images), "--weights", text(weights), "--out", text(&out)]));
        expect_code(&output, 0);
        results.push(features(&out));
    }
    let (shape, values) = &results[0];
    assert_eq!(shape[1..], [16, 32], "4 x 4 patches of width 32");
    assert!(values.iter().all(|value| value.is_finite()));
    let names = fs::read_to_string(folder.path().join("features-0.images.txt")).expect("the names");
    assert_eq!(names.lines().count(), shape[0]);
    assert!(
        results.iter().all(|result| result == &results[0]),
        "the same bits from run, checkpoint and file"
    );

    let class = folder.path().join("class.npy");
    let flags = ["--tokens", "class", "--size", "48", "--network", "student"];
    let mut command = pass_host(&["features", text(&images), "--weights", text(&run), "--out", text(&class)]);
    command.args(flags);
    expect_code(&finish(command), 0);
    assert!(fs::read(&class).expect("npy").starts_with(b"\x93NUMPY"));
}

#[test]
fn timm_export_renames_every_backbone_tensor() {
    let folder = tempfile::tempdir().expect("a folder");
    let (run, out) = (folder.path().join("run"), folder.path().join("timm.safetensors"));
    expect_code(&finish(train(&run, 1, &[], &[])), 0);
    let output = finish(pass_host(&["export", text(&run), "--to", "timm", "--out", text(&out)]));
    expect_code(&output, 0);
    assert!(String::from_utf8_lossy(&output.stdout).contains("class_token=False"));
    let bytes = fs::read(&out).expect("weights");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let mut names: Vec<&str> = file.names().into_iter().collect();
    names.sort_unstable();
    // two blocks of twelve tensors, patch embedding, positions, final norm
    assert_eq!(names.len(), 2 * 12 + 2 + 1 + 2);
    assert!(names.contains(&"norm.weight") && names.contains(&"blocks.1.attn.qkv.bias"));
    assert_eq!(file.tensor("pos_embed").expect("positions").shape(), [1, 16, 32]);
}

#[test]
fn runs_of_contrastive_methods_are_weights_like_any_other() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    let images = photos().join("grocery");
    for method in ["moco_v3", "moby"] {
        let run = path(method);
        let settings = [
            &format!("image.method={method}"),
            "image.hidden=24",
            "image.out=8",
            "image.queue=20",
            "model.heads=4",
            "model.positions=sin_cos",
            "patch.enabled=false",
            "augment.local_crops=0",
        ];
        expect_code(&finish(train(&run, 3, &settings, &[])), 0);
        let file = path(&format!("{method}.safetensors"));
        for arguments in [
            ["export", text(&run), "--to", "safetensors", "--out", text(&file)].to_vec(),
            ["report", text(&run)].to_vec(),
        ] {
            expect_code(&finish(pass_host(&arguments)), 0);
        }
        let found = [&run, &file].map(|weights| {
            let out = path("features.safetensors");
            let arguments = ["features", text(&images), "--weights", text(weights), "--out", text(&out)];
            expect_code(&finish(pass_host(&arguments)), 0);
            features(&out)
        });
        assert!(found[0] == found[1], "{method}: the file knows heads and positions of the run");
        let bytes = fs::read(&file).expect("weights");
        let file = SafeTensors::deserialize(&bytes).expect("safetensors");
        let positions = file.tensor("backbone.pos_embed").expect("positions");
        let expected = pass_host::model::pos_embed::sin_cos_positions(4, 32);
        let expected: Vec<u8> = expected.into_iter().flat_map(f32::to_le_bytes).collect();
        assert!(positions.data() == expected, "{method}: nothing moved the fixed positions");
        assert!(file.names().iter().all(|name| !name.starts_with("pro") && !name.starts_with("pre")));
        let html = fs::read_to_string(run.join("report.html")).expect("the report");
        assert!(html.contains("contrast_accuracy") && !html.contains("teacher_entropy_image"), "{method}");
    }
}

#[test]
fn bad_weights_are_explained() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("f.safetensors");
    let images = photos().join("grocery");
    let damaged = folder.path().join("damaged.safetensors");
    fs::write(&damaged, b"not a weights file").expect("write");
    let empty = folder.path().join("empty");
    fs::create_dir(&empty).expect("a folder");
    for (weights, expected) in
        [(folder.path().join("nowhere"), "no weights"), (damaged, "safetensors"), (empty, "no checkpoint")]
    {
        let output =
            finish(pass_host(&["features", text(&images), "--weights", text(&weights), "--out", text(&out)]));
        expect_code(&output, 1);
        let message = stderr(&output);
        assert!(message.contains(expected) && message.contains("hint"), "{message}");
        assert!(!out.exists(), "nothing is written");
    }
}
