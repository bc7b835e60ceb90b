//! `eval vos`: from a data set on disk to figures; figures against their definition; everything that can be wrong with a
//! data set.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use candle_core::{Device, Tensor};
use pass_core::propagation::Propagation as Rule;
use pass_host::evaluate::vos::{
    Judged, LabelImage, PropagationSettings, Selection, VosReport, VosSettings, run,
};
use pass_host::model::encoder::EncoderOptions;
use serde_json::Value;
use tempfile::TempDir;

/// Height and width of the frames.
const SIZE: (usize, usize) = (96, 140);
const FRAMES: usize = 6;

/// A data set with the sequence `moving` (two objects) made by the test.
struct DataSet {
    root: TempDir,
}

/// An ellipse and a square that move; object 2 is in front.
fn truth(frame: usize) -> LabelImage {
    masks(frame, 0)
}

/// The same, `off` pixels beside the truth.
fn masks(frame: usize, off: usize) -> LabelImage {
    let (height, width) = SIZE;
    let label = |y: usize, x: usize| {
        let (dy, dx) = (y as f64 - 50.0, x as f64 - (40 + 6 * frame + off) as f64);
        let ellipse = (dy / 30.0).powi(2) + (dx / 18.0).powi(2) < 1.0;
        let square = (20..44).contains(&(y + off)) && (60..90).contains(&(x + 4 * frame));
        if square { 2 } else { u8::from(ellipse) }
    };
    let labels = (0..height).flat_map(|y| (0..width).map(move |x| label(y, x))).collect();
    LabelImage { size: SIZE, labels }
}

/// A PNG of RGB or gray pixels.
fn png(color: png::ColorType, (height, width): (usize, usize), pixels: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width as u32, height as u32);
    encoder.set_color(color);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header().unwrap();
    writer.write_image_data(pixels).unwrap();
    writer.finish().unwrap();
    bytes
}

/// A picture in which each object has its color. Formats are told by content: this file may end in .jpg.
fn picture(mask: &LabelImage) -> Vec<u8> {
    let color = |(at, label): (usize, &u8)| {
        let shade = ((at * 7919) % 23) as u8;
        match label {
            1 => [220, 40 + shade, 40],
            2 => [30, 60, 200 + shade],
            _ => [90 + shade, 130, 80 + shade],
        }
    };
    let pixels: Vec<u8> = mask.labels.iter().enumerate().flat_map(color).collect();
    png(png::ColorType::Rgb, mask.size, &pixels)
}

impl DataSet {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let data = Self { root };
        for frame in 0..FRAMES {
            data.write(&data.image(frame), &picture(&truth(frame)));
            data.write(&data.annotation(frame), &truth(frame).encode().unwrap());
        }
        data.write(&data.path().join("ImageSets/2017/val.txt"), b"moving\n");
        data
    }

    fn path(&self) -> &Path {
        self.root.path()
    }

    fn write(&self, path: &Path, bytes: &[u8]) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn image(&self, frame: usize) -> PathBuf {
        self.path().join(format!("JPEGImages/480p/moving/{frame:05}.jpg"))
    }

    fn annotation(&self, frame: usize) -> PathBuf {
        self.path().join(format!("Annotations/480p/moving/{frame:05}.png"))
    }

    /// Predictions outside of the data set's own folders.
    fn predictions(&self) -> PathBuf {
        self.path().join("predictions")
    }

    fn prediction(&self, frame: usize) -> PathBuf {
        self.predictions().join(format!("moving/{frame:05}.png"))
    }

    /// Masks three pixels beside the truth, of the scored frames only.
    fn with_predictions(self) -> Self {
        for frame in 1..FRAMES - 1 {
            self.write(&self.prediction(frame), &masks(frame, 3).encode().unwrap());
        }
        self
    }

    fn settings(&self, judged: Judged) -> VosSettings {
        let selection = Selection::Listed { year: "2017".into(), split: "val".into() };
        VosSettings { data: self.path().to_owned(), selection, judged, overlay: None }
    }

    fn score(&self) -> Result<VosReport, String> {
        told(run(&self.settings(Judged::Predictions(self.predictions())), |_| ()))
    }

    fn propagate(&self, settings: PropagationSettings) -> Result<VosReport, String> {
        told(run(&self.settings(Judged::Weights(settings)), |_| ()))
    }
}

