//! Three planes of bytes, and the step from them to the network's input.
//!
//! On `Arch::dispatch` here and in the neighboring files: a closure is compiled for the processor at hand only if it is
//! inlined, and the call of a closure that could be called again goes through a function that is not. Each closure
//! therefore moves one of its mutable slices out of itself, so that it can be called just once.

use pulp::Arch;

/// An 8-bit RGB image as three planes, `[3, H, W]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Planes {
    width: usize,
    height: usize,
    data: Vec<u8>,
}

impl Planes {
    /// Planes from interleaved pixels, `[H, W, 3]`.
    ///
    /// # Panics
    /// When `pixels` does not hold `3 * width * height` bytes.
    pub fn from_interleaved(width: usize, height: usize, pixels: &[u8]) -> Self {
        let mut planes = Self::default();
        planes.fill_from_interleaved(width, height, pixels);
        planes
    }

    /// As [`Planes::from_interleaved`], keeping the buffer.
    ///
    /// # Panics
    /// When `pixels` does not hold `3 * width * height` bytes.
    pub fn fill_from_interleaved(&mut self, width: usize, height: usize, pixels: &[u8]) {
        assert_eq!(pixels.len(), 3 * width * height, "bytes of an interleaved RGB image");
        self.resize(width, height);
        let [red, green, blue] = self.channels_mut();
        Arch::new().dispatch(
            #[inline(always)]
            || {
                let targets = red.iter_mut().zip(green).zip(blue);
                for (((red, green), blue), pixel) in targets.zip(pixels.as_chunks::<3>().0) {
                    [*red, *green, *blue] = *pixel;
                }
            },
        );
    }

    /// Back to interleaved pixels, `[H, W, 3]`.
    pub fn to_interleaved(&self) -> Vec<u8> {
        let [red, green, blue] = self.channels();
        red.iter().zip(green).zip(blue).flat_map(|((&r, &g), &b)| [r, g, b]).collect()
    }

    /// Width in pixels.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Height in pixels.
    pub fn height(&self) -> usize {
        self.height
    }

    /// All bytes, `[3, H, W]`.
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// The planes red, green, blue, each `[H, W]`.
    pub fn channels(&self) -> [&[u8]; 3] {
        let area = self.width * self.height;
        let (red, rest) = self.data.split_at(area);
        let (green, blue) = rest.split_at(area);
        [red, green, blue]
    }

    /// The planes red, green, blue, each `[H, W]`.
    pub fn channels_mut(&mut self) -> [&mut [u8]; 3] {
        let area = self.width * self.height;
        let (red, rest) = self.data.split_at_mut(area);
        let (green, blue) = rest.split_at_mut(area);
        [red, green, blue]
    }

    /// Mirrors left-right.
    pub fn flip(&mut self) {
        if self.width > 0 {
            self.data.chunks_exact_mut(self.width).for_each(<[u8]>::reverse);
        }
    }

    /// Keeps the given rectangle.
    ///
    /// # Panics
    /// When it reaches beyond the image.
    pub fn crop(&mut self, left: usize, top: usize, width: usize, height: usize) {
        assert!(left + width <= self.width && top + height <= self.height, "rectangle within the image");
        let mut end = 0;
        for channel in 0..3 {
            for row in top..top + height {
                let start = (channel * self.height + row) * self.width + left;
                self.data.copy_within(start..start + width, end);
                end += width;
            }
        }
        self.data.truncate(end);
        (self.width, self.height) = (width, height);
    }

    /// Changes the size; the contents are then unspecified.
    pub(crate) fn resize(&mut self, width: usize, height: usize) {
        self.data.resize(3 * width * height, 0);
        (self.width, self.height) = (width, height);
    }

    /// All bytes, `[3, H, W]`.
    pub(crate) fn data_mut(&mut self) -> &mut [u8] {
        &mut self.data
    }
}

/// `(x / 255 - mean) / std` per channel into `out`, `[3, H, W]`.
///
/// # Panics
/// When `out` has another length.
pub fn normalize_into(planes: &Planes, mean: [f32; 3], std: [f32; 3], out: &mut [f32]) {
    assert_eq!(out.len(), planes.data.len(), "numbers of a normalized crop");
    let area = planes.width * planes.height;
    for (channel, plane) in planes.channels().into_iter().enumerate() {
        let (mean, std) = (mean[channel], std[channel]);
        let out = &mut out[channel * area..(channel + 1) * area];
        Arch::new().dispatch(
            #[inline(always)]
            || {
                let out = out; // moved: see above
                for (out, &byte) in out.iter_mut().zip(plane) {
                    *out = (f32::from(byte) / 255.0 - mean) / std;
                }
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_and_back_is_the_identity() {
        let pixels: Vec<u8> = (0..3 * 5 * 7).collect();
        let planes = Planes::from_interleaved(5, 7, &pixels);
        assert_eq!(planes.channels()[1][..3], [1, 4, 7]);
        assert_eq!(planes.to_interleaved(), pixels);
    }

    #[test]
    fn crop_keeps_the_rectangle_of_each_plane() {
        let pixels: Vec<u8> = (0..3 * 4 * 3).collect();
        let mut planes = Planes::from_interleaved(4, 3, &pixels);
        planes.crop(1, 1, 2, 2);
        assert_eq!(planes.to_interleaved(), [15, 16, 17, 18, 19, 20, 27, 28, 29, 30, 31, 32]);
    }

    #[test]
    fn flip_mirrors_each_row() {
        let mut planes = Planes::from_interleaved(2, 1, &[1, 2, 3, 4, 5, 6]);
        planes.flip();
        assert_eq!(planes.to_interleaved(), [4, 5, 6, 1, 2, 3]);
    }
}
