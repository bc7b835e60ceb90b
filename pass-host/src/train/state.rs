//! What a checkpoint says beside its tensors, and the trainer it restores.

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::guard::CollapseGuard;
use super::trainer::Trainer;
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::config::TrainConfig;
use crate::model::Architecture;
use crate::model::parameters::{LoadError, Parameters, Role};
use crate::objective::center::Centers;
use crate::optimizer::Optimizer;

/// `state.json`: everything of a run that is not a tensor.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunState {
    /// Optimizer steps done.
    pub step: u64,
    /// Passes over the images done, as a fraction.
    pub epoch: f64,
    /// Images consumed; position `cursor` of the endless shuffled sequence comes next.
    pub cursor: u64,
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
    /// Weights of another network.
    #[error("checkpoint `{checkpoint}` does not fit this model")]
    Weights {
        /// The checkpoint folder.
        checkpoint: String,
        /// Which tensor.
        #[source]
        source: LoadError,
    },
    /// Moments or centers of another network.
    #[error("checkpoint `{checkpoint}` does not fit this model")]
    Tensors {
        /// The checkpoint folder.
        checkpoint: String,
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
            Self::Weights { source, .. } => source.hint(),
            Self::Tensors { .. } => Some(
                "resume with the configuration of the run (`RUN/config.toml`), or start a new run".into(),
            ),
        }
    }
}

/// Names of the tensor files of a checkpoint.
pub const PARTS: [&str; 4] = ["student", "teacher", "optimizer", "centers"];

impl Trainer {
    /// The tensors of a checkpoint, in the order of [`PARTS`].
    pub fn to_parts(&self) -> [Vec<(String, Tensor)>; 4] {
        let mut centers = vec![("class".to_string(), self.centers.class.clone())];
        centers.extend(self.centers.patch.clone().map(|patch| ("patch".to_string(), patch)));
        [
            self.student.parameters.to_tensors(),
            self.teacher.parameters.to_tensors(),
            self.optimizer.to_tensors(),
            centers,
        ]
    }

    /// The trainer a checkpoint was written by.
    pub fn from_checkpoint(
        config: &TrainConfig,
        checkpoint: &Checkpoint,
        device: &Device,
    ) -> Result<Self, RestoreError> {
        let name = checkpoint.path().display().to_string();
        let architecture = Architecture::from_config(config);
        let parameters = |part: &str, role| {
            let tensors: HashMap<_, _> = checkpoint.tensors(part, device)?.into_iter().collect();
            Parameters::from_tensors(&architecture, role, &tensors, device)
                .map_err(|source| RestoreError::Weights { checkpoint: name.clone(), source })
        };
        let student = parameters(PARTS[0], Role::Student)?;
        let teacher = parameters(PARTS[1], Role::Teacher)?;
        let moments = checkpoint.tensors(PARTS[2], device)?;
        let mut stored = checkpoint.tensors(PARTS[3], device)?;
        let rest = || -> candle_core::Result<Self> {
            let optimizer = Optimizer::restore(&config.optim, &student, moments, config.ops.into(), device)?;
            let mut centers = Centers::new(&architecture, device)?;
            let mut fill = |name: &str, center: &mut Tensor| match stored.remove(name) {
                Some(tensor) if tensor.dims() == center.dims() => {
                    *center = tensor;
                    Ok(())
                }
                Some(tensor) => candle_core::bail!(
                    "center `{name}`: expected {:?}, found {:?}",
                    center.dims(),
                    tensor.dims()
                ),
                None => candle_core::bail!("center `{name}` is missing"),
            };
            fill("class", &mut centers.class)?;
            if let Some(patch) = &mut centers.patch {
                fill("patch", patch)?;
            }
            Self::assemble(config, &architecture, student, teacher, centers, optimizer)
        };
        rest().map_err(|source| RestoreError::Tensors { checkpoint: name.clone(), source })
    }
}
