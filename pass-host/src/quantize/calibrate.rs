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
