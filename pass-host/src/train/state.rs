//! What a checkpoint says beside its tensors, and the trainer it restores.

use std::collections::BTreeMap;
use std::hash::Hasher;

use candle_core::{Device, Tensor};
use safetensors::View;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3Default;

use super::guard::CollapseGuard;
use super::trainer::Trainer;
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::config::TrainConfig;
use crate::distributed::{DistributedError, Ranks};
use crate::model::Architecture;
use crate::model::parameters::{LoadError, Parameters, Role};
use crate::objective::forward::Objective;
use crate::optimizer::Optimizer;

/// `state.json`: everything of a run that is not a tensor.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunState {
    /// Optimizer steps done.
    pub step: u64,
    /// Passes over the images done, as a fraction.
    pub epoch: f64,
    /// Images of the endless shuffled sequence that are used, by all ranks; the next batch comes at or after this place.
    pub cursor: u64,
    /// Images of a step over all ranks; 0 if it was written by a version without ranks, whose cursor is another.
    #[serde(default)]
    pub batch: u64,
    /// The resolved configuration.
    pub config: TrainConfig,
    /// Hash of what a resumed run must share with the run it continues.
    pub config_hash: String,
    /// Hash of the sorted image list.
    pub data_hash: String,
    /// Signs of collapse and since when they last.
    pub guard: CollapseGuard,
    /// Steps skipped in a row because something was not finite.
    pub skipped: usize,
}

/// Why a checkpoint cannot be continued.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// A part is damaged or missing.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Rank 0 could not be heard.
    #[error(transparent)]
    Distributed(#[from] DistributedError),
    /// Weights of another network.
    #[error("{origin} does not fit this model")]
    Weights {
        /// Where they are from.
        origin: String,
        /// Which tensor.
        #[source]
        source: LoadError,
    },
    /// Moments or centers of another network.
    #[error("{origin} does not fit this model")]
    Tensors {
        /// Where they are from.
        origin: String,
        /// Which tensor.
        #[source]
        source: candle_core::Error,
    },
}

impl RestoreError {
    /// What to try.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Checkpoint(error) => error.hint(),
            Self::Distributed(error) => error.hint(),
            Self::Weights { source, .. } => source.hint(),
            Self::Tensors { .. } => Some(
                "resume with the configuration of the run (`RUN/config.toml`), or start a new run".into(),
            ),
        }
    }
}

/// Names of the tensor files of a checkpoint. `centers` is the state of the objective: centers, queues and their pointer.
pub const PARTS: [&str; 4] = ["student", "teacher", "optimizer", "centers"];

impl Trainer {
    /// The tensors of a checkpoint, in the order of [`PARTS`].
    pub fn to_parts(&self) -> [Vec<(String, Tensor)>; 4] {
        [
            self.student.parameters.to_tensors(),
            self.teacher.parameters.to_tensors(),
            self.optimizer.to_tensors(),
            self.state.clone().into_iter().collect(),
        ]
    }

    /// The trainer a checkpoint was written by.
    pub fn from_checkpoint(
        config: &TrainConfig,
        checkpoint: &Checkpoint,
        device: &Device,
    ) -> Result<Self, RestoreError> {
        let name = format!("checkpoint `{}`", checkpoint.path().display());
        Self::from_parts(config, device, &name, |part| Ok(checkpoint.tensors(part, device)?))
    }

    /// The trainer of rank 0, on every rank; the others have none of their own.
    pub fn on_all_ranks(
        own: Option<Self>,
        ranks: &Ranks,
        config: &TrainConfig,
        device: &Device,
    ) -> Result<Self, RestoreError> {
        match own {
            Some(trainer) if ranks.several() => {
                for part in trainer.to_parts() {
                    let tensors =
                        part.iter().map(|(name, tensor)| Ok((name, tensor.to_device(&Device::Cpu)?)));
                    let tensors =
                        tensors.collect::<candle_core::Result<Vec<_>>>().map_err(DistributedError::from)?;
                    let bytes = safetensors::serialize(tensors, None).map_err(candle_core::Error::from);
                    ranks.share_bytes(bytes.map_err(DistributedError::from)?)?;
                }
                Ok(trainer)
            }
            Some(trainer) => Ok(trainer),
            None => Self::from_parts(config, device, "what rank 0 sent", |_| {
                let bytes = ranks.share_bytes(Vec::new())?;
                let tensors = candle_core::safetensors::load_buffer(&bytes, device);
                Ok(tensors.map_err(DistributedError::from)?.into_iter().collect())
            }),
        }
    }

    /// From the tensors of [`PARTS`], asked for in that order; `source` says in errors where they are from.
    fn from_parts(
        config: &TrainConfig,
        device: &Device,
        source: &str,
        mut part: impl FnMut(&'static str) -> Result<BTreeMap<String, Tensor>, RestoreError>,
    ) -> Result<Self, RestoreError> {
        let architecture = Architecture::from_config(config);
        let mut parameters = |name, role| {
            let tensors = part(name)?.into_iter().collect();
            Parameters::from_tensors(&architecture, role, &tensors, device)
                .map_err(|error| RestoreError::Weights { origin: source.into(), source: error })
        };
        let student = parameters(PARTS[0], Role::Student)?;
        let teacher = parameters(PARTS[1], Role::Teacher)?;
        let moments = part(PARTS[2])?;
        let mut stored = part(PARTS[3])?;
        let rest = || -> candle_core::Result<Self> {
            let optimizer = Optimizer::restore(&config.optim, &student, moments, config.ops.into(), device)?;
            let mut state = Objective::from_config(config).initial_state(device)?;
            for (name, own) in &mut state {
                let Some(tensor) = stored.remove(name) else {
                    candle_core::bail!("state of the objective: `{name}` is missing");
                };
                if tensor.dims() != own.dims() || tensor.dtype() != own.dtype() {
                    candle_core::bail!(
                        "state of the objective: `{name}`: expected {:?} in {:?}, found {:?} in {:?}",
                        own.dims(),
                        own.dtype(),
                        tensor.dims(),
                        tensor.dtype()
                    );
                }
                *own = tensor.to_device(own.device())?;
            }
            Self::assemble(config, &architecture, student, teacher, state, optimizer)
        };
        rest().map_err(|error| RestoreError::Tensors { origin: source.into(), source: error })
    }

    /// A checksum of everything a checkpoint holds; ranks that train together have the same.
    pub fn checksum(&self) -> candle_core::Result<u64> {
        let mut hash = Xxh3Default::new();
        for (name, tensor) in self.to_parts().iter().flatten() {
            hash.write(name.as_bytes());
            hash.write(&tensor.to_device(&Device::Cpu)?.data());
        }
        Ok(hash.finish())
    }
}
