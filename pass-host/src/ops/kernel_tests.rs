//! Every CUDA kernel against the compositions, in `f32` and `bf16`, forward and backward: run by the emulator, or with
//! `PASS_DEVICE=cuda` (and the feature `cuda`) on the first GPU. Both with the same tolerances.

use super::positives::tests::random_positives;
use super::testing::{Function, Pass, assert_close, flat, numbers, pass_as_they_are, random, weighted};
use super::{AdamWStep, Learned, Ops, PairWeights, Update};
use candle_core::{DType, Device, Result, Tensor, Var};
use std::sync::OnceLock;

/// The GPU if `PASS_DEVICE=cuda`, else the CPU, where the emulator runs.
pub(super) fn device() -> Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    let open = || match std::env::var("PASS_DEVICE").as_deref() {
        Ok("cuda") => super::open_cuda(0).expect("PASS_DEVICE=cuda needs a GPU and the feature `cuda`"),
        Ok("cpu") | Err(_) => Device::Cpu,
        Ok(other) => panic!("PASS_DEVICE={other}: expected cpu or cuda"),
    };
    DEVICE.get_or_init(open).clone()
}

/// What runs the kernels there.
fn kernels() -> Ops {
    if device().is_cpu() { Ops::emulated() } else { Ops::fused() }
}

fn here(tensor: &Tensor) -> Tensor {
    tensor.to_device(&device()).unwrap()
}

/// Checks the kernels of an operation in `f32`: called by the check of every operation.
pub(super) fn check_kernels(function: Function<'_>, inputs: &[Tensor], double: &Pass) {
    let inputs: Vec<Tensor> = inputs.iter().map(here).collect();
    let found = pass_as_they_are(kernels(), function, &inputs);
    assert_close("kernel output", &found.output, &double.output, 1e-5);
    compare_gradients("kernel", &found, double, 1e-5);
    let again = pass_as_they_are(kernels(), function, &inputs);
    assert!(again.output == found.output && again.gradients == found.gradients, "the same bits again");
    for i in 0..inputs.len() {
        let variable = Var::from_tensor(&inputs[i]).unwrap();
        let mut arguments = inputs.clone();
        arguments[i] = variable.as_tensor().clone();
        let store = weighted(&function(kernels(), &arguments).unwrap()).backward().unwrap();
        let alone = flat(store.get(variable.as_tensor()).expect("gradient of the only variable"));
        assert!(alone == found.gradients[i], "kernel gradient {i} changes when nothing else is tracked");
    }
    assert!(!function(kernels(), &inputs).unwrap().track_op(), "tracked without a variable");
}

fn compare_gradients(what: &str, found: &Pass, exact: &Pass, tolerance: f64) {
    for (i, (found, exact)) in found.gradients.iter().zip(&exact.gradients).enumerate() {
        let scale = exact.iter().fold(1.0f64, |a, b| a.max(b.abs()));
        let scaled = |values: &[f64]| values.iter().map(|v| v / scale).collect::<Vec<_>>();
        assert_close(&format!("{what} gradient {i}"), &scaled(found), &scaled(exact), tolerance);
    }
}

/// `‖a − b‖ / ‖b‖`.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    (square(&mut a.iter().zip(b).map(|(a, b)| a - b)) / square(&mut b.iter().copied()).max(1e-30)).sqrt()
}

/// Checks an operation whose activations are `bf16`: against the exact result of the same rounded inputs, and not
/// further from it than a few roundings to 8 bits.
fn check_half(function: Function<'_>, activations: &[&[usize]], parameters: &[&[usize]]) {
    let mut inputs = Vec::new();
    for (i, shape) in activations.iter().enumerate() {
        inputs.push(random(i as u64 + 1, shape).to_dtype(DType::BF16).unwrap());
    }
    for (i, shape) in parameters.iter().enumerate() {
        inputs.push(random(i as u64 + 50, shape));
    }
    let wide: Vec<Tensor> = inputs.iter().map(|t| t.to_dtype(DType::F32).unwrap()).collect();
    let exact = pass_as_they_are(Ops::reference(), function, &wide);
    let on_device: Vec<Tensor> = inputs.iter().map(here).collect();
    for (ops, inputs) in [(kernels(), &on_device), (Ops::reference(), &inputs)] {
        let half = pass_as_they_are(ops, function, inputs);
        let error = distance(&half.output, &exact.output);
        assert!(error < 0.02, "{ops:?}: output is off by {error}");
        for (i, (found, exact)) in half.gradients.iter().zip(&exact.gradients).enumerate() {
            let error = distance(found, exact);
            assert!(error < 0.02, "{ops:?}: gradient {i} is off by {error}");
        }
    }
    let output = function(kernels(), &on_device).unwrap();
    assert!(output.rank() == 0 || output.dtype() == DType::BF16, "{:?}", output.dtype());
    let variables: Vec<Var> = on_device.iter().map(|t| Var::from_tensor(t).unwrap()).collect();
    let arguments: Vec<Tensor> = variables.iter().map(|v| v.as_tensor().clone()).collect();
    let store = weighted(&function(kernels(), &arguments).unwrap()).backward().unwrap();
    for variable in &variables {
        assert_eq!(
            store.get(variable).unwrap().dtype(),
            variable.dtype(),
            "gradients have the type of what they are of"
        );
    }
}

