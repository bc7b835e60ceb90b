//! The training operations, forward and forward + backward, at the sizes of ViT-Ti/16 with two global crops of four
//! images; each checked against its composition before it is timed. `peer/step.py --ops` times PyTorch on the same.
//!
//! Run with `CANDLE_NUM_THREADS=1 RAYON_NUM_THREADS=2 cargo bench -p pass-host --bench ops`.

use candle_core::{DType, Device, Result, Tensor, Var};
use divan::Bencher;
use pass_host::ops::{
    AdamWStep, BlockWeights, GradientSink, HeadWeights, Ops, Plan, Positives, Sequences, Targets,
};
use pass_host::random::{Purpose, Stream};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    divan::main();
}

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Pass {
    Forward,
    Backward,
}

const PASSES: [Pass; 2] = [Pass::Forward, Pass::Backward];

fn random(seed: u64, shape: &[usize]) -> Tensor {
    let mut stream = Stream::new(seed, Purpose::Init, &[]);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| stream.normal() as f32).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).expect("as many values as the shape holds")
}

/// Largest difference, relative to the largest value.
fn difference(a: &Tensor, b: &Tensor) -> f32 {
    let largest = |t: &Tensor| t.abs().and_then(|t| t.flatten_all()?.max(0)?.to_scalar::<f32>());
    (a - b).and_then(|d| Ok(largest(&d)? / largest(b)?.max(1e-30))).expect("equal shapes")
}

/// Compares output and gradients with the composition, then times the fused operation.
fn time(
    bencher: Bencher<'_, '_>,
    pass: Pass,
    shapes: &[&[usize]],
    function: impl Fn(Ops, &[Tensor]) -> Result<Tensor>,
) {
    let inputs: Vec<Tensor> = shapes
        .iter()
        .enumerate()
        .map(|(i, shape)| Var::from_tensor(&random(i as u64, shape)).expect("a variable").into_inner())
        .collect();
    let run = |ops: Ops| {
        let output = function(ops, &inputs).expect("valid shapes");
        let gradients = output.backward().expect("differentiable");
        let gradients: Vec<_> =
            inputs.iter().map(|t| gradients.get(t).expect("a gradient").clone()).collect();
        (output, gradients)
    };
    let ((output, gradients), (twin, twin_gradients)) = (run(Ops::fused()), run(Ops::reference()));
    assert!(difference(&output, &twin) < 1e-4, "output");
    for (i, (gradient, twin)) in gradients.iter().zip(&twin_gradients).enumerate() {
        assert!(difference(gradient, twin) < 1e-4, "gradient {i}: {}", difference(gradient, twin));
    }
    match pass {
        Pass::Forward => bencher.bench_local(|| function(Ops::fused(), &inputs)),
        Pass::Backward => bencher.bench_local(|| function(Ops::fused(), &inputs)?.backward()),
    }
}

#[divan::bench(args = PASSES)]
fn layer_norm(bencher: Bencher<'_, '_>, pass: Pass) {
    time(bencher, pass, &[&[8, 196, 192], &[192], &[192]], |ops, t| {
        ops.layer_norm(&t[0], &t[1], &t[2], 1e-6)
    });
}

#[divan::bench(args = PASSES)]
fn linear_qkv(bencher: Bencher<'_, '_>, pass: Pass) {
    time(bencher, pass, &[&[8, 196, 192], &[576, 192], &[576]], |ops, t| {
        ops.linear(&t[0], &t[1], Some(&t[2]))
    });
}

#[divan::bench(args = PASSES)]
fn linear_fc2(bencher: Bencher<'_, '_>, pass: Pass) {
    time(bencher, pass, &[&[8, 196, 768], &[192, 768], &[192]], |ops, t| {
        ops.linear(&t[0], &t[1], Some(&t[2]))
    });
}

#[divan::bench(args = PASSES)]
fn linear_gelu_fc1(bencher: Bencher<'_, '_>, pass: Pass) {
    time(bencher, pass, &[&[8, 196, 192], &[768, 192], &[768]], |ops, t| {
        ops.linear_gelu(&t[0], &t[1], &t[2])
    });
}

#[divan::bench(args = PASSES, sample_count = 20)]
fn linear_gelu_head(bencher: Bencher<'_, '_>, pass: Pass) {
    time(bencher, pass, &[&[1856, 2048], &[2048, 2048], &[2048]], |ops, t| {
        ops.linear_gelu(&t[0], &t[1], &t[2])
    });
}

