//! Images with masks of class numbers: `images/{train,val}/NAME.*` beside `labels/{train,val}/NAME.png`.

use std::fs::{self, File};
use std::io::BufReader;
use std::path::{Path, PathBuf};

use png::{BitDepth, ColorType, Decoder, Limits, Transformations};
use serde::Deserialize;

use super::super::EvaluateError;
use super::super::image_features::load;
use crate::data::{Rgb8Image, is_image_name};

/// The label of pixels that do not count, as [`Dataset::load`] gives it.
pub const IGNORED: u8 = 255;
/// The two files that name the classes; the first that is there counts.
const DESCRIPTIONS: [&str; 2] = ["dataset.json", "classes.txt"];
/// Bytes a decoder of masks may take: 16 384 x 16 384 pixels.
const MAX_BYTES: usize = 1 << 28;

/// An image and its mask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The image file.
    pub image: PathBuf,
    /// The mask file.
    pub mask: PathBuf,
}

/// A data set for scene parsing.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// The folder.
    pub path: PathBuf,
    /// Names of the classes.
    pub classes: Vec<String>,
    /// The label, in the files, of pixels that do not count.
    pub ignore: u8,
    /// Pictures to learn from, by name.
    pub train: Vec<Sample>,
    /// Pictures to judge with, by name.
    pub val: Vec<Sample>,
}

/// A decoded image and its labels.
#[derive(Clone, Debug)]
pub struct Picture {
    /// The image.
    pub image: Rgb8Image,
    /// `[height, width]`: classes from 0, or [`IGNORED`].
    pub labels: Vec<u8>,
}

/// What `dataset.json` says; other keys are for others.
#[derive(Deserialize)]
struct Description {
    classes: Vec<String>,
    ignore_index: Option<u8>,
}

impl Dataset {
    /// Lists the pictures of `dir`. The classes stand in `dataset.json` (`classes`, `ignore_index`) or in `classes.txt`
    /// (`NUMBER NAME` a line). `ignore` wins over the file; without either it is [`IGNORED`].
    ///
    /// # Errors
    /// [`EvaluateError`] for missing folders, images without mask, and classes that make no sense.
    pub fn open(dir: &Path, ignore: Option<u8>) -> Result<Self, EvaluateError> {
        if !dir.is_dir() {
            return Err(EvaluateError::NotAFolder {
                path: dir.into(),
                expected: "a folder of images and labels",
            });
        }
        let Description { mut classes, ignore_index } = describe(dir)?;
        let ignore = ignore.or(ignore_index).unwrap_or(IGNORED);
        // lists often name the label that does not count after the classes
        if classes.len() == usize::from(ignore) + 1 {
            classes.pop();
        }
        if !(2..=usize::from(IGNORED)).contains(&classes.len()) {
            let reason = format!("expected 2 to {IGNORED} classes, found {}", classes.len());
            return Err(EvaluateError::Classes { path: dir.into(), reason });
        }
        let [train, val] = ["train", "val"]
            .map(|split| samples(&dir.join("images").join(split), &dir.join("labels").join(split)));
        Ok(Self { path: dir.into(), classes, ignore, train: train?, val: val? })
    }

    /// At most `images` pictures of each split, evenly spaced.
    #[must_use]
    pub fn limited(mut self, images: usize) -> Self {
        for list in [&mut self.train, &mut self.val] {
            let kept = list.len().min(images);
            *list = (0..kept).map(|i| list[i * list.len() / kept].clone()).collect();
        }
        self
    }

    /// Decodes an image and its mask.
    ///
    /// # Errors
    /// [`EvaluateError`] naming the file: unreadable, sizes that differ, a label that is no class.
    pub fn load(&self, sample: &Sample) -> Result<Picture, EvaluateError> {
        let image = load(&sample.image)
            .map_err(|reason| EvaluateError::Image { path: sample.image.clone(), reason })?;
        let (width, height, mut labels) = read_mask(&sample.mask)?;
        if (width, height) != (image.width, image.height) {
            return Err(EvaluateError::MaskSize {
                path: sample.mask.clone(),
                image: (image.width, image.height),
                mask: (width, height),
            });
        }
        for label in &mut labels {
            if *label == self.ignore {
                *label = IGNORED;
            } else if usize::from(*label) >= self.classes.len() {
                return Err(EvaluateError::Label {
                    path: sample.mask.clone(),
                    classes: self.classes.len(),
                    ignore: self.ignore,
                    label: *label,
                });
            }
        }
        Ok(Picture { image, labels })
    }
}

