//! MoCo-v3 and MoBY against reference numbers from their definitions (`fixtures/methods`), and what every method promises:
//! which tensors learn, which stand still, what bits a step leaves.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use candle_core::{Device, Tensor};
use pass_host::config::{
    Arch, ClipBy, ImageMethod, OpsKind, PatchCrops, Positions, TrainConfig, WeightInit, presets,
};
use pass_host::model::Architecture;
use pass_host::model::parameters::{Parameters, Role};
use pass_host::model::pos_embed::sin_cos_positions;
use pass_host::objective::forward::{CropGroup, Crops};
use pass_host::objective::moby::POINTER;
use pass_host::optimizer::Optimizer;
use pass_host::train::trainer::{Schedule, Trainer};
use pass_tests::{all_ops, device};
use serde_json::Value;

fn ok<T>(result: candle_core::Result<T>) -> T {
    result.unwrap_or_else(|error| panic!("{error}"))
}

fn values(tensor: &Tensor) -> Vec<f32> {
    ok(tensor.flatten_all().and_then(|flat| flat.to_vec1::<f32>()))
}

fn length(values: impl IntoIterator<Item = f32>) -> f64 {
    values.into_iter().map(|value| f64::from(value).powi(2)).sum::<f64>().sqrt()
}

/// One case of `fixtures/methods`.
struct Case {
    name: String,
    about: Value,
    sizes: Value,
    tensors: HashMap<String, Tensor>,
}

impl Case {
    fn all() -> Vec<Self> {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fixtures/methods");
        let text = std::fs::read_to_string(folder.join("manifest.json")).expect("the manifest");
        let manifest: Value = serde_json::from_str(&text).expect("JSON");
        let cases = manifest["cases"].as_object().expect("cases");
        let open = |(name, about): (&String, &Value)| {
            let path = folder.join(format!("{name}.safetensors"));
            let tensors = ok(candle_core::safetensors::load(path, device()));
            assert_eq!(tensors.len() as u64, about["tensors"].as_u64().expect("a count"), "{name}");
            Self { name: name.clone(), about: about.clone(), sizes: manifest["sizes"].clone(), tensors }
        };
        cases.iter().map(open).collect()
    }

    fn whole(&self, key: &str) -> usize {
        self.sizes[key].as_u64().unwrap_or_else(|| panic!("{key}")) as usize
    }

    fn number(&self, key: &str) -> f64 {
        self.sizes[key].as_f64().unwrap_or_else(|| panic!("{key}"))
    }

    fn own_number(&self, key: &str) -> f64 {
        self.about[key].as_f64().unwrap_or_else(|| panic!("{key}"))
    }

    fn has_patches(&self) -> bool {
        self.about["patch"].as_bool().expect("a flag")
    }

    fn config(&self, ops: OpsKind) -> TrainConfig {
        let mut config = TrainConfig { ops, ..TrainConfig::default() };
        let model = &mut config.model;
        (model.arch, model.dim, model.depth) = (Arch::Custom, self.whole("dim"), self.whole("depth"));
        model.heads = self.about["heads"].as_u64().expect("heads") as usize;
        (model.patch_size, model.drop_path) = (self.whole("patch_size"), self.own_number("drop_path"));
        let augment = &mut config.augment;
        (augment.global_size, augment.local_size) = (self.whole("global_size"), self.whole("local_size"));
        augment.local_crops = if self.has_patches() { 2 } else { 0 };
        let head = &mut config.head;
        (head.hidden, head.bottleneck) = (self.whole("head_hidden"), self.whole("bottleneck"));
        head.patch_prototypes = self.whole("prototypes");
        let image = &mut config.image;
        (image.hidden, image.out, image.queue) =
            (self.whole("hidden"), self.whole("out"), self.whole("queue"));
        (image.temperature, image.student_temp) = (self.number("temperature"), self.number("student_temp"));
        image.center_momentum = self.number("center_momentum");
        (config.patch.enabled, config.patch.k) = (self.has_patches(), self.whole("k"));
        config.patch.weight = self.number("patch_weight");
        (config.optim.batch, config.optim.clip) = (self.whole("batch"), self.own_number("clip"));
        config.optim.eps = self.number("eps");
        match self.about["method"].as_str() {
            Some("moco_v3") => {
                config.image.method = ImageMethod::MocoV3;
                config.model.positions = Positions::SinCos;
                config.model.freeze_patch_embed = true;
            }
            Some("moby") => {
                config.image.method = ImageMethod::Moby;
                config.optim.clip_by = ClipBy::Global;
            }
            other => panic!("an unknown method: {other:?}"),
        }
        assert_eq!(config.violations(), [], "{}", self.name);
        config
    }

