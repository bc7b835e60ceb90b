//! Linear layers, optionally followed by the exact GELU.

use super::access::{output, stored, tensor, values, wide};
use super::buffer::build;
use super::lanes::{add_multiple, normal, widest};
use super::product::{Before, Threads, multiply};
use candle_core::{CpuStorage, CustomOp2, CustomOp3, D, Layout, Result, Shape, Tensor, bail};
use ndarray::{ArrayView2, ArrayViewMut2};
use rayon::prelude::*;
use std::sync::OnceLock;

/// What follows the product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Activation {
    None,
    /// `u · Φ(u)`.
    Gelu,
}

pub(super) fn check(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<()> {
    let (outputs, inputs) = weight.dims2()?;
    if x.dim(D::Minus1)? != inputs || inputs * outputs == 0 {
        bail!("linear: weight {:?} needs x [.., {inputs}], found {:?}", weight.shape(), x.shape())
    }
    match bias {
        Some(bias) if bias.dims() != [outputs] => {
            bail!("linear: weight {:?} needs bias [{outputs}], found {:?}", weight.shape(), bias.shape())
        }
        _ => Ok(()),
    }
}

pub(super) fn composition(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
) -> Result<Tensor> {
    let (outputs, inputs) = weight.dims2()?;
    let mut shape = x.dims().to_vec();
    *shape.last_mut().expect("checked to have a last dimension") = outputs;
    let rows = x.elem_count() / inputs;
    let mut y = wide(&x.reshape((rows, inputs))?.matmul(&weight.to_dtype(x.dtype())?.t()?)?)?;
    if let Some(bias) = bias {
        y = y.broadcast_add(&bias.to_dtype(y.dtype())?)?;
    }
    if activation == Activation::Gelu {
        let phi = (((&y * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.0)? * 0.5)?;
        y = y.mul(&phi)?;
    }
    y.to_dtype(x.dtype())?.reshape(shape)
}

pub(super) fn fused(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
) -> Result<Tensor> {
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    let tracked = x.track_op() || weight.track_op() || bias.is_some_and(Tensor::track_op);
    let linear = Linear { activation, tracked, before_activation: OnceLock::new() };
    match bias {
        Some(bias) => x.apply_op3(&weight, &bias.contiguous()?, linear),
        None => x.apply_op2(&weight, linear),
    }
}

struct Linear {
    activation: Activation,
    /// Whether a backward pass may follow.
    tracked: bool,
    /// The input of the activation, kept for the backward pass.
    before_activation: OnceLock<Vec<f32>>,
}

/// Rows of one task of the passes over rows (not of the products).
const ROWS: usize = 32;
/// Values of one task of the elementwise passes.
const PART: usize = 1 << 14;

impl Linear {
    fn forward(
        &self,
        (x, x_layout): (&CpuStorage, &Layout),
        (weight, weight_layout): (&CpuStorage, &Layout),
        bias: Option<&[f32]>,
    ) -> Result<(CpuStorage, Shape)> {
        let (outputs, inputs) = weight_layout.shape().dims2()?;
        let (x, weight) = (values(x, x_layout)?, values(weight, weight_layout)?);
        let rows = x_layout.shape().elem_count() / inputs;
        let (mut y, _) = build(rows * outputs, ROWS * outputs, |_, part| {
            if let Some(bias) = bias {
                part.chunks_exact_mut(outputs).for_each(|row| row.copy_from_slice(bias));
            }
        });
        let before = if bias.is_some() { Before::Kept } else { Before::Ignored };
        let out = matrix_mut(&mut y, rows, outputs)?;
        multiply(
            out,
            before,
            1.0,
            matrix(x, rows, inputs)?,
            matrix(weight, outputs, inputs)?.t(),
            Threads::All,
        );
        if self.activation == Activation::Gelu && !self.tracked {
            y.par_chunks_mut(PART).for_each(|part| {
                widest!({
                    for u in part.iter_mut() {
                        *u *= normal(*u).0;
                    }
                });
            });
        } else if self.activation == Activation::Gelu {
            let (activated, _) = build(y.len(), PART, |part, activated| {
                let u = &y[part * PART..][..activated.len()];
                widest!({
                    for (activated, &u) in activated.iter_mut().zip(u) {
                        *activated = u * normal(u).0;
                    }
                });
            });
            let u = std::mem::replace(&mut y, activated);
            // an operation object lives for one call, so the cell is empty; a second value would be the same
            self.before_activation.get_or_init(|| u);
        }
        let mut shape = x_layout.dims().to_vec();
        *shape.last_mut().expect("checked to have a last dimension") = outputs;
        output(y, shape)
    }

    /// Gradients of x, weight and bias, each only if it is tracked.
    fn backward(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (outputs, inputs) = weight.dims2()?;
        let gradient = gradient.contiguous()?;
        let ((x_storage, x_layout), (weight_storage, weight_layout), (dy_storage, dy_layout)) =
            (x.storage_and_layout(), weight.storage_and_layout(), gradient.storage_and_layout());
        let (x_values, weights, dy) = (
            stored(&x_storage, x_layout)?,
            stored(&weight_storage, weight_layout)?,
            stored(&dy_storage, dy_layout)?,
        );
        let du;
        let dy = match self.activation {
            Activation::None => dy,
            Activation::Gelu => {
                let Some(u) = self.before_activation.get() else {
                    bail!("linear_gelu: backward without a tracked forward pass")
                };
                (du, _) = build(dy.len(), PART, |part, du| {
                    let place = part * PART..part * PART + du.len();
                    let (u, dy) = (&u[place.clone()], &dy[place]);
                    widest!({
                        for ((du, &u), &dy) in du.iter_mut().zip(u).zip(dy) {
                            let (phi, density) = normal(u);
                            *du = dy * (u * INVERSE_SQRT_TAU).mul_add(density, phi);
                        }
                    });
                });
                &du[..]
            }
        };
        let rows = dy.len() / outputs;
        let dy_matrix = matrix(dy, rows, outputs)?;
        let dx = if x.track_op() {
            let (mut dx, _) = build(rows * inputs, ROWS * inputs, |_, _| ());
            let out = matrix_mut(&mut dx, rows, inputs)?;
            multiply(out, Before::Ignored, 1.0, dy_matrix, matrix(weights, outputs, inputs)?, Threads::All);
            Some(tensor(dx, x.shape())?)
        } else {
            None
        };
        let d_weight = if weight.track_op() {
            let (mut d_weight, _) = build(outputs * inputs, ROWS * inputs, |_, _| ());
            let out = matrix_mut(&mut d_weight, outputs, inputs)?;
            multiply(out, Before::Ignored, 1.0, dy_matrix.t(), matrix(x_values, rows, inputs)?, Threads::All);
            Some(tensor(d_weight, weight.shape())?)
        } else {
            None
        };
        let d_bias = match bias {
            Some(bias) if bias.track_op() => Some(tensor(column_sums(dy, outputs), outputs)?),
            _ => None,
        };
        Ok((dx, d_weight, d_bias))
    }
}

/// 1 / √(2π).
const INVERSE_SQRT_TAU: f32 = 0.398_942_3;

/// Rows that one task adds up.
const SUMMED_ROWS: usize = 128;

/// Sum of the rows of a row-major matrix: parts of rows in parallel, then the parts in order.
fn column_sums(values: &[f32], columns: usize) -> Vec<f32> {
    let rows = values.len() / columns;
    let parts = rows.div_ceil(SUMMED_ROWS);
    let (shares, _) = build(parts * columns, columns, |part, share| {
        let first = part * SUMMED_ROWS * columns;
        let rows = &values[first..(first + SUMMED_ROWS * columns).min(values.len())];
        widest!({
            for row in rows.chunks_exact(columns) {
                add_multiple(share, 1.0, row);
            }
        });
    });
    let mut total = vec![0.0; columns];
    for share in shares.chunks_exact(columns) {
        widest!(add_multiple(&mut total, 1.0, share));
    }
    total
}

/// A row-major matrix over a slice.
fn matrix(values: &[f32], rows: usize, columns: usize) -> Result<ArrayView2<'_, f32>> {
    ArrayView2::from_shape((rows, columns), values).map_err(candle_core::Error::wrap)
}

/// The same, for writing.
fn matrix_mut(values: &mut [f32], rows: usize, columns: usize) -> Result<ArrayViewMut2<'_, f32>> {
    ArrayViewMut2::from_shape((rows, columns), values).map_err(candle_core::Error::wrap)
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward((x, x_layout), (weight, weight_layout), None)
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dx, d_weight, _) = self.backward(x, weight, None, gradient)?;
        Ok((dx, d_weight))
    }
}

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear"
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
        self.forward((x, x_layout), (weight, weight_layout), Some(values(bias, bias_layout)?))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        self.backward(x, weight, Some(bias), gradient)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Ops, testing::*};
    use candle_core::Tensor;

    #[test]
    fn fused_agrees_with_composition_and_finite_differences() {
        for (rows, inputs, outputs) in [(1, 1, 1), (3, 5, 7), (17, 16, 33), (140, 24, 31), (2, 65, 64)] {
            let shapes: [&[usize]; 3] = [&[rows, inputs], &[outputs, inputs], &[outputs]];
            check(&|ops, t| ops.linear(&t[0], &t[1], Some(&t[2])), &shapes);
            check(&|ops, t| ops.linear(&t[0], &t[1], None), &shapes[..2]);
            check(&|ops, t| ops.linear_gelu(&t[0], &t[1], &t[2]), &shapes);
        }
        check(&|ops, t| ops.linear(&t[0], &t[1], Some(&t[2])), &[&[2, 3, 8], &[5, 8], &[5]]);
    }

    #[test]
    fn gelu_has_its_tabulated_values() {
        let x = Tensor::new(&[[-3.0f32], [-1.0], [0.0], [0.5], [2.0]], &candle_core::Device::Cpu).unwrap();
        let (weight, bias) = (x.ones_like().unwrap().narrow(0, 0, 1).unwrap(), x.zeros_like().unwrap());
        let bias = bias.flatten_all().unwrap().narrow(0, 0, 1).unwrap();
        let y = flat(&Ops::fused().linear_gelu(&x, &weight, &bias).unwrap());
        assert_close("gelu", &y, &[-0.004_049_694, -0.158_655_25, 0.0, 0.345_731_23, 1.954_499_74], 2e-7);
    }

    #[test]
    fn wrong_shapes_are_refused() {
        let (x, weight, bias) = (random(1, &[2, 4]), random(2, &[3, 5]), random(3, &[3]));
        assert!(Ops::fused().linear(&x, &weight, None).unwrap_err().to_string().contains("[.., 5]"));
        let x = random(1, &[2, 5]);
        assert!(Ops::fused().linear(&x, &weight, Some(&x)).unwrap_err().to_string().contains("bias [3]"));
        assert!(Ops::reference().linear_gelu(&x, &weight, &bias).is_ok());
    }
}
