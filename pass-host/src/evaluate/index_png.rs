//! PNG files whose pixels are numbers of classes or objects: read and written without ever turning a palette into colors.

use std::fs::File;
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};

use png::{BitDepth, ColorType, Decoder, DecodingError, Encoder, EncodingError, Limits, Transformations};

/// A picture of numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexImage {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// `[height, width]`.
    pub indices: Vec<u8>,
}

/// What gray pixels mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gray {
    /// Numbers, as the indices of a palette are.
    Numbers,
    /// Shades: such a file is no picture of numbers.
    Shades,
}

/// Why a file is no picture of numbers.
#[derive(Debug, thiserror::Error)]
#[error("cannot use mask `{}`: {reason}", path.display())]
pub struct IndexPngError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong.
    pub reason: IndexPngReason,
}

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IndexPngReason {
    /// Not there, or not readable.
    #[error("it cannot be read: {0}")]
    Io(#[from] io::Error),
    /// No PNG, or a part of one.
    #[error("not a whole PNG file: {0}")]
    Png(#[from] DecodingError),
    /// Colors instead of numbers.
    #[error("expected {}, found {found}", match gray {
        Gray::Numbers => "pixels that are numbers (palette or gray)",
        Gray::Shades => "pixels that are indices into a palette",
    })]
    Colors {
        /// What gray would have meant.
        gray: Gray,
        /// What the pixels are.
        found: &'static str,
    },
    /// Pixels of two bytes.
    #[error("expected at most 8 bits a pixel, found 16")]
    Depth,
    /// More pixels than any picture has.
    #[error("{width}x{height} pixels are too many")]
    TooLarge {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
    },
}

impl IndexPngError {
    /// What to try.
    pub fn hint(&self) -> Option<String> {
        match &self.reason {
            IndexPngReason::Colors { gray: Gray::Shades, .. } => Some(
                "masks are PNG files with a palette, as DAVIS has them; gray or RGB files show colors, not objects"
                    .into(),
            ),
            IndexPngReason::Colors { .. } | IndexPngReason::Depth => Some(
                "a mask is a PNG of one channel, at most 8 bits: a palette picture, or gray values that are class numbers"
                    .into(),
            ),
            IndexPngReason::Png(_) => {
                Some("the file may be cut off or of another kind: write it again".into())
            }
            IndexPngReason::Io(_) | IndexPngReason::TooLarge { .. } => None,
        }
    }
}

/// Bytes a decoder may take: 16 384 x 16 384 pixels.
const MAX_BYTES: usize = 1 << 28;

/// Reads palette indices or gray values, 1 to 8 bits, as they are stored.
///
/// # Errors
/// [`IndexPngError`] for anything else: another format, colors, 16 bits, a file that ends early.
pub fn read(path: &Path, gray: Gray) -> Result<IndexImage, IndexPngError> {
    decode(path, gray).map_err(|reason| IndexPngError { path: path.into(), reason })
}

fn decode(path: &Path, gray: Gray) -> Result<IndexImage, IndexPngReason> {
    let file = BufReader::new(File::open(path)?);
    let mut decoder = Decoder::new_with_limits(file, Limits { bytes: MAX_BYTES });
    decoder.set_transformations(Transformations::IDENTITY);
    let mut reader = decoder.read_info()?;
    let (width, height) = (reader.info().width, reader.info().height);
    let found = match (reader.info().color_type, gray) {
        (ColorType::Indexed, _) | (ColorType::Grayscale, Gray::Numbers) => None,
        (ColorType::Grayscale, Gray::Shades) => Some("shades of gray"),
        (ColorType::GrayscaleAlpha, _) => Some("shades of gray with alpha"),
        (ColorType::Rgb, _) => Some("RGB colors"),
        (ColorType::Rgba, _) => Some("RGB colors with alpha"),
    };
    if let Some(found) = found {
        return Err(IndexPngReason::Colors { gray, found });
    }
    let bits = match reader.info().bit_depth {
        BitDepth::Sixteen => return Err(IndexPngReason::Depth),
        depth => depth as usize,
    };
    let size = reader.output_buffer_size().filter(|_| width as usize * height as usize <= MAX_BYTES);
    let mut packed = vec![0; size.ok_or(IndexPngReason::TooLarge { width, height })?];
    let line = reader.next_frame(&mut packed)?.line_size;
    // up to the end of the file: a part of it could be missing
    reader.finish()?;
    let indices = match bits {
        8 => packed,
        _ => {
            let lines = packed.chunks_exact(line);
            lines.flat_map(|line| (0..width as usize).map(move |x| index(line, x, bits))).collect()
        }
    };
    Ok(IndexImage { width, height, indices })
}

