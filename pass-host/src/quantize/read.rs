//! Float networks to be quantized, from own weights and from files with timm's names.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::{Device, Tensor};
use ndarray::{Array1, Array2, Axis, concatenate, s};
use pass_edge::format::{Architecture, Normalization};
use safetensors::{Dtype, SafeTensors};

use super::QuantizeError;
use super::float_vit::{Block, FloatVit, Linear, Norm};
use crate::config::run::Network;
use crate::model::pos_embed::{PositionEmbedding, ResizeRule};
use crate::model::weights::TrainedWeights;

/// ImageNet statistics, which files with timm's names are trained with.
const IMAGENET: Normalization = Normalization { mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225] };
/// Channels of an attention head where a file does not tell.
const USUAL_HEAD: usize = 64;

/// A network and how it was read.
pub(super) struct Source {
    /// The network.
    pub(super) vit: FloatVit,
    /// One sentence for the person: tensors, resized positions.
    pub(super) notes: Vec<String>,
}

/// Tensors by name, taken out one by one: what is left at the end was not expected.
struct Tensors<'p> {
    path: &'p Path,
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    count: usize,
    taken: usize,
}

impl Tensors<'_> {
    /// The values of `name`, which must have this shape, axes of length 1 apart.
    fn take(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, QuantizeError> {
        let (found, values) = self.tensors.remove(name).ok_or_else(|| QuantizeError::Missing {
            path: self.path.into(),
            name: name.into(),
            found: self.taken,
        })?;
        let long = |shape: &[usize]| shape.iter().copied().filter(|axis| *axis != 1).collect::<Vec<_>>();
        if long(&found) != long(shape) {
            return Err(QuantizeError::Shape {
                path: self.path.into(),
                name: name.into(),
                expected: shape.to_vec(),
                found,
            });
        }
        self.taken += 1;
        match values.iter().all(|value| value.is_finite()) {
            true => Ok(values),
            false => Err(QuantizeError::NotFinite { path: self.path.into(), name: name.into() }),
        }
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Array1<f32>, QuantizeError> {
        self.take(name, &[len]).map(Array1::from_vec)
    }

    fn matrix(&mut self, name: &str, rows: usize, columns: usize) -> Result<Array2<f32>, QuantizeError> {
        let values = self.take(name, &[rows, columns])?;
        Ok(shaped(rows, columns, values))
    }

    fn linear(&mut self, name: &str, outputs: usize, inputs: usize) -> Result<Linear, QuantizeError> {
        Ok(Linear {
            weight: self.matrix(&format!("{name}.weight"), outputs, inputs)?,
            bias: self.vector(&format!("{name}.bias"), outputs)?,
        })
    }

    fn norm(&mut self, name: &str, dim: usize) -> Result<Norm, QuantizeError> {
        Ok(Norm {
            weight: self.vector(&format!("{name}.weight"), dim)?,
            bias: self.vector(&format!("{name}.bias"), dim)?,
        })
    }

    /// The length of an axis of a tensor that must be there.
    fn axis(&self, name: &str, axis: usize) -> Result<usize, QuantizeError> {
        let missing = || QuantizeError::Missing { path: self.path.into(), name: name.into(), found: 0 };
        let (shape, _) = self.tensors.get(name).ok_or_else(missing)?;
        shape.get(axis).copied().filter(|length| *length > 0).ok_or_else(|| QuantizeError::Shape {
            path: self.path.into(),
            name: name.into(),
            expected: vec![0; axis + 1],
            found: shape.clone(),
        })
    }

    /// LayerScale, folded into the map before it.
    fn fold_layer_scale(&mut self, name: &str, linear: &mut Linear) -> Result<bool, QuantizeError> {
        if !self.tensors.contains_key(name) {
            return Ok(false);
        }
        let scale = self.vector(name, linear.bias.len())?;
        linear.bias *= &scale;
        linear.weight *= &scale.insert_axis(Axis(1));
        Ok(true)
    }
}

/// What a file does not tell by its tensors.
struct Known {
    heads: Option<usize>,
    normalization: Normalization,
    rule: ResizeRule,
    names: &'static str,
}

/// Opens own weights (a run, a checkpoint, an exported file) or a safetensors file with timm's names.
///
/// - `size`: height and width of the images; `None` = as in training.
/// - `heads`: attention heads, for files that do not tell.
///
/// # Errors
/// [`QuantizeError`] for weights that cannot be read, and for sizes that do not fit.
pub(super) fn open(
    path: &Path,
    network: Network,
    size: Option<(usize, usize)>,
    heads: Option<usize>,
) -> Result<Source, QuantizeError> {
    if let Some((tensors, told)) = timm_tensors(path)? {
        let known = Known {
            heads: heads.or(told),
            normalization: IMAGENET,
            rule: ResizeRule::Size,
            names: "timm's names",
        };
        return read(tensors, &known, size);
    }
    let weights = TrainedWeights::open(path, network, &Device::Cpu)?;
    let (mean, std) = weights.normalization;
    let known = Known {
        heads: Some(weights.architecture.heads),
        normalization: Normalization { mean, std },
        rule: ResizeRule::Offset,
        names: "own names, backbone",
    };
    let mut tensors = BTreeMap::new();
    for (name, tensor) in &weights.tensors {
        if let Some(name) = name.strip_prefix("backbone.") {
            let values = tensor.flatten_all()?.to_vec1()?;
            tensors.insert(name.to_owned(), (tensor.dims().to_vec(), values));
        }
    }
    let count = tensors.len();
    read(Tensors { path, tensors, count, taken: 0 }, &known, size)
}

/// The tensors of a safetensors file with timm's names, and the heads it tells of; nothing for other weights.
fn timm_tensors(path: &Path) -> Result<Option<(Tensors<'_>, Option<usize>)>, QuantizeError> {
    if !path.is_file() {
        return Ok(None);
    }
    let bytes = fs::read(path).map_err(|source| QuantizeError::Read { path: path.into(), source })?;
    let Ok(file) = SafeTensors::deserialize(&bytes) else { return Ok(None) };
    if !file.names().contains(&"patch_embed.proj.weight") {
        return Ok(None);
    }
    let refused = |reason: String| QuantizeError::Format { path: path.into(), reason };
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|error| refused(error.to_string()))?;
    let heads = header.metadata().as_ref().and_then(|metadata| metadata.get("heads")?.parse().ok());
    let mut tensors = BTreeMap::new();
    for (name, view) in file.tensors() {
        if view.dtype() != Dtype::F32 {
            return Err(refused(format!("tensor `{name}`: expected F32, found {:?}", view.dtype())));
        }
        let values = view.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        tensors.insert(name, (view.shape().to_vec(), values));
    }
    let count = tensors.len();
    Ok(Some((Tensors { path, tensors, count, taken: 0 }, heads)))
}

