//! Whole runs by several ranks, as threads of one process.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use candle_core::DType;
use serde_json::Value;

use super::*;
use crate::checkpoint::open_at;
use crate::config::run::Resume;
use crate::config::{Arch, ClipBy, ImageMethod, Positions, WeightInit, presets};
use crate::device::Compute;
use crate::distributed::DistributedError;
use crate::distributed::threads::on_ranks;

/// A small network on small crops of 24 photos, eight images a step over all ranks.
fn tiny(ranks: usize) -> TrainConfig {
    let mut config = presets::find("demo").unwrap().config();
    config.data.images = vec![concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/photos").into()];
    config.data.limit = 24;
    config.data.workers = 1;
    let model = &mut config.model;
    (model.arch, model.dim, model.depth, model.heads, model.patch_size) = (Arch::Custom, 16, 2, 2, 8);
    model.drop_path = 0.2;
    (config.augment.global_size, config.augment.local_size) = (32, 24);
    (config.head.hidden, config.head.bottleneck) = (24, 8);
    (config.head.class_prototypes, config.head.patch_prototypes) = (32, 24);
    (config.optim.batch, config.optim.steps, config.optim.epochs) = (8 / ranks, 0, 4);
    (config.checkpoint.every_steps, config.log.every_steps) = (5, 1);
    config
}

fn settings(out: &Path, config: TrainConfig, ranks: &Ranks) -> RunSettings {
    RunSettings {
        config,
        preset: "demo".into(),
        out: out.into(),
        resume: Resume::Auto,
        init: None,
        compute: Compute { device: Device::Cpu, dtype: DType::F32 },
        ranks: ranks.clone(),
        threads: 1,
        dry_run: false,
        json: false,
        interrupted: Arc::default(),
    }
}

/// Runs on so many ranks; every rank tells the same.
fn train(out: &Path, ranks: usize, change: impl Fn(&mut TrainConfig) + Sync) -> Outcome {
    let outcomes = on_ranks(ranks, |ranks| {
        let mut config = tiny(ranks.size());
        change(&mut config);
        run(&settings(out, config, &ranks)).unwrap()
    });
    let first = outcomes[0].clone();
    for outcome in outcomes {
        assert_eq!(
            (outcome.ending, outcome.step, outcome.total_steps),
            (first.ending, first.step, first.total_steps)
        );
        assert_eq!(outcome.loss, first.loss);
    }
    first
}

fn log(run: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Figures of the clock, and of the last micro-batch of every rank alone.
const CLOCK: [&str; 2] = ["images_per_s", "data_wait"];
const LAST_MICRO_BATCH: [&str; 2] = ["feature_std", "positives_agreement"];

/// The figures of two logs agree, and so do the weights behind them; biases apart that shift what is compared or normalized
/// alike, whose gradient is rounding.
fn assert_agree(run: &Path, reference: &Path, but: &[&str]) {
    assert_agree_within(1e-5, run, reference, but);
}

fn assert_agree_within(share: f64, run: &Path, reference: &Path, but: &[&str]) {
    let (own, expected) = (log(run), log(reference));
    assert_eq!(own.len(), expected.len());
    for (own, expected) in own.iter().zip(&expected) {
        for (key, value) in expected.as_object().unwrap() {
            let compared = !but.contains(&key.as_str()) && !CLOCK.contains(&key.as_str());
            if let Some(expected) = value.as_f64().filter(|_| compared) {
                let found = own[key].as_f64().unwrap();
                assert!((found - expected).abs() <= share * expected.abs(), "{key}: {found} {expected}");
            }
        }
    }
    for part in ["student", "teacher", "centers"] {
        let tensors = |run: &Path| open_at(run).unwrap().unwrap().tensors(part, &Device::Cpu).unwrap();
        let expected = tensors(reference);
        for (name, tensor) in tensors(run) {
            let idle =
                ["attn.k.bias", "attn.qkv.bias", "projector.0.bias", "projector.3.bias", "predictor.0.bias"];
            let last_norm = name == "ca_head.norm.bias" && !expected.contains_key("p_head.mlp.0.bias");
            if last_norm || idle.iter().any(|idle| name.ends_with(idle)) {
                continue;
            }
            let tensor = tensor.to_dtype(DType::F32).unwrap();
            let expected = expected[&name].to_dtype(DType::F32).unwrap();
            let norm = |tensor: &candle_core::Tensor| Ops::reference().grad_norm(tensor).unwrap();
            let distance = norm(&(&tensor - &expected).unwrap()) / norm(&expected).max(1e-6);
            assert!(distance < share, "{part} {name}: {distance}");
        }
    }
}

#[test]
fn one_two_and_four_ranks_learn_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let out = |ranks: usize| folder.path().join(ranks.to_string());
    assert_eq!(train(&out(1), 1, |_| {}).step, 12);
    for ranks in [2, 4] {
        train(&out(ranks), ranks, |_| {});
        assert_agree(&out(ranks), &out(1), &[]);
    }
    // gradients of several micro-batches travel once
    train(&out(3), 2, |config| config.optim.accumulate = 2);
    assert_agree(&out(3), &out(1), &LAST_MICRO_BATCH);
}

/// A contrastive method with small heads; its queues go around once in four steps.
fn contrast(config: &mut TrainConfig, method: ImageMethod, with_patches: bool) {
    let image = &mut config.image;
    (image.method, image.hidden, image.out, image.queue) = (method, 24, 8, 32);
    config.patch.enabled = with_patches;
    config.augment.local_crops = if with_patches { 2 } else { 0 };
    (config.optim.clip, config.optim.clip_by) = (1.0, ClipBy::Global);
    // so that rounding is not magnified: images that differ, steps that do not jump with the sign of a tiny gradient
    (config.model.init, config.optim.eps) = (WeightInit::Xavier, 1e-3);
    if method == ImageMethod::MocoV3 {
        (config.model.positions, config.model.freeze_patch_embed) = (Positions::SinCos, true);
    }
}

#[test]
fn batch_norm_keys_and_queues_are_those_of_all_ranks() {
    let folder = tempfile::tempdir().unwrap();
    for (method, with_patches) in
        [(ImageMethod::MocoV3, false), (ImageMethod::MocoV3, true), (ImageMethod::Moby, true)]
    {
        let out = |ranks: usize| folder.path().join(format!("{}-{with_patches}-{ranks}", method.name()));
        for ranks in [1, 2, 4] {
            train(&out(ranks), ranks, |config| contrast(config, method, with_patches));
        }
        for ranks in [2, 4] {
            assert_agree_within(1e-4, &out(ranks), &out(1), &[]);
        }
        let first = &log(&out(2))[0];
        assert!(first["contrast_accuracy"].is_f64() && first["teacher_entropy_image"].is_null(), "{first}");
        assert_eq!(first["teacher_temp"].is_null(), !with_patches, "{first}");
        // 12 steps of 8 keys into 32 rows
        let state = open_at(&out(4)).unwrap().unwrap().tensors("centers", &Device::Cpu).unwrap();
        let pointer = state.get("queue_pointer").map(|pointer| pointer.to_vec1::<i64>().unwrap());
        assert_eq!(pointer, (method == ImageMethod::Moby).then(|| vec![0]));
    }
}

#[test]
fn batches_that_do_not_suit_the_method_are_refused_before_the_first_step() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |ranks: usize, change: &(dyn Fn(&mut TrainConfig) + Sync)| {
        let out = folder.path().join("run");
        let errors = on_ranks(ranks, |ranks| {
            let mut config = tiny(ranks.size());
            change(&mut config);
            run_error(&settings(&out, config, &ranks))
        });
        assert!(!out.exists());
        errors[0].clone()
    };
    let error = refused(2, &|config| {
        contrast(config, ImageMethod::Moby, true);
        config.image.queue = 36;
    });
    assert!(error.contains("`image.queue`: expected a multiple of 8 (2 ranks of 4), found 36"), "{error}");
    let out = folder.path().join("one");
    let mut config = tiny(1);
    contrast(&mut config, ImageMethod::MocoV3, false);
    config.optim.batch = 1;
    let error = run(&settings(&out, config, &Ranks::single())).unwrap_err().to_string();
    assert!(error.contains("expected 2 or more, found 1"), "{error}");
}

