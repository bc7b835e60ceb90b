//! Smoothing: channels whose activations are large are divided, the weights that meet them multiplied. What divides comes for
//! free: it is folded into the LayerNorm before, or into the values of attention.

use ndarray::{Array1, Array2, ArrayView2, Axis, s};

use super::float_vit::{Block, Linear, Norm};
use super::round::{quantized_rows, round_to_nearest};

/// Shares of the difficulty that may move from activations to weights; the best on calibration images is taken.
const SHARES: [f32; 6] = [0.0, 0.3, 0.4, 0.5, 0.6, 0.7];

/// Largest magnitude in each column.
fn column_magnitudes(x: ArrayView2<'_, f32>) -> Array1<f32> {
    x.fold_axis(Axis(0), 0.0_f32, |most, value| most.max(value.abs()))
}

/// `activation^share / weight^(1 − share)` for each input, around 1; 1 where either is silent.
fn smoothing_factors(activations: &Array1<f32>, weights: &Array1<f32>, share: f32) -> Array1<f32> {
    let mut factors = Array1::ones(activations.len());
    for ((factor, a), w) in factors.iter_mut().zip(activations).zip(weights) {
        if share > 0.0 && *a > 0.0 && *w > 0.0 {
            *factor = a.powf(share) / w.powf(1.0 - share);
        }
    }
    let mean = (factors.mapv(f32::ln).sum() / factors.len() as f32).exp();
    factors.mapv(|factor| (factor / mean).clamp(1e-3, 1e3))
}

/// The factors that make `linear` of quantized `x` differ least from `linear` of `x`; no fewer than `limit` steps a weight.
fn best_factors(x: ArrayView2<'_, f32>, linear: &Linear, limit: i8) -> Array1<f32> {
    let (activations, weights) = (column_magnitudes(x), column_magnitudes(linear.weight.view()));
    let without_bias = |weight: Array2<f32>| Linear { weight, bias: Array1::zeros(linear.bias.len()) };
    let exact = without_bias(linear.weight.clone()).forward(x);
    let loss = |factors: &Array1<f32>| {
        let weight = round_to_nearest(&(&linear.weight * factors), limit).dequantized();
        let rounded = without_bias(weight).forward(quantized_rows(&(&x / factors)).view());
        (rounded - &exact).iter().map(|difference| f64::from(difference * difference)).sum::<f64>()
    };
    let candidates = SHARES.map(|share| smoothing_factors(&activations, &weights, share));
    let losses = candidates.each_ref().map(loss);
    let best = (0..SHARES.len()).min_by(|a, b| losses[*a].total_cmp(&losses[*b])).unwrap_or(0);
    candidates.into_iter().nth(best).unwrap_or_else(|| Array1::ones(activations.len()))
}

fn fold_into_norm(norm: &mut Norm, linear: &mut Linear, factors: &Array1<f32>) {
    norm.weight /= factors;
    norm.bias /= factors;
    linear.weight *= factors;
}

/// Smooths the inputs of qkv and fc1; `inputs` are samples of the inputs of the four maps. The block's output stays.
pub(super) fn smooth(block: &mut Block, inputs: &[Array2<f32>; 4], limit: i8) {
    let factors = best_factors(inputs[0].view(), &block.qkv, limit);
    fold_into_norm(&mut block.norm1, &mut block.qkv, &factors);
    let factors = best_factors(inputs[2].view(), &block.fc1, limit);
    fold_into_norm(&mut block.norm2, &mut block.fc1, &factors);
    // attention passes channels of the values on one by one
    let factors = best_factors(inputs[1].view(), &block.proj, limit);
    let dim = factors.len();
    let mut values = block.qkv.weight.slice_mut(s![2 * dim.., ..]);
    values /= &factors.view().insert_axis(Axis(1));
    let mut bias = block.qkv.bias.slice_mut(s![2 * dim..]);
    bias /= &factors;
    block.proj.weight *= &factors;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::float_vit::{AsItIs, AtInput};
    use crate::random::{Purpose, Stream};

    fn block(dim: usize) -> Block {
        let mut stream = Stream::new(3, Purpose::Subset, &[]);
        let mut number = move || (stream.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0;
        let mut linear = |outputs: usize, inputs: usize| Linear {
            weight: Array2::from_shape_simple_fn((outputs, inputs), &mut number) / (inputs as f32).sqrt(),
            bias: Array1::from_shape_simple_fn(outputs, &mut number),
        };
        let (qkv, proj, fc1, fc2) =
            (linear(3 * dim, dim), linear(dim, dim), linear(4 * dim, dim), linear(dim, 4 * dim));
        // a few channels stand out, as in trained networks
        let weight = Array1::from_shape_fn(dim, |i| if i % 11 == 3 { 30.0 } else { 1.0 });
        let norm = || Norm { weight: weight.clone(), bias: Array1::from_elem(dim, 0.1) };
        Block { norm1: norm(), qkv, proj, norm2: norm(), fc1, fc2 }
    }

    struct Inputs(Vec<Array2<f32>>);

    impl AtInput for Inputs {
        fn at_input(&mut self, _layer: usize, x: Array2<f32>) -> Array2<f32> {
            self.0.push(x.clone());
            x
        }
    }

    fn tokens() -> Array2<f32> {
        Array2::from_shape_fn((20, 32), |(row, column)| ((row * 37 + column * 11) % 23) as f32 / 11.0 - 1.0)
    }

    #[test]
    fn smoothing_changes_no_feature_and_quietens_the_loudest_channel() {
        let before = block(32);
        let mut inputs = Inputs(Vec::new());
        let mut expected = tokens();
        before.forward(&mut expected, 2, &mut inputs);
        let samples: [Array2<f32>; 4] = inputs.0.try_into().expect("four layers");
        let mut after = before.clone();
        smooth(&mut after, &samples, 127);
        let mut inputs = Inputs(Vec::new());
        let mut found = tokens();
        after.forward(&mut found, 2, &mut inputs);
        let largest = expected.iter().fold(0.0_f32, |most, v| most.max(v.abs()));
        assert!((&found - &expected).iter().all(|difference| difference.abs() < 1e-5 * largest));
        let spread = |x: &Array2<f32>| {
            let magnitudes = column_magnitudes(x.view());
            magnitudes.iter().fold(0.0_f32, |most, v| most.max(*v)) / (magnitudes.sum() / 32.0)
        };
        for layer in [0, 2] {
            assert!(spread(&inputs.0[layer]) < 0.7 * spread(&samples[layer]), "layer {layer}");
        }
        assert!(after.qkv != before.qkv && after.fc1 != before.fc1);
        let mut again = tokens();
        after.forward(&mut again, 2, &mut AsItIs);
        assert_eq!(again, found);
    }
}
