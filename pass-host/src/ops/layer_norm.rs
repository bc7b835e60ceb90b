//! LayerNorm over the last dimension.

use super::access::{output, stored, tensor, values, wide};
use super::buffer::zeros;
use super::lanes::{add_multiple, dot, sum, widest};
use candle_core::{CpuStorage, CustomOp3, D, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

/// Rows of one task.
const ROWS: usize = 32;

pub(super) fn check(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<()> {
    let dim = x.dim(D::Minus1)?;
    if dim == 0 || weight.dims() != [dim] || bias.dims() != [dim] {
        bail!(
            "layer_norm: x {:?} needs weight and bias [{dim}], found {:?} and {:?}",
            x.shape(),
            weight.shape(),
            bias.shape()
        )
    }
    Ok(())
}

pub(super) fn composition(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let (dtype, x) = (x.dtype(), wide(x)?);
    let (weight, bias) = (weight.to_dtype(x.dtype())?, bias.to_dtype(x.dtype())?);
    let centered = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = centered.sqr()?.mean_keepdim(D::Minus1)?;
    let normalized = centered.broadcast_div(&(variance + eps)?.sqrt()?)?;
    normalized.broadcast_mul(&weight)?.broadcast_add(&bias)?.to_dtype(dtype)
}

pub(super) fn fused(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, LayerNorm { eps: eps as f32 })
}

struct LayerNorm {
    eps: f32,
}

/// Mean and inverse standard deviation of a row; the backward pass computes them again rather than keep them.
#[inline(always)]
fn moments(row: &[f32], eps: f32, centered: &mut [f32]) -> f32 {
    let mean = sum(row) / row.len() as f32;
    for (centered, &x) in centered.iter_mut().zip(row) {
        *centered = x - mean;
    }
    1.0 / (dot(centered, centered) / row.len() as f32 + eps).sqrt()
}

/// Overwrites `out` with the normalized rows of `x`.
pub(super) fn normalize(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    let dim = weight.len();
    out.par_chunks_mut(ROWS * dim).zip(x.par_chunks(ROWS * dim)).for_each(|(out, x)| {
        widest!({
            for (out, x) in out.chunks_exact_mut(dim).zip(x.chunks_exact(dim)) {
                let inverse = moments(x, eps, out);
                for ((out, &weight), &bias) in out.iter_mut().zip(weight).zip(bias) {
                    *out = (*out * inverse).mul_add(weight, bias);
                }
            }
        });
    });
}

/// Adds the gradient of the rows of `x` to `dx`; returns the gradients of weight and bias.
pub(super) fn add_gradient(
    x: &[f32],
    weights: &[f32],
    eps: f32,
    dy: &[f32],
    dx: &mut [f32],
) -> [Vec<f32>; 2] {
    let dim = weights.len();
    // each task also returns its share of the gradients of weight and bias
    let shares: Vec<Vec<f32>> = dx
        .par_chunks_mut(ROWS * dim)
        .zip(x.par_chunks(ROWS * dim))
        .zip(dy.par_chunks(ROWS * dim))
        .map(|((dx, x), dy)| {
            let mut share = vec![0.0f32; 2 * dim];
            let mut rows = vec![0.0f32; 2 * dim];
            let (d_weight, d_bias) = share.split_at_mut(dim);
            let (normalized, g) = rows.split_at_mut(dim);
            // equal lengths in plain sight of the compiler, which then leaves out the bounds checks
            let (d_weight, d_bias, weights) = (&mut d_weight[..dim], &mut d_bias[..dim], &weights[..dim]);
            let (normalized, g) = (&mut normalized[..dim], &mut g[..dim]);
            widest!({
                for ((dx, x), dy) in
                    dx.chunks_exact_mut(dim).zip(x.chunks_exact(dim)).zip(dy.chunks_exact(dim))
                {
                    let inverse = moments(x, eps, normalized);
                    for i in 0..dim {
                        normalized[i] *= inverse;
                        d_weight[i] = dy[i].mul_add(normalized[i], d_weight[i]);
                        d_bias[i] += dy[i];
                        g[i] = dy[i] * weights[i];
                    }
                    // dx = (g − mean(g) − normalized · mean(g · normalized)) / σ, g = dy · weight
                    let mean = sum(g) / dim as f32;
                    let along = dot(g, normalized) / dim as f32;
                    for i in 0..dim {
                        dx[i] += (g[i] - mean - normalized[i] * along) * inverse;
                    }
                }
            });
            share
        })
        .collect();
    let mut total = vec![0.0f32; 2 * dim];
    for share in &shares {
        widest!(add_multiple(&mut total, 1.0, share));
    }
    let d_bias = total.split_off(dim);
    [total, d_bias]
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer_norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight, bias) =
            (values(x, x_layout)?, values(weight, weight_layout)?, values(bias, bias_layout)?);
        let mut normalized = zeros(x.len());
        normalize(x, weight, bias, self.eps, &mut normalized);
        output(normalized, x_layout.shape())
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let gradient = gradient.contiguous()?;
        let ((x_storage, x_layout), (weight_storage, weight_layout), (dy_storage, dy_layout)) =
            (x.storage_and_layout(), weight.storage_and_layout(), gradient.storage_and_layout());
        let (x_values, weights, dy) = (
            stored(&x_storage, x_layout)?,
            stored(&weight_storage, weight_layout)?,
            stored(&dy_storage, dy_layout)?,
        );
        let mut dx = zeros(x_values.len());
        let [d_weight, d_bias] = add_gradient(x_values, weights, self.eps, dy, &mut dx);
        Ok((
            x.track_op().then(|| tensor(dx, x.shape())).transpose()?,
            weight.track_op().then(|| tensor(d_weight, weight.shape())).transpose()?,
            bias.track_op().then(|| tensor(d_bias, bias.shape())).transpose()?,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Ops, testing::*};
    use candle_core::{DType, Device, Tensor};

    #[test]
    fn fused_agrees_with_composition_and_finite_differences() {
        for (rows, dim) in [(1, 2), (3, 15), (5, 16), (2, 33), (70, 192), (33, 7)] {
            check(&|ops, t| ops.layer_norm(&t[0], &t[1], &t[2], 1e-6), &[&[rows, dim], &[dim], &[dim]]);
        }
        check(&|ops, t| ops.layer_norm(&t[0], &t[1], &t[2], 1e-6), &[&[2, 3, 40], &[40], &[40]]);
    }

    #[test]
    fn constant_rows_give_the_bias() {
        let x = Tensor::full(3.5f32, (4, 10), &Device::Cpu).unwrap();
        let (weight, bias) = (random(1, &[10]), random(2, &[10]));
        let y = Ops::fused().layer_norm(&x, &weight, &bias, 1e-6).unwrap();
        for row in 0..4 {
            assert_eq!(flat(&y.get(row).unwrap()), flat(&bias));
        }
    }

    #[test]
    fn transposed_input_is_read_in_its_own_order() {
        check(&|ops, t| ops.layer_norm(&t[0].transpose(0, 1)?, &t[1], &t[2], 1e-6), &[&[6, 5], &[6], &[6]]);
    }

    #[test]
    fn wrong_shapes_are_refused() {
        let (x, weight) = (random(1, &[2, 4]), random(2, &[5]));
        for ops in [Ops::fused(), Ops::reference()] {
            let error = ops.layer_norm(&x, &weight, &weight, 1e-6).unwrap_err().to_string();
            assert!(error.contains("[4]") && error.contains("[5]"), "{error}");
        }
        let half = x.to_dtype(DType::BF16).unwrap();
        let ones = Tensor::ones(4, DType::BF16, &Device::Cpu).unwrap();
        assert_eq!(Ops::fused().layer_norm(&half, &ones, &ones, 1e-6).unwrap().dtype(), DType::BF16);
    }
}
