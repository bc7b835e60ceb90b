//! Layers of the class-attention block: LayerNorm and linear maps over rows of tokens.

use crate::error::{Error, Result, check_length};
use crate::math::{add_scaled, sqrt};
use crate::rows::{rows_of, rows_of_mut};
use crate::shape::{row, row_mut};

/// Added to the variance before its root: the reference's value for every LayerNorm.
pub const LAYER_NORM_EPSILON: f32 = 1e-6;

/// LayerNorm over a token: `weight·(x − mean)/sqrt(variance + ε) + bias`.
#[derive(Clone, Copy, Debug)]
pub struct LayerNorm<'a> {
    weight: &'a [f32],
    bias: &'a [f32],
}

impl<'a> LayerNorm<'a> {
    /// `weight` and `bias`: `[D]`.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] if they differ in length; [`Error::OutOfRange`] if they are empty.
    pub fn new(weight: &'a [f32], bias: &'a [f32]) -> Result<Self> {
        if weight.is_empty() {
            return Err(Error::OutOfRange { what: "LayerNorm width", min: 1, max: usize::MAX, actual: 0 });
        }
        check_length("LayerNorm bias", weight.len(), bias.len())?;
        Ok(Self { weight, bias })
    }

    /// `D`.
    pub const fn dim(&self) -> usize {
        self.weight.len()
    }

    /// Normalizes the rows of `x` (`[T, D]`) into `out`, as long as `x`.
    pub(crate) fn rows(&self, x: &[f32], out: &mut [f32]) {
        for (x, out) in rows_of(x, self.dim()).zip(rows_of_mut(out, self.dim())) {
            let (mean, inverse) = moments(x);
            for (((out, x), weight), bias) in out.iter_mut().zip(x).zip(self.weight).zip(self.bias) {
                *out = (x - mean) * inverse * weight + bias;
            }
        }
    }

    /// Normalizes the rows of `x` in place.
    pub(crate) fn rows_mut(&self, x: &mut [f32]) {
        for x in rows_of_mut(x, self.dim()) {
            let (mean, inverse) = moments(x);
            for ((x, weight), bias) in x.iter_mut().zip(self.weight).zip(self.bias) {
                *x = (*x - mean) * inverse * weight + bias;
            }
        }
    }

    /// One row backward: adds to the gradients of `weight` and `bias`, and adds `∂/∂x` to `grad_x`.
    pub(crate) fn backward(
        &self,
        x: &[f32],
        grad_out: &[f32],
        grad_weight: &mut [f32],
        grad_bias: &mut [f32],
        grad_x: &mut [f32],
    ) {
        let (mean, inverse) = moments(x);
        let dim = x.len() as f32;
        let (mut sum, mut product) = (0.0, 0.0);
        for index in 0..x.len() {
            let normalized = (x[index] - mean) * inverse;
            grad_weight[index] += grad_out[index] * normalized;
            grad_bias[index] += grad_out[index];
            let scaled = grad_out[index] * self.weight[index];
            sum += scaled;
            product += scaled * normalized;
        }
        for index in 0..x.len() {
            let normalized = (x[index] - mean) * inverse;
            let scaled = grad_out[index] * self.weight[index];
            grad_x[index] += inverse * (scaled - sum / dim - normalized * product / dim);
        }
    }
}

/// Mean, and inverse standard deviation.
fn moments(x: &[f32]) -> (f32, f32) {
    let dim = x.len() as f32;
    let mean = x.iter().sum::<f32>() / dim;
    let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / dim;
    (mean, 1.0 / sqrt(variance + LAYER_NORM_EPSILON))
}

/// Linear map of a token: `W·x + b`, `W` is `[out, in]`.
#[derive(Clone, Copy, Debug)]
pub struct Linear<'a> {
    weight: &'a [f32],
    bias: &'a [f32],
    n_in: usize,
}

impl<'a> Linear<'a> {
    /// `weight`: `[out, in]`, `bias`: `[out]`.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] if `weight` does not hold `bias.len() * n_in` values; [`Error::OutOfRange`] for an
    /// empty map.
    pub fn new(weight: &'a [f32], bias: &'a [f32], n_in: usize) -> Result<Self> {
        for (what, size) in [("inputs of a linear map", n_in), ("outputs of a linear map", bias.len())] {
            if size == 0 {
                return Err(Error::OutOfRange { what, min: 1, max: usize::MAX, actual: 0 });
            }
        }
        check_length("weight of a linear map", bias.len().saturating_mul(n_in), weight.len())?;
        Ok(Self { weight, bias, n_in })
    }

    /// Outputs.
    pub const fn n_out(&self) -> usize {
        self.bias.len()
    }

