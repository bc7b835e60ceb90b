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
/// Pixels converted together.
const BLOCK: usize = 32;

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

    /// A row of pixels: a pair of chroma for every two; with `odd` the first pixel is the second of its pair.
    #[inline(always)]
    pub(crate) fn row_into(&self, luma: &[u8], chroma: &[u8], odd: bool, out: &mut [[u8; 3]]) {
        let pairs = chroma.as_chunks::<2>().0;
        let first = usize::from(odd).min(out.len());
        let (start, out) = out.split_at_mut(first);
        self.padded_block(luma, pairs, odd, start);
        let luma = luma.get(first..).unwrap_or_default();
        let pairs = pairs.get(first..).unwrap_or_default();

        let (blocks, rest) = out.as_chunks_mut::<BLOCK>();
        let lumas = luma.as_chunks::<BLOCK>().0;
        for ((out, luma), pairs) in blocks.iter_mut().zip(lumas).zip(pairs.as_chunks::<{ BLOCK / 2 }>().0) {
            self.block(luma, pairs, out);
        }
        let done = blocks.len() * BLOCK;
        let luma = luma.get(done..).unwrap_or_default();
        self.padded_block(luma, pairs.get(done / 2..).unwrap_or_default(), false, rest);
    }

    /// Up to a block of pixels; with `odd` they begin in the middle of a pair.
    #[inline(always)]
    fn padded_block(&self, luma: &[u8], pairs: &[[u8; 2]], odd: bool, out: &mut [[u8; 3]]) {
        let (mut full_luma, mut full_pairs) = ([0; BLOCK], [[0; 2]; BLOCK / 2]);
        let mut full_out = [[0; 3]; BLOCK];
        let skipped = usize::from(odd);
        full_luma.iter_mut().skip(skipped).zip(luma).for_each(|(to, from)| *to = *from);
        full_pairs.iter_mut().zip(pairs).for_each(|(to, from)| *to = *from);
        self.block(&full_luma, &full_pairs, &mut full_out);
        out.iter_mut().zip(full_out.iter().skip(skipped)).for_each(|(to, from)| *to = *from);
    }

    /// A block of pixels, in loops over whole arrays: vector code.
    #[inline(always)]
    fn block(&self, luma: &[u8; BLOCK], pairs: &[[u8; 2]; BLOCK / 2], out: &mut [[u8; 3]; BLOCK]) {
        let (mut cb, mut cr) = ([0; BLOCK], [0; BLOCK]);
        for (at, pair) in pairs.iter().enumerate() {
            for at in [2 * at, 2 * at + 1] {
                (cb[at], cr[at]) = (i32::from(pair[0]) - 128, i32::from(pair[1]) - 128);
            }
        }
        let byte = |sum: i32| (sum >> FRACTION_BITS).clamp(0, 255) as u8;
        let (mut red, mut green, mut blue) = ([0; BLOCK], [0; BLOCK], [0; BLOCK]);
        for at in 0..BLOCK {
            let luma = (i32::from(luma[at]) - self.black) * self.luma + (1 << (FRACTION_BITS - 1));
            red[at] = byte(luma + self.red_cr * cr[at]);
            green[at] = byte(luma - self.green_cb * cb[at] - self.green_cr * cr[at]);
            blue[at] = byte(luma + self.blue_cb * cb[at]);
        }
        for at in 0..BLOCK {
            out[at] = [red[at], green[at], blue[at]];
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
        let mut out = [[0; 3]];
        self.row_into(&[luma], &chroma, false, &mut out);
        out[0]
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

    #[test]
    fn rows_of_every_length_are_their_pixels() {
        let matrix = YuvColor::Bt709.matrix();
        let bytes: [u8; 200] = core::array::from_fn(|at| crate::format::generated_pixel(1, at as u64));
        let (luma, chroma) = bytes.split_at(90);
        for odd in [false, true] {
            for length in 0..80 {
                let mut out = [[7; 3]; 81];
                matrix.row_into(luma, chroma, odd, &mut out[..length]);
                for (at, found) in out.iter().enumerate() {
                    let pair = (at + usize::from(odd)) / 2;
                    let expected = matrix.rgb(luma[at], [chroma[2 * pair], chroma[2 * pair + 1]]);
                    assert_eq!(*found, if at < length { expected } else { [7; 3] }, "{length} {at} {odd}");
                }
            }
        }
    }
}
