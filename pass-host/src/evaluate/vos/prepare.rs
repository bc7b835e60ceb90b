//! From a frame of a video to the network's input (SEMANTICS §6; the arithmetic is `pass_core::frame`).

use pass_core::frame::{LONG_SIDE_MULTIPLE, normalize_into, prepared_size, resize_bilinear_into};

use crate::data::decode::Rgb8Image;

/// How frames are prepared.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Preparation {
    /// Pixels of the short side.
    pub short_side: usize,
    /// Pixels from one patch to the next.
    pub stride: usize,
    /// Of red, green and blue.
    pub mean: [f32; 3],
    /// Of red, green and blue.
    pub std: [f32; 3],
}

/// The network's input.
#[derive(Clone, Debug, PartialEq)]
pub struct Prepared {
    /// Height and width, multiples of the stride.
    pub size: (usize, usize),
    /// `[3, height, width]`, red, green, blue.
    pub pixels: Vec<f32>,
}

impl Preparation {
    /// Size of a prepared frame, `None` if nothing would be left of it.
    ///
    /// Where the stride divides 64 (every published network), the short side is the given one and the long side is
    /// floored to a multiple of 64. Deviation: another stride (patches of 14) floors both sides to its multiples; the
    /// published script would cut such patches off.
    pub fn size(&self, size: (usize, usize)) -> Option<(usize, usize)> {
        let short_side = self.short_side / self.stride * self.stride;
        if LONG_SIDE_MULTIPLE.is_multiple_of(self.stride) {
            return prepared_size(size, short_side).ok();
        }
        // refuses what is empty or too large
        prepared_size(size, short_side.max(LONG_SIDE_MULTIPLE)).ok()?;
        let (short, long) = (size.0.min(size.1), size.0.max(size.1));
        let long = short_side * long / short / self.stride * self.stride;
        match (short_side, size.0 > size.1) {
            (0, _) => None,
            (_, true) => Some((long, short_side)),
            (_, false) => Some((short_side, long)),
        }
    }

    /// Resizes (bilinear as in OpenCV) and normalizes; `None` as in [`Preparation::size`].
    pub fn prepare(&self, image: &Rgb8Image) -> Option<Prepared> {
        let from = (image.height as usize, image.width as usize);
        let size = self.size(from)?;
        let mut resized = vec![0; 3 * size.0 * size.1];
        resize_bilinear_into(&image.data, from, 3, size, &mut resized).ok()?;
        let mut pixels = vec![0.0; resized.len()];
        normalize_into(&resized, self.mean, self.std, &mut pixels).ok()?;
        Some(Prepared { size, pixels })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pass_core::frame::{MEAN, STD};

    fn preparation(short_side: usize, stride: usize) -> Preparation {
        Preparation { short_side, stride, mean: MEAN, std: STD }
    }

    #[test]
    fn sides_are_multiples_of_the_stride() {
        let cases = [
            (480, 16, (480, 854), Some((480, 832))),
            (480, 8, (480, 854), Some((480, 832))),
            (480, 32, (854, 480), Some((832, 480))),
            (490, 16, (480, 854), Some((480, 832))),
            (480, 14, (480, 854), Some((476, 840))),
            (480, 14, (854, 480), Some((840, 476))),
            (480, 14, (500, 500), Some((476, 476))),
            (13, 14, (480, 854), None),
            (15, 16, (480, 854), None),
            (480, 14, (0, 854), None),
            (usize::MAX, 14, (480, 854), None),
        ];
        for (short_side, stride, size, expected) in cases {
            assert_eq!(
                preparation(short_side, stride).size(size),
                expected,
                "{short_side} {stride} {size:?}"
            );
        }
    }

    #[test]
    fn channels_stay_in_order() {
        let data = [255, 0, 51].repeat(64 * 64);
        let image = Rgb8Image { width: 64, height: 64, data };
        let plain = Preparation { mean: [0.0; 3], std: [1.0; 3], ..preparation(64, 16) };
        let prepared = plain.prepare(&image).unwrap();
        assert_eq!(prepared.size, (64, 64));
        for (channel, expected) in [1.0, 0.0, 0.2].into_iter().enumerate() {
            let plane = &prepared.pixels[channel * 64 * 64..][..64 * 64];
            assert!(plane.iter().all(|value| (value - expected).abs() < 1e-6));
        }
    }
}
