//! What the tests of the whole program share: a tiny run on real photos, started as a child process.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

/// The bundled photos.
pub(crate) fn photos() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/photos")
}

/// Settings of a run that takes a second or two.
pub(crate) const TINY: &[&str] = &[
    "model.arch=custom",
    "model.dim=32",
    "model.depth=2",
    "model.heads=2",
    "model.patch_size=8",
    "augment.global_size=32",
    "augment.local_size=24",
    "head.hidden=48",
    "head.bottleneck=16",
    "head.class_prototypes=64",
    "head.patch_prototypes=48",
    "optim.batch=4",
    "optim.warmup_epochs=1",
    "data.limit=24",
    "log.every_steps=1",
];

/// `pass-host train PHOTOS` with the tiny settings, for `steps` steps into `out`.
pub(crate) fn train(out: &Path, steps: usize, settings: &[&str], flags: &[&str]) -> Command {
    train_on(&photos(), out, steps, settings, flags)
}

/// The same on other images.
pub(crate) fn train_on(
    images: &Path,
    out: &Path,
    steps: usize,
    settings: &[&str],
    flags: &[&str],
) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pass-host"));
    command.arg("train").arg(images).arg("--out").arg(out).args(["--device", "cpu"]);
    command.arg("--steps").arg(steps.to_string());
    for setting in TINY.iter().chain(settings) {
        command.arg("--set").arg(setting);
    }
    command.args(flags).stdin(Stdio::null());
    command
}

/// Runs to the end and returns what was printed.
pub(crate) fn finish(mut command: Command) -> Output {
    command.output().expect("the program starts")
}

/// Starts quietly.
pub(crate) fn start(mut command: Command) -> Child {
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the program starts")
}

/// Standard error as text.
pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Asserts the exit code, showing what was printed.
#[track_caller]
pub(crate) fn expect_code(output: &Output, code: i32) {
    assert_eq!(output.status.code(), Some(code), "stderr:\n{}", stderr(output));
}

/// The folder of the newest checkpoint.
pub(crate) fn latest(run: &Path) -> PathBuf {
    let checkpoints = run.join("checkpoints");
    let name = std::fs::read_to_string(checkpoints.join("latest")).expect("a checkpoint");
    checkpoints.join(name.trim())
}

/// Every line of `metrics.jsonl` without the two figures that depend on the clock.
pub(crate) fn metrics(run: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).expect("metrics");
    let line = |line: &str| {
        let mut value: serde_json::Value = serde_json::from_str(line).expect("one JSON object a line");
        let object = value.as_object_mut().expect("an object");
        assert!(object.remove("images_per_s").is_some() && object.remove("data_wait").is_some());
        value
    };
    text.lines().map(line).collect()
}
