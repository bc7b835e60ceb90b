//! A run that is killed and resumed ends with the same bits as one that was not, for any number of threads.

mod program;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use pass_host::random::{Purpose, Stream};
use program::{expect_code, finish, latest, metrics, photos, start, train, train_on};

const STEPS: usize = 150;
const KILLS: usize = 30;

fn settings() -> Vec<&'static str> {
    vec!["checkpoint.every_steps=4", "checkpoint.keep=2", "model.drop_path=0.2", "augment.local_crops=2"]
}

/// Every tensor file of the last checkpoint, and the log.
fn assert_same(run: &Path, reference: &Path, what: &str) {
    for file in ["student", "teacher", "optimizer", "centers"].map(|part| format!("{part}.safetensors")) {
        let read = |run: &Path| fs::read(latest(run).join(&file)).expect("a checkpoint file");
        assert!(read(run) == read(reference), "{what}: {file} differs");
    }
    let (own, expected) = (metrics(run), metrics(reference));
    assert_eq!(own.len(), expected.len(), "{what}: lines of the log");
    for (own, expected) in own.iter().zip(&expected) {
        assert_eq!(own, expected, "{what}");
    }
}

#[test]
fn killed_and_resumed_runs_end_with_the_same_bits() {
    let folder = tempfile::tempdir().expect("a folder");
    let reference = folder.path().join("reference");
    let began = std::time::Instant::now();
    expect_code(&finish(train(&reference, STEPS, &settings(), &["--workers", "1", "--threads", "1"])), 0);
    let whole = began.elapsed().as_secs_f64();

    let mut stream = Stream::new(11, Purpose::Subset, &[]);
    let (mut kills, mut round) = (0, 0);
    while kills < KILLS {
        let run = folder.path().join(format!("killed-{round}"));
        round += 1;
        loop {
            let workers = ["1", "2", "4"][stream.below(3) as usize];
            let threads = ["1", "2"][stream.below(2) as usize];
            let flags = ["--workers", workers, "--threads", threads, "--resume", "auto"];
            if kills == KILLS {
                expect_code(&finish(train(&run, STEPS, &settings(), &flags)), 0);
                break;
            }
            let mut child = start(train(&run, STEPS, &settings(), &flags));
            sleep(Duration::from_secs_f64(whole * stream.range(0.0, 0.4)));
            if child.try_wait().expect("a child").is_some() {
                break; // finished before it could be killed
            }
            child.kill().expect("SIGKILL");
            child.wait().expect("a child");
            kills += 1;
        }
        assert_same(&run, &reference, &format!("after {kills} kills"));
    }
}

/// MoCo-v3 alone and MoBY with the patch objective, as small as the rest.
fn methods() -> [Vec<&'static str>; 2] {
    let sizes = ["image.hidden=24", "image.out=8", "image.queue=20", "checkpoint.every_steps=4"];
    let alone =
        ["image.method=moco_v3", "patch.enabled=false", "augment.local_crops=0", "model.positions=sin_cos"];
    let more = ["model.freeze_patch_embed=true", "model.init=xavier"];
    let with_patches =
        ["image.method=moby", "model.drop_path=0.2", "augment.local_crops=2", "optim.clip_by=global"];
    [[&sizes[..], &alone, &more].concat(), [&sizes[..], &with_patches].concat()]
}

#[test]
fn resumed_runs_of_every_method_end_with_the_same_bits() {
    let folder = tempfile::tempdir().expect("a folder");
    for (number, method) in methods().iter().enumerate() {
        let (reference, run) =
            (folder.path().join(format!("whole-{number}")), folder.path().join(format!("cut-{number}")));
        expect_code(&finish(train(&reference, 14, method, &["--workers", "1", "--threads", "1"])), 0);
        expect_code(&finish(train(&run, 14, method, &["--workers", "2", "--threads", "2"])), 0);
        // as if it had been killed after the last but one checkpoint, and after the last
        for gone in [vec!["14", "12"], vec!["14"]] {
            for step in gone {
                fs::remove_dir_all(run.join(format!("checkpoints/step-000000{step}"))).expect("a checkpoint");
            }
            expect_code(&finish(train(&run, 14, method, &["--threads", "2", "--resume", "auto"])), 0);
            assert_same(&run, &reference, &format!("{method:?}"));
        }
    }
}

#[test]
fn threads_and_workers_do_not_change_the_result() {
    let folder = tempfile::tempdir().expect("a folder");
    let reference = folder.path().join("reference");
    expect_code(&finish(train(&reference, 12, &settings(), &["--workers", "1", "--threads", "1"])), 0);
    for (workers, threads) in [("2", "1"), ("4", "2"), ("1", "2")] {
        let run = folder.path().join(format!("w{workers}-t{threads}"));
        expect_code(&finish(train(&run, 12, &settings(), &["--workers", workers, "--threads", threads])), 0);
        assert_same(&run, &reference, &format!("{workers} workers, {threads} threads"));
    }
}

