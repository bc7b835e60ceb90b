//! Antialiased bicubic resampling with the exact arithmetic of Pillow: a horizontal and a vertical pass, each with
//! weights in 22-bit fixed point and its result rounded to bytes.
//!
//! Both passes multiply one weight with a row of neighboring bytes, which vectorizes. For the horizontal pass the
//! pixels of a few rows are therefore laid out column by column first.

use pulp::Arch;

use super::planes::Planes;
use crate::data::decode::Rgb8Image;

/// Fraction bits of a weight (Pillow's `PRECISION_BITS`).
pub(super) const FRACTION_BITS: u32 = 22;
/// Reach of the bicubic kernel in pixels of the smaller of the two scales.
const SUPPORT: f64 = 2.0;
/// Rows handled together in the horizontal pass.
const ROWS: usize = 16;
/// One column of such a group.
type Column = [[u8; ROWS]; 3];

/// A part of an axis: where it begins and ends, in pixels, and the whole pixels that may be looked at.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Span {
    start: f64,
    end: f64,
    first: usize,
    limit: usize,
}

impl Span {
    /// From `start` to `end`, which may lie within a pixel; no pixel beyond these two is looked at.
    pub(super) fn new(start: f64, end: f64) -> Self {
        Self { start, end, first: start.floor() as usize, limit: end.ceil() as usize }
    }

    /// First pixel that may be looked at.
    pub(super) fn first(self) -> usize {
        self.first
    }

    /// Pixels that may be looked at.
    pub(super) fn count(self) -> usize {
        self.limit - self.first
    }
}

/// Resamples parts of images; keeps its buffers.
#[derive(Debug, Default)]
pub(super) struct Bicubic {
    horizontal: Weights,
    vertical: Weights,
    columns: Vec<Column>,
    middle: Vec<u8>,
}

impl Bicubic {
    /// Resamples the part `columns x rows` of `image` to `width x height`.
    pub(super) fn resample(
        &mut self,
        image: &Rgb8Image,
        columns: Span,
        rows: Span,
        width: usize,
        height: usize,
        out: &mut Planes,
    ) {
        self.horizontal.compute(columns, width);
        self.vertical.compute(rows, height);
        out.resize(width, height);
        let stride = 3 * image.width as usize;
        let source = &image.data[rows.first * stride..];
        let left = 3 * columns.first;
        let (column_count, row_count) = (columns.count(), rows.count());
        if vertical_first(column_count, row_count, width, height) {
            self.middle.resize(3 * column_count * height, 0);
            let source = Lines { data: &source[left..], stride };
            self.vertical.weigh_lines(source, &mut self.middle, 3 * column_count);
            let middle = Lines { data: &self.middle, stride: 3 * column_count };
            self.horizontal.weigh_columns(middle, height, &mut self.columns, out.data_mut());
        } else {
            self.middle.resize(3 * width * row_count, 0);
            let source = Lines { data: &source[left..], stride };
            self.horizontal.weigh_columns(source, row_count, &mut self.columns, &mut self.middle);
            let planes = out.channels_mut().into_iter().zip(self.middle.chunks_exact(row_count * width));
            for (plane, middle) in planes {
                self.vertical.weigh_lines(Lines { data: middle, stride: width }, plane, width);
            }
        }
    }
}

/// Pillow's order of the passes, which shows in the rounding between them: vertical first when the height shrinks by
/// more than twice as many pixels as the width.
pub(super) fn vertical_first(columns: usize, rows: usize, width: usize, height: usize) -> bool {
    height < rows && rows + 2 * width > height + 2 * columns
}

/// Lines of bytes, each `stride` behind the one before.
#[derive(Clone, Copy)]
struct Lines<'a> {
    data: &'a [u8],
    stride: usize,
}

impl<'a> Lines<'a> {
    #[inline(always)]
    fn get(self, line: usize, length: usize) -> &'a [u8] {
        &self.data[line * self.stride..][..length]
    }
}

impl Weights {
    /// The vertical pass: every line of `target`, `length` bytes each, becomes a weighted sum of lines of `from`.
    fn weigh_lines(&self, from: Lines<'_>, target: &mut [u8], length: usize) {
        for (row, target) in target.chunks_exact_mut(length).enumerate() {
            let (first, taps) = self.of(row);
            let from = Lines { data: &from.data[(first - self.origin) * from.stride..], ..from };
            Arch::new().dispatch(
                #[inline(always)]
                || {
                    let target = target; // moved: see `planes`
                    weigh_rows(from, taps, target);
                },
            );
        }
    }

