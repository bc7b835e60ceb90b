//! Rounding of weights: the scale of each output, and integers that make the smallest error on real inputs.

use ndarray::{Array1, Array2, ArrayView2, Axis};
use rayon::prelude::*;

/// An int8 weight with one scale an output.
#[derive(Clone, Debug, PartialEq)]
pub struct Rounded {
    /// `[out, in]`.
    pub values: Array2<i8>,
    /// `[out]`.
    pub scales: Array1<f32>,
}

impl Rounded {
    /// `values · scales`.
    pub fn dequantized(&self) -> Array2<f32> {
        self.values.mapv(f32::from) * self.scales.view().insert_axis(Axis(1))
    }
}

/// Quantizes each row to ±127 with a scale of its own, as the device does, and takes it back to float.
pub(super) fn quantized_rows(x: &Array2<f32>) -> Array2<f32> {
    let mut out = x.clone();
    for mut row in out.rows_mut() {
        let most = row.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
        if most > 0.0 {
            row.mapv_inplace(|x| (x * (127.0 / most)).round_ties_even() * (most / 127.0));
        }
    }
    out
}

/// The largest weight of each output to `±limit`, the others to the nearest step.
pub(super) fn round_to_nearest(weight: &Array2<f32>, limit: i8) -> Rounded {
    let scales = weight.map_axis(Axis(1), |row| row.iter().fold(0.0_f32, |most, w| most.max(w.abs())));
    let scales = scales.mapv(|most| if most > 0.0 { most / f32::from(limit) } else { 1.0 });
    let mut values = Array2::zeros(weight.dim());
    for ((mut values, weight), scale) in values.rows_mut().into_iter().zip(weight.rows()).zip(&scales) {
        values.zip_mut_with(&weight, |value, w| *value = to_step(*w, *scale, limit));
    }
    Rounded { values, scales }
}

fn to_step(w: f32, scale: f32, limit: i8) -> i8 {
    let limit = f32::from(limit);
    (w / scale).round_ties_even().clamp(-limit, limit) as i8
}

/// Shrinkage of the scale below the largest weight, tried for each output.
const SHRINKS: usize = 24;
const SHRINK_STEP: f32 = 0.012_5;

/// The scale of one output: the one whose rounding errors, weighted by the power of each input, are smallest.
fn best_scale(weight: &[f32], power: &[f64], limit: i8) -> f32 {
    let most = weight.iter().fold(0.0_f32, |most, w| most.max(w.abs()));
    if most == 0.0 {
        return 1.0;
    }
    let loss = |scale: f32| -> f64 {
        let errors = weight.iter().zip(power).map(|(w, power)| {
            let error = f64::from(w - f32::from(to_step(*w, scale, limit)) * scale);
            error * error * power
        });
        errors.sum()
    };
    let scales = (0..SHRINKS).map(|step| most * (1.0 - step as f32 * SHRINK_STEP) / f32::from(limit));
    let best = scales.map(|scale| (loss(scale), scale)).min_by(|a, b| a.0.total_cmp(&b.0));
    best.map_or(1.0, |(_, scale)| scale)
}

/// `XᵀX` over the inputs a linear map sees, summed image by image.
#[derive(Clone, Debug)]
pub struct Gram(pub(super) Array2<f32>);

impl Gram {
    /// Of no inputs.
    pub(super) fn new(inputs: usize) -> Self {
        Self(Array2::zeros((inputs, inputs)))
    }

    /// Adds rows `x` `[rows, in]`.
    pub(super) fn add(&mut self, x: ArrayView2<'_, f32>) {
        use crate::ops::product::{Before, Threads, multiply};
        multiply(self.0.view_mut(), Before::Kept, 1.0, x.t(), x, Threads::All);
    }
}

/// Part of the mean power added to the diagonal of a [`Gram`] matrix: keeps it positive definite.
const DAMPING: f64 = 0.01;

/// Upper triangular `R` with `G + damping = RᵀR`; `None` if the matrix is not positive definite.
fn cholesky(gram: &Array2<f32>) -> Option<Array2<f64>> {
    let n = gram.nrows();
    let mean = gram.diag().iter().map(|power| f64::from(*power)).sum::<f64>() / n as f64;
    let damping = DAMPING * mean;
    // rows of L = Rᵀ, column by column: every entry needs the beginnings of two rows
    let mut lower = vec![0.0_f64; n * n];
    for column in 0..n {
        let (_, rest) = lower.split_at_mut(column * n);
        let (own, below) = rest.split_at_mut(n);
        let beginning = dot(&own[..column], &own[..column]);
        let pivot = f64::from(gram[(column, column)]) + damping - beginning;
        if pivot.is_nan() || pivot <= 0.0 {
            return None;
        }
        own[column] = pivot.sqrt();
        let own = &*own;
        below.par_chunks_exact_mut(n).enumerate().for_each(|(index, row)| {
            let value = f64::from(gram[(column + 1 + index, column)]) - dot(&row[..column], &own[..column]);
            row[column] = value / own[column];
        });
    }
    let lower = Array2::from_shape_vec((n, n), lower).ok()?;
    Some(lower.t().as_standard_layout().into_owned())
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut lanes = [0.0; 8];
    let (a, a_rest) = a.as_chunks::<8>();
    let (b, b_rest) = b.as_chunks::<8>();
    for (a, b) in a.iter().zip(b) {
        for lane in 0..8 {
            lanes[lane] += a[lane] * b[lane];
        }
    }
    lanes.iter().sum::<f64>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f64>()
}

