//! Multi-head self-attention straight from packed projections.

use super::access::{output, tensor, values, wide, with_values};
use super::buffer::zeros;
use super::head::{Gradients, Inputs, attend, attend_backward, split};
use candle_core::{CpuStorage, CustomOp1, D, Error, Layout, Result, Shape, Tensor, bail};
use ndarray::{ArrayView4, ArrayView5, ArrayViewMut4, ArrayViewMut5, Axis, s};
use rayon::prelude::*;

pub(super) fn check(qkv: &Tensor, heads: usize) -> Result<()> {
    let (_, tokens, width) = qkv.dims3()?;
    if heads == 0 || tokens == 0 || width == 0 || width % (3 * heads) != 0 {
        bail!("attention: {heads} heads need qkv [B, N, 3 · {heads} · d], found {:?}", qkv.shape())
    }
    Ok(())
}

/// Softmax over the last dimension, in `f32` at least; the maximum only shifts, so it is a constant to the gradient.
pub(super) fn softmax(scores: &Tensor) -> Result<Tensor> {
    let (dtype, scores) = (scores.dtype(), wide(scores)?);
    let largest = scores.detach().max_keepdim(D::Minus1)?;
    let exponentials = scores.broadcast_sub(&largest)?.exp()?;
    exponentials.broadcast_div(&exponentials.sum_keepdim(D::Minus1)?)?.to_dtype(dtype)
}

/// The q, k or v (`part` 0, 1, 2) of all heads, `[B, heads, N, d]`.
fn projection(qkv: &Tensor, heads: usize, part: usize) -> Result<Tensor> {
    let (images, tokens, width) = qkv.dims3()?;
    let dim = width / 3;
    let part = qkv.narrow(2, part * dim, dim)?.reshape((images, tokens, heads, dim / heads))?;
    part.transpose(1, 2)?.contiguous()
}

pub(super) fn weights(qkv: &Tensor, heads: usize) -> Result<Tensor> {
    let (q, k) = (projection(qkv, heads, 0)?, projection(qkv, heads, 1)?);
    let scale = (q.dim(D::Minus1)? as f64).powf(-0.5);
    softmax(&(q * scale)?.matmul(&k.t()?)?)
}

pub(super) fn composition(qkv: &Tensor, heads: usize) -> Result<Tensor> {
    let (images, tokens, width) = qkv.dims3()?;
    let out = weights(qkv, heads)?.matmul(&projection(qkv, heads, 2)?)?;
    out.transpose(1, 2)?.reshape((images, tokens, width / 3))
}

pub(super) fn fused(qkv: &Tensor, heads: usize) -> Result<Tensor> {
    qkv.contiguous()?.apply_op1(Attention { heads })
}

struct Attention {
    heads: usize,
}

/// Images of equally many tokens, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequences {
    /// Images.
    pub images: usize,
    /// Tokens of each.
    pub tokens: usize,
}

impl Sequences {
    /// Tokens of all images.
    pub fn rows(&self) -> usize {
        self.images * self.tokens
    }
}

/// The packed projections by image, head, part (q, k, v), token and feature.
fn parts<'a>(qkv: &'a [f32], sequences: Sequences, heads: usize) -> Result<ArrayView5<'a, f32>> {
    let Sequences { images, tokens } = sequences;
    let shape = (images, tokens, 3, heads, qkv.len() / (images * tokens * 3 * heads));
    Ok(ArrayView5::from_shape(shape, qkv).map_err(Error::wrap)?.permuted_axes([0, 3, 2, 1, 4]))
}

/// The same for writing.
fn parts_mut<'a>(qkv: &'a mut [f32], sequences: Sequences, heads: usize) -> Result<ArrayViewMut5<'a, f32>> {
    let Sequences { images, tokens } = sequences;
    let shape = (images, tokens, 3, heads, qkv.len() / (images * tokens * 3 * heads));
    Ok(ArrayViewMut5::from_shape(shape, qkv).map_err(Error::wrap)?.permuted_axes([0, 3, 2, 1, 4]))
}

fn inputs<'a>(parts: &ArrayView5<'a, f32>, image: usize, head: usize) -> Inputs<'a> {
    let part = |part: usize| (*parts).slice_move(s![image, head, part, .., ..]);
    Inputs { q: part(0), k: part(1), v: part(2) }
}

/// Self-attention of all images of `groups`, whose rows of packed projections follow each other in `qkv`
/// `[R, 3D]`; `out`: `[R, D]`.
pub(super) fn forward(qkv: &[f32], groups: &[Sequences], heads: usize, out: &mut [f32]) -> Result<()> {
    let mut tasks = Vec::new();
    let (mut qkv, mut out) = (qkv, out);
    let dim = out.len() / groups.iter().map(Sequences::rows).sum::<usize>();
    for &group in groups {
        let (these, others) = qkv.split_at(group.rows() * 3 * dim);
        let (outs, other_outs) = out.split_at_mut(group.rows() * dim);
        (qkv, out) = (others, other_outs);
        let parts = parts(these, group, heads)?;
        let by_head = ArrayViewMut4::from_shape((group.images, group.tokens, heads, dim / heads), outs)
            .map_err(Error::wrap)?
            .permuted_axes([0, 2, 1, 3]);
        let places = split(by_head).into_iter().flat_map(split).enumerate();
        tasks.extend(places.map(|(place, out)| (inputs(&parts, place / heads, place % heads), out)));
    }
    tasks.into_par_iter().for_each(|(inputs, out)| attend(inputs, out));
    Ok(())
}

