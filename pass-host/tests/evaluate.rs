//! k-NN and dense retrieval against brute force in NumPy (`fixtures/evaluate/make.py`), and the whole program on small
//! labelled folders.

#[expect(dead_code, reason = "some helpers serve other tests")]
mod program;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use ndarray::{Array2, ArrayView2, Axis};
use pass_host::evaluate::image_features::normalize_rows;
use pass_host::evaluate::knn;
use pass_host::evaluate::neighbors::nearest;
use pass_host::evaluate::retrieval::bank::{Bank, choose, patch_shares};
use pass_host::evaluate::retrieval::read_out::{enlarge, read_out};
use pass_host::evaluate::segment::metrics::Confusion;
use program::{expect_code, finish, metrics, photos, stderr, train};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// A fixture file, read whole.
struct Fixture(Vec<u8>);

impl Fixture {
    fn open(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/evaluate").join(name);
        Self(
            fs::read(&path)
                .unwrap_or_else(|e| panic!("{}: {e}; run fixtures/evaluate/make.py", path.display())),
        )
    }

    fn number(&self, key: &str) -> f64 {
        let (_, header) = SafeTensors::read_metadata(&self.0).expect("a header");
        header.metadata().as_ref().expect("metadata")[key].parse().expect("a number")
    }

    fn size(&self, key: &str) -> usize {
        self.number(key) as usize
    }

    fn read<const N: usize, T>(
        &self,
        name: &str,
        dtype: Dtype,
        value: fn([u8; N]) -> T,
    ) -> (Vec<T>, Vec<usize>) {
        let file = SafeTensors::deserialize(&self.0).expect("safetensors");
        let tensor = file.tensor(name).expect("a tensor");
        assert_eq!(tensor.dtype(), dtype, "{name}");
        let values = tensor.data().chunks_exact(N).map(|bytes| value(bytes.try_into().expect("N bytes")));
        (values.collect(), tensor.shape().to_vec())
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        self.read(name, Dtype::F32, f32::from_le_bytes).0
    }

    fn doubles(&self, name: &str) -> Vec<f64> {
        self.read(name, Dtype::F64, f64::from_le_bytes).0
    }

    fn bytes(&self, name: &str) -> (Vec<u8>, Vec<usize>) {
        self.read(name, Dtype::U8, u8::from_le_bytes)
    }

    fn indices(&self, name: &str) -> Vec<usize> {
        self.read(name, Dtype::I64, i64::from_le_bytes).0.into_iter().map(|value| value as usize).collect()
    }

    /// L2-normalized rows.
    fn unit_rows(&self, name: &str) -> Array2<f32> {
        let (values, shape) = self.read(name, Dtype::F32, f32::from_le_bytes);
        let dim = shape[shape.len() - 1];
        let mut rows = Array2::from_shape_vec((values.len() / dim, dim), values).expect("rows");
        normalize_rows(&mut rows);
        rows
    }
}

#[test]
fn knn_equals_brute_force() {
    let fixture = Fixture::open("knn.safetensors");
    let (train, val) = (fixture.unit_rows("in.train"), fixture.unit_rows("in.val"));
    let (train_labels, val_labels) = (fixture.indices("in.train_labels"), fixture.indices("in.val_labels"));
    let (ks, classes, temperature) =
        (fixture.indices("in.k"), fixture.size("classes"), fixture.number("temperature"));
    let most = *ks.iter().max().expect("numbers of neighbors");

    let neighbors = nearest(train.view(), val.view(), most);
    let (expected, _) = fixture.bytes("out.neighbors");
    for (image, (found, expected)) in neighbors.iter().zip(expected.chunks(most)).enumerate() {
        let found: Vec<u8> = found.iter().map(|neighbor| neighbor.row as u8).collect();
        assert_eq!(found, expected, "neighbors of image {image}");
    }
    let ranks = fixture.indices("out.rank");
    for (&k, expected) in ks.iter().zip(ranks.chunks(val_labels.len())) {
        let found = knn::label_ranks(&neighbors, k, &train_labels, &val_labels, classes, temperature);
        assert_eq!(found, expected, "ranks at k = {k}");
    }
    let found = knn::scores(&train, &train_labels, &val, &val_labels, classes, &ks, temperature);
    let (top1, top5) = (fixture.doubles("out.top1"), fixture.doubles("out.top5"));
    for ((score, top1), top5) in found.iter().zip(top1).zip(top5) {
        assert!(
            (score.top1 - top1).abs() < 1e-12 && (score.top5 - top5).abs() < 1e-12,
            "{score:?} {top1} {top5}"
        );
    }
    assert!(found.iter().any(|score| score.top1 > 0.0 && score.top1 < 1.0), "the fixture can fail");
}

