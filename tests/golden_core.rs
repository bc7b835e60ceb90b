//! The golden set through the public interface of `pass-core`: neighborhood, matching, class attention, losses, centers,
//! schedules and video. Sizes, cases and hyper-parameters come from the set.

#[path = "golden_core/video.rs"]
mod video;

use pass_core::center;
use pass_core::class_attention::{ClassAttention, ClassAttentionParameters};
use pass_core::loss::{self, Temperatures};
use pass_core::matching::{similarities_into, similarity_scratch_len, top_k_into};
use pass_core::neighborhood::{Border, Neighborhood, Window};
use pass_core::schedule::{Cosine, TeacherTemperature, WarmupCosine, scaled_rate};
use pass_core::shape::{PatchGrid, TokenBatch};
use pass_tests::{Golden, GoldenFile, GoldenJson, Tolerance};
use serde_json::Value;
use video::{video_frame, video_metrics, video_propagation};

pass_tests::golden_suite! {
    // whole networks, images and training: golden_host and golden_augment
    elsewhere: [
        "augment.safetensors",
        "drop_path.safetensors",
        "full_arch.safetensors",
        "init_stats.json",
        "pos_embed.safetensors",
        "tiny_forward.safetensors",
        "tiny_loss_grads.safetensors",
        "tiny_train.safetensors",
        "tiny_weights.safetensors",
    ];
    neighbours_json: "neighbours.json",
    neighbours: "neighbours.safetensors",
    matching: "matching.safetensors",
    class_attention: "class_attention.safetensors",
    losses: "loss.safetensors",
    schedules_json: "schedules.json",
    schedules: "schedules.safetensors",
    video_propagation: "video_propagation.safetensors",
    video_frame: "video_frame.safetensors",
    video_metrics: "video_metrics.safetensors",
}

/// `14x14_w3`, `6x6_w6_all_others`: grid and window of a table.
fn parse_table_name(name: &str) -> (PatchGrid, Window) {
    let mut parts = name.split('_');
    let grid = parse_grid(parts.next().unwrap_or_default());
    let side = parts.next().and_then(|part| part.strip_prefix('w')).and_then(|side| side.parse().ok());
    let window = match (side, parts.collect::<Vec<_>>().join("_").as_str()) {
        (Some(side), "") => Window::Side(side),
        (Some(_), "all_others") => Window::All,
        _ => panic!("`{name}` names no window"),
    };
    (grid, window)
}

fn parse_grid(text: &str) -> PatchGrid {
    let sides =
        text.split_once('x').and_then(|(height, width)| Some((height.parse().ok()?, width.parse().ok()?)));
    let (height, width) = sides.unwrap_or_else(|| panic!("`{text}` names no grid"));
    PatchGrid::new(height, width).expect("a grid of the set")
}

fn table(name: &str, border: Border) -> Vec<Vec<usize>> {
    let (grid, window) = parse_table_name(name);
    let neighborhood = Neighborhood::new(grid, window, border).expect("a window of the set");
    (0..grid.n_patches()).map(|patch| neighborhood.candidates(patch).collect()).collect()
}

fn neighbours_json(golden: &Golden) {
    let json = golden.json("neighbours.json");
    let border = border(&json);
    let window = json.whole("/window");
    for name in json.keys("/tables") {
        let expected: Vec<Vec<usize>> = serde_json::from_value(json.read(&format!("/tables/{name}")).clone())
            .expect("a table of indices");
        assert_eq!(table(&name, border), expected, "{name}");
    }
    assert!(
        json.keys("/tables").iter().any(|name| parse_table_name(name).1 == Window::Side(window)),
        "a table of the standard window {window}"
    );
}

fn border(json: &GoldenJson<'_>) -> Border {
    let wraps = json.read("/wrap_around").as_bool().expect("`wrap_around` is a boolean");
    if wraps { Border::Wrap } else { Border::Clip }
}

fn neighbours(golden: &Golden) {
    let file = golden.file("neighbours.safetensors");
    let border = border(&golden.json("neighbours.json"));
    for name in file.names() {
        let found: Vec<f32> = table(name, border).concat().into_iter().map(|index| index as f32).collect();
        file.check(name, &found);
    }
}

