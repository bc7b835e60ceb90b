//! What can go wrong between a folder of labelled images and a score.

use std::path::PathBuf;

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
    /// The list of classes.
    #[error("`{}`: {reason}", path.display())]
    Classes {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A split without images.
    #[error("`{}` holds no image", path.display())]
    NoImages {
        /// The folder.
        path: PathBuf,
    },
    /// An image that cannot be used.
    #[error("image `{}`: {reason}", path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// An image without mask.
    #[error("image `{}` has no mask: expected `{}`", image.display(), mask.display())]
    NoMask {
        /// The image.
        image: PathBuf,
        /// Where its mask should be.
        mask: PathBuf,
    },
    /// A mask that cannot be read.
    #[error("mask `{}`: {reason}", path.display())]
    Mask {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A mask of another size than its image.
    #[error("mask `{}`: expected {}x{} pixels as its image, found {}x{}", path.display(), image.0, image.1, mask.0, mask.1)]
    MaskSize {
        /// The mask.
        path: PathBuf,
        /// Width and height of the image.
        image: (u32, u32),
        /// Width and height of the mask.
        mask: (u32, u32),
    },
    /// A label that is no class.
    #[error("mask `{}`: expected labels below {classes} or {ignore} (unlabelled), found {label}", path.display())]
    Label {
        /// The mask.
        path: PathBuf,
        /// Number of classes.
        classes: usize,
        /// The label of pixels that do not count.
        ignore: u8,
        /// The label.
        label: u8,
    },
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
            Self::Classes { .. } => {
                "`classes.txt` has one line `NUMBER NAME` a class; `dataset.json` has `classes` and `ignore_index`".into()
            }
            Self::NoImages { .. } | Self::NoMask { .. } => {
                "expected layout: images/{train,val}/NAME.jpg with labels/{train,val}/NAME.png".into()
            }
            Self::Image { .. } => "repair the image, or remove it together with its mask".into(),
            Self::Mask { .. } => {
                "a mask is a complete PNG whose palette index or gray value, at most 8 bits, is the class".into()
            }
            Self::MaskSize { .. } => "save the mask at the size of its image, without interpolation".into(),
            Self::Label { .. } => "correct the list of classes, or the label of unlabelled pixels (`--ignore`)".into(),
            Self::Read { .. }
            | Self::ClassLost { .. }
            | Self::AllBad { .. }
            | Self::Unlabelled { .. }
            | Self::Tensor(_) => return None,
        })
    }
}
