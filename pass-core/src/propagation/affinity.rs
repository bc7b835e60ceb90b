//! Who votes about a row of target patches, and the vote.

use core::ops::Range;

use super::clip::ClipShape;
use crate::math::exp;

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
        context: impl ExactSizeIterator<Item = Frame<'c>> + Clone,
        scratch: &mut [f32],
        out: &mut [f32],
    ) {
        let grid = self.shape.grid;
        let rows = self.shape.window(row, grid.height());
        let (best, similarities) = scratch.split_at_mut(self.shape.top_k());
        // of each target patch: [context frames, rows, columns of its window]
        let of_target = self.shape.votes_len();
        for (index, frame) in context.clone().enumerate() {
            for source_row in rows.clone() {
                let line = index * rows.len() + source_row - rows.start;
                let source = self.row(frame.features, source_row);
                for tile in columns.clone().step_by(TILE) {
                    let place = (tile - columns.start) * of_target;
                    let targets = tile..columns.end.min(tile + TILE);
                    self.similarities(row, targets, source, line, of_target, &mut similarities[place..]);
                }
            }
        }
        let classes = self.shape.classes;
        for (place, (column, out)) in columns.zip(out.chunks_exact_mut(classes)).enumerate() {
            let window = self.shape.window(column, grid.width());
            let len = context.len() * rows.len() * window.len();
            let similarities = &similarities[place * of_target..][..len];
            let (largest, threshold) = bounds(similarities, best);
            let lines = context
                .clone()
                .flat_map(|frame| rows.clone().map(move |row| (frame, row)))
                .map(|(frame, row)| &frame.labels[(row * grid.width() + window.start) * classes..]);
            out.fill(0.0);
            let mut total = 0.0;
            for (similarities, labels) in similarities.chunks_exact(window.len()).zip(lines) {
                for (&similarity, labels) in similarities.iter().zip(labels.chunks_exact(classes)) {
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
                    let line = &mut out[place * of_target + line * window.len()..][..window.len()];
                    line[from - window.start..to - window.start]
                        .copy_from_slice(&products[column - first][from - start..to - start]);
                }
            }
        }
    }

    fn row<'f>(&self, features: &'f [f32], row: usize) -> &'f [f32] {
        let len = self.shape.stride() * self.shape.dim;
        &features[row * len..][..len]
    }
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
    for (target, source) in target.chunks_exact(stride).zip(source.chunks_exact(stride)) {
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
            let place = best.partition_point(|&better| better >= value);
            best[place..].rotate_right(1);
            best[place] = value;
            threshold = best[best.len() - 1];
        }
    }
    (best[0], threshold)
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