/// The classes of a folder.
fn describe(dir: &Path) -> Result<Description, EvaluateError> {
    let Some(path) = DESCRIPTIONS.iter().map(|name| dir.join(name)).find(|path| path.is_file()) else {
        let reason = format!("expected `{}` or `{}`, found neither", DESCRIPTIONS[0], DESCRIPTIONS[1]);
        return Err(EvaluateError::Classes { path: dir.into(), reason });
    };
    let text =
        fs::read_to_string(&path).map_err(|source| EvaluateError::Read { path: path.clone(), source })?;
    let wrong = |reason: String| EvaluateError::Classes { path: path.clone(), reason };
    if path.ends_with(DESCRIPTIONS[0]) {
        return serde_json::from_str(&text).map_err(|error| wrong(error.to_string()));
    }
    let mut classes = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        match line.trim().split_once(char::is_whitespace) {
            Some((index, name)) if index.parse() == Ok(classes.len()) => classes.push(name.trim().to_owned()),
            _ => {
                let expected = classes.len();
                return Err(wrong(format!(
                    "line {}: expected `{expected} NAME`, found `{line}`",
                    number + 1
                )));
            }
        }
    }
    let ignored =
        |name: &str| ["unlabelled", "unlabeled", "void", "ignore"].contains(&name.to_lowercase().as_str());
    let ignore_index = classes.iter().position(|name: &String| ignored(name)).map(|index| index as u8);
    Ok(Description { classes, ignore_index })
}

fn samples(images: &Path, labels: &Path) -> Result<Vec<Sample>, EvaluateError> {
    for path in [images, labels] {
        if !path.is_dir() {
            return Err(EvaluateError::NotAFolder { path: path.into(), expected: "a folder" });
        }
    }
    let read = |source| EvaluateError::Read { path: images.into(), source };
    let mut found = Vec::new();
    for entry in fs::read_dir(images).map_err(read)? {
        let entry = entry.map_err(read)?;
        if is_image_name(entry.file_name().as_encoded_bytes()) && !entry.path().is_dir() {
            let image = entry.path();
            let mask = labels.join(image.with_extension("png").file_name().unwrap_or_default());
            if !mask.is_file() {
                return Err(EvaluateError::NoMask { image, mask });
            }
            found.push(Sample { image, mask });
        }
    }
    if found.is_empty() {
        return Err(EvaluateError::NoImages { path: images.into() });
    }
    found.sort_unstable_by(|a, b| a.image.cmp(&b.image));
    Ok(found)
}

