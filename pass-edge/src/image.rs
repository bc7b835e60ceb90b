//! Frames as they come: where the bytes of a pixel are. Nothing is copied; pixels are converted where they are read.

mod yuv;

use crate::error::{Error, Result};
use crate::format::generated_pixel;
use pass_core::rows::rows_of_mut;

pub use yuv::YuvColor;

/// Longest side of a patch that an architecture may have.
const MOST_PATCH_SIZE: usize = 64;

/// How the bytes of a pixel are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PixelOrder {
    /// 3 bytes: red, green, blue.
    Rgb,
    /// 3 bytes: blue, green, red.
    Bgr,
    /// 1 byte for all channels.
    Gray,
}

impl PixelOrder {
    const fn bytes(self) -> usize {
        match self {
            Self::Rgb | Self::Bgr => 3,
            Self::Gray => 1,
        }
    }

    /// Place of red, green and blue in a pixel.
    const fn places(self) -> [usize; 3] {
        match self {
            Self::Rgb => [0, 1, 2],
            Self::Bgr => [2, 1, 0],
            Self::Gray => [0, 0, 0],
        }
    }
}

/// A borrowed image of 8-bit pixels.
#[derive(Clone, Copy, Debug)]
pub struct Image<'a> {
    size: (usize, usize),
    source: Source<'a>,
}

#[derive(Clone, Copy, Debug)]
enum Source<'a> {
    Frame { pixels: Plane<'a>, order: PixelOrder },
    Nv12 { luma: Plane<'a>, chroma: Plane<'a>, color: YuvColor },
    Generated { seed: u64 },
}

/// Rows of bytes that start `stride` apart.
#[derive(Clone, Copy, Debug)]
pub struct Plane<'a> {
    /// The bytes; the last row may end without padding.
    pub bytes: &'a [u8],
    /// From the start of a row to the start of the next.
    pub stride: usize,
}

impl<'a> Plane<'a> {
    /// Checks that there are `rows` rows of `row` bytes.
    fn check(&self, what: &'static str, rows: usize, row: usize) -> Result<()> {
        if self.stride < row {
            return Err(Error::LengthMismatch { what: "stride", expected: row, actual: self.stride });
        }
        let needed = rows.saturating_sub(1).saturating_mul(self.stride).saturating_add(row);
        if self.bytes.len() < needed {
            return Err(Error::LengthMismatch { what, expected: needed, actual: self.bytes.len() });
        }
        Ok(())
    }

    /// The bytes from `column` on in `row`; nothing beyond the plane.
    fn at(&self, row: usize, column: usize) -> &'a [u8] {
        self.bytes.get(row * self.stride + column..).unwrap_or_default()
    }
}

impl<'a> Image<'a> {
    /// An image of `size = (height, width)` pixels whose rows start `stride` bytes apart.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] if a row is longer than `stride` or `bytes` ends before the last row does.
    pub fn new(bytes: &'a [u8], size: (usize, usize), stride: usize, order: PixelOrder) -> Result<Self> {
        let pixels = Plane { bytes, stride };
        pixels.check("image", size.0, size.1.saturating_mul(order.bytes()))?;
        Ok(Self { size, source: Source::Frame { pixels, order } })
    }

    /// An NV12 image of `size = (height, width)` pixels: a plane of luma and one of half its size (rounded up) with
    /// pairs of Cb and Cr. A pair holds for its 2 × 2 pixels.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] if a row is longer than its stride or a plane ends before its last row does.
    pub fn nv12(luma: Plane<'a>, chroma: Plane<'a>, size: (usize, usize), color: YuvColor) -> Result<Self> {
        luma.check("luma plane", size.0, size.1)?;
        chroma.check("chroma plane", size.0.div_ceil(2), size.1.div_ceil(2).saturating_mul(2))?;
        Ok(Self { size, source: Source::Nv12 { luma, chroma, color } })
    }

    /// The self-test image of a seed.
    pub(crate) fn generated(seed: u64, size: (usize, usize)) -> Self {
        Self { size, source: Source::Generated { seed } }
    }

    /// `(height, width)`.
    pub fn size(&self) -> (usize, usize) {
        self.size
    }

