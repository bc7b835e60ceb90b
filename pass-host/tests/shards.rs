//! `pack` and what takes its files: the same training from a shard as from the folder, exact resume, bad images, Ctrl-C.

mod program;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use program::{TINY, expect_code, finish, latest, metrics, photos, start, stderr, train};

fn pass(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pass-host"));
    command.args(args).stdin(Stdio::null());
    finish(command)
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// Packs `images` and returns the shard and the summary.
fn pack(dir: &Path, name: &str, images: &[&str], flags: &[&str]) -> (PathBuf, serde_json::Value) {
    let out = dir.join(name);
    let output = pass(&[&["pack"], images, &["--out", text(&out), "--json"], flags].concat());
    expect_code(&output, 0);
    (out, serde_json::from_slice(&output.stdout).expect("one JSON object"))
}

/// A tiny run over `images`; what it leaves must not depend on how they were given.
fn train_on(out: &Path, images: &[&str], steps: usize, flags: &[&str]) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pass-host"));
    command.arg("train").args(images).args(["--device", "cpu", "--out", text(out)]);
    command.args(["--steps", &steps.to_string(), "--set", "checkpoint.every_steps=3"]).args(flags);
    TINY.iter().for_each(|setting| _ = command.args(["--set", setting]));
    expect_code(&finish(command), 0);
}

fn assert_same_end(a: &Path, b: &Path) {
    assert_eq!(metrics(a), metrics(b));
    for file in ["student", "teacher", "optimizer", "centers"].map(|part| format!("{part}.safetensors")) {
        let read = |run: &Path| fs::read(latest(run).join(&file)).expect("a checkpoint file");
        assert!(read(a) == read(b), "{file} differs");
    }
}

#[test]
fn training_from_a_shard_of_originals_gives_the_bits_of_training_from_the_folder() {
    let dir = tempfile::tempdir().expect("a folder");
    let root = dir.path();
    let folder = photos();
    let (shard, summary) = pack(root, "photos.tar", &[text(&folder)], &["--workers", "2"]);
    let images = summary["images"].as_u64().expect("a number");
    assert!(images >= 24 && summary["bad"] == 0 && summary["quarantine"].is_null());
    assert_eq!(fs::metadata(&shard).expect("a file").len(), summary["bytes"].as_u64().expect("a number"));
    expect_code(&finish(train(&root.join("folder"), 7, &["checkpoint.every_steps=3"], &[])), 0);
    train_on(&root.join("shard"), &[text(&shard)], 7, &["--workers", "1"]);
    assert_same_end(&root.join("folder"), &root.join("shard"));

    // a part of the run, then the rest of it
    let halted = root.join("halted");
    train_on(&halted, &[text(&shard)], 7, &["--set", "checkpoint.keep=9"]);
    fs::remove_dir_all(halted.join("checkpoints/step-00000007")).expect("a checkpoint");
    train_on(&halted, &[], 7, &["--resume", "auto", "--workers", "3", "--set", "checkpoint.keep=9"]);
    assert_same_end(&root.join("shard"), &halted);
}

#[test]
fn the_file_does_not_depend_on_workers_or_place() {
    let dir = tempfile::tempdir().expect("a folder");
    let root = dir.path();
    let source = root.join("here/pics");
    fs::create_dir_all(source.join("sub")).expect("folders");
    for (number, photo) in ["grocery/001.jpg", "grocery/002.jpg", "clothing/001.jpg"].iter().enumerate() {
        fs::copy(photos().join(photo), source.join(format!("sub/{number}.jpg"))).expect("a photo");
    }
    fs::rename(root.join("here"), root.join("there")).expect("moved");
    for flags in [
        &["--format", "original"][..],
        &["--format", "jpeg", "--size", "96", "--quality", "80"],
        &["--format", "raw", "--size", "64"],
    ] {
        fs::rename(root.join("there"), root.join("here")).expect("moved");
        let one = pack(root, "one", &[text(&source)], &[flags, &["--workers", "1"]].concat());
        fs::rename(root.join("here"), root.join("there")).expect("moved");
        let moved = root.join("there/pics");
        let two = pack(root, "two", &[text(&moved)], &[flags, &["--workers", "3"]].concat());
        assert!(fs::read(&one.0).expect("a file") == fs::read(&two.0).expect("a file"), "{flags:?}");
        assert_eq!(one.1["content"], two.1["content"]);
        // a shard packed again as it is, is the same shard
        let again = pack(root, "again", &[text(&one.0)], &[]);
        assert_eq!(again.1["images"], 3);
        let images = one.1["bytes"].as_u64().expect("a number") - overhead(&one.0);
        assert_eq!(again.1["source_bytes"], images);
    }
}

