//! Sums over the rows of a matrix, in a fixed order.

use super::engine::{Launch, Output};
use candle_core::{DType, Result, Tensor};

/// Rows that one block adds up.
pub(super) const PART: usize = 512;

/// `scale · Σ_rows` of values `[.., columns]`, of type `dtype`.
pub(super) fn scaled_sum(values: &Tensor, columns: usize, scale: f32, dtype: DType) -> Result<Output> {
    let rows = values.elem_count() / columns;
    let parts = rows.div_ceil(PART);
    let shares = Output::new(parts * columns, DType::F32, values)?;
    Launch::new("sums", "column_shares", values.dtype(), values)
        .tiles(columns, parts)
        .tensor(values)
        .output(&shares)
        .int(rows)
        .int(columns)
        .int(PART)
        .run()?;
    add_shares(&shares, parts, columns, scale, dtype, values)
}

/// The sum of shares `[parts, columns]`.
pub(super) fn add_shares(
    shares: &Output,
    parts: usize,
    columns: usize,
    scale: f32,
    dtype: DType,
    like: &Tensor,
) -> Result<Output> {
    let total = Output::new(columns, dtype, like)?;
    Launch::new("sums", "add_shares", dtype, like)
        .threads(columns)
        .output(shares)
        .output(&total)
        .int(parts)
        .int(columns)
        .float(scale)
        .run()?;
    Ok(total)
}

/// Mean over the rows of `[R, K]`, in `f32`, without a gradient.
pub(in super::super) fn mean_rows(rows: &Tensor) -> Result<Tensor> {
    let (count, columns) = rows.dims2()?;
    scaled_sum(&rows.contiguous()?, columns, 1.0 / count as f32, DType::F32)?.tensor(columns)
}
