//! What a run does when something goes wrong: interruption, numbers that are not finite, collapse, a folder in use.

mod program;

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use program::{expect_code, finish, latest, metrics, start, stderr, train};

#[cfg(unix)]
#[test]
fn interruption_writes_a_checkpoint_that_continues() {
    let folder = tempfile::tempdir().expect("a folder");
    let (run, whole) = (folder.path().join("run"), folder.path().join("whole"));
    let mut child = start(train(&run, 400, &["checkpoint.every_steps=1000"], &[]));
    let deadline = Instant::now() + Duration::from_secs(60);
    while fs::read_to_string(run.join("metrics.jsonl")).is_ok_and(|text| text.lines().count() < 5)
        || !run.join("metrics.jsonl").exists()
    {
        assert!(Instant::now() < deadline, "the run does not start");
        sleep(Duration::from_millis(5));
    }
    let interrupt = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(interrupt.expect("kill").success());
    assert_eq!(child.wait().expect("a child").code(), Some(0));
    let stopped = metrics(&run).len();
    assert!(stopped < 400, "it stopped early");
    assert!(latest(&run).ends_with(format!("step-{stopped:08}")));

    let total = stopped + 3;
    expect_code(&finish(train(&whole, 400, &["checkpoint.every_steps=1000"], &["--dry-run"])), 0);
    assert!(!whole.exists(), "a dry run writes nothing");
    // the schedules belong to 400 steps, so the rest is done under the same configuration and interrupted again
    let mut child = start(train(&run, 400, &["checkpoint.every_steps=1"], &["--resume", "auto"]));
    while metrics(&run).len() < total {
        assert!(Instant::now() < deadline, "the run does not continue");
        sleep(Duration::from_millis(5));
    }
    child.kill().expect("SIGKILL");
    child.wait().expect("a child");
    let steps: Vec<u64> = metrics(&run).iter().map(|line| line["step"].as_u64().expect("a step")).collect();
    assert!(steps.windows(2).all(|pair| pair[1] == pair[0] + 1), "no step twice, none missing: {steps:?}");
}

#[test]
fn numbers_that_are_not_finite_stop_the_run_before_weights_change() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = folder.path().join("run");
    let settings =
        ["optim.lr_per_256=1e30", "optim.warmup_epochs=0", "guard.max_skipped=2", "guard.max_rollbacks=1"];
    let output = finish(train(&run, 30, &settings, &[]));
    expect_code(&output, 3);
    let text = stderr(&output);
    assert!(text.contains("is skipped") && text.contains("learning rate"), "{text}");
    let listed = fs::read_to_string(run.join("non-finite.tsv")).expect("the list of batches");
    assert!(listed.lines().all(|line| line.split('\t').count() == 4 + 4), "step, term, value, rate, images");
}

#[test]
fn collapse_is_explained_and_stops_the_run() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = folder.path().join("run");
    // a teacher this warm is uniform
    let settings = ["image.teacher_temp_start=1000", "image.teacher_temp_end=1000", "guard.collapse_steps=5"];
    let output = finish(train(&run, 40, &settings, &[]));
    expect_code(&output, 3);
    let text = stderr(&output);
    assert!(text.contains("uniform") && text.contains("teacher_temp"), "{text}");
    assert!(metrics(&run).len() < 40);
    latest(&run);

    let warned = folder.path().join("warned");
    let output = finish(train(&warned, 12, &settings, &["--on-collapse", "warn"]));
    expect_code(&output, 0);
    assert!(stderr(&output).contains("uniform"));
    assert_eq!(metrics(&warned).len(), 12);
}

#[test]
fn a_finished_run_is_not_overwritten() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = folder.path().join("run");
    expect_code(&finish(train(&run, 2, &[], &[])), 0);
    let before = fs::read(run.join("metrics.jsonl")).expect("metrics");
    let output = finish(train(&run, 2, &[], &[]));
    assert_ne!(output.status.code(), Some(0));
    assert!(stderr(&output).contains("--resume"), "{}", stderr(&output));
    assert_eq!(before, fs::read(run.join("metrics.jsonl")).expect("metrics"));
}

#[test]
fn a_checkpoint_of_another_configuration_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = folder.path().join("run");
    expect_code(&finish(train(&run, 2, &[], &[])), 0);
    let output = finish(train(&run, 2, &["model.dim=64"], &["--resume", "auto"]));
    expect_code(&output, 2);
    let text = stderr(&output);
    assert!(
        text.contains("model.dim") && text.contains("32") && text.contains("64") && text.contains("hint"),
        "{text}"
    );
    let other = folder.path().join("other");
    let output = finish(train(&other, 2, &["model.dim=64"], &["--init", run.to_str().expect("UTF-8")]));
    expect_code(&output, 1);
    assert!(stderr(&output).contains("expected ["), "{}", stderr(&output));
    assert!(
        !other.join("checkpoints").exists()
            || fs::read_dir(other.join("checkpoints")).expect("a folder").next().is_none()
    );
}

#[test]
fn a_damaged_checkpoint_is_passed_over() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = folder.path().join("run");
    expect_code(&finish(train(&run, 6, &["checkpoint.every_steps=2", "checkpoint.keep=3"], &[])), 0);
    let expected = fs::read(latest(&run).join("student.safetensors")).expect("weights");
    let file = latest(&run).join("teacher.safetensors");
    let mut bytes = fs::read(&file).expect("weights");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&file, bytes).expect("damage");
    let output =
        finish(train(&run, 6, &["checkpoint.every_steps=2", "checkpoint.keep=3"], &["--resume", "auto"]));
    expect_code(&output, 0);
    assert!(stderr(&output).contains("passed over"), "{}", stderr(&output));
    assert_eq!(expected, fs::read(latest(&run).join("student.safetensors")).expect("weights"));
}

#[test]
fn a_run_that_cannot_start_leaves_nothing_behind() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = folder.path().join("run");
    let output = finish(train(&run, 2, &["optim.batch=500"], &[]));
    expect_code(&output, 2);
    assert!(stderr(&output).contains("fewer than one batch of 500"), "{}", stderr(&output));
    assert!(!run.exists());
}
