//! LayerNorm over the last dimension.

use super::engine::{Launch, Output};
use super::graph::of_three;
use super::sums::{add_shares, cut};
use candle_core::{D, DType, Result, Tensor};

pub(in super::super) fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let (x, weight, bias) = (x.contiguous()?, weight.contiguous()?, bias.contiguous()?);
    let (dim, eps) = (x.dim(D::Minus1)?, eps as f32);
    let rows = x.elem_count() / dim;
    let y = Output::like(&x)?;
    Launch::new("layer_norm", "layer_norm", x.dtype(), &x)
        .warps(rows, 0)
        .tensor(&x)
        .tensor(&weight)
        .tensor(&bias)
        .output(&y)
        .int(rows)
        .int(dim)
        .float(eps)
        .run()?;
    let inputs = [x.clone(), weight.clone(), bias.clone()];
    of_three("layer_norm", [&x, &weight, &bias], y, x.shape(), move |dy| backward(&inputs, dy, eps))
}

fn backward([x, weight, bias]: &[Tensor; 3], dy: &Tensor, eps: f32) -> Result<[Option<Tensor>; 3]> {
    let dim = x.dim(D::Minus1)?;
    let rows = x.elem_count() / dim;
    let (dx, kept) = (Output::like(x)?, Output::new(2 * rows, DType::F32, x)?);
    Launch::new("layer_norm", "layer_norm_backward", x.dtype(), x)
        .warps(rows, 0)
        .tensor(x)
        .tensor(weight)
        .tensor(dy)
        .output(&dx)
        .output(&kept)
        .int(rows)
        .int(dim)
        .float(eps)
        .run()?;
    let (part, parts) = cut(rows);
    let shares = Output::new(parts * 2 * dim, DType::F32, x)?;
    Launch::new("layer_norm", "layer_norm_shares", x.dtype(), x)
        .tiles(dim, parts)
        .tensor(x)
        .tensor(dy)
        .output(&kept)
        .output(&shares)
        .int(rows)
        .int(dim)
        .int(part)
        .run()?;
    let both = add_shares(&shares, parts, 2 * dim, 1.0, DType::F32, x)?.tensor(2 * dim)?;
    Ok([
        x.track_op().then(|| dx.tensor(x.shape())).transpose()?,
        weight.track_op().then(|| both.narrow(0, 0, dim)?.contiguous()).transpose()?,
        bias.track_op().then(|| both.narrow(0, dim, dim)?.contiguous()).transpose()?,
    ])
}