/// Index number `x` of a line with `bits` bits each, the high ones first.
fn index(line: &[u8], x: usize, bits: usize) -> u8 {
    let bit = x * bits;
    (line[bit / 8] >> (8 - bits - bit % 8)) & (0xff >> (8 - bits))
}

/// A whole PNG file with an 8-bit palette.
///
/// # Errors
/// [`EncodingError`] for an empty picture, and for a palette without or with more than 256 colors.
pub fn encode(image: &IndexImage, palette: &[[u8; 3]]) -> Result<Vec<u8>, EncodingError> {
    let mut bytes = Vec::new();
    let mut encoder = Encoder::new(&mut bytes, image.width, image.height);
    encoder.set_color(ColorType::Indexed);
    encoder.set_depth(BitDepth::Eight);
    encoder.set_palette(palette.as_flattened());
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&image.indices)?;
    writer.finish()?;
    Ok(bytes)
}

/// The colors of PASCAL VOC, also used by DAVIS: the bits of the index spread over the three channels.
pub fn voc_color(index: u8) -> [u8; 3] {
    let mut color = [0u8; 3];
    for (channel, value) in color.iter_mut().enumerate() {
        for level in 0..3 {
            let bit = 3 * level + channel;
            if bit < 8 && (index >> bit) & 1 == 1 {
                *value |= 128 >> level;
            }
        }
    }
    color
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn palette_indices_survive_writing_and_reading() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.png");
        let image = IndexImage { width: 3, height: 2, indices: vec![0, 1, 2, 7, 255, 11] };
        let palette: Vec<[u8; 3]> = (0..=255).map(voc_color).collect();
        std::fs::write(&path, encode(&image, &palette).unwrap()).unwrap();
        for gray in [Gray::Numbers, Gray::Shades] {
            assert_eq!(read(&path, gray).unwrap(), image);
        }
    }

    #[test]
    fn packed_pixels_are_taken_apart() {
        let dir = tempfile::tempdir().unwrap();
        for (depth, bits) in [(BitDepth::One, 1), (BitDepth::Two, 2), (BitDepth::Four, 4)] {
            for color in [ColorType::Indexed, ColorType::Grayscale] {
                let path = dir.path().join("packed.png");
                let mut encoder = Encoder::new(File::create(&path).unwrap(), 5, 2);
                encoder.set_color(color);
                encoder.set_depth(depth);
                if color == ColorType::Indexed {
                    encoder.set_palette(vec![0; 3 << bits]);
                }
                let indices: Vec<u8> = (0..10).map(|i| i % (1 << bits)).collect();
                let mut packed = vec![0u8; 2 * (5usize * bits).div_ceil(8)];
                for (i, index) in indices.iter().enumerate() {
                    let (row, x) = (i / 5, i % 5);
                    packed[row * (5 * bits).div_ceil(8) + x * bits / 8] |= index << (8 - bits - x * bits % 8);
                }
                encoder.write_header().unwrap().write_image_data(&packed).unwrap();
                assert_eq!(read(&path, Gray::Numbers).unwrap().indices, indices, "{color:?} {bits} bits");
            }
        }
    }

    #[test]
    fn what_is_no_index_picture_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mask.png");
        let reason = |gray| {
            let error = read(&path, gray).unwrap_err();
            assert!(error.to_string().contains("mask.png"), "{error}");
            error.reason.to_string()
        };
        assert!(reason(Gray::Numbers).contains("cannot be read"));
        std::fs::write(&path, b"GIF89a").unwrap();
        assert!(reason(Gray::Numbers).contains("not a whole PNG"));
        let store = |color, depth, data: &[u8]| {
            let mut encoder = Encoder::new(File::create(&path).unwrap(), 2, 2);
            encoder.set_color(color);
            encoder.set_depth(depth);
            encoder.write_header().unwrap().write_image_data(data).unwrap();
        };
        store(ColorType::Rgb, BitDepth::Eight, &[0; 12]);
        assert!(reason(Gray::Numbers).contains("RGB colors"));
        store(ColorType::Grayscale, BitDepth::Sixteen, &[0; 8]);
        assert!(reason(Gray::Numbers).contains("16"));
        store(ColorType::Grayscale, BitDepth::Eight, &[1, 2, 3, 4]);
        assert!(reason(Gray::Shades).contains("gray"));
        let whole = std::fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            assert!(reason(Gray::Numbers).contains("not a whole PNG"), "cut at {cut}");
        }
    }

    #[test]
    fn colors_are_those_of_voc() {
        assert_eq!(voc_color(0), [0, 0, 0]);
        assert_eq!(voc_color(1), [128, 0, 0]);
        assert_eq!(voc_color(6), [0, 128, 128]);
        assert_eq!(voc_color(15), [192, 128, 128]);
        assert_eq!(voc_color(20), [0, 64, 128]);
        assert_eq!(voc_color(255), [224, 224, 192]);
    }
}
