//! What the tests of all operations share: inputs, gradients, finite differences, thread counts.

use super::Ops;
use crate::random::{Purpose, Stream};
use candle_core::{DType, Device, Result, Tensor, Var};

/// Standard normal numbers, the same for the same `seed`.
pub(super) fn numbers(seed: u64, len: usize) -> Vec<f32> {
    let mut stream = Stream::new(seed, Purpose::Init, &[]);
    (0..len).map(|_| stream.normal() as f32).collect()
}

/// A tensor of standard normal numbers.
pub(super) fn random(seed: u64, shape: &[usize]) -> Tensor {
    Tensor::from_vec(numbers(seed, shape.iter().product()), shape, &Device::Cpu).unwrap()
}

/// Runs `task` in a pool of `threads` threads.
pub(super) fn with_threads<R: Send>(threads: usize, task: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(task)
}

/// All values, in `f64`.
pub(super) fn flat(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Fails unless `|a − b| ≤ tolerance · (1 + |b|)` everywhere.
pub(super) fn assert_close(what: &str, a: &[f64], b: &[f64], tolerance: f64) {
    assert_eq!(a.len(), b.len(), "{what}: number of values");
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert!((a - b).abs() <= tolerance * (1.0 + b.abs()), "{what} [{i}]: {a} against {b}");
    }
}

/// An output and the gradient of its weighted sum for every input.
pub(super) struct Pass {
    pub(super) output: Vec<f64>,
    pub(super) gradients: Vec<Vec<f64>>,
}

pub(super) type Function<'a> = &'a (dyn Fn(Ops, &[Tensor]) -> Result<Tensor> + Sync);

pub(super) fn weighted(output: &Tensor) -> Tensor {
    // fixed weights make every element of the output matter differently
    let weights =
        random(99, output.dims()).to_dtype(output.dtype()).unwrap().to_device(output.device()).unwrap();
    (output * weights).unwrap().sum_all().unwrap()
}

/// Output and gradients with all inputs as variables of `dtype`.
fn pass(ops: Ops, function: Function<'_>, inputs: &[Tensor], dtype: DType) -> Pass {
    let inputs: Vec<Tensor> = inputs.iter().map(|t| t.to_dtype(dtype).unwrap()).collect();
    pass_as_they_are(ops, function, &inputs)
}

/// Output and gradients with all inputs as variables of their own types.
pub(super) fn pass_as_they_are(ops: Ops, function: Function<'_>, inputs: &[Tensor]) -> Pass {
    let variables: Vec<Var> = inputs.iter().map(|t| Var::from_tensor(t).unwrap()).collect();
    let arguments: Vec<Tensor> = variables.iter().map(|v| v.as_tensor().clone()).collect();
    let output = function(ops, &arguments).unwrap();
    let store = weighted(&output).backward().unwrap();
    let gradients = arguments
        .iter()
        .enumerate()
        .map(|(i, t)| flat(store.get(t).unwrap_or_else(|| panic!("input {i} got no gradient"))))
        .collect();
    Pass { output: flat(&output), gradients }
}