fn matching(golden: &Golden) {
    let file = golden.file("matching.safetensors");
    for case in file.cases().as_object().expect("cases by name").keys() {
        let name = |part: &str| format!("{case}.{part}");
        let (features, shape) = file.tensor(&name("features"));
        let &[batch, n, dim] = shape else { panic!("{case}: features are [B, N, D]") };
        let grid = parse_grid(case.split('_').next().unwrap_or_default());
        let slots = file.spec(&name("similarity")).shape[2];
        let k = file.spec(&name("top_index")).shape[2];
        let neighborhood = window_with(grid, slots);
        let images = TokenBatch::new(features, batch, n, dim).expect("features");

        let (mut similarity, mut index, mut slot, mut value) = (vec![], vec![], vec![], vec![]);
        for tokens in images.images() {
            let mut scratch = vec![0.0; similarity_scratch_len(&neighborhood)];
            let mut similarities = vec![0.0; n * slots];
            similarities_into(tokens, &neighborhood, &mut scratch, &mut similarities).expect("similarities");
            let mut matches = vec![0; n * k];
            top_k_into(&similarities, &neighborhood, k, &mut matches).expect("matches");
            for (position, &found) in matches.iter().enumerate() {
                let patch = position / k;
                let found_slot = neighborhood.slot(patch, found as usize).expect("a match is a candidate");
                index.push(found as f32);
                slot.push(found_slot as f32);
                value.push(similarities[patch * slots + found_slot]);
            }
            similarity.extend(similarities);
        }
        file.check(&name("similarity"), &similarity);
        file.check_sets(&name("top_index"), &index);
        file.check_sets(&name("top_slot"), &slot);
        file.check(&name("top_value"), &value);
    }
}

/// The neighborhood of the set whose patches have `slots` candidates.
fn window_with(grid: PatchGrid, slots: usize) -> Neighborhood {
    let longest = grid.height().max(grid.width());
    (1..=longest)
        .step_by(2)
        .map(Window::Side)
        .chain([Window::All])
        .map(|window| Neighborhood::new(grid, window, Border::Wrap).expect("an odd window"))
        .find(|neighborhood| neighborhood.max_candidates() == slots)
        .unwrap_or_else(|| panic!("no window gives {slots} candidates on {grid:?}"))
}

fn class_attention(golden: &Golden) {
    let file = golden.file("class_attention.safetensors");
    for (case, sizes) in file.cases().as_object().expect("cases by name") {
        let size = |key: &str| sizes[key].as_u64().unwrap_or_else(|| panic!("{case}: no `{key}`")) as usize;
        let (dim, heads, n, batch) = (size("dim"), size("heads"), size("tokens"), size("batch"));
        let name = |part: &str| format!("{case}.{part}");
        let parameters = ClassAttentionParameters::from_fn(|part| file.tensor(&name(&format!("w.{part}"))).0);
        let block = ClassAttention::new(parameters, heads).expect("a block of the set");
        let x = TokenBatch::new(file.tensor(&name("x")).0, batch, n, dim).expect("patch tokens");
        let class = file.tensor(&name("cls")).0.chunks_exact(dim);
        let upstream = file.tensor(&name("grad_out")).0.chunks_exact(dim);

        let (mut out, mut attention) = (vec![], vec![]);
        let (mut grad_x, mut grad_class) = (vec![], vec![]);
        let mut gradients = parameters.map(|weights| vec![0.0; weights.len()]);
        for ((x, class), upstream) in x.images().zip(class).zip(upstream) {
            let (mut one, mut weights) = (vec![0.0; dim], vec![0.0; heads * (1 + n)]);
            let mut scratch = vec![0.0; block.scratch_len(n)];
            block.forward_into(x, class, &mut scratch, &mut one, &mut weights).expect("forward");
            out.extend(one);
            attention.extend(weights);

            let (mut for_x, mut for_class) = (vec![0.0; n * dim], vec![0.0; dim]);
            let mut scratch = vec![0.0; block.gradient_scratch_len(n)];
            let into = gradients.as_mut().map(Vec::as_mut_slice);
            block
                .gradient_into(x, class, upstream, &mut scratch, into, &mut for_x, &mut for_class)
                .expect("gradient");
            grad_x.extend(for_x);
            grad_class.extend(for_class);
        }
        file.check(&name("out"), &out);
        file.check(&name("attention"), &attention);
        file.check(&name("grad_x"), &grad_x);
        file.check(&name("grad_cls"), &grad_class);
        for part in ClassAttentionParameters::<()>::NAMES {
            let gradient = gradients.get(part).expect("a parameter of the block");
            file.check(&name(&format!("grad.{part}")), gradient);
        }
    }
}

/// Logits of one kind, crop by crop: the global crops, then the local ones.
struct Crops<'a> {
    crops: Vec<&'a [f32]>,
    globals: usize,
}

