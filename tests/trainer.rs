//! One step of the trainer: every tensor gets a gradient, accumulation equals one batch, switches do what they say.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use pass_host::config::{
    Aggregation, AllPatches, Arch, Border, MatchingSource, OpsKind, PatchCrops, TrainConfig, Window,
};
use pass_host::objective::forward::{CropGroup, Crops};
use pass_host::train::trainer::{Schedule, Trainer};
use pass_tests::{all_ops, device};

fn ok<T>(result: candle_core::Result<T>) -> T {
    result.unwrap_or_else(|error| panic!("{error}"))
}

fn tiny() -> TrainConfig {
    let mut config = TrainConfig::default();
    config.model.arch = Arch::Custom;
    config.model.dim = 24;
    config.model.depth = 3;
    config.model.heads = 3;
    config.model.patch_size = 4;
    config.model.drop_path = 0.3;
    config.augment.global_size = 20;
    config.augment.local_size = 12;
    config.head.hidden = 32;
    config.head.bottleneck = 12;
    config.head.class_prototypes = 20;
    config.head.patch_prototypes = 16;
    config.optim.batch = 4;
    config
}

const SCHEDULE: Schedule = Schedule {
    lr: 1e-3,
    weight_decay: 0.04,
    momentum: 0.9,
    next_momentum: 0.9,
    teacher_temp: 0.05,
    train_last_layer: true,
};

fn trainer(config: &TrainConfig) -> Trainer {
    let student = ok(Trainer::fresh_student(config, device()));
    ok(Trainer::new(config, student, device()))
}

/// Fixed pseudo-random crops of the images `range`; the same image has the same crops in any cut.
fn crops(config: &TrainConfig, range: std::ops::Range<usize>) -> Crops {
    let applications = 4; // two blocks with a positive rate
    let group = |first: usize, count: usize, side: usize| {
        let mut pixels = Vec::new();
        let mut keys = Vec::new();
        for crop in first..first + count {
            for image in range.clone() {
                keys.push(crop * 100 + image);
                let key = (crop * 100 + image) as f32;
                pixels.extend(
                    (0..3 * side * side).map(|i| ((i as f32 * 0.37 + key * 1.7).sin() * 43.7).fract()),
                );
            }
        }
        let images = ok(Tensor::from_vec(pixels, (keys.len(), 3, side, side), device()));
        let row = |application: usize| {
            keys.iter().map(move |key| ((key * 7 + application * 13) % 10) as f64 / 10.0)
        };
        let drop_path = (config.model.drop_path > 0.0)
            .then(|| (0..applications).map(|application| row(application).collect()).collect());
        CropGroup { images, crops: count, drop_path }
    };
    let locals = config.augment.local_crops;
    Crops {
        batch: range.len(),
        global: group(0, 2, config.augment.global_size),
        local: (locals > 0).then(|| group(2, locals, config.augment.local_size)),
    }
}

/// Loss and all gradients of one batch.
fn gradients(config: &TrainConfig) -> (f64, BTreeMap<String, Vec<f32>>) {
    let trainer = trainer(config);
    let losses = ok(trainer.losses(&crops(config, 0..4), 0.05));
    let gradients = ok(trainer.gradients(&losses.total));
    let flat = |tensor: &Tensor| ok(tensor.flatten_all().and_then(|x| x.to_vec1::<f32>()));
    let named = gradients.iter().map(|(name, gradient)| (name.clone(), flat(gradient))).collect();
    (f64::from(ok(losses.total.to_scalar::<f32>())), named)
}

#[test]
fn every_trained_tensor_has_a_gradient_that_is_not_zero() {
    for ops in all_ops() {
        for norm_last_layer in [true, false] {
            let mut config = TrainConfig { ops, ..tiny() };
            config.head.norm_last_layer = norm_last_layer;
            let trainer = trainer(&config);
            let losses = ok(trainer.losses(&crops(&config, 0..4), 0.05));
            let gradients = ok(trainer.gradients(&losses.total));
            for (name, parameter) in trainer.student.parameters.iter() {
                let frozen = name.ends_with("weight_g") && norm_last_layer;
                assert_eq!(parameter.trainable, !frozen, "{name}");
                if !frozen {
                    let norm = ok(trainer.optimizer.norms(&gradients))[name];
                    // key biases shift every score alike: their gradient is rounding noise
                    let floor = if name.ends_with("attn.k.bias") { -1.0 } else { 1e-9 };
                    assert!(norm.is_finite() && norm > floor, "{name}: {norm}");
                }
            }
        }
    }
}

#[test]
fn fused_and_composed_steps_agree() {
    let (loss, composed) = gradients(&TrainConfig { ops: OpsKind::Reference, ..tiny() });
    for ops in all_ops() {
        let (fused_loss, fused) = gradients(&TrainConfig { ops, ..tiny() });
        assert!((fused_loss - loss).abs() < 1e-5, "{ops:?}: {fused_loss} {loss}");
        for (name, gradient) in &composed {
            let largest = gradient.iter().fold(1e-3f32, |max, value| max.max(value.abs()));
            for (a, b) in fused[name].iter().zip(gradient) {
                assert!((a - b).abs() < 2e-4 * largest, "{ops:?} {name}: {a} {b}");
            }
        }
    }
}