#[test]
fn retrieval_equals_brute_force() {
    let fixture = Fixture::open("retrieval.safetensors");
    let [classes, rows, columns, k, quota] =
        ["classes", "rows", "columns", "k", "quota"].map(|key| fixture.size(key));
    let (grid, patches, temperature) = ((rows, columns), rows * columns, fixture.number("temperature"));
    let (labels, shape) = fixture.bytes("in.labels");
    let size = (shape[1], shape[2]);
    let features = fixture.unit_rows("in.features");
    let uniform = fixture.doubles("in.uniform");
    let expected_shares = fixture.floats("out.shares");
    let (chosen, _) = fixture.bytes("out.chosen");
    let pictures: Vec<&[u8]> = labels.chunks(size.0 * size.1).collect();
    let (train, val) = pictures.split_at(4);

    let [mut all, mut sampled] = [(); 2].map(|()| Bank::new(features.ncols(), classes));
    for (image, labels) in train.iter().enumerate() {
        let shares = patch_shares(labels, size, grid, classes);
        let expected = &expected_shares[image * patches * classes..][..patches * classes];
        for (found, expected) in shares.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-6, "shares of image {image}: {found} {expected}");
        }
        let kept = choose(shares.view(), quota, &uniform[image * patches..][..patches]);
        let expected: Vec<usize> =
            (0..patches).filter(|patch| chosen[image * patches + patch] == 1).collect();
        assert_eq!(kept, expected, "patches of image {image}");
        let add = |bank: &mut Bank, patches_kept: &[usize]| {
            for &patch in patches_kept {
                let feature = features.row(image * patches + patch);
                bank.push(
                    feature.as_slice().expect("one row"),
                    shares.row(patch).as_slice().expect("one row"),
                );
            }
        };
        add(&mut all, &choose(shares.view(), patches, &uniform));
        add(&mut sampled, &kept);
    }
    let queries = features.slice_axis(Axis(0), (4 * patches..).into());
    for (name, bank) in [("all", &all), ("sampled", &sampled)] {
        check_parsing(&fixture, name, bank, queries, val, (k, temperature), grid, size);
    }
    assert!(sampled.len() == 4 * quota && all.len() > sampled.len());
}

fn check_parsing(
    fixture: &Fixture,
    name: &str,
    bank: &Bank,
    queries: ArrayView2<'_, f32>,
    pictures: &[&[u8]],
    (k, temperature): (usize, f64),
    grid: (usize, usize),
    size: (usize, usize),
) {
    let soft = read_out(bank, queries, k, temperature);
    for (found, expected) in soft.iter().zip(fixture.floats(&format!("out.{name}.soft"))) {
        assert!((found - expected).abs() < 2e-5, "{name}: soft label {found}, expected {expected}");
    }
    let classes = soft.ncols();
    let (expected, _) = fixture.bytes(&format!("out.{name}.labels"));
    let mut confusion = Confusion::new(classes);
    let parts =
        soft.axis_chunks_iter(Axis(0), grid.0 * grid.1).zip(pictures).zip(expected.chunks(size.0 * size.1));
    for ((soft, labels), expected) in parts {
        let found = enlarge(soft, grid, size);
        let differing = found.iter().zip(expected).filter(|(found, expected)| found != expected).count();
        assert_eq!(differing, 0, "{name}: pixels of another class");
        confusion.add(labels, &found);
    }
    let names: Vec<String> = (0..classes).map(|class| class.to_string()).collect();
    let (found, expected) = (confusion.scores(&names), fixture.doubles(&format!("out.{name}.miou"))[0]);
    assert!((found.mean_iou.expect("labelled pixels") - expected).abs() < 1e-12);
    assert!(
        expected > 0.2 && expected < 0.99 && found.classes.iter().any(|class| class.iou.is_none()),
        "the fixture can fail"
    );
}

