//! Backbones and their parts: stochastic depth, position embeddings, full-size forward passes, first values.

use candle_core::{D, Tensor};
use pass_host::config::{Arch, TrainConfig};
use pass_host::model::aggregation::AggregationHead;
use pass_host::model::parameters::{Parameters, Role, projection_head};
use pass_host::model::pos_embed::{PositionEmbedding, ResizeRule};
use pass_host::model::vit::Vit;
use pass_host::model::{Architecture, Network};
use pass_host::objective::dino::HEAD;
use pass_host::objective::matching::{self, Matching};
use pass_host::ops::Ops;
use pass_tests::{Golden, GoldenFile, device};

use super::{all_ops, check, ok, size_suffix, tensor, values};

/// An architecture with heads too small to matter.
fn backbone(dim: usize, depth: usize, heads: usize, patch_size: usize, grid: usize) -> Architecture {
    Architecture {
        head_hidden: 8,
        head_bottleneck: 4,
        patch_prototypes: Some(4),
        image_heads: projection_head(HEAD, [dim, 8, 4, 4], true),
        ..Architecture::backbone_only(dim, depth, heads, patch_size, grid)
    }
}

pub(crate) fn drop_path(golden: &Golden) {
    let file = golden.file("drop_path.safetensors");
    let (rates, _) = file.tensor("rates");
    let mut architecture = backbone(
        file.hyper_usize("dim"),
        file.hyper_usize("depth"),
        file.hyper_usize("heads"),
        file.hyper_usize("patch_size"),
        0,
    );
    architecture.drop_path = f64::from(*rates.last().expect("a rate for every block"));
    let named = file.names().into_iter().filter_map(|name| {
        name.strip_prefix("w.").map(|short| (format!("backbone.{short}"), tensor(&file, name)))
    });
    let parameters: Parameters = named.collect();
    let image = tensor(&file, "image");
    let (draws, shape) = file.tensor("draws");
    let draws: Vec<Vec<f64>> =
        draws.chunks(shape[1]).map(|row| row.iter().map(|&draw| f64::from(draw)).collect()).collect();
    for ops in all_ops() {
        let vit = ok(Vit::new(&parameters, "backbone", &architecture, ops));
        assert_eq!(vit.drop_path_applications(), draws.len(), "applications of stochastic depth");
        let (patches, grid) = ok(vit.patchify(&image));
        check(&file, "features_train", &ok(vit.forward(&patches, grid, Some(&draws))));
        check(&file, "features_eval", &ok(vit.forward(&patches, grid, None)));
    }
}

pub(crate) fn pos_embed(golden: &Golden) {
    let file = golden.file("pos_embed.safetensors");
    let embedding = tensor(&file, "pos_embed");
    for name in file.names() {
        let (rule, height, width) = match name {
            "pos_embed" => continue,
            _ => size_suffix(name),
        };
        let rule = match rule {
            "offset" => ResizeRule::Offset,
            "size" => ResizeRule::Size,
            _ => panic!("unknown rule in `{name}`"),
        };
        let resized =
            PositionEmbedding::new(embedding.clone(), rule).and_then(|p| p.resized((height, width)));
        check(&file, name, &ok(resized));
    }
}

/// The integer hash that fills tensor number `number` of the weight formula: uniform in (-1, 1).
fn formula(number: u32, count: usize) -> impl Iterator<Item = f64> {
    let offset = number.wrapping_mul(0x9E37_79B9);
    (0..count as u32).map(move |element| {
        let mut x = element.wrapping_add(offset);
        x ^= x >> 16;
        x = x.wrapping_mul(0x7feb_352d);
        x ^= x >> 15;
        x = x.wrapping_mul(0x846c_a68b);
        x ^= x >> 16;
        (f64::from(x) + 0.5) / 4_294_967_296.0 * 2.0 - 1.0
    })
}

fn formula_weights(architecture: &Architecture, order: &[String], salt: u32) -> Parameters {
    let shapes = architecture.specification();
    let fill = |(number, name): (usize, &String)| {
        let spec = shapes.iter().find(|spec| spec.name == *name);
        let shape = &spec.unwrap_or_else(|| panic!("`{name}` is not part of the model")).shape;
        let count: usize = shape.iter().product();
        let fan_in = count / shape[0];
        let scale: Box<dyn Fn(f64) -> f64> = if name.contains("norm") && name.ends_with("weight") {
            Box::new(|v| 1.0 + 0.2 * v)
        } else if name.ends_with("bias") {
            Box::new(|v| 0.1 * v)
        } else if name.ends_with("pos_embed") || name.ends_with("cls_token") {
            Box::new(|v| 0.5 * v)
        } else {
            Box::new(move |v| v * (3.0 / fan_in as f64).sqrt())
        };
        let data: Vec<f32> =
            formula(salt.wrapping_add(number as u32), count).map(|v| scale(v) as f32).collect();
        (name.clone(), ok(Tensor::from_vec(data, shape.as_slice(), device())))
    };
    order.iter().enumerate().map(fill).collect()
}

