//! Mean of the positives of every patch.

use super::super::positives::Positives;
use super::engine::{Launch, Output};
use super::graph::of_one;
use candle_core::{Result, Tensor};

pub(in super::super) fn gather_mean(x: &Tensor, positives: &Positives) -> Result<Tensor> {
    let x = x.contiguous()?;
    let (rows, n, k, dim) =
        (positives.batch() * positives.patches(), positives.patches(), positives.k(), x.dim(2)?);
    let (index, counts) = (positives.index_on(x.device())?, positives.counts_on(x.device())?);
    let out = Output::like(&x)?;
    Launch::new("neighbors", "gather_mean", x.dtype(), &x)
        .warps(rows, 0)
        .tensor(&x)
        .tensor(&index)
        .tensor(&counts)
        .output(&out)
        .int(rows)
        .int(n)
        .int(k)
        .int(dim)
        .run()?;
    of_one("gather_mean", &x, out, x.shape(), move |d_out| {
        let dx = Output::like(d_out)?;
        Launch::new("neighbors", "gather_mean_backward", d_out.dtype(), d_out)
            .warps(rows, 0)
            .tensor(&index)
            .tensor(&counts)
            .tensor(d_out)
            .output(&dx)
            .int(rows)
            .int(n)
            .int(k)
            .int(dim)
            .run()?;
        Ok([Some(dx.tensor(d_out.shape())?)])
    })
}
