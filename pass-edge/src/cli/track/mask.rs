//! Masks as PNG files with a palette: the index of a pixel is its object.

use std::fs::File;
use std::io::{self, BufReader};
use std::path::Path;

use png::{BitDepth, ColorType, Decoder, DecodingError, Encoder, EncodingError, Transformations};

/// Why a file is not the mask of a frame.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MaskError {
    #[error("input/output error: {0}")]
    Io(#[from] io::Error),
    #[error("not a whole PNG file: {0}")]
    Png(#[from] DecodingError),
    #[error("expected pixels that are indices into a palette, found {found}")]
    NotIndexed { found: &'static str },
    #[error("{actual_width}x{actual_height} pixels, but the first frame has {width}x{height}")]
    Size { width: usize, height: usize, actual_width: u32, actual_height: u32 },
    #[error("pixel index {index} has no color: the palette holds {colors}")]
    NoColor { index: u8, colors: usize },
    #[error("every pixel is background (index 0): there is nothing to follow")]
    NoObject,
}

/// A label image with the colors it is shown in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mask {
    /// Height, width.
    pub(super) size: (usize, usize),
    /// `[height, width]`.
    pub(super) labels: Vec<u8>,
    /// 3 bytes an index: red, green, blue.
    palette: Vec<u8>,
    /// A byte an index, of the first ones.
    alpha: Option<Vec<u8>>,
}

impl Mask {
    /// Reads the mask of a frame of `size = (height, width)` with at least one object.
    pub(super) fn read(path: &Path, size: (usize, usize)) -> Result<Self, MaskError> {
        let mut decoder = Decoder::new(BufReader::new(File::open(path)?));
        decoder.set_transformations(Transformations::IDENTITY);
        let mut reader = decoder.read_info()?;
        let info = reader.info();
        let found = match info.color_type {
            ColorType::Indexed => None,
            ColorType::Grayscale => Some("shades of gray"),
            ColorType::GrayscaleAlpha => Some("shades of gray with alpha"),
            ColorType::Rgb => Some("RGB colors"),
            ColorType::Rgba => Some("RGB colors with alpha"),
        };
        if let Some(found) = found {
            return Err(MaskError::NotIndexed { found });
        }
        // checked before memory for the pixels is taken
        if (info.height as usize, info.width as usize) != size {
            return Err(MaskError::Size {
                width: size.1,
                height: size.0,
                actual_width: info.width,
                actual_height: info.height,
            });
        }
        let palette = info.palette.as_deref().unwrap_or_default().to_vec();
        let alpha = info.trns.as_deref().map(<[u8]>::to_vec);
        let bits = match info.bit_depth {
            BitDepth::One => 1,
            BitDepth::Two => 2,
            BitDepth::Four => 4,
            BitDepth::Eight | BitDepth::Sixteen => 8,
        };
        let row_len = (size.1 * bits).div_ceil(8);
        let mut packed = vec![0; size.0 * row_len];
        reader.next_frame(&mut packed)?;
        // up to the end of the file: a part of it could be missing
        reader.finish()?;

        let row = |row: &[u8]| (0..size.1).map(|column| index(row, column, bits)).collect::<Vec<u8>>();
        let labels: Vec<u8> = packed.chunks_exact(row_len).flat_map(row).collect();
        let colors = palette.len() / 3;
        match labels.iter().max() {
            Some(&index) if usize::from(index) >= colors => Err(MaskError::NoColor { index, colors }),
            None | Some(0) => Err(MaskError::NoObject),
            Some(_) => Ok(Self { size, labels, palette, alpha }),
        }
    }

    /// A whole PNG file.
    pub(super) fn encode(&self) -> Result<Vec<u8>, EncodingError> {
        let mut bytes = Vec::new();
        let mut encoder = Encoder::new(&mut bytes, self.size.1 as u32, self.size.0 as u32);
        encoder.set_color(ColorType::Indexed);
        encoder.set_depth(BitDepth::Eight);
        encoder.set_palette(&self.palette);
        if let Some(alpha) = &self.alpha {
            encoder.set_trns(alpha);
        }
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&self.labels)?;
        writer.finish()?;
        Ok(bytes)
    }

    /// The indices that occur, ascending; 0 always.
    pub(super) fn indices(&self) -> Vec<u8> {
        let mut occurs = [false; 256];
        occurs[0] = true;
        self.labels.iter().for_each(|&label| occurs[usize::from(label)] = true);
        (0..=u8::MAX).filter(|&index| occurs[usize::from(index)]).collect()
    }

    /// Color of an index.
    pub(super) fn color(&self, index: u8) -> [u8; 3] {
        self.palette.as_chunks::<3>().0.get(usize::from(index)).copied().unwrap_or_default()
    }
}

