//! The objective in candle: neighborhoods, matching, class attention, losses, schedules.

use candle_core::{Tensor, Var};
use pass_host::config::{Border, PatchObjective, Window};
use pass_host::model::aggregation::ClassAttentionBlock;
use pass_host::model::parameters::Parameters;
use pass_host::objective::center;
use pass_host::objective::loss::{class_pairs, patch_pairs};
use pass_host::objective::matching::{self, Matching};
use pass_host::train::schedule::Schedules;
use pass_tests::{Golden, GoldenFile, device};

use super::{all_ops, cases, check, ok, size_suffix, tensor, values};

fn rule(window: Window, k: usize) -> Matching {
    let config = PatchObjective { window, k, border: Border::Wrap, ..Default::default() };
    Matching::from_config(&config)
}

/// `HxW_wS` or `HxW_wS_all_others` -> grid and window.
fn table_name(name: &str) -> ((usize, usize), Window) {
    let (size, window) = name.split_once("_w").unwrap_or_else(|| panic!("`{name}` names no window"));
    let (_, height, width) = size_suffix(size);
    let window = match window.split_once('_') {
        Some((_, "all_others")) => Window::All(pass_host::config::AllPatches::All),
        Some(_) => panic!("unknown table `{name}`"),
        None => Window::Side(window.parse().unwrap_or_else(|_| panic!("`{name}` names no window"))),
    };
    ((height, width), window)
}

fn table(name: &str) -> Vec<f32> {
    let (grid, window) = table_name(name);
    let config = PatchObjective { window, k: 1, border: Border::Wrap, ..Default::default() };
    let rows = ok(matching::neighborhoods(grid, &Matching::from_config(&config)));
    rows.into_iter().flatten().map(|index| index as f32).collect()
}

pub(crate) fn neighbours(golden: &Golden) {
    let file = golden.file("neighbours.safetensors");
    for name in file.names() {
        file.check(name, &table(name));
    }
}

pub(crate) fn neighbours_json(golden: &Golden) {
    let json = golden.json("neighbours.json");
    assert_eq!(json.read("/wrap_around"), true);
    let _ = json.whole("/window");
    for name in json.keys("/tables") {
        let pointer = format!("/tables/{}", pass_tests::json::escape(&name));
        let rows: Vec<Vec<f32>> = serde_json::from_value(json.read(&pointer).clone())
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(rows.concat(), table(&name), "{name}");
    }
}

pub(crate) fn matching(golden: &Golden) {
    let file = golden.file("matching.safetensors");
    for case in cases(&file) {
        let name = |part: &str| format!("{case}.{part}");
        let (size, _) = case.split_once('_').unwrap_or((&case, ""));
        let (_, height, width) = size_suffix(size);
        let (_, shape) = file.tensor(&name("similarity"));
        let (_, top) = file.tensor(&name("top_index"));
        let (neighbours, k) = (shape[2], top[2]);
        // the number of candidates tells the window
        let window = match neighbours + 1 {
            all if all == height * width => Window::All(pass_host::config::AllPatches::All),
            area => Window::Side(area.isqrt()),
        };
        let matching = rule(window, k);
        let features = tensor(&file, &name("features"));
        let (columns, similarities) = ok(matching::similarities(&features, (height, width), &matching));
        assert_eq!(columns, neighbours);
        file.check(&name("similarity"), &similarities);
        let positives = ok(matching::positives(&features, (height, width), &matching));
        let index: Vec<f32> = positives.index().iter().map(|&i| i as f32).collect();
        file.check_sets(&name("top_index"), &index);
        // the slot of each positive in the table of its patch, and its similarity
        let table = ok(matching::neighborhoods((height, width), &matching));
        let patches = height * width;
        let (mut slots, mut best) = (Vec::new(), Vec::new());
        for (row, chosen) in positives.index().chunks(k).enumerate() {
            for positive in chosen {
                let slot = table[row % patches].iter().position(|candidate| candidate == positive);
                let slot = slot.expect("a positive is a neighbor");
                slots.push(slot as f32);
                best.push(similarities[row * columns + slot]);
            }
        }
        file.check_sets(&name("top_slot"), &slots);
        file.check(&name("top_value"), &best);
    }
}

