use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::atomic::Ordering;

use candle_core::Tensor;
use image::{Rgb, RgbImage};

use super::super::index_png::{self, Gray, IndexImage, voc_color};
use super::*;
use crate::checkpoint::Checkpoint;
use crate::config::segment::{HeadKind, SegmentPreset};
use crate::model::Architecture;
use crate::model::parameters::{Parameters, Role};
use crate::model::weights::TrainedWeights;
use crate::random::{Purpose, Stream};

/// Untrained weights of a tiny network with patches of 4 pixels.
fn weights(folder: &Path) -> String {
    let architecture = Architecture::backbone_only(16, 4, 2, 4, 4);
    let parameters = Parameters::init(&architecture, Role::Teacher, 1, &Device::Cpu).unwrap();
    let kept = parameters
        .to_tensors()
        .into_iter()
        .filter(|(name, _)| name.starts_with("backbone.") || name.starts_with("ca_head."));
    let own = TrainedWeights { architecture, normalization: ([0.5; 3], [0.25; 3]), tensors: kept.collect() };
    let path = folder.join("weights.safetensors");
    safetensors::serialize_to_file(own.tensors.iter(), Some(own.metadata()), &path).unwrap();
    path.to_string_lossy().into_owned()
}

/// Noisy pictures of 26x20 pixels: class 0 is dark, 1 red, 2 green, in two upright halves; a row does not count.
fn data(folder: &Path) {
    let mut stream = Stream::new(3, Purpose::Subset, &[]);
    for (split, count) in [("train", 7), ("val", 4)] {
        let [images, masks] = ["images", "labels"].map(|kind| folder.join(kind).join(split));
        fs::create_dir_all(&images).unwrap();
        fs::create_dir_all(&masks).unwrap();
        for index in 0..count {
            let halves = [index % 3, (index + 1 + index / 3 % 2) % 3];
            let split_at = 8 + stream.below(10) as u32;
            let class = |x: u32| halves[usize::from(x >= split_at)];
            let noise: Vec<u8> = (0..26 * 20).map(|_| stream.below(50) as u8).collect();
            let picture = RgbImage::from_fn(26, 20, |x, y| {
                let noise = noise[(y * 26 + x) as usize];
                let mut pixel = [noise; 3];
                if class(x) > 0 {
                    pixel[class(x) - 1] = 250 - noise;
                }
                Rgb(pixel)
            });
            picture.save(images.join(format!("{index}.png"))).unwrap();
            let label = |x, y| if y == 0 { 9 } else { class(x) as u8 };
            let indices =
                (0..20).flat_map(|y| (0..26).map(move |x| (x, y))).map(|(x, y)| label(x, y)).collect();
            let palette: Vec<[u8; 3]> = (0..=255).map(voc_color).collect();
            let mask = IndexImage { width: 26, height: 20, indices };
            fs::write(masks.join(format!("{index}.png")), index_png::encode(&mask, &palette).unwrap())
                .unwrap();
        }
    }
    fs::write(folder.join("classes.txt"), "0 dark\n1 red\n2 green\n9 none\n").unwrap();
}

/// A run with everything in one folder.
struct Case {
    folder: tempfile::TempDir,
    settings: SegmentSettings,
}

impl Case {
    fn new(head: HeadKind, change: impl FnOnce(&mut SegmentConfig)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        data(&folder.path().join("data"));
        let preset = SegmentConfig::preset(head, SegmentPreset::Small);
        let mut config = SegmentConfig {
            iterations: 8,
            batch: 3,
            crop: 16,
            size: if head == HeadKind::Fpn { 20 } else { 0 },
            neck_channels: 12,
            head_channels: 8,
            warmup: 2,
            lr: 1e-3,
            checkpoint_every: 3,
            ..preset
        };
        change(&mut config);
        let settings = SegmentSettings {
            weights: weights(folder.path()),
            network: Network::Teacher,
            heads: None,
            data: folder.path().join("data"),
            dataset: DatasetOptions { ignore: Some(9), ..DatasetOptions::default() },
            config,
            out: folder.path().join("run"),
            resume: false,
            predictions: None,
            device: Device::Cpu,
            interrupted: Arc::default(),
        };
        Self { folder, settings }
    }

    /// The same run in another folder.
    fn in_folder(&self, name: &str) -> SegmentSettings {
        SegmentSettings {
            out: self.folder.path().join(name),
            interrupted: Arc::default(),
            ..self.settings.clone()
        }
    }
}

fn newest(settings: &SegmentSettings) -> Checkpoint {
    checkpoint::open_latest(&settings.out.join(CHECKPOINTS)).unwrap().unwrap()
}

/// Names and bits of the tensors of a checkpoint.
fn bits(settings: &SegmentSettings, part: &str) -> Vec<(String, Vec<u32>)> {
    let tensors = newest(settings).tensors(part, &Device::Cpu).unwrap();
    let values = |tensor: Tensor| -> Vec<u32> {
        let tensor = tensor.to_dtype(candle_core::DType::F32).unwrap();
        tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
    };
    tensors.into_iter().map(|(name, tensor)| (name, values(tensor))).collect()
}