    /// The tensors `{prefix}.…` by what follows.
    fn named(&self, prefix: &str) -> HashMap<String, Tensor> {
        let strip = |(name, tensor): (&String, &Tensor)| {
            Some((name.strip_prefix(prefix)?.strip_prefix('.')?.to_owned(), tensor.clone()))
        };
        self.tensors.iter().filter_map(strip).collect()
    }

    fn trainer(&self, config: &TrainConfig) -> Trainer {
        let architecture = Architecture::from_config(config);
        let parameters = |role, prefix| {
            Parameters::from_tensors(&architecture, role, &self.named(prefix), device())
                .unwrap_or_else(|error| panic!("{}: {error}", self.name))
        };
        let (student, teacher) = (parameters(Role::Student, "student"), parameters(Role::Teacher, "teacher"));
        let optimizer = ok(Optimizer::new(&config.optim, &student, config.ops.into()));
        let mut state: BTreeMap<String, Tensor> = self.named("state").into_iter().collect();
        if config.image.method == ImageMethod::Moby {
            state.insert(POINTER.into(), ok(Tensor::new(&[0i64], &Device::Cpu)));
        }
        ok(Trainer::assemble(config, &architecture, student, teacher, state, optimizer))
    }

    fn crops(&self, step: usize) -> Crops {
        let draws = self.tensors.get(&format!("step{step}.draws")).map(|draws| {
            let rows = ok(draws.to_vec2::<f32>());
            rows.into_iter().map(|row| row.into_iter().map(f64::from).collect()).collect()
        });
        let group = |kind: &str, drop_path| {
            let images = self.tensors.get(&format!("step{step}.{kind}"))?.clone();
            Some(CropGroup { images, crops: 2, drop_path })
        };
        Crops {
            batch: self.whole("batch"),
            global: group("global", draws).expect("global crops"),
            local: group("local", None),
        }
    }

    fn schedule(&self, step: usize) -> Schedule {
        let of = |key: &str, step: usize| self.sizes[key][step].as_f64().expect("a number");
        Schedule {
            lr: of("lr", step),
            weight_decay: self.own_number("decay"),
            momentum: of("momentum", step),
            next_momentum: of("momentum", step + 1),
            teacher_temp: self.number("teacher_temp"),
            train_last_layer: true,
        }
    }

    /// The stored tensor is found, within a share of its length.
    #[track_caller]
    fn check(&self, name: &str, found: &Tensor, share: f64) {
        let expected = self.tensors.get(name).unwrap_or_else(|| panic!("no `{name}`"));
        assert_eq!(found.dims(), expected.dims(), "{}: {name}", self.name);
        let (found, expected) = (values(found), values(expected));
        let distance = length(found.iter().zip(&expected).map(|(a, b)| a - b));
        let allowed = share * length(expected.iter().copied()) + 1e-7;
        assert!(distance <= allowed, "{}: {name}: off by {distance}, allowed {allowed}", self.name);
    }
}

/// Four batch normalizations over four rows magnify the rounding of single precision.
const GRADIENT_SHARE: f64 = 3e-4;

/// Biases that shift what is normalized or compared alike: their gradient is rounding, which AdamW magnifies. The last norm's
/// comes before the batch normalization of the projector, and before the patch head if there is one.
fn is_idle(name: &str, with_patches: bool) -> bool {
    let before_norm = ["projector.0.bias", "projector.3.bias", "predictor.0.bias"];
    let last_norm = name == "ca_head.norm.bias" && !with_patches;
    name.ends_with("attn.k.bias")
        || before_norm.contains(&name)
        || last_norm
        || name.ends_with("attn.qkv.bias")
}