/// Bytes of a shard that are not images, as the table of the format says.
fn overhead(shard: &Path) -> u64 {
    let file = fs::read(shard).expect("a file");
    let number = |at: usize| u64::from_le_bytes(file[at..at + 8].try_into().expect("eight bytes"));
    80 + number(40) + 56 * number(24)
}

#[test]
fn bad_images_are_left_out_and_listed_beside_the_file() {
    let dir = tempfile::tempdir().expect("a folder");
    let root = dir.path();
    let pics = root.join("pics");
    fs::create_dir(&pics).expect("a folder");
    let photo = fs::read(photos().join("grocery/001.jpg")).expect("a photo");
    fs::write(pics.join("a.jpg"), &photo).expect("written");
    fs::write(pics.join("b.jpg"), &photo[..photo.len() / 2]).expect("written");
    fs::write(pics.join("c.png"), b"").expect("written");
    let (shard, summary) = pack(root, "s", &[text(&pics)], &["--format", "raw", "--size", "32"]);
    assert_eq!((&summary["images"], &summary["bad"]), (&1.into(), &2.into()));
    let list = fs::read_to_string(root.join("s.quarantine.tsv")).expect("the list");
    let lines: Vec<&str> = list.lines().collect();
    assert!(
        lines[0].contains("b.jpg\ttruncated JPEG") && lines[1].ends_with("c.png\tthe file is empty"),
        "{list}"
    );

    // every image good again: the list of before goes
    fs::remove_file(pics.join("b.jpg")).expect("removed");
    fs::remove_file(pics.join("c.png")).expect("removed");
    assert_eq!(pack(root, "s", &[text(&pics)], &[]).1["bad"], 0);
    assert!(!root.join("s.quarantine.tsv").exists());

    // none good: the shard of before stays
    let before = fs::read(&shard).expect("the shard");
    fs::write(pics.join("a.jpg"), &photo[..9]).expect("written");
    let output = pass(&["pack", text(&pics), "--out", text(&shard)]);
    expect_code(&output, 1);
    assert!(stderr(&output).contains("none of 1 images can be used"), "{}", stderr(&output));
    assert!(fs::read(&shard).expect("the shard") == before);
    assert_eq!(fs::read_dir(root).expect("a folder").count(), 2, "nothing else is left");
}

#[test]
fn features_and_pictures_are_those_of_the_folder() {
    let dir = tempfile::tempdir().expect("a folder");
    let root = dir.path();
    let folder = photos().join("grocery");
    let (shard, _) = pack(root, "grocery", &[text(&folder)], &["--limit", "6"]);
    train_on(&root.join("run"), &[text(&shard), text(&photos().join("clothing"))], 2, &[]);
    let features = |images: &Path, name: &str| {
        let out = root.join(name);
        let run = root.join("run");
        let args = [
            "features",
            text(images),
            "--weights",
            text(&run),
            "--device",
            "cpu",
            "--out",
            text(&out),
            "--json",
        ];
        let output = pass(&args);
        expect_code(&output, 0);
        (
            fs::read(&out).expect("features"),
            fs::read_to_string(out.with_extension("images.txt")).expect("names"),
        )
    };
    let (from_shard, names) = features(&shard, "a.npy");
    assert_eq!(names.lines().count(), 6);
    assert!(names.lines().all(|name| name.starts_with(&format!("{}/", text(&shard)))), "{names}");
    let list: String = names
        .lines()
        .map(|name| {
            format!(
                "{}\n",
                folder
                    .join(name.strip_prefix(text(&shard)).expect("a name in it").trim_start_matches('/'))
                    .display()
            )
        })
        .collect();
    fs::write(root.join("list.txt"), list).expect("written");
    let (from_files, _) = features(&PathBuf::from(format!("@{}", text(&root.join("list.txt")))), "b.npy");
    assert!(from_shard == from_files, "features of the same images");
}

/// Stops a packing with `signal` once it has begun to write.
#[cfg(unix)]
#[test]
fn an_interrupted_packing_leaves_nothing() {
    let dir = tempfile::tempdir().expect("a folder");
    let list: String = (0..400).map(|i| format!("{i}.jpg\n")).collect();
    fs::write(dir.path().join("list.txt"), list).expect("written");
    for i in 0..400 {
        fs::copy(photos().join("clothing/001.jpg"), dir.path().join(format!("{i}.jpg"))).expect("a photo");
    }
    let (out, unfinished) = (dir.path().join("out/s"), dir.path().join("out/.tmp-s"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_pass-host"));
    command.args(["pack", &format!("@{}", text(&dir.path().join("list.txt"))), "--out", text(&out)]);
    command.args(["--format", "jpeg", "--workers", "1"]);
    let mut child = start(command);
    while !unfinished.exists() {
        std::thread::yield_now();
    }
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill");
    assert!(killed.success());
    assert_eq!(child.wait().expect("it ends").code(), Some(130));
    assert_eq!(fs::read_dir(dir.path().join("out")).expect("a folder").count(), 0);
}
