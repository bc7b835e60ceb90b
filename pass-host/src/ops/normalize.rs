//! L2 normalization of rows, and weight normalization.

use super::access::{output, tensor, values, wide, with_values};
use super::buffer::build;
use super::lanes::{dot, widest};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, D, Layout, Result, Shape, Tensor, bail};

/// Rows of one task.
const ROWS: usize = 32;

pub(super) fn composition(x: &Tensor, eps: f64) -> Result<Tensor> {
    // the bound is applied to the square: the gradient of the root is then finite at x = 0
    let (dtype, x) = (x.dtype(), wide(x)?);
    let square = x.sqr()?.sum_keepdim(D::Minus1)?;
    x.broadcast_div(&square.maximum(eps * eps)?.sqrt()?)?.to_dtype(dtype)
}

pub(super) fn fused(x: &Tensor, eps: f64) -> Result<Tensor> {
    if x.dim(D::Minus1)? == 0 {
        bail!("l2_normalize: the last dimension of {:?} is empty", x.shape())
    }
    x.contiguous()?.apply_op1(L2Normalize { eps: eps as f32 })
}

struct L2Normalize {
    eps: f32,
}

/// Rows divided by their lengths.
pub(super) fn l2_rows(x: &[f32], dim: usize, eps: f32) -> Vec<f32> {
    build(x.len(), ROWS * dim, |part, out| {
        let x = &x[part * ROWS * dim..][..out.len()];
        widest!({
            for (out, x) in out.chunks_exact_mut(dim).zip(x.chunks_exact(dim)) {
                let norm = dot(x, x).sqrt();
                // a comparison rather than `max`: it keeps NaN
                let inverse = 1.0 / if norm < eps { eps } else { norm };
                for (out, &x) in out.iter_mut().zip(x) {
                    *out = x * inverse;
                }
            }
        });
    })
    .0
}

/// Gradient of [`l2_rows`] for the gradient `d_out` of its result.
pub(super) fn l2_gradient(x: &[f32], d_out: &[f32], dim: usize, eps: f32) -> Vec<f32> {
    build(x.len(), ROWS * dim, |part, dx| {
        let place = part * ROWS * dim..part * ROWS * dim + dx.len();
        let (x, d_out) = (&x[place.clone()], &d_out[place]);
        widest!({
            for ((dx, x), d) in dx.chunks_exact_mut(dim).zip(x.chunks_exact(dim)).zip(d_out.chunks_exact(dim))
            {
                let norm = dot(x, x).sqrt();
                let (inverse, along) =
                    if norm < eps { (1.0 / eps, 0.0) } else { (1.0 / norm, dot(x, d) / (norm * norm)) };
                for i in 0..dim {
                    dx[i] = (d[i] - x[i] * along) * inverse;
                }
            }
        });
    })
    .0
}

impl CustomOp1 for L2Normalize {
    fn name(&self) -> &'static str {
        "l2_normalize"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = l2_rows(values(x, layout)?, layout.shape().dim(D::Minus1)?, self.eps);
        output(out, layout.shape())
    }

    fn bwd(&self, x: &Tensor, _result: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let gradient = gradient.contiguous()?;
        let dim = x.dim(D::Minus1)?;
        let dx = with_values([x, &gradient], |[x, d_out]| Ok(l2_gradient(x, d_out, dim, self.eps)))?;
        Ok(Some(tensor(dx, x.shape())?))
    }
}

pub(super) fn check_weight(v: &Tensor, g: &Tensor) -> Result<()> {
    let (rows, dim) = v.dims2()?;
    if g.dims() != [rows, 1] || dim == 0 {
        bail!("weight_norm: v {:?} needs g [{rows}, 1], found {:?}", v.shape(), g.shape())
    }
    Ok(())
}

pub(super) fn composition_weight(v: &Tensor, g: &Tensor) -> Result<Tensor> {
    v.broadcast_mul(&g.div(&v.sqr()?.sum_keepdim(1)?.sqrt()?)?)
}

pub(super) fn fused_weight(v: &Tensor, g: &Tensor) -> Result<Tensor> {
    v.contiguous()?.apply_op2(&g.contiguous()?, WeightNorm)
}

struct WeightNorm;

/// Rows of `v` of the lengths `g`.
pub(super) fn weight_rows(v: &[f32], g: &[f32], dim: usize) -> Vec<f32> {
    build(v.len(), ROWS * dim, |part, out| {
        let v = &v[part * ROWS * dim..][..out.len()];
        let g = &g[part * ROWS..];
        widest!({
            for ((out, v), g) in out.chunks_exact_mut(dim).zip(v.chunks_exact(dim)).zip(g) {
                let factor = g / dot(v, v).sqrt();
                for (out, &v) in out.iter_mut().zip(v) {
                    *out = v * factor;
                }
            }
        });
    })
    .0
}