#[test]
fn another_number_of_ranks_goes_on_at_the_same_image() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    train(&run, 4, |config| config.optim.epochs = 8);
    let other = |epochs: usize| {
        move |config: &mut TrainConfig| (config.optim.batch, config.optim.epochs) = (2, epochs)
    };
    // the configuration says eight epochs, so the end is taken away instead
    fs::remove_dir_all(run.join("checkpoints/step-00000024")).unwrap();
    let state = |run: &Path| open_at(run).unwrap().unwrap().state::<RunState>().unwrap();
    let before = state(&run);
    assert_eq!((before.step, before.cursor, before.batch), (20, 6 * 24 + 16, 8));
    let outcome = train(&run, 3, other(8));
    // one batch of 6 after the 16 images of epoch 6, four in epoch 7
    assert_eq!((outcome.step, outcome.total_steps), (20 + 1 + 4, 25));
    let after = state(&run);
    assert_eq!((after.cursor, after.batch, after.epoch), (8 * 24, 6, 8.0));
    let lines = log(&run);
    let steps: Vec<u64> = lines.iter().map(|line| line["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, (1..=25).collect::<Vec<_>>());
    let mut config = tiny(4);
    config.optim.epochs = 8;
    let end = Schedules::new(&config, 24, 3).at(31);
    assert_eq!(lines[24]["lr"].as_f64(), Some(end.lr), "the schedules end with the images");
}

#[test]
fn the_same_total_may_be_shared_otherwise_another_may_not() {
    let folder = tempfile::tempdir().unwrap();
    let (run, whole) = (folder.path().join("run"), folder.path().join("whole"));
    train(&whole, 1, |_| {});
    train(&run, 1, |config| config.checkpoint.keep = 9);
    for step in ["10", "12"] {
        fs::remove_dir_all(run.join(format!("checkpoints/step-000000{step}"))).unwrap();
    }
    train(&run, 4, |_| {});
    assert_agree(&run, &whole, &[]);
    let refused = on_ranks(2, |ranks| {
        let mut config = tiny(2);
        config.optim.batch = 3;
        run_error(&settings(&run, config, &ranks))
    });
    assert!(
        refused[0].contains("`optim.batch` was 2 (4 ranks, 8 images a step), is 3 (2 ranks, 6"),
        "{refused:?}"
    );
    assert!(refused[1].contains("rank 0 stopped the job"), "{refused:?}");
}

fn run_error(settings: &RunSettings) -> String {
    let error = run(settings).unwrap_err();
    assert!(settings.ranks.fail_together(), "{error}");
    error.to_string()
}

#[test]
fn one_interrupted_rank_ends_all_at_the_same_step() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let outcomes = on_ranks(3, |ranks| {
        let mut settings = settings(&out, TrainConfig { seed: 1, ..tiny(4) }, &ranks);
        settings.config.optim.epochs = 10_000;
        settings.interrupted = Arc::new(AtomicUsize::new(0));
        let interrupted = Arc::clone(&settings.interrupted);
        let watched = out.join("checkpoints/latest");
        let third = ranks.rank() == 2;
        std::thread::spawn(move || {
            while third && !watched.exists() {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            interrupted.fetch_add(usize::from(third), Ordering::SeqCst);
        });
        run(&settings).unwrap()
    });
    for outcome in &outcomes {
        assert_eq!((outcome.ending, outcome.step), (Ending::Interrupted, outcomes[0].step));
    }
    assert_eq!(open_at(&out).unwrap().unwrap().step(), outcomes[0].step);
}

#[test]
fn numbers_that_are_not_finite_stop_all_ranks_alike() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let outcome = train(&run, 2, |config| {
        (config.optim.lr_per_256, config.optim.warmup_epochs) = (1e30, 0.0);
        (config.guard.max_skipped, config.guard.max_rollbacks) = (1, 1);
        config.checkpoint.every_steps = 1;
    });
    assert_eq!(outcome.ending, Ending::Guard);
    let text = fs::read_to_string(run.join(NON_FINITE)).unwrap();
    assert!(text.lines().all(|line| line.split('\t').count() == 4 + 8), "the images of all ranks: {text}");
    assert!(text.lines().count() >= 4, "skipped, rolled back, skipped again: {text}");
}

