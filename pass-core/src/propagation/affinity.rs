//! Who votes about a row of target patches, and the vote.

use core::ops::Range;

use super::clip::ClipShape;
use crate::math::exp;
use crate::rows::{rows_of, rows_of_mut};
use crate::shape::{copy, part, part_mut, take};

/// Target patches whose products are formed together: their sums stay in registers.
const TILE: usize = 4;
/// Context patches of a row whose products are formed together.
pub(super) const LANES: usize = 16;

/// A frame of the clip: features `[height, D, stride]`, labels `[N, C]`.
#[derive(Clone, Copy)]
pub(super) struct Frame<'a> {
    pub(super) features: &'a [f32],
    pub(super) labels: &'a [f32],
}

/// The target frame and what decides about it.
pub(super) struct Voting<'a> {
    pub(super) shape: &'a ClipShape,
    pub(super) target: &'a [f32],
}

impl Voting<'_> {
    /// Labels `[columns, C]` of the target patches `columns` of `row`. They are worked on together, so that a row of context
    /// features fetched once serves all of them.
    #[inline(always)]
    pub(super) fn label_row<'c>(
        &self,
        row: usize,
        columns: Range<usize>,
        (frames, context): (usize, impl Iterator<Item = Frame<'c>> + Clone),
        scratch: &mut [f32],
        out: &mut [f32],
    ) {
        let grid = self.shape.grid;
        let rows = self.shape.window(row, grid.height());
        let mut similarities = scratch;
        let best = take(&mut similarities, self.shape.top_k());
        // of each target patch: [context frames, rows, columns of its window]
        let of_target = self.shape.votes_len();
        for (index, frame) in context.clone().enumerate() {
            for source_row in rows.clone() {
                let line = index * length(&rows) + source_row - rows.start;
                let source = self.row(frame.features, source_row);
                for tile in columns.clone().step_by(TILE) {
                    let place = (tile - columns.start) * of_target;
                    let targets = tile..columns.end.min(tile + TILE);
                    let similarities = similarities.get_mut(place..).unwrap_or_default();
                    self.similarities(row, targets, source, line, of_target, similarities);
                }
            }
        }
        let classes = self.shape.classes;
        for (place, (column, out)) in columns.zip(rows_of_mut(out, classes)).enumerate() {
            let window = self.shape.window(column, grid.width());
            let len = frames * length(&rows) * length(&window);
            let similarities = part(similarities, place * of_target, len);
            let (largest, threshold) = bounds(similarities, best);
            let lines = context.clone().flat_map(|frame| rows.clone().map(move |row| (frame, row))).map(
                |(frame, row)| {
                    part(
                        frame.labels,
                        (row * grid.width() + window.start) * classes,
                        length(&window) * classes,
                    )
                },
            );
            out.fill(0.0);
            let mut total = 0.0;
            for (similarities, labels) in rows_of(similarities, length(&window)).zip(lines) {
                for (&similarity, labels) in similarities.iter().zip(rows_of(labels, classes)) {
                    if similarity >= threshold {
                        // the reference takes exp(cos/τ); the largest is taken off first, so that no temperature overflows
                        let weight = exp((similarity - largest) / self.shape.rule.temperature);
                        total += weight;
                        crate::math::add_scaled(out, weight, labels);
                    }
                }
            }
            if total > 0.0 {
                out.iter_mut().for_each(|label| *label /= total);
            }
        }
    }

    /// Cosines of up to [`TILE`] target patches of a row with the context patches of row `source` that lie in the window
    /// of each; written as line `line` of each target's window.
    #[inline(always)]
    fn similarities(
        &self,
        row: usize,
        targets: Range<usize>,
        source: &[f32],
        line: usize,
        of_target: usize,
        out: &mut [f32],
    ) {
        let (stride, width) = (self.shape.stride(), self.shape.grid.width());
        let target = self.row(self.target, row);
        // the last tile of a row reads patches further left, too, rather than past the end
        let first = targets.start.min(stride - TILE);
        let reach =
            self.shape.window(targets.start, width).start..self.shape.window(targets.end - 1, width).end;
        for start in reach.step_by(LANES) {
            let start = start.min(stride - LANES);
            let products = products(target, first, source, start, stride);
            for (place, column) in targets.clone().enumerate() {
                let window = self.shape.window(column, width);
                let (from, to) = (start.max(window.start), window.end.min(start + LANES));
                if from < to {
                    let line = place * of_target + line * length(&window);
                    let products = products.get(column - first).map_or(&[][..], |products| &products[..]);
                    let line = part_mut(out, line + from - window.start, to - from);
                    copy(part(products, from - start, to - from), line);
                }
            }
        }
    }

    fn row<'f>(&self, features: &'f [f32], row: usize) -> &'f [f32] {
        let len = self.shape.stride() * self.shape.dim;
        part(features, row * len, len)
    }
}

/// What a range spans; its own `len` asserts something about it.
fn length(range: &Range<usize>) -> usize {
    range.end.saturating_sub(range.start)
}

/// Sums over the features of `target[first + i]·source[start + lane]`, in the order of the features.
#[inline(always)]
fn products(
    target: &[f32],
    first: usize,
    source: &[f32],
    start: usize,
    stride: usize,
) -> [[f32; LANES]; TILE] {
    let mut sums = [[0.0; LANES]; TILE];
    for (target, source) in rows_of(target, stride).zip(rows_of(source, stride)) {
        let targets = target.get(first..).and_then(|values| values.first_chunk::<TILE>());
        let sources = source.get(start..).and_then(|values| values.first_chunk::<LANES>());
        let (Some(targets), Some(sources)) = (targets, sources) else { break };
        for place in 0..TILE {
            for lane in 0..LANES {
                sums[place][lane] += targets[place] * sources[lane];
            }
        }
    }
    sums
}

/// The largest value, and the `best.len()`-th largest (`-inf` if there are fewer); what is not a number is left out.
fn bounds(values: &[f32], best: &mut [f32]) -> (f32, f32) {
    best.fill(f32::NEG_INFINITY);
    let mut threshold = f32::NEG_INFINITY;
    for &value in values {
        if value > threshold {
            let mut moving = value;
            for place in best.iter_mut().filter(|place| **place < value) {
                core::mem::swap(place, &mut moving);
            }
            threshold = best.last().copied().unwrap_or(value);
        }
    }
    (best.first().copied().unwrap_or(threshold), threshold)
}

#[cfg(test)]
mod tests {
    use super::bounds;

    #[test]
    fn bounds_are_the_largest_and_the_kth_largest_with_repetitions() {
        let values = [1.0, 3.0, f32::NAN, 2.0, 3.0, -1.0];
        for (k, expected) in [(1, 3.0), (2, 3.0), (3, 2.0), (5, -1.0), (6, f32::NEG_INFINITY)] {
            assert_eq!(bounds(&values, &mut [0.0; 6][..k]), (3.0, expected), "k = {k}");
        }
        assert_eq!(bounds(&[f32::NAN], &mut [0.0; 2]), (f32::NEG_INFINITY, f32::NEG_INFINITY));
    }
}