/// Overwrites `d_qkv` with the gradient of [`forward`] for a gradient `d_out` of its result.
pub(super) fn backward(
    qkv: &[f32],
    groups: &[Sequences],
    heads: usize,
    d_out: &[f32],
    d_qkv: &mut [f32],
) -> Result<()> {
    let mut tasks = Vec::new();
    let (mut qkv, mut d_out, mut d_qkv) = (qkv, d_out, d_qkv);
    let dim = d_out.len() / groups.iter().map(Sequences::rows).sum::<usize>();
    for &group in groups {
        let (these, others) = qkv.split_at(group.rows() * 3 * dim);
        let (d_outs, other_d_outs) = d_out.split_at(group.rows() * dim);
        let (d_these, d_others) = d_qkv.split_at_mut(group.rows() * 3 * dim);
        (qkv, d_out, d_qkv) = (others, other_d_outs, d_others);
        let parts = parts(these, group, heads)?;
        let d_outs = ArrayView4::from_shape((group.images, group.tokens, heads, dim / heads), d_outs)
            .map_err(Error::wrap)?;
        let places = split(parts_mut(d_these, group, heads)?).into_iter().flat_map(split).enumerate();
        tasks.extend(places.map(|(place, gradients)| {
            let (image, head) = (place / heads, place % heads);
            let (q, rest) = gradients.split_at(Axis(0), 1);
            let (k, v) = rest.split_at(Axis(0), 1);
            let [q, k, v] = [q, k, v].map(|part| part.index_axis_move(Axis(0), 0));
            let d_out = d_outs.slice_move(s![image, .., head, ..]);
            (inputs(&parts, image, head), d_out, Gradients { q, k, v })
        }));
    }
    tasks.into_par_iter().for_each(|(inputs, d_out, gradients)| attend_backward(inputs, d_out, gradients));
    Ok(())
}

impl CustomOp1 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (images, tokens, width) = layout.shape().dims3()?;
        let mut out = zeros(images * tokens * width / 3);
        forward(values(qkv, layout)?, &[Sequences { images, tokens }], self.heads, &mut out)?;
        output(out, (images, tokens, width / 3))
    }

    fn bwd(&self, qkv: &Tensor, _result: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let (images, tokens, width) = qkv.dims3()?;
        let mut d_qkv = zeros(images * tokens * width);
        with_values([qkv, &gradient.contiguous()?], |[qkv, d_out]| {
            backward(qkv, &[Sequences { images, tokens }], self.heads, d_out, &mut d_qkv)
        })?;
        Ok(Some(tensor(d_qkv, qkv.shape())?))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Ops, testing::*};

    #[test]
    fn fused_agrees_with_composition_and_finite_differences() {
        for (images, tokens, heads, dim) in [(1, 1, 1, 1), (2, 5, 3, 4), (1, 33, 2, 17), (3, 17, 1, 16)] {
            check(&|ops, t| ops.attention(&t[0], heads), &[&[images, tokens, 3 * heads * dim]]);
        }
    }

    #[test]
    fn more_queries_than_one_block_agree() {
        check(&|ops, t| ops.attention(&t[0], 1), &[&[1, 300, 3 * 4]]);
    }

    #[test]
    fn weights_are_those_of_the_attention() {
        let qkv = random(1, &[2, 7, 3 * 2 * 4]);
        let weights = Ops::fused().attention_weights(&qkv, 2).unwrap();
        assert_eq!(weights.dims(), [2, 2, 7, 7]);
        let v = qkv.narrow(2, 16, 8).unwrap().reshape((2, 7, 2, 4)).unwrap().transpose(1, 2).unwrap();
        let out = weights.matmul(&v.contiguous().unwrap()).unwrap().transpose(1, 2).unwrap();
        let fused = Ops::fused().attention(&qkv, 2).unwrap();
        assert_close("weights · v", &flat(&out.contiguous().unwrap()), &flat(&fused), 1e-6);
    }

    #[test]
    fn extreme_scores_stay_finite() {
        let qkv = (random(1, &[1, 9, 3 * 4]) * 1e4).unwrap();
        assert!(flat(&Ops::fused().attention(&qkv, 1).unwrap()).iter().all(|v| v.is_finite()));
    }

    #[test]
    fn wrong_shapes_are_refused() {
        let error = Ops::fused().attention(&random(1, &[1, 2, 8]), 1).unwrap_err().to_string();
        assert!(error.contains("1 heads") && error.contains("[1, 2, 8]"), "{error}");
        assert!(Ops::fused().attention(&random(1, &[1, 2, 9]), 0).is_err());
    }
}
