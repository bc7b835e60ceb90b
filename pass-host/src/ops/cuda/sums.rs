//! Sums over the rows of a matrix, in a fixed order.

use super::engine::{Launch, Output};
use candle_core::{DType, Result, Tensor};

/// Rows that one block adds up at least.
const PART: usize = 512;
/// Parts that rows are cut into at most: the shares of all of them are added by one block.
const PARTS: usize = 64;

/// Rows of a part of `rows` rows, and the number of parts.
pub(super) fn cut(rows: usize) -> (usize, usize) {
    let part = PART.max(rows.div_ceil(PARTS));
    (part, rows.div_ceil(part))
}

/// `scale · Σ_rows` of values `[.., columns]`, of type `dtype`.
pub(super) fn scaled_sum(values: &Tensor, columns: usize, scale: f32, dtype: DType) -> Result<Output> {
    let rows = values.elem_count() / columns;
    let (part, parts) = cut(rows);
    let shares = Output::new(parts * columns, DType::F32, values)?;
    Launch::new("sums", "column_shares", values.dtype(), values)
        .tiles(columns, parts)
        .tensor(values)
        .output(&shares)
        .int(rows)
        .int(columns)
        .int(part)
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
        .tiles(columns, 1)
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

#[cfg(test)]
mod tests {
    use super::cut;

    #[test]
    fn parts_cover_all_rows_and_are_few() {
        for rows in [1, 511, 512, 513, 32_768, 32_769, 118_784] {
            let (part, parts) = cut(rows);
            assert!(parts <= 64 && part * parts >= rows && part * (parts - 1) < rows, "{rows}");
        }
    }
}
