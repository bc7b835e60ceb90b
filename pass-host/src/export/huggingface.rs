//! Folders of transformers: `config.json`, `model.safetensors`, `preprocessor_config.json`.
//!
//! `IJepaModel` is a Vision Transformer without class token and takes own weights as they are. `ViTModel` always has one, which
//! every patch attends to. A backbone that was trained without is written for it with a class token that cannot be seen:
//!
//! - Every head gets one more channel, in which all queries hold [`GATE`] and keys hold 0, but the class token's −[`GATE`]: its
//!   scores lie [`GATE`]² below those of all patches, and softmax makes zeros of them.
//! - The key finds the class token by channels of the residual stream, one a head, that are zero for patches and [`MARK`] for it.
//! - LayerNorm over more channels is the same for the old ones if their mean is zero (it takes it off anyway, so every map into the
//!   stream is centered) and their scale accounts for the zeros, epsilon included.
//!
//! So `last_hidden_state[:, 1:, :D]` is the LayerNorm of the features, channels from D on are zero, and the class token of
//! `ViTModel` means nothing. Backbones with a class token are written as they are.

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use super::ExportError;
use super::source::Source;
use super::timm;
use crate::model::LAYER_NORM_EPS;

/// What queries hold in the added channel, and the class token's key with the other sign.
const GATE: f64 = 16.0;
/// What the class token holds in the added channels of the residual stream: far more than blocks add to others.
const MARK: f64 = 1e4;
/// `PIL.Image.BICUBIC`
const BICUBIC: u8 = 3;

/// Files of a folder.
pub(super) struct Folder {
    /// `config.json`
    pub(super) config: Value,
    /// `preprocessor_config.json`
    pub(super) preprocessor: Value,
    /// `model.safetensors`
    pub(super) tensors: Vec<(String, Tensor)>,
}

/// For `ViTModel`.
///
/// # Errors
/// For parts that it does not have: registers, no final norm.
pub(super) fn vit(source: &Source) -> Result<Folder, ExportError> {
    check(source)?;
    let sizes = &source.architecture;
    match source.parts.class_token {
        true => folder(source, "ViTModel", "vit", sizes.dim, LAYER_NORM_EPS, timm::tensors(source)?),
        false => {
            let width = sizes.dim + sizes.heads;
            let epsilon = LAYER_NORM_EPS * sizes.dim as f64 / width as f64;
            folder(source, "ViTModel", "vit", width, epsilon, with_hidden_class_token(source)?)
        }
    }
}

/// For `IJepaModel`.
///
/// # Errors
/// For parts that it does not have: prefix tokens, no final norm.
pub(super) fn ijepa(source: &Source) -> Result<Folder, ExportError> {
    check(source)?;
    if source.parts.class_token {
        return Err(ExportError::Unsupported { format: "huggingface-ijepa", what: "a class token" });
    }
    folder(source, "IJepaModel", "ijepa", source.architecture.dim, LAYER_NORM_EPS, timm::tensors(source)?)
}

fn check(source: &Source) -> Result<(), ExportError> {
    let what = match (source.parts.registers, timm::final_norm(source)) {
        (0, Some(_)) => return Ok(()),
        (0, None) => "a backbone without final norm",
        _ => "register tokens",
    };
    Err(ExportError::Unsupported { format: "huggingface", what })
}

fn folder(
    source: &Source,
    class: &str,
    kind: &str,
    width: usize,
    epsilon: f64,
    tensors: Vec<(String, Tensor)>,
) -> Result<Folder, ExportError> {
    let sizes = &source.architecture;
    let side = sizes.grid * sizes.patch_size;
    let (mean, std) = source.normalization;
    let config = json!({
        "architectures": [class],
        "model_type": kind,
        "hidden_size": width,
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": sizes.heads,
        "intermediate_size": source.hidden,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": epsilon,
        "image_size": side,
        "patch_size": sizes.patch_size,
        "num_channels": 3,
        "qkv_bias": true,
    });
    let preprocessor = json!({
        "image_processor_type": "ViTImageProcessor",
        "do_resize": true,
        "size": { "height": side, "width": side },
        "resample": BICUBIC,
        "do_rescale": true,
        "rescale_factor": 1.0 / 255.0,
        "do_normalize": true,
        "image_mean": mean,
        "image_std": std,
    });
    let mut renamed = Vec::new();
    for (name, tensor) in tensors {
        renamed.extend(rename(&name, tensor)?);
    }
    Ok(Folder { config, preprocessor, tensors: renamed })
}

/// A tensor of timm's by the names of transformers: queries, keys and values are three.
fn rename(name: &str, tensor: Tensor) -> Result<Vec<(String, Tensor)>, ExportError> {
    let name = match name.split('.').collect::<Vec<_>>()[..] {
        ["blocks", block, "attn", "qkv", part] => {
            let parts = tensor.chunk(3, 0)?.into_iter().zip(["query", "key", "value"]);
            let layer = format!("encoder.layer.{block}.attention.attention");
            return Ok(parts.map(|(tensor, which)| (format!("{layer}.{which}.{part}"), tensor)).collect());
        }
        ["patch_embed", "proj", part] => format!("embeddings.patch_embeddings.projection.{part}"),
        ["cls_token"] => "embeddings.cls_token".into(),
        ["pos_embed"] => "embeddings.position_embeddings".into(),
        ["blocks", block, "norm1", part] => format!("encoder.layer.{block}.layernorm_before.{part}"),
        ["blocks", block, "norm2", part] => format!("encoder.layer.{block}.layernorm_after.{part}"),
        ["blocks", block, "attn", "proj", part] => {
            format!("encoder.layer.{block}.attention.output.dense.{part}")
        }
        ["blocks", block, "mlp", "fc1", part] => format!("encoder.layer.{block}.intermediate.dense.{part}"),
        ["blocks", block, "mlp", "fc2", part] => format!("encoder.layer.{block}.output.dense.{part}"),
        ["norm", part] => format!("layernorm.{part}"),
        _ => name.to_owned(),
    };
    Ok(vec![(name, tensor)])
}