/// Index number `column` of a row with `bits` bits each, the high ones first.
fn index(row: &[u8], column: usize, bits: usize) -> u8 {
    let bit = column * bits;
    let shift = 8 - bits - bit % 8;
    (row[bit / 8] >> shift) & (0xff >> (8 - bits))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(color: ColorType, depth: BitDepth, (height, width): (u32, u32), data: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut encoder = Encoder::new(&mut bytes, width, height);
        encoder.set_color(color);
        encoder.set_depth(depth);
        if color == ColorType::Indexed {
            encoder.set_palette(&[0, 0, 0, 128, 0, 0, 0, 128, 0][..]);
        }
        let mut writer = encoder.write_header().expect("a header");
        writer.write_image_data(data).expect("pixels");
        writer.finish().expect("an end");
        bytes
    }

    fn read(bytes: &[u8], size: (usize, usize)) -> Result<Mask, MaskError> {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), bytes).expect("written");
        Mask::read(file.path(), size)
    }

    #[test]
    fn indices_and_palette_survive_at_every_depth() {
        let expected = [0, 1, 0, 0, 1, 1, 0, 1, 1, 0];
        for (depth, data) in [
            (BitDepth::One, vec![0b0100_1000, 0b1011_0000]),
            (BitDepth::Two, vec![0b0001_0000, 0b0100_0000, 0b0100_0101, 0b0000_0000]),
            (BitDepth::Four, vec![0x01, 0x00, 0x10, 0x10, 0x11, 0x00]),
            (BitDepth::Eight, expected.to_vec()),
        ] {
            let mask = read(&file(ColorType::Indexed, depth, (2, 5), &data), (2, 5)).expect("a mask");
            assert_eq!(mask.labels, expected, "{depth:?}");
            assert_eq!((mask.color(1), mask.color(9), mask.indices()), ([128, 0, 0], [0; 3], vec![0, 1]));
            let again = read(&mask.encode().expect("a file"), (2, 5)).expect("a mask");
            assert_eq!(again, mask);
        }
    }

    #[test]
    fn anything_else_is_refused_with_its_reason() {
        let indexed = |data: &[u8]| file(ColorType::Indexed, BitDepth::Eight, (1, 2), data);
        let gray = file(ColorType::Grayscale, BitDepth::Eight, (1, 2), &[0, 255]);
        let whole = indexed(&[0, 1]);
        for (bytes, size, reason) in [
            (gray, (1, 2), "shades of gray"),
            (whole.clone(), (2, 1), "2x1 pixels, but the first frame has 1x2"),
            (indexed(&[0, 3]), (1, 2), "pixel index 3 has no color: the palette holds 3"),
            (indexed(&[0, 0]), (1, 2), "nothing to follow"),
            (b"GIF89a".to_vec(), (1, 2), "not a whole PNG file"),
            (Vec::new(), (1, 2), "not a whole PNG file"),
        ] {
            let error = read(&bytes, size).expect_err(reason).to_string();
            assert!(error.contains(reason), "{error}");
        }
        for end in 0..whole.len() {
            assert!(read(&whole[..end], (1, 2)).is_err(), "cut at {end}");
        }
    }
}
