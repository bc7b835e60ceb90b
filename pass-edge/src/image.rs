//! Frames as they come: where the bytes of a pixel are. Nothing is converted or copied.

use crate::error::{Error, Result};
use crate::format::generated_pixel;
use crate::rows::rows_of_mut;

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
    Frame { bytes: &'a [u8], order: PixelOrder, stride: usize },
    Generated { seed: u64 },
}

impl<'a> Image<'a> {
    /// An image of `size = (height, width)` pixels whose rows start `stride` bytes apart.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] if a row is longer than `stride` or `bytes` ends before the last row does.
    pub fn new(bytes: &'a [u8], size: (usize, usize), stride: usize, order: PixelOrder) -> Result<Self> {
        let row = size.1.saturating_mul(order.bytes());
        if stride < row {
            return Err(Error::LengthMismatch { what: "stride", expected: row, actual: stride });
        }
        let needed = size.0.saturating_sub(1).saturating_mul(stride).saturating_add(row);
        if bytes.len() < needed {
            return Err(Error::LengthMismatch { what: "image", expected: needed, actual: bytes.len() });
        }
        Ok(Self { size, source: Source::Frame { bytes, order, stride } })
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
        for (line, out) in rows_of_mut(out, side).take(3 * side).enumerate() {
            let (channel, y) = (line / side, row + line % side);
            match self.source {
                Source::Frame { bytes, order, stride } => {
                    let start = y * stride + column * order.bytes() + order.places()[channel.min(2)];
                    let pixels = bytes.get(start..).unwrap_or_default().iter().step_by(order.bytes());
                    for (out, pixel) in out.iter_mut().zip(pixels) {
                        *out = centered(*pixel);
                    }
                }
                Source::Generated { seed } => {
                    for (x, out) in out.iter_mut().enumerate() {
                        let index = 3 * (y * self.size.1 + column + x) + channel;
                        *out = centered(generated_pixel(seed, index as u64));
                    }
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
}
