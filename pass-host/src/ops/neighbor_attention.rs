//! Attention of every patch over its own token and its positives: the aggregation of PASS without gathering
//! `[B·N, 1+k, D]` neighborhoods (keys and values of a patch are the same in every neighborhood).

use super::access::{output, stored, tensor, values, wide};
use super::attention::softmax as softmax_composition;
use super::buffer::{build, zeros};
use super::lanes::{add_multiple, dot, softmax, widest};
use super::positives::Positives;
use candle_core::{CpuStorage, CustomOp3, D, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

pub(super) fn check(
    q: &Tensor,
    own_kv: &Tensor,
    patch_kv: &Tensor,
    positives: &Positives,
    heads: usize,
) -> Result<()> {
    let (batch, patches) = (positives.batch(), positives.patches());
    let dim = q.dim(D::Minus1)?;
    let one_or_all = |t: &Tensor, width| t.dims() == [1, 1, width] || t.dims() == [batch, patches, width];
    let fits =
        one_or_all(q, dim) && one_or_all(own_kv, 2 * dim) && patch_kv.dims() == [batch, patches, 2 * dim];
    if !fits || heads == 0 || dim == 0 || dim % heads != 0 {
        bail!(
            "neighbor_attention: {batch} images of {patches} patches and {heads} heads need q [B, N, D] or [1, 1, D], \
             own_kv [B, N, 2D] or [1, 1, 2D], patch_kv [B, N, 2D], found {:?}, {:?}, {:?}",
            q.shape(),
            own_kv.shape(),
            patch_kv.shape()
        )
    }
    Ok(())
}

pub(super) fn composition(
    q: &Tensor,
    own_kv: &Tensor,
    patch_kv: &Tensor,
    positives: &Positives,
    heads: usize,
) -> Result<Tensor> {
    let (batch, patches, k) = (positives.batch(), positives.patches(), positives.k());
    let dim = q.dim(D::Minus1)?;
    let (dtype, q, own_kv, patch_kv) = (q.dtype(), wide(q)?, wide(own_kv)?, wide(patch_kv)?);
    let rows = patch_kv.reshape((batch * patches, 2 * dim))?.contiguous()?;
    let gathered = match k {
        0 => None,
        _ => {
            Some(rows.index_select(&positives.rows(q.device())?, 0)?.reshape((batch, patches, k, 2 * dim))?)
        }
    };
    let own = own_kv.unsqueeze(2)?.broadcast_as((batch, patches, 1, 2 * dim))?.contiguous()?;
    let tokens = match &gathered {
        Some(gathered) => Tensor::cat(&[&own, gathered], 2)?,
        None => own,
    };
    let split = (batch, patches, 1 + k, heads, dim / heads);
    let keys = tokens.narrow(3, 0, dim)?.reshape(split)?;
    let values = tokens.narrow(3, dim, dim)?.reshape(split)?;
    let q = (q.broadcast_as((batch, patches, dim))? * ((dim / heads) as f64).powf(-0.5))?;
    let q = q.reshape((batch, patches, 1, heads, dim / heads))?;
    // [B, N, heads, 1+k]
    let mut scores = keys.broadcast_mul(&q)?.sum(D::Minus1)?.transpose(2, 3)?.contiguous()?;
    if k > 0 {
        let mask = positives.mask(|_| 0.0, f32::NEG_INFINITY, &scores)?;
        let mask = mask.pad_with_zeros(2, 1, 0)?.unsqueeze(2)?;
        scores = scores.broadcast_add(&mask)?;
    }
    let weights = softmax_composition(&scores)?.transpose(2, 3)?.unsqueeze(D::Minus1)?;
    values.broadcast_mul(&weights)?.sum(2)?.reshape((batch, patches, dim))?.to_dtype(dtype)
}

pub(super) fn fused(
    q: &Tensor,
    own_kv: &Tensor,
    patch_kv: &Tensor,
    positives: &Positives,
    heads: usize,
) -> Result<Tensor> {
    let operation = NeighborAttention { positives: positives.clone(), heads };
    q.contiguous()?.apply_op3(&own_kv.contiguous()?, &patch_kv.contiguous()?, operation)
}

struct NeighborAttention {
    positives: Positives,
    heads: usize,
}

/// Patches of one task of the forward pass.
const PATCHES: usize = 32;

/// One row per patch, or one row for all.
#[derive(Clone, Copy)]
struct Rows<'a> {
    values: &'a [f32],
    width: usize,
}

