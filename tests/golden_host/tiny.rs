//! The tiny model of the golden set: forward passes, gradients, five training steps.

use std::collections::HashMap;

use candle_core::Tensor;
use pass_host::config::{Arch, OpsKind, TrainConfig, Window};
use pass_host::distributed::Ranks;
use pass_host::model::aggregation::Aggregated;
use pass_host::model::head::ProjectionHead;
use pass_host::model::parameters::{Parameters, Role};
use pass_host::model::{Architecture, Network};
use pass_host::objective::dino::{CENTER, HEAD};
use pass_host::objective::forward::{CropGroup, Crops, Objective, PATCH_CENTER};
use pass_host::objective::matching::{self, Matching};
use pass_host::objective::method::State;
use pass_host::ops::Ops;
use pass_host::optimizer::{Optimizer, StepSize};
use pass_host::train::trainer::{Schedule, Trainer};
use pass_tests::{Golden, GoldenFile, all_ops, device};

use super::{check, ok, tensor, values};

/// The configuration that the `hyper` of a tiny file describes.
fn configuration(file: &GoldenFile<'_>, ops: OpsKind) -> TrainConfig {
    let (whole, number) = (|key: &str| file.hyper_usize(key), |key: &str| file.hyper_f64(key));
    assert_eq!(whole("mlp_ratio"), pass_host::model::MLP_RATIO);
    assert_eq!(number("layer_norm_eps"), pass_host::model::LAYER_NORM_EPS);
    assert_eq!(whole("head_layers"), 3);
    assert!(file.hyper_bool("qkv_bias"));
    let mut config = TrainConfig { ops, ..TrainConfig::default() };
    config.model.arch = Arch::Custom;
    config.model.dim = whole("dim");
    config.model.depth = whole("depth");
    config.model.heads = whole("heads");
    config.model.patch_size = whole("patch_size");
    config.model.drop_path = number("drop_path");
    config.augment.global_size = whole("image_size_global");
    config.augment.local_size = whole("image_size_local");
    config.augment.local_crops = whole("local_crops");
    config.head.hidden = whole("head_hidden");
    config.head.bottleneck = whole("head_bottleneck");
    config.head.class_prototypes = whole("out_dim_cls");
    config.head.patch_prototypes = whole("out_dim_patch");
    config.head.norm_last_layer = file.hyper_bool("norm_last_layer");
    config.image.student_temp = number("student_temp");
    config.image.center_momentum = number("center_momentum");
    config.patch.weight = number("patch_loss_weight");
    config.patch.k = whole("k");
    config.patch.window = Window::Side(whole("window"));
    config.optim.batch = whole("batch");
    if !file.hyper()["clip"].is_null() {
        config.optim.clip = number("clip");
    }
    if let Some(betas) = file.hyper()["betas"].as_array() {
        config.optim.betas = [0, 1].map(|i| betas[i].as_f64().expect("a number"));
        config.optim.eps = number("eps");
    }
    config
}

/// Student or teacher of `tiny_weights`.
fn weights(golden: &Golden, config: &TrainConfig, who: &str, role: Role) -> Parameters {
    let file = golden.file("tiny_weights.safetensors");
    let prefix = format!("{who}.");
    let named: HashMap<String, Tensor> = file
        .names()
        .into_iter()
        .filter_map(|name| name.strip_prefix(&prefix).map(|short| (short.to_owned(), tensor(&file, name))))
        .collect();
    Parameters::from_tensors(&Architecture::from_config(config), role, &named, device())
        .unwrap_or_else(|error| panic!("{who}: {error}"))
}

/// The crops `{prefix}crop0…` of a file; globals first.
fn crops(file: &GoldenFile<'_>, prefix: &str) -> Crops {
    let (globals, locals) = (file.hyper_usize("global_crops"), file.hyper_usize("local_crops"));
    let stack = |range: std::ops::Range<usize>| {
        let crops = range.len();
        let images: Vec<Tensor> = range.map(|crop| tensor(file, &format!("{prefix}crop{crop}"))).collect();
        CropGroup { images: ok(Tensor::cat(&images, 0)), crops, drop_path: None }
    };
    Crops {
        batch: file.hyper_usize("batch"),
        global: stack(0..globals),
        local: (locals > 0).then(|| stack(globals..globals + locals)),
    }
}