fn read(
    mut tensors: Tensors<'_>,
    known: &Known,
    size: Option<(usize, usize)>,
) -> Result<Source, QuantizeError> {
    let dim = tensors.axis("patch_embed.proj.weight", 0)?;
    let patch_size = tensors.axis("patch_embed.proj.weight", 3)?;
    let hidden = tensors.axis("blocks.0.mlp.fc1.weight", 0)?;
    let has = |tensors: &Tensors<'_>, name: &str| tensors.tensors.contains_key(name);
    let depth = (0..).take_while(|block| has(&tensors, &format!("blocks.{block}.norm1.weight"))).count();
    let class_token = has(&tensors, "cls_token");
    let registers = if has(&tensors, "reg_token") { tensors.axis("reg_token", 1)? } else { 0 };
    let all_positions = tensors.axis("pos_embed", 1)?;
    let mut positions = tensors.matrix("pos_embed", all_positions, dim)?;
    let mut prefix = Array2::zeros((0, dim));
    if class_token {
        prefix = tensors.matrix("cls_token", 1, dim)?;
        // its position comes first, unless the positions are a square without it
        if all_positions.isqrt().pow(2) != all_positions {
            prefix += &positions.slice(s![..1, ..]);
            positions = positions.slice(s![1.., ..]).to_owned();
        }
    }
    if registers > 0 {
        let tokens = tensors.matrix("reg_token", registers, dim)?;
        prefix = concatenate![Axis(0), prefix, tokens];
    }
    let mut notes = Vec::new();
    let grid = grid(size, patch_size, positions.nrows())?;
    if grid.0 * grid.1 != positions.nrows() {
        let side = positions.nrows().isqrt();
        notes.push(format!("positions resized from {side}x{side} to {}x{}", grid.0, grid.1));
    }
    let positions = resized(&positions, grid, known.rule)?;
    let patch_weight = tensors.take("patch_embed.proj.weight", &[dim, 3, patch_size, patch_size])?;
    let patch = Linear {
        weight: shaped(dim, 3 * patch_size * patch_size, patch_weight),
        bias: tensors.vector("patch_embed.proj.bias", dim)?,
    };
    let (mut blocks, mut layer_scale) = (Vec::new(), false);
    for block in 0..depth {
        let name = |part: &str| format!("blocks.{block}.{part}");
        let mut read = read_block(&mut tensors, &name, dim, hidden)?;
        layer_scale |= tensors.fold_layer_scale(&name("ls1.gamma"), &mut read.proj)?;
        layer_scale |= tensors.fold_layer_scale(&name("ls2.gamma"), &mut read.fc2)?;
        blocks.push(read);
    }
    let norm = if has(&tensors, "norm.weight") { Some(tensors.norm("norm", dim)?) } else { None };
    if let Some(name) = tensors.tensors.keys().next() {
        return Err(QuantizeError::Unexpected { path: tensors.path.into(), name: name.clone() });
    }
    notes.insert(0, format!("{} of {} tensors ({})", tensors.taken, tensors.count, known.names));
    let architecture = Architecture {
        dim: dim as u32,
        depth: depth as u32,
        heads: known.heads.unwrap_or(dim / USUAL_HEAD).max(1) as u32,
        hidden: hidden as u32,
        patch_size: patch_size as u32,
        grid: (grid.0 as u32, grid.1 as u32),
        class_token,
        register_tokens: registers as u32,
        final_norm: norm.is_some(),
        layer_scale_folded: layer_scale,
        pca_components: super::PCA_COMPONENTS as u32,
    };
    architecture.validate()?;
    let normalization = known.normalization;
    let mut vit = FloatVit { architecture, normalization, patch, positions, prefix, blocks, norm };
    vit.fold_normalization();
    Ok(Source { vit, notes })
}

