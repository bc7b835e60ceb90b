//! What stops a run that cannot go on.

use std::path::PathBuf;

use super::state::RestoreError;
use crate::checkpoint::CheckpointError;
use crate::config::ConfigError;
use crate::data::DataError;
use crate::device::DeviceError;
use crate::distributed::DistributedError;
use crate::evaluate::EvaluateError;
use crate::metrics::MetricsError;
use crate::model::parameters::LoadError;

/// Why a run did not start or could not go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// The configuration does not fit the data.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The images.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A checkpoint could not be written or read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A checkpoint does not fit.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// The labelled images of the probe.
    #[error("the probe (`probe.data`) cannot be used")]
    Probe(#[from] EvaluateError),
    /// The log could not be written.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The ranks do not work together.
    #[error(transparent)]
    Distributed(#[from] DistributedError),
    /// The ranks have different weights after the same steps.
    #[error("after step {step} the ranks {} have other weights than rank 0", ranks.iter().map(usize::to_string).collect::<Vec<_>>().join(", "))]
    RanksDiffer {
        /// Steps done.
        step: u64,
        /// The ranks that differ.
        ranks: Vec<usize>,
    },
    /// The run was started with another configuration.
    #[error("`{}` was started with another configuration: {}", run.display(), differences.join(", "))]
    OtherConfig {
        /// The run.
        run: PathBuf,
        /// `key: stored value, now value`.
        differences: Vec<String>,
    },
    /// The run was started with other images.
    #[error("`{}` was started with other images: expected list {expected}, found {found}", run.display())]
    OtherData {
        /// The run.
        run: PathBuf,
        /// Hash of the stored list.
        expected: String,
        /// Hash of the list now.
        found: String,
    },
    /// `--resume DIR` names a folder without a checkpoint.
    #[error("`{}` holds no checkpoint", path.display())]
    NothingToResume {
        /// The folder.
        path: PathBuf,
    },
    /// The output folder holds a run that was not to be continued.
    #[error("`{}` already holds a run", run.display())]
    RunExists {
        /// The folder.
        run: PathBuf,
    },
    /// `--init` weights do not fit.
    #[error("the weights `{}` do not fit this model", path.display())]
    Init {
        /// The file.
        path: PathBuf,
        /// Which tensor.
        source: LoadError,
    },
    /// A file of the run could not be written.
    #[error("cannot write `{}`", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The tensor library refused.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl TrainError {
    /// What to try.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Config(error) => error.hint(),
            Self::Data(error) => error.hint(),
            Self::Device(error) => error.hint(),
            Self::Checkpoint(error) => error.hint(),
            Self::Restore(error) => error.hint(),
            Self::Probe(error) => error.hint(),
            Self::OtherConfig { .. } => Some(
                "continue with the stored values (`--config RUN/config.toml --resume auto`), or start a new run with \
                 another `--out`"
                    .into(),
            ),
            Self::OtherData { .. } => Some(
                "give the same images as before, or start a new run from these weights with `--init`".into(),
            ),
            Self::NothingToResume { .. } => {
                Some("give a run folder or a folder below its `checkpoints/`, or leave `--resume` out".into())
            }
            Self::RunExists { .. } => {
                Some("continue it with `--resume auto`, or choose another folder with `--out`".into())
            }
            Self::Init { source, .. } => source.hint(),
            Self::Distributed(error) => error.hint(),
            Self::RanksDiffer { .. } => Some(
                "the last checkpoint is good; the same program, data and kind of processor on every rank give the same \
                 bits, broken memory does not"
                    .into(),
            ),
            Self::Metrics(_) | Self::Io { .. } | Self::Tensor(_) => None,
        }
    }
}
