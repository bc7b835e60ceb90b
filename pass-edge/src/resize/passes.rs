//! The two passes. Sums are of integers, so the instructions do not matter.
//!
//! Horizontally one weight multiplies a column of several rows, vertically a whole row: both are vector code. For the
//! horizontal pass the pixels of a group of rows are therefore laid out column by column first.

use super::ResizeLen;
use super::axis::{Axis, FRACTION_BITS};
use crate::image::Image;
use crate::kernels::{Arithmetic, Job, Work};
use pass_core::rows::{rows_of, rows_of_mut};

/// Rows of a group.
const ROWS: usize = 8;
/// Bytes of a column of a group: reds, greens, blues.
const COLUMN: usize = 3 * ROWS;
/// What sums start from, so that cutting rounds.
const HALF: i32 = 1 << (FRACTION_BITS - 1);

/// The arguments of [`super::Resize::resize_into`], waiting for a kernel. Lengths have been checked.
pub(super) struct Passes<'a> {
    pub(super) image: &'a Image<'a>,
    pub(super) rows: &'a Axis,
    pub(super) columns: &'a Axis,
    pub(super) words: &'a mut [i32],
    pub(super) bytes: &'a mut [u8],
    pub(super) out: &'a mut [u8],
}

/// Pillow's order of the passes, which shows in the rounding between them: vertical first when the height shrinks by
/// more than twice as many pixels as the width.
const fn vertical_first(rows: &Axis, columns: &Axis) -> bool {
    rows.to() < rows.from() && rows.from() + 2 * columns.to() > rows.to() + 2 * columns.from()
}

/// Rows of the horizontal pass that are kept, in whole groups: a window, and what its two ends share groups with.
const fn kept_rows(rows: &Axis) -> usize {
    (rows.taps() + 2 * ROWS).next_multiple_of(ROWS)
}

impl Passes<'_> {
    pub(super) const fn scratch_len(rows: &Axis, columns: &Axis) -> ResizeLen {
        let span = columns.span().1;
        let tables = columns.count() * (2 + columns.taps()) + rows.taps();
        let (sums, kept) = if vertical_first(rows, columns) {
            (3 * span, 0)
        } else {
            (3 * columns.count(), kept_rows(rows) * 3 * columns.count())
        };
        ResizeLen { words: tables + sums, bytes: span * (3 + COLUMN) + kept }
    }
}

impl Job for Passes<'_> {
    type Output = ();

    fn run<K: Arithmetic>(self, kernel: K) {
        let Self { image, rows, columns, words, bytes, out } = self;
        let (span_first, span) = columns.span();
        let (bounds, words) = split(words, 2 * columns.count());
        let (weights, words) = split(words, columns.count() * columns.taps());
        let (row_weights, sums) = split(words, rows.taps());
        let bounds = bounds.as_chunks_mut::<2>().0;
        for (index, (bounds, weights)) in
            bounds.iter_mut().zip(rows_of_mut(weights, columns.taps())).enumerate()
        {
            let window = columns.window(index);
            window.weights_into(weights);
            *bounds = [(window.first - span_first) as i32, window.count as i32];
        }
        let (line, bytes) = split(bytes, 3 * span);
        let (group, kept) = split(bytes, COLUMN * span);
        let line = line.as_chunks_mut::<3>().0;
        let horizontal = Horizontal { bounds, weights, taps: columns.taps() };
        let length = 3 * columns.count();
        let group = group.as_chunks_mut::<COLUMN>().0;

        if vertical_first(rows, columns) {
            for (index, out) in rows_of_mut(out, ROWS * length).enumerate() {
                for row in 0..rows_of(out, length).count() {
                    let window = rows.window(index * ROWS + row);
                    window.weights_into(row_weights);
                    sums.fill(HALF);
                    for (row, weight) in row_weights.iter().take(window.count).enumerate() {
                        kernel.vectorize(Row { image, at: (window.first + row, span_first), line });
                        kernel.vectorize(Add { line: line.as_flattened(), weight: *weight, sums });
                    }
                    kernel.vectorize(Round { sums, out: line.as_flattened_mut() });
                    lay_out(line, row, group);
                }
                kernel.vectorize(Weigh { horizontal, group, out, length });
            }
            return;
        }

        let kept_rows = kept_rows(rows);
        let mut next = 0;
        for (index, out) in rows_of_mut(out, length).enumerate() {
            let window = rows.window(index);
            window.weights_into(row_weights);
            next = next.max(window.first / ROWS * ROWS);
            while next < window.first + window.count {
                for row in 0..ROWS.min(rows.from() - next) {
                    kernel.vectorize(Row { image, at: (next + row, span_first), line });
                    lay_out(line, row, group);
                }
                let at = place(next, kept_rows) * length;
                if let Some(out) = kept.get_mut(at..at + ROWS * length) {
                    kernel.vectorize(Weigh { horizontal, group, out, length });
                }
                next += ROWS;
            }
            sums.fill(HALF);
            for (row, weight) in row_weights.iter().take(window.count).enumerate() {
                let at = place(window.first + row, kept_rows) * length;
                if let Some(line) = kept.get(at..at + length) {
                    kernel.vectorize(Add { line, weight: *weight, sums });
                }
            }
            kernel.vectorize(Round { sums, out });
        }
    }
}