fn trainer(golden: &Golden, config: &TrainConfig) -> Trainer {
    let grads = golden.file("tiny_loss_grads.safetensors");
    let center = |name: &str| ok(tensor(&grads, name).flatten_all());
    let state = State::from([
        (CENTER.to_owned(), center("center_before")),
        (PATCH_CENTER.to_owned(), center("patch_center_before")),
    ]);
    let student = weights(golden, config, "student", Role::Student);
    let teacher = weights(golden, config, "teacher", Role::Teacher);
    let optimizer = ok(Optimizer::new(&config.optim, &student, config.ops.into()));
    let architecture = Architecture::from_config(config);
    ok(Trainer::assemble(config, &architecture, student, teacher, state, optimizer))
}

pub(crate) fn tiny_weights(golden: &Golden) {
    let file = golden.file("tiny_weights.safetensors");
    let config = configuration(&file, OpsKind::Fused);
    let count = |who: &str, role| weights(golden, &config, who, role).iter().count();
    assert_eq!(count("student", Role::Student) + count("teacher", Role::Teacher), file.names().len());
}

pub(crate) fn tiny_forward(golden: &Golden) {
    let file = golden.file("tiny_forward.safetensors");
    for kind in all_ops() {
        let config = configuration(&file, kind);
        let architecture = Architecture::from_config(&config);
        let network = |who: &str| {
            let parameters = weights(golden, &config, who, Role::Teacher);
            ok(Network::new(&architecture, parameters, kind.into()))
        };
        let (student, teacher) = (network("student"), network("teacher"));
        let matching = Matching::from_config(&config.patch);
        let crops = crops(&file, "");
        let groups = [("global", Some(&crops.global)), ("local", crops.local.as_ref())];
        for (size, group) in groups.into_iter().filter_map(|(size, group)| group.map(|group| (size, group))) {
            let ops = kind.into();
            side(&file, &format!("teacher.{size}"), &teacher, &group.images, Some(&matching), ops);
            side(&file, &format!("student.{size}"), &student, &group.images, None, ops);
        }

        let (patches, grid) = ok(teacher.backbone.patchify(&crops.global.images));
        let attention = ok(teacher.backbone.last_attention(&patches, grid)); // [crops·B, heads, N, N]
        let name = "teacher.last_attention";
        let rows = file.spec(name).shape[2];
        // the manifest says which query rows are stored: "rows 0,13,26,..."
        let step: usize = file.spec(name).meaning.split_once("rows 0,").map_or(1, |(_, rest)| {
            let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
            digits.parse().expect("the second stored row")
        });
        assert_eq!((grid.0 * grid.1).div_ceil(step), rows, "stored query rows");
        let picked: Vec<u32> = (0..rows).map(|row| (row * step) as u32).collect();
        let picked = ok(Tensor::new(picked, device()));
        let first = ok(attention.narrow(0, 0, 1).and_then(|x| x.contiguous()?.index_select(&picked, 2)));
        check(&file, name, &first);

        let (patches, grid) = ok(teacher.backbone.patchify(&tensor(&file, "nonsquare.image")));
        check(&file, "nonsquare.features", &ok(teacher.backbone.forward(&patches, grid, None)));
    }
}