/// An error with its causes, as one line.
fn told<T>(result: Result<T, pass_host::evaluate::vos::VosError>) -> Result<T, String> {
    result.map_err(|error| {
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(error) = cause {
            text += &format!(": {error}");
            cause = error.source();
        }
        text
    })
}

/// A small network with timm's names and random values.
fn weights(folder: &Path) -> PathBuf {
    let (dim, patch) = (24, 8);
    let mut tensors = HashMap::new();
    let mut put = |name: &str, shape: &[usize], scale: f64| {
        let count: usize = shape.iter().product();
        let value =
            |i: usize| (scale * ((i as f64 * 12.9898 + name.len() as f64).sin() * 43_758.545).fract()) as f32;
        let values: Vec<f32> = (0..count).map(value).collect();
        tensors.insert(name.to_owned(), Tensor::from_vec(values, shape, &Device::Cpu).unwrap());
    };
    put("patch_embed.proj.weight", &[dim, 3, patch, patch], 0.1);
    put("patch_embed.proj.bias", &[dim], 0.1);
    put("pos_embed", &[1, 1 + 16, dim], 0.02);
    put("cls_token", &[1, 1, dim], 0.1);
    for block in 0..2 {
        let layers =
            [("attn.qkv", 3 * dim, dim), ("attn.proj", dim, dim), ("mlp.fc1", 48, dim), ("mlp.fc2", dim, 48)];
        for (layer, outputs, inputs) in layers {
            put(&format!("blocks.{block}.{layer}.weight"), &[outputs, inputs], 0.1);
            put(&format!("blocks.{block}.{layer}.bias"), &[outputs], 0.01);
        }
        for layer in ["norm1", "norm2"] {
            put(&format!("blocks.{block}.{layer}.weight"), &[dim], 1.0);
            put(&format!("blocks.{block}.{layer}.bias"), &[dim], 0.01);
        }
    }
    put("norm.weight", &[dim], 1.0);
    put("norm.bias", &[dim], 0.01);
    let path = folder.join("weights.safetensors");
    candle_core::safetensors::save(&tensors, &path).unwrap();
    path
}

fn propagation(weights: &Path) -> PropagationSettings {
    PropagationSettings {
        weights: weights.display().to_string(),
        options: EncoderOptions { heads: Some(2), ..Default::default() },
        device: Device::Cpu,
        rule: Rule { radius: 6, ..Rule::DAVIS },
        short_side: 96,
        std_typo: false,
        out: None,
    }
}

#[test]
fn masks_of_a_network_and_the_files_it_leaves_score_alike() {
    let data = DataSet::new();
    let settings =
        PropagationSettings { out: Some(data.predictions()), ..propagation(&weights(data.path())) };
    let steps = std::sync::atomic::AtomicUsize::new(0);
    let overlay = data.path().join("pictures");
    let all =
        VosSettings { overlay: Some(overlay.clone()), ..data.settings(Judged::Weights(settings.clone())) };
    let found = run(&all, |progress| {
        steps.fetch_max(progress.done, std::sync::atomic::Ordering::Relaxed);
        assert_eq!((progress.sequence, progress.all), ("moving", FRAMES));
    })
    .unwrap();
    assert_eq!(steps.into_inner(), FRAMES);
    assert_eq!(data.score().unwrap().sequences, found.sequences);
    // colors alone tell the objects apart, so even random weights follow them
    assert!(found.J_mean > 0.5 && found.F_mean > 0.3, "{}", found.table());
    let first = LabelImage::read(&data.prediction(0)).unwrap();
    assert_eq!(first, truth(0));
    assert!(overlay.join("moving.png").is_file() && overlay.join("moving.gif").is_file());

    let typo = data.propagate(PropagationSettings { std_typo: true, out: None, ..settings.clone() }).unwrap();
    assert!((typo.J_mean - found.J_mean).abs() < 0.1, "{} {}", typo.J_mean, found.J_mean);
    let wide = Rule { radius: 0, top_k: 10_000, ..settings.rule };
    let everything = data.propagate(PropagationSettings { rule: wide, out: None, ..settings }).unwrap();
    assert_ne!(everything.sequences, found.sequences, "votes of all patches are other votes");
}

