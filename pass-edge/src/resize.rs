//! Any image to the size of a model: scaled with antialiasing, the middle cut out. Working memory is handed in.
//!
//! The arithmetic is Pillow's: two passes, weights in 22-bit fixed point, each pass rounded to bytes. So the results are
//! those of `Image.resize` bit for bit, and those of the trainer's own pictures ([`Fit::CenterCrop`], [`Filter::Bicubic`]).
//! Weights are computed in `f64` with additions, multiplications and divisions alone, which every platform rounds alike.
//!
//! Source rows are read once, in order, and only those that matter; a window of them stays in the working memory.
//!
//! ```
//! use pass_edge::{image::{Image, PixelOrder}, kernels::Kernel};
//! use pass_edge::resize::{Filter, Fit, Resize, ResizeScratch};
//!
//! const TO_MODEL: Resize = match Resize::new((48, 64), (16, 16), Fit::CenterCrop, Filter::Bicubic) {
//!     Ok(resize) => resize,
//!     Err(_) => panic!("sizes within the limits"),
//! };
//! let (mut words, mut bytes) = ([0; TO_MODEL.scratch_len().words], [0; TO_MODEL.scratch_len().bytes]);
//! let mut scratch = ResizeScratch { words: &mut words, bytes: &mut bytes };
//! let frame = [90; 3 * 64 * 48];
//! let frame = Image::new(&frame, (48, 64), 3 * 64, PixelOrder::Bgr)?;
//! let mut rgb = [0; 3 * 16 * 16];
//! let image = TO_MODEL.resize_into(&frame, Kernel::best(), &mut scratch, &mut rgb)?;
//! assert_eq!(image.size(), (16, 16));
//! # Ok::<(), pass_edge::Error>(())
//! ```

mod axis;
mod passes;

use crate::error::{Error, Result, prefix_mut};
use crate::image::{Image, PixelOrder};
use crate::kernels::Kernel;
use axis::Axis;
use passes::Passes;

/// Longest side of a source, in pixels.
pub const MOST_SOURCE: usize = 65_535;
/// Longest side of a target, in pixels.
pub const MOST_TARGET: usize = 16_384;

/// Which part of an image becomes the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// The evaluation view of the trainer: the image is scaled until 7/8 of its shorter side is the target, whose place
    /// is its center (224 of 256).
    CenterCrop,
    /// The largest part from the center that has the shape of the target.
    Cover,
    /// All of it, whatever its shape.
    Stretch,
}

/// How pixels are weighted; both widen when shrinking (antialiasing).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// A triangle of 2 pixels.
    Bilinear,
    /// The cubic convolution of 4 pixels with a = −1/2 (Keys 1981).
    Bicubic,
}

/// Sizes and places of a resampling, checked once; used for any number of images.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Resize {
    source: (usize, usize),
    target: (usize, usize),
    rows: Axis,
    columns: Axis,
}

/// Elements of each type that [`Resize::resize_into`] needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResizeLen {
    /// `i32`: weights and sums.
    pub words: usize,
    /// `u8`: rows between the two passes.
    pub bytes: usize,
}

/// Borrowed working memory of a resampling. Its contents do not matter, before or after.
#[derive(Debug)]
pub struct ResizeScratch<'a> {
    /// [`ResizeLen::words`].
    pub words: &'a mut [i32],
    /// [`ResizeLen::bytes`].
    pub bytes: &'a mut [u8],
}

impl Resize {
    /// From images of `source = (height, width)` pixels to `target = (height, width)`.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] if a side is 0 or beyond [`MOST_SOURCE`] or [`MOST_TARGET`].
    pub const fn new(
        source: (usize, usize),
        target: (usize, usize),
        fit: Fit,
        filter: Filter,
    ) -> Result<Self> {
        let sides = [
            ("source height", source.0, MOST_SOURCE),
            ("source width", source.1, MOST_SOURCE),
            ("target height", target.0, MOST_TARGET),
            ("target width", target.1, MOST_TARGET),
        ];
        let mut side = 0;
        while side < sides.len() {
            let (what, actual, max) = sides[side];
            if actual == 0 || actual > max {
                return Err(Error::OutOfRange { what, min: 1, max, actual });
            }
            side += 1;
        }
        let (height, width) = match fit {
            Fit::Stretch => target,
            Fit::Cover => cover(source, target),
            Fit::CenterCrop => cover(source, (with_margin(target.0), with_margin(target.1))),
        };
        Ok(Self {
            source,
            target,
            rows: Axis::new(source.0, height, target.0, filter),
            columns: Axis::new(source.1, width, target.1, filter),
        })
    }

    /// Size of the images it takes, `(height, width)`.
    pub const fn source(&self) -> (usize, usize) {
        self.source
    }

    /// Size of the images it gives, `(height, width)`.
    pub const fn target(&self) -> (usize, usize) {
        self.target
    }

    /// Whether source and result are the same pixels.
    pub const fn is_identity(&self) -> bool {
        self.rows.is_identity() && self.columns.is_identity()
    }

    /// Working memory that [`Resize::resize_into`] needs.
    pub const fn scratch_len(&self) -> ResizeLen {
        Passes::scratch_len(&self.rows, &self.columns)
    }

    /// Resamples an image; the same bytes with every kernel.
    ///
    /// - `image`: of the source size, in any order of bytes.
    /// - `out`: at least `3 · height · width` bytes of the target; they become the RGB image that is returned.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] for an image of another size or a buffer that is too short.
    pub fn resize_into<'o>(
        &self,
        image: &Image<'_>,
        kernel: Kernel,
        scratch: &mut ResizeScratch<'_>,
        out: &'o mut [u8],
    ) -> Result<Image<'o>> {
        for (what, expected, actual) in
            [("image height", self.source.0, image.size().0), ("image width", self.source.1, image.size().1)]
        {
            if expected != actual {
                return Err(Error::LengthMismatch { what, expected, actual });
            }
        }
        let len = self.scratch_len();
        let words = prefix_mut("resize scratch words", len.words, scratch.words)?;
        let bytes = prefix_mut("resize scratch bytes", len.bytes, scratch.bytes)?;
        let (height, width) = self.target;
        let out = prefix_mut("resized image", 3 * width * height, out)?;
        kernel.dispatch(Passes { image, rows: &self.rows, columns: &self.columns, words, bytes, out });
        Image::new(out, self.target, 3 * width, PixelOrder::Rgb)
    }
}

/// 8/7 of a side, rounded as the trainer does: 256 for 224.
const fn with_margin(side: usize) -> usize {
    // half-way cases would need 7 · 2 to divide 16 · side + 7, which is odd
    (16 * side + 7) / 14
}

/// The size of the whole image when it is scaled to just cover `target`; the longer side is rounded down.
const fn cover((height, width): (usize, usize), target: (usize, usize)) -> (usize, usize) {
    // products of sides within the limits fit 64 bits, not 32
    let (h, w, th, tw) = (height as u64, width as u64, target.0 as u64, target.1 as u64);
    if w * th <= h * tw { ((tw * h / w) as usize, target.1) } else { (target.0, (th * w / h) as usize) }
}

#[cfg(test)]
mod tests;
