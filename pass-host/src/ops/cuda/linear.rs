//! Linear layers, optionally followed by the exact GELU: a product, then one pass for bias and activation.

use super::super::linear::Activation;
use super::engine::{Launch, Matrices, Output, Product, address, packed};
use super::graph::{of_three, of_two};
use super::sums::scaled_sum;
use candle_core::{DType, Result, Tensor};

pub(in super::super) fn linear(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
) -> Result<Tensor> {
    let (outputs, inputs) = weight.dims2()?;
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    let rows = x.elem_count() / inputs;
    let mut shape = x.dims().to_vec();
    *shape.last_mut().expect("checked to have a last dimension") = outputs;
    let factor = weight.detach().to_dtype(x.dtype())?;
    let y = Output::new(rows * outputs, x.dtype(), &x)?;
    Product {
        m: rows,
        n: outputs,
        k: inputs,
        batch: 1,
        scale: 1.0,
        a: Matrices::one(address(&x)?, x.dtype(), inputs),
        b: Matrices::one(address(&factor)?, x.dtype(), inputs).t(),
        out: Matrices::one(y.at(0), x.dtype(), outputs),
    }
    .run(&x)?;
    let Some(bias) = bias else {
        let inputs = [x.clone(), weight.clone()];
        return of_two("linear", [&x, &weight], y, shape, move |dy| {
            let (dx, d_weight) = products_backward(&inputs[0], &inputs[1], dy)?;
            Ok([dx, d_weight])
        });
    };
    let bias = bias.contiguous()?;
    let tracked = x.track_op() || weight.track_op() || bias.track_op();
    let (values, pack) = packed(x.dtype(), &[outputs], &[y.at(0)]);
    let count = rows * outputs;
    let threads = count / values;
    if activation == Activation::None {
        Launch::new("linear", "add_bias", x.dtype(), &x)
            .threads(threads)
            .output(&y)
            .tensor(&bias)
            .word(count)
            .int(outputs)
            .int(pack)
            .run()?;
        let inputs = [x.clone(), weight.clone(), bias.clone()];
        return of_three("linear", [&x, &weight, &bias], y, shape, move |dy| backward(&inputs, dy));
    }
    // where a backward pass may follow, the input of the activation is kept; elsewhere it is overwritten
    let activated = if tracked { Some(Output::new(count, x.dtype(), &x)?) } else { None };
    Launch::new("linear", "add_bias_gelu", x.dtype(), &x)
        .threads(threads)
        .output(&y)
        .tensor(&bias)
        .output(activated.as_ref().unwrap_or(&y))
        .word(count)
        .int(outputs)
        .int(pack)
        .run()?;
    let (result, before) = match activated {
        Some(activated) => (activated, Some(y.tensor(shape.as_slice())?)),
        None => (y, None),
    };
    let inputs = [x.clone(), weight.clone(), bias.clone()];
    of_three("linear_gelu", [&x, &weight, &bias], result, shape, move |dy| match &before {
        Some(before) => backward(&inputs, &gelu_backward(before, dy)?),
        None => candle_core::bail!("linear_gelu: backward without a tracked forward pass"),
    })
}

fn gelu_backward(before: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let (du, count) = (Output::like(before)?, before.elem_count());
    let addresses = [address(before)?, address(dy)?, du.at(0)];
    let (values, pack) = packed(before.dtype(), &[count], &addresses);
    Launch::new("linear", "gelu_backward", before.dtype(), before)
        .threads(count / values)
        .tensor(before)
        .tensor(dy)
        .output(&du)
        .word(count)
        .int(pack)
        .run()?;
    du.tensor(before.shape())
}

fn backward([x, weight, bias]: &[Tensor; 3], dy: &Tensor) -> Result<[Option<Tensor>; 3]> {
    let (dx, d_weight) = products_backward(x, weight, dy)?;
    let outputs = weight.dim(0)?;
    let d_bias = match bias.track_op() {
        true => Some(scaled_sum(dy, outputs, 1.0, DType::F32)?.tensor(outputs)?),
        false => None,
    };
    Ok([dx, d_weight, d_bias])
}

/// Gradients of `x` and, in `f32`, of the weight.
fn products_backward(x: &Tensor, weight: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
    let (outputs, inputs) = weight.dims2()?;
    let rows = x.elem_count() / inputs;
    let dtype = x.dtype();
    let upstream = Matrices::one(address(dy)?, dtype, outputs);
    let dx = if x.track_op() {
        let (dx, factor) = (Output::like(x)?, weight.detach().to_dtype(dtype)?);
        Product {
            m: rows,
            n: inputs,
            k: outputs,
            batch: 1,
            scale: 1.0,
            a: upstream,
            b: Matrices::one(address(&factor)?, dtype, inputs),
            out: Matrices::one(dx.at(0), dtype, inputs),
        }
        .run(x)?;
        Some(dx.tensor(x.shape())?)
    } else {
        None
    };
    let d_weight = if weight.track_op() {
        let d_weight = Output::new(outputs * inputs, DType::F32, x)?;
        Product {
            m: outputs,
            n: inputs,
            k: rows,
            batch: 1,
            scale: 1.0,
            a: upstream.t(),
            b: Matrices::one(address(x)?, dtype, inputs),
            out: Matrices::one(d_weight.at(0), DType::F32, inputs),
        }
        .run(x)?;
        Some(d_weight.tensor(weight.shape())?)
    } else {
        None
    };
    Ok((dx, d_weight))
}
