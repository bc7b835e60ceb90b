//! Luma and chroma to red, green, blue, in integers.

/// What luma and chroma mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum YuvColor {
    /// BT.601, luma 16–235: cameras of standard definition and most webcams.
    #[default]
    Bt601,
    /// BT.709, luma 16–235: high definition.
    Bt709,
    /// BT.601, luma 0–255: JPEG.
    Bt601Full,
    /// BT.709, luma 0–255.
    Bt709Full,
}

impl YuvColor {
    pub(crate) const fn matrix(self) -> Matrix {
        match self {
            Self::Bt601 => const { Matrix::new(0.299, 0.114, true) },
            Self::Bt709 => const { Matrix::new(0.2126, 0.0722, true) },
            Self::Bt601Full => const { Matrix::new(0.299, 0.114, false) },
            Self::Bt709Full => const { Matrix::new(0.2126, 0.0722, false) },
        }
    }
}

/// Fraction bits of a coefficient.
const FRACTION_BITS: u32 = 16;

/// Coefficients in fixed point; the results are those of real numbers rounded to bytes, or one off.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix {
    black: i32,
    luma: i32,
    red_cr: i32,
    green_cb: i32,
    green_cr: i32,
    blue_cb: i32,
}

impl Matrix {
    /// From the weights of red and blue in luma (ITU-R BT.601 and BT.709, section "quantization").
    const fn new(red: f64, blue: f64, limited: bool) -> Self {
        let green = 1.0 - red - blue;
        let (luma, chroma) = if limited { (255.0 / 219.0, 255.0 / 224.0) } else { (1.0, 1.0) };
        Self {
            black: if limited { 16 } else { 0 },
            luma: fixed(luma),
            red_cr: fixed(chroma * 2.0 * (1.0 - red)),
            green_cb: fixed(chroma * 2.0 * (1.0 - blue) * blue / green),
            green_cr: fixed(chroma * 2.0 * (1.0 - red) * red / green),
            blue_cb: fixed(chroma * 2.0 * (1.0 - blue)),
        }
    }

    /// What a pair of chroma adds to red, green, blue.
    #[inline(always)]
    fn tint(&self, [cb, cr]: [u8; 2]) -> [i32; 3] {
        let (cb, cr) = (i32::from(cb) - 128, i32::from(cr) - 128);
        [self.red_cr * cr, -self.green_cb * cb - self.green_cr * cr, self.blue_cb * cb]
    }

    /// Red, green, blue of a tint at a luma.
    #[inline(always)]
    fn shade(&self, luma: u8, tint: [i32; 3]) -> [u8; 3] {
        let luma = (i32::from(luma) - self.black) * self.luma + (1 << (FRACTION_BITS - 1));
        tint.map(|tint| ((luma + tint) >> FRACTION_BITS).clamp(0, 255) as u8)
    }

    /// A row of pixels: a pair of chroma for every two; with `odd` the first pixel is the second of its pair.
    pub(crate) fn row_into(&self, luma: &[u8], chroma: &[u8], odd: bool, out: &mut [[u8; 3]]) {
        let (mut luma, mut pairs, mut out) = (luma, chroma.as_chunks::<2>().0, out);
        if let (true, [first_luma, luma_rest @ ..], [pair, pairs_rest @ ..]) = (odd, luma, pairs) {
            let Some((first, out_rest)) = out.split_first_mut() else { return };
            *first = self.shade(*first_luma, self.tint(*pair));
            (luma, pairs, out) = (luma_rest, pairs_rest, out_rest);
        }
        let (twos, last) = out.as_chunks_mut::<2>();
        let (luma_twos, _) = luma.as_chunks::<2>();
        for ((out, luma), pair) in twos.iter_mut().zip(luma_twos).zip(pairs) {
            let tint = self.tint(*pair);
            *out = luma.map(|luma| self.shade(luma, tint));
        }
        if let ([last], Some(luma), Some(pair)) = (last, luma.get(2 * twos.len()), pairs.get(twos.len())) {
            *last = self.shade(*luma, self.tint(*pair));
        }
    }
}

/// A positive number in fixed point, rounded.
const fn fixed(value: f64) -> i32 {
    (value * (1 << FRACTION_BITS) as f64 + 0.5) as i32
}

#[cfg(test)]
impl Matrix {
    /// One pixel.
    pub(crate) fn rgb(&self, luma: u8, chroma: [u8; 2]) -> [u8; 3] {
        self.shade(luma, self.tint(chroma))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_colors() {
        // the color bars of BT.601 and BT.709 at 100 %, in studio range
        for (color, bars) in [
            (
                YuvColor::Bt601,
                [(81, [90, 240]), (145, [54, 34]), (41, [240, 110]), (210, [16, 146]), (235, [128, 128])],
            ),
            (
                YuvColor::Bt709,
                [(63, [102, 240]), (173, [42, 26]), (32, [240, 118]), (219, [16, 138]), (235, [128, 128])],
            ),
        ] {
            let expected = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 255, 255]];
            for ((luma, chroma), expected) in bars.into_iter().zip(expected) {
                let found = color.matrix().rgb(luma, chroma);
                let near = found.iter().zip(expected).all(|(a, b): (&u8, u8)| a.abs_diff(b) <= 2);
                assert!(near, "{color:?}: {found:?}, expected {expected:?}");
            }
            assert_eq!(color.matrix().rgb(16, [128, 128]), [0; 3]);
        }
        assert_eq!(YuvColor::Bt601Full.matrix().rgb(7, [128, 128]), [7; 3]);
        assert_eq!(YuvColor::Bt709Full.matrix().rgb(255, [128, 128]), [255; 3]);
    }

    #[test]
    fn fixed_point_is_the_formula_rounded() {
        for (color, red, blue, limited) in [
            (YuvColor::Bt601, 0.299, 0.114, true),
            (YuvColor::Bt709, 0.2126, 0.0722, true),
            (YuvColor::Bt601Full, 0.299, 0.114, false),
            (YuvColor::Bt709Full, 0.2126, 0.0722, false),
        ] {
            let matrix = color.matrix();
            let step = if cfg!(miri) { 85 } else { 5 };
            for luma in (0..=255_u8).step_by(step) {
                for cb in (0..=255_u8).step_by(step) {
                    for cr in (0..=255_u8).step_by(step) {
                        let scaled = |value: u8, black: f64, range: f64| (f64::from(value) - black) / range;
                        let (y, range) = if limited {
                            (scaled(luma, 16.0, 219.0), 224.0)
                        } else {
                            (scaled(luma, 0.0, 255.0), 255.0)
                        };
                        let (pb, pr) = (scaled(cb, 128.0, range), scaled(cr, 128.0, range));
                        let r = y + 2.0 * (1.0 - red) * pr;
                        let b = y + 2.0 * (1.0 - blue) * pb;
                        let g = (y - red * r - blue * b) / (1.0 - red - blue);
                        let found = matrix.rgb(luma, [cb, cr]);
                        for (found, exact) in found.into_iter().zip([r, g, b]) {
                            let exact = (255.0 * exact).clamp(0.0, 255.0);
                            assert!((f64::from(found) - exact).abs() < 0.51, "{color:?} {luma} {cb} {cr}");
                        }
                    }
                }
            }
        }
    }
}