/// Cosine of two gradients; 1 if both are nothing but noise.
fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let lengths = (dot(a, a) * dot(b, b)).sqrt();
    if lengths < 1e-12 { 1.0 } else { dot(a, b) / lengths }
}

#[test]
fn half_precision_stays_near_single() {
    let (loss, exact) = gradients(&tiny());
    for ops in all_ops() {
        let config = TrainConfig { ops, ..tiny() };
        let trainer = trainer(&config);
        let mut batch = crops(&config, 0..4);
        for group in std::iter::once(&mut batch.global).chain(&mut batch.local) {
            group.images = ok(group.images.to_dtype(DType::BF16));
        }
        let losses = ok(trainer.losses(&batch, 0.05));
        assert_eq!((losses.total.dtype(), losses.monitor.features.dtype()), (DType::F32, DType::BF16));
        let half_loss = f64::from(ok(losses.total.to_scalar::<f32>()));
        assert!((half_loss - loss).abs() < 0.01 * loss, "{ops:?}: {half_loss} {loss}");
        assert_eq!(losses.seen["class"].dtype(), DType::F32);
        for (name, gradient) in ok(trainer.gradients(&losses.total)) {
            assert_eq!(gradient.dtype(), DType::F32, "{name}");
            if name.ends_with("attn.k.bias") {
                continue; // exactly zero but for rounding
            }
            let found = ok(gradient.flatten_all().and_then(|x| x.to_vec1::<f32>()));
            let cosine = cosine(&found, &exact[&name]);
            assert!(cosine > 0.98, "{ops:?} {name}: cosine {cosine}");
        }
    }
}

#[test]
fn steps_in_half_precision_learn_and_keep_single_precision_weights() {
    for ops in all_ops() {
        let mut config = TrainConfig { ops, ..tiny() };
        config.model.drop_path = 0.0;
        let (mut single, mut half) = (trainer(&config), trainer(&config));
        let mut last = [0.0; 2];
        for _ in 0..4 {
            let mut batch = crops(&config, 0..4);
            last[0] = ok(single.step(&[crops(&config, 0..4)], &SCHEDULE)).expect("finite").loss;
            for group in std::iter::once(&mut batch.global).chain(&mut batch.local) {
                group.images = ok(group.images.to_dtype(DType::BF16));
            }
            last[1] = ok(half.step(&[batch], &SCHEDULE)).expect("finite").loss;
        }
        assert!((last[0] - last[1]).abs() < 0.02 * last[0], "{ops:?}: {last:?}");
        for part in half.to_parts() {
            assert!(part.iter().all(|(_, tensor)| tensor.dtype() != DType::BF16), "checkpoints hold no bf16");
        }
    }
}

#[test]
fn recomputed_blocks_give_the_same_gradients() {
    for ops in [OpsKind::Fused, OpsKind::Reference] {
        let of = |recompute| gradients(&TrainConfig { ops, recompute, ..tiny() });
        let ((loss, kept), (loss_again, again)) = (of(false), of(true));
        if ops == OpsKind::Fused {
            assert!(loss == loss_again && kept == again, "the fused operations change bits");
            continue;
        }
        assert!((loss - loss_again).abs() < 1e-6);
        for (name, gradient) in &kept {
            let largest = gradient.iter().fold(0.0f32, |a, b| a.max(b.abs()));
            for (a, b) in gradient.iter().zip(&again[name]) {
                assert!((a - b).abs() <= 1e-5 * (largest + 1e-4), "{name}: {a} {b}");
            }
        }
    }
}

#[test]
fn gradients_agree_with_finite_differences() {
    let config = TrainConfig { ops: OpsKind::Fused, ..tiny() };
    let (_, analytic) = gradients(&config);
    let loss_at = |name: &str, index: usize, shift: f32| {
        let trainer = trainer(&config);
        let parameter = ok(trainer.student.parameters.get(name));
        let mut values = ok(parameter.flatten_all().and_then(|x| x.to_vec1::<f32>()));
        values[index] += shift;
        let changed = ok(Tensor::from_vec(values, parameter.shape(), device()));
        let named = trainer.student.parameters.to_tensors().into_iter();
        let named =
            named.map(|(own, tensor)| if own == name { (own, changed.clone()) } else { (own, tensor) });
        let architecture = pass_host::model::Architecture::from_config(&config);
        let student = pass_host::model::parameters::Parameters::from_tensors(
            &architecture,
            pass_host::model::parameters::Role::Student,
            &named.collect(),
            device(),
        )
        .unwrap_or_else(|error| panic!("{error}"));
        let teacher = ok(trainer.student.parameters.to_teacher());
        let trainer =
            ok(Trainer::assemble(&config, &architecture, student, teacher, trainer.state, trainer.optimizer));
        f64::from(ok(ok(trainer.losses(&crops(&config, 0..4), 0.05)).total.to_scalar::<f32>()))
    };
    for name in [
        "backbone.pos_embed",
        "backbone.patch_embed.proj.weight",
        "backbone.blocks.1.attn.qkv.weight",
        "ca_head.cls_token",
        "ca_head.cls_blocks.0.attn.v.weight",
        "ca_head.norm.weight",
        "c_head.mlp.2.weight",
        "p_head.last_layer.weight_v",
    ] {
        let gradient = &analytic[name];
        let (index, largest) = gradient
            .iter()
            .enumerate()
            .max_by(|a, b| a.1.abs().total_cmp(&b.1.abs()))
            .map(|(index, value)| (index, f64::from(*value)))
            .expect("values");
        let step = 4e-3;
        let difference = (loss_at(name, index, step) - loss_at(name, index, -step)) / (2.0 * f64::from(step));
        assert!(
            (difference - largest).abs() < 0.03 * largest.abs() + 2e-4,
            "{name}[{index}]: finite difference {difference}, gradient {largest}"
        );
    }
}

