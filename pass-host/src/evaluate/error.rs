//! What can go wrong between a folder of labelled images and a score.

use std::path::PathBuf;

use super::segment::SegmentError;
use crate::data::shard::ShardError;
use crate::model::weights::WeightsError;

/// Why features could not be judged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvaluateError {
    /// The weights.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// A folder that is not there.
    #[error("`{}`: expected {expected}, found {}", path.display(), if path.exists() { "a file" } else { "nothing" })]
    NotAFolder {
        /// The path.
        path: PathBuf,
        /// What belongs there.
        expected: &'static str,
    },
    /// A file or folder could not be read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// The path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A shard that cannot be read.
    #[error("`{}` is not a readable shard", path.display())]
    Shard {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ShardError,
    },
    /// A split without a folder of a class.
    #[error("`{}`: expected a folder of images for each class, found {images} images and no such folder", path.display())]
    NoClasses {
        /// The split.
        path: PathBuf,
        /// Images that lie in it directly.
        images: usize,
    },
    /// A single class.
    #[error("`{}`: expected two classes or more, found only `{class}`", path.display())]
    OneClass {
        /// The split.
        path: PathBuf,
        /// The class.
        class: String,
    },
    /// A class without images.
    #[error("class folder `{}` holds no image", path.display())]
    EmptyClass {
        /// The folder.
        path: PathBuf,
    },
    /// A class that cannot be learned.
    #[error("class `{class}` of `{}` is not in `{}`", val.display(), train.display())]
    UnknownClass {
        /// The class.
        class: String,
        /// Where it is.
        val: PathBuf,
        /// Where it is missing.
        train: PathBuf,
    },
    /// Every image of a class is bad.
    #[error("no image of class `{class}` could be used; the first: `{name}`: {reason}")]
    ClassLost {
        /// The class.
        class: String,
        /// The first bad image.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Every image is bad.
    #[error("none of {count} images could be used; the first: `{name}`: {reason}")]
    AllBad {
        /// Images tried.
        count: usize,
        /// The first.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A view that patches do not divide.
    #[error("view size: expected a positive multiple of the patch size {stride}, found {found}")]
    Size {
        /// Side of a patch in pixels.
        stride: usize,
        /// The size asked for.
        found: usize,
    },
    /// Features that are no numbers.
    #[error("`{image}`: expected finite features, found NaN or infinity")]
    NotFinite {
        /// The image.
        image: String,
    },
    /// Too little to hold out images for the choice of a learning rate.
    #[error("class `{class}`: expected at least two images to learn from, found {found}")]
    TooFewToHoldOut {
        /// The class.
        class: String,
        /// Its images.
        found: usize,
    },
    /// A learning rate at which every classifier diverged.
    #[error("every learning rate diverged")]
    Diverged,
    /// Images and masks.
    #[error(transparent)]
    Pictures(#[from] SegmentError),
    /// Masks without a labelled pixel.
    #[error("`{}`: no mask has a labelled pixel", path.display())]
    Unlabelled {
        /// The data.
        path: PathBuf,
    },
    /// The tensor library refused.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl EvaluateError {
    /// What to try.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Weights(error) => return error.hint(),
            Self::Pictures(error) => return error.hint(),
            Self::Shard { source, .. } => source.hint(),
            Self::NotAFolder { .. } => "check the spelling; relative paths start at the current folder".into(),
            Self::NoClasses { .. } => {
                "images lie in one folder a class, the folder is the name: DIR/train/cat/1.jpg, DIR/val/cat/2.jpg".into()
            }
            Self::OneClass { .. } => "add another class, or give the folder above".into(),
            Self::EmptyClass { .. } => "put images there, or remove the folder".into(),
            Self::UnknownClass { .. } => "both splits need the same class folders; remove it, or add it to the other".into(),
            Self::Size { stride, .. } => format!("for example `--size {}`", 16 * stride),
            Self::NotFinite { .. } => "the weights are damaged, or the run that wrote them diverged".into(),
            Self::TooFewToHoldOut { .. } => "the learning rate is chosen on held-out images of each class; add images".into(),
            Self::Diverged => "give lower ones with `--lrs`, or use `--standardize`".into(),
            Self::Read { .. }
            | Self::ClassLost { .. }
            | Self::AllBad { .. }
            | Self::Unlabelled { .. }
            | Self::Tensor(_) => return None,
        })
    }
}