pub(crate) fn class_attention(golden: &Golden) {
    let file = golden.file("class_attention.safetensors");
    for ops in all_ops() {
        for case in cases(&file) {
            let heads = file.cases()[&case]["heads"].as_u64().expect("heads") as usize;
            let prefix = format!("{case}.w.");
            let variable = |name: &str| ok(Var::from_tensor(&tensor(&file, name)));
            let mut variables = Vec::new();
            let mut named = Vec::new();
            for name in file.names().into_iter().filter(|name| name.starts_with(&prefix)) {
                let short = &name[prefix.len()..];
                let var = variable(name);
                named.push((format!("block.{short}"), var.as_tensor().clone()));
                variables.push((format!("{case}.grad.{short}"), var));
            }
            let parameters: Parameters = named.into_iter().collect();
            let block = ok(ClassAttentionBlock::new(&parameters, "block", heads, ops));
            let (x, cls) = (variable(&format!("{case}.x")), variable(&format!("{case}.cls")));
            variables.push((format!("{case}.grad_x"), x.clone()));
            variables.push((format!("{case}.grad_cls"), cls.clone()));
            let keys_values = ok(block.keys_values(&x));
            let out = ok(block.attend_all(&cls, &keys_values));
            check(&file, &format!("{case}.out"), &out);
            check(&file, &format!("{case}.attention"), &ok(block.attention_weights(&cls, &keys_values)));
            let upstream = tensor(&file, &format!("{case}.grad_out"));
            let gradients = ok((out * upstream).and_then(|x| x.sum_all()).and_then(|x| x.backward()));
            for (name, var) in variables {
                let gradient = gradients.get(&var).unwrap_or_else(|| panic!("no gradient for {name}"));
                check(&file, &name, gradient);
            }
        }
    }
}

pub(crate) fn loss(golden: &Golden) {
    let file = golden.file("loss.safetensors");
    let batch = file.hyper_usize("batch");
    let locals = file.hyper_usize("local_crops");
    let globals = ok(tensor(&file, "student_global_cls").dim(0)) / batch;
    let number = |key: &str| file.hyper_f64(key);
    // rows of a head: global crops, then local crops
    let rows = |who: &str, what: &str| {
        let part = |size: &str| tensor(&file, &format!("{who}_{size}_{what}")).flatten(0, 1);
        if locals == 0 { part("global") } else { Tensor::cat(&[ok(part("global")), ok(part("local"))], 0) }
    };
    let patches = |size: &str| ok(tensor(&file, &format!("teacher_{size}_patch")).dim(1));
    let mut groups = vec![(globals, patches("global"))];
    if locals > 0 {
        groups.push((locals, patches("local")));
    }
    let (class_terms, class_weight) = class_pairs(batch, globals, locals);
    let (patch_terms, patch_weights) = patch_pairs(batch, &groups);
    let mut epochs: Vec<String> = cases(&file).into_iter().filter(|case| case.starts_with("epoch")).collect();
    epochs.sort_by_key(|name| name["epoch".len()..].parse::<usize>().expect("epoch number"));
    for ops in all_ops() {
        let center = |name: &str| ok(tensor(&file, name).flatten_all());
        let (mut class_center, mut patch_center) = (center("center_before"), center("patch_center_before"));
        for epoch in &epochs {
            let name = |part: &str| format!("{epoch}.{part}");
            let (expected_temp, _) = file.tensor(&name("teacher_temp"));
            let teacher_temp = f64::from(expected_temp[0]);
            file.check(&name("teacher_temp"), &[teacher_temp as f32]);
            let term = |what: &str, center: &Tensor, pairs: &[(u32, u32)], weights: &[f32]| {
                let student = ok(rows("student", what).and_then(|x| Var::from_tensor(&x)));
                let teacher = ok(rows("teacher", what));
                let (loss, stats) = ok(ops.cross_entropy_with_stats(
                    &student,
                    &teacher,
                    center,
                    number("student_temp"),
                    teacher_temp,
                    pairs,
                    weights,
                ));
                // cross-entropy = entropy of the teacher + divergence, on average over equally weighted terms
                let stats = ok(stats.read());
                assert!(stats.teacher_entropy > 0.0 && stats.kl > 0.0);
                (student, loss, ok(ops.mean_rows(&teacher)))
            };
            let class_weights = vec![class_weight; class_terms.len()];
            let (class_rows, class, class_mean) = term("cls", &class_center, &class_terms, &class_weights);
            let (patch_rows, patch, patch_mean) = term("patch", &patch_center, &patch_terms, &patch_weights);
            let total = ok((&patch * number("patch_loss_weight")).and_then(|x| &class + x));
            check(&file, &name("cls"), &class);
            check(&file, &name("patch"), &patch);
            check(&file, &name("total"), &total);
            let gradients = ok(total.backward());
            for (what, var) in [("cls", &class_rows), ("patch", &patch_rows)] {
                let gradient = values(gradients.get(var).expect("a gradient"));
                let mut start = 0;
                for size in ["global", "local"].iter().take(1 + usize::from(locals > 0)) {
                    let entry = name(&format!("grad.student_{size}_{what}"));
                    let count = file.spec(&entry).shape.iter().product::<usize>();
                    file.check(&entry, &gradient[start..start + count]);
                    start += count;
                }
            }
            class_center = ok(center::updated(&class_center, &class_mean, number("center_momentum")));
            patch_center = ok(center::updated(&patch_center, &patch_mean, number("center_momentum")));
            check(&file, &name("center_after"), &class_center);
            check(&file, &name("patch_center_after"), &patch_center);
        }
    }
}

