//! Crops of images, made on the device: bit for bit those of `data::augment`.

use std::ops::Range;

use super::engine::{Launch, Output};
use crate::config::AugmentConfig;
use candle_core::{DType, Result, Tensor};

/// Bytes that the steps between pixels and crops may take; one crop at least is always worked on.
const SCRATCH: usize = 256 << 20;
/// Values of one thread, about.
const VALUES: usize = 8;
/// Threads of a block.
const THREADS: u32 = 256;
/// Threads of a block that sees a whole crop.
const MANY_THREADS: u32 = 512;
/// Box blurs along each axis.
const BLURS: usize = 3;

/// Normalized crops `[C, 3, size, size]` in `dtype`, of the records `rows` in turn.
///
/// - `bytes`: records, pixels and weights as `data::augment::DeviceCrops` describes them, records first;
/// - `middles`: where the middle of every record begins, and where the last ends.
pub(in super::super) fn crops(
    bytes: &Tensor,
    middles: &[u64],
    rows: &[Range<usize>],
    size: usize,
    augment: &AugmentConfig,
    dtype: DType,
) -> Result<Tensor> {
    let values = 3 * size * size;
    let count: usize = rows.iter().map(ExactSizeIterator::len).sum();
    let out = Output::new(count * values, dtype, bytes)?;
    let parts = values.div_ceil(VALUES * THREADS as usize);
    let mut done = 0;
    for chunk in rows.iter().flat_map(|rows| chunks(rows.clone(), middles, 2 * values)) {
        let (first, crops) = (chunk.start, chunk.len());
        let middle_bytes = (middles[chunk.end] - middles[first]) as usize;
        let memory = |len: usize| Output::new(len.div_ceil(size_of::<u32>()), DType::U32, bytes);
        let (middle, planes, blurred) =
            (memory(middle_bytes)?, memory(crops * values)?, memory(crops * values)?);
        let launch = |kernel| {
            Launch::new("augment", kernel, dtype, bytes)
                .blocks(crops * parts, THREADS)
                .tensor(bytes)
                .word(first)
        };
        let origin = middles[first] as usize;
        launch("resize_first").output(&middle).word(origin).int(size).int(parts).run()?;
        launch("resize_second").output(&middle).word(origin).output(&planes).int(size).int(parts).run()?;
        launch("colors").blocks(crops, MANY_THREADS).output(&planes).int(size).run()?;
        for pass in 0..2 * BLURS {
            // along rows, then along columns; the last is back in `planes`
            let (from, to) = if pass.is_multiple_of(2) { (&planes, &blurred) } else { (&blurred, &planes) };
            launch("box_blur").output(from).output(to).int(size).int(pass / BLURS).int(parts).run()?;
        }
        let normalization = augment.mean.into_iter().chain(augment.std);
        let finish = launch("finish").output(&planes).output(&out).word(done).int(size).int(parts);
        normalization.fold(finish, Launch::float).run()?;
        done += crops;
    }
    out.tensor((count, 3, size, size))
}

/// Parts of `rows` whose middles, and `each` bytes a crop, are at most [`SCRATCH`].
fn chunks(rows: Range<usize>, middles: &[u64], each: usize) -> Vec<Range<usize>> {
    let mut chunks: Vec<Range<usize>> = Vec::new();
    for row in rows {
        match chunks.last_mut() {
            Some(chunk)
                if (middles[row + 1] - middles[chunk.start]) as usize + (row + 1 - chunk.start) * each
                    <= SCRATCH =>
            {
                chunk.end = row + 1;
            }
            _ => chunks.push(row..row + 1),
        }
    }
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_keep_within_the_scratch_memory_and_leave_no_row_out() {
        let third = (SCRATCH / 3) as u64;
        let middles: Vec<u64> =
            (0..8).map(|row| row * third).chain([8 * third + 9 * SCRATCH as u64]).collect();
        assert_eq!(chunks(1..8, &middles, 0), [1..4, 4..7, 7..8]);
        assert_eq!(chunks(0..4, &middles, SCRATCH / 3), [0..1, 1..2, 2..3, 3..4]);
        assert!(chunks(3..3, &middles, 0).is_empty());
    }
}