/// Integers that make the error `‖X·(W − Ŵ)ᵀ‖` small, X the inputs of `gram`: weights are rounded one input after the other, the
/// last first, and each takes over what the rounding of those before it left, as far as it can (Babai's nearest plane, which
/// is GPTQ in the opposite order; Frantar et al. 2023, Chen et al. 2025).
///
/// Falls back to the nearest steps if the inputs have no usable statistics.
pub(super) fn round_with_feedback(weight: &Array2<f32>, gram: &Gram, limit: i8) -> Rounded {
    let power: Vec<f64> = gram.0.diag().iter().map(|power| f64::from(*power)).collect();
    let Some(upper) = cholesky(&gram.0) else { return round_to_nearest(weight, limit) };
    let inputs = weight.ncols();
    let round_output = |weight: &[f32]| {
        let scale = best_scale(weight, &power, limit);
        let mut values = vec![0; inputs];
        // what is left of each weight already rounded
        let mut errors = vec![0.0; inputs];
        for (input, factors) in upper.rows().into_iter().enumerate().rev() {
            let factors = factors.to_slice().unwrap_or_default();
            let passed_on = dot(&factors[input + 1..], &errors[input + 1..]) / factors[input];
            let wanted = f64::from(weight[input]) + passed_on;
            values[input] = to_step(wanted as f32, scale, limit);
            errors[input] = f64::from(weight[input]) - f64::from(values[input]) * f64::from(scale);
        }
        (values, scale)
    };
    let weight = weight.as_standard_layout();
    let outputs: Vec<_> =
        weight.as_slice().unwrap_or_default().par_chunks_exact(inputs).map(round_output).collect();
    let scales = outputs.iter().map(|(_, scale)| *scale).collect();
    let values = outputs.into_iter().flat_map(|(values, _)| values).collect();
    Rounded { values: Array2::from_shape_vec(weight.dim(), values).unwrap_or_default(), scales }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Purpose, Stream};

    fn numbers(seed: u64, rows: usize, columns: usize) -> Array2<f32> {
        let mut stream = Stream::new(seed, Purpose::Subset, &[]);
        Array2::from_shape_simple_fn((rows, columns), || {
            (stream.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
    }

    /// Inputs that depend on each other: mixtures of fewer sources, with a loud channel.
    fn inputs(seed: u64) -> Array2<f32> {
        let mut x = numbers(seed, 200, 8).dot(&numbers(seed + 1, 8, 24)) + numbers(seed + 2, 200, 24) * 0.1;
        x.column_mut(5).mapv_inplace(|v| v * 8.0);
        x
    }

    fn gram(x: &Array2<f32>) -> Gram {
        let mut gram = Gram::new(x.ncols());
        gram.add(x.slice(ndarray::s![..100, ..]));
        gram.add(x.slice(ndarray::s![100.., ..]));
        gram
    }

    #[test]
    fn the_factor_times_itself_is_the_matrix() {
        let gram = gram(&inputs(1));
        let upper = cholesky(&gram.0).expect("positive definite");
        let damping = DAMPING * gram.0.diag().mean().map_or(0.0, f64::from);
        let mut expected = gram.0.mapv(f64::from);
        expected.diag_mut().mapv_inplace(|v| v + damping);
        let product = upper.t().dot(&upper);
        let scale = expected.diag().iter().fold(0.0_f64, |most, v| most.max(*v));
        assert!((product - &expected).iter().all(|difference| difference.abs() < 1e-9 * scale));
        assert!(
            cholesky(&Array2::zeros((3, 3))).is_none()
                && cholesky(&Array2::from_elem((2, 2), f32::NAN)).is_none()
        );
    }

    #[test]
    fn feedback_halves_the_error_of_rounding_on_inputs_that_depend_on_each_other() {
        for (seed, limit) in [(1, 127), (2, 63), (3, 63)] {
            let (x, weight) = (inputs(seed), numbers(seed + 9, 16, 24));
            let error = |rounded: &Rounded| {
                let difference = x.dot(&(&weight - &rounded.dequantized()).t());
                difference.iter().map(|v| f64::from(v * v)).sum::<f64>()
            };
            let (nearest, feedback) =
                (round_to_nearest(&weight, limit), round_with_feedback(&weight, &gram(&x), limit));
            assert!(error(&feedback) < 0.5 * error(&nearest), "{} {}", error(&feedback), error(&nearest));
            assert!(feedback.values.iter().all(|value| value.abs() <= limit));
        }
    }

    #[test]
    fn weights_without_inputs_are_rounded_to_the_nearest_step() {
        let weight = numbers(4, 3, 16);
        assert_eq!(round_with_feedback(&weight, &Gram::new(16), 127), round_to_nearest(&weight, 127));
        let zeros = round_to_nearest(&Array2::zeros((2, 16)), 127);
        assert_eq!((zeros.values.sum(), zeros.scales.sum()), (0, 2.0));
    }

    #[test]
    fn rows_are_quantized_as_on_the_device() {
        let x = numbers(5, 4, 32);
        let rows = quantized_rows(&x);
        for (exact, rounded) in x.rows().into_iter().zip(rows.rows()) {
            let step = exact.iter().fold(0.0_f32, |most, x| most.max(x.abs())) / 127.0;
            let near = exact
                .iter()
                .zip(rounded)
                .all(|(a, b)| (a - b).abs() <= 0.501 * step && ((b / step).round() - b / step).abs() < 1e-3);
            assert!(near);
        }
        assert!(quantized_rows(&Array2::zeros((1, 16))).iter().all(|x| *x == 0.0));
    }
}