/// The schedules of one parameter set, from the numbers in `schedules.json`.
fn schedule_set(golden: &Golden, set: &str) -> (Schedules, u64, usize) {
    let json = golden.json("schedules.json");
    let number = |key: &str| json.number(&format!("/{set}/parameters/{key}"));
    let mut config = pass_host::config::TrainConfig::default();
    config.optim.epochs = number("epochs") as usize;
    config.optim.steps = 0; // all epochs
    config.optim.batch = number("batch") as usize;
    config.optim.lr_per_256 = number("lr_per_256");
    config.optim.min_lr = number("min_lr");
    config.optim.warmup_epochs = number("warmup_epochs");
    config.optim.weight_decay = number("weight_decay");
    config.optim.weight_decay_end = number("weight_decay_end");
    config.optim.momentum = number("momentum_teacher");
    config.image.teacher_temp_start = number("teacher_temp_start");
    config.image.teacher_temp_end = number("teacher_temp_end");
    config.image.teacher_temp_warmup_epochs = number("teacher_temp_warmup_epochs");
    let per_epoch = number("iterations_per_epoch") as u64;
    let epochs = config.optim.epochs;
    let images = per_epoch as usize * config.optim.total_batch(1);
    (Schedules::new(&config, images, 1), per_epoch, epochs)
}

/// The whole series `lr | wd | momentum | teacher_temp` of a parameter set.
fn series(golden: &Golden, set: &str, what: &str) -> Vec<f64> {
    let (schedules, per_epoch, epochs) = schedule_set(golden, set);
    let steps = per_epoch * epochs as u64;
    match what {
        "lr" => (0..steps).map(|step| schedules.at(step).lr).collect(),
        "wd" => (0..steps).map(|step| schedules.at(step).weight_decay).collect(),
        "momentum" => (0..steps).map(|step| schedules.at(step).momentum).collect(),
        "teacher_temp" => {
            (0..epochs as u64).map(|epoch| schedules.at(epoch * per_epoch).teacher_temp).collect()
        }
        _ => panic!("unknown series `{what}`"),
    }
}

pub(crate) fn schedules(golden: &Golden) {
    let file: GoldenFile<'_> = golden.file("schedules.safetensors");
    let rtol = file.entry()["rtol_all"].as_f64().expect("rtol_all");
    for name in file.names() {
        let (set, what) = name.split_once('.').expect("SET.SERIES");
        let own: Vec<f32> = series(golden, set, what).into_iter().map(|v| v as f32).collect();
        file.check_with(name, &own, pass_tests::Tolerance { atol: 1e-12, rtol });
    }
}

pub(crate) fn schedules_json(golden: &Golden) {
    let json = golden.json("schedules.json");
    let close = |a: f64, b: f64| (a - b).abs() <= 1e-12 * b.abs().max(1e-3);
    for set in json.keys("") {
        for what in json.keys(&format!("/{set}")) {
            let pointer = |part: &str| format!("/{set}/{what}/{part}");
            if what == "parameters" {
                let _ = json.read(&format!("/{set}/parameters"));
                continue;
            }
            let own = series(golden, &set, &what);
            assert_eq!(own.len(), json.whole(&pointer("length")), "{set}.{what}: length");
            let first = json.numbers(&pointer("first"));
            let last = json.numbers(&pointer("last"));
            let middle = json.number(&pointer("middle"));
            assert!(first.iter().zip(&own).all(|(a, b)| close(*b, *a)), "{set}.{what}: first");
            let tail = &own[own.len() - last.len()..];
            assert!(last.iter().zip(tail).all(|(a, b)| close(*b, *a)), "{set}.{what}: last {tail:?}");
            assert!(close(own[own.len() / 2], middle), "{set}.{what}: middle {}", own[own.len() / 2]);
        }
    }
}

#[test]
fn clipped_borders_have_fewer_neighbors() {
    let config = PatchObjective { border: Border::Clip, ..Default::default() };
    let rows = ok(matching::neighborhoods((2, 3), &Matching::from_config(&config)));
    assert_eq!(rows[0], [1, 3, 4]);
    let features = ok(Tensor::randn(0f32, 1.0, (2, 6, 5), device()));
    let positives = ok(matching::positives(&features, (2, 3), &Matching::from_config(&config)));
    assert_eq!((0..6).map(|patch| positives.of(1, patch).len()).collect::<Vec<_>>(), [3, 4, 3, 3, 4, 3]);
}
