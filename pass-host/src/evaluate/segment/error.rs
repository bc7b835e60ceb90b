//! What can go wrong while segmenting.

use std::path::PathBuf;

use super::super::index_png::IndexPngError;
use crate::checkpoint::CheckpointError;
use crate::data::DecodeError;
use crate::model::weights::WeightsError;

/// Why a segmentation could not be trained or judged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SegmentError {
    /// The folder fits no layout.
    #[error("`{}` has none of the known layouts", dir.display())]
    Layout {
        /// The folder.
        dir: PathBuf,
    },
    /// A file or folder cannot be read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A folder without images, or a list without names.
    #[error("`{}` holds no images", path.display())]
    NoImages {
        /// The folder or list.
        path: PathBuf,
    },
    /// A name of a list without its image.
    #[error("`{}` line {line}: no image `{name}` in `{}`", list.display(), dir.display())]
    ListedMissing {
        /// The list.
        list: PathBuf,
        /// Line number, from 1.
        line: usize,
        /// The name.
        name: String,
        /// Where it should be.
        dir: PathBuf,
    },
    /// Images without their masks.
    #[error("{count} of {images} images have no mask; the first: `{}`", mask.display())]
    MissingMask {
        /// The first mask that is not there.
        mask: PathBuf,
        /// Masks that are not there.
        count: usize,
        /// Images of the split.
        images: usize,
    },
    /// Two images share the name of their mask.
    #[error("`{}` and `{}` share one mask", first.display(), second.display())]
    SharedMask {
        /// One.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// The list of classes is not one.
    #[error("`{}`{}: expected {expected}, found {found}", path.display(), line.map(|l| format!(" line {l}")).unwrap_or_default())]
    Classes {
        /// The file.
        path: PathBuf,
        /// Line number, from 1, if one line is to blame.
        line: Option<usize>,
        /// What belongs there.
        expected: &'static str,
        /// What is there.
        found: String,
    },
    /// Nothing tells the classes.
    #[error("nothing in `{}` tells the classes", dir.display())]
    NoClasses {
        /// The folder.
        dir: PathBuf,
    },
    /// An image cannot be decoded.
    #[error("image `{}` cannot be used", path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// Why.
        source: DecodeError,
    },
    /// A mask cannot be decoded.
    #[error(transparent)]
    Mask(#[from] IndexPngError),
    /// A mask of another size than its image.
    #[error(
        "mask `{}`: expected {}x{} pixels like its image, found {}x{}",
        path.display(), expected.0, expected.1, found.0, found.1
    )]
    MaskSize {
        /// The mask.
        path: PathBuf,
        /// Width and height of the image.
        expected: (u32, u32),
        /// Width and height of the mask.
        found: (u32, u32),
    },
    /// A label that is no class.
    #[error("mask `{}`: label {label} at column {column}, row {row} is none of the {classes} classes", path.display())]
    Label {
        /// The mask.
        path: PathBuf,
        /// The value in the file.
        label: u8,
        /// Where, from 0.
        column: usize,
        /// Where, from 0.
        row: usize,
        /// Number of classes.
        classes: usize,
    },
    /// The loss is not a number.
    #[error("the loss is {loss} at iteration {iteration} (learning rate {lr:.2e})")]
    NotFinite {
        /// The step, from 1.
        iteration: u64,
        /// The loss.
        loss: f64,
        /// The learning rate.
        lr: f64,
    },
    /// `--out` holds a run already.
    #[error("`{}` already holds a segmentation run", out.display())]
    Exists {
        /// The folder.
        out: PathBuf,
    },
    /// A checkpoint of another run.
    #[error("the run in `{}` cannot be continued: {what} was {was}, is now {now}", out.display())]
    Changed {
        /// The folder.
        out: PathBuf,
        /// What differs.
        what: String,
        /// In the checkpoint.
        was: String,
        /// Asked for.
        now: String,
    },
    /// The checkpoint does not hold a tensor of this head or backbone.
    #[error("checkpoint in `{}`: tensor `{name}`: expected {expected}, found {found}", out.display())]
    Tensors {
        /// The run folder.
        out: PathBuf,
        /// The tensor.
        name: String,
        /// Its shape here.
        expected: String,
        /// Its shape there, or nothing.
        found: String,
    },
    /// A picture cannot be written.
    #[error("cannot write `{}`", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The weights.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The tensor library refused.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl SegmentError {
    /// What to try.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Layout { .. } => Some(
                "known: images/{train,val} + labels/{train,val}; images/{training,validation} + annotations/…; JPEGImages + \
                 SegmentationClass + ImageSets/Segmentation/{train,val}.txt"
                    .into(),
            ),
            Self::NoImages { .. } => Some("images are *.jpg, *.jpeg or *.png, directly in that folder".into()),
            Self::MissingMask { .. } => {
                Some("a mask is a PNG with the name of its image; remove images without one".into())
            }
            Self::NoClasses { .. } => Some(
                "name a list with `--classes FILE`: one class a line, or `INDEX NAME`; a classes.txt, dataset.json or \
                 objectInfo150.txt in the folder is found by itself"
                    .into(),
            ),
            Self::Classes { .. } => Some("one class a line, in the order of the labels; or `INDEX NAME`".into()),
            Self::Label { label, .. } => Some(format!(
                "if {label} marks unlabelled pixels, pass `--ignore {label}`; if labels start at 1 and 0 is unlabelled, \
                 `--reduce-zero-label true`; else give all classes with `--classes FILE`"
            )),
            Self::Mask(error) => error.hint(),
            Self::MaskSize { .. } => {
                Some("masks must not be resized with interpolation; take them from the data set again".into())
            }
            Self::NotFinite { .. } => Some("lower the learning rate with `--lr`, or check the weights".into()),
            Self::Exists { .. } => Some("`--resume` continues it; another `--out` starts a new one".into()),
            Self::Changed { .. } | Self::Tensors { .. } => {
                Some("give the same flags and data as before, or start anew with another `--out`".into())
            }
            Self::Weights(error) => error.hint(),
            Self::Checkpoint(error) => error.hint(),
            Self::Write { .. } => Some("check free space and permissions of that folder".into()),
            Self::Read { .. }
            | Self::ListedMissing { .. }
            | Self::SharedMask { .. }
            | Self::Image { .. }
            | Self::Tensor(_) => None,
        }
    }
}
