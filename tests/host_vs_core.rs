//! The trainer's tensors against `pass-core` on the same random input: matching, aggregation, losses, every switch.

use candle_core::{Device, Tensor};
use ndarray::{Array2, ArrayView3};
use pass_core::aggregation::{AggregationHead, mean_into};
use pass_core::class_attention::{ClassAttention, ClassAttentionParameters};
use pass_core::layers::LayerNorm;
use pass_core::loss::{Temperatures, class_loss, loss_scratch_len, patch_loss};
use pass_core::matching::{Matches, NO_MATCH};
use pass_core::shape::{TokenBatch, Tokens};
use pass_host::config::{AllPatches, Border, PatchObjective, TrainConfig, Window};
use pass_host::model::aggregation;
use pass_host::model::parameters::{Parameters, Role};
use pass_host::model::{Architecture, CLASS_ATTENTION_BLOCKS};
use pass_host::objective::loss::{class_pairs, patch_pairs};
use pass_host::objective::matching::{self, Matching};
use pass_host::ops::Ops;
use pass_host::random::{Purpose, Stream};

fn ok<T>(result: candle_core::Result<T>) -> T {
    result.unwrap_or_else(|error| panic!("{error}"))
}

fn normal(seed: u64, count: usize) -> Vec<f32> {
    let mut stream = Stream::new(seed, Purpose::Subset, &[]);
    (0..count).map(|_| stream.normal() as f32).collect()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    ok(tensor.flatten_all().and_then(|x| x.to_vec1()))
}

#[track_caller]
fn assert_close(actual: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    for (index, (a, b)) in actual.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= tolerance * (1.0 + b.abs()), "{what}[{index}]: host {a}, core {b}");
    }
}

fn rules() -> Vec<(&'static str, PatchObjective)> {
    let rule = |border, window, k| PatchObjective { border, window, k, ..PatchObjective::default() };
    let all = Window::All(AllPatches::All);
    vec![
        ("wrap", rule(Border::Wrap, Window::Side(3), 4)),
        ("clip", rule(Border::Clip, Window::Side(3), 4)),
        ("wrap, window 5", rule(Border::Wrap, Window::Side(5), 6)),
        ("all others", rule(Border::Wrap, all, 9)),
    ]
}

const HEADS: usize = 3;
const DIM: usize = 24;

/// An aggregation head with weights far from their small initial values.
fn head_parameters() -> Parameters {
    let mut config = TrainConfig::default();
    config.model.arch = pass_host::config::Arch::Custom;
    (config.model.dim, config.model.depth, config.model.heads) = (DIM, 1, HEADS);
    let architecture = Architecture::from_config(&config);
    let initial = ok(Parameters::init(&architecture, Role::Teacher, 5, &Device::Cpu));
    let named = initial.to_tensors().into_iter().filter(|(name, _)| name.starts_with("ca_head."));
    let spread = |(index, (name, tensor)): (usize, (String, Tensor))| {
        let noise = normal(100 + index as u64, tensor.elem_count());
        let noise = ok(Tensor::from_vec(noise, tensor.shape(), &Device::Cpu).and_then(|noise| noise * 0.2));
        (name, ok(tensor + noise))
    };
    named.enumerate().map(spread).collect()
}

#[test]
fn positives_and_aggregates_agree() {
    let parameters = head_parameters();
    let host = ok(aggregation::AggregationHead::new(&parameters, "ca_head", HEADS, Ops::fused()));
    let of = |name: &str| values(&ok(parameters.get(name)));
    let blocks: Vec<ClassAttentionParameters<Vec<f32>>> = (0..CLASS_ATTENTION_BLOCKS)
        .map(|block| {
            ClassAttentionParameters::from_fn(|name| of(&format!("ca_head.cls_blocks.{block}.{name}")))
        })
        .collect();
    let blocks: Vec<ClassAttention<'_>> = blocks
        .iter()
        .map(|block| ClassAttention::new(block.as_ref().map(Vec::as_slice), HEADS).expect("a valid block"))
        .collect();
    let (class, norm) = (of("ca_head.cls_token"), [of("ca_head.norm.weight"), of("ca_head.norm.bias")]);
    let norm = LayerNorm::new(&norm[0], &norm[1]).expect("a valid norm");
    let core = AggregationHead::new(&class, &blocks, norm).expect("a valid head");

    for (name, rule) in rules() {
        let matching = Matching::from_config(&rule);
        for (height, width) in [(6, 6), (3, 7), (1, 9)] {
            let (batch, patches) = (2, height * width);
            let features = normal(7, batch * patches * DIM);
            let tensor = ok(Tensor::from_slice(&features, (batch, patches, DIM), &Device::Cpu));
            let positives = ok(matching::positives(&tensor, (height, width), &matching));
            let aggregated = ok(host.forward(&tensor, Some(&positives)));
            let aggregates = aggregated.patches.expect("positives were given");
            let tokens =
                ok(Tensor::cat(&[&aggregated.class, &aggregates], 1).and_then(|x| host.normalize(&x)));
            let student = ok(host.forward(&tensor, None).and_then(|x| host.normalize(&x.class)));
            let mean = values(&ok(Ops::fused().gather_mean(&tensor, &positives)));

            let view = ArrayView3::from_shape((batch, patches, DIM), &features).expect("the shape fits");
            let images = TokenBatch::try_from(view).expect("contiguous").images();
            let k = positives.k();
            for (image, tokens_of_image) in images.enumerate() {
                let chosen: Vec<u32> = (0..patches)
                    .flat_map(|patch| {
                        let of = positives.of(image, patch);
                        (0..k).map(|slot| of.get(slot).copied().unwrap_or(NO_MATCH)).collect::<Vec<_>>()
                    })
                    .collect();
                let matches = Matches::new(&chosen, patches, k).expect("valid matches");
                let mut scratch = vec![0.0; core.scratch_len(patches)];
                let mut out = vec![0.0; (1 + patches) * DIM];
                core.aggregate_into(tokens_of_image, matches, &mut scratch, &mut out).expect("aggregation");
                let own = values(&ok(tokens.get(image)));
                assert_close(&own, &out, 2e-5, &format!("{name} {height}x{width}: aggregates"));
                core.class_into(tokens_of_image, &mut scratch, &mut out).expect("class token");
                assert_close(&values(&ok(student.get(image))), &out[..DIM], 2e-5, "class token");
                let mut expected = vec![0.0; patches * DIM];
                mean_into(tokens_of_image, matches, &mut expected).expect("mean");
                assert_close(&mean[image * patches * DIM..][..patches * DIM], &expected, 1e-6, "mean");
            }
        }
    }
}

