//! What one run is started with, and how it ended.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use serde::{Deserialize, Serialize};

use super::TrainConfig;
use crate::device::Compute;
use crate::distributed::Ranks;

/// What to continue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Resume {
    /// The newest valid checkpoint of the run folder, if it holds one; else start anew.
    Auto,
    /// Start anew.
    None,
    /// The newest valid checkpoint of this run folder, or exactly this checkpoint folder.
    From(PathBuf),
}

/// Everything a training run needs; nothing else is read from flags or environment.
#[derive(Clone, Debug)]
pub struct RunSettings {
    /// The validated configuration.
    pub config: TrainConfig,
    /// The preset it started from, for the head of `config.toml`.
    pub preset: String,
    /// The run folder.
    pub out: PathBuf,
    /// What to continue.
    pub resume: Resume,
    /// Weights to start a new run from.
    pub init: Option<PathBuf>,
    /// Where and in which precision to compute.
    pub compute: Compute,
    /// This process among those that train together.
    pub ranks: Ranks,
    /// Compute threads of the rayon pool.
    pub threads: usize,
    /// Check everything, print the plan, train nothing and write nothing.
    pub dry_run: bool,
    /// Standard output is reserved for one JSON object.
    pub json: bool,
    /// Counts interruptions (Ctrl-C): from 1 on, write a checkpoint and end.
    pub interrupted: Arc<AtomicUsize>,
}

impl RunSettings {
    /// The text of `config.toml` in the run folder, written once the images are known to be there.
    pub fn config_toml(&self) -> String {
        self.config.to_toml(&self.preset)
    }
}

/// Which tokens `features` writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Tokens {
    /// One vector per patch.
    #[default]
    Patch,
    /// One vector per image.
    Class,
}

/// Which of the two networks is meant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Network {
    /// The momentum teacher: the better features.
    #[default]
    Teacher,
    /// The student.
    Student,
}

/// Everything `features` needs.
#[derive(Clone, Debug)]
pub struct FeatureSettings {
    /// As in `data.images`.
    pub images: Vec<String>,
    /// What [`Encoder`](crate::model::encoder::Encoder) opens.
    pub weights: String,
    /// Attention heads, for files that do not tell.
    pub heads: Option<usize>,
    /// `.safetensors` or `.npy`.
    pub out: PathBuf,
    /// What to write.
    pub tokens: Tokens,
    /// The network, if `weights` holds both.
    pub network: Network,
    /// Height and width to which images are resized and cropped; `None` = those of the global crops in training.
    pub size: Option<(usize, usize)>,
    /// Images computed together.
    pub batch: usize,
    /// Where to compute.
    pub compute: Compute,
    /// Standard output is reserved for one JSON object.
    pub json: bool,
}

/// For whom weights are exported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ExportFormat {
    /// backbone and aggregation head, the names of the released checkpoints: own weights only
    Safetensors,
    /// timm's `VisionTransformer`
    Timm,
    /// a folder for transformers' `ViTModel`
    Huggingface,
    /// a folder for transformers' `IJepaModel`, which has no class token: own weights as they are
    HuggingfaceIjepa,
    /// mmsegmentation's `VisionTransformer`
    Mmsegmentation,
    /// the `ViT` of mmdetection's ViTDet
    Mmdetection,
    /// a graph with `patch_tokens` and `class_token`, for onnxruntime and TensorRT
    Onnx,
}

/// Which images an exported graph takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grid {
    /// Of this height and width.
    Fixed((usize, usize)),
    /// Of any.
    Dynamic,
}

/// Which numbers an exported graph takes as pixels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum PixelInput {
    /// From 0 to 1, minus the mean, over the standard deviation of their channel.
    #[default]
    Normalized,
    /// From 0 to 255.
    Bytes,
}

impl PixelInput {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Normalized => "normalized",
            Self::Bytes => "bytes",
        }
    }
}

/// Everything `export` needs.
#[derive(Clone, Debug)]
pub struct ExportSettings {
    /// A run folder, a checkpoint folder or a safetensors file.
    pub source: PathBuf,
    /// For whom.
    pub to: ExportFormat,
    /// The network.
    pub network: Network,
    /// Attention heads, for files that do not tell.
    pub heads: Option<usize>,
    /// The file or folder to write.
    pub out: PathBuf,
    /// Images that a graph takes; `None` = of the size of training, or of the `.pass` file.
    pub grid: Option<Grid>,
    /// Pixels that a graph takes.
    pub input: PixelInput,
    /// A `.pass` file whose int8 weights and scales the graph has.
    pub quantized: Option<PathBuf>,
    /// Photos, as in `data.images`, on which one scale an activation is measured; none = a scale per token.
    pub calibrate: Vec<String>,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// All steps were done.
    Done,
    /// Interrupted; the checkpoint continues it.
    Interrupted,
    /// The guard stopped it (collapse or numbers that are not finite).
    Guard,
    /// `--dry-run`.
    DryRun,
}

/// The result of a run, printed as one JSON object with `--json`.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// How it ended.
    pub ending: Ending,
    /// The run folder.
    pub run: PathBuf,
    /// The newest checkpoint.
    pub checkpoint: Option<PathBuf>,
    /// Steps done, counted from the beginning of the run.
    pub step: u64,
    /// Steps the run is made of.
    pub total_steps: u64,
    /// Images in the data set.
    pub images: usize,
    /// Total loss of the last logged step.
    pub loss: Option<f64>,
    /// Image-level loss of the last logged step.
    pub loss_image: Option<f64>,
    /// Patch loss of the last logged step.
    pub loss_patch: Option<f64>,
    /// Seconds this part of the run took.
    pub seconds: f64,
    /// Why the guard stopped it and what to try.
    pub message: Option<String>,
}

impl Outcome {
    /// 0, or 3 if the guard stopped the run.
    pub fn exit_code(&self) -> u8 {
        match self.ending {
            Ending::Done | Ending::Interrupted | Ending::DryRun => 0,
            Ending::Guard => 3,
        }
    }
}