#[test]
fn recomputing_blocks_does_not_change_the_result() {
    let folder = tempfile::tempdir().expect("a folder");
    let (reference, run) = (folder.path().join("reference"), folder.path().join("recompute"));
    expect_code(&finish(train(&reference, 12, &settings(), &[])), 0);
    expect_code(&finish(train(&run, 12, &settings(), &["--recompute", "--threads", "2"])), 0);
    assert_same(&run, &reference, "recompute");
}

/// The photos as a shard of the given form.
fn shard(folder: &Path, name: &str, flags: &[&str]) -> PathBuf {
    let out = folder.join(name);
    let mut pack = Command::new(env!("CARGO_BIN_EXE_pass-host"));
    pack.arg("pack").arg(photos()).arg("--out").arg(&out).args(["--limit", "24"]).args(flags);
    expect_code(&finish(pack), 0);
    out
}

/// The photos of one class as a tar.
fn tar(folder: &Path) -> PathBuf {
    let out = folder.join("photos.tar");
    let mut tar = tar::Builder::new(fs::File::create(&out).expect("a file"));
    tar.append_dir_all("grocery", photos().join("grocery")).expect("photos");
    tar.finish().expect("space");
    out
}

/// A run that is killed once it has a checkpoint, and resumed with `later` instead of `first`, ends as one that was not.
fn killed_and_resumed(
    folder: &Path,
    what: &str,
    images: &Path,
    settings: &[&str],
    flags: &[&str],
    [first, later]: [&[&str]; 2],
) {
    let settings = [&["checkpoint.every_steps=3", "model.drop_path=0.2"], settings].concat();
    let command = |run: &Path, flags: &[&[&str]]| train_on(images, run, 20, &settings, &flags.concat());
    let reference = folder.join(format!("{what}, whole"));
    expect_code(&finish(command(&reference, &[flags, first, &["--workers", "1", "--threads", "1"]])), 0);
    let run = folder.join(format!("{what}, killed"));
    let mut child = start(command(&run, &[flags, first, &["--workers", "3", "--threads", "2"]]));
    while !run.join("checkpoints/latest").exists() && child.try_wait().expect("a child").is_none() {
        sleep(Duration::from_millis(2));
    }
    child.kill().expect("SIGKILL");
    child.wait().expect("a child");
    let resumed = [flags, later, &["--workers", "2", "--threads", "2", "--resume", "auto"]];
    expect_code(&finish(command(&run, &resumed)), 0);
    assert_same(&run, &reference, what);
}

#[test]
fn runs_with_any_option_resume_with_the_same_bits() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let originals = shard(folder, "originals", &[]);
    let small = shard(folder, "small", &["--format", "jpeg", "--size", "64"]);
    let raw = shard(folder, "raw", &["--format", "raw", "--size", "48"]);
    let (photos, tar) = (photos(), tar(folder));
    let cases: [(&str, &Path, &[&str], &[&str]); 8] = [
        ("recompute", &photos, &[], &["--recompute"]),
        ("compositions", &photos, &[], &["--ops", "reference"]),
        ("accumulate", &photos, &[], &["--accumulate", "2"]),
        (
            "all of them",
            &tar,
            &["augment.local_crops=3"],
            &["--accumulate", "4", "--recompute", "--ops", "reference"],
        ),
        ("tar", &tar, &["data.prefetch=5"], &["--augment", "cpu"]),
        ("shard", &originals, &["patch.window=all", "patch.border=clip"], &[]),
        ("jpeg shard", &small, &["augment.local_crops=0", "patch.crops=global"], &["--accumulate", "2"]),
        ("raw shard", &raw, &["patch.enabled=false"], &["--recompute"]),
    ];
    for (what, images, settings, flags) in cases {
        killed_and_resumed(folder, what, images, settings, flags, [&[], &[]]);
    }
    killed_and_resumed(folder, "recompute from the middle on", &photos, &[], &[], [&[], &["--recompute"]]);
}

/// The kernels in the emulator: crops made by them, and batches sent ahead, give the same bits; before and after a kill.
#[cfg(feature = "_emulator")]
#[test]
fn crops_of_the_device_do_not_change_the_result() {
    let folder = tempfile::tempdir().expect("a folder");
    let reference = folder.path().join("reference");
    expect_code(&finish(train(&reference, 12, &settings(), &["--augment", "cpu"])), 0);
    let run = folder.path().join("device");
    expect_code(&finish(train(&run, 12, &settings(), &["--augment", "gpu"])), 0);
    assert_same(&run, &reference, "crops of the device");
    for (first, later) in [("gpu", "cpu"), ("cpu", "gpu"), ("gpu", "gpu")] {
        let what = format!("{first}, then {later}");
        let [first, later] = [["--augment", first], ["--augment", later]];
        let flags = ["--accumulate", "2"];
        killed_and_resumed(folder.path(), &what, &photos(), &[], &flags, [&first, &later]);
    }
}