#[divan::bench(args = PASSES, sample_count = 20)]
fn linear_prototypes(bencher: Bencher<'_, '_>, pass: Pass) {
    time(bencher, pass, &[&[1856, 256], &[4096, 256]], |ops, t| ops.linear(&t[0], &t[1], None));
}

#[divan::bench(args = PASSES)]
fn attention(bencher: Bencher<'_, '_>, pass: Pass) {
    time(bencher, pass, &[&[8, 196, 576]], |ops, t| ops.attention(&t[0], 3));
}

#[divan::bench(args = PASSES)]
fn class_attention(bencher: Bencher<'_, '_>, pass: Pass) {
    time(bencher, pass, &[&[8, 1, 192], &[8, 197, 192], &[8, 197, 192]], |ops, t| {
        ops.class_attention(&t[0], &t[1], &t[2], 3)
    });
}

/// A weight and a bias of the size of a trained layer, which are no variables: their gradients are formed and dropped.
fn layer(seed: u64, outputs: usize, inputs: usize) -> [Tensor; 2] {
    let weight = (random(seed, &[outputs, inputs]) * (inputs as f64).powf(-0.5)).expect("a tensor");
    [weight, random(seed + 1, &[outputs])]
}

/// One block of ViT-Ti over two global and two local crops of four images.
#[divan::bench(args = PASSES, sample_count = 20)]
fn transformer_block(bencher: Bencher<'_, '_>, pass: Pass) {
    let block = BlockWeights {
        norm1: [random(1, &[192]), random(2, &[192])],
        qkv: layer(3, 576, 192),
        proj: layer(5, 192, 192),
        norm2: [random(7, &[192]), random(8, &[192])],
        fc1: layer(9, 768, 192),
        fc2: layer(11, 192, 768),
    };
    let plan = Plan {
        heads: 3,
        eps: 1e-6,
        groups: vec![Sequences { images: 8, tokens: 196 }, Sequences { images: 8, tokens: 36 }],
        scales: vec![[None, None]],
        recompute: false,
    };
    let sink = GradientSink::default();
    time(bencher, pass, &[&[1856, 192]], |ops, t| {
        ops.transformer(&t[0], std::slice::from_ref(&block), &plan, &sink)
    });
}

/// The patch head of ViT-Ti with its loss.
#[divan::bench(args = PASSES, sample_count = 10)]
fn projection_loss_patch(bencher: Bencher<'_, '_>, pass: Pass) {
    let head = HeadWeights {
        layers: [layer(1, 2048, 192), layer(3, 2048, 2048), layer(5, 256, 2048)],
        magnitude: Tensor::ones((4096, 1), DType::F32, &Device::Cpu).expect("a tensor"),
        direction: random(7, &[4096, 256]),
        eps: 1e-12,
    };
    let (teacher, center) = (random(8, &[1856, 4096]), random(9, &[4096]));
    let pairs: Vec<_> = (0..1856).map(|row| (row, row)).collect();
    let sink = GradientSink::default();
    time(bencher, pass, &[&[1856, 192]], |ops, t| {
        let targets = Targets {
            teacher: &teacher,
            center: &center,
            temperatures: [0.1, 0.04],
            pairs: &pairs,
            weights: (1.0 / 1856.0).into(),
        };
        Ok(ops.projection_loss(&t[0], &head, &targets, &sink)?.0)
    });
}

/// Four random positives of every patch.
fn positives() -> Positives {
    let mut stream = Stream::new(1, Purpose::Init, &[]);
    let index = (0..8 * 196 * 4).map(|_| stream.below(196) as u32).collect();
    Positives::new(index, vec![4; 196], 4, 8, 196).expect("indices below 196")
}

#[divan::bench(args = PASSES)]
fn neighbor_attention(bencher: Bencher<'_, '_>, pass: Pass) {
    let positives = positives();
    time(bencher, pass, &[&[8, 196, 192], &[8, 196, 384], &[8, 196, 384]], |ops, t| {
        ops.neighbor_attention(&t[0], &t[1], &t[2], &positives, 3)
    });
}

#[divan::bench(args = PASSES)]
fn gather_mean(bencher: Bencher<'_, '_>, pass: Pass) {
    let positives = positives();
    time(bencher, pass, &[&[8, 196, 192]], |ops, t| ops.gather_mean(&t[0], &positives));
}

