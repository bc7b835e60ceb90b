//! Masks as PNG files with a palette: the index of a pixel is its object.

use std::path::Path;

use png::EncodingError;

use super::super::index_png::{self, Gray, IndexImage, IndexPngError};

/// Label of pixels that no one knows; they are not scored.
pub const VOID: u8 = 255;

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
    /// [`IndexPngError`] for any other file.
    pub fn read(path: &Path) -> Result<Self, IndexPngError> {
        let IndexImage { width, height, indices } = index_png::read(path, Gray::Shades)?;
        Ok(Self { size: (height as usize, width as usize), labels: indices })
    }

    /// A whole PNG file with the palette of the published evaluations.
    ///
    /// # Errors
    /// [`EncodingError`] for an empty image.
    pub fn encode(&self) -> Result<Vec<u8>, EncodingError> {
        let palette: Vec<_> = (0..=u8::MAX).map(color).collect();
        let (height, width) = (self.size.0 as u32, self.size.1 as u32);
        index_png::encode(&IndexImage { width, height, indices: self.labels.clone() }, &palette)
    }

    /// The largest label that is not void; 0 if everything is background.
    pub fn largest(&self) -> u8 {
        self.labels.iter().copied().filter(|&label| label != VOID).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use png::{BitDepth, ColorType, Encoder};

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

    fn read(bytes: &[u8]) -> Result<LabelImage, IndexPngError> {
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
        let reason = |bytes: &[u8]| read(bytes).unwrap_err().reason.to_string();
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
