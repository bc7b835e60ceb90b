//! A frame with its mask painted over it.

use png::{BitDepth, ColorType, Compression, Encoder, EncodingError};

use super::mask::Mask;
use crate::cli::decode::Picture;

/// A whole PNG file: objects half in their color, their outlines in full. `mask` is of the picture's size.
pub(super) fn encode(picture: &Picture, mask: &Mask) -> Result<Vec<u8>, EncodingError> {
    let (height, width) = mask.size;
    let mut rgb = picture.rgb.clone();
    for (at, pixel) in rgb.as_chunks_mut::<3>().0.iter_mut().enumerate() {
        let label = mask.labels[at];
        let (row, column) = (at / width, at % width);
        let outline = (column + 1 < width && mask.labels[at + 1] != label)
            || (row + 1 < height && mask.labels[at + width] != label);
        let color = mask.color(label);
        if label != 0 {
            let mix = |(pixel, color): (u8, u8)| {
                if outline { color } else { u8::midpoint(pixel, color) }
            };
            *pixel = std::array::from_fn(|channel| mix((pixel[channel], color[channel])));
        }
    }
    let mut bytes = Vec::new();
    let mut encoder = Encoder::new(&mut bytes, width as u32, height as u32);
    encoder.set_color(ColorType::Rgb);
    encoder.set_depth(BitDepth::Eight);
    encoder.set_compression(Compression::Fast);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&rgb)?;
    writer.finish()?;
    Ok(bytes)
}