#[test]
fn losses_gradients_and_three_steps_are_those_of_the_definitions() {
    for case in Case::all() {
        for ops in all_ops() {
            let config = case.config(ops);
            let mut trainer = case.trainer(&config);
            if config.model.positions == Positions::SinCos {
                let (side, dim) = (case.whole("global_size") / case.whole("patch_size"), case.whole("dim"));
                let positions = sin_cos_positions(side, dim);
                let positions = ok(Tensor::from_vec(positions, (1, side * side, dim), device()));
                case.check("student.backbone.pos_embed", &positions, 1e-6);
            }
            let losses = ok(trainer.losses(&case.crops(0), case.number("teacher_temp")));
            let gradients = ok(trainer.gradients(&losses.total));
            let expected = case.named("grad");
            assert_eq!(gradients.len(), expected.len(), "{}", case.name);
            for (name, gradient) in &gradients {
                let idle = is_idle(name, case.has_patches()) && !name.ends_with("qkv.bias");
                match idle {
                    true => assert!(length(values(gradient)) < 1e-5, "{}: {name}", case.name),
                    false => case.check(&format!("grad.{name}"), gradient, GRADIENT_SHARE),
                }
            }
            for step in 0..case.whole("steps") {
                let report = ok(trainer.step(&[case.crops(step)], &case.schedule(step)));
                let report = report.unwrap_or_else(|fault| panic!("{}: {fault:?}", case.name));
                let scalar = |value: f64| ok(Tensor::new(value as f32, device()));
                let check = |what: &str, value: f64| {
                    case.check(&format!("step{step}.{what}"), &scalar(value), 3e-4);
                };
                check("total", report.loss);
                check("image", report.loss_image);
                check("accuracy", report.contrast_accuracy.expect("a contrastive method"));
                assert_eq!((report.loss_patch.is_some(), report.image_stats), (case.has_patches(), None));
                report.loss_patch.into_iter().for_each(|loss| check("patch", loss));
            }
            for (who, parameters) in
                [("student", &trainer.student.parameters), ("teacher", &trainer.teacher.parameters)]
            {
                let start = case.named(who);
                for (name, expected) in case.named(&format!("after.{who}")) {
                    if is_idle(&name, case.has_patches()) {
                        continue;
                    }
                    let (found, expected) = (values(&ok(parameters.get(&name))), values(&expected));
                    let moved = length(expected.iter().zip(values(&start[&name])).map(|(a, b)| a - b));
                    let distance = length(found.iter().zip(&expected).map(|(a, b)| a - b));
                    let allowed = 0.02 * moved + 1e-6;
                    assert!(distance < allowed, "{} {who} {name}: {distance}, moved {moved}", case.name);
                }
            }
            for (name, expected) in case.named("after.state") {
                case.check(&format!("after.state.{name}"), &trainer.state[&name], 1e-3);
                assert_ne!(values(&expected), values(&case.tensors[&format!("state.{name}")]), "{name}");
            }
            let pointer = trainer.state.get(POINTER).map(|pointer| ok(pointer.to_vec1::<i64>()));
            let expected = case.about["pointer"].as_i64().expect("a pointer");
            assert_eq!(pointer.unwrap_or(vec![0]), [expected], "{}", case.name);
        }
    }
}

/// The presets of the methods with small sizes.
fn small(preset: &str, ops: OpsKind) -> TrainConfig {
    let mut config = presets::find(preset).expect("a preset").config();
    let heads = config.model.heads / 3;
    (config.model.arch, config.model.dim, config.model.depth, config.model.heads) =
        (Arch::Custom, 16, 3, heads);
    config.model.patch_size = 4;
    (config.augment.global_size, config.augment.local_size) = (16, 12);
    (config.head.hidden, config.head.bottleneck) = (20, 8);
    (config.head.class_prototypes, config.head.patch_prototypes) = (20, 16);
    (config.image.hidden, config.image.out, config.image.queue) = (24, 8, 16);
    config.optim.batch = 4;
    assert_eq!(config.violations(), [], "{preset}");
    TrainConfig { ops, ..config }
}

const PRESETS: [&str; 4] = ["moco-v3-vit-s16", "moco-v3-pass-vit-s16", "moby-vit-s16", "moby-pass-vit-s16"];

