//! Float networks to be quantized, from own weights and from files with timm's names.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use ndarray::{Array1, Array2};
use pass_edge::format::{Architecture, Normalization};

use super::QuantizeError;
use super::float_vit::{Block, FloatVit, Linear, Norm};
use crate::config::run::Network;
use crate::model::pos_embed::{PositionEmbedding, ResizeRule};
use crate::model::timm::{IMAGENET, OptionalParts, TimmVit};
use crate::model::weights::TrainedWeights;
use crate::model::weights_file::{Names, WeightsFile};

/// A network and how it was read.
pub(super) struct Source {
    /// The network.
    pub(super) vit: FloatVit,
    /// One sentence for the person: tensors, resized positions.
    pub(super) notes: Vec<String>,
}

/// The tensors of a backbone, whose names and shapes were checked when they were read.
struct Tensors(HashMap<String, Tensor>);

impl Tensors {
    fn values(&self, name: &str) -> Result<Vec<f32>, QuantizeError> {
        match self.0.get(&format!("backbone.{name}")) {
            Some(tensor) => Ok(tensor.flatten_all()?.to_vec1()?),
            None => Err(candle_core::Error::Msg(format!("tensor `{name}` is missing")).into()),
        }
    }

    fn vector(&self, name: &str) -> Result<Array1<f32>, QuantizeError> {
        self.values(name).map(Array1::from_vec)
    }

    /// `[outputs, the rest]`
    fn linear(&self, name: &str) -> Result<Linear, QuantizeError> {
        let bias = self.vector(&format!("{name}.bias"))?;
        let weight = self.values(&format!("{name}.weight"))?;
        Ok(Linear { weight: shaped(bias.len(), weight.len() / bias.len(), weight), bias })
    }

    fn norm(&self, name: &str) -> Result<Norm, QuantizeError> {
        Ok(Norm {
            weight: self.vector(&format!("{name}.weight"))?,
            bias: self.vector(&format!("{name}.bias"))?,
        })
    }

    fn has(&self, name: &str) -> bool {
        self.0.contains_key(&format!("backbone.{name}"))
    }

    fn block(&self, block: usize) -> Result<Block, QuantizeError> {
        let name = |part: &str| format!("blocks.{block}.{part}");
        Ok(Block {
            norm1: self.norm(&name("norm1"))?,
            qkv: self.linear(&name("attn.qkv"))?,
            proj: self.linear(&name("attn.proj"))?,
            norm2: self.norm(&name("norm2"))?,
            fc1: self.linear(&name("mlp.fc1"))?,
            fc2: self.linear(&name("mlp.fc2"))?,
        })
    }
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
    let file = if path.is_file() { Some(WeightsFile::open(path)?) } else { None };
    if let Some(file) = file.filter(|file| file.names() == Names::Timm) {
        let file = TimmVit::read(file, heads, &Device::Cpu)?;
        let note = format!("{0} of {0} tensors (timm's names)", file.count);
        let options = Options { size, normalization: IMAGENET, rule: file.positions };
        return read(Tensors(file.tensors), &file.architecture, file.parts, note, &options);
    }
    let own = TrainedWeights::open(path, network, &Device::Cpu)?;
    let tensors =
        Tensors(own.tensors.into_iter().filter(|(name, _)| name.starts_with("backbone.")).collect());
    let note = format!("{0} of {0} tensors (own names, backbone)", tensors.0.len());
    let options = Options { size, normalization: own.normalization, rule: ResizeRule::Offset };
    read(tensors, &own.architecture, OptionalParts::default(), note, &options)
}

/// What the tensors do not tell.
struct Options {
    size: Option<(usize, usize)>,
    normalization: ([f32; 3], [f32; 3]),
    rule: ResizeRule,
}

fn read(
    tensors: Tensors,
    sizes: &crate::model::Architecture,
    parts: OptionalParts,
    note: String,
    options: &Options,
) -> Result<Source, QuantizeError> {
    let (dim, patch_size) = (sizes.dim, sizes.patch_size);
    let mut notes = vec![note];
    let grid = grid(options.size, patch_size, sizes.grid)?;
    if grid != (sizes.grid, sizes.grid) {
        notes.push(format!("positions resized from {0}x{0} to {1}x{2}", sizes.grid, grid.0, grid.1));
    }
    let positions = tensors.values("pos_embed")?;
    let positions = Tensor::from_vec(positions, (1, sizes.grid * sizes.grid, dim), &Device::Cpu)?;
    let positions = PositionEmbedding::new(positions, options.rule)?.resized(grid)?;
    let positions = shaped(grid.0 * grid.1, dim, positions.flatten_all()?.to_vec1()?);
    let prefix_tokens = match parts.class_token || parts.registers > 0 {
        true => tensors.values("prefix_tokens")?,
        false => Vec::new(),
    };
    let blocks: Vec<_> = (0..sizes.depth).map(|block| tensors.block(block)).collect::<Result<_, _>>()?;
    let norm = if tensors.has("norm.weight") { Some(tensors.norm("norm")?) } else { None };
    let architecture = Architecture {
        dim: dim as u32,
        depth: sizes.depth as u32,
        heads: sizes.heads as u32,
        hidden: blocks.first().map_or(0, |block| block.fc1.bias.len()) as u32,
        patch_size: patch_size as u32,
        grid: (grid.0 as u32, grid.1 as u32),
        class_token: parts.class_token,
        register_tokens: parts.registers as u32,
        final_norm: norm.is_some(),
        layer_scale_folded: parts.layer_scale,
        pca_components: super::PCA_COMPONENTS as u32,
    };
    architecture.validate()?;
    let (mean, std) = options.normalization;
    let mut vit = FloatVit {
        architecture,
        normalization: Normalization { mean, std },
        patch: tensors.linear("patch_embed.proj")?,
        positions,
        prefix: shaped(prefix_tokens.len() / dim, dim, prefix_tokens),
        blocks,
        norm,
    };
    vit.fold_normalization();
    Ok(Source { vit, notes })
}

