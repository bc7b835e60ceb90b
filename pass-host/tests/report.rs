//! `report` on tiny runs: complete, closed, escaped, and there whatever is missing.

#[expect(dead_code, reason = "some helpers serve other tests")]
mod program;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use program::{expect_code, finish, photos, stderr, train};

fn report(run: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pass-host"));
    command.arg("report").arg(run).args(arguments).args(["--device", "cpu"]);
    finish(command)
}

/// Elements that have no end.
const VOID: [&str; 4] = ["meta", "img", "input", "br"];

/// Checks that every element that begins ends, in order, and returns the text of all attributes.
fn attributes(page: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut open: Vec<String> = Vec::new();
    let mut rest = page;
    while let Some(start) = rest.find('<') {
        rest = &rest[start + 1..];
        let end = rest.find('>').expect("a tag ends");
        let tag = &rest[..end];
        rest = &rest[end + 1..];
        if tag.starts_with('!') {
            continue;
        }
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop().as_deref(), Some(name), "near {}", &rest[..rest.len().min(80)]);
            continue;
        }
        let (name, mut values) = tag.split_once([' ', '\n']).unwrap_or((tag, ""));
        while let Some((key, after)) = values.split_once("=\"") {
            let (value, next) = after.split_once('"').expect("a value ends");
            found.push((key.trim().to_owned(), value.to_owned()));
            values = next;
        }
        if !VOID.contains(&name) {
            open.push(name.to_owned());
        }
        if ["script", "style"].contains(&name) {
            // raw text up to the end tag
            rest = &rest[rest.find(&format!("</{name}>")).expect("raw text ends")..];
        }
    }
    assert!(open.is_empty(), "never closed: {open:?}");
    found
}

/// The page is closed and loads nothing.
fn check_page(file: &Path) -> String {
    let page = fs::read_to_string(file).expect("the page");
    for (key, value) in attributes(&page) {
        if ["src", "href", "action", "data", "srcset", "poster"].contains(&key.as_str()) {
            assert!(value.starts_with("data:image/png;base64,"), "{key}={value}");
        }
    }
    for word in ["http://", "https://", "@import", "url(", "fetch(", "XMLHttpRequest", "import("] {
        assert!(!page.contains(word), "`{word}` in the page");
    }
    assert!(page.contains("default-src 'none'"));
    page
}

/// The data of the curves.
fn data(page: &str) -> serde_json::Value {
    let (_, rest) = page.split_once("<script type=\"application/json\" id=\"data\">").expect("the data");
    serde_json::from_str(rest.split_once("</script>").expect("its end").0).expect("JSON")
}

fn keys(data: &serde_json::Value) -> Vec<String> {
    let charts = data["charts"].as_array().expect("charts");
    let curves = charts.iter().flat_map(|chart| chart["curves"].as_array().expect("curves"));
    curves.map(|curve| curve["key"].as_str().expect("a key").to_owned()).collect()
}

/// Photos under a name that would be markup.
fn hostile_photos(folder: &Path) -> PathBuf {
    let images = folder.join("<b>&'\"images");
    fs::create_dir_all(&images).unwrap();
    for name in ["000.jpg", "001.jpg", "002.jpg", "003.jpg", "004.jpg", "005.jpg"] {
        fs::copy(photos().join("clothing").join(name), images.join(format!("<script>alert({name})")))
            .unwrap();
        fs::copy(photos().join("clothing").join(name), images.join(name)).unwrap();
    }
    images
}

fn tiny_run(run: &Path, images: &Path, flags: &[&str]) {
    let mut command = train(run, 6, &["data.limit=0", "checkpoint.every_steps=2"], flags);
    let set = format!("data.images=[{}]", serde_json::to_string(images.to_str().unwrap()).unwrap());
    // the flag wins over IMAGES only as a whole new command
    let program = command.get_program().to_owned();
    let arguments: Vec<_> = command
        .get_args()
        .map(ToOwned::to_owned)
        .filter(|argument| *argument != *photos().as_os_str())
        .collect();
    command = Command::new(program);
    command.args(arguments).args(["--preset", "paper-vit-s16", "--set", &set]);
    expect_code(&finish(command), 0);
}

