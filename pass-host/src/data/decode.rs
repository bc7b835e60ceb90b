//! Bytes of an image file -> upright 8-bit RGB, or a reason why not.
//!
//! The format is read from the content, never from the name. Rules, where decoders differ:
//!
//! - EXIF orientation is applied; an invalid one counts as upright.
//! - Alpha is dropped, not composited (Pillow's `convert("RGB")`); of 16-bit samples the high byte is kept.
//! - Of an animation the first frame counts, on a canvas that holds all of it.
//! - A file that ends early is refused, whatever part of it could be shown: a JPEG without its end marker, or whose
//!   coded data ends before its last block; a PNG without its end chunk; a GIF whose first frame is cut.
//! - A size beyond the limit is refused from the header, before memory is taken.
//! - A third-party decoder that panics is an error like any other.

mod gif;
mod jpeg;
mod orient;

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};

/// Interleaved 8-bit RGB, `[height, width, 3]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rgb8Image {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// `3 * width * height` bytes.
    pub data: Vec<u8>,
}

/// Why bytes are not an image. The text is the reason written to the quarantine list.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// No bytes at all.
    #[error("the file is empty")]
    Empty,
    /// Not one of the known formats.
    #[error("not an image of a known format (JPEG, PNG, WebP, BMP, TIFF, PNM, GIF); it begins with {start}")]
    UnknownFormat {
        /// The first bytes in hexadecimal.
        start: String,
    },
    /// More pixels than allowed.
    #[error(
        "{width}x{height} pixels are more than the limit of {max_megapixels} megapixels (`data.max_megapixels`)"
    )]
    TooLarge {
        /// Width in pixels as the header says.
        width: u32,
        /// Height in pixels as the header says.
        height: u32,
        /// The limit in millions of pixels.
        max_megapixels: String,
    },
    /// The data ends early.
    #[error("truncated {format}: {detail}")]
    Truncated {
        /// The format.
        format: &'static str,
        /// What is missing.
        detail: String,
    },
    /// The data contradicts its format, or uses a part of it that is not supported.
    #[error("malformed or unsupported {format}: {detail}")]
    Malformed {
        /// The format.
        format: &'static str,
        /// What the decoder says.
        detail: String,
    },
}

/// Decodes a whole image at full size.
///
/// # Errors
/// [`DecodeError`] for anything that is not a complete image within the limit. Never panics, whatever the bytes.
pub fn decode_rgb(bytes: &[u8], max_megapixels: f64) -> Result<Rgb8Image, DecodeError> {
    Encoded::open(bytes, max_megapixels)?.decode(1)
}

/// An image whose header has been read and accepted; its pixels have not been decoded.
pub struct Encoded<'a> {
    width: u32,
    height: u32,
    orientation: Orientation,
    source: Source<'a>,
}

impl std::fmt::Debug for Encoded<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoded")
            .field("width", &self.width)
            .field("height", &self.height)
            .finish_non_exhaustive()
    }
}

enum Source<'a> {
    Jpeg(jpeg::Layout<'a>),
    Other { decoder: Box<dyn ImageDecoder + 'a>, format: &'static str },
}

impl<'a> Encoded<'a> {
    /// Reads the header.
    ///
    /// # Errors
    /// As [`decode_rgb`], as far as the header tells.
    pub fn open(bytes: &'a [u8], max_megapixels: f64) -> Result<Self, DecodeError> {
        if bytes.is_empty() {
            return Err(DecodeError::Empty);
        }
        let (format, name) = sniff(bytes)?;
        guarded(name, || {
            if format == ImageFormat::Jpeg {
                let layout = jpeg::Layout::read(bytes)?;
                let (width, height) = (layout.width, layout.height);
                check_size(width, height, max_megapixels)?;
                return Ok(Self {
                    width,
                    height,
                    orientation: layout.orientation,
                    source: Source::Jpeg(layout),
                });
            }
            let canvas = if format == ImageFormat::Gif { gif::whole_canvas(bytes)? } else { None };
            let reader = match canvas {
                Some(patched) => Bytes::Owned(patched),
                None => Bytes::Borrowed(bytes),
            };
            let mut decoder = ImageReader::with_format(Cursor::new(reader), format)
                .into_decoder()
                .map_err(|error| from_image(name, &error))?;
            let (width, height) = decoder.dimensions();
            check_size(width, height, max_megapixels)?;
            let mut limits = Limits::default();
            limits.max_alloc = Some(ALLOCATION_BASE + width as u64 * height as u64 * ALLOCATION_PER_PIXEL);
            decoder.set_limits(limits).map_err(|error| from_image(name, &error))?;
            let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
            let source = Source::Other { decoder: Box::new(decoder), format: name };
            Ok(Self { width, height, orientation, source })
        })
    }

    /// Width and height as stored, before the EXIF orientation is applied.
    pub fn stored_size(&self) -> (u32, u32) {
        (self.width, self.height)
    }

    /// Width and height of the upright image at full size.
    pub fn upright_size(&self) -> (u32, u32) {
        if orient::swaps_sides(self.orientation) {
            (self.height, self.width)
        } else {
            (self.width, self.height)
        }
    }