    /// Maps the rows of `x` (`[T, in]`) into `out` (`[T, out]`).
    #[cfg(not(feature = "matrixmultiply"))]
    pub(crate) fn rows(&self, x: &[f32], out: &mut [f32]) {
        self.rows_scalar(x, out);
    }

    /// Maps the rows of `x` (`[T, in]`) into `out` (`[T, out]`).
    #[cfg(feature = "matrixmultiply")]
    pub(crate) fn rows(&self, x: &[f32], out: &mut [f32]) {
        for out in out.chunks_exact_mut(self.n_out()) {
            out.copy_from_slice(self.bias);
        }
        crate::gemm::add_product(x, self.weight, self.n_in, self.n_out(), out);
    }

    /// The scalar path, which the matrix product is tested against.
    #[cfg(any(test, not(feature = "matrixmultiply")))]
    fn rows_scalar(&self, x: &[f32], out: &mut [f32]) {
        // A row of the weight stays in the cache while all tokens use it.
        for (o, (weight, bias)) in rows_of(self.weight, self.n_in).zip(self.bias).enumerate() {
            let column = out.iter_mut().skip(o).step_by(self.n_out().max(1));
            for (out, x) in column.zip(rows_of(x, self.n_in)) {
                *out = crate::math::dot(x, weight) + bias;
            }
        }
    }

    /// One row backward: adds to the gradients of `weight` and `bias`, and adds `Wᵀ·grad_out` to `grad_x`.
    pub(crate) fn backward(
        &self,
        x: &[f32],
        grad_out: &[f32],
        grad_weight: &mut [f32],
        grad_bias: &mut [f32],
        grad_x: &mut [f32],
    ) {
        for (o, &slope) in grad_out.iter().enumerate() {
            grad_bias[o] += slope;
            add_scaled(row_mut(grad_weight, o, self.n_in), slope, x);
            add_scaled(grad_x, slope, row(self.weight, o, self.n_in));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec;

    proptest! {
        #[test]
        fn linear_rows_agree_with_double_precision_on_both_paths(
            (tokens, n_in, n_out) in (0_usize..6, 1_usize..40, 1_usize..20),
            data in proptest::collection::vec(-2.0_f32..2.0, 6 * 40 + 40 * 20 + 20),
        ) {
            let (x, rest) = data.split_at(tokens * n_in);
            let (weight, rest) = rest.split_at(n_out * n_in);
            let map = Linear::new(weight, &rest[..n_out], n_in).unwrap();
            let (mut out, mut scalar) = (vec![9.0; tokens * n_out], vec![9.0; tokens * n_out]);
            map.rows(x, &mut out);
            map.rows_scalar(x, &mut scalar);
            for token in 0..tokens {
                for o in 0..n_out {
                    let products = row(x, token, n_in).iter().zip(row(weight, o, n_in));
                    let exact = products.map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>() + f64::from(rest[o]);
                    prop_assert!((f64::from(out[token * n_out + o]) - exact).abs() < 1e-4);
                    prop_assert!((f64::from(scalar[token * n_out + o]) - exact).abs() < 1e-4);
                }
            }
        }

        #[test]
        fn normalized_rows_agree_with_double_precision(x in proptest::collection::vec(-5.0_f32..5.0, 2..64)) {
            let (weight, bias) = (vec![1.5; x.len()], vec![-0.25; x.len()]);
            let mut out = vec![0.0; x.len()];
            let norm = LayerNorm::new(&weight, &bias).unwrap();
            norm.rows(&x, &mut out);
            let mut in_place = x.clone();
            norm.rows_mut(&mut in_place);
            prop_assert_eq!(&out, &in_place);
            let n = x.len() as f64;
            let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
            let variance = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
            for (x, out) in x.iter().zip(&out) {
                let exact = 1.5 * (f64::from(*x) - mean) / (variance + 1e-6).sqrt() - 0.25;
                // nearly equal values leave a tiny variance, whose rounding is magnified
                prop_assert!((f64::from(*out) - exact).abs() < 1e-5 + 1e-6 / (variance + 1e-6).sqrt());
            }
        }
    }

    #[test]
    fn wrong_sizes_are_refused() {
        assert!(LayerNorm::new(&[], &[]).is_err());
        assert!(LayerNorm::new(&[1.0], &[]).is_err());
        assert!(Linear::new(&[1.0; 6], &[0.0; 2], 3).is_ok());
        assert!(Linear::new(&[1.0; 5], &[0.0; 2], 3).is_err());
        assert!(Linear::new(&[], &[0.0; 2], usize::MAX).is_err());
        assert!(Linear::new(&[], &[], 3).is_err());
    }
}