/// Every intermediate result of one network on one group of crops.
fn side(
    file: &GoldenFile<'_>,
    name: &str,
    network: &Network,
    images: &Tensor,
    matching: Option<&Matching>,
    ops: Ops,
) {
    let entry = |part: &str| format!("{name}.{part}");
    let (patches, grid) = ok(network.backbone.patchify(images));
    check(file, &entry("tokens"), &ok(network.backbone.embed(&patches, grid)));
    let features = ok(network.backbone.forward_visiting(&patches, grid, None, |block, tokens| {
        check(file, &entry(&format!("block{block}")), tokens);
        Ok(())
    }));
    let positives = matching.map(|matching| {
        let (_, similarities) = ok(matching::similarities(&features, grid, matching));
        file.check(&entry("similarity"), &similarities);
        let positives = ok(matching::positives(&features, grid, matching));
        let index: Vec<f32> = positives.index().iter().map(|&i| i as f32).collect();
        file.check_sets(&entry("match_index"), &index);
        positives
    });
    let visit = |block: usize, tokens: &Aggregated| {
        check(file, &entry(&format!("agg{block}_cls")), &tokens.class);
        if let Some(patches) = &tokens.patches {
            check(file, &entry(&format!("agg{block}_patch")), patches);
        }
        Ok(())
    };
    let aggregated = ok(network.aggregation.forward_visiting(&features, positives.as_ref(), visit));
    let patches = aggregated.patches.as_ref().unwrap_or(&features);
    let tokens =
        ok(Tensor::cat(&[&aggregated.class, patches], 1).and_then(|x| network.aggregation.normalize(&x)));
    check(file, &entry("head_in"), &tokens);
    let count = ok(tokens.dim(1));
    let class_head = ok(ProjectionHead::new(&network.parameters, HEAD, ops));
    let parts = [
        ("cls", &class_head, ok(tokens.narrow(1, 0, 1))),
        ("patch", network.patch_head.as_ref().expect("a patch head"), ok(tokens.narrow(1, 1, count - 1))),
    ];
    for (what, head, tokens) in parts {
        let bottleneck = ok(tokens.contiguous().and_then(|x| head.bottleneck(&x)));
        check(file, &entry(&format!("{what}_bottleneck")), &bottleneck);
        check(file, &entry(&format!("{what}_logits")), &ok(head.logits(&bottleneck)));
    }
}

pub(crate) fn tiny_loss_grads(golden: &Golden) {
    let file = golden.file("tiny_loss_grads.safetensors");
    let forward = golden.file("tiny_forward.safetensors");
    let names: Vec<String> =
        serde_json::from_value(file.entry()["grad_names"].clone()).expect("grad_names lists names");
    for kind in all_ops() {
        let config = configuration(&file, kind);
        let trainer = trainer(golden, &config);
        let (temp, _) = file.tensor("teacher_temp");
        let losses = ok(trainer.losses(&crops(&forward, ""), f64::from(temp[0])));
        check(&file, "loss_total", &losses.total);
        check(&file, "loss_cls", &losses.image);
        check(&file, "loss_patch", losses.patch.as_ref().expect("a patch loss"));
        let objective = Objective::from_config(&config);
        let after = ok(objective.updated(&trainer.state, &[&losses.seen], &Ranks::single()));
        check(&file, "center_after", &after[CENTER]);
        check(&file, "patch_center_after", &after[PATCH_CENTER]);

        let gradients = ok(trainer.gradients(&losses.total));
        let mut own: Vec<&String> = gradients.keys().collect();
        let mut listed: Vec<&String> = names.iter().collect();
        own.sort();
        listed.sort();
        assert_eq!(own, listed, "tensors with a gradient");
        let norms = ok(trainer.optimizer.norms(&gradients));
        let in_order: Vec<f32> = names.iter().map(|name| norms[name] as f32).collect();
        file.check("grad_norms", &in_order);
        for name in &names {
            check(&file, &format!("grad.{name}"), &gradients[name]);
            let clipped = format!("clipped.{name}");
            if file.contains(&clipped) {
                let scale = trainer.optimizer.clip_coefficient(norms[name]);
                check(&file, &clipped, &ok(&gradients[name] * scale));
            }
        }
    }
}

