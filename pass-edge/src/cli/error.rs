//! The error a person sees: what went wrong, why, and what to try.

use std::io;
use std::path::PathBuf;

use super::pictures::PictureError;
use super::track::MaskError;

/// Any failure of the program.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The command line asks for something impossible.
    #[error("{message}")]
    Usage { message: String, hint: String },
    /// A file cannot be read.
    #[error("cannot read `{}`", path.display())]
    Read { path: PathBuf, source: io::Error },
    /// A file cannot be written.
    #[error("cannot write `{}`", path.display())]
    Write { path: PathBuf, source: io::Error },
    /// The model file is refused.
    #[error("`{}` cannot be used as a model", path.display())]
    Model { path: PathBuf, source: pass_edge::Error },
    /// The model's self-test found other features.
    #[error("`{}` failed its self-test with kernel `{kernel}`", path.display())]
    SelfTest { path: PathBuf, kernel: &'static str, source: pass_edge::Error },
    /// The library refused arguments that the program made up.
    #[error("features cannot be computed")]
    Compute(#[from] pass_edge::Error),
    /// The first frame of a video cannot be used.
    #[error("the first frame `{}` cannot be used", path.display())]
    Frame { path: PathBuf, source: PictureError },
    /// The first mask of a video cannot be used.
    #[error("`{}` is no mask of the first frame", path.display())]
    Mask { path: PathBuf, source: MaskError },
    /// No image or frame gave features.
    #[error("{}", nothing_usable(*count, first.as_ref()))]
    NothingUsable { count: u64, first: Option<(String, String)> },
    /// Nobody reads standard output any more.
    #[error("standard output is closed")]
    ReaderGone,
    /// Standard output cannot be written.
    #[error("cannot write to standard output")]
    Output(#[source] io::Error),
}

impl Error {
    /// Wrong usage, with advice.
    pub(super) fn usage(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Usage { message: message.into(), hint: hint.into() }
    }

    /// What to do about it.
    pub(super) fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Usage { hint, .. } => hint,
            Self::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => "check the path",
            Self::Model { source, .. } => match source {
                pass_edge::Error::NotAModel => "`.pass` files are written by `pass-host quantize`",
                pass_edge::Error::UnknownVersion { .. } => {
                    "use the pass-edge of the same release as the pass-host that wrote the file"
                }
                _ => "copy the file again and compare checksums; if that does not help, quantize it again",
            },
            Self::SelfTest { .. } => {
                "do not use these features. `pass-edge verify MODEL --all-kernels` tells more: one kernel at fault, use \
                 another; all alike, the file was written by a release with other arithmetic, quantize it again"
            }
            Self::Mask { source: MaskError::NotIndexed { .. }, .. } => {
                "expected are masks as those of DAVIS: PNG with a palette, where the index of a color is the object; \
                 programs that only keep colors have lost it"
            }
            Self::Mask { source: MaskError::Size { .. }, .. } => {
                "the mask belongs to the first frame in the order of names; EXIF rotation of frames is applied"
            }
            Self::NothingUsable { count: 0, .. } => {
                "check the inputs: folders are searched for image files, a stream must hold frames"
            }
            Self::NothingUsable { .. }
            | Self::Frame { .. }
            | Self::Mask { .. }
            | Self::Read { .. }
            | Self::Write { .. }
            | Self::Compute(_)
            | Self::ReaderGone
            | Self::Output(_) => return None,
        };
        Some(hint.to_owned())
    }

    /// The exit code of the program: 2 for wrong usage, 1 for everything else.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Usage { .. } => 2,
            _ => 1,
        }
    }
}

fn nothing_usable(count: u64, first: Option<&(String, String)>) -> String {
    match first {
        None => "there are no images or frames".to_owned(),
        Some((name, reason)) => format!("none of {count} could be used; the first: `{name}`: {reason}"),
    }
}
