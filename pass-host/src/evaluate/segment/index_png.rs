//! PNG files whose pixels are class numbers: read and written without ever turning a palette into colors.

use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::path::{Path, PathBuf};

use png::{BitDepth, ColorType, Decoder, Encoder, Limits, Transformations};

/// A picture of class numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexImage {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// `[height, width]`.
    pub indices: Vec<u8>,
}

/// Why a file is no picture of class numbers.
#[derive(Debug, thiserror::Error)]
#[error("mask `{}`: {reason}", path.display())]
pub struct IndexPngError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong.
    pub reason: String,
}

impl IndexPngError {
    /// What to try.
    pub fn hint(&self) -> String {
        "a mask is a complete PNG of one channel, at most 8 bits: a palette picture, or gray values that are class numbers"
            .into()
    }
}

/// Bytes a decoder may take: 16 384 x 16 384 pixels.
const MAX_BYTES: usize = 1 << 28;

/// Reads palette indices or gray values, 1 to 8 bits, as they are stored.
///
/// # Errors
/// [`IndexPngError`] for anything else: another format, colors, 16 bits, a file that ends early.
pub fn read(path: &Path) -> Result<IndexImage, IndexPngError> {
    let fail = |reason: String| IndexPngError { path: path.into(), reason };
    let file = File::open(path).map_err(|error| fail(format!("cannot be read: {error}")))?;
    let mut decoder = Decoder::new_with_limits(BufReader::new(file), Limits { bytes: MAX_BYTES });
    decoder.set_transformations(Transformations::IDENTITY);
    let undecodable = |error: png::DecodingError| fail(format!("cannot be decoded: {error}"));
    let mut reader = decoder.read_info().map_err(undecodable)?;
    let (width, height) = (reader.info().width, reader.info().height);
    let (color, depth) = (reader.info().color_type, reader.info().bit_depth);
    if !matches!(color, ColorType::Indexed | ColorType::Grayscale) {
        return Err(fail(format!("expected class numbers (palette or gray), found a {color:?} picture")));
    }
    if depth == BitDepth::Sixteen {
        return Err(fail("expected at most 8 bits a pixel, found 16".into()));
    }
    if width as usize * height as usize > MAX_BYTES {
        return Err(fail(format!("{width}x{height} pixels are too many")));
    }
    let size = reader.output_buffer_size().ok_or_else(|| fail("is too large".into()))?;
    let mut packed = vec![0; size];
    let frame = reader.next_frame(&mut packed).map_err(undecodable)?;
    reader.finish().map_err(undecodable)?;
    let packed = &packed[..frame.buffer_size()];
    let bits = depth as usize;
    let indices = if bits == 8 {
        packed.to_vec()
    } else {
        let mask = (1u8 << bits) - 1;
        let pixel = |row: &[u8], x: usize| (row[x * bits / 8] >> (8 - bits - x * bits % 8)) & mask;
        packed
            .chunks_exact(frame.line_size)
            .flat_map(|row| (0..width as usize).map(move |x| pixel(row, x)))
            .collect()
    };
    match indices.len() == width as usize * height as usize {
        true => Ok(IndexImage { width, height, indices }),
        false => Err(fail("ends early".into())),
    }
}

/// Writes an 8-bit palette picture.
///
/// # Errors
/// What the file system refuses, or a palette without or with more than 256 colors.
pub fn write(path: &Path, image: &IndexImage, palette: &[[u8; 3]]) -> std::io::Result<()> {
    let mut encoder = Encoder::new(BufWriter::new(File::create(path)?), image.width, image.height);
    encoder.set_color(ColorType::Indexed);
    encoder.set_depth(BitDepth::Eight);
    encoder.set_palette(palette.as_flattened());
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&image.indices)?;
    Ok(writer.finish()?)
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
        write(&path, &image, &palette).unwrap();
        assert_eq!(read(&path).unwrap(), image);
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
                assert_eq!(read(&path).unwrap().indices, indices, "{color:?} {bits} bits");
            }
        }
    }

    #[test]
    fn what_is_no_index_picture_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mask.png");
        let reason = || {
            let error = read(&path).unwrap_err();
            assert!(error.to_string().contains("mask.png"), "{error}");
            error.reason
        };
        assert!(reason().contains("cannot be read"));
        std::fs::write(&path, b"GIF89a").unwrap();
        assert!(reason().contains("cannot be decoded"));
        let encode = |color, depth, data: &[u8]| {
            let mut encoder = Encoder::new(File::create(&path).unwrap(), 2, 2);
            encoder.set_color(color);
            encoder.set_depth(depth);
            encoder.write_header().unwrap().write_image_data(data).unwrap();
        };
        encode(ColorType::Rgb, BitDepth::Eight, &[0; 12]);
        assert!(reason().contains("Rgb"));
        encode(ColorType::Grayscale, BitDepth::Sixteen, &[0; 8]);
        assert!(reason().contains("16"));
        encode(ColorType::Grayscale, BitDepth::Eight, &[1, 2, 3, 4]);
        let whole = std::fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            reason();
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