fn crops<'a>(file: &'a GoldenFile<'_>, side: &str, kind: &str, batch: usize) -> Crops<'a> {
    let of = |place: &str| {
        let (logits, shape) = file.tensor(&format!("{side}_{place}_{kind}"));
        logits.chunks_exact(batch * shape[1] * shape[2])
    };
    Crops { globals: of("global").len(), crops: of("global").chain(of("local")).collect() }
}

fn losses(golden: &Golden) {
    let file = golden.file("loss.safetensors");
    let batch = file.hyper_usize("batch");
    let student = file.hyper_f64("student_temp") as f32;
    let momentum = file.hyper_f64("center_momentum") as f32;
    let weight = file.hyper_f64("patch_loss_weight") as f32;
    let [teacher_class, teacher_patch] = ["cls", "patch"].map(|kind| crops(&file, "teacher", kind, batch));
    let [student_class, student_patch] = ["cls", "patch"].map(|kind| crops(&file, "student", kind, batch));
    assert_eq!(student_class.crops.len() - student_class.globals, file.hyper_usize("local_crops"));

    let mut class_center = file.tensor("center_before").0.to_vec();
    let mut patch_center = file.tensor("patch_center_before").0.to_vec();
    for call in calls(&file) {
        let name = |part: &str| format!("{call}.{part}");
        let teacher = golden_temperature(&file, &call);
        file.check(&name("teacher_temp"), &[teacher]);
        let temperatures = Temperatures { student, teacher };
        let mut scratch = vec![0.0; loss::loss_scratch_len(class_center.len().max(patch_center.len()))];
        let zeros =
            |crops: &Crops<'_>| crops.crops.iter().map(|crop| vec![0.0; crop.len()]).collect::<Vec<_>>();
        let (mut class_gradient, mut patch_gradient) = (zeros(&student_class), zeros(&student_patch));

        let class = loss::class_loss_with_gradient(
            &teacher_class.crops[..teacher_class.globals],
            &student_class.crops,
            &class_center,
            temperatures,
            1.0,
            &mut class_gradient.iter_mut().map(Vec::as_mut_slice).collect::<Vec<_>>(),
            &mut scratch,
        )
        .expect("class loss");
        let patch = loss::patch_loss_with_gradient(
            &teacher_patch.crops,
            &student_patch.crops,
            &patch_center,
            temperatures,
            weight,
            &mut patch_gradient.iter_mut().map(Vec::as_mut_slice).collect::<Vec<_>>(),
            &mut scratch,
        )
        .expect("patch loss");
        file.check(&name("cls"), &[class]);
        file.check(&name("patch"), &[patch]);
        file.check(&name("total"), &[loss::total_loss(class, patch, weight)]);
        for (kind, gradient, globals) in [
            ("cls", &class_gradient, student_class.globals),
            ("patch", &patch_gradient, student_patch.globals),
        ] {
            file.check(&name(&format!("grad.student_global_{kind}")), &gradient[..globals].concat());
            file.check(&name(&format!("grad.student_local_{kind}")), &gradient[globals..].concat());
        }

        for (center, crops) in [(&mut class_center, &teacher_class), (&mut patch_center, &teacher_patch)] {
            let mut sum = vec![0.0; center.len()];
            let rows =
                crops.crops.iter().map(|crop| center::add_rows(&mut sum, crop).expect("whole rows")).sum();
            center::update_mut(center, &sum, rows, momentum).expect("center");
        }
        file.check(&name("center_after"), &class_center);
        file.check(&name("patch_center_after"), &patch_center);
    }
}

/// `epoch0`, `epoch1`, …: the calls in order of their epoch, since the centers are carried from one to the next.
fn calls(file: &GoldenFile<'_>) -> Vec<String> {
    let names = file.names();
    let mut epochs: Vec<usize> = names
        .iter()
        .filter_map(|name| name.strip_prefix("epoch")?.strip_suffix(".total")?.parse().ok())
        .collect();
    epochs.sort_unstable();
    epochs.iter().map(|epoch| format!("epoch{epoch}")).collect()
}