/// J and F of one object from their definition: shifted copies, exclusive or, dilation with a disk.
fn by_definition(truth: &LabelImage, found: &LabelImage, object: u8) -> (f64, f64) {
    let (height, width) = truth.size;
    let void = |i: usize| truth.labels[i] == 255;
    let of = |mask: &LabelImage| -> Vec<bool> {
        (0..height * width).map(|i| mask.labels[i] == object && !void(i)).collect()
    };
    let (a, b) = (of(truth), of(found));
    let count = |both: &dyn Fn(usize) -> bool| (0..height * width).filter(|&i| both(i)).count() as f64;
    let union = count(&|i| a[i] || b[i]);
    let j = if union == 0.0 { 1.0 } else { count(&|i| a[i] && b[i]) / union };

    let contour = |mask: &[bool]| -> Vec<bool> {
        let at = |y: usize, x: usize| mask[y.min(height - 1) * width + x.min(width - 1)];
        (0..height * width)
            .map(|i| {
                let (y, x) = (i / width, i % width);
                let here = at(y, x);
                let corner = y + 1 < height && x + 1 < width && at(y + 1, x + 1) != here;
                at(y, x + 1) != here || at(y + 1, x) != here || corner
            })
            .collect()
    };
    let radius = (0.008 * ((height * height + width * width) as f64).sqrt()).ceil() as i64;
    let dilated = |contour: &[bool]| -> Vec<bool> {
        let mut out = vec![false; height * width];
        for i in (0..height * width).filter(|&i| contour[i]) {
            for (dy, dx) in (-radius..=radius).flat_map(|dy| (-radius..=radius).map(move |dx| (dy, dx))) {
                let (y, x) = ((i / width) as i64 + dy, (i % width) as i64 + dx);
                let inside = (0..height as i64).contains(&y) && (0..width as i64).contains(&x);
                if inside && dy * dy + dx * dx <= radius * radius {
                    out[y as usize * width + x as usize] = true;
                }
            }
        }
        out
    };
    let (a, b) = (contour(&a), contour(&b));
    let (wide_a, wide_b) = (dilated(&a), dilated(&b));
    let (n_truth, n_found) = (count(&|i| a[i]), count(&|i| b[i]));
    let f = match (n_truth == 0.0, n_found == 0.0) {
        (true, true) => 1.0,
        (true, false) | (false, true) => 0.0,
        (false, false) => {
            let (precision, recall) =
                (count(&|i| b[i] && wide_a[i]) / n_found, count(&|i| a[i] && wide_b[i]) / n_truth);
            if precision + recall == 0.0 { 0.0 } else { 2.0 * precision * recall / (precision + recall) }
        }
    };
    (j, f)
}