#[divan::bench(args = PASSES)]
fn l2_normalize(bencher: Bencher<'_, '_>, pass: Pass) {
    time(bencher, pass, &[&[1856, 256]], |ops, t| ops.l2_normalize(&t[0], 1e-12));
}

#[divan::bench(args = PASSES)]
fn weight_norm(bencher: Bencher<'_, '_>, pass: Pass) {
    time(bencher, pass, &[&[4096, 256], &[4096, 1]], |ops, t| ops.weight_norm(&t[0], &t[1]));
}

#[divan::bench(args = PASSES)]
fn add_scaled(bencher: Bencher<'_, '_>, pass: Pass) {
    let scale = [0.0, 1.1, 1.1, 1.1, 1.1, 0.0, 1.1, 1.1];
    time(bencher, pass, &[&[8, 196, 192], &[8, 196, 192]], |ops, t| {
        ops.add_scaled(&t[0], &t[1], Some(&scale))
    });
}

#[divan::bench(args = PASSES, sample_count = 20)]
fn cross_entropy_patch(bencher: Bencher<'_, '_>, pass: Pass) {
    let (teacher, center) = (random(7, &[1856, 4096]), random(8, &[4096]));
    let pairs: Vec<_> = (0..1856).map(|row| (row, row)).collect();
    time(bencher, pass, &[&[1856, 4096]], |ops, t| {
        ops.cross_entropy(&t[0], &teacher, &center, 0.1, 0.04, &pairs, 1.0 / 1856.0)
    });
}

#[divan::bench(args = PASSES, sample_count = 20)]
fn cross_entropy_class(bencher: Bencher<'_, '_>, pass: Pass) {
    // four images: two teacher crops against the three other student crops
    let (teacher, center) = (random(7, &[8, 65536]), random(8, &[65536]));
    let crops = (0..2).flat_map(|t| (0..4).filter(move |&s| s != t).map(move |s| (s, t)));
    let pairs: Vec<_> = crops.flat_map(|(s, t)| (0..4).map(move |i| (4 * s + i, 4 * t + i))).collect();
    time(bencher, pass, &[&[16, 65536]], |ops, t| {
        ops.cross_entropy(&t[0], &teacher, &center, 0.1, 0.04, &pairs, 1.0 / 24.0)
    });
}

#[divan::bench]
fn patchify(bencher: Bencher<'_, '_>) {
    let images = random(1, &[8, 3, 224, 224]);
    let of = |ops: Ops| ops.patchify(&images, 16).expect("224 = 14 · 16");
    assert_eq!(difference(&of(Ops::fused()), &of(Ops::reference())), 0.0);
    bencher.bench_local(|| of(Ops::fused()));
}

/// One head layer: 2048 × 2048.
#[divan::bench]
fn adamw_ema_step(bencher: Bencher<'_, '_>) {
    let shape = [2048, 2048];
    let state = || [1, 2, 3].map(|seed| Var::from_tensor(&random(seed, &shape)).expect("a variable"));
    let second = || Tensor::ones(&shape, DType::F32, &Device::Cpu).expect("a tensor");
    let gradient = random(4, &shape);
    let step = AdamWStep {
        lr: 1e-3,
        weight_decay: 0.04,
        betas: [0.9, 0.999],
        eps: 1e-8,
        step: 3,
        gradient_scale: 0.5,
        momentum: 0.996,
    };
    let run = |ops: Ops, [student, first, teacher]: &[Var; 3], second: &Tensor| {
        ops.adamw_ema_step(student, &gradient, first, second, Some(teacher), &step).expect("equal shapes");
    };
    let ((fused, fused_second), (plain, plain_second)) = ((state(), second()), (state(), second()));
    run(Ops::fused(), &fused, &fused_second);
    run(Ops::reference(), &plain, &plain_second);
    for (fused, plain) in fused.iter().zip(&plain) {
        assert!(difference(fused, plain) < 1e-6);
    }
    bencher.bench_local(|| run(Ops::fused(), &fused, &fused_second));
}

#[divan::bench]
fn grad_norm(bencher: Bencher<'_, '_>) {
    let gradient = random(1, &[2048, 2048]);
    let of = |ops: Ops| ops.grad_norm(&gradient).expect("a number");
    assert!((of(Ops::fused()) / of(Ops::reference()) - 1.0).abs() < 1e-9);
    bencher.bench_local(|| of(Ops::fused()));
}
