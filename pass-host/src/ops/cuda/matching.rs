//! The positives of every patch, chosen on the device.

use super::engine::{Launch, Output};
use candle_core::{DType, Result, Tensor};

/// Indices `[B, N, k]` of the most similar candidates of every patch of features `[B, N, D]`: the choice of
/// `pass_core::matching`, 0 where a patch has no further candidate.
///
/// - `candidates`: `[N, M]`, ascending, `u32::MAX` where a patch has fewer;
/// - `eps`: smallest norm a feature is divided by.
pub(in super::super) fn positives(
    features: &Tensor,
    candidates: &Tensor,
    k: usize,
    eps: f32,
) -> Result<Tensor> {
    let features = features.detach().contiguous()?;
    let (batch, n, dim) = features.dims3()?;
    let (slots, rows) = (candidates.dim(1)?, batch * n);
    let inverse = Output::new(rows, DType::F32, &features)?;
    Launch::new("matching", "inverse_norms", features.dtype(), &features)
        .warps(rows.div_ceil(2), 0)
        .tensor(&features)
        .output(&inverse)
        .int(rows)
        .int(dim)
        .float(eps)
        .run()?;
    let index = Output::new(rows * k, DType::U32, &features)?;
    Launch::new("matching", "matching", features.dtype(), &features)
        .warps(rows, 2 * k * size_of::<u32>())
        .tensor(&features)
        .output(&inverse)
        .tensor(candidates)
        .output(&index)
        .int(rows)
        .int(n)
        .int(slots)
        .int(k)
        .int(dim)
        .run()?;
    index.tensor((batch, n, k))
}