/// Checks one operation on given inputs: fused on one and two threads bit for bit, fused against the composition in
/// `f32` and `f64`, the composition in `f64` against finite differences, and each input tracked alone.
pub(super) fn check_on(function: Function<'_>, inputs: &[Tensor]) {
    let fused = with_threads(1, || pass(Ops::fused(), function, inputs, DType::F32));
    let two = with_threads(2, || pass(Ops::fused(), function, inputs, DType::F32));
    assert!(fused.output == two.output, "output depends on the number of threads");
    assert!(fused.gradients == two.gradients, "a gradient depends on the number of threads");

    let single = pass(Ops::reference(), function, inputs, DType::F32);
    let double = pass(Ops::reference(), function, inputs, DType::F64);
    assert_close("output against f32 composition", &fused.output, &single.output, 2e-5);
    assert_close("output against f64 composition", &fused.output, &double.output, 1e-5);
    for i in 0..inputs.len() {
        let scale = double.gradients[i].iter().fold(1.0f64, |a, b| a.max(b.abs()));
        let scaled = |values: &[f64]| values.iter().map(|v| v / scale).collect::<Vec<_>>();
        let (found, exact) = (scaled(&fused.gradients[i]), scaled(&double.gradients[i]));
        assert_close(&format!("gradient {i} against f64 composition"), &found, &exact, 1e-5);
        assert_close(&format!("gradient {i} against f32"), &found, &scaled(&single.gradients[i]), 2e-5);
    }
    finite_differences(function, inputs, &double);

    for i in 0..inputs.len() {
        // only input i is a variable: its gradient must not depend on that
        let variable = Var::from_tensor(&inputs[i]).unwrap();
        let mut arguments = inputs.to_vec();
        arguments[i] = variable.as_tensor().clone();
        let store = weighted(&function(Ops::fused(), &arguments).unwrap()).backward().unwrap();
        let alone = flat(store.get(variable.as_tensor()).expect("gradient of the only variable"));
        assert!(alone == fused.gradients[i], "gradient {i} changes when nothing else is tracked");
    }
    assert!(!function(Ops::fused(), inputs).unwrap().track_op(), "tracked without a variable");
    #[cfg(feature = "_emulator")]
    super::kernel_tests::check_kernels(function, inputs, &double);
}

/// The same on random inputs of the given shapes.
pub(super) fn check(function: Function<'_>, shapes: &[&[usize]]) {
    let inputs: Vec<Tensor> =
        shapes.iter().enumerate().map(|(i, shape)| random(i as u64 + 1, shape)).collect();
    check_on(function, &inputs);
}

/// Central differences of the composition in `f64`, at up to 12 places of every input.
fn finite_differences(function: Function<'_>, inputs: &[Tensor], exact: &Pass) {
    let double: Vec<Tensor> = inputs.iter().map(|t| t.to_dtype(DType::F64).unwrap()).collect();
    let step = 1e-5;
    for (i, input) in double.iter().enumerate() {
        let values: Vec<f64> = input.flatten_all().unwrap().to_vec1().unwrap();
        for place in (0..values.len()).step_by(values.len().div_ceil(12)) {
            let at = |shift: f64| {
                let mut moved = values.clone();
                moved[place] += shift;
                let mut arguments = double.clone();
                arguments[i] = Tensor::from_vec(moved, input.dims(), &Device::Cpu).unwrap();
                let output = function(Ops::reference(), &arguments).unwrap();
                weighted(&output).to_scalar::<f64>().unwrap()
            };
            let slope = (at(step) - at(-step)) / (2.0 * step);
            let gradient = exact.gradients[i][place];
            assert!(
                (slope - gradient).abs() <= 1e-6 * (1.0 + gradient.abs()),
                "gradient {i} [{place}]: {gradient}, slope {slope}"
            );
        }
    }
}

/// candle's own operations that the model uses beside the fused ones.
#[test]
fn plain_tensor_operations_in_use_have_right_gradients() {
    // class token before the patches, and taken off again
    check(&|_, t| Tensor::cat(&[&t[0].broadcast_as((2, 1, 6))?, &t[1]], 1), &[&[1, 1, 6], &[2, 5, 6]]);
    check(&|_, t| t[0].narrow(1, 1, 4)?.contiguous(), &[&[2, 5, 6]]);
    check(&|_, t| t[0].narrow(0, 1, 2)?.add(&t[0].narrow(0, 0, 2)?), &[&[3, 7]]);
    // position embedding: a fixed resize matrix times the table, added to every image
    let resize = random(50, &[4, 9]);
    check(&|_, t| t[0].broadcast_add(&resize.to_dtype(t[1].dtype())?.matmul(&t[1])?), &[&[2, 4, 5], &[9, 5]]);
    check(&|_, t| t[0].reshape((2, 12))?.t()?.matmul(&t[1]), &[&[2, 3, 4], &[2, 5]]);
    check(&|_, t| (&t[0] * 0.3)?.add(&t[0]), &[&[3, 5]]);
}
