//! Which pixels of a row or column make a pixel of the result, and how much each counts.

use super::Filter;

/// Fraction bits of a weight (Pillow's `PRECISION_BITS`).
pub(super) const FRACTION_BITS: u32 = 22;

/// One direction of a resampling: `from` pixels become `to`, of which `count` from `first` on are wanted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Axis {
    from: usize,
    to: usize,
    first: usize,
    count: usize,
    filter: Filter,
}

/// The pixels that make one pixel of the result.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Window {
    pub(super) first: usize,
    pub(super) count: usize,
    center: f64,
    filter_scale: f64,
    filter: Filter,
}

impl Axis {
    /// The `count` pixels in the middle of `to`.
    pub(super) const fn new(from: usize, to: usize, count: usize, filter: Filter) -> Self {
        let margin = to.saturating_sub(count);
        // half of it, ties to even
        let first = margin / 2 + (margin % 4 == 3) as usize;
        Self { from, to, first, count, filter }
    }

    pub(super) const fn is_identity(&self) -> bool {
        self.from == self.to && self.first == 0 && self.count == self.from
    }

    /// Pixels of the source.
    pub(super) const fn from(&self) -> usize {
        self.from
    }

    /// Pixels of the scaled image, wanted or not.
    pub(super) const fn to(&self) -> usize {
        self.to
    }

    /// Pixels of the result.
    pub(super) const fn count(&self) -> usize {
        self.count
    }

    /// Most pixels of a window.
    pub(super) const fn taps(&self) -> usize {
        let support = self.filter.support();
        // no side is 0; saying so leaves no division to fail
        let to = if self.to == 0 { 1 } else { self.to };
        let reach = if self.from > to { (support * self.from).div_ceil(to) } else { support };
        let taps = 2 * reach + 1;
        if taps < self.from { taps } else { self.from }
    }

    /// The window of pixel `index < count` of the result.
    pub(super) const fn window(&self, index: usize) -> Window {
        let scale = self.from as f64 / self.to as f64;
        let filter_scale = if scale > 1.0 { scale } else { 1.0 };
        let support = self.filter.support() as f64 * filter_scale;
        let center = ((self.first + index) as f64 + 0.5) * scale;
        // like Pillow's conversions to int, these cut towards zero
        let first = (center - support + 0.5) as usize;
        let limit = (center + support + 0.5) as usize;
        let limit = if limit < self.from { limit } else { self.from };
        Window { first, count: limit.saturating_sub(first), center, filter_scale, filter: self.filter }
    }

    /// First pixel and number of pixels that the whole result depends on.
    pub(super) const fn span(&self) -> (usize, usize) {
        let (start, last) = (self.window(0), self.window(self.count.saturating_sub(1)));
        (start.first, (last.first + last.count).saturating_sub(start.first))
    }
}

impl Window {
    /// Writes the weights of the window's pixels, in fixed point; together they are about 1.
    pub(super) fn weights_into(&self, out: &mut [i32]) {
        let inverse = 1.0 / self.filter_scale;
        let weight =
            |index: usize| self.filter.weight(((self.first + index) as f64 - self.center + 0.5) * inverse);
        let sum: f64 = (0..self.count).map(weight).sum();
        let unit = f64::from(1 << FRACTION_BITS);
        for (index, out) in out.iter_mut().take(self.count).enumerate() {
            let weight = weight(index);
            let weight = if sum == 0.0 { weight } else { weight / sum } * unit;
            *out = (weight + if weight < 0.0 { -0.5 } else { 0.5 }) as i32;
        }
    }
}

impl Filter {
    /// Reach in pixels of the smaller of the two scales.
    const fn support(self) -> usize {
        match self {
            Self::Bilinear => 1,
            Self::Bicubic => 2,
        }
    }

    fn weight(self, x: f64) -> f64 {
        let x = if x < 0.0 { -x } else { x };
        match self {
            Self::Bilinear if x < 1.0 => 1.0 - x,
            Self::Bicubic if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
            Self::Bicubic if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
            Self::Bilinear | Self::Bicubic => 0.0,
        }
    }
}

/// The parameter of the cubic convolution.
const A: f64 = -0.5;