    /// Writes the `side × side` pixels from `(row, column)` on, minus 128: one plane a channel, red first.
    pub(crate) fn patch_into(&self, (row, column): (usize, usize), side: usize, out: &mut [i8]) {
        if let Source::Frame { pixels, order } = self.source {
            for (line, out) in rows_of_mut(out, side).take(3 * side).enumerate() {
                let (channel, y) = (line / side, row + line % side);
                let bytes = pixels.at(y, column * order.bytes() + order.places()[channel.min(2)]);
                let pixels = bytes.iter().step_by(order.bytes());
                for (out, pixel) in out.iter_mut().zip(pixels) {
                    *out = centered(*pixel);
                }
            }
            return;
        }
        let (red, rest) = out.split_at_mut((side * side).min(out.len()));
        let (green, blue) = rest.split_at_mut((side * side).min(rest.len()));
        let lines = rows_of_mut(red, side).zip(rows_of_mut(green, side)).zip(rows_of_mut(blue, side));
        let mut line = [[0; 3]; MOST_PATCH_SIZE];
        let line = line.get_mut(..side).unwrap_or_default();
        for (y, ((red, green), blue)) in lines.enumerate() {
            self.row_into(row + y, column, line);
            for (((red, green), blue), pixel) in red.iter_mut().zip(green).zip(blue).zip(&*line) {
                [*red, *green, *blue] = pixel.map(centered);
            }
        }
    }

    /// Writes the pixels of a row from `column` on as red, green, blue: as many as `out` has room for.
    #[inline(always)]
    pub(crate) fn row_into(&self, row: usize, column: usize, out: &mut [[u8; 3]]) {
        match self.source {
            Source::Frame { pixels, order } => {
                let bytes = pixels.at(row, column * order.bytes());
                match order {
                    PixelOrder::Rgb => {
                        let pixels = bytes.as_chunks::<3>().0;
                        out.iter_mut().zip(pixels).for_each(|(out, pixel)| *out = *pixel);
                    }
                    PixelOrder::Bgr => {
                        let pixels = bytes.as_chunks::<3>().0;
                        out.iter_mut().zip(pixels).for_each(|(out, [b, g, r])| *out = [*r, *g, *b]);
                    }
                    PixelOrder::Gray => out.iter_mut().zip(bytes).for_each(|(out, gray)| *out = [*gray; 3]),
                }
            }
            Source::Nv12 { luma, chroma, color } => {
                let chroma = chroma.at(row / 2, column & !1);
                color.matrix().row_into(luma.at(row, column), chroma, column & 1 == 1, out);
            }
            Source::Generated { seed } => {
                let first = 3 * (row * self.size.1 + column) as u64;
                for (out, at) in out.iter_mut().zip((first..).step_by(3)) {
                    *out = [at, at + 1, at + 2].map(|index| generated_pixel(seed, index));
                }
            }
        }
    }
}