/// Two classes of real photos, `count` for training and half as many to judge, and one file that is no image.
fn class_folders(root: &Path, count: usize) -> PathBuf {
    let data = root.join("classes");
    for class in ["clothing", "grocery"] {
        let mut files: Vec<PathBuf> = fs::read_dir(photos().join(class))
            .expect("photos")
            .map(|entry| entry.expect("an entry").path())
            .collect();
        files.sort();
        for (i, file) in files.iter().take(count + count / 2).enumerate() {
            let folder = data.join(if i < count { "train" } else { "val" }).join(class);
            fs::create_dir_all(&folder).expect("a folder");
            fs::copy(file, folder.join(file.file_name().expect("a name"))).expect("a copy");
        }
    }
    fs::write(data.join("train/grocery/broken.jpg"), "no image").expect("a file");
    data
}

/// Pictures whose left half is dark and of class 0, whose right half is bright and of class 1, with an unlabelled row.
fn scenes(root: &Path) -> PathBuf {
    let data = root.join("scenes");
    for (split, count) in [("train", 3u8), ("val", 2)] {
        let [images, masks] = ["images", "labels"].map(|kind| data.join(kind).join(split));
        fs::create_dir_all(&images).expect("a folder");
        fs::create_dir_all(&masks).expect("a folder");
        for picture in 0..count {
            let middle = 16 + 8 * u32::from(picture);
            let image = image::RgbImage::from_fn(50, 34, |x, y| {
                let noise = (x * 7 + y * 13 + u32::from(picture)) % 16;
                image::Rgb([if x < middle { 20 + noise as u8 } else { 200 + noise as u8 }; 3])
            });
            let mask = image::GrayImage::from_fn(50, 34, |x, y| {
                image::Luma([if y == 0 { 9 } else { u8::from(x >= middle) }])
            });
            image.save(images.join(format!("{picture}.png"))).expect("an image");
            mask.save(masks.join(format!("{picture}.png"))).expect("a mask");
        }
    }
    fs::write(data.join("dataset.json"), r#"{"classes": ["dark", "bright"], "ignore_index": 9}"#)
        .expect("classes");
    data
}

fn eval(protocol: &str, weights: &Path, data: &Path, flags: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pass-host"));
    command
        .args(["eval", protocol, "--device", "cpu", "--weights"])
        .arg(weights)
        .arg("--data")
        .arg(data)
        .args(flags);
    command
}

fn json(command: Command) -> Value {
    let output = finish(command);
    expect_code(&output, 0);
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

#[test]
fn every_protocol_judges_a_run_and_its_result_does_not_depend_on_threads() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = folder.path().join("run");
    expect_code(&finish(train(&run, 3, &[], &[])), 0);
    let (classes, scenes) = (class_folders(folder.path(), 12), scenes(folder.path()));

    let knn = |threads| json(eval("knn", &run, &classes, &["--json", "--k", "5,100", "--threads", threads]));
    let found = knn("1");
    assert_eq!(found, knn("2"));
    let pick =
        |value: &Value, keys: &[&str]| keys.iter().fold(value.clone(), |value, key| value[key].clone());
    assert_eq!((pick(&found, &["train_images"]), pick(&found, &["val_images"])), (24.into(), 12.into()));
    assert_eq!((pick(&found, &["knn", "100", "k"]), pick(&found, &["knn", "5", "k"])), (24.into(), 5.into()));
    assert!(found["bad"][0][0].as_str().expect("a name").ends_with("broken.jpg"));
    assert!(found["knn"]["5"]["top1"].as_f64().expect("a share") > 0.3, "{found}");

    let flags =
        ["--json", "--epochs", "5", "--crops", "2", "--tokens", "mean", "--lrs", "0.01,1", "--size", "48"];
    let linear = json(eval("linear", &run, &classes, &flags));
    assert_eq!((pick(&linear, &["views"]), pick(&linear, &["size"])), (3.into(), 48.into()));
    assert_eq!(linear["rates"].as_array().expect("rates").len(), 2);
    assert_eq!(linear, json(eval("linear", &run, &classes, &[&flags[..], &["--threads", "1"]].concat())));

    let file = folder.path().join("retrieval.json");
    let output = finish(eval("retrieval", &run, &scenes, &["--json", file.to_str().expect("UTF-8")]));
    expect_code(&output, 0);
    assert!(String::from_utf8_lossy(&output.stdout).contains("retrieval: mIoU"));
    let found: Value = serde_json::from_slice(&fs::read(&file).expect("the result")).expect("JSON");
    // 50 x 34 pixels in patches of 8: 6 x 4
    assert_eq!(
        (pick(&found, &["train_patches"]), pick(&found, &["memory"])),
        ((3 * 24).into(), (3 * 24).into())
    );
    assert!(
        found["mIoU"].as_f64().expect("a share") > 0.7,
        "dark and bright are easy to tell apart: {found}"
    );
    let few = json(eval("retrieval", &run, &scenes, &["--json", "--memory", "10", "--size", "32x48"]));
    assert_eq!(few["memory"], 10);
}

#[test]
fn faults_are_told() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = folder.path().join("run");
    expect_code(&finish(train(&run, 1, &[], &[])), 0);
    let (classes, scenes) = (class_folders(folder.path(), 2), scenes(folder.path()));
    for (command, code, expected) in [
        (
            eval("knn", &run, &classes, &["--size", "30"]),
            1,
            "expected a positive multiple of the patch size 8, found 30",
        ),
        (eval("knn", &run, &classes, &["--k", "0"]), 2, "`--k`: expected 1 or more"),
        (
            eval("knn", &run, &classes.join("train"), &[]),
            1,
            "train/train`: expected a folder of class folders",
        ),
        (eval("linear", &run, &classes, &["--lrs=-1"]), 2, "`--lrs`: expected a number above 0"),
        (eval("retrieval", &run, &classes, &[]), 1, "has none of the known layouts"),
        (
            eval("retrieval", &run, &scenes, &["--ignore", "3"]),
            1,
            "label 9 at column 0, row 0 is none of the 2 classes",
        ),
        (eval("retrieval", &folder.path().join("none"), &scenes, &[]), 1, "no weights at"),
    ] {
        let output = finish(command);
        expect_code(&output, code);
        assert!(stderr(&output).contains(expected), "{expected:?} not in {}", stderr(&output));
    }
}