pub(crate) fn tiny_train(golden: &Golden) {
    let file = golden.file("tiny_train.safetensors");
    let forward = golden.file("tiny_forward.safetensors");
    let gradient_names: Vec<String> =
        serde_json::from_value(golden.file("tiny_loss_grads.safetensors").entry()["grad_names"].clone())
            .expect("grad_names lists names");
    for kind in all_ops() {
        let config = configuration(&file, kind);
        let mut trainer = trainer(golden, &config);
        let series = |name: &str, step: usize| f64::from(file.tensor(name).0[step]);
        let per_epoch = file.hyper_usize("iterations_per_epoch");
        let (mut losses, mut norms) = (Vec::new(), Vec::new());
        for step in 0..file.hyper_usize("steps") {
            let batch = match step {
                0 => crops(&forward, ""),
                _ => crops(&file, &format!("step{}.", step + 1)),
            };
            let epoch = step / per_epoch;
            let schedule = Schedule {
                lr: series("lr", step),
                weight_decay: series("wd", step),
                momentum: series("momentum", step),
                next_momentum: f64::NAN,
                teacher_temp: series("teacher_temp_per_epoch", epoch),
                train_last_layer: epoch >= file.hyper_usize("freeze_last_layer_epochs"),
            };
            let before = ok(trainer.losses(&batch, schedule.teacher_temp));
            let step_norms = ok(trainer.gradients(&before.total).and_then(|g| trainer.optimizer.norms(&g)));
            norms.extend(gradient_names.iter().map(|name| step_norms[name] as f32));
            let report = ok(trainer.step(&[batch], &schedule)).unwrap_or_else(|fault| panic!("{fault:?}"));
            losses.extend([report.loss, report.loss_image, report.loss_patch.expect("a patch loss")]);
            after_step(&file, &format!("after{}", step + 1), &trainer);
        }
        let losses: Vec<f32> = losses.into_iter().map(|loss| loss as f32).collect();
        file.check("losses", &losses);
        file.check("grad_norms", &norms);
    }
}

/// Checks what the set holds of the state after a step; nothing if it holds nothing of this step.
fn after_step(file: &GoldenFile<'_>, step: &str, trainer: &Trainer) {
    let prefix = format!("{step}.");
    let names: Vec<&str> = file.names().into_iter().filter(|name| name.starts_with(&prefix)).collect();
    if names.is_empty() {
        return;
    }
    let moments: HashMap<String, Tensor> = trainer.optimizer.to_tensors().into_iter().collect();
    let value = |parameters: &Parameters, name: &str| values(&ok(parameters.get(name)));
    let mut stepped = file.stepped_weights(step);
    for name in names {
        let short = &name[prefix.len()..];
        match short.split_once('.') {
            Some(("student", rest)) => stepped.add(name, &value(&trainer.student.parameters, rest)),
            Some(("teacher", rest)) => stepped.add(name, &value(&trainer.teacher.parameters, rest)),
            Some(("exp_avg" | "exp_avg_sq", _)) => {
                let moment = moments.get(short).unwrap_or_else(|| panic!("no moment `{short}`"));
                check(file, name, moment);
            }
            None if short == "center" => check(file, name, &trainer.state[CENTER]),
            None if short == "patch_center" => check(file, name, &trainer.state[PATCH_CENTER]),
            _ => panic!("unknown entry `{name}`"),
        }
    }
    stepped.finish();
}

#[test]
fn frozen_last_layers_do_not_move() {
    let golden = Golden::open();
    let file = golden.file("tiny_train.safetensors");
    let config = configuration(&file, OpsKind::Fused);
    let mut trainer = trainer(&golden, &config);
    let frozen =
        |trainer: &Trainer| values(&ok(trainer.student.parameters.get("p_head.last_layer.weight_v")));
    let moving = |trainer: &Trainer| values(&ok(trainer.student.parameters.get("p_head.mlp.0.weight")));
    let (before, moved) = (frozen(&trainer), moving(&trainer));
    let batch = crops(&golden.file("tiny_forward.safetensors"), "");
    let losses = ok(trainer.losses(&batch, 0.04));
    let gradients = ok(trainer.gradients(&losses.total));
    let norms = ok(trainer.optimizer.norms(&gradients));
    let size = StepSize { lr: 1e-2, weight_decay: 0.1, momentum: 0.9, train_last_layer: false };
    ok(trainer.optimizer.step(
        &trainer.student.parameters,
        &trainer.teacher.parameters,
        &gradients,
        &norms,
        &size,
    ));
    assert_eq!(before, frozen(&trainer));
    assert_ne!(moved, moving(&trainer));
}