#[test]
fn layer_norm_in_half_precision() {
    for (rows, dim) in [(3, 15), (70, 192), (1030, 7)] {
        check_half(&|ops, t| ops.layer_norm(&t[0], &t[1], &t[2], 1e-6), &[&[rows, dim]], &[&[dim], &[dim]]);
    }
}

#[test]
fn linear_in_half_precision() {
    for (rows, inputs, outputs) in [(1, 1, 1), (17, 16, 33), (140, 24, 32), (600, 8, 16)] {
        let parameters: [&[usize]; 2] = [&[outputs, inputs], &[outputs]];
        check_half(&|ops, t| ops.linear(&t[0], &t[1], Some(&t[2])), &[&[rows, inputs]], &parameters);
        check_half(&|ops, t| ops.linear(&t[0], &t[1], None), &[&[rows, inputs]], &parameters[..1]);
        check_half(&|ops, t| ops.linear_gelu(&t[0], &t[1], &t[2]), &[&[rows, inputs]], &parameters);
    }
}

#[test]
fn attention_in_half_precision() {
    for (images, tokens, heads, dim) in [(1, 1, 1, 1), (2, 5, 3, 4), (1, 37, 2, 17), (3, 17, 1, 16)] {
        check_half(&|ops, t| ops.attention(&t[0], heads), &[&[images, tokens, 3 * heads * dim]], &[]);
    }
}

#[test]
fn class_attention_in_half_precision() {
    for (images, queries, tokens, heads, dim) in [(3, 1, 17, 3, 5), (2, 2, 33, 2, 16), (1, 1, 197, 1, 33)] {
        let (q, kv) = ([images, queries, heads * dim], [images, tokens, heads * dim]);
        check_half(&|ops, t| ops.class_attention(&t[0], &t[1], &t[2], heads), &[&q, &kv, &kv], &[]);
    }
}

#[test]
fn attention_over_positives_in_half_precision() {
    for (batch, patches, k, heads, width) in [(2, 7, 4, 3, 5), (3, 33, 3, 2, 17)] {
        let positives = random_positives(batch, patches, k);
        let dim = heads * width;
        let (all, all_kv) = ([batch, patches, dim], [batch, patches, 2 * dim]);
        for (q, own) in [(all, all_kv), ([1, 1, dim], [1, 1, 2 * dim])] {
            check_half(
                &|ops, t| ops.neighbor_attention(&t[0], &t[1], &t[2], &positives, heads),
                &[&q, &own, &all_kv],
                &[],
            );
        }
        check_half(&|ops, t| ops.gather_mean(&t[0], &positives), &[&all], &[]);
    }
}

#[test]
fn normalization_in_half_precision() {
    check_half(&|ops, t| ops.l2_normalize(&t[0], 1e-12), &[&[5, 37]], &[]);
    check_half(&|ops, t| ops.l2_normalize(&t[0], 100.0), &[&[3, 64]], &[]);
}

#[test]
fn residual_connections_in_half_precision() {
    let scale = [0.0, 1.25, -0.5];
    for shape in [[3, 5, 7], [3, 4, 8]] {
        check_half(&|ops, t| ops.add_scaled(&t[0], &t[1], Some(&scale)), &[&shape, &shape], &[]);
        check_half(&|ops, t| ops.add_scaled(&t[0], &t[1], None), &[&shape, &shape], &[]);
    }
}

