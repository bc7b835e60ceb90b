//! Weights of others -> one safetensors file with timm's names.
//!
//! | file | job |
//! |---|---|
//! | `onnx` | the ONNX format: nodes, initializers, the graph they form |
//! | `dinov2` | which of them is which tensor of a DINOv2 backbone |
//! | `error` | what can go wrong |

mod dinov2;
mod error;
mod onnx;

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde::Serialize;

pub use error::{ImportError, Problem};

use crate::checkpoint::write_atomically;

/// The largest message protobuf allows.
const LARGEST_FILE: u64 = (1 << 31) - 1;

/// What the weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// A DINOv2 backbone of the Python package `transformers`, exported to ONNX, with or without a decoder behind it.
    Dinov2Onnx,
}

/// Everything `import` needs.
#[derive(Clone, Debug)]
pub struct ImportSettings {
    /// The file with the foreign weights.
    pub source: PathBuf,
    /// What it is.
    pub from: Origin,
    /// The safetensors file to write.
    pub out: PathBuf,
}

/// The sizes found in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Backbone {
    /// Embedding width D.
    pub dim: usize,
    /// Transformer blocks.
    pub depth: usize,
    /// Attention heads.
    pub heads: usize,
    /// Hidden width of the MLPs.
    pub hidden: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Side, in patches, of the square grid whose position embeddings are learned.
    pub grid: usize,
    /// Register tokens.
    pub registers: usize,
}

/// What was written.
#[derive(Clone, Debug, Serialize)]
pub struct Imported {
    /// The file.
    pub file: PathBuf,
    /// What the weights come from.
    pub from: Origin,
    /// The sizes found.
    pub backbone: Backbone,
    /// Tensors of the backbone in the source that were used.
    pub used: usize,
    /// Tensors of the backbone in the source.
    pub found: usize,
    /// Tensors of the source that are no part of the backbone.
    pub left_out: Vec<String>,
    /// Tensors written.
    pub tensors: usize,
    /// Values written.
    pub values: usize,
    /// How to load the file with timm.
    pub usage: String,
}

/// A tensor under its new name.
#[derive(Debug)]
struct Weight {
    name: String,
    shape: Vec<usize>,
    values: Vec<f32>,
}

/// The weights of a source, with what was found on the way.
#[derive(Debug)]
struct Weights {
    backbone: Backbone,
    tensors: Vec<Weight>,
    used: usize,
    found: usize,
    left_out: Vec<String>,
}

/// Reads foreign weights and writes them with timm's names.
///
/// # Errors
/// [`ImportError`], with nothing written: any tensor of the backbone that is missing, of another shape or not understood.
pub fn run(settings: &ImportSettings) -> Result<Imported, ImportError> {
    let path = &settings.source;
    let file = read(path)?;
    let weights = match settings.from {
        Origin::Dinov2Onnx => onnx::Graph::decode(file.into()).and_then(|graph| dinov2::read(&graph)),
    }
    .map_err(|source| ImportError::Content { path: path.clone(), source })?;
    let usage = usage(&weights.backbone);
    write(&weights, &usage, &settings.out)?;
    Ok(Imported {
        file: settings.out.clone(),
        from: settings.from,
        backbone: weights.backbone,
        used: weights.used,
        found: weights.found,
        tensors: weights.tensors.len(),
        values: weights.tensors.iter().map(|tensor| tensor.values.len()).sum(),
        left_out: weights.left_out,
        usage,
    })
}

/// The whole file; never more than a file of the format can have, even from a pipe without end.
fn read(path: &Path) -> Result<Vec<u8>, ImportError> {
    let mut bytes = Vec::new();
    let opened = File::open(path).and_then(|file| file.take(LARGEST_FILE + 1).read_to_end(&mut bytes));
    let length = opened.map_err(|source| ImportError::Read { path: path.into(), source })? as u64;
    if length > LARGEST_FILE {
        return Err(ImportError::TooLarge { path: path.into(), bytes: length, limit: LARGEST_FILE });
    }
    Ok(bytes)
}

/// The call that makes timm's module for these weights.
fn usage(backbone: &Backbone) -> String {
    let Backbone { dim, depth, heads, hidden, patch_size, grid, registers } = *backbone;
    let registers = if registers == 0 { String::new() } else { format!("reg_tokens={registers}, ") };
    format!(
        "VisionTransformer(img_size={}, patch_size={patch_size}, embed_dim={dim}, depth={depth}, num_heads={heads}, \
         mlp_ratio={}, init_values=1.0, {registers}num_classes=0)",
        grid * patch_size,
        hidden as f64 / dim as f64,
    )
}

fn write(weights: &Weights, usage: &str, out: &Path) -> Result<(), ImportError> {
    let unusable = |source| ImportError::SafeTensors { path: out.into(), source };
    let bytes: Vec<Vec<u8>> = (weights.tensors.iter())
        .map(|tensor| tensor.values.iter().flat_map(|value| value.to_le_bytes()).collect())
        .collect();
    let mut views = Vec::with_capacity(bytes.len());
    for (tensor, bytes) in weights.tensors.iter().zip(&bytes) {
        let view = TensorView::new(Dtype::F32, tensor.shape.clone(), bytes).map_err(unusable)?;
        views.push((tensor.name.as_str(), view));
    }
    let metadata = HashMap::from([
        ("format".into(), "pt".into()),
        ("heads".into(), weights.backbone.heads.to_string()),
        ("patch_size".into(), weights.backbone.patch_size.to_string()),
        ("timm".into(), usage.to_owned()),
    ]);
    let file = safetensors::serialize(views, Some(metadata)).map_err(unusable)?;
    write_atomically(out, &file).map_err(|source| ImportError::Write { path: out.into(), source })
}

#[cfg(test)]
mod tests;
