//! Trained weights from wherever they are: a run, one of its checkpoints, or an exported file.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};

use super::Architecture;
use super::parameters::LoadError;
use super::weights_file::WeightsFile;
use crate::checkpoint::{self, CheckpointError};
use crate::config::TrainConfig;
use crate::config::run::Network;
use crate::train::state::RunState;

/// Metadata keys of an exported file.
const KEYS: [&str; 6] =
    ["pass.dim", "pass.depth", "pass.heads", "pass.patch_size", "pass.grid", "pass.normalization"];

/// Why weights cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// Nothing there.
    #[error("no weights at `{path}`")]
    NotFound {
        /// The path given.
        path: PathBuf,
    },
    /// A run without a checkpoint.
    #[error("run `{path}` has no checkpoint yet")]
    NoCheckpoint {
        /// The run.
        path: PathBuf,
    },
    /// The file is not readable.
    #[error("cannot read `{path}`")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Not a safetensors file.
    #[error("`{path}` is not a safetensors file: {reason}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What the reader said.
        reason: String,
    },
    /// The file does not say what network it belongs to.
    #[error("`{path}`: metadata `{key}`: expected {expected}, found {found}")]
    Metadata {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What belongs there.
        expected: &'static str,
        /// What is there.
        found: String,
    },
    /// The checkpoint is damaged.
    #[error("cannot use the checkpoint of `{path}`")]
    Checkpoint {
        /// The run or checkpoint.
        path: PathBuf,
        /// Why.
        #[source]
        source: CheckpointError,
    },
    /// The tensors are not those of the network.
    #[error("`{path}` does not hold the weights of its network")]
    Load {
        /// The file or run.
        path: PathBuf,
        /// Which tensor.
        #[source]
        source: LoadError,
    },
    /// A tensor with numbers that are none.
    #[error("`{path}`: tensor `{name}`: expected finite numbers, found NaN or infinity")]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// The tensor library refused.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl WeightsError {
    /// What to try.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotFound { .. } | Self::Format { .. } => Some(
                "give a run folder, a folder below its `checkpoints/`, or a file written by `pass-host export --to safetensors`"
                    .into(),
            ),
            Self::NoCheckpoint { .. } => {
                Some("wait for the first checkpoint (`checkpoint.every_steps`), or stop the run with Ctrl-C".into())
            }
            Self::Metadata { .. } => Some("write the file with `pass-host export RUN --to safetensors`".into()),
            Self::Checkpoint { source, .. } => source.hint(),
            Self::Load { source, .. } => source.hint(),
            Self::Io { .. } | Self::NotFinite { .. } | Self::Tensor(_) => None,
        }
    }
}

/// The part of a trained network that is used after training: backbone and aggregation head.
pub struct TrainedWeights {
    /// Sizes (those of the projection heads are unset).
    pub architecture: Architecture,
    /// Mean and standard deviation per channel that images are normalized with.
    pub normalization: ([f32; 3], [f32; 3]),
    /// Tensors by name: `backbone.…` and `ca_head.…`.
    pub tensors: HashMap<String, Tensor>,
}

impl TrainedWeights {
    /// Opens a run folder, a checkpoint folder, or an exported safetensors file.
    ///
    /// `network` chooses between the two networks of a run; an exported file holds one.
    pub fn open(path: &Path, network: Network, device: &Device) -> Result<Self, WeightsError> {
        if path.is_file() {
            return Self::read(WeightsFile::open(path)?, device);
        }
        Self::open_run(path, network, device).map(|(weights, _)| weights)
    }

    /// Opens a run folder or a checkpoint folder; its weights, and what its checkpoint says beside them.
    ///
    /// # Errors
    /// [`WeightsError`] if there is no intact checkpoint, or not the weights of its configuration in it.
    pub fn open_run(
        path: &Path,
        network: Network,
        device: &Device,
    ) -> Result<(Self, RunState), WeightsError> {
        if !path.is_dir() {
            return Err(WeightsError::NotFound { path: path.into() });
        }
        let wrap = |source| WeightsError::Checkpoint { path: path.into(), source };
        let nothing = || WeightsError::NoCheckpoint { path: path.into() };
        let checkpoint = checkpoint::open_at(path).map_err(wrap)?.ok_or_else(nothing)?;
        let state: RunState = checkpoint.state().map_err(wrap)?;
        let part = match network {
            Network::Teacher => "teacher",
            Network::Student => "student",
        };
        let tensors = checkpoint.tensors(part, device).map_err(wrap)?;
        let weights = Self::from_run(&state.config, tensors.into_iter().collect(), path)?;
        Ok((weights, state))
    }