fn crops(config: &TrainConfig, trainer: &Trainer, seed: usize) -> Crops {
    let group = |crops: usize, side: usize| {
        let count = 4 * crops * 3 * side * side;
        let pixel = |i: usize| ((i as f32 * 0.37 + seed as f32 * 1.7).sin() * 43.7).fract();
        let pixels: Vec<f32> = (0..count).map(pixel).collect();
        let images = ok(Tensor::from_vec(pixels, (4 * crops, 3, side, side), device()));
        let draw = |i: usize| ((i * 7 + seed * 3) % 10) as f64 / 10.0;
        let applications = trainer.student.backbone.drop_path_applications();
        let rows = |row: usize| (0..4 * crops).map(|image| draw(13 * row + image)).collect();
        let drop_path = (applications > 0).then(|| (0..applications).map(rows).collect());
        CropGroup { images, crops, drop_path }
    };
    let locals = config.augment.local_crops;
    let local = (locals > 0).then(|| group(locals, config.augment.local_size));
    Crops { batch: 4, global: group(2, config.augment.global_size), local }
}

const SCHEDULE: Schedule = Schedule {
    lr: 1e-3,
    weight_decay: 0.1,
    momentum: 0.9,
    next_momentum: 0.9,
    teacher_temp: 0.05,
    train_last_layer: true,
};

fn fresh(config: &TrainConfig) -> Trainer {
    ok(Trainer::new(config, ok(Trainer::fresh_student(config, device())), device()))
}

fn bits(parameters: &Parameters) -> BTreeMap<String, Vec<u32>> {
    let named = parameters.to_tensors().into_iter();
    named.map(|(name, tensor)| (name, values(&tensor).into_iter().map(f32::to_bits).collect())).collect()
}

#[test]
fn gradients_reach_every_trained_tensor_and_nothing_else_moves() {
    for preset in PRESETS {
        for ops in all_ops() {
            let config = small(preset, ops);
            let mut trainer = fresh(&config);
            let frozen = |name: &str| {
                let embedding = name == "backbone.pos_embed" || name.starts_with("backbone.patch_embed.");
                name.ends_with("weight_g") || config.model.freeze_patch_embed && embedding
            };
            let batch = crops(&config, &trainer, 0);
            let losses = ok(trainer.losses(&batch, 0.05));
            let gradients = ok(trainer.gradients(&losses.total));
            for (name, parameter) in trainer.student.parameters.iter() {
                assert_eq!(parameter.trainable, !frozen(name), "{preset}: {name}");
                assert_eq!(parameter.student_only, name.starts_with("predictor."), "{preset}: {name}");
                let norm = gradients.get(name).map(|gradient| length(values(gradient)));
                match norm {
                    None => assert!(frozen(name), "{preset}: no gradient reached {name}"),
                    Some(norm) => {
                        let floor = if is_idle(name, config.patch.enabled) { -1.0 } else { 1e-9 };
                        assert!(
                            norm.is_finite() && norm > floor && !frozen(name),
                            "{preset}: {name}: {norm}"
                        );
                    }
                }
            }
            let networks =
                |trainer: &Trainer| (bits(&trainer.student.parameters), bits(&trainer.teacher.parameters));
            let before = networks(&trainer);
            assert!(before.1.keys().all(|name| !name.starts_with("predictor.")), "{preset}");
            assert!(
                before.1.iter().all(|(name, bits)| before.0[name] == *bits),
                "the teacher starts as a copy"
            );
            for seed in 0..3 {
                let batch = crops(&config, &trainer, seed);
                let step = Schedule { momentum: f64::NAN, ..SCHEDULE };
                ok(trainer.step(&[batch], &step)).unwrap_or_else(|fault| panic!("{preset}: {fault:?}"));
            }
            let after = networks(&trainer);
            for (who, before, after) in [("student", &before.0, &after.0), ("teacher", &before.1, &after.1)] {
                for (name, bits) in before {
                    let still = frozen(name) && name.starts_with("backbone.");
                    if still || !frozen(name) {
                        assert_eq!(after[name] == *bits, still, "{preset}: {who} {name}");
                    }
                }
            }
        }
    }
}

