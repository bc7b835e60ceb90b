//! Where a run begins: fresh, from given weights, or from a checkpoint.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::Device;
use serde::{Deserialize, Serialize};

use super::CONFIG;
use super::error::TrainError;
use super::guard::CollapseGuard;
use super::state::RunState;
use super::trainer::Trainer;
use crate::checkpoint::{self, CHECKPOINTS, Checkpoint};
use crate::config::run::{Resume, RunSettings};
use crate::data::index::ImageIndex;
use crate::metrics::METRICS;
use crate::model::Architecture;
use crate::model::parameters::{Parameters, Role};

/// The beginning of a run.
pub struct Start {
    /// Networks, centers, moments.
    pub trainer: Trainer,
    /// Where the run stands.
    pub place: Place,
    /// What the person should know.
    pub remarks: Vec<String>,
}

/// Where a run stands.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Place {
    /// Steps already done.
    pub step: u64,
    /// Images of the endless sequence that are used.
    pub cursor: u64,
    /// The checkpoint it came from.
    pub checkpoint: Option<PathBuf>,
    /// Signs of collapse carried over.
    pub guard: Option<CollapseGuard>,
    /// Non-finite steps in a row carried over.
    pub skipped: usize,
}

/// The hash of an image list as it stands in checkpoints.
pub fn data_hash(index: &ImageIndex) -> String {
    format!("{:016x}", index.manifest_hash())
}

impl Start {
    /// The checkpoint that `settings` want to continue from.
    pub fn checkpoint(settings: &RunSettings) -> Result<Option<Checkpoint>, TrainError> {
        let found = match &settings.resume {
            Resume::None => None,
            Resume::Auto => checkpoint::open_latest(&settings.out.join(CHECKPOINTS))?,
            Resume::From(path) => {
                let nothing = || TrainError::NothingToResume { path: path.clone() };
                Some(checkpoint::open_at(path)?.ok_or_else(nothing)?)
            }
        };
        let exists = [METRICS, CONFIG].iter().any(|name| settings.out.join(name).exists());
        if exists && settings.resume == Resume::None {
            return Err(TrainError::RunExists { run: settings.out.clone() });
        }
        Ok(found)
    }

    /// A new run: fresh weights, or those of `--init`.
    pub fn fresh(settings: &RunSettings) -> Result<Self, TrainError> {
        let (config, device) = (&settings.config, &settings.compute.device);
        let mut remarks = Vec::new();
        let student = match &settings.init {
            None => Trainer::fresh_student(config, device)?,
            Some(path) => {
                let student = initial_weights(settings, path, device)?;
                let count = student.iter().count();
                remarks.push(format!("starting from `{}`: {count} of {count} tensors", path.display()));
                student
            }
        };
        let trainer = Trainer::new(config, student, device)?;
        Ok(Self { trainer, place: Place::default(), remarks })
    }

    /// The beginning that rank 0 finds, on every rank.
    pub fn on_all_ranks(
        settings: &RunSettings,
        find: impl FnOnce() -> Result<Self, TrainError>,
    ) -> Result<Self, TrainError> {
        let ranks = &settings.ranks;
        let own = ranks.first(find)?;
        let place = ranks.share(own.as_ref().map(|own| own.place.clone()))?;
        let (trainer, remarks) = own.map_or((None, Vec::new()), |own| (Some(own.trainer), own.remarks));
        let trainer = Trainer::on_all_ranks(trainer, ranks, &settings.config, &settings.compute.device)?;
        Ok(Self { trainer: trainer.among(ranks), place, remarks })
    }

    /// The run that `checkpoint` was written by, if configuration and images are still the same.
    pub fn resumed(
        settings: &RunSettings,
        index: &ImageIndex,
        checkpoint: &Checkpoint,
    ) -> Result<Self, TrainError> {
        let config = &settings.config;
        let state: RunState = checkpoint.state()?;
        let run = || checkpoint.path().to_owned();
        let differences = config.resume_differences(&state.config);
        if !differences.is_empty() {
            let tell =
                |(key, stored, now): (String, String, String)| format!("`{key}` was {stored}, is {now}");
            let differences = differences.into_iter().map(tell).collect();
            return Err(TrainError::OtherConfig { run: run(), differences });
        }
        let order = config.order(index.len(), settings.ranks.size());
        // before there were ranks, a checkpoint counted the images of whole batches only
        let (batch, cursor) = match state.batch {
            0 => (state.config.optim.batch as u64, order.cursor(state.step)),
            batch => (batch, state.cursor),
        };
        let (own, stored) = (config.optim.batch, state.config.optim.batch);
        if order.batch != batch && own != stored {
            let tell =
                |part: usize, all: u64| format!("{part} ({} ranks, {all} images a step)", all / part as u64);
            let differences =
                vec![format!("`optim.batch` was {}, is {}", tell(stored, batch), tell(own, order.batch))];
            return Err(TrainError::OtherConfig { run: run(), differences });
        }
        let found = data_hash(index);
        if found != state.data_hash {
            return Err(TrainError::OtherData { run: run(), expected: state.data_hash, found });
        }
        let mut remarks: Vec<String> = checkpoint
            .rejected()
            .iter()
            .map(|rejected| format!("warning: checkpoint passed over: {rejected}"))
            .collect();
        remarks.push(format!("continuing after step {} (`{}`)", state.step, checkpoint.path().display()));
        if order.batch != batch {
            remarks.push(format!(
                "warning: {batch} images a step before, {} from now on, because there are {} ranks: the learning rate and \
                 the number of steps follow; the order of the images goes on",
                order.batch,
                settings.ranks.size()
            ));
        }
        let trainer = Trainer::from_checkpoint(config, checkpoint, &settings.compute.device)?;
        let (guard, checkpoint) = (Some(state.guard), Some(run()));
        let place = Place { step: state.step, cursor, checkpoint, guard, skipped: state.skipped };
        Ok(Self { trainer, place, remarks })
    }
}

/// `--init`: the student of a run or checkpoint, or a safetensors file with all tensors of the network.
fn initial_weights(settings: &RunSettings, path: &Path, device: &Device) -> Result<Parameters, TrainError> {
    let tensors: HashMap<_, _> = checkpoint::weights_at(path, "student", device)?.into_iter().collect();
    let architecture = Architecture::from_config(&settings.config);
    Parameters::from_tensors(&architecture, Role::Student, &tensors, device)
        .map_err(|source| TrainError::Init { path: path.into(), source })
}
