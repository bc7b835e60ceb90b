use std::path::Path;

use super::*;

fn odd(path: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/odd-images").join(path)).unwrap()
}

fn decode(path: &str) -> Rgb8Image {
    decode_rgb(&odd(path), 10.0).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Mean absolute difference in gray levels.
fn difference(a: &Rgb8Image, b: &Rgb8Image) -> f64 {
    assert_eq!((a.width, a.height), (b.width, b.height));
    let sum: u64 = a.data.iter().zip(&b.data).map(|(&a, &b)| u64::from(a.abs_diff(b))).sum();
    sum as f64 / a.data.len() as f64
}

fn encode(image: DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

#[test]
fn one_picture_in_many_formats_decodes_to_the_same_pixels() {
    let expected = decode("made/rgb8.png");
    for (path, tolerance) in [
        ("made/rgb.bmp", 0.0),
        ("made/rgb.tiff", 0.0),
        ("made/lzw.tiff", 0.0),
        ("made/lossless.webp", 0.0),
        ("made/rgba8-gradient.png", 0.0),
        ("made/baseline-444.jpg", 3.0),
        ("made/baseline-420.jpg", 4.0),
        ("made/progressive.jpg", 4.0),
        ("made/restart-markers.jpg", 4.0),
        ("made/cmyk-adobe.jpg", 4.0),
        ("made/lossy.webp", 4.0),
        ("made/palette64.png", 12.0),
        ("made/still.gif", 12.0),
    ] {
        let found = difference(&decode(path), &expected);
        assert!(found <= tolerance, "{path}: {found}");
    }
}

#[test]
fn alpha_is_dropped_and_of_16_bits_the_high_byte_is_kept() {
    let rgba = image::RgbaImage::from_raw(2, 1, vec![1, 2, 3, 0, 200, 100, 50, 128]).unwrap();
    let image = decode_rgb(&encode(rgba.into(), ImageFormat::Png), 1.0).unwrap();
    assert_eq!(image.data, [1, 2, 3, 200, 100, 50]);
    let gray = image::ImageBuffer::<image::Luma<u16>, _>::from_raw(2, 1, vec![0x12FF, 0xFF00]).unwrap();
    let image = decode_rgb(&encode(DynamicImage::ImageLuma16(gray), ImageFormat::Png), 1.0).unwrap();
    assert_eq!(image.data, [0x12, 0x12, 0x12, 0xFF, 0xFF, 0xFF]);
}

#[test]
fn the_size_limit_is_checked_before_decoding() {
    let bytes = odd("made/rgb8.png");
    let error = Encoded::open(&bytes, 0.09).unwrap_err();
    assert_eq!(
        error.to_string(),
        "291x320 pixels are more than the limit of 0.09 megapixels (`data.max_megapixels`)"
    );
    assert!(Encoded::open(&bytes, 0.0932).is_ok());
}

#[test]
fn every_exif_orientation_shows_the_same_upright_picture() {
    for kind in ["Landscape", "Portrait"] {
        let upright = decode(&format!("exif-orientation/{kind}_1.jpg"));
        for orientation in 2..=8 {
            let turned = decode(&format!("exif-orientation/{kind}_{orientation}.jpg"));
            let found = difference(&turned, &upright);
            assert!(found < 6.0, "{kind} {orientation}: {found}");
        }
    }
}

#[test]
fn reduced_jpegs_show_the_whole_picture_smaller() {
    for path in
        ["made/baseline-420.jpg", "made/baseline-444.jpg", "made/progressive.jpg", "made/grayscale.jpg"]
    {
        let bytes = odd(path);
        let layout = jpeg::Layout::read(&bytes).unwrap();
        let full = layout.decode(1).unwrap();
        for reduction in [2, 4, 8] {
            let reduced = layout.decode_reduced(reduction).unwrap();
            let found = difference(&reduced, &jpeg::shrink(&full, reduction));
            assert!(found < 2.5, "{path} at 1/{reduction}: {found}");
        }
    }
}

#[test]
fn jpegs_whose_components_have_scans_of_their_own_show_the_same_picture() {
    let expected = decode("made/rgb8.png");
    let size = (expected.width as u16, expected.height as u16);
    for sampling in [jpeg_encoder::SamplingFactor::R_4_2_0, jpeg_encoder::SamplingFactor::R_4_2_2] {
        let mut bytes = Vec::new();
        let mut encoder = jpeg_encoder::Encoder::new(&mut bytes, 95);
        encoder.set_sampling_factor(sampling);
        // this encoder then writes one scan a component
        encoder.set_optimized_huffman_tables(true);
        encoder.encode(&expected.data, size.0, size.1, jpeg_encoder::ColorType::Rgb).unwrap();
        assert_eq!(bytes.windows(2).filter(|pair| pair == &[0xFF, 0xDA]).count(), 3);
        let found = difference(&decode_rgb(&bytes, 1.0).unwrap(), &expected);
        assert!(found < 4.0, "{found}");
    }
}

#[test]
fn stray_bytes_between_jpeg_segments_are_skipped() {
    let mut bytes = odd("made/baseline-420.jpg");
    let expected = decode_rgb(&bytes, 1.0).unwrap();
    let second = 2 + 2 + usize::from(u16::from_be_bytes([bytes[4], bytes[5]]));
    bytes.splice(second..second, [0, 1, 2]);
    assert_eq!(decode_rgb(&bytes, 1.0).unwrap(), expected);
}