/// Width, height and values of a PNG of palette indices or gray values, as they are stored.
fn read_mask(path: &Path) -> Result<(u32, u32, Vec<u8>), EvaluateError> {
    let fail = |reason: String| EvaluateError::Mask { path: path.into(), reason };
    let file = File::open(path).map_err(|source| EvaluateError::Read { path: path.into(), source })?;
    let mut decoder = Decoder::new_with_limits(BufReader::new(file), Limits { bytes: MAX_BYTES });
    decoder.set_transformations(Transformations::IDENTITY);
    let undecodable = |error: png::DecodingError| fail(format!("cannot be decoded: {error}"));
    let mut reader = decoder.read_info().map_err(undecodable)?;
    let info = reader.info();
    let (width, height, color, depth) = (info.width, info.height, info.color_type, info.bit_depth);
    if !matches!(color, ColorType::Indexed | ColorType::Grayscale) || depth == BitDepth::Sixteen {
        let bits = depth as u8;
        return Err(fail(format!(
            "expected class numbers (palette or gray, at most 8 bits), found {color:?} of {bits} bits"
        )));
    }
    let pixels = width as usize * height as usize;
    let size = reader.output_buffer_size().filter(|size| *size <= MAX_BYTES && pixels <= MAX_BYTES);
    let mut packed = vec![0; size.ok_or_else(|| fail(format!("{width}x{height} pixels are too many")))?];
    let frame = reader.next_frame(&mut packed).map_err(undecodable)?;
    reader.finish().map_err(undecodable)?;
    let bits = depth as usize;
    let ones = 0xFFu8 >> (8 - bits);
    let mut labels = Vec::with_capacity(pixels);
    for row in packed[..frame.buffer_size()].chunks_exact(frame.line_size.max(1)) {
        labels.extend((0..width as usize).map(|x| (row[x * bits / 8] >> (8 - bits - x * bits % 8)) & ones));
    }
    match labels.len() == pixels {
        true => Ok((width, height, labels)),
        false => Err(fail("ends early".into())),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Writes a picture and its mask of `depth` bits: `labels` row by row.
    pub(crate) fn write(root: &Path, split: &str, name: &str, width: u32, labels: &[u8], depth: BitDepth) {
        let height = labels.len() as u32 / width;
        let [images, masks] = ["images", "labels"].map(|kind| root.join(kind).join(split));
        fs::create_dir_all(&images).unwrap();
        fs::create_dir_all(&masks).unwrap();
        let pixels: Vec<u8> =
            labels.iter().flat_map(|&label| [label.wrapping_mul(20), 128, 255 - label]).collect();
        let mut encoder =
            png::Encoder::new(File::create(images.join(format!("{name}.png"))).unwrap(), width, height);
        encoder.set_color(ColorType::Rgb);
        encoder.write_header().unwrap().write_image_data(&pixels).unwrap();
        let bits = depth as usize;
        let mut packed = Vec::new();
        for row in labels.chunks(width as usize) {
            let mut bytes = vec![0u8; (row.len() * bits).div_ceil(8)];
            for (x, label) in row.iter().enumerate() {
                bytes[x * bits / 8] |= label << (8 - bits - x * bits % 8);
            }
            packed.extend(bytes);
        }
        let mut encoder =
            png::Encoder::new(File::create(masks.join(format!("{name}.png"))).unwrap(), width, height);
        encoder.set_color(ColorType::Indexed);
        encoder.set_depth(depth);
        encoder.set_palette(vec![7; 3 << bits]);
        encoder.write_header().unwrap().write_image_data(&packed).unwrap();
    }

    fn small() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "train", "b", 5, &[0, 1, 2, 2, 1, 0, 0, 1, 2, 0], BitDepth::Two);
        write(root.path(), "train", "a", 5, &[0; 5], BitDepth::Eight);
        write(root.path(), "val", "c", 3, &[1, 1, 2], BitDepth::Four);
        fs::write(root.path().join("classes.txt"), "0 sky\n1 road side\n2 Unlabelled\n").unwrap();
        root
    }

    #[test]
    fn palette_indices_of_every_depth_are_labels() {
        let root = small();
        let data = Dataset::open(root.path(), None).unwrap();
        assert_eq!(data.classes, ["sky", "road side"]);
        assert_eq!(data.ignore, 2);
        assert!(data.train[0].image.ends_with("a.png") && data.train[1].image.ends_with("b.png"));
        assert_eq!(data.load(&data.train[0]).unwrap().labels, [0; 5]);
        assert_eq!(data.load(&data.train[1]).unwrap().labels, [0, 1, 255, 255, 1, 0, 0, 1, 255, 0]);
        assert_eq!(data.load(&data.val[0]).unwrap().labels, [1, 1, 255]);
        fs::write(root.path().join("dataset.json"), r#"{"classes": ["x", "y"], "ignore_index": 2, "z": 1}"#)
            .unwrap();
        assert_eq!(Dataset::open(root.path(), None).unwrap().classes, ["x", "y"]);
        assert_eq!(data.limited(1).train.len(), 1);
    }

    #[test]
    fn each_fault_names_the_file() {
        let fault = |spoil: &dyn Fn(&Path)| {
            let root = small();
            spoil(root.path());
            let load = |data: Dataset| data.train.iter().map(|s| data.load(s)).find_map(Result::err);
            let error = Dataset::open(root.path(), None).map_or_else(Some, load).unwrap();
            assert!(error.hint().is_some(), "{error}");
            error.to_string()
        };
        let mask = |root: &Path| root.join("labels/train/b.png");
        assert!(fault(&|root| fs::remove_file(mask(root)).unwrap()).contains("has no mask: expected"));
        assert!(fault(&|root| fs::write(mask(root), "x").unwrap()).contains("b.png`: cannot be decoded"));
        assert!(
            fault(&|root| drop(fs::copy(root.join("images/train/b.png"), mask(root))))
                .contains("found Rgb of 8 bits")
        );
        assert!(
            fault(&|root| drop(fs::copy(root.join("labels/val/c.png"), mask(root))))
                .contains("expected 5x2 pixels as its image, found 3x1")
        );
        assert!(
            fault(&|root| write(root, "train", "b", 2, &[0, 3], BitDepth::Eight))
                .contains("expected labels below 2 or 2 (unlabelled), found 3")
        );
        assert!(fault(&|root| fs::remove_file(root.join("classes.txt")).unwrap()).contains("found neither"));
        assert!(
            fault(&|root| fs::write(root.join("classes.txt"), "0 a\n2 b\n").unwrap())
                .contains("line 2: expected `1 NAME`")
        );
        assert!(fault(&|root| fs::write(root.join("dataset.json"), "{").unwrap()).contains("dataset.json"));
        assert!(
            fault(&|root| fs::remove_dir_all(root.join("labels/val")).unwrap())
                .contains("labels/val`: expected a folder, found nothing")
        );
        assert!(fault(&|root| fs::write(root.join("images/train/a.png"), "x").unwrap()).contains("a.png"));
    }
}
