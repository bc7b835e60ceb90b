//! The program as a person meets it: help, results, errors and exit codes, word for word.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use pass_host::config::presets::PRESETS;

/// Runs the program in `dir` without a terminal.
fn run_in(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pass-host"))
        .args(args)
        .current_dir(dir)
        .env_remove("RAYON_NUM_THREADS")
        .env("COLUMNS", "100")
        .stdin(Stdio::null())
        .output()
        .expect("the program starts")
}

fn run(args: &[&str]) -> Output {
    run_in(tempfile::tempdir().expect("a temporary folder").path(), args)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("the program writes UTF-8")
}

/// Exit code, standard output and standard error in one text.
fn transcript(output: &Output) -> String {
    let code = output.status.code().expect("the program ends by itself");
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    let mut all = format!("exit code {code}\n");
    for (name, content) in [("stdout", stdout), ("stderr", stderr)] {
        if !content.is_empty() {
            all += &format!("----- {name}\n{content}");
        }
    }
    all
}

/// Compares a transcript with its snapshot; versions are masked.
fn check(name: &str, output: &Output) {
    insta::with_settings!({
        filters => vec![(r"pass-host \d+\.\d+\.\d+\S*", "pass-host [version]")],
        omit_expression => true,
        prepend_module_to_snapshot => false,
    }, {
        insta::assert_snapshot!(name, transcript(output));
    });
}

#[test]
fn help_of_every_command() {
    check("help", &run(&["--help"]));
    check("version", &run(&["--version"]));
    for command in [
        "train",
        "pack",
        "sweep",
        "features",
        "export",
        "quantize",
        "verify",
        "import",
        "viz",
        "report",
        "config",
        "doctor",
        "completions",
    ] {
        check(&format!("help_{command}"), &run(&[command, "--help"]));
    }
    for protocol in ["knn", "linear", "retrieval", "vos"] {
        check(&format!("help_eval_{protocol}"), &run(&["eval", protocol, "--help"]));
    }
    for command in ["list", "show", "check"] {
        check(&format!("help_config_{command}"), &run(&["config", command, "--help"]));
    }
    for command in ["top-patches", "attention", "positives", "pca"] {
        check(&format!("help_viz_{command}"), &run(&["viz", command, "--help"]));
    }
    check("help_bench_train", &run(&["bench", "train", "--help"]));
    check("help_eval_segment", &run(&["eval", "segment", "--help"]));
}

#[test]
fn presets_are_listed_and_shown() {
    check("config_list", &run(&["config", "list"]));
    check("config_show", &run(&["config", "show", "paper-vit-s16", "--set", "seed=7"]));
    let json: serde_json::Value = serde_json::from_slice(&run(&["config", "list", "--json"]).stdout).unwrap();
    assert_eq!(json["presets"].as_array().unwrap().len(), PRESETS.len());
}

#[test]
fn a_shown_preset_is_a_valid_file() {
    let dir = tempfile::tempdir().unwrap();
    for preset in PRESETS.map(|preset| preset.name) {
        let shown = run_in(dir.path(), &["config", "show", preset]);
        assert!(shown.status.success());
        fs::write(dir.path().join("mine.toml"), &shown.stdout).unwrap();
        let checked = run_in(dir.path(), &["config", "check", "mine.toml"]);
        assert!(checked.status.success(), "{}", transcript(&checked));
        assert!(text(&checked.stdout).starts_with(&format!("valid: preset {preset} ")));
        let json = run_in(dir.path(), &["config", "check", "mine.toml", "--json"]).stdout;
        let report: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!((&report["valid"], &report["preset"]), (&true.into(), &preset.into()));
    }
}

