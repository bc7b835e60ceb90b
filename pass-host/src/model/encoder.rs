//! A trained network as the evaluations and pictures see it: images in, features out, whatever it was trained by.

use std::path::Path;

use candle_core::{Device, Result, Tensor, Var};

use super::aggregation::AggregationHead;
use super::parameters::{Parameters, Role};
use super::pos_embed::ResizeRule;
use super::timm::{IMAGENET, TimmVit};
use super::vit::{DropPathDraws, Vit};
use super::weights::{TrainedWeights, WeightsError};
use super::{Architecture, LAYER_NORM_EPS};
use crate::config::run::Network;
use crate::ops::Ops;

/// What stands before the path of weights whose architecture is wanted with fresh values.
const RANDOM: &str = "random:";

/// How weights are opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct EncoderOptions {
    /// Which network of a run.
    pub network: Network,
    /// Attention heads, for files that do not tell.
    pub heads: Option<usize>,
    /// How position embeddings of other grids are made; nothing = as the weights' own evaluation does.
    pub positions: Option<ResizeRule>,
    /// Every tensor is a variable.
    pub trainable: bool,
    /// Seed of fresh values (`random:…`).
    pub seed: u64,
    /// Stochastic depth of the last block, for [`Encoder::block_outputs_dropping`].
    pub drop_path: f64,
}

/// Features of all patches.
#[derive(Clone, Debug)]
pub struct PatchFeatures {
    /// `[B, N, D]`, patches row by row.
    pub features: Tensor,
    /// Rows and columns; their product is N.
    pub grid: (usize, usize),
}

/// Softmax attention of the last block.
#[derive(Clone, Debug)]
pub struct Attention {
    /// `[B, heads, T, T]`, row = query; the first `prefix` tokens are no patches.
    pub weights: Tensor,
    /// Class token and registers.
    pub prefix: usize,
    /// Rows and columns of the patches.
    pub grid: (usize, usize),
}

/// A network whose features are judged.
pub struct Encoder {
    backbone: Vit,
    aggregation: Option<AggregationHead>,
    /// After the last block, for class-token networks.
    norm: Option<[Tensor; 2]>,
    architecture: Architecture,
    normalization: ([f32; 3], [f32; 3]),
    parameters: Parameters,
    description: String,
    device: Device,
    ops: Ops,
}

impl Encoder {
    /// Opens `weights`: a run folder, a checkpoint folder, a file of `export` or of `import`; `random:` before any of
    /// them takes its architecture and draws fresh values.
    ///
    /// # Errors
    /// [`WeightsError`] for weights that cannot be read or are not whole.
    pub fn open(
        weights: &str,
        options: &EncoderOptions,
        device: &Device,
    ) -> std::result::Result<Self, WeightsError> {
        let (path, random) = match weights.strip_prefix(RANDOM) {
            Some(path) => (Path::new(path), true),
            None => (Path::new(weights), false),
        };
        let timm = if path.is_file() { TimmVit::open(path, options.heads, device)? } else { None };
        let (architecture, normalization, rule, mut tensors) = match timm {
            Some(file) => (file.architecture, IMAGENET, file.positions, file.tensors),
            None => {
                let own = TrainedWeights::open(path, options.network, device)?;
                (own.architecture, own.normalization, ResizeRule::Offset, own.tensors)
            }
        };
        let architecture = Architecture { drop_path: options.drop_path, ..architecture };
        let count = tensors.len();
        if random {
            let fresh = Parameters::init(&architecture, Role::Teacher, options.seed, device)?;
            let fresh = fresh.to_tensors().into_iter().filter(|(name, _)| TrainedWeights::uses(name));
            tensors = fresh.collect();
        }
        let prepare = |(name, tensor): (String, Tensor)| {
            let tensor = tensor.contiguous()?;
            let tensor =
                if options.trainable { Var::from_tensor(&tensor)?.as_tensor().clone() } else { tensor };
            Ok((name, tensor))
        };
        let parameters: Parameters =
            tensors.into_iter().map(prepare).collect::<Result<Vec<_>>>()?.into_iter().collect();
        let ops = Ops::fused();
        let has = |name: &str| parameters.iter().any(|(known, _)| known == name);
        let norm = match has("backbone.norm.weight") {
            true => Some([parameters.get("backbone.norm.weight")?, parameters.get("backbone.norm.bias")?]),
            false => None,
        };
        let aggregation = match has("ca_head.cls_token") {
            true => Some(AggregationHead::new(&parameters, "ca_head", architecture.heads, ops)?),
            false => None,
        };
        let rule = options.positions.unwrap_or(rule);
        let backbone = Vit::new(&parameters, "backbone", &architecture, ops)?.with_positions(rule)?;
        let Architecture { dim, depth, heads, patch_size, grid, .. } = architecture;
        let values = if random { "fresh values".into() } else { format!("{count} of {count} tensors") };
        let description = format!(
            "ViT {dim} wide, {depth} blocks, {heads} heads, patches of {patch_size}, trained on {grid}x{grid}, {values}"
        );
        let device = device.clone();
        Ok(Self {
            backbone,
            aggregation,
            norm,
            architecture,
            normalization,
            parameters,
            description,
            device,
            ops,
        })
    }

