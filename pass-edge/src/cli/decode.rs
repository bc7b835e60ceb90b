//! Bytes of an image file -> upright 8-bit RGB, or the reason why not. The rules are those of `pass-host`:
//!
//! - The format is read from the content, never from the name. EXIF orientation is applied; an invalid one is upright.
//! - Alpha is dropped, not composited; of 16-bit samples the high byte is kept; of an animation the first frame counts.
//! - A file that ends early is refused, whatever part of it could be shown.
//! - A size beyond the limit is refused from the header, before memory is taken.
//! - A third-party decoder that panics is an error like any other.

mod gif;
mod jpeg;
mod orient;

use std::io::{Cursor, ErrorKind};
use std::panic::{AssertUnwindSafe, catch_unwind};

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits};

/// Interleaved 8-bit RGB, `[height, width, 3]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Picture {
    pub(super) height: usize,
    pub(super) width: usize,
    pub(super) rgb: Vec<u8>,
}

/// Why bytes are not an image.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub(crate) enum DecodeError {
    #[error("the file is empty")]
    Empty,
    #[error("not an image of a known format (JPEG, PNG, WebP, BMP, TIFF, PNM, GIF); it begins with {start}")]
    UnknownFormat { start: String },
    #[error("{width}x{height} pixels are more than the limit of {max_megapixels} megapixels")]
    TooLarge { width: u32, height: u32, max_megapixels: f64 },
    #[error("truncated {format}: {detail}")]
    Truncated { format: &'static str, detail: String },
    #[error("malformed or unsupported {format}: {detail}")]
    Malformed { format: &'static str, detail: String },
}

/// Working memory a decoder may take besides its pixels.
const ALLOCATION_BASE: u64 = 64 << 20;
/// Working memory a pixel: 16-bit RGBA twice over.
const ALLOCATION_PER_PIXEL: u64 = 16;

/// Decodes a whole image and turns it upright. Never panics, whatever the bytes.
pub(super) fn decode(bytes: &[u8], max_megapixels: f64) -> Result<Picture, DecodeError> {
    let (format, name) = sniff(bytes)?;
    let decoded = catch_unwind(AssertUnwindSafe(|| match format {
        ImageFormat::Jpeg => {
            let layout = jpeg::Layout::read(bytes)?;
            check_size(layout.width, layout.height, max_megapixels)?;
            Ok((layout.decode()?, layout.orientation))
        }
        ImageFormat::Gif => decode_other(&gif::whole_canvas(bytes)?, format, name, max_megapixels),
        _ => decode_other(bytes, format, name, max_megapixels),
    }));
    let (picture, orientation) = decoded.unwrap_or_else(|_| {
        let detail = "the decoder failed on it (a defect of the decoder)".to_owned();
        Err(DecodeError::Malformed { format: name, detail })
    })?;
    Ok(orient::upright(picture, orientation))
}

fn sniff(bytes: &[u8]) -> Result<(ImageFormat, &'static str), DecodeError> {
    if bytes.is_empty() {
        return Err(DecodeError::Empty);
    }
    match image::guess_format(bytes) {
        Ok(format @ ImageFormat::Jpeg) => Ok((format, "JPEG")),
        Ok(format @ ImageFormat::Png) => Ok((format, "PNG")),
        Ok(format @ ImageFormat::WebP) => Ok((format, "WebP")),
        Ok(format @ ImageFormat::Bmp) => Ok((format, "BMP")),
        Ok(format @ ImageFormat::Tiff) => Ok((format, "TIFF")),
        Ok(format @ ImageFormat::Pnm) => Ok((format, "PNM")),
        Ok(format @ ImageFormat::Gif) => Ok((format, "GIF")),
        _ => {
            let start: Vec<_> = bytes.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
            Err(DecodeError::UnknownFormat { start: start.join(" ") })
        }
    }
}

fn check_size(width: u32, height: u32, max_megapixels: f64) -> Result<(), DecodeError> {
    if f64::from(width) * f64::from(height) > max_megapixels * 1e6 {
        return Err(DecodeError::TooLarge { width, height, max_megapixels });
    }
    Ok(())
}

/// Everything but JPEG.
fn decode_other(
    bytes: &[u8],
    format: ImageFormat,
    name: &'static str,
    max_megapixels: f64,
) -> Result<(Picture, Orientation), DecodeError> {
    let refused = |error: ImageError| {
        let detail = error.to_string();
        match error {
            ImageError::IoError(io) if io.kind() == ErrorKind::UnexpectedEof => {
                DecodeError::Truncated { format: name, detail }
            }
            _ => DecodeError::Malformed { format: name, detail },
        }
    };
    let mut decoder = ImageReader::with_format(Cursor::new(bytes), format).into_decoder().map_err(refused)?;
    let (width, height) = decoder.dimensions();
    check_size(width, height, max_megapixels)?;
    let mut limits = Limits::default();
    limits.max_alloc = Some(ALLOCATION_BASE + u64::from(width) * u64::from(height) * ALLOCATION_PER_PIXEL);
    decoder.set_limits(limits).map_err(refused)?;
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let image = DynamicImage::from_decoder(decoder).map_err(refused)?;
    Ok((to_rgb(image), orientation))
}

/// Drops alpha, repeats gray, keeps the high byte of 16 bits.
fn to_rgb(image: DynamicImage) -> Picture {
    let (width, height) = (image.width() as usize, image.height() as usize);
    let gray = |samples: &mut dyn Iterator<Item = u8>| samples.flat_map(|value| [value; 3]).collect();
    let high = |sample: u16| (sample >> 8) as u8;
    let rgb = match image {
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
    Picture { height, width, rgb }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn odd_images() -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/odd-images")
    }

    /// The list that `pass-host` is held against, too.
    #[test]
    fn every_odd_image_behaves_as_expected() {
        let list = std::fs::read_to_string(odd_images().join("expectations.tsv")).expect("the list");
        let mut lines = list.lines().map(|line| line.split('\t').collect::<Vec<_>>());
        let header = lines.next().expect("a header");
        let column = |name| header.iter().position(|&found| found == name).expect("a column");
        let (path, expect, size) = (column("path"), column("expect"), column("dimensions"));
        let orientation = column("exif_orientation");
        let mut wrong = Vec::new();
        for line in lines {
            let (path, expect) = (line[path], line[expect]);
            let bytes = std::fs::read(odd_images().join(path)).expect("an image");
            let turned = ["5", "6", "7", "8"].contains(line.get(orientation).unwrap_or(&""));
            match (expect, decode(&bytes, 180.0)) {
                ("decodes" | "either", Ok(picture)) => {
                    assert_eq!(picture.rgb.len(), 3 * picture.width * picture.height, "{path}");
                    let (mut width, mut height) = (picture.width, picture.height);
                    if turned {
                        (width, height) = (height, width);
                    }
                    if line
                        .get(size)
                        .is_some_and(|size| size.contains('x') && *size != format!("{width}x{height}"))
                    {
                        wrong.push(format!("{path}: {width}x{height} instead of {}", line[size]));
                    }
                }
                ("must-refuse" | "either", Err(_)) => {}
                (_, result) => {
                    wrong.push(format!("{path}: {expect}, but {:?}", result.map(|p| (p.width, p.height))))
                }
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    #[test]
    fn damaged_bytes_are_refused_or_shown_never_a_panic() {
        for name in [
            "made/rgb8.png",
            "made/baseline-420.jpg",
            "made/progressive.jpg",
            "made/still.gif",
            "made/lossy.webp",
        ] {
            let bytes = std::fs::read(odd_images().join(name)).expect("an image");
            for step in 0..60 {
                let mut damaged = bytes.clone();
                let at = step * bytes.len() / 60;
                damaged[at] ^= 0xff;
                decode(&damaged, 10.0).ok();
                assert!(decode(&bytes[..at], 10.0).is_err(), "{name} cut at {at}");
            }
        }
    }

    #[test]
    fn the_limit_is_checked_before_decoding() {
        let bytes = std::fs::read(odd_images().join("made/rgb8.png")).expect("an image");
        assert_eq!(
            decode(&bytes, 0.09).expect_err("too large").to_string(),
            "291x320 pixels are more than the limit of 0.09 megapixels"
        );
        assert!(decode(&bytes, 0.0932).is_ok());
    }
}