    /// The horizontal pass: `row_count` lines of interleaved pixels become planes, `[3, row_count, width]`, where the
    /// width is the number of output pixels of these weights. `columns` is working memory.
    fn weigh_columns(&self, from: Lines<'_>, row_count: usize, columns: &mut Vec<Column>, target: &mut [u8]) {
        let count = self.limit - self.origin;
        columns.resize(count, Column::default());
        for group in (0..row_count).step_by(ROWS) {
            let rows = ROWS.min(row_count - group);
            for row in 0..rows {
                let pixels = from.get(group + row, 3 * count).as_chunks::<3>().0;
                for (column, pixel) in columns.iter_mut().zip(pixels) {
                    for channel in 0..3 {
                        column[channel][row] = pixel[channel];
                    }
                }
            }
            let group_target = &mut *target;
            Arch::new().dispatch(
                #[inline(always)]
                || {
                    let target = group_target; // moved: see `planes`
                    self.weigh_group(columns, group, rows, row_count, target);
                },
            );
        }
    }

    /// The horizontal pass of the `rows` lines that are laid out in `columns`.
    #[inline(always)]
    fn weigh_group(
        &self,
        columns: &[Column],
        group: usize,
        rows: usize,
        row_count: usize,
        target: &mut [u8],
    ) {
        let width = self.bounds.len();
        for x in 0..width {
            let (first, taps) = self.of(x);
            let from = &columns[first - self.origin..][..taps.len()];
            for channel in 0..3 {
                let mut sums = [1 << (FRACTION_BITS - 1); ROWS];
                for (column, &weight) in from.iter().zip(taps) {
                    for lane in 0..ROWS {
                        sums[lane] += weight * i32::from(column[channel][lane]);
                    }
                }
                let bytes = sums.map(to_byte);
                let plane = &mut target[(channel * row_count + group) * width..][..rows * width];
                for (line, byte) in plane.chunks_exact_mut(width).zip(bytes) {
                    line[x] = byte;
                }
            }
        }
    }
}

/// `target[x]` becomes the weighted sum of byte `x` of the first lines of `from`.
#[inline(always)]
fn weigh_rows(from: Lines<'_>, taps: &[i32], target: &mut [u8]) {
    /// Sums kept in registers.
    const LANES: usize = 32;
    let length = target.len();
    let (blocks, rest) = target.as_chunks_mut::<LANES>();
    let rest_start = blocks.len() * LANES;
    for (block, target) in blocks.iter_mut().enumerate() {
        let mut sums = [1 << (FRACTION_BITS - 1); LANES];
        for (row, &weight) in taps.iter().enumerate() {
            let line = &from.get(row, length)[block * LANES..][..LANES];
            for lane in 0..LANES {
                sums[lane] += weight * i32::from(line[lane]);
            }
        }
        for lane in 0..LANES {
            target[lane] = to_byte(sums[lane]);
        }
    }
    for (x, target) in rest.iter_mut().enumerate() {
        let sum = taps.iter().enumerate().fold(1 << (FRACTION_BITS - 1), |sum, (row, &weight)| {
            sum + weight * i32::from(from.get(row, length)[rest_start + x])
        });
        *target = to_byte(sum);
    }
}

#[inline(always)]
fn to_byte(sum: i32) -> u8 {
    (sum >> FRACTION_BITS).clamp(0, 255) as u8
}

/// The weights of every output pixel of an axis.
#[derive(Debug, Default)]
pub(super) struct Weights {
    /// First pixel of the span.
    origin: usize,
    /// First pixel behind the span.
    limit: usize,
    /// Per output pixel: the first input pixel, and where its weights end.
    bounds: Vec<(usize, usize)>,
    taps: Vec<i32>,
    exact: Vec<f64>,
}

impl Weights {
    /// First input pixel and weights of output pixel `i`.
    #[inline(always)]
    pub(super) fn of(&self, i: usize) -> (usize, &[i32]) {
        let (first, end) = self.bounds[i];
        let start = if i == 0 { 0 } else { self.bounds[i - 1].1 };
        (first, &self.taps[start..end])
    }

