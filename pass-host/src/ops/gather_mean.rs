//! Mean of the positives of every patch: the aggregation "w/o Aggregation" of the paper.

use super::access::{output, stored, tensor, values, wide};
use super::buffer::{build, zeros};
use super::lanes::{add_multiple, widest};
use super::positives::Positives;
use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

pub(super) fn check(x: &Tensor, positives: &Positives) -> Result<()> {
    let (batch, patches, dim) = x.dims3()?;
    if (batch, patches) != (positives.batch(), positives.patches()) || dim == 0 {
        bail!(
            "gather_mean: positives of {} images of {} patches need x [B, N, D], found {:?}",
            positives.batch(),
            positives.patches(),
            x.shape()
        )
    }
    Ok(())
}

pub(super) fn composition(x: &Tensor, positives: &Positives) -> Result<Tensor> {
    let (batch, patches, dim) = x.dims3()?;
    if positives.k() == 0 {
        return x.zeros_like();
    }
    let (dtype, x) = (x.dtype(), wide(x)?);
    let rows = x.reshape((batch * patches, dim))?.contiguous()?;
    let gathered = rows.index_select(&positives.rows(x.device())?, 0)?;
    let gathered = gathered.reshape((batch, patches, positives.k(), dim))?;
    let shares = positives.mask(|count| 1.0 / count as f32, 0.0, &x)?.unsqueeze(D::Minus1)?;
    gathered.broadcast_mul(&shares)?.sum(2)?.to_dtype(dtype)
}

pub(super) fn fused(x: &Tensor, positives: &Positives) -> Result<Tensor> {
    x.contiguous()?.apply_op1(GatherMean { positives: positives.clone() })
}

struct GatherMean {
    positives: Positives,
}

/// Patches of one task of the forward pass.
const PATCHES: usize = 32;

impl CustomOp1 for GatherMean {
    fn name(&self) -> &'static str {
        "gather_mean"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, patches, dim) = layout.shape().dims3()?;
        let x = values(x, layout)?;
        let (out, _) = build(x.len(), PATCHES * dim, |part, out| {
            widest!({
                for (i, out) in out.chunks_exact_mut(dim).enumerate() {
                    let row = part * PATCHES + i;
                    let (image, patch) = (row / patches, row % patches);
                    let positives = self.positives.of(image, patch);
                    let share = 1.0 / positives.len() as f32;
                    for &positive in positives {
                        let row = image * patches + positive as usize;
                        add_multiple(out, share, &x[row * dim..][..dim]);
                    }
                }
            });
        });
        output(out, layout.shape())
    }

    fn bwd(&self, x: &Tensor, _result: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let (_, patches, dim) = x.dims3()?;
        let gradient = gradient.contiguous()?;
        let (storage, layout) = gradient.storage_and_layout();
        let d_out = stored(&storage, layout)?;
        let mut dx = zeros(d_out.len());
        // one task per image: positives lie in the same image, so the scatter is ordered within a task
        dx.par_chunks_exact_mut(patches * dim)
            .zip(d_out.par_chunks_exact(patches * dim))
            .enumerate()
            .for_each(|(image, (dx, d_out))| {
                widest!({
                    for (patch, d_out) in d_out.chunks_exact(dim).enumerate() {
                        let positives = self.positives.of(image, patch);
                        let share = 1.0 / positives.len() as f32;
                        for &positive in positives {
                            add_multiple(&mut dx[positive as usize * dim..][..dim], share, d_out);
                        }
                    }
                });
            });
        Ok(Some(tensor(dx, x.shape())?))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Positives;
    use super::super::positives::tests::random_positives;
    use super::super::{Ops, testing::*};

    #[test]
    fn fused_agrees_with_composition_and_finite_differences() {
        for (batch, patches, k, dim) in [(1, 2, 1, 1), (2, 9, 4, 17), (3, 40, 2, 33)] {
            let positives = random_positives(batch, patches, k);
            check(&|ops, t| ops.gather_mean(&t[0], &positives), &[&[batch, patches, dim]]);
        }
    }

    #[test]
    fn means_of_small_numbers() {
        let x = candle_core::Tensor::new(&[[[1.0f32], [2.0], [4.0]]], &candle_core::Device::Cpu).unwrap();
        let positives = Positives::new(vec![1, 2, 0, 0, 0, 0], vec![2, 1, 0], 2, 1, 3).unwrap();
        for ops in [Ops::fused(), Ops::reference()] {
            assert_eq!(flat(&ops.gather_mean(&x, &positives).unwrap()), [3.0, 1.0, 0.0]);
        }
        assert!(Ops::fused().gather_mean(&random(1, &[1, 4, 2]), &positives).is_err());
    }
}