pub(crate) fn full_arch(golden: &Golden) {
    let file = golden.file("full_arch.safetensors");
    let formula_entry = &file.entry()["weight_formula"];
    let salt = formula_entry["salt"].as_u64().expect("salt") as u32;
    for case in super::cases(&file) {
        let (arch, height, width) = size_suffix(&case);
        let size = |key: &str| {
            formula_entry[arch][key].as_u64().unwrap_or_else(|| panic!("no {key} for {arch}")) as usize
        };
        let order = &formula_entry["tensor_order"][arch];
        let order: Vec<String> =
            serde_json::from_value(order.clone()).unwrap_or_else(|error| panic!("{arch}: {error}"));
        let grid = 14;
        let architecture = backbone(size("dim"), size("depth"), size("heads"), 16, grid);
        let parameters = formula_weights(&architecture, &order, salt);
        let image: Vec<f32> =
            formula(9999u32.wrapping_add(salt), 3 * height * width).map(|v| (1.5 * v) as f32).collect();
        let image = ok(Tensor::from_vec(image, (1, 3, height, width), device()));
        full_size_case(&file, &case, &architecture, &parameters, &image, Ops::fused());
    }
}

fn full_size_case(
    file: &GoldenFile<'_>,
    case: &str,
    architecture: &Architecture,
    parameters: &Parameters,
    image: &Tensor,
    ops: Ops,
) {
    let vit = ok(Vit::new(parameters, "backbone", architecture, ops));
    let (patches, grid) = ok(vit.patchify(image));
    let features = ok(vit.forward(&patches, grid, None));
    let every_16th = |x: &Tensor| {
        let (rows, dim) = ok(x.dims2());
        ok(x.reshape((rows, dim / 16, 16)).and_then(|x| x.narrow(2, 0, 1)).and_then(|x| x.squeeze(2)))
    };
    check(file, &format!("{case}.features"), &every_16th(&ok(features.squeeze(0))));
    let all = values(&features);
    let count = all.len() as f64;
    let mean = all.iter().map(|&v| f64::from(v)).sum::<f64>() / count;
    let variance = all.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / (count - 1.0);
    let largest = all.iter().fold(0f32, |max, v| max.max(v.abs()));
    file.check(&format!("{case}.feature_stats"), &[mean as f32, variance.sqrt() as f32, largest]);
    if !file.contains(&format!("{case}.aggregated")) {
        return;
    }

    let head = ok(AggregationHead::new(parameters, "ca_head", architecture.heads, ops));
    let matching = Matching::from_config(&TrainConfig::default().patch);
    let positives = ok(matching::positives(&features, grid, &matching));
    let teacher = ok(head.forward(&features, Some(&positives)));
    let patches = teacher.patches.expect("positives were given");
    let tokens = ok(Tensor::cat(&[&teacher.class, &patches], 1).and_then(|x| head.normalize(&x)));
    // patches whose 4th and 5th best similarity are nearly equal are zeroed in the set
    let (dims, similarities) = ok(matching::similarities(&features, grid, &matching));
    let k = matching.k();
    let comparable: Vec<f32> = similarities
        .chunks(dims)
        .map(|row| {
            let mut row = row.to_vec();
            row.sort_by(|a, b| b.total_cmp(a));
            f32::from(row[k - 1] - row[k] > 1e-4)
        })
        .collect();
    let (expected, _) = file.tensor(&format!("{case}.comparable"));
    let differing = comparable.iter().zip(expected).filter(|(a, b)| a != b).count();
    // a margin next to the threshold may fall on either side
    assert!(differing * 50 <= expected.len(), "{case}: {differing} patches comparable on one side only");
    let mask: Vec<f32> = std::iter::once(1.0).chain(expected.iter().copied()).collect();
    file.check(&format!("{case}.comparable"), expected);
    let rows = mask.len();
    let mask = ok(Tensor::from_vec(mask, (rows, 1), device()));
    let masked = ok(tokens.squeeze(0).and_then(|x| x.broadcast_mul(&mask)));
    check(file, &format!("{case}.aggregated"), &every_16th(&masked));

    let student = ok(head.forward(&features, None));
    let tokens = ok(Tensor::cat(&[&student.class, &features], 1).and_then(|x| head.normalize(&x)));
    check(file, &format!("{case}.student_tokens"), &every_16th(&ok(tokens.squeeze(0))));
}