#[test]
fn cross_entropy_in_half_precision() {
    let pairs = [(0, 1), (2, 0), (0, 0), (3, 2), (2, 2), (0, 1)];
    for prototypes in [1, 33, 200, 700] {
        let (teacher, center) = (random(7, &[3, prototypes]), random(8, &[prototypes]));
        let teacher = teacher.to_dtype(DType::BF16).unwrap();
        let loss = |ops: Ops, t: &[Tensor]| -> Result<Tensor> {
            let teacher = teacher.to_dtype(t[0].dtype())?.to_device(t[0].device())?;
            let center = center.to_device(t[0].device())?;
            ops.cross_entropy(&t[0], &teacher, &center, 0.5, 0.25, &pairs, PairWeights::Same(0.3))
        };
        check_half(&loss, &[&[5, prototypes]], &[]);
        let student = random(1, &[5, prototypes]).to_dtype(DType::BF16).unwrap();
        let loss = loss(kernels(), &[here(&student)]).unwrap();
        assert_eq!(loss.dtype(), DType::F32, "a loss has full precision");
    }
}

#[test]
fn statistics_agree() {
    let (student, teacher, center) = (random(1, &[5, 77]), random(2, &[3, 77]), random(3, &[77]));
    let pairs = [(0, 1), (2, 0), (0, 0), (3, 2)];
    let of = |ops: Ops| {
        let on = |t: &Tensor| if ops == kernels() { here(t) } else { t.clone() };
        let (student, teacher, center) = (on(&student), on(&teacher), on(&center));
        let result = ops.cross_entropy_with_stats(&student, &teacher, &center, 0.1, 0.07, &pairs, 1.0);
        result.unwrap().1.read().unwrap()
    };
    let (kernels, plain) = (of(kernels()), of(Ops::reference()));
    assert!((kernels.teacher_entropy - plain.teacher_entropy).abs() < 1e-5, "{kernels:?} {plain:?}");
    assert!((kernels.kl - plain.kl).abs() < 1e-4 * plain.kl, "{kernels:?} {plain:?}");
}

#[test]
fn extreme_logits_stay_finite_and_nan_shows() {
    let student = Var::from_tensor(&here(&(random(1, &[2, 50]) * 1e4).unwrap())).unwrap();
    let (teacher, center) = (here(&(random(2, &[2, 50]) * 1e4).unwrap()), here(&random(3, &[50])));
    let loss = |teacher: &Tensor| {
        kernels().cross_entropy(&student, teacher, &center, 0.1, 0.04, &[(0, 0), (1, 1)], 1.0).unwrap()
    };
    let finite = loss(&teacher);
    assert!(finite.to_scalar::<f32>().unwrap().is_finite());
    let gradients = finite.backward().unwrap();
    assert!(flat(gradients.get(&student).unwrap()).iter().all(|v| v.is_finite()));
    assert!(loss(&(&teacher * f64::NAN).unwrap()).to_scalar::<f32>().unwrap().is_nan());
    let qkv = here(&(random(1, &[1, 9, 3 * 4]) * 1e4).unwrap());
    assert!(flat(&kernels().attention(&qkv, 1).unwrap()).iter().all(|v| v.is_finite()));
}

#[test]
fn means_of_rows_agree() {
    for (rows, columns) in [(1, 1), (5, 33), (1300, 40), (33_000, 3)] {
        let values = random(1, &[rows, columns]);
        for values in [values.clone(), values.to_dtype(DType::BF16).unwrap()] {
            let (kernels, plain) =
                (kernels().mean_rows(&here(&values)).unwrap(), Ops::reference().mean_rows(&values).unwrap());
            assert_eq!((kernels.dtype(), plain.dtype()), (DType::F32, DType::F32));
            assert_close("mean", &flat(&kernels), &flat(&plain), 1e-6);
        }
    }
}

#[test]
fn norms_agree_and_show_what_is_not_finite() {
    let mut gradients: Vec<Tensor> =
        [1, 15, 16384, 16385, 40001].iter().map(|&len| random(4, &[len])).collect();
    gradients.push(Tensor::new(&[3e30f32, 4e30], &Device::Cpu).unwrap());
    let all: Vec<&Tensor> = gradients.iter().collect();
    let norms = |ops: Ops| {
        let moved: Vec<Tensor> =
            all.iter().map(|t| if ops == kernels() { here(t) } else { (*t).clone() }).collect();
        let norms = ops.grad_norms(&moved.iter().collect::<Vec<_>>()).unwrap();
        norms.to_vec1::<f64>().unwrap()
    };
    let exact: Vec<f64> = gradients.iter().map(|g| Ops::fused().grad_norm(g).unwrap()).collect();
    for ops in [kernels(), Ops::fused(), Ops::reference()] {
        for (found, exact) in norms(ops).iter().zip(&exact) {
            assert!((found - exact).abs() <= 1e-12 * exact, "{ops:?}: {found} {exact}");
        }
    }
    for bad in [f32::NAN, f32::INFINITY] {
        let gradient = here(&Tensor::new(&[1.0f32, bad], &Device::Cpu).unwrap());
        let norms =
            kernels().grad_norms(&[&here(&gradients[0]), &gradient]).unwrap().to_vec1::<f64>().unwrap();
        assert!(norms[0].is_finite() && !norms[1].is_finite());
    }
}