#[test]
fn configuration_errors_name_file_line_and_key() {
    let dir = tempfile::tempdir().unwrap();
    let case = |name: &str, file: &str, more: &[&str]| {
        fs::write(dir.path().join("mine.toml"), file).unwrap();
        let args = [&["config", "check", "mine.toml"], more].concat();
        check(&format!("config_check_{name}"), &run_in(dir.path(), &args));
    };
    case("valid", "preset = \"demo\"\n[optim]\nbatch = 32\n", &[]);
    case("unknown_key", "[optim]\nbach = 32\n", &[]);
    case("wrong_type", "[optim]\nbatch = \"large\"\n", &[]);
    case("out_of_range", "[model]\ndrop_path = 1.5\n", &[]);
    case("cross_field", "[augment]\nlocal_size = 100\n", &[]);
    case(
        "several",
        "seed = true\n[patch]\nborder = \"torus\"\nwindow = \"some\"\n[zoo]\nlion = 1\n",
        &["--set", "optim.epoch=3"],
    );
    case("syntax", "[optim]\nbatch = = 3\n", &[]);
    case("unknown_preset", "preset = \"demoo\"\n", &[]);
    case("bad_set", "", &["--set", "optim.batch"]);
    check("config_check_missing", &run_in(dir.path(), &["config", "check", "none.toml"]));
}

#[test]
fn wrong_usage_exits_with_2_and_says_what_to_do() {
    for (name, args) in [
        ("no_command", &[] as &[&str]),
        ("unknown_command", &["trian"]),
        ("unknown_flag", &["train", "--bach", "3"]),
        ("not_a_number", &["train", "--batch", "many"]),
        ("bad_device", &["train", "--device", "gpu"]),
        ("no_threads", &["train", "--threads", "0"]),
        ("epochs_and_steps", &["train", "--epochs", "1", "--steps", "1"]),
        ("init_and_resume", &["train", "photos", "--init", "w.safetensors", "--resume", "auto"]),
        ("nothing_to_resume", &["train", "photos", "--resume", "none-here"]),
        ("zero_batch", &["train", "photos", "--batch", "0"]),
        ("unknown_preset", &["train", "photos", "--preset", "paper-vit-s8"]),
        ("features_without_weights", &["features", "photos"]),
        ("features_format", &["features", "photos", "--weights", "w", "--out", "f.csv"]),
        ("pack_nothing", &["pack", "--out", "f"]),
        ("pack_size_of_originals", &["pack", "photos", "--out", "f", "--size", "256"]),
        ("pack_quality", &["pack", "photos", "--out", "f", "--format", "jpeg", "--quality", "0"]),
        ("bench_no_steps", &["bench", "train", "--steps", "0"]),
        ("export_format", &["export", "run", "--to", "pickle", "--out", "f"]),
        ("export_size_without_graph", &["export", "run", "--to", "timm", "--out", "f", "--size", "224"]),
        (
            "export_calibration_alone",
            &["export", "run", "--to", "onnx", "--out", "f", "--calibrate", "photos"],
        ),
        ("import_origin", &["import", "f.onnx", "--from", "dinov2", "--out", "f.safetensors"]),
    ] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(2), "{name}: {}", transcript(&output));
        assert!(output.stdout.is_empty(), "{name}");
        check(&format!("usage_{name}"), &output);
    }
}

#[test]
fn a_run_folder_in_use_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let metrics = dir.path().join("mine/metrics.jsonl");
    fs::create_dir(dir.path().join("mine")).unwrap();
    fs::write(&metrics, "{\"step\":1}\n").unwrap();
    let output = run_in(dir.path(), &["train", "photos", "--out", "mine"]);
    assert_eq!(output.status.code(), Some(2));
    check("usage_out_holds_a_run", &output);
    assert_eq!(fs::read_to_string(metrics).unwrap(), "{\"step\":1}\n");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else was written");
}

#[test]
fn foreign_weights_that_are_none_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f.onnx"), "<!DOCTYPE html>").unwrap();
    for (name, source) in [("not_onnx", "f.onnx"), ("no_file", "g.onnx")] {
        let output =
            run_in(dir.path(), &["import", source, "--from", "dinov2-onnx", "--out", "f.safetensors"]);
        check(&format!("import_{name}"), &output);
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing was written");
}

