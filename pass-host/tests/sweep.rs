//! `pass-host sweep` as a person uses it: runs, evaluations, one table; stopped and called again.

#[expect(dead_code, reason = "some helpers serve other tests")]
mod program;

use std::fs;
use std::path::Path;
use std::process::Command;

use program::{TINY, expect_code, finish, photos, stderr};
use serde_json::Value;

/// Photos by class, and a sweep over two tiny networks and an untrained one.
fn write_sweep(dir: &Path) {
    for class in ["clothing", "grocery"] {
        let mut files: Vec<_> = fs::read_dir(photos().join(class))
            .expect("photos")
            .map(|entry| entry.expect("an entry").path())
            .collect();
        files.sort();
        for (index, file) in files.iter().take(9).enumerate() {
            let folder = dir.join("classes").join(if index < 6 { "train" } else { "val" }).join(class);
            fs::create_dir_all(&folder).expect("a folder");
            fs::copy(file, folder.join(file.file_name().expect("a name"))).expect("a copy");
        }
    }
    let settings: Vec<String> = TINY.iter().map(|set| format!("{set:?}")).collect();
    let text = format!(
        r#"
        out = "out"
        images = [{:?}]
        set = ["optim.steps=3", {}]

        [[evaluation]]
        name = "classes"
        protocol = "knn"
        data = "classes"
        arguments = ["--size", "32"]
        columns = [{{ heading = "10-NN", path = "knn.10.top1" }}]

        [[row]]
        name = "random"
        untrained = true

        [[row]]
        name = "DINO"
        set = ["patch.enabled=false"]

        [[row]]
        name = "DINO + PASS"
        seeds = [0, 5]
        "#,
        photos(),
        settings.join(", ")
    );
    fs::write(dir.join("sweep.toml"), text).expect("a file");
}

fn sweep(dir: &Path, flags: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pass-host"));
    command.current_dir(dir).args(["sweep", "sweep.toml", "--device", "cpu", "--threads", "2"]).args(flags);
    command
}

#[test]
fn rows_are_trained_judged_and_reproduced_by_their_commands() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    write_sweep(dir.path());

    let plan = finish(sweep(dir.path(), &["--dry-run"]));
    expect_code(&plan, 0);
    let commands: Vec<String> = String::from_utf8_lossy(&plan.stdout).lines().map(str::to_owned).collect();
    assert_eq!(commands.len(), 7, "{commands:?}");
    assert!(!dir.path().join("out").exists(), "a dry run writes nothing");

    let one_row = finish(sweep(dir.path(), &["--row", "DINO"]));
    expect_code(&one_row, 0);
    let all = finish(sweep(dir.path(), &["--json"]));
    expect_code(&all, 0);
    assert!(stderr(&all).contains("done before: 2 jobs"), "{}", stderr(&all));
    let summary: Value = serde_json::from_slice(&all.stdout).expect("one JSON object");
    assert_eq!((&summary["done"], &summary["jobs"]), (&Value::from(7), &Value::from(7)));
    let table = fs::read_to_string(dir.path().join("out/table.md")).expect("a table");
    let names: Vec<&str> =
        table.lines().skip(2).take(3).filter_map(|line| line.split(" | ").next()).collect();
    assert_eq!(names, ["| random", "| DINO", "| DINO + PASS"], "{table}");
    assert!(table.contains(" ± ") && table.contains("| | 10-NN |"), "{table}");

    // the commands of a row, into another folder, give the same numbers
    let line = |part: &str| {
        let line = commands.iter().find(|line| line.contains(part)).expect("a command");
        let line = line.replace("out/dino-pass/seed-5", "again");
        line.split(' ').skip(1).map(|word| word.trim_matches('\'').to_owned()).collect::<Vec<_>>()
    };
    let program = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pass-host"));
        command.current_dir(dir.path());
        command
    };
    let words = line("--out out/dino-pass/seed-5");
    assert_eq!(words[0], "train");
    let mut train = program();
    train.args(words);
    expect_code(&finish(train), 0);
    let mut judge = program();
    judge.args(line("--weights out/dino-pass/seed-5"));
    let judged = finish(judge);
    expect_code(&judged, 0);
    let judged: Value = serde_json::from_slice(&judged.stdout).expect("one JSON object");
    let run = summary["results"]["runs"].as_array().expect("runs");
    let run = run.iter().find(|run| run["seed"] == 5).expect("seed 5");
    assert_eq!(run["values"][0], judged["knn"]["10"]["top1"]);

    let nothing = finish(sweep(dir.path(), &[]));
    expect_code(&nothing, 0);
    assert!(stderr(&nothing).contains("done before: 7 jobs") && !stderr(&nothing).contains("=="));
}

#[test]
fn a_row_that_fails_is_named_and_the_others_are_done() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    write_sweep(dir.path());
    // a run folder of other settings stands where DINO's belongs
    let mut other = Command::new(env!("CARGO_BIN_EXE_pass-host"));
    other.current_dir(dir.path()).arg("train").arg(photos()).args([
        "--steps",
        "1",
        "--out",
        "out/dino/seed-0",
    ]);
    TINY.iter().for_each(|set| {
        other.args(["--set", set]);
    });
    expect_code(&finish(other), 0);
    let output = finish(sweep(dir.path(), &["--row", "DINO", "--row", "random"]));
    expect_code(&output, 1);
    let messages = stderr(&output);
    for part in [
        "cannot continue with another configuration",
        "`patch.enabled` was true, is now false",
        "DINO, seed 0: training failed",
    ] {
        assert!(messages.contains(part), "{part} in {messages}");
    }
}

#[test]
fn flags_that_no_evaluation_knows_are_found_before_the_first_step() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    write_sweep(dir.path());
    let file = dir.path().join("sweep.toml");
    let text = fs::read_to_string(&file).expect("the file").replace("--size", "--sise");
    fs::write(&file, text).expect("a file");
    let output = finish(sweep(dir.path(), &[]));
    expect_code(&output, 2);
    assert!(stderr(&output).contains("--sise"), "{}", stderr(&output));
    assert!(!dir.path().join("out").exists());
}
