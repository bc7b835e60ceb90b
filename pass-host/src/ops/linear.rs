//! Linear layers, optionally followed by the exact GELU.

use super::access::{output, stored, tensor, values, wide};
use super::buffer::{build, zeros};
use super::dense::{INVERSE_SQRT_TAU, Weight, column_sums, gelu, gelu_into, repeated};
use super::lanes::{normal, widest};
use super::product::Before;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, D, Layout, Result, Shape, Tensor, bail};
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
        let (mut y, before) = match bias {
            Some(bias) => (repeated(bias, rows), Before::Kept),
            None => (zeros(rows * outputs), Before::Ignored),
        };
        Weight::new(weight, outputs, inputs).apply(x, before, &mut y);
        if self.activation == Activation::Gelu && !self.tracked {
            gelu(&mut y, outputs, None);
        } else if self.activation == Activation::Gelu {
            let mut activated = zeros(y.len());
            gelu_into(&y, outputs, None, &mut activated);
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
        let layer = Weight::new(weights, outputs, inputs);
        let dx = if x.track_op() {
            let mut dx = zeros(x_values.len());
            layer.input_gradient(1.0, dy, &mut dx);
            Some(tensor(dx, x.shape())?)
        } else {
            None
        };
        let d_weight = match weight.track_op() {
            true => Some(tensor(layer.gradient(1.0, dy, x_values), weight.shape())?),
            false => None,
        };
        let d_bias = match bias {
            Some(bias) if bias.track_op() => Some(tensor(column_sums(dy, outputs, None), outputs)?),
            _ => None,
        };
        Ok((dx, d_weight, d_bias))
    }
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