#[test]
fn devices_that_are_not_there_fail_with_1() {
    let bf16 = run(&["train", "photos", "--device", "cpu", "--precision", "bf16"]);
    assert_eq!(bf16.status.code(), Some(1));
    check("device_bf16_on_cpu", &bf16);
    if !cfg!(feature = "_emulator") {
        let augment = run(&["train", "photos", "--device", "cpu", "--augment", "gpu"]);
        assert_eq!(augment.status.code(), Some(1));
        check("device_augment_on_cpu", &augment);
    }
    if !pass_host::device::CUDA_COMPILED {
        let cuda = run(&["train", "photos", "--device", "cuda:1"]);
        assert_eq!(cuda.status.code(), Some(1));
        check("device_cuda_not_built_in", &cuda);
    }
}

#[test]
fn doctor_tells_speed_and_write_access() {
    let dir = tempfile::tempdir().unwrap();
    let output = run_in(dir.path(), &["doctor", "--json", "--threads", "1", "--out", "deep/runs"]);
    assert_eq!(output.status.code(), Some(0), "{}", transcript(&output));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["gflops_f32"].as_f64().unwrap() > 0.0);
    assert_eq!(report["threads"], 1);
    assert!(report["out_problem"].is_null());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left behind");

    fs::write(dir.path().join("file"), "x").unwrap();
    let blocked = run_in(dir.path(), &["doctor", "--out", "file/runs"]);
    assert_eq!(blocked.status.code(), Some(1));
    assert!(text(&blocked.stdout).contains("NOT writable"));
}

#[test]
fn completions_exist_for_every_shell() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output = run(&["completions", shell]);
        assert!(output.status.success(), "{shell}");
        assert!(text(&output.stdout).contains("pass-host"), "{shell}");
    }
}

#[test]
fn bench_train_times_real_steps_and_counts_their_arithmetic() {
    let photos = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/photos");
    let tiny = [
        "model.arch=custom",
        "model.dim=16",
        "model.depth=1",
        "model.heads=2",
        "model.patch_size=8",
        "augment.global_size=32",
        "augment.local_size=24",
        "head.hidden=8",
        "head.bottleneck=4",
        "head.class_prototypes=8",
        "head.patch_prototypes=8",
    ];
    let sets: Vec<&str> = tiny.iter().flat_map(|set| ["--set", set]).collect();
    let base = ["bench", "train", "--device", "cpu", "--threads", "1", "--warmup", "1", "--steps", "3"];
    for images in [None, Some(photos)] {
        let args = [&base[..], &sets, &["--batch", "2", "--json"], images.as_slice()].concat();
        let output = run(&args);
        assert_eq!(output.status.code(), Some(0), "{}", transcript(&output));
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let number = |path: &str| report.pointer(path).unwrap().as_f64().unwrap();
        assert_eq!((number("/batch"), number("/steps"), number("/warmup")), (2.0, 3.0, 1.0));
        assert_eq!(report["images"].is_null(), images.is_none());
        assert_eq!(report["seconds"]["all"].as_array().unwrap().len(), 3);
        let close = |a: f64, b: f64| (a - b).abs() <= 1e-9 * b.abs();
        assert!(close(number("/images_per_s"), 2.0 / number("/seconds/median")));
        assert!(number("/seconds/min") <= number("/seconds/median"));
        let parts = report["multiply_adds"]["parts"].as_array().unwrap();
        let keys = ["forward", "backward", "teacher"];
        let sum: u64 = parts.iter().flat_map(|part| keys.map(|key| part[key].as_u64().unwrap())).sum();
        assert_eq!(report["multiply_adds"]["total"].as_u64(), Some(sum));
        assert!(close(number("/tflops"), 2.0 * sum as f64 / number("/seconds/median") / 1e12));
        assert!(close(number("/share_of_product"), number("/tflops") / number("/product_tflops")));
        assert!(number("/first_loss").is_finite() && number("/last_loss").is_finite());
    }
    let table = text(&run(&[&base[..], &sets].concat()).stdout);
    for line in ["batch 8, CPU, f32, 1 threads, random images", "\n  data wait", "\n  matching", "TFLOP/s"] {
        assert!(table.contains(line), "{line}: {table}");
    }
}
