//! Vision Transformers with timm's names: every tensor by name and shape, all sizes from the tensors.

use candle_core::{Device, Tensor};

use super::error::Problem;
use super::origin::{Family, Origin, Selected};
use super::tensor_file::{Entries, Entry, TensorFile};
use super::{Backbone, ImportSettings, Sizes, Weight, Weights};
use crate::model::Architecture;
use crate::model::pos_embed::{PositionEmbedding, ResizeRule};
use crate::model::timm::IMAGENET;
use crate::model::weights::metadata;

/// Width of an attention head in every released network but those of MoCo v3.
const HEAD_DIM: usize = 64;
/// Heads of ViT-S and ViT-B of MoCo v3, and of its larger ones, with the width from which they are meant.
const MOCO_V3_HEADS: (usize, usize, usize) = (12, 16, 1024);
/// Side in pixels of the images that released networks were trained on.
const TRAINED_SIZE: usize = 224;
/// Base of the wavelengths of sine and cosine positions.
const TEMPERATURE: f64 = 10_000.0;

const PATCH_WEIGHT: &str = "patch_embed.proj.weight";
const POSITIONS: &str = "pos_embed";

/// Tensors, taken one by one: what is left at the end was not expected.
struct Reader<'a> {
    file: &'a mut TensorFile,
    entries: Entries,
    prefix: String,
    tensors: Vec<Weight>,
}

/// The Vision Transformer among the selected tensors.
///
/// A SelfPatch backbone has neither class token nor final norm; with its aggregation head the names are this project's own.
pub(super) fn read(
    file: &mut TensorFile,
    selected: Selected,
    settings: &ImportSettings,
) -> Result<Weights, Problem> {
    let origin = settings.from;
    let found = selected.entries.len();
    let Selected { entries, prefix, left_out } = selected;
    let own = |name: &String| name.starts_with("backbone.") || name.starts_with("ca_head.");
    let whole = origin.family() == Family::SelfPatch && entries.keys().any(own);
    let mut reader = Reader { file, entries, prefix, tensors: Vec::new() };
    let start = if whole { "backbone." } else { "" };
    let mut backbone = reader.sizes(start, origin)?;
    backbone.heads = heads(backbone.dim, settings)?;
    let mut notes = Vec::new();

    reader.backbone(start, &backbone, origin)?;
    if whole {
        reader.aggregation_head(&backbone)?;
    }
    if let Some(name) = reader.entries.keys().next() {
        return Err(Problem::NotUnderstood { name: format!("{}{name}", reader.prefix) });
    }
    let used = reader.tensors.len();
    let mut tensors = reader.tensors;

    if origin == Origin::MocoV3 && !tensors.iter().any(|tensor| tensor.name == POSITIONS) {
        let values = sine_cosine(backbone.grid, backbone.dim);
        let shape = vec![1, 1 + backbone.grid.pow(2), backbone.dim];
        tensors.push(Weight { name: POSITIONS.into(), shape, values });
        notes.push(format!("position embeddings computed: {0}x{0}, sine and cosine", backbone.grid));
    }
    let rule = if origin == Origin::Timm { ResizeRule::Size } else { ResizeRule::Offset };
    if let Some(grid) = settings.grid.filter(|grid| *grid != backbone.grid) {
        let name = format!("{start}{POSITIONS}");
        for tensor in tensors.iter_mut().filter(|tensor| tensor.name == name) {
            resize(tensor, backbone.grid, grid, rule)?;
        }
        notes.push(format!(
            "position embeddings resized from {0}x{0} to {grid}x{grid}, bicubic",
            backbone.grid
        ));
        backbone.grid = grid;
    }

    let (metadata, usage) = if whole {
        let Backbone { dim, depth, heads, patch_size, grid, .. } = backbone;
        let architecture = Architecture::backbone_only(dim, depth, heads, patch_size, grid);
        let usage = format!("pass-host features IMAGES --weights {}", settings.out.display());
        (metadata(&architecture, &IMAGENET), usage)
    } else {
        let mut metadata = super::timm_metadata(&backbone);
        let rule = if rule == ResizeRule::Size { "size" } else { "offset" };
        metadata.insert("positions".into(), rule.into());
        (metadata, super::usage(&backbone))
    };
    Ok(Weights { backbone: Sizes::Vit(backbone), tensors, used, found, left_out, notes, metadata, usage })
}

