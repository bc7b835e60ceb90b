//! Where a run begins: fresh, from given weights, or from a checkpoint.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::Device;

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
    /// Steps already done.
    pub step: u64,
    /// The checkpoint it came from.
    pub checkpoint: Option<PathBuf>,
    /// Signs of collapse carried over.
    pub guard: Option<CollapseGuard>,
    /// Non-finite steps in a row carried over.
    pub skipped: usize,
    /// What the person should know.
    pub remarks: Vec<String>,
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
        Ok(Self { trainer, step: 0, checkpoint: None, guard: None, skipped: 0, remarks })
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
        let trainer = Trainer::from_checkpoint(config, checkpoint, &settings.compute.device)?;
        Ok(Self {
            trainer,
            step: state.step,
            checkpoint: Some(run()),
            guard: Some(state.guard),
            skipped: state.skipped,
            remarks,
        })
    }
}

/// `--init`: the student of a run or checkpoint, or a safetensors file with all tensors of the network.
fn initial_weights(settings: &RunSettings, path: &Path, device: &Device) -> Result<Parameters, TrainError> {
    let tensors: HashMap<_, _> = checkpoint::weights_at(path, "student", device)?.into_iter().collect();
    let architecture = Architecture::from_config(&settings.config);
    Parameters::from_tensors(&architecture, Role::Student, &tensors, device)
        .map_err(|source| TrainError::Init { path: path.into(), source })
}