    /// One line for people.
    pub fn description(&self) -> &str {
        &self.description
    }

    /// Width D of a patch feature.
    pub fn dim(&self) -> usize {
        self.architecture.dim
    }

    /// Pixels from one patch to the next.
    pub fn stride(&self) -> usize {
        self.architecture.patch_size
    }

    /// Transformer blocks.
    pub fn depth(&self) -> usize {
        self.architecture.depth
    }

    /// Side in pixels of the crops it was trained on.
    pub fn trained_size(&self) -> usize {
        self.architecture.grid * self.architecture.patch_size
    }

    /// Mean and standard deviation per channel (RGB, of values in `[0, 1]`) that images are normalized with.
    pub fn normalization(&self) -> ([f32; 3], [f32; 3]) {
        self.normalization
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Its tensors: variables, if it was opened to be trained.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// The aggregation head, which own weights and released SelfPatch weights have.
    pub fn aggregation(&self) -> Option<&AggregationHead> {
        self.aggregation.as_ref()
    }

    /// Features of the patches of images `[B, 3, H, W]` as the method's own evaluation reads them: the raw output of the
    /// last block (SEMANTICS §6), behind the final norm where the backbone has one.
    ///
    /// # Errors
    /// If patches do not divide the images.
    pub fn patch_features(&self, images: &Tensor) -> Result<PatchFeatures> {
        let (tokens, grid) = self.tokens(images)?;
        Ok(PatchFeatures { features: self.patches_of(&tokens, grid)?, grid })
    }

    /// One feature an image, `[B, D]`: the class token of the aggregation head or of the backbone; the mean of the
    /// patches for a backbone without one.
    ///
    /// # Errors
    /// As [`Encoder::patch_features`].
    pub fn class_features(&self, images: &Tensor) -> Result<Tensor> {
        let (tokens, grid) = self.tokens(images)?;
        if let Some(head) = &self.aggregation {
            let class = head.normalize(&head.forward(&tokens, None)?.class)?;
            return class.squeeze(1);
        }
        match self.backbone.prefix_tokens() {
            0 => self.patches_of(&tokens, grid)?.mean(1),
            _ => tokens.narrow(1, 0, 1)?.squeeze(1),
        }
    }

    /// Outputs `[B, N, D]` of these blocks (from 0), patches only, without the final norm, and the grid.
    ///
    /// # Errors
    /// As [`Encoder::patch_features`], and for a block that is not there.
    pub fn block_outputs(&self, images: &Tensor, blocks: &[usize]) -> Result<(Vec<Tensor>, (usize, usize))> {
        self.block_outputs_dropping(images, blocks, None)
    }

    /// Rows of `[batch]` draws that [`Encoder::block_outputs_dropping`] consumes.
    pub fn drop_path_applications(&self) -> usize {
        self.backbone.drop_path_applications()
    }

    /// [`Encoder::block_outputs`] in training; `draws` switches stochastic depth on.
    ///
    /// # Errors
    /// As [`Encoder::block_outputs`], and for too few draws.
    pub fn block_outputs_dropping(
        &self,
        images: &Tensor,
        blocks: &[usize],
        draws: Option<&DropPathDraws>,
    ) -> Result<(Vec<Tensor>, (usize, usize))> {
        if let Some(block) = blocks.iter().find(|block| **block >= self.depth()) {
            candle_core::bail!("block {block}: expected one of 0 to {}", self.depth() - 1);
        }
        let (patches, grid) = self.backbone.patchify(images)?;
        let mut outputs = vec![None; blocks.len()];
        self.backbone.forward_visiting(&patches, grid, draws, |index, tokens| {
            for (output, _) in outputs.iter_mut().zip(blocks).filter(|(_, block)| **block == index) {
                *output = Some(self.patches_of(tokens, grid)?);
            }
            Ok(())
        })?;
        Ok((outputs.into_iter().flatten().collect(), grid))
    }

    /// Softmax attention of the last block.
    ///
    /// # Errors
    /// As [`Encoder::patch_features`].
    pub fn last_attention(&self, images: &Tensor) -> Result<Attention> {
        let (patches, grid) = self.backbone.patchify(images)?;
        let weights = self.backbone.last_attention(&patches, grid)?;
        Ok(Attention { weights, prefix: self.backbone.prefix_tokens(), grid })
    }

    /// All tokens behind the final norm, and the grid of the patches.
    fn tokens(&self, images: &Tensor) -> Result<(Tensor, (usize, usize))> {
        let (patches, grid) = self.backbone.patchify(images)?;
        let tokens = self.backbone.forward(&patches, grid, None)?;
        let tokens = match &self.norm {
            Some([weight, bias]) => self.ops.layer_norm(&tokens, weight, bias, LAYER_NORM_EPS)?,
            None => tokens,
        };
        Ok((tokens, grid))
    }

    fn patches_of(&self, tokens: &Tensor, (rows, columns): (usize, usize)) -> Result<Tensor> {
        match self.backbone.prefix_tokens() {
            0 => Ok(tokens.clone()),
            prefix => tokens.narrow(1, prefix, rows * columns)?.contiguous(),
        }
    }
}