/// The pixel minus 128.
const fn centered(pixel: u8) -> i8 {
    (pixel ^ 0x80).cast_signed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_is_three_planes_whatever_the_order_of_bytes() {
        // 2×2 pixels with 2 bytes of padding a row; red = 128 + index, green = 0, blue = 255
        let rgb = [128, 0, 255, 129, 0, 255, 9, 9, 130, 0, 255, 131, 0, 255];
        let bgr = [255, 0, 128, 255, 0, 129, 9, 9, 255, 0, 130, 255, 0, 131];
        for (bytes, order) in [(rgb, PixelOrder::Rgb), (bgr, PixelOrder::Bgr)] {
            let mut patch = [0; 12];
            Image::new(&bytes, (2, 2), 8, order).unwrap().patch_into((0, 0), 2, &mut patch);
            assert_eq!(patch, [0, 1, 2, 3, -128, -128, -128, -128, 127, 127, 127, 127]);
        }
        let mut patch = [0; 3];
        let gray = Image::new(&[7, 8, 9, 10], (2, 2), 2, PixelOrder::Gray).unwrap();
        gray.patch_into((1, 1), 1, &mut patch);
        assert_eq!(patch, [10_i16 - 128; 3].map(|value| value as i8));
    }

    #[test]
    fn short_frames_and_strides_are_refused() {
        assert!(Image::new(&[0; 11], (2, 2), 6, PixelOrder::Rgb).is_err());
        assert!(Image::new(&[0; 12], (2, 2), 5, PixelOrder::Rgb).is_err());
        assert!(Image::new(&[0; 12], (usize::MAX, usize::MAX), usize::MAX, PixelOrder::Rgb).is_err());
    }

    /// 3 × 3 pixels: luma rows with a padding byte, chroma rows of two pairs with two.
    fn nv12() -> Image<'static> {
        let luma = Plane { bytes: &[81, 145, 41, 0, 16, 235, 126, 0, 100, 50, 200], stride: 4 };
        let chroma = Plane { bytes: &[90, 240, 54, 34, 0, 0, 128, 128, 240, 110], stride: 6 };
        Image::nv12(luma, chroma, (3, 3), YuvColor::Bt601).unwrap()
    }

    #[test]
    fn chroma_belongs_to_its_four_pixels() {
        let color = YuvColor::Bt601.matrix();
        let mut row = [[0; 3]; 3];
        nv12().row_into(1, 0, &mut row);
        assert_eq!(row, [color.rgb(16, [90, 240]), color.rgb(235, [90, 240]), color.rgb(126, [54, 34])]);
        let mut row = [[0; 3]; 2];
        nv12().row_into(2, 1, &mut row);
        assert_eq!(row, [color.rgb(50, [128, 128]), color.rgb(200, [240, 110])]);
        let mut patch = [0; 12];
        nv12().patch_into((1, 1), 2, &mut patch);
        let pixels = [(235, [90, 240]), (126, [54, 34]), (50, [128, 128]), (200, [240, 110])];
        for (at, (luma, chroma)) in pixels.into_iter().enumerate() {
            let rgb = color.rgb(luma, chroma).map(centered);
            assert_eq!([patch[at], patch[4 + at], patch[8 + at]], rgb, "pixel {at}");
        }
    }

    #[test]
    fn rows_are_the_same_pixels_in_every_order() {
        let rgb = [1, 2, 3, 4, 5, 6, 7, 8, 9];
        let bgr = [3, 2, 1, 6, 5, 4, 9, 8, 7];
        let mut row = [[0; 3]; 2];
        for (bytes, order) in [(rgb, PixelOrder::Rgb), (bgr, PixelOrder::Bgr)] {
            Image::new(&bytes, (1, 3), 9, order).unwrap().row_into(0, 1, &mut row);
            assert_eq!(row, [[4, 5, 6], [7, 8, 9]]);
        }
        Image::new(&rgb, (3, 3), 3, PixelOrder::Gray).unwrap().row_into(2, 1, &mut row);
        assert_eq!(row, [[8; 3], [9; 3]]);
        let generated = Image::generated(5, (2, 3));
        let mut patch = [0; 3];
        for column in 0..2 {
            generated.row_into(1, 1, &mut row);
            generated.patch_into((1, 1 + column), 1, &mut patch);
            assert_eq!(patch, row[column].map(centered));
        }
    }

    #[test]
    fn planes_that_end_early_are_refused() {
        let refused = |luma: usize, luma_stride, chroma: usize, chroma_stride, size| {
            let (luma, chroma) = (std::vec![0; luma], std::vec![0; chroma]);
            let planes = (
                Plane { bytes: &luma, stride: luma_stride },
                Plane { bytes: &chroma, stride: chroma_stride },
            );
            Image::nv12(planes.0, planes.1, size, YuvColor::Bt709).err()
        };
        assert_eq!(refused(9, 3, 8, 4, (3, 3)), None);
        assert!(refused(8, 3, 8, 4, (3, 3)).is_some());
        assert!(refused(9, 2, 8, 4, (3, 3)).is_some());
        assert!(refused(9, 3, 7, 4, (3, 3)).is_some());
        assert!(refused(9, 3, 8, 3, (3, 3)).is_some());
        assert!(refused(9, usize::MAX, 8, usize::MAX, (usize::MAX, usize::MAX)).is_some());
    }
}