/// Patches `(rows, columns)` of an image of this size, or of the crops it was trained on.
fn grid(
    size: Option<(usize, usize)>,
    patch_size: usize,
    trained: usize,
) -> Result<(usize, usize), QuantizeError> {
    let Some((height, width)) = size else { return Ok((trained, trained)) };
    let fits = |side: usize| side > 0 && side.is_multiple_of(patch_size);
    match fits(height) && fits(width) {
        true => Ok((height / patch_size, width / patch_size)),
        false => Err(QuantizeError::Size { height, width, patch_size }),
    }
}

/// A matrix of values whose number is known to fit.
fn shaped(rows: usize, columns: usize, values: Vec<f32>) -> Array2<f32> {
    Array2::from_shape_vec((rows, columns), values).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::encoder::{Encoder, EncoderOptions};

    /// A small network with class token, registers, LayerScale and final norm.
    fn timm_file(path: &Path) {
        let (dim, hidden, registers, grid, patch) = (32, 48, 2, 3, 4);
        let mut shapes = vec![
            ("patch_embed.proj.weight".to_owned(), vec![dim, 3, patch, patch]),
            ("patch_embed.proj.bias".into(), vec![dim]),
            ("pos_embed".into(), vec![1, grid * grid + 1, dim]),
            ("cls_token".into(), vec![1, 1, dim]),
            ("reg_token".into(), vec![1, registers, dim]),
            ("norm.weight".into(), vec![dim]),
            ("norm.bias".into(), vec![dim]),
        ];
        for block in 0..2 {
            let layers: [(&str, Vec<usize>); 8] = [
                ("norm1", vec![dim]),
                ("norm2", vec![dim]),
                ("attn.qkv", vec![3 * dim, dim]),
                ("attn.proj", vec![dim, dim]),
                ("mlp.fc1", vec![hidden, dim]),
                ("mlp.fc2", vec![dim, hidden]),
                ("ls1.gamma", vec![dim]),
                ("ls2.gamma", vec![dim]),
            ];
            for (layer, shape) in layers {
                let name = format!("blocks.{block}.{layer}");
                if layer.starts_with("ls") {
                    shapes.push((name, shape));
                    continue;
                }
                shapes.push((format!("{name}.bias"), shape[..1].to_vec()));
                shapes.push((format!("{name}.weight"), shape));
            }
        }
        let mut state = 1_u32;
        let tensors: HashMap<_, _> = shapes
            .into_iter()
            .map(|(name, shape)| {
                let values = (0..shape.iter().product()).map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    0.3 * ((state >> 8) as f32 / 8_388_608.0 - 1.0)
                });
                (name, Tensor::from_iter(values, &Device::Cpu).unwrap().reshape(shape).unwrap())
            })
            .collect();
        candle_core::safetensors::save(&tensors, path).unwrap();
    }

    #[test]
    fn the_folded_network_has_the_features_of_the_encoder() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vit.safetensors");
        timm_file(&path);
        let (height, width) = (16, 20); // 4 x 5 patches, positions of 3 x 3
        let vit = open(&path, Network::Teacher, Some((height, width)), Some(2)).unwrap().vit;
        let planes: Vec<u8> = (0..3 * height * width).map(|index| (index * 7919 % 251) as u8).collect();
        let folded = vit.forward(&planes);

        let options = EncoderOptions { heads: Some(2), ..EncoderOptions::default() };
        let encoder = Encoder::open(path.to_str().unwrap(), &options, &Device::Cpu).unwrap();
        let (mean, std) = encoder.normalization();
        let pixels = planes.iter().enumerate().map(|(index, value)| {
            let channel = index / (height * width);
            (f32::from(*value) / 255.0 - mean[channel]) / std[channel]
        });
        let images = Tensor::from_iter(pixels, &Device::Cpu).unwrap().reshape((1, 3, height, width)).unwrap();
        let found = encoder.patch_features(&images).unwrap();
        assert_eq!(found.grid, (4, 5));
        let found: Vec<f32> = found.features.flatten_all().unwrap().to_vec1().unwrap();
        let class: Vec<f32> =
            encoder.class_features(&images).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let folded: Vec<f32> = folded.iter().copied().collect();
        assert_eq!(found.len(), 20 * 32);
        for (index, (a, b)) in found.iter().chain(&class).zip(&folded).enumerate() {
            assert!((a - b).abs() < 2e-4, "value {index}: {a} and {b}");
        }
    }
}