#[test]
fn figures_are_those_of_the_definition() {
    let data = DataSet::new().with_predictions();
    // object 1 is lost in a frame; a part of another is void; object 2 is nowhere in a third
    let mut lost = masks(2, 5);
    lost.labels.iter_mut().for_each(|label| *label = if *label == 1 { 0 } else { *label });
    data.write(&data.prediction(2), &lost.encode().unwrap());
    let mut unknown = truth(3);
    unknown.labels[40 * SIZE.1..60 * SIZE.1].fill(255);
    data.write(&data.annotation(3), &unknown.encode().unwrap());
    let (mut without, mut also_without) = (truth(4), masks(4, 1));
    for mask in [&mut without, &mut also_without] {
        mask.labels.iter_mut().for_each(|label| *label = if *label == 2 { 0 } else { *label });
    }
    data.write(&data.annotation(4), &without.encode().unwrap());
    data.write(&data.prediction(4), &also_without.encode().unwrap());

    let report = data.score().unwrap();
    let mut means = Vec::new();
    for object in [1_u8, 2] {
        let scores: Vec<(f64, f64)> = (1..FRAMES - 1)
            .map(|frame| {
                let read = |path: &Path| LabelImage::read(path).unwrap();
                by_definition(&read(&data.annotation(frame)), &read(&data.prediction(frame)), object)
            })
            .collect();
        let mean = |pick: fn(&(f64, f64)) -> f64| scores.iter().map(pick).sum::<f64>() / scores.len() as f64;
        let expected = [
            mean(|s| s.0),
            mean(|s| s.1),
            mean(|s| f64::from(u8::from(s.0 > 0.5))),
            mean(|s| f64::from(u8::from(s.1 > 0.5))),
        ];
        let score = &report.sequences["moving"].objects[&object];
        let found = [score.J_mean, score.F_mean, score.J_recall, score.F_recall];
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-9, "object {object}: {found} {expected}");
        }
        assert!((0.1..0.999).contains(&score.J_mean), "{}", score.J_mean);
        means.push(expected);
    }
    let mean = |i: usize| f64::midpoint(means[0][i], means[1][i]);
    for (found, expected) in [
        (report.J_mean, mean(0)),
        (report.F_mean, mean(1)),
        (report.J_recall, mean(2)),
        (report.F_recall, mean(3)),
        (report.JF_mean, f64::midpoint(mean(0), mean(1))),
    ] {
        assert!((found - expected).abs() < 1e-9, "{found} {expected}");
    }
}

#[test]
fn predictions_that_do_not_fit_are_named() {
    type Spoil = fn(&DataSet);
    let cases: [(Spoil, &[&str]); 8] = [
        (
            |data| {
                let small = LabelImage { size: (50, 60), labels: vec![1; 3000] };
                data.write(&data.prediction(2), &small.encode().unwrap());
            },
            &["predictions/moving/00002.png", "60x50", "140x96", "Annotations"],
        ),
        (
            |data| {
                let mut mask = truth(3);
                mask.labels[7] = 9;
                data.write(&data.prediction(3), &mask.encode().unwrap());
            },
            &["predictions/moving/00003.png", "object 9", "up to 2"],
        ),
        (
            |data| {
                let mut mask = truth(3);
                mask.labels[7] = 3;
                data.write(&data.annotation(3), &mask.encode().unwrap());
            },
            &["Annotations/480p/moving/00003.png", "object 3", "up to 2"],
        ),
        (
            |data| fs::remove_file(data.prediction(2)).unwrap(),
            &["1 of 4 scored masks are missing", "00002.png", "predictions/moving"],
        ),
        (
            |data| fs::remove_dir_all(data.predictions().join("moving")).unwrap(),
            &["4 of 4 scored masks are missing"],
        ),
        (|data| fs::remove_dir_all(data.predictions()).unwrap(), &["predictions` does not exist"]),
        (
            |data| {
                let gray = png(png::ColorType::Grayscale, SIZE, &truth(1).labels);
                data.write(&data.prediction(1), &gray);
            },
            &["predictions/moving/00001.png", "indices into a palette", "shades of gray"],
        ),
        (
            |data| {
                let bytes = truth(1).encode().unwrap();
                data.write(&data.prediction(1), &bytes[..bytes.len() / 2]);
            },
            &["predictions/moving/00001.png", "not a whole PNG file"],
        ),
    ];
    for (spoil, expected) in cases {
        let data = DataSet::new().with_predictions();
        assert!(data.score().is_ok());
        spoil(&data);
        let error = data.score().unwrap_err();
        assert!(expected.iter().all(|part| error.contains(part)), "{error}");
    }
}

