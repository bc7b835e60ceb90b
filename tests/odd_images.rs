//! Every odd image behaves as its list of expectations says, and no bytes make the decoder panic.
//!
//! The folder is `fixtures/odd-images`, or the one named by `PASS_ODD_IMAGES` (same format).

use std::path::{Path, PathBuf};

use pass_host::data::decode::{DecodeError, Encoded, Rgb8Image, decode_rgb};
use pass_host::random::{Purpose, Stream};

const MAX_MEGAPIXELS: f64 = 180.0;

fn folder() -> PathBuf {
    let bundled = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/odd-images");
    std::env::var_os("PASS_ODD_IMAGES").map_or_else(bundled, PathBuf::from)
}

/// One line of `expectations.tsv`.
struct Expectation {
    path: String,
    expect: String,
    /// Before the EXIF rotation.
    dimensions: Option<(u32, u32)>,
    orientation: u32,
}

fn expectations() -> Vec<Expectation> {
    let path = folder().join("expectations.tsv");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut lines = text.lines().map(|line| line.split('\t').collect::<Vec<_>>());
    let header = lines.next().expect("a header line");
    let column = |name: &str| {
        header.iter().position(|&found| found == name).unwrap_or_else(|| panic!("no column `{name}`"))
    };
    let (path, expect, dimensions, orientation) =
        (column("path"), column("expect"), column("dimensions"), column("exif_orientation"));
    let parse = |fields: Vec<&str>| Expectation {
        path: fields[path].to_owned(),
        expect: fields[expect].to_owned(),
        dimensions: fields
            .get(dimensions)
            .and_then(|size| size.split_once('x'))
            .map(|(width, height)| (width.parse().expect("width"), height.parse().expect("height"))),
        orientation: fields.get(orientation).and_then(|value| value.parse().ok()).unwrap_or(1),
    };
    lines.map(parse).collect()
}