#[test]
fn losses_agree() {
    let (batch, globals, locals, prototypes) = (3, 2, 2, 40);
    let crops = globals + locals;
    let temperatures = Temperatures { student: 0.1, teacher: 0.05 };
    let center = normal(1, prototypes);
    let logits = |seed, rows| {
        Array2::from_shape_vec((rows, prototypes), normal(seed, rows * prototypes)).expect("fits")
    };
    let tensor = |array: &Array2<f32>| {
        ok(Tensor::from_slice(array.as_slice().expect("contiguous"), array.dim(), &Device::Cpu))
    };
    let mut scratch = vec![0.0; loss_scratch_len(prototypes)];
    let loss = |student: &Array2<f32>, teacher: &Array2<f32>, pairs: &[(u32, u32)], weights: &[f32]| {
        let center = ok(Tensor::from_slice(&center, prototypes, &Device::Cpu));
        let (student, teacher) = (tensor(student), tensor(teacher));
        let loss =
            ok(Ops::fused().cross_entropy_with_stats(&student, &teacher, &center, 0.1, 0.05, pairs, weights));
        ok(loss.0.to_scalar::<f32>())
    };

    let (student, teacher) = (logits(2, crops * batch), logits(3, crops * batch));
    let (pairs, weight) = class_pairs(batch, globals, locals);
    let own = loss(&student, &teacher, &pairs, &vec![weight; pairs.len()]);
    let rows = |array: &Array2<f32>, counts: &[usize]| -> Vec<Vec<f32>> {
        let mut start = 0;
        let cut = |&count: &usize| {
            let part = array.slice(ndarray::s![start..start + count, ..]).iter().copied().collect();
            start += count;
            part
        };
        counts.iter().map(cut).collect()
    };
    let per_crop = vec![batch; crops];
    let (s, t) = (rows(&student, &per_crop), rows(&teacher, &per_crop[..globals]));
    let (s, t): (Vec<&[f32]>, Vec<&[f32]>) =
        (s.iter().map(Vec::as_slice).collect(), t.iter().map(Vec::as_slice).collect());
    let expected = class_loss(&t, &s, &center, temperatures, &mut scratch).expect("class loss");
    assert_close(&[own], &[expected], 1e-5, "class loss");

    let groups = [(globals, 9), (locals, 4)];
    let (pairs, weights) = patch_pairs(batch, &groups);
    let (student, teacher) = (logits(4, pairs.len()), logits(5, pairs.len()));
    let own = loss(&student, &teacher, &pairs, &weights);
    let counts: Vec<usize> =
        groups.iter().flat_map(|&(crops, patches)| vec![batch * patches; crops]).collect();
    let (s, t) = (rows(&student, &counts), rows(&teacher, &counts));
    let (s, t): (Vec<&[f32]>, Vec<&[f32]>) =
        (s.iter().map(Vec::as_slice).collect(), t.iter().map(Vec::as_slice).collect());
    let expected = patch_loss(&t, &s, &center, temperatures, &mut scratch).expect("patch loss");
    assert_close(&[own], &[expected], 1e-5, "patch loss");
}

#[test]
fn a_view_that_is_not_contiguous_is_refused() {
    let array = Array2::<f32>::zeros((4, 6));
    assert!(Tokens::try_from(array.view()).is_ok());
    assert!(Tokens::try_from(array.slice(ndarray::s![.., ..3])).is_err());
}
