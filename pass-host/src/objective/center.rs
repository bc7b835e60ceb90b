//! Running centers of the teacher's outputs (SEMANTICS §4): `c ← m·c + (1 − m)·mean`, after the loss was formed.

use candle_core::{Result, Tensor};

use super::method::{State, entry};
use crate::distributed::Ranks;

/// The center `[K]` after a step whose teacher outputs had this mean.
pub fn updated(center: &Tensor, mean: &Tensor, momentum: f64) -> Result<Tensor> {
    (center * momentum)? + (mean * (1.0 - momentum))?
}

/// The center called `name` after a step: the means that micro-batches of equal size have seen, of all ranks, go into it.
pub fn after_step(
    state: &State,
    seen: &[&State],
    name: &str,
    momentum: f64,
    ranks: &Ranks,
) -> Result<Tensor> {
    let means: Vec<&Tensor> = seen.iter().map(|seen| entry(seen, name)).collect::<Result<_>>()?;
    let mean = ranks.mean(Tensor::stack(&means, 0)?.mean(0)?).map_err(candle_core::Error::wrap)?;
    updated(entry(state, name)?, &mean, momentum)
}
