use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::*;

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct State {
    step: u64,
    center: Vec<f32>,
}

fn tensors(value: f32) -> Vec<(String, Tensor)> {
    let tensor = |shape: &[usize]| Tensor::full(value, shape, &Device::Cpu).unwrap();
    vec![("b.weight".into(), tensor(&[2, 3])), ("a.bias".into(), tensor(&[4])), ("scale".into(), tensor(&[]))]
}

fn save_step(dir: &Path, step: u64) -> PathBuf {
    let (student, teacher) = (tensors(step as f32), tensors(-(step as f32)));
    let state = State { step, center: vec![0.1, 1e-30] };
    save(dir, step, &[("student", &student), ("teacher", &teacher)], &state, 3, 0).unwrap()
}

fn steps(dir: &Path) -> Vec<u64> {
    let mut steps: Vec<u64> = fs::read_dir(dir)
        .unwrap()
        .filter_map(|e| step_of(e.unwrap().file_name().to_str().unwrap()))
        .collect();
    steps.sort_unstable();
    steps
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    files
}

/// What a checkpoint says, as text.
fn content(checkpoint: &Checkpoint) -> String {
    let mut out = format!("{} {:?}", checkpoint.step(), checkpoint.state::<State>().unwrap());
    for stem in ["student", "teacher"] {
        for (name, tensor) in checkpoint.tensors(stem, &Device::Cpu).unwrap() {
            out += &format!(" {name} {:?}", tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        }
    }
    out
}

#[test]
fn what_was_saved_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    assert!(open_latest(&dir.path().join("none")).unwrap().is_none());
    assert!(open_latest(dir.path()).unwrap().is_none());
    let path = save_step(dir.path(), 7);
    let names: Vec<_> = files(&path).iter().map(|f| f.file_name().unwrap().to_owned()).collect();
    assert_eq!(names, ["manifest.json", "state.json", "student.safetensors", "teacher.safetensors"]);
    let checkpoint = open_latest(dir.path()).unwrap().unwrap();
    assert_eq!((checkpoint.step(), checkpoint.path()), (7, path.as_path()));
    assert!(checkpoint.rejected().is_empty());
    assert_eq!(checkpoint.state::<State>().unwrap(), State { step: 7, center: vec![0.1, 1e-30] });
    assert_eq!(fs::read_to_string(dir.path().join(LATEST)).unwrap(), "step-00000007\n");
}

#[test]
fn equal_tensors_give_equal_bytes_in_any_order() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (forward, mut backward) = (tensors(1.0), tensors(1.0));
    backward.reverse();
    let state = State { step: 1, center: vec![] };
    let first = save(a.path(), 1, &[("student", &forward)], &state, 1, 0).unwrap();
    let second = save(b.path(), 1, &[("student", &backward)], &state, 1, 0).unwrap();
    for (x, y) in files(&first).iter().zip(files(&second)) {
        assert_eq!(fs::read(x).unwrap(), fs::read(y).unwrap(), "{}", x.display());
    }
    backward.push(backward[0].clone());
    let twice = save(b.path(), 2, &[("student", &backward)], &state, 1, 0);
    assert!(matches!(twice, Err(CheckpointError::Duplicate { .. })));
    assert_eq!(steps(b.path()), [1]);
}

#[test]
fn the_newest_and_every_mth_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let state = State { step: 0, center: vec![] };
    for step in 1..=10 {
        save(dir.path(), step, &[("student", &tensors(1.0))], &state, 2, 4).unwrap();
    }
    assert_eq!(steps(dir.path()), [4, 8, 9, 10]);
    // after a roll-back the one just written is not among the newest, yet it stays
    save(dir.path(), 3, &[("student", &tensors(1.0))], &state, 1, 0).unwrap();
    assert_eq!(steps(dir.path()), [3, 10]);
    assert_eq!(open_latest(dir.path()).unwrap().unwrap().step(), 3);
}

#[test]
fn the_same_step_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    save_step(dir.path(), 5);
    let state = State { step: 5, center: vec![2.0] };
    save(dir.path(), 5, &[("student", &tensors(9.0))], &state, 3, 0).unwrap();
    let checkpoint = open_latest(dir.path()).unwrap().unwrap();
    assert_eq!(checkpoint.state::<State>().unwrap(), state);
    assert_eq!(prepare(dir.path()).unwrap(), 0, "nothing temporary is left");
}

#[test]
fn truncating_any_file_falls_back_to_the_one_before() {
    let dir = tempfile::tempdir().unwrap();
    save_step(dir.path(), 1);
    let path = save_step(dir.path(), 2);
    for file in files(&path) {
        let bytes = fs::read(&file).unwrap();
        for length in [0, 1, bytes.len() / 2, bytes.len() - 2] {
            fs::write(&file, &bytes[..length]).unwrap();
            let found = open_latest(dir.path()).unwrap().unwrap();
            assert_eq!(found.step(), 1, "{} cut to {length}", file.display());
            assert_eq!(found.rejected().len(), 1);
            assert!(found.rejected()[0].reason.contains(file.file_name().unwrap().to_str().unwrap()));
        }
        fs::remove_file(&file).unwrap();
        assert_eq!(open_latest(dir.path()).unwrap().unwrap().step(), 1, "{} missing", file.display());
        fs::write(&file, &bytes).unwrap();
        assert_eq!(open_latest(dir.path()).unwrap().unwrap().step(), 2);
    }
}