#[test]
fn a_page_holds_everything_and_escapes_it() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run <i>&\"'");
    let images = hostile_photos(dir.path());
    tiny_run(&run, &images, &["--report-every", "2"]);
    let trained = check_page(&run.join("report.html"));
    assert!(trained.contains("step 6 of 6"), "renewed at the end");

    fs::create_dir(run.join("evaluation")).unwrap();
    fs::write(run.join("evaluation/vos.json"), "{\"J&F_mean\":0.5,\"weights\":\"<u>\"}").unwrap();
    fs::write(run.join("quarantine.tsv"), "/x/<bad>.jpg\tnot \"an\" image\n").unwrap();
    let metrics = run.join("metrics.jsonl");
    let mut text = fs::read_to_string(&metrics).unwrap();
    text = text.replacen("\"epoch\"", "\"knn_top1<\":0.25,\"epoch\"", 1);
    text += "broken\n{\"step\":7,\"loss\":null}\n{\"torn";
    fs::write(&metrics, text).unwrap();
    let out = dir.path().join("page.html");
    let output = report(&run, &["--out", out.to_str().unwrap(), "--json"]);
    expect_code(&output, 0);
    let summary: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(summary["steps"], 7);
    assert_eq!(summary["missing"], serde_json::json!([]));
    let page = check_page(&out);
    for part in [
        "<h1>run &lt;i&gt;&amp;&quot;&#39;</h1>",
        "1 of the lines of metrics.jsonl could not be used: line 7: ",
        "<h3>vos</h3>",
        "<td>&lt;u&gt;</td>",
        "<td>/x/&lt;bad&gt;.jpg</td>",
        "<h2>Crops as the network sees them</h2>",
        "alt=\"global crop 1\"",
        "alt=\"local crop 4\"",
        "<th>step 2</th><th>step 4</th><th>step 6</th>",
        "Principal components of the patch features",
        "Where a patch looks",
        "patch_size = 8",
    ] {
        assert!(page.contains(part), "{part}");
    }
    for raw in ["<b>", "<script>alert", "<i>&\"", "<u>", "knn_top1<"] {
        assert!(!page.contains(raw), "{raw} is not escaped");
    }
    let data = data(&page);
    let mut found = keys(&data);
    found.sort();
    let mut expected: Vec<String> = "loss loss_image loss_patch lr weight_decay momentum teacher_temp grad_norm \
         teacher_entropy_image teacher_entropy_patch kl_image kl_patch feature_std positives_agreement images_per_s \
         data_wait knn_top1<"
        .split(' ')
        .filter(|key| !key.is_empty())
        .map(str::to_owned)
        .collect();
    expected.sort();
    assert_eq!(found, expected);
    assert_eq!(data["steps"], serde_json::json!([1, 2, 3, 4, 5, 6, 7]));
    assert_eq!(data["charts"][0]["lines"][0]["name"], "ln 64");
}

#[test]
fn what_is_missing_is_said_on_the_page() {
    let dir = tempfile::tempdir().unwrap();
    let (run, images) = (dir.path().join("run"), hostile_photos(dir.path()));
    tiny_run(&run, &images, &["--set", "patch.enabled=false"]);
    fs::remove_dir_all(&images).unwrap();
    fs::remove_file(run.join("index.bin")).ok();
    let output = report(&run, &[]);
    expect_code(&output, 0);
    let page = check_page(&run.join("report.html"));
    assert!(page.contains("crops and pictures need images"), "{}", stderr(&output));
    assert!(!page.contains("Crops as the network sees them"));
    let keys = keys(&data(&page));
    assert!(keys.contains(&"loss_image".into()) && !keys.contains(&"loss_patch".into()), "{keys:?}");

    // damaged checkpoints, images given
    for entry in fs::read_dir(run.join("checkpoints")).unwrap().flatten() {
        if entry.path().is_dir() {
            fs::write(entry.path().join("teacher.safetensors"), "x").unwrap();
        }
    }
    let photos = photos();
    expect_code(&report(&run, &["--images", photos.to_str().unwrap()]), 0);
    let page = check_page(&run.join("report.html"));
    assert!(page.contains("Crops as the network sees them"));
    assert!(page.contains("there are no pictures of the features: checkpoint"));

    // neither checkpoints nor a log nor a readable configuration
    fs::remove_dir_all(run.join("checkpoints")).unwrap();
    fs::write(run.join("metrics.jsonl"), "").unwrap();
    expect_code(&report(&run, &["--images", photos.to_str().unwrap()]), 0);
    let page = check_page(&run.join("report.html"));
    assert!(page.contains("the run has no checkpoint yet") && page.contains("Nothing has been logged yet"));
    fs::write(run.join("config.toml"), "seed = {").unwrap();
    expect_code(&report(&run, &[]), 0);
    let page = check_page(&run.join("report.html"));
    assert!(page.contains("<code>config.toml</code> cannot be understood") && page.contains("seed = {"));
}

#[test]
fn a_report_that_cannot_be_written_does_not_stop_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    // a folder in the place of the page
    fs::create_dir_all(run.join("report.html/x")).unwrap();
    let output = finish(train(&run, 2, &[], &["--report-every", "1"]));
    expect_code(&output, 0);
    assert!(stderr(&output).contains("warning: there is no new report: "), "{}", stderr(&output));
    assert!(run.join("checkpoints/step-00000002").is_dir());
}

#[test]
fn no_run_no_page() {
    let dir = tempfile::tempdir().unwrap();
    let output = report(dir.path(), &[]);
    expect_code(&output, 1);
    assert!(stderr(&output).contains("is no run folder"), "{}", stderr(&output));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}
