//! Semantic segmentation on top of trained features: a linear head or Semantic FPN, judged as mmsegmentation does.
//!
//! | file | job |
//! |---|---|
//! | [`dataset`], [`classes`] | a folder of images and masks; names and colors |
//! | [`view`], [`photometric`] | a picture as the network sees it: whole, or a random crop |
//! | [`pictures`] | pictures decoded ahead; features kept |
//! | [`head_linear`], [`head_fpn`] | features -> a coarse map of logits |
//! | [`model`] | encoder and head together |
//! | [`optimizer`], `trainer`, [`state`] | AdamW, the loop, checkpoints |
//! | [`judge`], [`metrics`] | whole-picture test; mIoU, aAcc, mAcc |

pub mod classes;
pub mod dataset;
mod error;
pub mod head_fpn;
pub mod head_linear;
pub mod judge;
pub mod metrics;
pub mod model;
pub mod optimizer;
pub mod photometric;
pub mod pictures;
pub mod state;
mod trainer;
pub mod view;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Instant;

use candle_core::Device;
use serde::Serialize;

pub use error::SegmentError;

use crate::checkpoint::{self, CHECKPOINTS};
use crate::config::run::{Ending, Network};
use crate::config::segment::SegmentConfig;
use crate::model::encoder::{Encoder, EncoderOptions};
use crate::model::pos_embed::ResizeRule;
use crate::ops::Ops;
use dataset::{Dataset, DatasetOptions};
use metrics::Scores;
use model::SegmentModel;
use optimizer::Optimizer;
use state::SegmentState;
use trainer::Trainer;

/// Everything `eval segment` needs.
#[derive(Clone, Debug)]
pub struct SegmentSettings {
    /// What [`Encoder::open`] opens.
    pub weights: String,
    /// Which network of a run.
    pub network: Network,
    /// Attention heads, for files that do not tell.
    pub heads: Option<usize>,
    /// The data set.
    pub data: PathBuf,
    /// How it is read.
    pub dataset: DatasetOptions,
    /// Hyper-parameters.
    pub config: SegmentConfig,
    /// Run folder.
    pub out: PathBuf,
    /// Whether a run in that folder is continued.
    pub resume: bool,
    /// Where predictions go.
    pub predictions: Option<PathBuf>,
    /// Where to compute.
    pub device: Device,
    /// Counts interruptions (Ctrl-C): from 1 on, write a checkpoint and end.
    pub interrupted: Arc<AtomicUsize>,
}

/// What is going on.
#[derive(Clone, Debug)]
pub enum Event {
    /// A line for people.
    Note(String),
    /// Features of training pictures are computed.
    Features {
        /// Pictures done.
        done: usize,
        /// Pictures in all.
        total: usize,
    },
    /// A step was taken.
    Step {
        /// Steps done.
        iteration: u64,
        /// Steps in all.
        total: u64,
        /// Loss of this step.
        loss: f64,
        /// Its learning rate.
        lr: f64,
    },
    /// Validation pictures are judged.
    Judged {
        /// Pictures done.
        done: usize,
        /// Pictures in all.
        total: usize,
    },
}

/// The result, printed as one JSON object with `--json` and kept in the run folder.
#[derive(Clone, Debug, Serialize)]
pub struct SegmentReport {
    /// How the run ended.
    pub ending: Ending,
    /// The scores; nothing after an interruption.
    #[serde(flatten)]
    pub scores: Option<Scores>,
    /// The weights as given.
    pub weights: String,
    /// What they are.
    pub encoder: String,
    /// The data set.
    pub data: PathBuf,
    /// Pictures learned from.
    pub train_images: usize,
    /// Pictures judged.
    pub val_images: usize,
    /// Steps done.
    pub iterations: u64,
    /// Hyper-parameters.
    pub config: SegmentConfig,
    /// The run folder.
    pub run: PathBuf,
    /// Seconds of training in this part of the run, features included.
    pub training_seconds: f64,
    /// Seconds of judging.
    pub judging_seconds: f64,
}

/// The result in the run folder.
const RESULT: &str = "result.json";

/// Trains a head on the training pictures of a data set and judges it on its validation pictures.
///
/// # Errors
/// [`SegmentError`]; a run that was interrupted or failed goes on from its newest checkpoint with `resume`.
pub fn run(settings: &SegmentSettings, mut tell: impl FnMut(Event)) -> Result<SegmentReport, SegmentError> {
    let dataset = Dataset::open(&settings.data, &settings.dataset)?;
    let options = EncoderOptions {
        network: settings.network,
        heads: settings.heads,
        positions: Some(ResizeRule::Size),
        trainable: settings.config.fine_tune,
        seed: settings.config.seed,
        drop_path: settings.config.drop_path,
        ..EncoderOptions::default()
    };
    let encoder = Encoder::open(&settings.weights, &options, &settings.device)?;
    let description = encoder.description().to_owned();
    tell(Event::Note(format!(
        "{description}; {} training and {} validation pictures, {} classes",
        dataset.train.len(),
        dataset.val.len(),
        dataset.classes.len()
    )));
    let _lock = checkpoint::lock_run(&settings.out)?;
    let checkpoints = settings.out.join(CHECKPOINTS);
    checkpoint::prepare(&checkpoints)?;
    let found = checkpoint::open_latest(&checkpoints)?;
    if found.is_some() && !settings.resume {
        return Err(SegmentError::Exists { out: settings.out.clone() });
    }

    let backbone =
        if settings.config.fine_tune { None } else { Some(state::checksum(encoder.parameters())?) };
    let state =
        SegmentState { iteration: 0, config: settings.config.clone(), backbone, data: dataset.fingerprint() };
    let ops = Ops::fused();
    let model = SegmentModel::new(encoder, dataset.classes.len(), &settings.config, ops)?;
    let optimizer = Optimizer::new(&settings.config, ops);
    let mut trainer = Trainer { settings, dataset: &dataset, model, optimizer, state };
    if let Some(found) = found {
        let (model, optimizer) = (&mut trainer.model, &mut trainer.optimizer);
        trainer.state.iteration = state::restore(&settings.out, &found, &trainer.state, model, optimizer)?;
        tell(Event::Note(format!("continuing after {} iterations", trainer.state.iteration)));
    } else if settings.resume {
        tell(Event::Note(format!("no checkpoint in `{}` yet: starting anew", settings.out.display())));
    }

    let started = Instant::now();
    trainer.run(&mut tell)?;
    let training_seconds = started.elapsed().as_secs_f64();
    let started = Instant::now();
    let total = dataset.val.len();
    let scores = match trainer.is_done() {
        true => {
            let folder = settings.predictions.as_deref();
            let shown = |done| tell(Event::Judged { done, total });
            Some(judge::judge(&trainer.model, &dataset, &settings.config, folder, shown)?)
        }
        false => None,
    };
    let report = SegmentReport {
        ending: if scores.is_some() { Ending::Done } else { Ending::Interrupted },
        scores,
        weights: settings.weights.clone(),
        encoder: description,
        data: settings.data.clone(),
        train_images: dataset.train.len(),
        val_images: total,
        iterations: trainer.state.iteration,
        config: settings.config.clone(),
        run: settings.out.clone(),
        training_seconds,
        judging_seconds: started.elapsed().as_secs_f64(),
    };
    if report.scores.is_some() {
        let path = settings.out.join(RESULT);
        let text = serde_json::to_vec_pretty(&report)
            .map_err(|error| SegmentError::Write { path: path.clone(), source: error.into() })?;
        checkpoint::write_atomically(&path, &text)?;
    }
    Ok(report)
}

#[cfg(test)]
mod tests;