/// Patches `(rows, columns)` of an image of this size, or of the positions of the file.
fn grid(
    size: Option<(usize, usize)>,
    patch_size: usize,
    positions: usize,
) -> Result<(usize, usize), QuantizeError> {
    let Some((height, width)) = size else { return Ok((positions.isqrt(), positions.isqrt())) };
    let fits = |side: usize| side > 0 && side.is_multiple_of(patch_size);
    match fits(height) && fits(width) {
        true => Ok((height / patch_size, width / patch_size)),
        false => Err(QuantizeError::Size { height, width, patch_size }),
    }
}

fn resized(
    positions: &Array2<f32>,
    grid: (usize, usize),
    rule: ResizeRule,
) -> Result<Array2<f32>, QuantizeError> {
    let (rows, dim) = positions.dim();
    let tensor = Tensor::from_iter(positions.iter().copied(), &Device::Cpu)?.reshape((1, rows, dim))?;
    let resized = PositionEmbedding::new(tensor, rule)?.resized(grid)?;
    Ok(shaped(grid.0 * grid.1, dim, resized.flatten_all()?.to_vec1()?))
}

/// A matrix of values whose number is known to fit.
fn shaped(rows: usize, columns: usize, values: Vec<f32>) -> Array2<f32> {
    Array2::from_shape_vec((rows, columns), values).unwrap_or_default()
}

fn read_block(
    tensors: &mut Tensors<'_>,
    name: &dyn Fn(&str) -> String,
    dim: usize,
    hidden: usize,
) -> Result<Block, QuantizeError> {
    Ok(Block {
        norm1: tensors.norm(&name("norm1"), dim)?,
        qkv: tensors.linear(&name("attn.qkv"), 3 * dim, dim)?,
        proj: tensors.linear(&name("attn.proj"), dim, dim)?,
        norm2: tensors.norm(&name("norm2"), dim)?,
        fc1: tensors.linear(&name("mlp.fc1"), hidden, dim)?,
        fc2: tensors.linear(&name("mlp.fc2"), dim, hidden)?,
    })
}