impl<'a> Rows<'a> {
    /// True where every patch reads the same row.
    #[inline(always)]
    fn shared(&self) -> bool {
        self.values.len() == self.width
    }

    #[inline(always)]
    fn row(&self, row: usize) -> &'a [f32] {
        let row = if self.shared() { 0 } else { row };
        &self.values[row * self.width..][..self.width]
    }
}

/// What the patches read.
struct Inputs<'a> {
    q: Rows<'a>,
    own: Rows<'a>,
    patches: Rows<'a>,
    positives: &'a Positives,
    heads: usize,
}

impl Inputs<'_> {
    #[inline(always)]
    fn dim(&self) -> usize {
        self.q.width
    }

    /// Key and value of token `j` (0 = the patch itself) of a patch.
    #[inline(always)]
    fn token(&self, image: usize, patch: usize, j: usize) -> &[f32] {
        let first = image * self.positives.patches();
        match j {
            0 => self.own.row(first + patch),
            _ => self.patches.row(first + self.positives.of(image, patch)[j - 1] as usize),
        }
    }

    /// Probabilities `[heads, tokens]` of a patch, into the front of `p`; returns the number of tokens.
    #[inline(always)]
    fn probabilities(&self, image: usize, patch: usize, p: &mut [f32]) -> usize {
        let (tokens, width) = (1 + self.positives.of(image, patch).len(), self.dim() / self.heads);
        let scale = 1.0 / (width as f32).sqrt();
        let q = self.q.row(image * self.positives.patches() + patch);
        for j in 0..tokens {
            let k = &self.token(image, patch, j)[..self.dim()];
            for (head, (q, k)) in q.chunks_exact(width).zip(k.chunks_exact(width)).enumerate() {
                p[head * tokens + j] = scale * dot(q, k);
            }
        }
        for p in p[..self.heads * tokens].chunks_exact_mut(tokens) {
            softmax(p);
        }
        tokens
    }

    /// The result for one patch, added to `out`, which holds zeros.
    #[inline(always)]
    fn attend(&self, image: usize, patch: usize, p: &mut [f32], out: &mut [f32]) {
        let tokens = self.probabilities(image, patch, p);
        let width = self.dim() / self.heads;
        for j in 0..tokens {
            let v = &self.token(image, patch, j)[self.dim()..];
            for (head, (out, v)) in out.chunks_exact_mut(width).zip(v.chunks_exact(width)).enumerate() {
                add_multiple(out, p[head * tokens + j], v);
            }
        }
    }

    /// Adds the gradients of one image. `dq` and `d_own` hold one row per patch, or one for all.
    #[inline(always)]
    fn backward(
        &self,
        image: usize,
        d_out: &[f32],
        dq: &mut [f32],
        d_own: &mut [f32],
        d_patches: &mut [f32],
    ) {
        let (dim, heads, n) = (self.dim(), self.heads, self.positives.patches());
        let width = dim / heads;
        let scale = 1.0 / (width as f32).sqrt();
        let most = heads * (1 + self.positives.k());
        let (mut p, mut ds) = (vec![0.0f32; most], vec![0.0f32; most]);
        for patch in 0..n {
            let tokens = self.probabilities(image, patch, &mut p);
            let d_out = &d_out[patch * dim..][..dim];
            for j in 0..tokens {
                let v = &self.token(image, patch, j)[dim..];
                for (head, (d, v)) in d_out.chunks_exact(width).zip(v.chunks_exact(width)).enumerate() {
                    ds[head * tokens + j] = dot(d, v);
                }
            }
            for (p, ds) in p.chunks_exact(tokens).zip(ds.chunks_exact_mut(tokens)).take(heads) {
                let mean = dot(p, ds);
                for j in 0..tokens {
                    ds[j] = p[j] * (ds[j] - mean) * scale;
                }
            }
            let q = self.q.row(image * n + patch);
            let dq = &mut dq[if self.q.shared() { 0 } else { patch * dim }..][..dim];
            for j in 0..tokens {
                let token = self.token(image, patch, j);
                let d_token = match j {
                    0 => &mut d_own[if self.own.shared() { 0 } else { patch * 2 * dim }..][..2 * dim],
                    _ => {
                        let positive = self.positives.of(image, patch)[j - 1] as usize;
                        &mut d_patches[positive * 2 * dim..][..2 * dim]
                    }
                };
                let (dk, dv) = d_token.split_at_mut(dim);
                for head in 0..heads {
                    let (place, at) = (head * width..(head + 1) * width, head * tokens + j);
                    add_multiple(&mut dq[place.clone()], ds[at], &token[place.clone()]);
                    add_multiple(&mut dk[place.clone()], ds[at], &q[place.clone()]);
                    add_multiple(&mut dv[place.clone()], p[at], &d_out[place]);
                }
            }
        }
    }
}