/// The first `length` elements and the others.
fn split<T>(slice: &mut [T], length: usize) -> (&mut [T], &mut [T]) {
    slice.split_at_mut(length.min(slice.len()))
}

/// Where a row of the horizontal pass is kept: in a ring.
fn place(row: usize, kept_rows: usize) -> usize {
    row.checked_rem(kept_rows).unwrap_or(0)
}

/// Row `row` of a group, column by column.
fn lay_out(line: &[[u8; 3]], row: usize, group: &mut [[u8; COLUMN]]) {
    for (pixel, column) in line.iter().zip(group) {
        let channels = column.as_chunks_mut::<ROWS>().0;
        for (channel, value) in channels.iter_mut().zip(pixel) {
            if let Some(place) = channel.get_mut(row) {
                *place = *value;
            }
        }
    }
}

#[inline(always)]
fn to_byte(sum: i32) -> u8 {
    (sum >> FRACTION_BITS).clamp(0, 255) as u8
}

/// A row of the source from a column on.
struct Row<'a> {
    image: &'a Image<'a>,
    at: (usize, usize),
    line: &'a mut [[u8; 3]],
}

impl Work for Row<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        self.image.row_into(self.at.0, self.at.1, self.line);
    }
}

/// `sums[x] += weight · line[x]`.
struct Add<'a> {
    line: &'a [u8],
    weight: i32,
    sums: &'a mut [i32],
}

impl Work for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (sum, value) in self.sums.iter_mut().zip(self.line) {
            *sum += self.weight * i32::from(*value);
        }
    }
}

/// Sums to bytes.
struct Round<'a> {
    sums: &'a [i32],
    out: &'a mut [u8],
}

impl Work for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (out, sum) in self.out.iter_mut().zip(self.sums) {
            *out = to_byte(*sum);
        }
    }
}

/// Windows of the columns: first column and number, and `taps` weights each.
#[derive(Clone, Copy)]
struct Horizontal<'a> {
    bounds: &'a [[i32; 2]],
    weights: &'a [i32],
    taps: usize,
}

/// The horizontal pass of a group; `out` holds its rows, `length` bytes each, or fewer rows.
struct Weigh<'a> {
    horizontal: Horizontal<'a>,
    group: &'a [[u8; COLUMN]],
    out: &'a mut [u8],
    length: usize,
}

impl Work for Weigh<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Horizontal { bounds, weights, taps } = self.horizontal;
        for (x, ([first, count], weights)) in bounds.iter().zip(rows_of(weights, taps)).enumerate() {
            let columns = self.group.get(*first as usize..).unwrap_or_default();
            let mut sums = [HALF; COLUMN];
            for (column, weight) in columns.iter().zip(weights).take(*count as usize) {
                for (sum, value) in sums.iter_mut().zip(column) {
                    *sum += weight * i32::from(*value);
                }
            }
            let [red, green, blue] = sums.as_chunks::<ROWS>().0 else { continue };
            let pixels = red.iter().zip(green).zip(blue);
            for (row, ((red, green), blue)) in rows_of_mut(self.out, self.length).zip(pixels) {
                if let Some(pixel) = row.get_mut(3 * x..3 * x + 3) {
                    pixel.copy_from_slice(&[to_byte(*red), to_byte(*green), to_byte(*blue)]);
                }
            }
        }
    }
}
