//! What one run is started with, and how it ended.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use serde::Serialize;

use super::TrainConfig;
use crate::device::Compute;

/// What to continue.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// Compute threads of the rayon pool.
    pub threads: usize,
    /// Check everything, print the plan, train nothing and write nothing.
    pub dry_run: bool,
    /// Standard output is reserved for one JSON object.
    pub json: bool,
    /// Counts interruptions (Ctrl-C): from 1 on, write a checkpoint and end.
    pub interrupted: Arc<AtomicUsize>,
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
