//! Attention of a few queries over all tokens of their image.

use super::access::{output, stored, tensor, values};
use super::attention::softmax;
use super::buffer::zeros;
use super::head::{Gradients, Inputs, attend, attend_backward, split};
use candle_core::{CpuStorage, CustomOp3, Error, Layout, Result, Shape, Tensor, bail};
use ndarray::{ArrayView4, ArrayViewMut4, s};
use rayon::prelude::*;

pub(super) fn check(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize) -> Result<()> {
    let ((images, queries, dim), (k_images, tokens, k_dim)) = (q.dims3()?, k.dims3()?);
    let fits = images == k_images && dim == k_dim && v.dims() == k.dims();
    if !fits || heads == 0 || queries * tokens * dim == 0 || dim % heads != 0 {
        bail!(
            "class_attention: {heads} heads need q [B, M, D] and k, v [B, T, D], found {:?}, {:?}, {:?}",
            q.shape(),
            k.shape(),
            v.shape()
        )
    }
    Ok(())
}

pub(super) fn composition(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize) -> Result<Tensor> {
    let by_head = |t: &Tensor| -> Result<Tensor> {
        let (images, tokens, dim) = t.dims3()?;
        t.reshape((images, tokens, heads, dim / heads))?.transpose(1, 2)?.contiguous()
    };
    let scale = ((q.dim(2)? / heads) as f64).powf(-0.5);
    let scores = (by_head(q)? * scale)?.matmul(&by_head(k)?.t()?)?;
    softmax(&scores)?.matmul(&by_head(v)?)?.transpose(1, 2)?.reshape(q.shape())
}

pub(super) fn fused(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize) -> Result<Tensor> {
    q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, ClassAttention { heads })
}

struct ClassAttention {
    heads: usize,
}

/// `[B, T, D]` by image, token, head and feature.
fn by_head<'a>(values: &'a [f32], shape: &Shape, heads: usize) -> Result<ArrayView4<'a, f32>> {
    let (images, tokens, dim) = shape.dims3()?;
    ArrayView4::from_shape((images, tokens, heads, dim / heads), values).map_err(Error::wrap)
}

/// The same for writing, one view per image and head.
fn by_head_mut<'a>(
    values: &'a mut [f32],
    shape: &Shape,
    heads: usize,
) -> Result<Vec<ndarray::ArrayViewMut2<'a, f32>>> {
    let (images, tokens, dim) = shape.dims3()?;
    let view =
        ArrayViewMut4::from_shape((images, tokens, heads, dim / heads), values).map_err(Error::wrap)?;
    Ok(split(view.permuted_axes([0, 2, 1, 3])).into_iter().flat_map(split).collect())
}

impl CustomOp3 for ClassAttention {
    fn name(&self) -> &'static str {
        "class_attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let heads = self.heads;
        let q = by_head(values(q, q_layout)?, q_layout.shape(), heads)?;
        let k = by_head(values(k, k_layout)?, k_layout.shape(), heads)?;
        let v = by_head(values(v, v_layout)?, v_layout.shape(), heads)?;
        let mut out = zeros(q_layout.shape().elem_count());
        let tasks = by_head_mut(&mut out, q_layout.shape(), heads)?;
        tasks.into_par_iter().enumerate().for_each(|(task, out)| {
            let place = s![task / heads, .., task % heads, ..];
            attend(Inputs { q: q.slice(place), k: k.slice(place), v: v.slice(place) }, out);
        });
        output(out, q_layout.shape())
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let heads = self.heads;
        let gradient = gradient.contiguous()?;
        let ((q_storage, q_layout), (k_storage, k_layout)) = (q.storage_and_layout(), k.storage_and_layout());
        let ((v_storage, v_layout), (d_storage, d_layout)) =
            (v.storage_and_layout(), gradient.storage_and_layout());
        let q_view = by_head(stored(&q_storage, q_layout)?, q.shape(), heads)?;
        let k_view = by_head(stored(&k_storage, k_layout)?, k.shape(), heads)?;
        let v_view = by_head(stored(&v_storage, v_layout)?, v.shape(), heads)?;
        let d_out = by_head(stored(&d_storage, d_layout)?, q.shape(), heads)?;
        let (mut dq, mut dk, mut dv) = (zeros(q.elem_count()), zeros(k.elem_count()), zeros(v.elem_count()));
        let tasks: Vec<_> = by_head_mut(&mut dq, q.shape(), heads)?
            .into_iter()
            .zip(by_head_mut(&mut dk, k.shape(), heads)?)
            .zip(by_head_mut(&mut dv, v.shape(), heads)?)
            .map(|((q, k), v)| Gradients { q, k, v })
            .collect();
        tasks.into_par_iter().enumerate().for_each(|(task, gradients)| {
            let place = s![task / heads, .., task % heads, ..];
            let inputs = Inputs { q: q_view.slice(place), k: k_view.slice(place), v: v_view.slice(place) };
            attend_backward(inputs, d_out.slice(place), gradients);
        });
        Ok((
            q.track_op().then(|| tensor(dq, q.shape())).transpose()?,
            k.track_op().then(|| tensor(dk, k.shape())).transpose()?,
            v.track_op().then(|| tensor(dv, v.shape())).transpose()?,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Ops, testing::*};

    #[test]
    fn fused_agrees_with_composition_and_finite_differences() {
        for (images, queries, tokens, heads, dim) in
            [(1, 1, 1, 1, 1), (3, 1, 17, 3, 5), (2, 2, 33, 2, 16), (1, 1, 197, 1, 33)]
        {
            let (q, kv) = ([images, queries, heads * dim], [images, tokens, heads * dim]);
            check(&|ops, t| ops.class_attention(&t[0], &t[1], &t[2], heads), &[&q, &kv, &kv]);
        }
    }

    #[test]
    fn wrong_shapes_are_refused() {
        let (q, k) = (random(1, &[2, 1, 6]), random(2, &[2, 5, 6]));
        assert!(Ops::fused().class_attention(&q, &k, &k, 4).is_err());
        assert!(Ops::fused().class_attention(&q, &k, &q, 2).is_err());
        assert!(Ops::fused().class_attention(&q, &k, &k, 2).is_ok());
    }
}
