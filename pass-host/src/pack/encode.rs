//! The bytes of an image file -> those that go into a shard.

use jpeg_encoder::{ColorType, Encoder, SamplingFactor};

use super::{PackFormat, PackSettings};
use crate::data::augment::{CropBox, Planes, Resampler, covering};
use crate::data::decode::{Rgb8Image, decode_rgb};
use crate::data::shard::{NewImage, Stored};

/// Decodes an image file, so that a bad one is found, and stores it as the settings want.
///
/// # Errors
/// The reason why the image cannot be used.
pub(super) fn encode(bytes: &[u8], settings: &PackSettings) -> Result<NewImage, String> {
    let image = decode_rgb(bytes, settings.max_megapixels).map_err(|error| error.to_string())?;
    let image = match settings.size {
        Some(size) => shrink(image, size as usize),
        None => image,
    };
    let (bytes, stored) = match settings.format {
        PackFormat::Original => (bytes.to_vec(), Stored::Original),
        PackFormat::Jpeg => (to_jpeg(&image, settings.quality)?, Stored::Jpeg),
        PackFormat::Raw => (to_ppm(&image), Stored::Raw),
    };
    Ok(NewImage { bytes, width: image.width, height: image.height, stored })
}

/// The image with a shorter side of `size` pixels (antialiased bicubic); one that is smaller stays as it is.
fn shrink(image: Rgb8Image, size: usize) -> Rgb8Image {
    if image.width.min(image.height) as usize <= size {
        return image;
    }
    let (width, height) = covering(&image, (size, size));
    let whole = CropBox { left: 0, top: 0, width: image.width, height: image.height };
    let mut planes = Planes::default();
    Resampler::default().crop_resize(&image, whole, 1, width, height, &mut planes);
    Rgb8Image { width: width as u32, height: height as u32, data: planes.to_interleaved() }
}

/// Baseline JPEG with halved chroma (4:2:0), as most photos are.
fn to_jpeg(image: &Rgb8Image, quality: u8) -> Result<Vec<u8>, String> {
    let Rgb8Image { width, height, data } = image;
    let side = |side: u32| {
        let limit = u16::MAX;
        u16::try_from(side)
            .map_err(|_| format!("{width}x{height} pixels are more than a JPEG may have ({limit} a side)"))
    };
    let mut bytes = Vec::new();
    let mut encoder = Encoder::new(&mut bytes, quality);
    encoder.set_sampling_factor(SamplingFactor::R_4_2_0);
    encoder
        .encode(data, side(*width)?, side(*height)?, ColorType::Rgb)
        .map_err(|error| format!("cannot be encoded as JPEG: {error}"))?;
    Ok(bytes)
}

fn to_ppm(image: &Rgb8Image) -> Vec<u8> {
    let mut bytes = format!("P6\n{} {}\n255\n", image.width, image.height).into_bytes();
    bytes.extend_from_slice(&image.data);
    bytes
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::Arc;

    use super::*;

    fn settings(format: PackFormat, size: Option<u32>) -> PackSettings {
        PackSettings {
            images: Vec::new(),
            limit: 0,
            out: PathBuf::new(),
            format,
            size,
            quality: 90,
            max_megapixels: 10.0,
            interrupted: Arc::default(),
        }
    }

    /// A photo of the fixtures, its bytes and pixels.
    fn photo() -> (Vec<u8>, Rgb8Image) {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/odd-images/made/baseline-444.jpg");
        let bytes = std::fs::read(path).unwrap();
        let image = decode_rgb(&bytes, 10.0).unwrap();
        (bytes, image)
    }

    fn difference(a: &Rgb8Image, b: &Rgb8Image) -> f64 {
        assert_eq!((a.width, a.height), (b.width, b.height));
        let sum: u64 = a.data.iter().zip(&b.data).map(|(&a, &b)| u64::from(a.abs_diff(b))).sum();
        sum as f64 / a.data.len() as f64
    }

    #[test]
    fn originals_keep_their_bytes_and_raw_images_their_pixels() {
        let (bytes, image) = photo();
        let original = encode(&bytes, &settings(PackFormat::Original, None)).unwrap();
        assert_eq!((&original.bytes, original.width, original.height), (&bytes, image.width, image.height));
        let raw = encode(&bytes, &settings(PackFormat::Raw, None)).unwrap();
        assert_eq!(decode_rgb(&raw.bytes, 10.0).unwrap(), image);
    }

    #[test]
    fn jpegs_look_like_their_source() {
        let (bytes, image) = photo();
        let jpeg = encode(&bytes, &settings(PackFormat::Jpeg, None)).unwrap();
        let found = difference(&decode_rgb(&jpeg.bytes, 10.0).unwrap(), &image);
        assert!(found < 4.0, "mean difference {found}");
        let coarse = PackSettings { quality: 20, ..settings(PackFormat::Jpeg, None) };
        assert!(encode(&bytes, &coarse).unwrap().bytes.len() < jpeg.bytes.len() / 2);
    }

    #[test]
    fn the_shorter_side_is_as_asked_and_never_enlarged() {
        let (bytes, image) = photo();
        assert_eq!((image.width, image.height), (291, 320));
        for (size, expected) in [(96, (96, 105)), (291, (291, 320)), (400, (291, 320))] {
            for format in [PackFormat::Raw, PackFormat::Jpeg] {
                let packed = encode(&bytes, &settings(format, Some(size))).unwrap();
                let decoded = decode_rgb(&packed.bytes, 10.0).unwrap();
                assert_eq!((packed.width, packed.height), expected);
                assert_eq!((decoded.width, decoded.height), expected);
            }
        }
        let small = shrink(image, 96);
        let raw = encode(&bytes, &settings(PackFormat::Raw, Some(96))).unwrap();
        assert_eq!(decode_rgb(&raw.bytes, 10.0).unwrap(), small, "the resampler of the crops");
    }

    #[test]
    fn a_bad_image_is_refused_with_the_reason_of_the_decoder() {
        let (bytes, _) = photo();
        for format in [PackFormat::Original, PackFormat::Jpeg, PackFormat::Raw] {
            let reason = encode(&bytes[..bytes.len() / 2], &settings(format, None)).unwrap_err();
            assert!(reason.contains("truncated JPEG"), "{reason}");
        }
        let wide = Rgb8Image { width: 70_000, height: 1, data: vec![0; 210_000] };
        assert!(to_jpeg(&wide, 90).unwrap_err().contains("70000x1 pixels"));
    }
}