/// The teacher temperature of a call. The set states its schedule only in prose ("teacher temperature 0.04 to 0.07 over
/// 3 epochs"); where that can be read it is followed, and the stored value is used otherwise.
fn golden_temperature(file: &GoldenFile<'_>, call: &str) -> f32 {
    let stored = file.tensor(&format!("{call}.teacher_temp")).0[0];
    let epoch = call.strip_prefix("epoch").and_then(|epoch| epoch.parse().ok());
    let words: Vec<&str> =
        file.entry()["description"].as_str().unwrap_or_default().split_whitespace().collect();
    let schedule = words.windows(8).find_map(|words| match words {
        ["teacher", "temperature", start, "to", end, "over", epochs, unit] if unit.starts_with("epochs") => {
            Some(TeacherTemperature {
                start: start.parse().ok()?,
                end: end.parse().ok()?,
                warmup_epochs: epochs.parse().ok()?,
            })
        }
        _ => None,
    });
    epoch.zip(schedule).map_or(stored, |(epoch, schedule)| schedule.at(epoch) as f32)
}

/// The four schedules of one parameter set.
struct Schedules {
    rate: WarmupCosine,
    decay: Cosine,
    momentum: Cosine,
    temperature: TeacherTemperature,
    steps: u64,
    epochs: u64,
}

impl Schedules {
    const NAMES: [&'static str; 4] = ["lr", "wd", "momentum", "teacher_temp"];

    fn read(json: &GoldenJson<'_>, case: &str) -> Self {
        let number = |key: &str| json.number(&format!("/{case}/parameters/{key}"));
        let whole = |key: &str| json.whole(&format!("/{case}/parameters/{key}")) as u64;
        let (epochs, per_epoch) = (whole("epochs"), whole("iterations_per_epoch"));
        let steps = epochs * per_epoch;
        Self {
            rate: WarmupCosine {
                peak: scaled_rate(number("lr_per_256"), whole("batch")),
                end: number("min_lr"),
                warmup_steps: whole("warmup_epochs") * per_epoch,
                total_steps: steps,
            },
            decay: Cosine {
                start: number("weight_decay"),
                end: number("weight_decay_end"),
                total_steps: steps,
            },
            momentum: Cosine { start: number("momentum_teacher"), end: 1.0, total_steps: steps },
            temperature: TeacherTemperature {
                start: number("teacher_temp_start"),
                end: number("teacher_temp_end"),
                warmup_epochs: whole("teacher_temp_warmup_epochs"),
            },
            steps,
            epochs,
        }
    }

    fn values(&self, name: &str) -> Vec<f64> {
        match name {
            "lr" => (0..self.steps).map(|step| self.rate.at(step)).collect(),
            "wd" => (0..self.steps).map(|step| self.decay.at(step)).collect(),
            "momentum" => (0..self.steps).map(|step| self.momentum.at(step)).collect(),
            "teacher_temp" => (0..self.epochs).map(|epoch| self.temperature.at(epoch)).collect(),
            _ => panic!("no schedule is called `{name}`"),
        }
    }
}

fn schedules_json(golden: &Golden) {
    // The samples are double precision; a step of the cosine may round differently in its last two bits.
    let close =
        |found: f64, expected: f64| (found - expected).abs() <= 1e-15 + 4.0 * f64::EPSILON * expected.abs();
    let json = golden.json("schedules.json");
    for case in json.keys("") {
        let schedules = Schedules::read(&json, &case);
        for name in Schedules::NAMES {
            let values = schedules.values(name);
            let at = |part: &str| format!("/{case}/{name}/{part}");
            assert_eq!(values.len(), json.whole(&at("length")), "{case} {name}");
            let (first, last) = (json.numbers(&at("first")), json.numbers(&at("last")));
            let middle = json.number(&at("middle"));
            let expected = first.iter().chain([&middle]).chain(&last);
            let tail = &values[values.len() - last.len()..];
            let found = values[..first.len()].iter().chain([&values[values.len() / 2]]).chain(tail);
            for (&found, &expected) in found.zip(expected) {
                assert!(close(found, expected), "{case} {name}: expected {expected}, found {found}");
            }
        }
    }
}

fn schedules(golden: &Golden) {
    let json = golden.json("schedules.json");
    let file = golden.file("schedules.safetensors");
    let rtol = file.entry().get("rtol_all").and_then(Value::as_f64);
    for case in json.keys("") {
        let schedules = Schedules::read(&json, &case);
        for name in Schedules::NAMES {
            let tensor = format!("{case}.{name}");
            let found: Vec<f32> = schedules.values(name).into_iter().map(|value| value as f32).collect();
            match rtol {
                // The file states a tighter bound for all of its tensors.
                Some(rtol) => file.check_with(&tensor, &found, Tolerance { atol: 0.0, rtol }),
                None => file.check(&tensor, &found),
            }
        }
    }
}