pub(crate) fn init_stats(golden: &Golden) {
    let json = golden.json("init_stats.json");
    let shape = |name: &str| {
        let pointer = format!("/parameters/{}/shape", pass_tests::json::escape(name));
        json.numbers(&pointer).into_iter().map(|side| side as usize).collect::<Vec<_>>()
    };
    let names = json.keys("/parameters");
    let depth = names.iter().filter(|name| name.ends_with("attn.qkv.bias")).count();
    let embedding = shape("backbone.pos_embed");
    let convolution = shape("backbone.patch_embed.proj.weight");
    let trainable_magnitude =
        json.read("/parameters/c_head.last_layer.weight_g/trainable").as_bool().expect("a flag");
    let (hidden, bottleneck) = (shape("c_head.mlp.0.weight")[0], shape("c_head.mlp.4.weight")[0]);
    let class_head = [embedding[2], hidden, bottleneck, shape("c_head.last_layer.weight_v")[0]];
    let architecture = Architecture {
        grid: embedding[1].isqrt(),
        patch_size: convolution[3],
        head_hidden: hidden,
        head_bottleneck: bottleneck,
        image_heads: projection_head(HEAD, class_head, !trainable_magnitude),
        patch_prototypes: Some(shape("p_head.last_layer.weight_v")[0]),
        norm_last_layer: !trainable_magnitude,
        ..backbone(embedding[2], depth, 1, 1, 1)
    };
    let parameters = ok(Parameters::init(&architecture, Role::Student, 7, device()));
    assert_eq!(parameters.count(), json.whole("/total_parameters"), "number of values");
    assert_eq!(parameters.iter().count(), names.len(), "number of tensors");
    for name in names {
        let pointer = |key: &str| format!("/parameters/{}/{key}", pass_tests::json::escape(&name));
        let expected = |key: &str| json.number(&pointer(key));
        let parameter = parameters.iter().find(|(own, _)| *own == name);
        let (_, parameter) = parameter.unwrap_or_else(|| panic!("`{name}` is not part of the model"));
        assert_eq!(parameter.tensor.dims(), shape(&name), "{name}: shape");
        assert_eq!(
            Some(parameter.trainable),
            json.read(&pointer("trainable")).as_bool(),
            "{name}: trainable"
        );
        let (mean, std) = (expected("mean"), expected("std"));
        let (low, high) = (expected("min"), expected("max"));
        let data = values(&parameter.tensor);
        let count = data.len() as f64;
        let own_mean = data.iter().map(|&v| f64::from(v)).sum::<f64>() / count;
        let own_std = (data.iter().map(|&v| (f64::from(v) - own_mean).powi(2)).sum::<f64>() / count).sqrt();
        // both are samples: their means differ by a few standard errors, their deviations likewise
        assert!(
            (own_mean - mean).abs() <= 6.0 * std * (2.0 / count).sqrt() + 1e-9,
            "{name}: mean {own_mean}, {mean}"
        );
        assert!(
            (own_std - std).abs() <= 6.0 * std / count.sqrt() + 1e-9,
            "{name}: deviation {own_std}, {std}"
        );
        let (own_low, own_high) =
            data.iter().fold((f32::MAX, f32::MIN), |(low, high), &v| (low.min(v), high.max(v)));
        let slack = 2.0 * std + 1e-9;
        assert!((f64::from(own_low) - low).abs() <= slack, "{name}: minimum {own_low}, {low}");
        assert!((f64::from(own_high) - high).abs() <= slack, "{name}: maximum {own_high}, {high}");
    }
}

#[test]
fn every_preset_size_builds_and_runs() {
    let mut config = TrainConfig::default();
    config.head.hidden = 16;
    config.head.bottleneck = 8;
    config.head.class_prototypes = 16;
    config.head.patch_prototypes = 16;
    for (arch, patch_size, side) in
        [(Arch::VitTiny, 8, 24), (Arch::VitSmall, 14, 28), (Arch::VitBase, 16, 32)]
    {
        config.model.arch = arch;
        config.model.patch_size = patch_size;
        config.augment.global_size = side;
        let architecture = Architecture::from_config(&config);
        let parameters = ok(Parameters::init(&architecture, Role::Teacher, 1, device()));
        let network = ok(Network::new(&architecture, parameters, Ops::fused()));
        let images = ok(Tensor::randn(0f32, 1.0, (1, 3, side, 2 * side), device()));
        let (patches, grid) = ok(network.backbone.patchify(&images));
        let features = ok(network.backbone.forward(&patches, grid, None));
        assert_eq!(features.dims(), [1, grid.0 * grid.1, architecture.dim]);
        assert!(
            ok(ok(features.abs())
                .max(D::Minus1)
                .and_then(|x| x.max_all())
                .and_then(|x| x.to_scalar::<f32>()))
            .is_finite()
        );
    }
}