impl Reader<'_> {
    /// All sizes but the heads, which no shape tells.
    fn sizes(&self, start: &str, origin: Origin) -> Result<Backbone, Problem> {
        let axes = |name: &str, rank: usize| {
            let name = format!("{start}{name}");
            let entry = self.entries.get(&name).ok_or_else(|| self.missing(&name))?;
            match entry.shape.len() == rank && !entry.shape.contains(&0) {
                true => Ok(entry.shape.clone()),
                false => Err(self.differs(&name, "axes", &rank.to_string(), entry)),
            }
        };
        let patches = axes(PATCH_WEIGHT, 4)?;
        let (dim, patch_size) = (patches[0], patches[3]);
        let hidden = axes("blocks.0.mlp.fc1.weight", 2)?[0];
        let has = |name: &str| self.entries.contains_key(&format!("{start}{name}"));
        let class_token = match origin {
            Origin::Selfpatch => false,
            Origin::Timm => has("cls_token"),
            _ => true,
        };
        let registers = if has("reg_token") { axes("reg_token", 3)?[1] } else { 0 };
        let grid = if origin == Origin::MocoV3 && !has(POSITIONS) {
            (TRAINED_SIZE / patch_size).max(1)
        } else {
            let positions = axes(POSITIONS, 3)?[1];
            // the class token has a position, unless the positions are a square without it
            let side = (positions - usize::from(class_token)).isqrt();
            match positions.isqrt() {
                plain if plain * plain == positions => plain,
                _ => side,
            }
        };
        Ok(Backbone {
            dim,
            depth: self.depth(&format!("{start}blocks."))?,
            heads: 0,
            hidden,
            patch_size,
            grid,
            registers,
            class_token,
            layer_scale: has("blocks.0.ls1.gamma"),
            final_norm: origin != Origin::Selfpatch,
        })
    }

    /// The number of blocks, which are numbered without a gap.
    fn depth(&self, start: &str) -> Result<usize, Problem> {
        let index = |name: &String| name.strip_prefix(start)?.split('.').next()?.parse::<usize>().ok();
        let last = self.entries.keys().filter_map(index).max();
        let depth = last.map_or(0, |last| last + 1);
        // a number out of all proportion is a name that is not understood, found at the end
        Ok(depth.min(self.entries.len()))
    }

    /// Takes all tensors of the backbone.
    fn backbone(&mut self, start: &str, sizes: &Backbone, origin: Origin) -> Result<(), Problem> {
        let Backbone { dim, depth, hidden, patch_size, grid, registers, .. } = *sizes;
        if sizes.class_token {
            self.take(&format!("{start}cls_token"), &[1, 1, dim])?;
        }
        if registers > 0 {
            self.take(&format!("{start}reg_token"), &[1, registers, dim])?;
        }
        let name = format!("{start}{POSITIONS}");
        if origin != Origin::MocoV3 || self.entries.contains_key(&name) {
            let without = origin == Origin::Timm
                && self.entries.get(&name).is_some_and(|entry| entry.shape.get(1) == Some(&(grid * grid)));
            let positions = grid * grid + usize::from(sizes.class_token && !without);
            self.take(&name, &[1, positions, dim])?;
        }
        self.take(&format!("{start}{PATCH_WEIGHT}"), &[dim, 3, patch_size, patch_size])?;
        self.take(&format!("{start}patch_embed.proj.bias"), &[dim])?;
        for index in 0..depth {
            let block = format!("{start}blocks.{index}");
            self.norm(&format!("{block}.norm1"), dim)?;
            self.linear(&format!("{block}.attn.qkv"), dim, 3 * dim)?;
            self.linear(&format!("{block}.attn.proj"), dim, dim)?;
            self.norm(&format!("{block}.norm2"), dim)?;
            self.linear(&format!("{block}.mlp.fc1"), dim, hidden)?;
            self.linear(&format!("{block}.mlp.fc2"), hidden, dim)?;
            if sizes.layer_scale {
                self.take(&format!("{block}.ls1.gamma"), &[dim])?;
                self.take(&format!("{block}.ls2.gamma"), &[dim])?;
            }
        }
        if sizes.final_norm {
            self.norm(&format!("{start}norm"), dim)?;
        }
        Ok(())
    }

    /// Takes the aggregation head of SelfPatch.
    fn aggregation_head(&mut self, sizes: &Backbone) -> Result<(), Problem> {
        let Backbone { dim, depth, heads, patch_size, grid, .. } = *sizes;
        let architecture = Architecture::backbone_only(dim, depth, heads.max(1), patch_size, grid);
        let specification = architecture.specification().into_iter();
        for tensor in specification.filter(|tensor| tensor.name.starts_with("ca_head.")) {
            self.take(&tensor.name, &tensor.shape)?;
        }
        Ok(())
    }

    fn norm(&mut self, name: &str, dim: usize) -> Result<(), Problem> {
        self.take(&format!("{name}.weight"), &[dim])?;
        self.take(&format!("{name}.bias"), &[dim])
    }

    fn linear(&mut self, name: &str, inputs: usize, outputs: usize) -> Result<(), Problem> {
        self.take(&format!("{name}.weight"), &[outputs, inputs])?;
        self.take(&format!("{name}.bias"), &[outputs])
    }

    /// Reads the tensor `name`, which must have this shape.
    fn take(&mut self, name: &str, shape: &[usize]) -> Result<(), Problem> {
        let Some(entry) = self.entries.remove(name) else { return Err(self.missing(name)) };
        if entry.shape != shape {
            return Err(self.differs(name, "shape", &format!("{shape:?}"), &entry));
        }
        let values = self.file.read(&format!("{}{name}", self.prefix), &entry)?;
        self.tensors.push(Weight { name: name.into(), shape: shape.to_vec(), values });
        Ok(())
    }

    fn missing(&self, name: &str) -> Problem {
        Problem::Missing { name: format!("{}{name}", self.prefix) }
    }

    fn differs(&self, name: &str, field: &'static str, expected: &str, entry: &Entry) -> Problem {
        Problem::unexpected(&format!("{}{name}", self.prefix), field, expected, format!("{:?}", entry.shape))
    }
}

