//! Weights of others -> one safetensors file: timm's names for Vision Transformers with a class token, own names for
//! SelfPatch, torchvision's for ResNet-50. Nothing in a file is ever executed.
//!
//! | file | job |
//! |---|---|
//! | `origin` | where each released file keeps its backbone |
//! | `vit`, `resnet` | which tensors a backbone has, and their shapes |
//! | `tensor_file` | values of named tensors; safetensors |
//! | `torch`, `zip`, `pickle` | files of `torch.save`, their archive, their description of the tensors |
//! | `onnx` | the ONNX format: nodes, initializers, the graph they form |
//! | `dinov2` | which of them is which tensor of a DINOv2 backbone |
//! | `error` | what can go wrong |

mod dinov2;
mod error;
mod onnx;
mod origin;
mod pickle;
mod resnet;
mod tensor_file;
mod torch;
mod vit;
mod zip;

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde::Serialize;

pub use error::{ImportError, Problem};
pub use origin::Origin;
pub use pickle::PickleError;

use crate::checkpoint::write_atomically;
use crate::config::run::Network;
use crate::model::resnet::ResNetSizes;
use origin::Family;
use tensor_file::TensorFile;

/// The largest message protobuf allows.
const LARGEST_FILE: u64 = (1 << 31) - 1;

/// Everything `import` needs.
#[derive(Clone, Debug)]
pub struct ImportSettings {
    /// The file with the foreign weights.
    pub source: PathBuf,
    /// What it is.
    pub from: Origin,
    /// The safetensors file to write.
    pub out: PathBuf,
    /// Which of the networks of the file; nothing = the one its method evaluates.
    pub network: Option<Network>,
    /// Attention heads; nothing = as the origin has them.
    pub heads: Option<usize>,
    /// Side, in patches, that position embeddings are resized to; nothing = they stay.
    pub grid: Option<usize>,
}

/// The sizes found in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Sizes {
    /// A Vision Transformer.
    Vit(Backbone),
    /// A ResNet-50.
    ResNet(ResNetSizes),
}

/// The sizes of a Vision Transformer.
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
    /// Whether it has a class token.
    pub class_token: bool,
    /// Whether it has LayerScale.
    pub layer_scale: bool,
    /// Whether it has a norm behind the last block.
    pub final_norm: bool,
}

/// What was written.
#[derive(Clone, Debug, Serialize)]
pub struct Imported {
    /// The file.
    pub file: PathBuf,
    /// What the weights come from.
    pub from: Origin,
    /// The sizes found.
    pub backbone: Sizes,
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
    /// What was made of tensors that were not taken as they are.
    pub notes: Vec<String>,
    /// How to load the file.
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
    backbone: Sizes,
    tensors: Vec<Weight>,
    used: usize,
    found: usize,
    left_out: Vec<String>,
    notes: Vec<String>,
    metadata: HashMap<String, String>,
    usage: String,
}

/// Reads foreign weights and writes them as one safetensors file.
///
/// # Errors
/// [`ImportError`], with nothing written: any tensor of the backbone that is missing, of another shape or not understood.
pub fn run(settings: &ImportSettings) -> Result<Imported, ImportError> {
    let path = &settings.source;
    let content = |source| ImportError::Content { path: path.clone(), from: settings.from, source };
    let weights = match settings.from {
        Origin::Dinov2Onnx => {
            let file = read(path)?;
            from_onnx(file, settings).map_err(content)?
        }
        _ => from_tensors(settings).map_err(content)?,
    };
    write(&weights, &settings.out)?;
    Ok(Imported {
        file: settings.out.clone(),
        from: settings.from,
        backbone: weights.backbone,
        used: weights.used,
        found: weights.found,
        tensors: weights.tensors.len(),
        values: weights.tensors.iter().map(|tensor| tensor.values.len()).sum(),
        left_out: weights.left_out,
        notes: weights.notes,
        usage: weights.usage,
    })
}

fn from_onnx(file: Vec<u8>, settings: &ImportSettings) -> Result<Weights, Problem> {
    let flags = [
        ("--network", settings.network.is_some()),
        ("--heads", settings.heads.is_some()),
        ("--grid", settings.grid.is_some()),
    ];
    match flags.into_iter().find(|(_, given)| *given) {
        Some((flag, _)) => Err(Problem::Flag { flag, reason: "an ONNX file tells all there is to know" }),
        None => onnx::Graph::decode(file.into()).and_then(|graph| dinov2::read(&graph)),
    }
}

fn from_tensors(settings: &ImportSettings) -> Result<Weights, Problem> {
    let mut file = TensorFile::open(&settings.source)?;
    let selected = origin::select(&file, settings.from, settings.network)?;
    match settings.from.family() {
        Family::Vit | Family::SelfPatch => vit::read(&mut file, selected, settings),
        Family::ResNet => resnet::read(&mut file, selected, settings),
    }
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

/// What a file with timm's names says about itself.
fn timm_metadata(backbone: &Backbone) -> HashMap<String, String> {
    HashMap::from([
        ("format".into(), "pt".into()),
        ("heads".into(), backbone.heads.to_string()),
        ("patch_size".into(), backbone.patch_size.to_string()),
        ("timm".into(), usage(backbone)),
    ])
}

/// The call that makes timm's module for these weights.
fn usage(backbone: &Backbone) -> String {
    let Backbone { dim, depth, heads, hidden, patch_size, grid, registers, .. } = *backbone;
    let mut more = String::new();
    if backbone.layer_scale {
        more += "init_values=1.0, ";
    }
    if registers > 0 {
        more += &format!("reg_tokens={registers}, ");
    }
    if !backbone.class_token {
        more += "class_token=False, global_pool='', ";
    }
    if !backbone.final_norm {
        more += "final_norm=False, ";
    }
    format!(
        "VisionTransformer(img_size={}, patch_size={patch_size}, embed_dim={dim}, depth={depth}, num_heads={heads}, \
         mlp_ratio={}, {more}num_classes=0)",
        grid * patch_size,
        hidden as f64 / dim as f64,
    )
}

fn write(weights: &Weights, out: &Path) -> Result<(), ImportError> {
    let unusable = |source| ImportError::SafeTensors { path: out.into(), source };
    let bytes: Vec<Vec<u8>> = (weights.tensors.iter())
        .map(|tensor| tensor.values.iter().flat_map(|value| value.to_le_bytes()).collect())
        .collect();
    let mut views = Vec::with_capacity(bytes.len());
    for (tensor, bytes) in weights.tensors.iter().zip(&bytes) {
        let view = TensorView::new(Dtype::F32, tensor.shape.clone(), bytes).map_err(unusable)?;
        views.push((tensor.name.as_str(), view));
    }
    let file = safetensors::serialize(views, Some(weights.metadata.clone())).map_err(unusable)?;
    write_atomically(out, &file).map_err(|source| ImportError::Write { path: out.into(), source })
}

#[cfg(test)]
mod tests;