    /// Whether [`Encoded::decode`] at this reduction (1, 2, 4 or 8) is cheaper than at full size and worth it.
    pub fn can_reduce(&self, reduction: u32) -> bool {
        match &self.source {
            Source::Jpeg(layout) => layout.can_reduce(reduction),
            Source::Other { .. } => reduction == 1,
        }
    }

    /// Decodes and turns upright. At `reduction` r the image shows the whole picture with sides `ceil(side / r)`.
    ///
    /// # Errors
    /// As [`decode_rgb`].
    ///
    /// # Panics
    /// When `reduction` is neither 1 nor one that [`Encoded::can_reduce`] accepts.
    pub fn decode(self, reduction: u32) -> Result<Rgb8Image, DecodeError> {
        assert!(reduction == 1 || self.can_reduce(reduction), "reduction {reduction} is offered");
        let image = match self.source {
            Source::Jpeg(layout) => guarded("JPEG", || layout.decode(reduction))?,
            Source::Other { decoder, format } => guarded(format, || {
                DynamicImage::from_decoder(decoder).map(to_rgb8).map_err(|error| from_image(format, &error))
            })?,
        };
        Ok(orient::upright(image, self.orientation))
    }
}

/// Working memory any decoder may take besides its pixels.
const ALLOCATION_BASE: u64 = 64 << 20;
/// Working memory a pixel: 16-bit RGBA twice over.
const ALLOCATION_PER_PIXEL: u64 = 16;

/// Bytes that are borrowed, or owned because they were repaired.
enum Bytes<'a> {
    Borrowed(&'a [u8]),
    Owned(Vec<u8>),
}

impl AsRef<[u8]> for Bytes<'_> {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Borrowed(bytes) => bytes,
            Self::Owned(bytes) => bytes,
        }
    }
}

fn sniff(bytes: &[u8]) -> Result<(ImageFormat, &'static str), DecodeError> {
    let format = image::guess_format(bytes).ok();
    let name = match format {
        Some(ImageFormat::Jpeg) => "JPEG",
        Some(ImageFormat::Png) => "PNG",
        Some(ImageFormat::WebP) => "WebP",
        Some(ImageFormat::Bmp) => "BMP",
        Some(ImageFormat::Tiff) => "TIFF",
        Some(ImageFormat::Pnm) => "PNM",
        Some(ImageFormat::Gif) => "GIF",
        _ => {
            let start: Vec<_> = bytes.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
            return Err(DecodeError::UnknownFormat { start: start.join(" ") });
        }
    };
    Ok((format.unwrap_or(ImageFormat::Jpeg), name))
}

fn check_size(width: u32, height: u32, max_megapixels: f64) -> Result<(), DecodeError> {
    let megapixels = f64::from(width) * f64::from(height) / 1e6;
    if megapixels > max_megapixels {
        return Err(DecodeError::TooLarge { width, height, max_megapixels: max_megapixels.to_string() });
    }
    Ok(())
}

fn from_image(format: &'static str, error: &image::ImageError) -> DecodeError {
    let detail = error.to_string();
    match error {
        image::ImageError::IoError(io) if io.kind() == std::io::ErrorKind::UnexpectedEof => {
            DecodeError::Truncated { format, detail }
        }
        _ => DecodeError::Malformed { format, detail },
    }
}

/// Runs foreign code; its panic becomes an error.
fn guarded<T>(format: &'static str, job: impl FnOnce() -> Result<T, DecodeError>) -> Result<T, DecodeError> {
    catch_unwind(AssertUnwindSafe(job)).unwrap_or_else(|_| {
        Err(DecodeError::Malformed {
            format,
            detail: "the decoder failed on it (a defect of the decoder)".to_owned(),
        })
    })
}

/// Drops alpha, repeats gray, keeps the high byte of 16 bits.
fn to_rgb8(image: DynamicImage) -> Rgb8Image {
    let (width, height) = (image.width(), image.height());
    let gray = |samples: &mut dyn Iterator<Item = u8>| samples.flat_map(|value| [value; 3]).collect();
    let high = |sample: u16| (sample >> 8) as u8;
    let data = match image {
        DynamicImage::ImageRgb8(pixels) => pixels.into_raw(),
        DynamicImage::ImageRgba8(pixels) => {
            pixels.as_raw().as_chunks::<4>().0.iter().flat_map(|&[r, g, b, _]| [r, g, b]).collect()
        }
        DynamicImage::ImageLuma8(pixels) => gray(&mut pixels.as_raw().iter().copied()),
        DynamicImage::ImageLumaA8(pixels) => gray(&mut pixels.as_raw().iter().step_by(2).copied()),
        DynamicImage::ImageLuma16(pixels) => gray(&mut pixels.as_raw().iter().map(|&v| high(v))),
        DynamicImage::ImageLumaA16(pixels) => gray(&mut pixels.as_raw().iter().step_by(2).map(|&v| high(v))),
        DynamicImage::ImageRgb16(pixels) => pixels.as_raw().iter().map(|&v| high(v)).collect(),
        DynamicImage::ImageRgba16(pixels) => {
            pixels.as_raw().as_chunks::<4>().0.iter().flat_map(|&[r, g, b, _]| [r, g, b].map(high)).collect()
        }
        other => other.into_rgb8().into_raw(),
    };
    Rgb8Image { width, height, data }
}

#[cfg(test)]
mod tests;