/// Tensors by timm's names of the backbone with a class token that no patch sees.
fn with_hidden_class_token(source: &Source) -> Result<Vec<(String, Tensor)>, ExportError> {
    let sizes = &source.architecture;
    let (dim, heads) = (sizes.dim, sizes.heads);
    let scale = (dim as f64 / (dim + heads) as f64).sqrt();
    let added = |value: f64| Tensor::full(value as f32, heads, &Device::Cpu);
    let mut widened = Vec::new();
    for (name, tensor) in timm::tensors(source)? {
        let tensor = match name.split('.').collect::<Vec<_>>()[..] {
            ["patch_embed", "proj", _] => zeros_behind(&centered(&tensor, 0)?, 0, heads)?,
            ["pos_embed"] => {
                let positions = zeros_behind(&centered(&tensor, 2)?, 2, heads)?;
                Tensor::cat(&[&positions.narrow(1, 0, 1)?.zeros_like()?, &positions], 1)?
            }
            ["blocks", _, "norm1", "weight"] => Tensor::cat(&[&(tensor * scale)?, &added(1.0)?], 0)?,
            [.., "norm2", "weight"] | ["norm", "weight"] => zeros_behind(&(tensor * scale)?, 0, heads)?,
            [.., "norm1" | "norm2" | "norm", "bias"] => zeros_behind(&tensor, 0, heads)?,
            ["blocks", _, "attn", "qkv", part] => gated(&tensor, part == "weight", dim, heads)?,
            ["blocks", _, "attn", "proj", "weight"] => {
                let by_head = centered(&tensor, 0)?.reshape((dim, heads, dim / heads))?;
                zeros_behind(&zeros_behind(&by_head, 2, 1)?.flatten_from(1)?, 0, heads)?
            }
            [.., "fc1", "weight"] => zeros_behind(&tensor, 1, heads)?,
            [.., "fc1", "bias"] => tensor,
            // maps into the residual stream
            _ => zeros_behind(&centered(&tensor, 0)?, 0, heads)?,
        };
        widened.push((name, tensor));
    }
    let nothing = Tensor::zeros(dim, DType::F32, &Device::Cpu)?;
    let class = Tensor::cat(&[&nothing, &added(MARK)?], 0)?;
    widened.push(("cls_token".into(), class.reshape((1, 1, dim + heads))?));
    Ok(widened)
}

/// Queries, keys and values `[3·D, D]` (or their bias) with the added channel behind each head.
fn gated(tensor: &Tensor, weight: bool, dim: usize, heads: usize) -> Result<Tensor, ExportError> {
    let d = dim / heads;
    let columns = if weight { dim } else { 1 };
    let parts = tensor.reshape((3, heads, d, columns))?;
    // transformers divides by the root of the new width
    let queries = (parts.get(0)? * ((d + 1) as f64 / d as f64).sqrt())?;
    let row = |value: f64| Tensor::full(value as f32, (heads, 1, columns), &Device::Cpu);
    let rows = [row(if weight { 0.0 } else { GATE })?, row(0.0)?, row(0.0)?];
    let parts = [queries, parts.get(1)?, parts.get(2)?];
    let mut joined = Vec::new();
    for (part, (old, row)) in parts.iter().zip(&rows).enumerate() {
        let rows = Tensor::cat(&[old, row], 1)?.reshape((heads * (d + 1), columns))?;
        joined.push(match weight {
            false => rows.flatten_all()?,
            true => Tensor::cat(&[&rows, &marks(part == 1, d, heads)?], 1)?,
        });
    }
    Ok(Tensor::cat(&joined, 0)?)
}

/// Columns for the added channels of the residual stream, `[heads·(d + 1), heads]`: in the added channel of a head's key, the mark
/// of that head.
fn marks(key: bool, d: usize, heads: usize) -> Result<Tensor, ExportError> {
    let mut values = vec![0_f32; heads * (d + 1) * heads];
    if key {
        // the LayerNorm of the marks is √d
        let value = -GATE / (d as f64).sqrt() * ((d + 1) as f64).sqrt();
        for head in 0..heads {
            values[(head * (d + 1) + d) * heads + head] = value as f32;
        }
    }
    Ok(Tensor::from_vec(values, (heads * (d + 1), heads), &Device::Cpu)?)
}

/// `tensor` minus its mean over `axis`.
fn centered(tensor: &Tensor, axis: usize) -> Result<Tensor, ExportError> {
    let exact = tensor.to_dtype(DType::F64)?;
    Ok(exact.broadcast_sub(&exact.mean_keepdim(axis)?)?.to_dtype(DType::F32)?)
}

/// `tensor` with `count` zeros more on `axis`.
fn zeros_behind(tensor: &Tensor, axis: usize, count: usize) -> Result<Tensor, ExportError> {
    Ok(tensor.pad_with_zeros(axis, 0, count)?)
}
