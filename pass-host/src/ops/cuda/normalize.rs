//! L2 normalization of rows, and weight normalization.

use super::engine::{Launch, Output};
use super::graph::{of_one, of_two};
use candle_core::{D, Result, Tensor, bail};

pub(in super::super) fn l2_normalize(x: &Tensor, eps: f64) -> Result<Tensor> {
    let (x, dim, eps) = (x.contiguous()?, x.dim(D::Minus1)?, eps as f32);
    if dim == 0 {
        bail!("l2_normalize: the last dimension of {:?} is empty", x.shape())
    }
    let rows = x.elem_count() / dim;
    let y = Output::like(&x)?;
    Launch::new("normalize", "l2_normalize", x.dtype(), &x)
        .warps(rows, 0)
        .tensor(&x)
        .output(&y)
        .int(rows)
        .int(dim)
        .float(eps)
        .run()?;
    let input = x.clone();
    of_one("l2_normalize", &x, y, x.shape(), move |dy| {
        let dx = Output::like(&input)?;
        Launch::new("normalize", "l2_normalize_backward", dy.dtype(), dy)
            .warps(rows, 0)
            .tensor(&input)
            .tensor(dy)
            .output(&dx)
            .int(rows)
            .int(dim)
            .float(eps)
            .run()?;
        Ok([Some(dx.tensor(input.shape())?)])
    })
}

pub(in super::super) fn weight_norm(v: &Tensor, g: &Tensor) -> Result<Tensor> {
    let (v, g) = (v.contiguous()?, g.contiguous()?);
    let (rows, dim) = v.dims2()?;
    let w = Output::like(&v)?;
    Launch::new("normalize", "weight_norm", v.dtype(), &v)
        .warps(rows, 0)
        .tensor(&v)
        .tensor(&g)
        .output(&w)
        .int(rows)
        .int(dim)
        .run()?;
    let inputs = [v.clone(), g.clone()];
    of_two("weight_norm", [&v, &g], w, v.shape(), move |dw| {
        let [v, g] = &inputs;
        let (dv, dg) = (Output::like(v)?, Output::like(g)?);
        Launch::new("normalize", "weight_norm_backward", dw.dtype(), dw)
            .warps(rows, 0)
            .tensor(v)
            .tensor(g)
            .tensor(dw)
            .output(&dv)
            .output(&dg)
            .int(rows)
            .int(dim)
            .run()?;
        Ok([
            v.track_op().then(|| dv.tensor(v.shape())).transpose()?,
            g.track_op().then(|| dg.tensor(g.shape())).transpose()?,
        ])
    })
}
