//! A folder of images and masks: which layout it has, its classes, its pictures.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::super::index_png::{self, Gray};
use super::classes::{self, Classes};
use super::error::SegmentError;
use crate::data::Rgb8Image;
use crate::data::decode::decode_rgb;
use crate::ops::IGNORED;

/// Where images and masks lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `images/{train,val}` and `labels/{train,val}`.
    Camvid,
    /// `images/{training,validation}` and `annotations/{training,validation}`; label 0 is unlabelled.
    Ade20k,
    /// `JPEGImages`, `SegmentationClass`, `ImageSets/Segmentation/{train,val}.txt`; label 255 is unlabelled.
    Voc,
}

/// What the folder itself does not tell, or what is to be read differently.
#[derive(Clone, Debug, Default)]
pub struct DatasetOptions {
    /// The layout; nothing = whichever fits.
    pub layout: Option<Layout>,
    /// The list of classes; nothing = the one in the folder.
    pub classes: Option<PathBuf>,
    /// The label of pixels that do not count.
    pub ignore: Option<u8>,
    /// Whether label 0 does not count and the others are one too high.
    pub reduce_zero_label: Option<bool>,
}

/// One image and its mask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Name without ending.
    pub name: String,
    /// The image file.
    pub image: PathBuf,
    /// The mask file.
    pub mask: PathBuf,
}

/// A labelled data set.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// Its folder.
    pub path: PathBuf,
    /// Its layout.
    pub layout: Layout,
    /// Names and colors of the classes.
    pub classes: Classes,
    /// The label, in the files, of pixels that do not count.
    pub ignore: u8,
    /// Whether label 0 does not count and the others are one too high.
    pub reduce_zero_label: bool,
    /// Pictures to learn from.
    pub train: Vec<Sample>,
    /// Pictures to judge with.
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

/// `dataset.json`; keys that are not known here are for others.
#[derive(Debug, Default, Deserialize)]
struct Description {
    classes: Option<Vec<String>>,
    palette: Option<Vec<[u8; 3]>>,
    ignore_index: Option<u8>,
    reduce_zero_label: Option<bool>,
}

const DESCRIPTION: &str = "dataset.json";
/// Pictures beyond this are refused.
const MAX_MEGAPIXELS: f64 = 200.0;

impl Dataset {
    /// Lists the pictures of a folder. No picture is decoded.
    ///
    /// # Errors
    /// [`SegmentError`] for an unknown layout, no images, missing masks, no or wrong classes.
    pub fn open(dir: &Path, options: &DatasetOptions) -> Result<Self, SegmentError> {
        let layout = match options.layout {
            Some(layout) => layout,
            None => Layout::of(dir).ok_or_else(|| SegmentError::Layout { dir: dir.into() })?,
        };
        let path = dir.join(DESCRIPTION);
        let description: Description = if path.is_file() {
            let bytes =
                fs::read(&path).map_err(|source| SegmentError::Read { path: path.clone(), source })?;
            serde_json::from_slice(&bytes).map_err(|error| SegmentError::Classes {
                path: path.clone(),
                line: (error.line() > 0).then_some(error.line()),
                expected: "an object with `classes`, `ignore_index`, `palette`",
                found: error.to_string(),
            })?
        } else {
            Description::default()
        };
        let ignore = options.ignore.or(description.ignore_index).unwrap_or(IGNORED);
        let reduce_zero_label =
            options.reduce_zero_label.or(description.reduce_zero_label).unwrap_or(layout == Layout::Ade20k);
        let named = match (&options.classes, description.classes) {
            (Some(file), _) => classes::from_file(file, ignore)?,
            (None, Some(names)) => classes::checked(names, &path)?,
            (None, None) => classes::in_folder(dir, ignore, layout)?,
        };
        let classes = Classes::new(named, description.palette.unwrap_or_default(), layout == Layout::Voc);
        let [train, val] = layout.samples(dir)?;
        Ok(Self { path: dir.into(), layout, classes, ignore, reduce_zero_label, train, val })
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
    /// [`SegmentError`] naming the file: unreadable, sizes that differ, a label that is no class.
    pub fn load(&self, sample: &Sample) -> Result<Picture, SegmentError> {
        let image = read_image(&sample.image)?;
        let mask = index_png::read(&sample.mask, Gray::Numbers)?;
        let (expected, found) = ((image.width, image.height), (mask.width, mask.height));
        if expected != found {
            return Err(SegmentError::MaskSize { path: sample.mask.clone(), expected, found });
        }
        let mut labels = mask.indices;
        let table = self.label_table();
        for (place, label) in labels.iter_mut().enumerate() {
            match table[usize::from(*label)] {
                Some(class) => *label = class,
                None => {
                    let width = image.width as usize;
                    return Err(SegmentError::Label {
                        path: sample.mask.clone(),
                        label: *label,
                        column: place % width,
                        row: place / width,
                        classes: self.classes.len(),
                    });
                }
            }
        }
        Ok(Picture { image, labels })
    }

    /// The class of every value of a mask: [`IGNORED`] where it does not count, nothing where it is no class.
    fn label_table(&self) -> [Option<u8>; 256] {
        std::array::from_fn(|label| {
            let label = label as u8;
            // after the reduction 0 has become 255, as in mmsegmentation
            let class = match (label, self.reduce_zero_label) {
                (0, true) | (IGNORED, true) => return Some(IGNORED),
                (label, true) if label == self.ignore => return Some(IGNORED),
                (label, true) => label - 1,
                (label, false) if label == self.ignore => return Some(IGNORED),
                (label, false) => label,
            };
            (usize::from(class) < self.classes.len()).then_some(class)
        })
    }

    /// Writes one prediction of this data set as the masks of its folder are: `class + 1` where label 0 is reserved.
    pub fn stored_label(&self, class: u8) -> u8 {
        class + u8::from(self.reduce_zero_label)
    }

    /// A number that changes with the pictures, their order, the classes and what does not count.
    pub fn fingerprint(&self) -> String {
        let mut hash = xxhash_rust::xxh3::Xxh3::new();
        for (split, samples) in [("train", &self.train), ("val", &self.val)] {
            hash.update(split.as_bytes());
            for sample in samples {
                hash.update(sample.name.as_bytes());
                hash.update(&[0]);
            }
        }
        for name in &self.classes.names {
            hash.update(name.as_bytes());
            hash.update(&[0]);
        }
        hash.update(&[self.ignore, u8::from(self.reduce_zero_label)]);
        format!("{:016x}", hash.digest())
    }
}

fn read_image(path: &Path) -> Result<Rgb8Image, SegmentError> {
    let bytes = fs::read(path).map_err(|source| SegmentError::Read { path: path.into(), source })?;
    decode_rgb(&bytes, MAX_MEGAPIXELS).map_err(|source| SegmentError::Image { path: path.into(), source })
}

impl Layout {
    /// The layout a folder has.
    fn of(dir: &Path) -> Option<Self> {
        let has = |name: &str| dir.join(name).is_dir();
        if has("JPEGImages") && has("SegmentationClass") {
            Some(Self::Voc)
        } else if has("images/training") && has("annotations") {
            Some(Self::Ade20k)
        } else if has("images/train") && has("labels") {
            Some(Self::Camvid)
        } else {
            None
        }
    }

