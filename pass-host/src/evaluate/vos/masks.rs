//! Masks as PNG files with a palette: the index of a pixel is its object.

use std::fs::File;
use std::io::{self, BufReader};
use std::path::Path;

use png::{BitDepth, ColorType, Decoder, DecodingError, Encoder, EncodingError, Transformations};

use super::error::VosError;

/// Label of pixels that no one knows; they are not scored.
pub const VOID: u8 = 255;

/// Larger masks are refused before memory is taken, in pixels.
const MAX_PIXELS: u64 = 180_000_000;

/// Colors of the first objects; larger indices are gray.
const COLORS: [[u8; 3]; 22] = [
    [0, 0, 0],
    [128, 0, 0],
    [0, 128, 0],
    [128, 128, 0],
    [0, 0, 128],
    [128, 0, 128],
    [0, 128, 128],
    [128, 128, 128],
    [64, 0, 0],
    [191, 0, 0],
    [64, 128, 0],
    [191, 128, 0],
    [64, 0, 128],
    [191, 0, 128],
    [64, 128, 128],
    [191, 128, 128],
    [0, 64, 0],
    [128, 64, 0],
    [0, 191, 0],
    [128, 191, 0],
    [0, 64, 128],
    [128, 64, 128],
];

/// Color of an index in the palette of the published evaluations (SEMANTICS §6).
pub fn color(index: u8) -> [u8; 3] {
    COLORS.get(usize::from(index)).copied().unwrap_or([index; 3])
}

/// Why a file is no mask.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MaskError {
    /// Not there, or not readable.
    #[error("it cannot be read: {0}")]
    Io(#[from] io::Error),
    /// No PNG, or a part of one.
    #[error("not a whole PNG file: {0}")]
    Png(#[from] DecodingError),
    /// Colors instead of indices.
    #[error("expected pixels that are indices into a palette, found {found}")]
    NotIndexed {
        /// What the pixels are.
        found: &'static str,
    },
    /// More pixels than any frame has.
    #[error("{width}x{height} pixels are more than a frame can have")]
    TooLarge {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
    },
    /// Pixels that cannot be written.
    #[error("it cannot be encoded: {0}")]
    Encoding(#[from] EncodingError),
}

impl MaskError {
    /// What the reader can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotIndexed { .. } => Some(
                "masks are PNG files with a palette, as DAVIS has them; gray or RGB files show colors, not objects"
                    .into(),
            ),
            Self::Png(_) => Some("the file may be cut off or of another kind: write it again".into()),
            Self::Io(_) | Self::TooLarge { .. } | Self::Encoding(_) => None,
        }
    }
}

/// An object index for every pixel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelImage {
    /// Height and width.
    pub size: (usize, usize),
    /// `[height, width]`, row-major.
    pub labels: Vec<u8>,
}

impl LabelImage {
    /// Reads a PNG file with a palette.
    ///
    /// # Errors
    /// [`VosError::Mask`], with the reason.
    pub fn read(path: &Path) -> Result<Self, VosError> {
        Self::decode(path).map_err(|source| VosError::Mask { path: path.to_owned(), source })
    }

    fn decode(path: &Path) -> Result<Self, MaskError> {
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
        let (width, height) = (info.width, info.height);
        if u64::from(width) * u64::from(height) > MAX_PIXELS {
            return Err(MaskError::TooLarge { width, height });
        }
        let bits = match info.bit_depth {
            BitDepth::One => 1,
            BitDepth::Two => 2,
            BitDepth::Four => 4,
            BitDepth::Eight | BitDepth::Sixteen => 8,
        };
        let size = (height as usize, width as usize);
        let row_len = (size.1 * bits).div_ceil(8);
        let mut packed = vec![0; size.0 * row_len];
        reader.next_frame(&mut packed)?;
        // up to the end of the file: a part of it could be missing
        reader.finish()?;
        if bits == 8 {
            return Ok(Self { size, labels: packed });
        }
        let mut labels = Vec::with_capacity(size.0 * size.1);
        for row in packed.chunks_exact(row_len) {
            labels.extend((0..size.1).map(|column| index(row, column, bits)));
        }
        Ok(Self { size, labels })
    }

    /// A whole PNG file with the palette of the published evaluations.
    ///
    /// # Errors
    /// [`MaskError::Encoding`] for an empty image.
    pub fn encode(&self) -> Result<Vec<u8>, MaskError> {
        let palette: Vec<u8> = (0..=u8::MAX).flat_map(color).collect();
        let mut bytes = Vec::new();
        let mut encoder = Encoder::new(&mut bytes, self.size.1 as u32, self.size.0 as u32);
        encoder.set_color(ColorType::Indexed);
        encoder.set_depth(BitDepth::Eight);
        encoder.set_palette(palette);
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&self.labels)?;
        writer.finish()?;
        Ok(bytes)
    }

    /// The largest label that is not void; 0 if everything is background.
    pub fn largest(&self) -> u8 {
        self.labels.iter().copied().filter(|&label| label != VOID).max().unwrap_or(0)
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
        let mut writer = encoder.write_header().unwrap();
        writer.write_image_data(data).unwrap();
        writer.finish().unwrap();
        bytes
    }

    fn read(bytes: &[u8]) -> Result<LabelImage, VosError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        LabelImage::read(file.path())
    }

    #[test]
    fn indices_survive_at_every_depth() {
        let labels = vec![0, 1, 0, 0, 1, 1, 0, 1, 1, 0];
        for (depth, data) in [
            (BitDepth::One, vec![0b0100_1000, 0b1011_0000]),
            (BitDepth::Two, vec![0b0001_0000, 0b0100_0000, 0b0100_0101, 0b0000_0000]),
            (BitDepth::Four, vec![0x01, 0x00, 0x10, 0x10, 0x11, 0x00]),
            (BitDepth::Eight, labels.clone()),
        ] {
            let mask = read(&file(ColorType::Indexed, depth, (2, 5), &data)).unwrap();
            assert_eq!(mask, LabelImage { size: (2, 5), labels: labels.clone() }, "{depth:?}");
            assert_eq!(read(&mask.encode().unwrap()).unwrap(), mask);
        }
    }

    #[test]
    fn files_without_palette_and_parts_of_files_are_refused_by_name() {
        let whole = file(ColorType::Indexed, BitDepth::Eight, (1, 2), &[0, 1]);
        let reason = |bytes: &[u8]| {
            let VosError::Mask { source, .. } = read(bytes).unwrap_err() else { panic!("a mask error") };
            source.to_string()
        };
        assert!(reason(&file(ColorType::Grayscale, BitDepth::Eight, (1, 2), &[0, 255])).contains("gray"));
        assert!(reason(&file(ColorType::Rgb, BitDepth::Eight, (1, 1), &[0, 1, 2])).contains("RGB colors"));
        assert!(reason(b"GIF89a").contains("not a whole PNG"));
        for end in 0..whole.len() {
            assert!(reason(&whole[..end]).contains("not a whole PNG"), "cut at {end}");
        }
        let error = LabelImage::read(Path::new("nowhere/00000.png")).unwrap_err().to_string();
        assert!(error.contains("nowhere/00000.png"), "{error}");
    }

    #[test]
    fn colors_are_those_of_the_published_palette() {
        assert_eq!(
            [0, 1, 9, 21, 22, 255].map(color),
            [[0, 0, 0], [128, 0, 0], [191, 0, 0], [128, 64, 128], [22; 3], [255; 3]]
        );
        let mask = LabelImage { size: (1, 3), labels: vec![0, 255, 2] };
        assert_eq!(mask.largest(), 2);
    }
}