#[test]
fn flipping_any_bit_is_noticed_or_harmless() {
    let dir = tempfile::tempdir().unwrap();
    let path = save_step(dir.path(), 2);
    let intact = content(&Checkpoint::open(&path).unwrap());
    for file in files(&path) {
        let bytes = fs::read(&file).unwrap();
        for position in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[position] ^= 1 << (position % 8);
            fs::write(&file, &damaged).unwrap();
            if let Ok(checkpoint) = Checkpoint::open(&path) {
                // only layout of the manifest itself may change unnoticed
                assert!(file.ends_with(MANIFEST), "{} byte {position}", file.display());
                assert_eq!(content(&checkpoint), intact);
            }
        }
        fs::write(&file, &bytes).unwrap();
    }
}

#[test]
fn hostile_manifests_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = save_step(dir.path(), 2);
    for text in [
        "",
        "[]",
        "{}",
        "{\"format\":1,\"step\":2,\"files\":{}}",
        "{\"format\":2,\"step\":2,\"files\":{\"state.json\":{\"bytes\":0,\"xxh3_128\":\"\"}}}",
        "{\"format\":1,\"step\":2,\"files\":{\"state.json\":{\"bytes\":0,\"xxh3_128\":\"\"},\"../latest\":{\"bytes\":0,\"xxh3_128\":\"\"}}}",
    ] {
        fs::write(path.join(MANIFEST), text).unwrap();
        assert!(Checkpoint::open(&path).is_err(), "{text}");
    }
}

#[test]
fn nothing_intact_is_an_error_not_a_new_start() {
    let dir = tempfile::tempdir().unwrap();
    for step in [1, 2] {
        let path = save_step(dir.path(), step);
        fs::write(path.join("student.safetensors"), "x").unwrap();
    }
    match open_latest(dir.path()) {
        Err(CheckpointError::NoneValid { rejected, .. }) => assert_eq!(rejected.len(), 2),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_lost_or_wrong_latest_does_not_matter() {
    let dir = tempfile::tempdir().unwrap();
    save_step(dir.path(), 1);
    save_step(dir.path(), 2);
    fs::remove_file(dir.path().join(LATEST)).unwrap();
    assert_eq!(open_latest(dir.path()).unwrap().unwrap().step(), 2);
    for (text, expected) in [("step-00000001\n", 1), ("../../etc", 2), ("step-00000099", 2), ("\u{0}", 2)] {
        fs::write(dir.path().join(LATEST), text).unwrap();
        assert_eq!(open_latest(dir.path()).unwrap().unwrap().step(), expected, "{text:?}");
    }
}

#[test]
fn leftovers_of_a_killed_write_are_ignored_then_removed() {
    let dir = tempfile::tempdir().unwrap();
    save_step(dir.path(), 1);
    let half = dir.path().join(".tmp-step-00000002");
    fs::create_dir(&half).unwrap();
    fs::write(half.join("student.safetensors"), "half").unwrap();
    fs::write(dir.path().join(".tmp-latest"), "step-0").unwrap();
    assert_eq!(open_latest(dir.path()).unwrap().unwrap().step(), 1);
    assert_eq!(prepare(dir.path()).unwrap(), 2);
    assert!(!half.exists());
    fs::create_dir(&half).unwrap();
    save_step(dir.path(), 2);
    assert_eq!(open_latest(dir.path()).unwrap().unwrap().step(), 2);
}

#[test]
fn a_folder_that_cannot_be_written_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "x").unwrap();
    let state = State { step: 1, center: vec![] };
    for target in [file.clone(), file.join("inside")] {
        let error = save(&target, 1, &[("student", &tensors(1.0))], &state, 1, 0).unwrap_err();
        assert!(matches!(error, CheckpointError::Io { .. }), "{error}");
        assert!(prepare(&target).is_err());
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error_with_advice() {
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/dev/full", dir.path().join(STATE)).unwrap();
    let state = State { step: 1, center: vec![] };
    let error = write::write_files(dir.path(), 1, &[("student", &tensors(1.0))], &state).unwrap_err();
    assert!(
        matches!(&error, CheckpointError::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull)
    );
    assert!(error.hint().unwrap().contains("free some space"));
}

#[test]
fn weights_are_found_in_runs_checkpoints_and_files() {
    let run = tempfile::tempdir().unwrap();
    assert!(open_at(run.path()).unwrap().is_none());
    assert!(matches!(
        weights_at(run.path(), "student", &Device::Cpu),
        Err(CheckpointError::NoWeights { .. })
    ));
    let dir = run.path().join(CHECKPOINTS);
    let first = save_step(&dir, 1);
    save_step(&dir, 2);
    let file = first.join("student.safetensors");
    for (path, expected) in [(run.path(), 2.0), (first.as_path(), 1.0), (file.as_path(), 1.0)] {
        let weights = weights_at(path, "student", &Device::Cpu).unwrap();
        assert_eq!(weights["scale"].to_scalar::<f32>().unwrap(), expected, "{}", path.display());
    }
    assert_eq!(open_at(&first).unwrap().unwrap().step(), 1);
    assert!(weights_at(&run.path().join("none"), "student", &Device::Cpu).is_err());
    std::fs::write(&file, "no tensors").unwrap();
    assert!(weights_at(&file, "student", &Device::Cpu).is_err());
}

#[test]
fn a_run_folder_has_one_user() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("runs/a");
    let lock = lock_run(&run).unwrap();
    assert!(matches!(lock_run(&run), Err(CheckpointError::InUse { .. })));
    drop(lock);
    lock_run(&run).unwrap();
}