    /// The weights of `size` output pixels that cover `span`.
    pub(super) fn compute(&mut self, span: Span, size: usize) {
        (self.origin, self.limit) = (span.first, span.limit);
        self.bounds.clear();
        self.taps.clear();
        let scale = (span.end - span.start) / size as f64;
        let filter_scale = scale.max(1.0);
        let support = SUPPORT * filter_scale;
        for i in 0..size {
            let center = span.start + (i as f64 + 0.5) * scale;
            // like Pillow's conversions to int, these cut towards zero
            let first = ((center - support + 0.5) as usize).max(span.first);
            let last = ((center + support + 0.5) as usize).min(span.limit);
            self.exact.clear();
            let inverse = 1.0 / filter_scale;
            self.exact.extend((first..last).map(|x| bicubic((x as f64 - center + 0.5) * inverse)));
            let sum: f64 = self.exact.iter().sum();
            let unit = f64::from(1 << FRACTION_BITS);
            self.taps.extend(self.exact.iter().map(|weight| {
                let weight = if sum == 0.0 { *weight } else { weight / sum } * unit;
                (weight + 0.5f64.copysign(weight)) as i32
            }));
            self.bounds.push((first, self.taps.len()));
        }
    }
}

/// The cubic convolution kernel with a = -0.5 (Keys).
fn bicubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Purpose, Stream};

    fn picture(width: u32, height: u32) -> Rgb8Image {
        let mut stream = Stream::new(9, Purpose::Subset, &[]);
        let data = (0..width * height * 3).map(|_| stream.bits() as u8).collect();
        Rgb8Image { width, height, data }
    }

    /// The same two passes, one output value at a time.
    fn slow_twin(image: &Rgb8Image, columns: Span, rows: Span, width: usize, height: usize) -> Vec<u8> {
        let (mut horizontal, mut vertical) = (Weights::default(), Weights::default());
        horizontal.compute(columns, width);
        vertical.compute(rows, height);
        let weigh = |taps: &[i32], value: &dyn Fn(usize) -> u8| {
            to_byte(
                taps.iter()
                    .enumerate()
                    .fold(1 << (FRACTION_BITS - 1), |sum, (i, tap)| sum + tap * i32::from(value(i))),
            )
        };
        let order = vertical_first(columns.count(), rows.count(), width, height);
        let mut out = Vec::new();
        for channel in 0..3 {
            let stored =
                |row: usize, column: usize| image.data[(row * image.width as usize + column) * 3 + channel];
            let along_row = |x: usize, value: &dyn Fn(usize) -> u8| {
                let (first, taps) = horizontal.of(x);
                weigh(taps, &|i| value(first + i))
            };
            let along_column = |y: usize, value: &dyn Fn(usize) -> u8| {
                let (first, taps) = vertical.of(y);
                weigh(taps, &|i| value(first + i))
            };
            for y in 0..height {
                for x in 0..width {
                    out.push(if order {
                        along_row(x, &|column| along_column(y, &|row| stored(row, column)))
                    } else {
                        along_column(y, &|row| along_row(x, &|column| stored(row, column)))
                    });
                }
            }
        }
        out
    }

    #[test]
    fn fast_and_slow_passes_agree() {
        let image = picture(75, 53);
        let (mut bicubic, mut out) = (Bicubic::default(), Planes::default());
        let spans = [(0.0, 53.0), (3.0, 20.0), (7.25, 40.5), (52.0, 53.0), (0.0, 1.0)];
        for (left, right) in [(0.0, 75.0), (10.0, 33.0), (4.5, 70.125), (74.0, 75.0)] {
            for (top, bottom) in spans {
                for (width, height) in [(1, 1), (31, 33), (32, 16), (64, 7), (97, 40)] {
                    let (columns, rows) = (Span::new(left, right), Span::new(top, bottom));
                    bicubic.resample(&image, columns, rows, width, height, &mut out);
                    assert_eq!(out.data(), slow_twin(&image, columns, rows, width, height));
                }
            }
        }
    }

    #[test]
    fn weights_of_every_pixel_add_up_to_one() {
        let mut weights = Weights::default();
        for (span, size) in
            [(Span::new(0.0, 300.0), 17), (Span::new(3.5, 9.25), 224), (Span::new(0.0, 1.0), 5)]
        {
            weights.compute(span, size);
            for i in 0..size {
                let (first, taps) = weights.of(i);
                let sum: i32 = taps.iter().sum();
                assert!((sum - (1 << FRACTION_BITS)).unsigned_abs() as usize <= taps.len());
                assert!(first >= span.first && first + taps.len() <= span.limit);
            }
        }
    }

    #[test]
    fn the_same_size_gives_the_same_pixels() {
        let image = picture(40, 24);
        let mut out = Planes::default();
        Bicubic::default().resample(&image, Span::new(0.0, 40.0), Span::new(0.0, 24.0), 40, 24, &mut out);
        assert_eq!(out.to_interleaved(), image.data);
    }
}