#[test]
fn a_rank_that_learned_something_else_is_noticed_before_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let errors = on_ranks(3, |ranks| {
        let mut config = tiny(4);
        if ranks.rank() == 1 {
            config.optim.weight_decay = 0.5;
        }
        run(&settings(&out, config, &ranks)).unwrap_err()
    });
    for error in errors {
        assert!(matches!(&error, TrainError::RanksDiffer { step: 5, ranks } if ranks == &[1]), "{error}");
    }
    assert!(open_at(&out).unwrap().is_none());
}

#[test]
fn what_stops_the_first_rank_stops_all_and_nothing_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let errors = on_ranks(2, |ranks| {
        let mut config = tiny(1);
        config.optim.batch = 13;
        let error = run(&settings(&out, config, &ranks)).unwrap_err();
        (ranks.fail_together(), error)
    });
    assert!(errors.iter().all(|(together, _)| *together));
    assert!(errors[0].1.to_string().contains("one batch of 26 (2 ranks of 13)"), "{}", errors[0].1);
    assert!(matches!(errors[1].1, TrainError::Distributed(DistributedError::OtherRank { rank: 0 })));
    assert!(!out.exists());
}

#[test]
fn bad_images_are_found_by_all_and_listed_once() {
    let folder = tempfile::tempdir().unwrap();
    let photos = folder.path().join("photos");
    fs::create_dir(&photos).unwrap();
    for number in 0..12u8 {
        let picture =
            image::RgbImage::from_fn(40, 40, |x, y| image::Rgb([(x * 6) as u8, (y * 6) as u8, number * 20]));
        picture.save(photos.join(format!("{number:02}.png"))).unwrap();
    }
    for bad in ["03.png", "10.png"] {
        fs::write(photos.join(bad), b"no picture").unwrap();
    }
    let images = vec![photos.display().to_string()];
    let out = |ranks: usize| folder.path().join(ranks.to_string());
    for ranks in [1, 4] {
        train(&out(ranks), ranks, |config| {
            config.data.images = images.clone();
            config.data.max_bad = 0.5;
        });
        let text = fs::read_to_string(out(ranks).join(QUARANTINE)).unwrap();
        assert_eq!(text.lines().count(), 2, "{text}");
    }
    assert_agree(&out(4), &out(1), &[]);
    let errors = on_ranks(4, |ranks| {
        let mut config = tiny(4);
        config.data.images = images.clone();
        run(&settings(&folder.path().join("strict"), config, &ranks)).unwrap_err().to_string()
    });
    assert!(errors[0].contains("are bad, more than `data.max_bad`"), "{errors:?}");
    assert!(errors[1..].iter().all(|error| error.contains("rank 0 stopped the job")), "{errors:?}");
}
