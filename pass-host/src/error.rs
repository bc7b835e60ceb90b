//! The error a person sees: what went wrong, why, and what to try.

use crate::bench::BenchError;
use crate::checkpoint::CheckpointError;
use crate::config::ConfigError;
use crate::device::DeviceError;
use crate::distributed::DistributedError;
use crate::evaluate::EvaluateError;
use crate::evaluate::segment::SegmentError;
use crate::evaluate::vos::VosError;
use crate::export::ExportError;
use crate::features::FeatureError;
use crate::import::ImportError;
use crate::metrics::MetricsError;
use crate::pack::PackError;
use crate::picture::PictureError;
use crate::quantize::QuantizeError;
use crate::report::ReportError;
use crate::sweep::SweepError;
use crate::train::TrainError;

/// Any failure of the program; each area keeps its own enum.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The command line asks for something impossible.
    #[error("{message}")]
    Usage {
        /// What is wrong.
        message: String,
        /// What to do instead.
        hint: Option<String>,
    },
    /// No valid configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The wished device is not usable.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The processes that were started together.
    #[error(transparent)]
    Distributed(#[from] DistributedError),
    /// A checkpoint or weights file.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The logs of a run.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The training run.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// Semantic segmentation.
    #[error(transparent)]
    Segment(#[from] SegmentError),
    /// Features of images.
    #[error(transparent)]
    Features(#[from] FeatureError),
    /// Features judged.
    #[error(transparent)]
    Evaluate(#[from] EvaluateError),
    /// Video object segmentation.
    #[error(transparent)]
    Vos(#[from] VosError),
    /// Exported weights.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// A file for the device.
    #[error(transparent)]
    Quantize(#[from] QuantizeError),
    /// Images packed into a shard.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// Weights of others.
    #[error(transparent)]
    Import(#[from] ImportError),
    /// A picture.
    #[error(transparent)]
    Picture(#[from] PictureError),
    /// The speed of training.
    #[error(transparent)]
    Bench(#[from] BenchError),
    /// The page of a run.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// Many runs.
    #[error(transparent)]
    Sweep(#[from] SweepError),
    /// Standard output cannot be written.
    #[error("cannot write to standard output")]
    Output(#[source] std::io::Error),
}

impl Error {
    /// Wrong usage, with advice.
    pub fn usage(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Usage { message: message.into(), hint: Some(hint.into()) }
    }

    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Usage { hint, .. } => hint.clone(),
            Self::Config(error) => error.hint(),
            Self::Device(error) => error.hint(),
            Self::Distributed(error) => error.hint(),
            Self::Checkpoint(error) => error.hint(),
            Self::Metrics(_) => Some("check the free space and the permissions of the run folder".into()),
            Self::Train(error) => error.hint(),
            Self::Segment(error) => error.hint(),
            Self::Features(error) => error.hint(),
            Self::Evaluate(error) => error.hint(),
            Self::Vos(error) => error.hint(),
            Self::Export(error) => error.hint(),
            Self::Quantize(error) => error.hint(),
            Self::Pack(error) => error.hint(),
            Self::Import(error) => error.hint(),
            Self::Picture(error) => error.hint(),
            Self::Report(error) => error.hint(),
            Self::Bench(error) => error.hint(),
            Self::Sweep(error) => error.hint(),
            Self::Output(_) => None,
        }
    }

    /// The exit code of the program: 2 for wrong usage, 1 for everything else.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage { .. } | Self::Config(_) | Self::Train(TrainError::Config(_)) => 2,
            Self::Pack(PackError::Setting { .. }) => 2,
            Self::Sweep(SweepError::Syntax { .. } | SweepError::Value { .. } | SweepError::Row { .. }) => 2,
            _ => 1,
        }
    }
}