fn read(path: &str) -> Vec<u8> {
    std::fs::read(folder().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn stored_size(image: &Rgb8Image, orientation: u32) -> (u32, u32) {
    if (5..=8).contains(&orientation) { (image.height, image.width) } else { (image.width, image.height) }
}

#[test]
fn every_odd_image_behaves_as_expected() {
    let mut wrong = Vec::new();
    let expectations = expectations();
    assert!(!expectations.is_empty());
    for Expectation { path, expect, dimensions, orientation } in &expectations {
        let result = decode_rgb(&read(path), MAX_MEGAPIXELS);
        if let Ok(image) = &result {
            assert_eq!(image.data.len(), 3 * image.width as usize * image.height as usize, "{path}");
        }
        let problem = match (expect.as_str(), result) {
            ("decodes" | "either", Ok(image)) => dimensions
                .filter(|&size| size != stored_size(&image, *orientation))
                .map(|size| format!("{size:?} expected, found {}x{}", image.width, image.height)),
            ("decodes", Err(error)) => Some(format!("must decode: {error}")),
            ("must-refuse", Ok(_)) => Some("must be refused".to_owned()),
            ("must-refuse" | "either", Err(_)) => None,
            (other, _) => Some(format!("unknown expectation `{other}`")),
        };
        wrong.extend(problem.map(|problem| format!("{path}: {problem}")));
    }
    assert!(wrong.is_empty(), "{} of {}:\n  {}", wrong.len(), expectations.len(), wrong.join("\n  "));
}

#[test]
fn cut_jpegs_are_refused_even_with_an_end_marker() {
    for Expectation { path, .. } in expectations().iter().filter(|e| e.path.contains("truncated-")) {
        if path.ends_with(".jpg") {
            assert!(decode_rgb(&read(path), MAX_MEGAPIXELS).is_err(), "{path}");
        }
    }
    for name in [
        "baseline-420",
        "baseline-444",
        "separate-scans-420",
        "grayscale",
        "restart-markers",
        "progressive",
        "cmyk-adobe",
    ] {
        let whole = read(&format!("made/{name}.jpg"));
        assert!(decode_rgb(&whole, MAX_MEGAPIXELS).is_ok(), "{name}");
        for percent in [10, 30, 50, 70, 90] {
            let mut cut = whole[..whole.len() * percent / 100].to_vec();
            assert!(decode_rgb(&cut, MAX_MEGAPIXELS).is_err(), "{name} cut at {percent} %");
            cut.extend([0xFF, 0xD9]);
            let result = decode_rgb(&cut, MAX_MEGAPIXELS);
            // the last scan of the progressive file begins at about 60 % and refines the last bit only
            if name != "progressive" || percent < 60 {
                assert!(result.is_err(), "{name} cut at {percent} % with an end marker");
            }
        }
    }
}

#[test]
fn components_of_their_own_scans_show_the_same_picture() {
    let decode = |name: &str| decode_rgb(&read(name), MAX_MEGAPIXELS).expect("a picture");
    let (one, several) = (decode("made/baseline-420.jpg"), decode("made/separate-scans-420.jpg"));
    let differences = one.data.iter().zip(&several.data).map(|(a, b)| f64::from(a.abs_diff(*b)));
    // two decoders, which round and smooth the halved colors differently
    let mean = differences.sum::<f64>() / one.data.len() as f64;
    assert!(mean < 1.0, "{mean}");
}

/// One sound file of every format and of every way to store pixels that differs in its decoder.
const SOUND: [&str; 18] = [
    "made/baseline-420.jpg",
    "made/separate-scans-420.jpg",
    "made/progressive.jpg",
    "made/restart-markers.jpg",
    "made/grayscale.jpg",
    "made/cmyk-adobe.jpg",
    "made/rgb8.png",
    "made/gray16.png",
    "made/palette64.png",
    "made/lossy.webp",
    "made/lossless.webp",
    "made/alpha.webp",
    "made/rgb.bmp",
    "made/rgb.tiff",
    "made/lzw.tiff",
    "made/still.gif",
    "libjpeg-turbo/testorig.ppm",
    "libjpeg-turbo/monkey16.pgm",
];

#[test]
fn a_file_cut_anywhere_is_refused() {
    for path in SOUND {
        let whole = read(path);
        for percent in [5, 20, 40, 60, 80, 95] {
            let cut = &whole[..whole.len() * percent / 100];
            assert!(decode_rgb(cut, MAX_MEGAPIXELS).is_err(), "{path} cut at {percent} %");
        }
    }
}

#[test]
fn changed_bytes_never_panic() {
    for (number, path) in SOUND.iter().enumerate() {
        let whole = read(path);
        for round in 0..40 {
            let mut stream = Stream::new(11, Purpose::Subset, &[number as u64, round]);
            let mut bytes = whole.clone();
            // headers are small: half of the changes aim at them
            let reach = if round % 2 == 0 { whole.len() } else { whole.len().min(700) } as u64;
            for _ in 0..=stream.below(8) {
                bytes[stream.below(reach) as usize] = stream.bits() as u8;
            }
            if stream.chance(0.3) {
                bytes.truncate(stream.below(whole.len() as u64) as usize);
            }
            if let Ok(image) = decode_rgb(&bytes, 4.0) {
                assert_eq!(image.data.len(), 3 * image.width as usize * image.height as usize, "{path}");
            }
            if let Ok(encoded) = Encoded::open(&bytes, 4.0)
                && encoded.can_reduce(2)
            {
                let (width, height) = encoded.upright_size();
                if let Ok(image) = encoded.decode(2) {
                    assert_eq!((image.width, image.height), (width.div_ceil(2), height.div_ceil(2)));
                }
            }
        }
    }
}

#[test]
fn reasons_name_what_is_wrong() {
    let reason = |path: &str| decode_rgb(&read(path), MAX_MEGAPIXELS).expect_err(path).to_string();
    assert!(matches!(decode_rgb(&[], 1.0), Err(DecodeError::Empty)));
    for (path, expected) in [
        ("made/empty.png", "empty"),
        ("made/html-error-page.jpg", "known format"),
        ("made/truncated-50pct.jpg", "truncated JPEG: no end marker"),
        ("made/truncated-50pct.png", "truncated PNG"),
        ("made/claims-60000x60000.png", "60000x60000 pixels are more than the limit of 180"),
        ("made/zero-width.png", "malformed or unsupported PNG"),
    ] {
        assert!(reason(path).contains(expected), "{path}: {}", reason(path));
    }
}
