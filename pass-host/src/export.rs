//! Trained weights as a file for others to load.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};

use crate::checkpoint::{CheckpointError, write_atomically};
use crate::config::run::{ExportFormat, ExportSettings};
use crate::model::weights::{TrainedWeights, WeightsError};

/// What was written.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Exported {
    /// The file.
    pub file: PathBuf,
    /// Tensors in it.
    pub tensors: usize,
    /// Values in it.
    pub values: usize,
    /// How to load it.
    pub usage: String,
}

/// Why an export failed.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The weights cannot be used.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The file cannot be written.
    #[error("cannot write `{path}`")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: CheckpointError,
    },
    /// The tensor library refused.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl ExportError {
    /// What to try.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Weights(error) => error.hint(),
            Self::Write { source, .. } => source.hint(),
            Self::Tensor(_) => None,
        }
    }
}

/// Writes backbone and aggregation head of a run, a checkpoint or an exported file.
pub fn run(settings: &ExportSettings) -> Result<Exported, ExportError> {
    let out = settings.out.as_path();
    let weights = TrainedWeights::open(&settings.source, settings.network, &Device::Cpu)?;
    let sizes = &weights.architecture;
    let (tensors, metadata, usage) = match settings.to {
        ExportFormat::Safetensors => (
            weights.tensors.clone(),
            weights.metadata(),
            format!("pass-host features IMAGES --weights {}", out.display()),
        ),
        ExportFormat::Timm => {
            let side = sizes.grid * sizes.patch_size;
            let usage = format!(
                "VisionTransformer(img_size={side}, patch_size={}, embed_dim={}, depth={}, num_heads={}, \
                 class_token=False, global_pool='', num_classes=0)",
                sizes.patch_size, sizes.dim, sizes.depth, sizes.heads
            );
            let metadata = HashMap::from([("format".into(), "pt".into()), ("timm".into(), usage.clone())]);
            (timm(&weights.tensors), metadata, usage)
        }
    };
    let values = tensors.values().map(Tensor::elem_count).sum();
    let count = tensors.len();
    write(tensors, metadata, out)?;
    Ok(Exported { file: out.into(), tensors: count, values, usage })
}

/// timm's names. The final norm is that of the aggregation head, which patch tokens pass in training too; the
/// class-attention blocks have no place there and stay out.
fn timm(tensors: &HashMap<String, Tensor>) -> HashMap<String, Tensor> {
    let rename = |name: &str| match name.strip_prefix("backbone.") {
        Some(rest) => Some(rest.to_string()),
        None => name.strip_prefix("ca_head.norm.").map(|rest| format!("norm.{rest}")),
    };
    tensors.iter().filter_map(|(name, tensor)| Some((rename(name)?, tensor.clone()))).collect()
}

fn write(
    tensors: HashMap<String, Tensor>,
    metadata: HashMap<String, String>,
    out: &Path,
) -> Result<(), ExportError> {
    let mut named: Vec<(String, Tensor)> = tensors.into_iter().collect();
    named.sort_by(|a, b| a.0.cmp(&b.0));
    let named = named
        .into_iter()
        .map(|(name, tensor)| Ok((name, tensor.contiguous()?)))
        .collect::<candle_core::Result<Vec<_>>>()?;
    let bytes = safetensors::serialize(named, Some(metadata))
        .map_err(|error| candle_core::Error::Msg(format!("safetensors: {error}")))?;
    write_atomically(out, &bytes).map_err(|source| ExportError::Write { path: out.into(), source })
}