/// Gradients of [`weight_rows`] with respect to `v` and `g`.
pub(super) fn weight_gradient(v: &[f32], g: &[f32], d_out: &[f32], dim: usize) -> (Vec<f32>, Vec<f32>) {
    let (dv, dg) = build(v.len(), ROWS * dim, |part, dv| {
        let place = part * ROWS * dim..part * ROWS * dim + dv.len();
        let (v, d_out) = (&v[place.clone()], &d_out[place]);
        let g = &g[part * ROWS..];
        let mut dg = Vec::with_capacity(ROWS);
        widest!({
            for (((dv, v), d), g) in
                dv.chunks_exact_mut(dim).zip(v.chunks_exact(dim)).zip(d_out.chunks_exact(dim)).zip(g)
            {
                let inverse = 1.0 / dot(v, v).sqrt();
                let along = dot(v, d) * inverse;
                dg.push(along);
                let (factor, along) = (g * inverse, along * inverse);
                for i in 0..dim {
                    dv[i] = (d[i] - v[i] * along) * factor;
                }
            }
        });
        dg
    });
    (dv, dg.concat())
}

impl CustomOp2 for WeightNorm {
    fn name(&self) -> &'static str {
        "weight_norm"
    }

    fn cpu_fwd(
        &self,
        v: &CpuStorage,
        v_layout: &Layout,
        g: &CpuStorage,
        g_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let out = weight_rows(values(v, v_layout)?, values(g, g_layout)?, v_layout.dims()[1]);
        output(out, v_layout.shape())
    }

    fn bwd(
        &self,
        v: &Tensor,
        g: &Tensor,
        _result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let gradient = gradient.contiguous()?;
        let dim = v.dim(1)?;
        let (dv, dg) = with_values([v, g, &gradient], |[v, g, d_out]| Ok(weight_gradient(v, g, d_out, dim)))?;
        Ok((
            v.track_op().then(|| tensor(dv, v.shape())).transpose()?,
            g.track_op().then(|| tensor(dg, g.shape())).transpose()?,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Ops, testing::*};
    use candle_core::{Device, Tensor, Var};

    #[test]
    fn l2_normalize_agrees_with_composition_and_finite_differences() {
        for (rows, dim) in [(1, 2), (3, 31), (70, 33), (2, 256)] {
            check(&|ops, t| ops.l2_normalize(&t[0], 1e-12), &[&[rows, dim]]);
        }
        // rows shorter than eps are only scaled
        check(&|ops, t| ops.l2_normalize(&t[0], 10.0), &[&[3, 5]]);
    }

    #[test]
    fn a_zero_row_stays_zero_and_its_gradient_finite() {
        for ops in [Ops::fused(), Ops::reference()] {
            let x =
                Var::from_tensor(&Tensor::new(&[[0.0f32, 0.0], [3.0, 4.0]], &Device::Cpu).unwrap()).unwrap();
            let y = ops.l2_normalize(&x, 1e-12).unwrap();
            assert_close("normalized", &flat(&y), &[0.0, 0.0, 0.6, 0.8], 1e-7);
            let gradients = y.sum_all().unwrap().backward().unwrap();
            let gradient = flat(gradients.get(&x).unwrap());
            assert!(gradient.iter().all(|v| v.is_finite()), "{gradient:?}");
            assert_close("gradient at zero", &gradient[..2], &[1e12, 1e12], 1e-5);
        }
    }

    #[test]
    fn weight_norm_agrees_with_composition_and_finite_differences() {
        for (rows, dim) in [(1, 1), (5, 17), (67, 32)] {
            check(&|ops, t| ops.weight_norm(&t[0], &t[1]), &[&[rows, dim], &[rows, 1]]);
        }
        assert!(Ops::fused().weight_norm(&random(1, &[3, 2]), &random(2, &[3])).is_err());
    }

    #[test]
    fn weight_norm_rows_have_length_g() {
        let w = Ops::fused().weight_norm(
            &random(1, &[4, 9]),
            &Tensor::ones((4, 1), candle_core::DType::F32, &Device::Cpu).unwrap(),
        );
        let lengths = w.unwrap().sqr().unwrap().sum(1).unwrap();
        assert_close("squared lengths", &flat(&lengths), &[1.0; 4], 1e-6);
    }
}