#[test]
fn accumulated_micro_batches_equal_one_batch() {
    let config = tiny();
    let (mut whole, mut parts) = (trainer(&config), trainer(&config));
    for _ in 0..3 {
        let one = ok(whole.step(&[crops(&config, 0..4)], &SCHEDULE)).expect("finite");
        let two = ok(parts.step(&[crops(&config, 0..2), crops(&config, 2..4)], &SCHEDULE)).expect("finite");
        assert!((one.loss - two.loss).abs() < 1e-4 * one.loss, "{} {}", one.loss, two.loss);
        assert!((one.grad_norm - two.grad_norm).abs() < 1e-3 * one.grad_norm);
    }
    let centers = |trainer: &Trainer| ok(trainer.state["class"].to_vec1::<f32>());
    for (a, b) in centers(&whole).iter().zip(centers(&parts)) {
        assert!((a - b).abs() < 1e-4, "{a} {b}");
    }
}

#[test]
fn every_switch_of_the_method_trains() {
    let mut cases: Vec<(&str, TrainConfig)> = Vec::new();
    let mut case = |name, change: &dyn Fn(&mut TrainConfig)| {
        let mut config = tiny();
        change(&mut config);
        cases.push((name, config));
    };
    case("clip", &|c| c.patch.border = Border::Clip);
    case("window 5", &|c| c.patch.window = Window::Side(5));
    case("window all", &|c| c.patch.window = Window::All(AllPatches::All));
    case("k 8", &|c| c.patch.k = 8);
    case("mean", &|c| c.patch.aggregation = Aggregation::Mean);
    case("student matching", &|c| c.patch.matching = MatchingSource::Student);
    case("global patch crops", &|c| c.patch.crops = PatchCrops::Global);
    case("no local crops", &|c| c.augment.local_crops = 0);
    case("no drop path", &|c| c.model.drop_path = 0.0);
    case("plain DINO", &|c| c.patch.enabled = false);
    let mut losses = BTreeMap::new();
    for (name, config) in cases {
        let mut trainer = trainer(&config);
        // a teacher that stands still, once the centers have found their place, is a fixed target
        let still = Schedule { momentum: 1.0, ..SCHEDULE };
        let mut step = || ok(trainer.step(&[crops(&config, 0..4)], &still)).expect("finite");
        let first = step();
        let settled = (0..20).map(|_| step().loss).last().expect("twenty steps");
        let last = (0..40).map(|_| step().loss).last().expect("forty steps");
        assert_eq!(first.loss_patch.is_some(), config.patch.enabled, "{name}");
        assert!(last < settled, "{name}: {last} is not below {settled}");
        losses.insert(name, first.loss);
    }
    assert_ne!(losses["clip"], losses["k 8"], "the switches change the objective");
    assert_ne!(losses["mean"], losses["window 5"]);
    assert_ne!(losses["global patch crops"], losses["student matching"]);
}

#[test]
fn non_finite_input_changes_nothing() {
    let config = tiny();
    let mut trainer = trainer(&config);
    let before = trainer.to_parts().map(|part| {
        part.into_iter()
            .map(|(_, t)| ok(t.flatten_all().and_then(|t| t.to_dtype(DType::F32)?.to_vec1::<f32>())))
            .collect::<Vec<_>>()
    });
    let mut batch = crops(&config, 0..4);
    batch.global.images = ok(&batch.global.images * f64::NAN);
    let fault = ok(trainer.step(&[batch], &SCHEDULE)).err().expect("a fault");
    assert_eq!(fault.term, "class loss");
    let after = trainer.to_parts().map(|part| {
        part.into_iter()
            .map(|(_, t)| ok(t.flatten_all().and_then(|t| t.to_dtype(DType::F32)?.to_vec1::<f32>())))
            .collect::<Vec<_>>()
    });
    assert_eq!(before, after);
}
