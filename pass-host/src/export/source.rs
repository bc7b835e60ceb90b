//! The network that is exported, wherever its weights come from.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Device, Tensor};

use super::ExportError;
use crate::config::run::Network;
use crate::model::Architecture;
use crate::model::pos_embed::{PositionEmbedding, ResizeRule};
use crate::model::timm::{IMAGENET, OptionalParts, TimmVit};
use crate::model::weights::TrainedWeights;
use crate::model::weights_file::{Names, WeightsFile};
use crate::train::state::RunState;

/// A backbone with all that belongs to it.
pub(super) struct Source {
    /// Sizes.
    pub(super) architecture: Architecture,
    /// Hidden width of the MLPs.
    pub(super) hidden: usize,
    /// Class token, registers.
    pub(super) parts: OptionalParts,
    /// Mean and standard deviation per channel (RGB, of values in `[0, 1]`).
    pub(super) normalization: ([f32; 3], [f32; 3]),
    /// How positions of other grids are made.
    pub(super) positions: ResizeRule,
    /// `backbone.…`, and `ca_head.…` for own weights. LayerScale is folded, the class token has its position.
    pub(super) tensors: HashMap<String, Tensor>,
    /// The run it comes from.
    pub(super) run: Option<RunState>,
}

impl Source {
    /// Opens a run, a checkpoint, or a file of `export` or `import`; `heads` for files that do not tell.
    ///
    /// # Errors
    /// [`ExportError`] for weights that cannot be read, and for a ResNet.
    pub(super) fn open(path: &Path, network: Network, heads: Option<usize>) -> Result<Self, ExportError> {
        let device = Device::Cpu;
        if !path.is_file() {
            let (weights, run) = TrainedWeights::open_run(path, network, &device)?;
            return Self::own(weights, Some(run));
        }
        let file = WeightsFile::open(path)?;
        match file.names() {
            Names::Own => Self::own(TrainedWeights::read(file, &device)?, None),
            Names::Timm => {
                let TimmVit { architecture, positions, tensors, parts, .. } =
                    TimmVit::read(file, heads, &device)?;
                let hidden = hidden(&tensors)?;
                let normalization = IMAGENET;
                Ok(Self { architecture, hidden, parts, normalization, positions, tensors, run: None })
            }
            Names::ResNet => Err(ExportError::ResNet { path: path.into() }),
        }
    }

    fn own(weights: TrainedWeights, run: Option<RunState>) -> Result<Self, ExportError> {
        let TrainedWeights { architecture, normalization, tensors } = weights;
        let (hidden, parts) = (hidden(&tensors)?, OptionalParts::default());
        Ok(Self { architecture, hidden, parts, normalization, positions: ResizeRule::Offset, tensors, run })
    }

    /// Whether there is an aggregation head, which holds the class token of own weights.
    pub(super) fn has_aggregation(&self) -> bool {
        self.tensors.contains_key("ca_head.cls_token")
    }

    /// Tokens before the patches.
    pub(super) fn prefix_tokens(&self) -> usize {
        usize::from(self.parts.class_token) + self.parts.registers
    }

    /// Whether the features of patches are those behind a norm.
    pub(super) fn has_final_norm(&self) -> bool {
        self.tensors.contains_key("backbone.norm.weight")
    }

    /// The tensor of that name.
    pub(super) fn tensor(&self, name: &str) -> Result<&Tensor, ExportError> {
        find(&self.tensors, name)
    }

    /// Its values, row-major.
    pub(super) fn values(&self, name: &str) -> Result<Vec<f32>, ExportError> {
        Ok(self.tensor(name)?.flatten_all()?.to_vec1()?)
    }

    /// Positions of a grid of patches `(rows, columns)`, `[N, D]`, as the features use them.
    pub(super) fn positions_of(&self, grid: (usize, usize)) -> Result<Vec<f32>, ExportError> {
        let positions = PositionEmbedding::new(self.tensor("backbone.pos_embed")?.clone(), self.positions)?;
        Ok(positions.resized(grid)?.flatten_all()?.to_vec1()?)
    }
}

fn find<'t>(tensors: &'t HashMap<String, Tensor>, name: &str) -> Result<&'t Tensor, ExportError> {
    tensors.get(name).ok_or_else(|| candle_core::Error::Msg(format!("tensor `{name}` is missing")).into())
}

fn hidden(tensors: &HashMap<String, Tensor>) -> Result<usize, ExportError> {
    Ok(find(tensors, "backbone.blocks.0.mlp.fc1.weight")?.dim(0)?)
}