#[test]
fn fused_and_composed_operations_agree() {
    for preset in PRESETS {
        let gradients = |ops| {
            let config = small(preset, ops);
            let trainer = fresh(&config);
            let losses = ok(trainer.losses(&crops(&config, &trainer, 0), 0.05));
            let gradients = ok(trainer.gradients(&losses.total)).into_iter();
            gradients.map(|(name, gradient)| (name, values(&gradient))).collect::<BTreeMap<_, _>>()
        };
        let composed = gradients(OpsKind::Reference);
        let with_patches = small(preset, OpsKind::Reference).patch.enabled;
        for ops in all_ops() {
            let found = gradients(ops);
            assert!(found.keys().eq(composed.keys()));
            for (name, expected) in composed.iter().filter(|(name, _)| !is_idle(name, with_patches)) {
                let distance = length(found[name].iter().zip(expected).map(|(a, b)| a - b));
                let size = length(expected.iter().copied());
                assert!(distance < 1e-3 * size + 1e-6, "{preset} {ops:?} {name}: {distance} of {size}");
            }
        }
    }
}

#[test]
fn steps_lower_the_loss() {
    for preset in PRESETS {
        let config = small(preset, OpsKind::Fused);
        let mut trainer = fresh(&config);
        let mut step = |seed: usize| {
            let batch = crops(&config, &trainer, seed % 3);
            ok(trainer.step(&[batch], &SCHEDULE)).unwrap_or_else(|fault| panic!("{fault:?}")).loss
        };
        let first: f64 = (0..6).map(&mut step).sum();
        let last: f64 = (6..66).map(&mut step).skip(54).sum();
        assert!(last < first, "{preset}: {last} is not below {first}");
    }
}

#[test]
fn what_is_not_finite_changes_nothing() {
    for preset in PRESETS {
        let config = small(preset, OpsKind::Fused);
        let mut trainer = fresh(&config);
        let before = ok(trainer.checksum());
        let mut batch = crops(&config, &trainer, 0);
        batch.global.images = ok(&batch.global.images * f64::NAN);
        let fault = ok(trainer.step(&[batch], &SCHEDULE)).err().expect("a fault");
        assert_eq!(fault.term, "class loss");
        assert_eq!(ok(trainer.checksum()), before, "{preset}");
    }
}

#[test]
fn first_values_follow_the_recipe() {
    let mut config = small("moco-v3-vit-s16", OpsKind::Fused);
    assert_eq!(config.model.init, WeightInit::Xavier);
    (config.model.dim, config.model.heads) = (64, 4);
    let parameters = ok(Trainer::fresh_student(&config, device()));
    let largest = |name: &str| {
        values(&ok(parameters.get(name))).into_iter().fold(0f32, |most, value| most.max(value.abs()))
    };
    let near = |name: &str, bound: f64| {
        let most = f64::from(largest(name));
        assert!(most <= bound && most > 0.98 * bound, "{name}: {most}, expected just below {bound}");
    };
    near("backbone.patch_embed.proj.weight", (6.0f64 / (3 * 4 * 4 + 64) as f64).sqrt());
    assert_eq!(largest("backbone.patch_embed.proj.bias"), 0.0);
    // queries, keys and values are three matrices of 64 x 64
    near("backbone.blocks.0.attn.qkv.weight", (6.0f64 / 128.0).sqrt());
    near("backbone.blocks.0.mlp.fc1.weight", (6.0f64 / 320.0).sqrt());
    assert!(largest("ca_head.cls_token") < 1e-5);
    near("projector.0.weight", 0.125);
}

#[test]
fn presets_are_the_published_recipes() {
    let config = |name: &str| presets::find(name).expect("a preset").config();
    let moco = config("moco-v3-vit-s16");
    assert_eq!(moco.dims(), (384, 12, 12));
    assert!((moco.peak_lr(1) - 1.5e-4 * 16.0).abs() < 1e-12);
    assert_eq!((moco.optim.clip, moco.model.drop_path, moco.augment.global_scale[0]), (0.0, 0.0, 0.08));
    let moby = config("moby-vit-s16");
    assert_eq!(moby.dims(), (384, 12, 6));
    assert!((moby.peak_lr(1) - 1e-3).abs() < 1e-12);
    assert_eq!((moby.optim.clip, moby.optim.clip_by, moby.image.queue), (5.0, ClipBy::Global, 4096));
    for name in PRESETS {
        let config = config(name);
        let with_pass = name.contains("pass");
        assert_eq!((config.patch.enabled, config.augment.local_crops > 0), (with_pass, with_pass), "{name}");
        assert_eq!(config.patch.crops, PatchCrops::All);
        assert_eq!((config.image.temperature, config.optim.momentum), (0.2, 0.99));
    }
}
