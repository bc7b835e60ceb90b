//! Residual connection with stochastic depth.

use super::engine::{Launch, Output, address, packed};
use super::graph::of_two;
use candle_core::{Result, Tensor};

pub(in super::super) fn add_scaled(x: &Tensor, branch: &Tensor, scale: Option<&[f32]>) -> Result<Tensor> {
    let (x, branch) = (x.contiguous()?, branch.contiguous()?);
    let scale = scale.map(|scale| Tensor::from_slice(scale, scale.len(), x.device())).transpose()?;
    let out = scaled(Some(&x), &branch, scale.as_ref())?;
    let (shape, tracked) = (x.shape().clone(), [x.track_op(), branch.track_op()]);
    of_two("add_scaled", [&x, &branch], out, shape.clone(), move |d_out| {
        let d_branch = match (tracked[1], &scale) {
            (false, _) => None,
            (true, None) => Some(d_out.clone()),
            (true, Some(scale)) => Some(scaled(None, d_out, Some(scale))?.tensor(&shape)?),
        };
        Ok([tracked[0].then(|| d_out.clone()), d_branch])
    })
}

/// `x + scale · branch`, without `x` if there is none.
fn scaled(x: Option<&Tensor>, branch: &Tensor, scale: Option<&Tensor>) -> Result<Output> {
    let (out, count) = (Output::like(branch)?, branch.elem_count());
    let sample = count / branch.dim(0)?.max(1);
    let addresses = [address(branch)?, out.at(0), x.map_or(Ok(0), address)?];
    let (values, pack) = packed(branch.dtype(), &[sample], &addresses);
    let launch = Launch::new("residual", "add_scaled", branch.dtype(), branch).threads(count / values);
    let launch = match x {
        Some(x) => launch.tensor(x),
        None => launch.null(),
    };
    let launch = launch.tensor(branch);
    let launch = match scale {
        Some(scale) => launch.tensor(scale),
        None => launch.null(),
    };
    launch.output(&out).word(count).word(sample).int(pack).run()?;
    Ok(out)
}