#[test]
fn a_linear_head_learns_colors() {
    let mut case = Case::new(HeadKind::Linear, |config| {
        config.iterations = 150;
        config.lr = 0.03;
    });
    case.settings.predictions = Some(case.folder.path().join("predictions"));
    let (mut first, mut last) = (f64::NAN, f64::NAN);
    let report = run(&case.settings, |event| {
        if let Event::Step { iteration, loss, .. } = event {
            if iteration == 1 {
                first = loss;
            }
            last = loss;
        }
    })
    .unwrap();
    assert!(last < 0.5 * first, "loss {first} -> {last}");
    let scores = report.scores.as_ref().unwrap();
    assert!(scores.mean_iou.unwrap() > 0.7, "{scores:?}");
    assert_eq!(scores.classes.iter().map(|class| class.pixels).sum::<u64>(), 4 * 26 * 19);

    // the scores are those of the written predictions
    let mut confusion = metrics::Confusion::new(3);
    let dataset = Dataset::open(&case.settings.data, &case.settings.dataset).unwrap();
    for sample in &dataset.val {
        let path = case.folder.path().join(format!("predictions/{}.png", sample.name));
        let found = index_png::read(&path, Gray::Numbers).unwrap();
        assert_eq!((found.width, found.height), (26, 20));
        confusion.add(&dataset.load(sample).unwrap().labels, &found.indices);
    }
    assert_eq!(&confusion.scores(&dataset.classes.names), scores);
    let overlay = image::open(case.folder.path().join("predictions/overlays/0.png")).unwrap();
    assert_eq!((overlay.width(), overlay.height()), (3 * 26, 20));

    let text = fs::read_to_string(case.settings.out.join(RESULT)).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["mIoU"].as_f64(), scores.mean_iou);
    assert!(json["aAcc"].is_f64() && json["mAcc"].is_f64());
    assert_eq!(json["classes"][1]["name"], "red");
}

#[test]
fn an_interrupted_run_goes_on_bit_for_bit() {
    for (head, fine_tune) in
        [(HeadKind::Linear, false), (HeadKind::Linear, true), (HeadKind::Fpn, false), (HeadKind::Fpn, true)]
    {
        let case = Case::new(head, |config| config.fine_tune = fine_tune);
        let whole = run(&case.settings, |_| ()).unwrap();
        assert_eq!(whole.iterations, 8);

        let mut parts = case.in_folder("parts");
        for stop in [2, 5] {
            let interrupted = Arc::new(AtomicUsize::new(0));
            parts.interrupted = Arc::clone(&interrupted);
            let report = run(&parts, |event| {
                if matches!(event, Event::Step { iteration, .. } if iteration == stop) {
                    interrupted.store(1, Ordering::SeqCst);
                }
            })
            .unwrap();
            assert_eq!((report.ending, report.iterations, report.scores), (Ending::Interrupted, stop, None));
            parts.resume = true;
        }
        parts.interrupted = Arc::default();
        let report = run(&parts, |_| ()).unwrap();
        assert_eq!(report.scores, whole.scores, "{head:?} {fine_tune}");
        for part in ["model", "optimizer"] {
            assert!(bits(&parts, part) == bits(&case.settings, part), "{head:?} {fine_tune}: {part}");
        }
    }
}

#[test]
fn everything_that_is_used_learns() {
    for head in [HeadKind::Linear, HeadKind::Fpn] {
        let case = Case::new(head, |config| {
            config.fine_tune = true;
            config.drop_path = 0.0;
            config.iterations = 2;
        });
        run(&case.settings, |_| ()).unwrap();
        let learned: BTreeSet<String> = bits(&case.settings, "optimizer")
            .into_iter()
            .filter(|(name, values)| {
                name.starts_with("exp_avg.") && values.iter().any(|&bits| bits << 1 != 0)
            })
            .map(|(name, _)| name["exp_avg.".len()..].to_owned())
            .collect();
        let buffers = ["running_mean", "running_var", "standardize"];
        let expected: BTreeSet<String> = bits(&case.settings, "model")
            .into_iter()
            .map(|(name, _)| name)
            // the aggregation head has no part in this; buffers are not learned
            .filter(|name| !name.starts_with("ca_head.") && !buffers.iter().any(|b| name.contains(b)))
            .collect();
        assert_eq!(learned, expected, "{head:?}");
        assert!(learned.contains("backbone.pos_embed") && learned.contains("backbone.blocks.3.mlp.fc2.bias"));
    }
}

#[test]
fn a_frozen_backbone_is_not_in_the_checkpoint() {
    let case = Case::new(HeadKind::Fpn, |config| config.fine_tune = false);
    run(&case.settings, |_| ()).unwrap();
    assert!(bits(&case.settings, "model").iter().all(|(name, _)| !name.starts_with("backbone.")));
}

#[test]
fn features_that_do_not_fit_are_computed_again() {
    let case = Case::new(HeadKind::Linear, |_| ());
    run(&case.settings, |_| ()).unwrap();
    let mut other = case.in_folder("no-memory");
    other.config.cache_gib = 0.0;
    let mut notes = String::new();
    run(&other, |event| {
        if let Event::Note(note) = event {
            notes += &note;
        }
    })
    .unwrap();
    assert!(notes.contains("0 of 7 pictures fit"), "{notes}");
    assert!(bits(&other, "model") == bits(&case.settings, "model"));
}

#[test]
fn runs_are_neither_overwritten_nor_mixed() {
    let case = Case::new(HeadKind::Linear, |config| config.iterations = 2);
    run(&case.settings, |_| ()).unwrap();
    let refused = |settings: &SegmentSettings| {
        let error = run(settings, |_| ()).unwrap_err();
        assert!(error.hint().is_some());
        error.to_string()
    };
    assert!(refused(&case.settings).contains("already holds"));
    let mut changed = SegmentSettings { resume: true, ..case.settings.clone() };
    changed.config.lr = 0.5;
    assert!(refused(&changed).contains("`lr` was 0.001, is now 0.5"));
    let mut changed = SegmentSettings { resume: true, ..case.settings.clone() };
    changed.weights = format!("random:{}", changed.weights);
    changed.config.seed = case.settings.config.seed;
    assert!(refused(&changed).contains("frozen backbone"));
}
