//! Why a data set or its masks cannot be evaluated; every variant names the file.

use std::io;
use std::path::PathBuf;

use super::super::index_png::IndexPngError;
use crate::checkpoint::CheckpointError;
use crate::data::decode::DecodeError;
use crate::model::weights::WeightsError;

/// An error of `eval vos`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VosError {
    /// A part of the DAVIS layout is not there.
    #[error("`{}` does not exist: expected {expected}", .path.display())]
    Layout {
        /// Where it should be.
        path: PathBuf,
        /// What should be there.
        expected: &'static str,
    },
    /// A line of a list of sequences is no name.
    #[error("`{}` line {line}: expected the name of a sequence, found `{found}`", .path.display())]
    List {
        /// The list.
        path: PathBuf,
        /// Line number, from 1.
        line: usize,
        /// What the line says.
        found: String,
    },
    /// No sequence was asked for.
    #[error("{} names no sequence", .source_name)]
    NoSequence {
        /// The list or the option.
        source_name: String,
    },
    /// A name that is no folder of the data set.
    #[error("`{name}` is no name of a sequence")]
    BadName {
        /// As given.
        name: String,
    },
    /// Too few frames to score one.
    #[error("`{}` holds {frames} masks: at least 3 are needed, the first and the last are not scored", .folder.display())]
    TooShort {
        /// The folder of the masks.
        folder: PathBuf,
        /// Masks in it.
        frames: usize,
    },
    /// A frame and its mask do not come together.
    #[error("`{}` is missing: `{}` has no {what}", .path.display(), .of.display())]
    MissingFrame {
        /// The file that should be there.
        path: PathBuf,
        /// Its counterpart.
        of: PathBuf,
        /// What is missing.
        what: &'static str,
    },
    /// Predictions of a sequence are not there.
    #[error("{missing} of {scored} scored masks are missing in `{}`; the first is `{first}`", .folder.display())]
    Incomplete {
        /// The folder of the sequence.
        folder: PathBuf,
        /// How many.
        missing: usize,
        /// Of how many.
        scored: usize,
        /// Name of the first one.
        first: String,
    },
    /// A file or folder cannot be read.
    #[error("cannot read `{}`", .path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A frame is no picture.
    #[error("cannot use frame `{}`", .path.display())]
    Frame {
        /// The frame.
        path: PathBuf,
        /// Why.
        #[source]
        source: DecodeError,
    },
    /// A mask is no mask.
    #[error(transparent)]
    Mask(#[from] IndexPngError),
    /// Labels that make no file.
    #[error("`{}` cannot be encoded", .path.display())]
    EncodeMask {
        /// The file to be written.
        path: PathBuf,
        /// Why.
        source: png::EncodingError,
    },
    /// A frame or mask is of another size than the first frame or the true mask.
    #[error(
        "`{}` has {}x{} pixels, but `{}` has {}x{}",
        .path.display(), .size.1, .size.0, .other.display(), .other_size.1, .other_size.0
    )]
    Size {
        /// The file.
        path: PathBuf,
        /// Its height and width.
        size: (usize, usize),
        /// The file it must agree with.
        other: PathBuf,
        /// That one's height and width.
        other_size: (usize, usize),
    },
    /// The first mask shows nothing.
    #[error("first mask `{}` shows no object: every pixel is background or void", .path.display())]
    NoObject {
        /// The mask.
        path: PathBuf,
    },
    /// A label that the first mask does not have.
    #[error("`{}` shows object {label}, but the first mask of the sequence has objects up to {objects}", .path.display())]
    UnknownLabel {
        /// The mask.
        path: PathBuf,
        /// The label.
        label: u8,
        /// The largest label of the first mask.
        objects: u8,
    },
    /// A frame of which no grid of patches would be left.
    #[error(
        "`{}`: {}x{} pixels cannot be cut into patches of {stride} with a short side of {short_side}",
        .path.display(), .size.1, .size.0
    )]
    Preparation {
        /// The frame.
        path: PathBuf,
        /// Its height and width.
        size: (usize, usize),
        /// Short side asked for.
        short_side: usize,
        /// Pixels of a patch.
        stride: usize,
    },
    /// Output would replace input.
    #[error("`{}` would replace files of the data set", .path.display())]
    Overwrites {
        /// The folder.
        path: PathBuf,
    },
    /// The weights.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// An output file cannot be written.
    #[error(transparent)]
    Write(#[from] CheckpointError),
    /// A picture cannot be encoded.
    #[error("cannot encode `{}`", .path.display())]
    Encode {
        /// The file it was meant for.
        path: PathBuf,
        /// Why not.
        #[source]
        source: image::ImageError,
    },
    /// The rule of propagation or a size in it.
    #[error(transparent)]
    Rule(#[from] pass_core::Error),
    /// The network cannot compute.
    #[error("the network cannot compute the features of `{}`", .path.display())]
    Network {
        /// The frame.
        path: PathBuf,
        /// Why.
        #[source]
        source: candle_core::Error,
    },
}

impl VosError {
    /// What the reader can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Layout { .. } => "the data set is laid out like DAVIS: JPEGImages/480p/SEQUENCE/*.jpg, \
                 Annotations/480p/SEQUENCE/*.png, ImageSets/2017/val.txt; `--sequences a,b` needs no list"
                .into(),
            Self::List { .. } => "a list has one folder name a line, like ImageSets/2017/val.txt".into(),
            Self::NoSequence { .. } | Self::BadName { .. } => {
                "name folders of Annotations/480p, for example `--sequences dog,blackswan`".into()
            }
            Self::TooShort { .. } => "leave the sequence out with `--sequences`".into(),
            Self::MissingFrame { .. } => {
                "a frame and its mask have the same name; unpack the data set again if files were lost".into()
            }
            Self::Incomplete { .. } => {
                "predictions are PREDICTIONS/SEQUENCE/FRAME.png, named like the true masks".into()
            }
            Self::Mask(error) => return error.hint(),
            Self::Size { .. } => {
                "masks are compared pixel by pixel: write them in the size of the frame (nearest neighbor)"
                    .into()
            }
            Self::NoObject { .. } => "index 0 is background, 255 void, every other index an object".into(),
            Self::UnknownLabel { .. } => {
                "index 0 is background, 255 (true masks only) void, objects are those of the first mask"
                    .into()
            }
            Self::Preparation { .. } => "choose another `--resolution`, at least one patch".into(),
            Self::Overwrites { .. } => "write to a folder outside of the data set".into(),
            Self::Weights(error) => return error.hint(),
            Self::Write(error) => return error.hint(),
            Self::Frame { .. } => "the file may be cut off: unpack the data set again".into(),
            Self::Read { .. }
            | Self::Encode { .. }
            | Self::EncodeMask { .. }
            | Self::Rule(_)
            | Self::Network { .. } => return None,
        })
    }
}