    fn samples(self, dir: &Path) -> Result<[Vec<Sample>; 2], SegmentError> {
        match self {
            Self::Camvid => {
                let split =
                    |name: &str| in_folders(&dir.join("images").join(name), &dir.join("labels").join(name));
                Ok([split("train")?, split("val")?])
            }
            Self::Ade20k => {
                let split = |name: &str| {
                    in_folders(&dir.join("images").join(name), &dir.join("annotations").join(name))
                };
                Ok([split("training")?, split("validation")?])
            }
            Self::Voc => Ok([listed(dir, "train")?, listed(dir, "val")?]),
        }
    }
}

/// Images by their names without ending, sorted.
fn images_of(dir: &Path) -> Result<Vec<(String, PathBuf)>, SegmentError> {
    let unreadable = |source| SegmentError::Read { path: dir.into(), source };
    let mut images = Vec::new();
    for entry in fs::read_dir(dir).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let ending = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
        let (Some(stem), true) =
            (path.file_stem().and_then(|s| s.to_str()), ["jpg", "jpeg", "png"].contains(&&*ending))
        else {
            continue;
        };
        if !stem.starts_with('.') {
            images.push((stem.to_owned(), path.clone()));
        }
    }
    images.sort();
    match images.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        Some(pair) => Err(SegmentError::SharedMask { first: pair[0].1.clone(), second: pair[1].1.clone() }),
        None => Ok(images),
    }
}

/// The images of one folder with the masks of another.
fn in_folders(images: &Path, masks: &Path) -> Result<Vec<Sample>, SegmentError> {
    let found = images_of(images)?;
    with_masks(images, found, masks)
}

/// The images that a list of VOC names.
fn listed(dir: &Path, split: &str) -> Result<Vec<Sample>, SegmentError> {
    let list = dir.join("ImageSets/Segmentation").join(format!("{split}.txt"));
    let text =
        fs::read_to_string(&list).map_err(|source| SegmentError::Read { path: list.clone(), source })?;
    let images = dir.join("JPEGImages");
    let known: HashMap<String, PathBuf> = images_of(&images)?.into_iter().collect();
    let mut found = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let name = line.trim();
        if name.is_empty() {
            continue;
        }
        let Some(path) = known.get(name) else {
            return Err(SegmentError::ListedMissing {
                list,
                line: index + 1,
                name: name.to_owned(),
                dir: images,
            });
        };
        found.push((name.to_owned(), path.clone()));
    }
    with_masks(&list, found, &dir.join("SegmentationClass"))
}

fn with_masks(
    from: &Path,
    images: Vec<(String, PathBuf)>,
    masks: &Path,
) -> Result<Vec<Sample>, SegmentError> {
    if images.is_empty() {
        return Err(SegmentError::NoImages { path: from.into() });
    }
    let samples: Vec<Sample> = images
        .into_iter()
        .map(|(name, image)| Sample { mask: masks.join(format!("{name}.png")), name, image })
        .collect();
    let missing: Vec<&Sample> = samples.iter().filter(|sample| !sample.mask.is_file()).collect();
    match missing.first() {
        Some(first) => Err(SegmentError::MissingMask {
            mask: first.mask.clone(),
            count: missing.len(),
            images: samples.len(),
        }),
        None => Ok(samples),
    }
}

#[cfg(test)]
mod tests;