/// The sum of the images' shares where all patches share one row, the rows themselves elsewhere.
fn shared_or_rows(rows: Vec<f32>, shared: bool, width: usize) -> Vec<f32> {
    if !shared {
        return rows;
    }
    let mut total = vec![0.0; width];
    for share in rows.chunks_exact(width) {
        widest!(add_multiple(&mut total, 1.0, share));
    }
    total
}

impl CustomOp3 for NeighborAttention {
    fn name(&self) -> &'static str {
        "neighbor_attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        own: &CpuStorage,
        own_layout: &Layout,
        patches: &CpuStorage,
        patches_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (q, own, patches) =
            (values(q, q_layout)?, values(own, own_layout)?, values(patches, patches_layout)?);
        let dim = q_layout.dims()[2];
        let inputs = Inputs {
            q: Rows { values: q, width: dim },
            own: Rows { values: own, width: 2 * dim },
            patches: Rows { values: patches, width: 2 * dim },
            positives: &self.positives,
            heads: self.heads,
        };
        let (batch, n) = (self.positives.batch(), self.positives.patches());
        let (out, _) = build(batch * n * dim, PATCHES * dim, |part, out| {
            let mut p = vec![0.0f32; self.heads * (1 + self.positives.k())];
            widest!({
                for (i, out) in out.chunks_exact_mut(dim).enumerate() {
                    let row = part * PATCHES + i;
                    inputs.attend(row / n, row % n, &mut p, out);
                }
            });
        });
        output(out, (batch, n, dim))
    }

    fn bwd(
        &self,
        q: &Tensor,
        own: &Tensor,
        patches: &Tensor,
        _result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let gradient = gradient.contiguous()?;
        let ((q_storage, q_layout), (own_storage, own_layout)) =
            (q.storage_and_layout(), own.storage_and_layout());
        let ((patches_storage, patches_layout), (d_storage, d_layout)) =
            (patches.storage_and_layout(), gradient.storage_and_layout());
        let dim = q.dim(2)?;
        let inputs = Inputs {
            q: Rows { values: stored(&q_storage, q_layout)?, width: dim },
            own: Rows { values: stored(&own_storage, own_layout)?, width: 2 * dim },
            patches: Rows { values: stored(&patches_storage, patches_layout)?, width: 2 * dim },
            positives: &self.positives,
            heads: self.heads,
        };
        let d_out = stored(&d_storage, d_layout)?;
        let (batch, n) = (self.positives.batch(), self.positives.patches());
        let q_rows = if inputs.q.shared() { 1 } else { n };
        let own_rows = if inputs.own.shared() { 1 } else { n };
        let (mut dq, mut d_own, mut d_patches) =
            (zeros(batch * q_rows * dim), zeros(batch * own_rows * 2 * dim), zeros(batch * n * 2 * dim));
        // one task per image: positives lie in the same image, so the scatter is ordered within a task
        dq.par_chunks_exact_mut(q_rows * dim)
            .zip(d_own.par_chunks_exact_mut(own_rows * 2 * dim))
            .zip(d_patches.par_chunks_exact_mut(n * 2 * dim))
            .zip(d_out.par_chunks_exact(n * dim))
            .enumerate()
            .for_each(|(image, (((dq, d_own), d_patches), d_out))| {
                widest!(inputs.backward(image, d_out, dq, d_own, d_patches));
            });
        let dq = shared_or_rows(dq, inputs.q.shared(), dim);
        let d_own = shared_or_rows(d_own, inputs.own.shared(), 2 * dim);
        Ok((
            q.track_op().then(|| tensor(dq, q.shape())).transpose()?,
            own.track_op().then(|| tensor(d_own, own.shape())).transpose()?,
            patches.track_op().then(|| tensor(d_patches, patches.shape())).transpose()?,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::super::positives::tests::random_positives;
    use super::super::{Ops, testing::*};

    #[test]
    fn fused_agrees_with_composition_and_finite_differences() {
        for (batch, patches, k, heads, width) in
            [(1, 1, 1, 1, 1), (2, 7, 4, 3, 5), (3, 33, 3, 2, 17), (1, 40, 8, 1, 32), (2, 3, 0, 2, 4)]
        {
            let positives = random_positives(batch, patches, k);
            let dim = heads * width;
            let (all, all_kv, one, one_kv) =
                ([batch, patches, dim], [batch, patches, 2 * dim], [1, 1, dim], [1, 1, 2 * dim]);
            for shapes in [[&all, &all_kv], [&one, &one_kv], [&one, &all_kv], [&all, &one_kv]] {
                let shapes: [&[usize]; 3] = [shapes[0], shapes[1], &all_kv];
                if k == 0 {
                    // without positives nothing reads patch_kv, so it is not an input here
                    let fixed = random(9, &all_kv);
                    check(
                        &|ops, t| {
                            let fixed = fixed.to_dtype(t[0].dtype())?.to_device(t[0].device())?;
                            ops.neighbor_attention(&t[0], &t[1], &fixed, &positives, heads)
                        },
                        &shapes[..2],
                    );
                } else {
                    check(&|ops, t| ops.neighbor_attention(&t[0], &t[1], &t[2], &positives, heads), &shapes);
                }
            }
        }
    }

    #[test]
    fn a_patch_without_positives_takes_its_own_value() {
        let positives = random_positives(1, 5, 4);
        let (q, own, patches) = (random(1, &[1, 5, 6]), random(2, &[1, 5, 12]), random(3, &[1, 5, 12]));
        let out = Ops::fused().neighbor_attention(&q, &own, &patches, &positives, 2).unwrap();
        let value = own.narrow(1, 0, 1).unwrap().narrow(2, 6, 6).unwrap();
        assert_close("patch 0", &flat(&out.narrow(1, 0, 1).unwrap()), &flat(&value), 1e-7);
    }

    #[test]
    fn wrong_shapes_are_refused() {
        let positives = random_positives(2, 5, 4);
        let (q, kv) = (random(1, &[2, 5, 6]), random(2, &[2, 5, 12]));
        assert!(Ops::fused().neighbor_attention(&q, &q, &kv, &positives, 2).is_err());
        assert!(Ops::fused().neighbor_attention(&q, &kv, &kv, &positives, 4).is_err());
        let one = random(3, &[1, 1, 12]);
        assert!(Ops::fused().neighbor_attention(&q, &kv, &one, &positives, 2).is_err());
        assert!(Ops::fused().neighbor_attention(&q, &one, &kv, &positives, 2).is_ok());
    }
}
