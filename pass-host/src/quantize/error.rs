//! Why a network is not quantized, or a file not verified.

use std::path::{Path, PathBuf};

use pass_edge::format::Mode;

use super::fidelity::Fidelity;
use crate::checkpoint::CheckpointError;
use crate::data::DataError;
use crate::model::weights::WeightsError;

/// Why there is no file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QuantizeError {
    /// The photos.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Own weights.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// A file cannot be read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A size that patches do not divide.
    #[error("size: expected positive multiples of the patch size {patch_size}, found {height}x{width}")]
    Size {
        /// The height asked for.
        height: usize,
        /// The width asked for.
        width: usize,
        /// Side of a patch.
        patch_size: usize,
    },
    /// Too few photos that can be used.
    #[error("calibration: expected at least 2 photos, found {found}{}", first_reason(bad))]
    TooFewImages {
        /// Photos that could be used.
        found: usize,
        /// Photos left out, with the reason.
        bad: Vec<(String, String)>,
    },
    /// The features are not close enough.
    #[error(
        "mean cosine of patch tokens to float: expected at least {min}, found {:.5} (first percentile {:.5}, nearest patch {:.1} %); nothing was written",
        fidelity.mean, fidelity.first_percentile, 100.0 * fidelity.nearest_patch
    )]
    Contract {
        /// What was measured.
        fidelity: Fidelity,
        /// What was asked for.
        min: f64,
        /// With which weights.
        mode: Mode,
    },
    /// The model file, or what the device cannot do.
    #[error("{}", describe(path.as_deref(), error))]
    Device {
        /// The file, if there is one.
        path: Option<PathBuf>,
        /// What the device said.
        error: pass_edge::Error,
    },
    /// The file belongs to another network.
    #[error("`{}` was not made from these weights: {field}: expected {expected}, found {found}", path.display())]
    OtherNetwork {
        /// The `.pass` file.
        path: PathBuf,
        /// What differs.
        field: &'static str,
        /// That of the weights.
        expected: String,
        /// That of the file.
        found: String,
    },
    /// The file cannot be written.
    #[error(transparent)]
    Write(#[from] CheckpointError),
    /// The tensor library refused.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl From<pass_edge::Error> for QuantizeError {
    fn from(error: pass_edge::Error) -> Self {
        Self::Device { path: None, error }
    }
}

fn describe(path: Option<&Path>, error: &pass_edge::Error) -> String {
    path.map_or_else(|| error.to_string(), |path| format!("`{}`: {error}", path.display()))
}

fn first_reason(bad: &[(String, String)]) -> String {
    bad.first().map_or_else(String::new, |(name, reason)| format!("; the first left out: `{name}`: {reason}"))
}

impl QuantizeError {
    /// What to try.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Data(error) => error.hint(),
            Self::Weights(error) => error.hint(),
            Self::Size { patch_size, .. } => Some(format!("for example `--size {}`", 14 * patch_size)),
            Self::TooFewImages { .. } => {
                Some("give a folder with some dozens of photos like those the device will see".into())
            }
            Self::Contract { mode: Mode::Fast, .. } => Some("use `--mode exact`, or lower `--min-cosine`".into()),
            Self::Contract { .. } => Some(
                "calibrate on more photos, or on photos like those the network was trained on (`--calibrate`, `--images`); or lower `--min-cosine`"
                    .into(),
            ),
            Self::OtherNetwork { .. } => Some("give the weights that `quantize` was given".into()),
            Self::Write(error) => error.hint(),
            Self::Device { path: Some(_), .. } => Some("write the file again with `pass-host quantize`".into()),
            _ => None,
        }
    }
}