    fn from_run(
        config: &TrainConfig,
        tensors: HashMap<String, Tensor>,
        path: &Path,
    ) -> Result<Self, WeightsError> {
        let tensors = tensors.into_iter().filter(|(name, _)| Self::uses(name)).collect();
        let Architecture { dim, depth, heads, patch_size, grid, .. } = Architecture::from_config(config);
        let architecture = Architecture::backbone_only(dim, depth, heads, patch_size, grid);
        let weights =
            Self { architecture, normalization: (config.augment.mean, config.augment.std), tensors };
        weights.checked(path)
    }

    /// Reads the tensors of a file with our own names.
    ///
    /// # Errors
    /// [`WeightsError`] for a file that does not say what network it belongs to, and for any tensor that is missing, left
    /// over or of another shape.
    pub fn read(mut file: WeightsFile, device: &Device) -> Result<Self, WeightsError> {
        let (path, metadata) = (file.path().to_owned(), file.metadata());
        let whole = |key: &'static str| {
            let found = metadata.get(key).cloned().unwrap_or_else(|| "nothing".into());
            found.parse::<usize>().ok().filter(|&value| value > 0).ok_or(WeightsError::Metadata {
                path: path.clone(),
                key,
                expected: "a positive whole number",
                found,
            })
        };
        let [dim, depth, heads, patch_size, grid] = [0, 1, 2, 3, 4].map(|index| whole(KEYS[index]));
        let (dim, heads) = (dim?, heads?);
        if dim % heads != 0 {
            return Err(WeightsError::Metadata {
                path: path.clone(),
                key: KEYS[2],
                expected: "a divisor of `pass.dim`",
                found: heads.to_string(),
            });
        }
        let found = metadata.get(KEYS[5]).cloned().unwrap_or_else(|| "nothing".into());
        let normalization: ([f32; 3], [f32; 3]) =
            serde_json::from_str(&found).map_err(|_| WeightsError::Metadata {
                path: path.clone(),
                key: KEYS[5],
                expected: "[[mean r, g, b], [std r, g, b]]",
                found,
            })?;
        let architecture = Architecture::backbone_only(dim, depth?, heads, patch_size?, grid?);
        let tensors = file.tensors(device)?;
        Self { architecture, normalization, tensors }.checked(&path)
    }

    /// Every tensor of backbone and aggregation head, of its shape, and nothing else.
    fn checked(self, path: &Path) -> Result<Self, WeightsError> {
        let fail = |source| WeightsError::Load { path: path.into(), source };
        let specification = self.specification();
        let expected = specification.len();
        let found = specification.iter().filter(|(name, _)| self.tensors.contains_key(name)).count();
        for (name, shape) in &specification {
            let Some(tensor) = self.tensors.get(name) else {
                return Err(fail(LoadError::Missing { name: name.clone(), found, expected }));
            };
            if tensor.dims() != shape {
                let (expected, found) = (shape.clone(), tensor.dims().to_vec());
                return Err(fail(LoadError::Shape { name: name.clone(), expected, found }));
            }
        }
        let mut names: Vec<_> = self.tensors.keys().collect();
        names.sort();
        match names.into_iter().find(|name| !specification.iter().any(|(known, _)| known == *name)) {
            Some(name) => Err(fail(LoadError::Unexpected { name: name.clone(), expected })),
            None => Ok(self),
        }
    }

    /// Whether the tensor `name` of a run is used after training.
    pub(super) fn uses(name: &str) -> bool {
        name.starts_with("backbone.") || name.starts_with("ca_head.")
    }

    fn specification(&self) -> Vec<(String, Vec<usize>)> {
        let all = self.architecture.specification().into_iter();
        all.filter(|spec| Self::uses(&spec.name)).map(|spec| (spec.name, spec.shape)).collect()
    }

    /// Metadata that lets [`TrainedWeights::open`] read the file back.
    pub fn metadata(&self) -> HashMap<String, String> {
        metadata(&self.architecture, &self.normalization)
    }
}

/// What a file of own names says about its network, for [`TrainedWeights::open`].
pub fn metadata(sizes: &Architecture, normalization: &([f32; 3], [f32; 3])) -> HashMap<String, String> {
    let mut metadata: HashMap<String, String> = KEYS
        .into_iter()
        .zip([sizes.dim, sizes.depth, sizes.heads, sizes.patch_size, sizes.grid])
        .map(|(key, value)| (key.to_string(), value.to_string()))
        .collect();
    let normalization = serde_json::to_string(normalization).unwrap_or_default();
    metadata.insert(KEYS[5].into(), normalization);
    metadata
}
