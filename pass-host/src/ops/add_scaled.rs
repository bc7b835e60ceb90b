//! Residual connection with stochastic depth.

use super::access::{output, stored, tensor, values};
use super::buffer::build;
use super::lanes::widest;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

pub(super) fn check(x: &Tensor, branch: &Tensor, scale: Option<&[f32]>) -> Result<()> {
    if x.dims() != branch.dims() {
        bail!("add_scaled: x {:?} and branch {:?} differ", x.shape(), branch.shape())
    }
    match scale {
        Some(scale) if scale.len() != x.dim(0)? => {
            bail!("add_scaled: {} factors for x {:?}", scale.len(), x.shape())
        }
        _ => Ok(()),
    }
}

pub(super) fn composition(x: &Tensor, branch: &Tensor, scale: Option<&[f32]>) -> Result<Tensor> {
    let Some(scale) = scale else { return x.add(branch) };
    let mut shape = vec![1; x.rank()];
    shape[0] = scale.len();
    let scale = Tensor::from_slice(scale, shape, x.device())?.to_dtype(x.dtype())?;
    x.add(&branch.broadcast_mul(&scale)?)
}

pub(super) fn fused(x: &Tensor, branch: &Tensor, scale: Option<&[f32]>) -> Result<Tensor> {
    x.contiguous()?.apply_op2(&branch.contiguous()?, AddScaled { scale: scale.map(<[f32]>::to_vec) })
}

struct AddScaled {
    /// One factor per sample.
    scale: Option<Vec<f32>>,
}

/// Values of one task.
const PART: usize = 1 << 14;

impl AddScaled {
    /// Calls `kernel(range, factor)` for the stretches of equal factor within values `from..to` of `len`.
    #[inline(always)]
    fn stretches(
        &self,
        from: usize,
        to: usize,
        len: usize,
        mut kernel: impl FnMut(std::ops::Range<usize>, f32),
    ) {
        let Some(scale) = &self.scale else { return kernel(from..to, 1.0) };
        let sample = len / scale.len();
        let mut at = from;
        while at < to {
            let end = ((at / sample + 1) * sample).min(to);
            kernel(at..end, scale[at / sample]);
            at = end;
        }
    }
}

impl CustomOp2 for AddScaled {
    fn name(&self) -> &'static str {
        "add_scaled"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        branch: &CpuStorage,
        branch_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, branch) = (values(x, x_layout)?, values(branch, branch_layout)?);
        let (out, _) = build(x.len(), PART, |part, out| {
            let start = part * PART;
            widest!({
                self.stretches(
                    start,
                    start + out.len(),
                    x.len(),
                    #[inline(always)]
                    |range, factor| {
                        let out = &mut out[range.start - start..range.end - start];
                        for ((out, &x), &branch) in out.iter_mut().zip(&x[range.clone()]).zip(&branch[range])
                        {
                            *out = factor.mul_add(branch, x);
                        }
                    },
                );
            });
        });
        output(out, x_layout.shape())
    }

    fn bwd(
        &self,
        x: &Tensor,
        branch: &Tensor,
        _result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let d_branch = if !branch.track_op() {
            None
        } else if self.scale.is_none() {
            Some(gradient.clone())
        } else {
            let gradient = gradient.contiguous()?;
            let (storage, layout) = gradient.storage_and_layout();
            let d_out = stored(&storage, layout)?;
            let (scaled, _) = build(d_out.len(), PART, |part, scaled| {
                let start = part * PART;
                widest!({
                    self.stretches(
                        start,
                        start + scaled.len(),
                        d_out.len(),
                        #[inline(always)]
                        |range, factor| {
                            let scaled = &mut scaled[range.start - start..range.end - start];
                            for (scaled, &d) in scaled.iter_mut().zip(&d_out[range]) {
                                *scaled = factor * d;
                            }
                        },
                    );
                });
            });
            Some(tensor(scaled, branch.shape())?)
        };
        Ok((x.track_op().then(|| gradient.clone()), d_branch))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Ops, testing::*};

    #[test]
    fn fused_agrees_with_composition_and_finite_differences() {
        let scale = [0.0, 1.25, -0.5, 1.0, 1.25];
        for (samples, tokens, dim) in [(1, 1, 1), (3, 5, 7), (5, 37, 193)] {
            let shape = [samples, tokens, dim];
            check(&|ops, t| ops.add_scaled(&t[0], &t[1], Some(&scale[..samples])), &[&shape, &shape]);
            check(&|ops, t| ops.add_scaled(&t[0], &t[1], None), &[&shape, &shape]);
        }
    }

    #[test]
    fn wrong_shapes_are_refused() {
        let (x, y) = (random(1, &[2, 3]), random(2, &[2, 4]));
        assert!(Ops::fused().add_scaled(&x, &y, None).is_err());
        let error = Ops::fused().add_scaled(&x, &x, Some(&[1.0; 3])).unwrap_err().to_string();
        assert!(error.contains("3 factors"), "{error}");
    }
}