/// Attention heads: as asked for, or as the origin has them.
fn heads(dim: usize, settings: &ImportSettings) -> Result<usize, Problem> {
    let (few, many, large) = MOCO_V3_HEADS;
    let usual = match settings.from {
        Origin::MocoV3 if dim < large => few,
        Origin::MocoV3 => many,
        _ if dim.is_multiple_of(HEAD_DIM) => dim / HEAD_DIM,
        _ => 0,
    };
    let heads = settings.heads.unwrap_or(usual);
    match heads > 0 && dim.is_multiple_of(heads) {
        true => Ok(heads),
        false => Err(Problem::Heads { dim, heads }),
    }
}

/// Position embeddings `[1, P + N, D]` of another grid; those of the class token stay.
fn resize(tensor: &mut Weight, from: usize, to: usize, rule: ResizeRule) -> Result<(), Problem> {
    let dim = tensor.shape[2];
    let prefix = tensor.shape[1] - from * from;
    let patches = Tensor::from_slice(&tensor.values[prefix * dim..], (1, from * from, dim), &Device::Cpu)?;
    let resized = PositionEmbedding::new(patches, rule)?.resized((to, to))?;
    tensor.values.truncate(prefix * dim);
    tensor.values.extend(resized.flatten_all()?.to_vec1::<f32>()?);
    tensor.shape[1] = prefix + to * to;
    Ok(())
}

/// Position embeddings `[1, 1 + grid², D]` of MoCo v3: zero for the class token; for a patch the sines, then the cosines
/// of its row over D/4 wavelengths from 2π to 20000π, then the same of its column.
fn sine_cosine(grid: usize, dim: usize) -> Vec<f32> {
    let waves = dim / 4;
    let frequency = |wave: usize| TEMPERATURE.powf(-(wave as f64) / waves as f64);
    let mut values = vec![0.0; (1 + grid * grid) * dim];
    for row in 0..grid {
        for column in 0..grid {
            let token = &mut values[(1 + row * grid + column) * dim..][..dim];
            for wave in 0..waves {
                let [y, x] = [row, column].map(|place| place as f64 * frequency(wave));
                for (part, value) in [y.sin(), y.cos(), x.sin(), x.cos()].into_iter().enumerate() {
                    token[part * waves + wave] = value as f32;
                }
            }
        }
    }
    values
}