#[test]
fn data_sets_that_are_not_whole_are_named() {
    type Spoil = fn(&DataSet);
    let cases: [(Spoil, &[&str]); 8] = [
        (|data| fs::remove_file(data.image(2)).unwrap(), &["JPEGImages/480p/moving/00002.jpg` is missing"]),
        (|data| fs::remove_file(data.annotation(5)).unwrap(), &["moving/00005.png` is missing"]),
        (
            |data| {
                for frame in 1..FRAMES {
                    fs::remove_file(data.image(frame)).unwrap();
                    fs::remove_file(data.annotation(frame)).unwrap();
                }
            },
            &["Annotations/480p/moving` holds 1 masks", "at least 3"],
        ),
        (
            |data| {
                let other = LabelImage { size: (96, 100), labels: vec![0; 9600] };
                data.write(&data.image(3), &picture(&other));
            },
            &["moving/00003.jpg` has 100x96 pixels", "140x96"],
        ),
        (
            |data| {
                let bytes = picture(&truth(4));
                data.write(&data.image(4), &bytes[..bytes.len() / 2]);
            },
            &["cannot use frame", "moving/00004.jpg"],
        ),
        (
            |data| {
                let empty = LabelImage { size: SIZE, labels: vec![0; SIZE.0 * SIZE.1] };
                data.write(&data.annotation(0), &empty.encode().unwrap());
            },
            &["Annotations/480p/moving/00000.png` shows no object"],
        ),
        (
            |data| {
                let gray = png(png::ColorType::Grayscale, SIZE, &truth(0).labels);
                data.write(&data.annotation(0), &gray);
            },
            &["Annotations/480p/moving/00000.png", "indices into a palette"],
        ),
        (|data| fs::write(data.path().join("ImageSets/2017/val.txt"), "gone\n").unwrap(), &["480p/gone`"]),
    ];
    for (spoil, expected) in cases {
        let data = DataSet::new();
        let settings = propagation(&weights(data.path()));
        spoil(&data);
        let error = data.propagate(settings).unwrap_err();
        assert!(expected.iter().all(|part| error.contains(part)), "{error}");
    }
}

#[test]
fn weights_and_sizes_that_cannot_work_are_named() {
    let data = DataSet::new();
    let good = weights(data.path());
    let fails = |settings: PropagationSettings, expected: &str| {
        let error = data.propagate(settings).unwrap_err();
        assert!(error.contains(expected), "{error}");
    };
    fails(propagation(Path::new("nowhere.safetensors")), "nowhere.safetensors");
    let bytes = fs::read(&good).unwrap();
    let cut = data.path().join("cut.safetensors");
    fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
    fails(propagation(&cut), "cut.safetensors");
    let other = data.path().join("other.safetensors");
    let tensors =
        HashMap::from([("layer1.weight", Tensor::zeros(4, candle_core::DType::F32, &Device::Cpu).unwrap())]);
    candle_core::safetensors::save(&tensors, &other).unwrap();
    fails(propagation(&other), "other.safetensors");
    fails(PropagationSettings { short_side: 7, ..propagation(&good) }, "patches of 8 with a short side of 7");
    let own = data.path().join("Annotations/480p");
    fails(
        PropagationSettings { out: Some(own), ..propagation(&good) },
        "would replace files of the data set",
    );
    assert_eq!(LabelImage::read(&data.annotation(0)).unwrap(), truth(0));
}

#[test]
fn the_program_writes_json_csv_and_a_table() {
    let data = DataSet::new().with_predictions();
    let (json, csv) = (data.path().join("vos.json"), data.path().join("vos.csv"));
    let program = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pass-host"));
        command.args(["eval", "vos", "--data"]).arg(data.path());
        command
    };
    let output = program()
        .arg("--predictions")
        .arg(data.predictions())
        .arg("--json")
        .arg(&json)
        .arg("--csv")
        .arg(&csv)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains("moving") && table.contains("mean"), "{table}");
    let figures: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    let expected = data.score().unwrap();
    assert_eq!(figures["J&F_mean"], expected.JF_mean);
    let objects: BTreeMap<String, Value> =
        serde_json::from_value(figures["sequences"]["moving"]["objects"].clone()).unwrap();
    assert_eq!(objects["2"]["F_mean"], expected.sequences["moving"].objects[&2].F_mean);
    assert_eq!(fs::read_to_string(&csv).unwrap(), expected.csv());

    let failed = program().arg("--predictions").arg("nowhere").output().unwrap();
    let stderr = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert_eq!(failed.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("`nowhere` does not exist") && stderr.contains("hint:"), "{stderr}");
    assert_eq!(program().output().unwrap().status.code(), Some(2));
    let zero = program().args(["--weights", "w", "--topk", "0"]).output().unwrap();
    assert_eq!(zero.status.code(), Some(2));
}