#[test]
fn probes_are_logged_and_survive_a_resume() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = class_folders(folder.path(), 8);
    let scenes = scenes(folder.path());
    let scenes = scenes.to_str().expect("UTF-8");
    let flags = ["--eval-every", "2", "--eval-data", data.to_str().expect("UTF-8")];
    let settings = ["log.every_steps=3", "checkpoint.every_steps=3"];
    let whole = folder.path().join("whole");
    let output = finish(train(&whole, 8, &settings, &flags));
    expect_code(&output, 0);
    let log = stderr(&output);
    assert!(
        log.contains("the probe leaves out") && log.contains("broken.jpg") && log.contains("k-NN "),
        "{log}"
    );
    let lines = metrics(&whole);
    let steps: Vec<(u64, bool)> = lines
        .iter()
        .map(|line| (line["step"].as_u64().expect("a step"), line.get("knn_top1").is_some()))
        .collect();
    assert_eq!(steps, [(1, false), (2, true), (3, false), (4, true), (6, true), (8, true)]);
    assert!(
        lines
            .iter()
            .filter_map(|line| line.get("knn_top1"))
            .all(|share| share.as_f64().is_some_and(|s| (0.0..=1.0).contains(&s)))
    );

    // back to step 6 of 8, other threads
    let resumed = folder.path().join("resumed");
    expect_code(&finish(train(&resumed, 8, &settings, &flags)), 0);
    fs::remove_dir_all(program::latest(&resumed)).expect("the last checkpoint");
    let more = [&flags[..], &["--resume", "auto", "--threads", "1"]].concat();
    expect_code(&finish(train(&resumed, 8, &settings, &more)), 0);
    assert_eq!(metrics(&resumed), lines);

    let retrieval = folder.path().join("retrieval");
    let flags = ["--eval-every", "2", "--eval-data", scenes, "--set", "probe.kind=retrieval"];
    expect_code(&finish(train(&retrieval, 2, &settings, &flags)), 0);
    assert!(metrics(&retrieval)[1]["retrieval_miou"].as_f64().expect("a share") > 0.5);
}

#[test]
fn a_bad_probe_folder_stops_before_the_first_step() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = folder.path().join("run");
    let output = finish(train(&run, 2, &[], &["--eval-every", "1", "--eval-data", "nowhere"]));
    expect_code(&output, 1);
    assert!(stderr(&output).contains("the probe (`probe.data`) cannot be used"), "{}", stderr(&output));
    assert!(stderr(&output).contains("nowhere/train`: expected a folder of class folders, found nothing"));
    assert!(!run.exists());
    let output = finish(train(&run, 2, &[], &["--eval-every", "1"]));
    expect_code(&output, 2);
    assert!(stderr(&output).contains("`probe.data`: expected a labelled folder"), "{}", stderr(&output));
}