/// Parameters of odd sizes through three steps: all of them at once.
fn after_three_steps(ops: Ops, device: &Device) -> Vec<Vec<f64>> {
    let shapes: [&[usize]; 4] = [&[1], &[5, 7], &[2, 3, 9001], &[16384]];
    let tensors = |seed: u64| -> Vec<Tensor> {
        let numbers = shapes.iter().enumerate().map(|(i, shape)| random(seed + i as u64, shape));
        numbers.map(|t| t.to_device(device).unwrap()).collect()
    };
    let zeros = || -> Vec<Tensor> {
        shapes.iter().map(|shape| Tensor::zeros(*shape, DType::F32, device).unwrap()).collect()
    };
    let students: Vec<Var> = tensors(1).iter().map(|t| Var::from_tensor(t).unwrap()).collect();
    let (teachers, first, second) = (tensors(20), zeros(), zeros());
    for step in 1..=3 {
        let gradients = tensors(40 + 10 * step);
        let updates: Vec<Update<'_>> = (0..shapes.len())
            .map(|i| Update {
                student: &students[i],
                // the third parameter is frozen, the last has no teacher
                learned: (i != 2).then_some(Learned {
                    gradient: &gradients[i],
                    first: &first[i],
                    second: &second[i],
                }),
                teacher: (i != 3).then_some(&teachers[i]),
                step: AdamWStep {
                    lr: 0.01,
                    weight_decay: 0.1 * i as f64,
                    betas: [0.9, 0.999],
                    eps: 1e-8,
                    step,
                    gradient_scale: 0.5,
                    momentum: 0.9,
                },
            })
            .collect();
        ops.update(&updates).unwrap();
    }
    let students = students.iter().map(|student| flat(student));
    students.chain([teachers, first, second].concat().iter().map(flat)).collect()
}

#[test]
fn updates_of_all_parameters_agree() {
    let plain = after_three_steps(Ops::reference(), &Device::Cpu);
    for (ops, device) in [(kernels(), device()), (Ops::fused(), Device::Cpu)] {
        for (i, (found, plain)) in after_three_steps(ops, &device).iter().zip(&plain).enumerate() {
            assert_close(&format!("{ops:?} tensor {i}"), found, plain, 2e-6);
        }
    }
}

#[test]
fn positives_are_those_of_the_core() {
    use crate::config::{self, PatchObjective};
    use crate::objective::matching::{Matching, positives, positives_where_computed};
    let windows =
        [config::Window::Side(3), config::Window::Side(5), config::Window::All(config::AllPatches::All)];
    for window in windows {
        for border in [config::Border::Wrap, config::Border::Clip] {
            for (grid, dim, k) in
                [((3, 3), 5, 4), ((4, 7), 16, 8), ((6, 6), 48, 1), ((1, 4), 19, 3), ((2, 2), 33, 8)]
            {
                let matching =
                    Matching::from_config(&PatchObjective { window, border, k, ..Default::default() });
                let values = numbers(3, 2 * grid.0 * grid.1 * dim);
                let shape = (2, grid.0 * grid.1, dim);
                let random = Tensor::from_slice(&values, shape, &Device::Cpu).unwrap();
                // few different values make exact ties; some rows are zero, some are no number
                let coarse: Vec<f32> = values.iter().map(|v| v.round().clamp(-1.0, 1.0)).collect();
                let mut broken = coarse.clone();
                broken[..dim].fill(0.0);
                broken[2 * dim] = f32::NAN;
                for features in [
                    random.clone(),
                    random.to_dtype(DType::BF16).unwrap(),
                    Tensor::from_vec(coarse, shape, &Device::Cpu).unwrap(),
                    Tensor::from_vec(broken, shape, &Device::Cpu).unwrap(),
                    random.ones_like().unwrap(),
                ] {
                    let kernel =
                        positives_where_computed(&here(&features), grid, &matching, kernels()).unwrap();
                    assert!(kernel.index().is_empty(), "the device keeps them");
                    let (kernel, core) =
                        (kernel.to_host().unwrap(), positives(&features, grid, &matching).unwrap());
                    assert_eq!(kernel.counts(), core.counts());
                    assert_eq!(kernel.index(), core.index(), "{window:?} {border:?} {grid:?} {k}");
                }
            }
        }
    }
}
