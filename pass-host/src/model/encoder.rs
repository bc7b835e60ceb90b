//! A trained network as the evaluations and pictures see it: images in, features out, whatever it was trained by.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Device, Result, Tensor, Var};

use super::aggregation::AggregationHead;
use super::parameters::{Parameters, Role};
use super::pos_embed::ResizeRule;
use super::resnet::{self, Dilation, ResNet, ResNetFile, ResNetSizes};
use super::timm::{IMAGENET, TimmVit};
use super::vit::{DropPathDraws, Vit};
use super::weights::{TrainedWeights, WeightsError};
use super::weights_file::{Names, WeightsFile};
use super::{Architecture, LAYER_NORM_EPS};
use crate::config::run::Network;
use crate::ops::Ops;

/// What stands before the path of weights whose architecture is wanted with fresh values.
const RANDOM: &str = "random:";

/// Pixels from one feature of a ResNet to the next.
const RESNET_STRIDE: usize = 16;
/// Side in pixels of the images that released ResNets were trained on.
const RESNET_TRAINED_SIZE: usize = 224;

/// Which layer of a ResNet gives the features of patches; both of stride 16.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum ResNetLayer {
    /// Layer 3, 1024 wide.
    #[default]
    #[value(name = "3")]
    Third,
    /// Layer 4, 2048 wide, dilated instead of strided.
    #[value(name = "4")]
    Fourth,
}

/// How weights are opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct EncoderOptions {
    /// Which network of a run.
    pub network: Network,
    /// Attention heads, for files that do not tell.
    pub heads: Option<usize>,
    /// How position embeddings of other grids are made; nothing = as the weights' own evaluation does.
    pub positions: Option<ResizeRule>,
    /// Which layer of a ResNet gives the features of patches.
    pub resnet_layer: ResNetLayer,
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
    body: Body,
    normalization: ([f32; 3], [f32; 3]),
    parameters: Parameters,
    description: String,
    device: Device,
}

enum Body {
    Vit(Box<VitBody>),
    ResNet { network: ResNet, sizes: ResNetSizes, layer: ResNetLayer },
}

struct VitBody {
    backbone: Vit,
    aggregation: Option<AggregationHead>,
    /// After the last block, for class-token networks.
    norm: Option<[Tensor; 2]>,
    architecture: Architecture,
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
        let own = if path.is_file() {
            let file = WeightsFile::open(path)?;
            match file.names() {
                Names::ResNet => {
                    return Ok(Self::resnet(ResNetFile::read(file, device)?, random, options, device)?);
                }
                Names::Timm => {
                    let file = TimmVit::read(file, options.heads, device)?;
                    let TimmVit { architecture, positions, tensors, .. } = file;
                    return Ok(Self::vit(
                        architecture,
                        IMAGENET,
                        positions,
                        tensors,
                        random,
                        options,
                        device,
                    )?);
                }
                Names::Own => TrainedWeights::read(file, device)?,
            }
        } else {
            TrainedWeights::open(path, options.network, device)?
        };
        let TrainedWeights { architecture, normalization, tensors } = own;
        Ok(Self::vit(architecture, normalization, ResizeRule::Offset, tensors, random, options, device)?)
    }

    fn vit(
        architecture: Architecture,
        normalization: ([f32; 3], [f32; 3]),
        rule: ResizeRule,
        mut tensors: HashMap<String, Tensor>,
        random: bool,
        options: &EncoderOptions,
        device: &Device,
    ) -> Result<Self> {
        let values = values_of(tensors.len(), random);
        let architecture = Architecture { drop_path: options.drop_path, ..architecture };
        if random {
            let fresh = Parameters::init(&architecture, Role::Teacher, options.seed, device)?;
            let fresh = fresh.to_tensors().into_iter().filter(|(name, _)| TrainedWeights::uses(name));
            tensors = fresh.collect();
        }
        let parameters = prepare(tensors, options.trainable)?;
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
        let description = format!(
            "ViT {dim} wide, {depth} blocks, {heads} heads, patches of {patch_size}, trained on {grid}x{grid}, {values}"
        );
        let body = Body::Vit(Box::new(VitBody { backbone, aggregation, norm, architecture, ops }));
        Ok(Self { body, normalization, parameters, description, device: device.clone() })
    }

    fn resnet(file: ResNetFile, random: bool, options: &EncoderOptions, device: &Device) -> Result<Self> {
        let ResNetFile { sizes, mut tensors, count } = file;
        if random {
            tensors = sizes.fresh(options.seed, device)?;
        }
        let parameters = prepare(tensors, options.trainable)?;
        let layer = options.resnet_layer;
        let (name, width) = match layer {
            ResNetLayer::Third => ("layer 3", sizes.outer[2]),
            ResNetLayer::Fourth => ("dilated layer 4", sizes.outer[3]),
        };
        let values = values_of(count, random);
        let description = format!("ResNet-50, {name}, {width} wide, stride {RESNET_STRIDE}, {values}");
        let body = Body::ResNet { network: ResNet::new(&parameters)?, sizes, layer };
        Ok(Self { body, normalization: IMAGENET, parameters, description, device: device.clone() })
    }

    /// A network in training, as it is now: the tensors are shared, not copied.
    ///
    /// # Errors
    /// If `parameters` are not those of `architecture`.
    pub fn of_network(
        parameters: &Parameters,
        architecture: &Architecture,
        normalization: ([f32; 3], [f32; 3]),
        device: &Device,
    ) -> Result<Self> {
        let ops = Ops::fused();
        let body = VitBody {
            backbone: Vit::new(parameters, "backbone", architecture, ops)?,
            aggregation: Some(AggregationHead::new(parameters, "ca_head", architecture.heads, ops)?),
            norm: None,
            architecture: architecture.clone(),
            ops,
        };
        let body = Body::Vit(Box::new(body));
        let (parameters, device) = (parameters.clone(), device.clone());
        Ok(Self { body, normalization, parameters, description: "the network in training".into(), device })
    }

    /// One line for people.
    pub fn description(&self) -> &str {
        &self.description
    }

    /// Width D of a patch feature.
    pub fn dim(&self) -> usize {
        match &self.body {
            Body::Vit(vit) => vit.architecture.dim,
            Body::ResNet { sizes, layer: ResNetLayer::Third, .. } => sizes.outer[2],
            Body::ResNet { sizes, layer: ResNetLayer::Fourth, .. } => sizes.outer[3],
        }
    }

    /// Width of the feature of an image.
    pub fn class_dim(&self) -> usize {
        match &self.body {
            Body::Vit(vit) => vit.architecture.dim,
            Body::ResNet { sizes, .. } => sizes.outer[3],
        }
    }

    /// Pixels from one patch to the next.
    pub fn stride(&self) -> usize {
        match &self.body {
            Body::Vit(vit) => vit.architecture.patch_size,
            Body::ResNet { .. } => RESNET_STRIDE,
        }
    }

    /// Transformer blocks; the four layers of a ResNet.
    pub fn depth(&self) -> usize {
        match &self.body {
            Body::Vit(vit) => vit.architecture.depth,
            Body::ResNet { .. } => resnet::BLOCKS.len(),
        }
    }

    /// Width of the output of a block (from 0).
    pub fn block_dim(&self, block: usize) -> usize {
        match &self.body {
            Body::Vit(vit) => vit.architecture.dim,
            Body::ResNet { sizes, .. } => sizes.outer.get(block).copied().unwrap_or_default(),
        }
    }

    /// Side in pixels of the crops it was trained on.
    pub fn trained_size(&self) -> usize {
        match &self.body {
            Body::Vit(vit) => vit.architecture.grid * vit.architecture.patch_size,
            Body::ResNet { .. } => RESNET_TRAINED_SIZE,
        }
    }

    /// Mean and standard deviation per channel (RGB, of values in `[0, 1]`) that images are normalized with.
    pub fn normalization(&self) -> ([f32; 3], [f32; 3]) {
        self.normalization
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What sides of images must be, if images of `(height, width)` have none of a feature; nothing if they have.
    ///
    /// A Vision Transformer does not read pixels right of and below its last whole patch, as the strided convolution of the
    /// published models; a ResNet takes whole strides only.
    pub fn wanted_instead_of(&self, (height, width): (usize, usize)) -> Option<String> {
        let stride = self.stride();
        match &self.body {
            Body::Vit(_) if height < stride || width < stride => {
                Some(format!("sides of at least {stride} pixels, one patch"))
            }
            Body::ResNet { .. }
                if height == 0 || width == 0 || height % stride != 0 || width % stride != 0 =>
            {
                Some(format!("sides that are positive multiples of {stride}"))
            }
            _ => None,
        }
    }

    /// Its tensors: variables, if it was opened to be trained.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// The aggregation head, which own weights and released SelfPatch weights have.
    pub fn aggregation(&self) -> Option<&AggregationHead> {
        match &self.body {
            Body::Vit(vit) => vit.aggregation.as_ref(),
            Body::ResNet { .. } => None,
        }
    }

    /// Features of the patches of images `[B, 3, H, W]` as the method's own evaluation reads them: the raw output of the
    /// last block (SEMANTICS §6), behind the final norm where the backbone has one; a layer of a ResNet.
    ///
    /// # Errors
    /// For images of a size that [`Encoder::wanted_instead_of`] objects to.
    pub fn patch_features(&self, images: &Tensor) -> Result<PatchFeatures> {
        match &self.body {
            Body::Vit(vit) => {
                let (tokens, grid) = vit.tokens(images)?;
                Ok(PatchFeatures { features: vit.patches_of(&tokens, grid)?, grid })
            }
            Body::ResNet { network, layer, .. } => {
                let grid = resnet_grid(images)?;
                let (dilation, layers) = match layer {
                    ResNetLayer::Third => (Dilation::None, 3),
                    ResNetLayer::Fourth => (Dilation::Layer4, 4),
                };
                let outputs = network.forward(images, dilation, layers)?;
                Ok(PatchFeatures { features: rows(&outputs[layers - 1])?, grid })
            }
        }
    }

    /// One feature an image, `[B, D]`: the class token of the aggregation head or of the backbone; the mean of the
    /// patches for a backbone without one; the mean of layer 4 (stride 32) of a ResNet, whose D is twice that of layer 3.
    ///
    /// # Errors
    /// As [`Encoder::patch_features`].
    pub fn class_features(&self, images: &Tensor) -> Result<Tensor> {
        match &self.body {
            Body::Vit(vit) => vit.class_features(images),
            Body::ResNet { network, .. } => {
                let outputs = network.forward(images, Dilation::None, resnet::BLOCKS.len())?;
                outputs[resnet::BLOCKS.len() - 1].mean((2, 3))
            }
        }
    }

    /// Outputs `[B, N, D]` of these blocks (from 0), patches only, without the final norm, and the grid.
    ///
    /// Those of a ResNet are its layers, each of its own width, all of stride 16: layers 1 and 2 averaged, layer 4 dilated.
    ///
    /// # Errors
    /// As [`Encoder::patch_features`], and for a block that is not there.
    pub fn block_outputs(&self, images: &Tensor, blocks: &[usize]) -> Result<(Vec<Tensor>, (usize, usize))> {
        self.block_outputs_dropping(images, blocks, None)
    }

    /// Rows of `[batch]` draws that [`Encoder::block_outputs_dropping`] consumes.
    pub fn drop_path_applications(&self) -> usize {
        match &self.body {
            Body::Vit(vit) => vit.backbone.drop_path_applications(),
            Body::ResNet { .. } => 0,
        }
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
        match &self.body {
            Body::Vit(vit) => vit.block_outputs(images, blocks, draws),
            Body::ResNet { network, .. } => {
                let grid = resnet_grid(images)?;
                let layers = blocks.iter().max().map_or(0, |last| last + 1);
                let outputs = network.forward(images, Dilation::Layer4, layers)?;
                let output = |block: &usize| match RESNET_STRIDE >> (block + 2) {
                    wider @ 2.. => rows(&outputs[*block].avg_pool2d(wider)?),
                    _ => rows(&outputs[*block]),
                };
                Ok((blocks.iter().map(output).collect::<Result<_>>()?, grid))
            }
        }
    }

    /// Softmax attention of the last block.
    ///
    /// # Errors
    /// As [`Encoder::patch_features`], and for a ResNet, which has none.
    pub fn last_attention(&self, images: &Tensor) -> Result<Attention> {
        let Body::Vit(vit) = &self.body else { candle_core::bail!("a ResNet has no attention") };
        let (patches, grid) = vit.backbone.patchify(images)?;
        let weights = vit.backbone.last_attention(&patches, grid)?;
        Ok(Attention { weights, prefix: vit.backbone.prefix_tokens(), grid })
    }
}

impl VitBody {
    /// All tokens behind the final norm, and the grid of the patches.
    fn tokens(&self, images: &Tensor) -> Result<(Tensor, (usize, usize))> {
        let (patches, grid) =
            self.backbone.patchify(&whole_patches(images, self.architecture.patch_size)?)?;
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

    fn class_features(&self, images: &Tensor) -> Result<Tensor> {
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

    fn block_outputs(
        &self,
        images: &Tensor,
        blocks: &[usize],
        draws: Option<&DropPathDraws>,
    ) -> Result<(Vec<Tensor>, (usize, usize))> {
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
}

/// Tensors as variables, or as they are.
fn prepare(tensors: HashMap<String, Tensor>, trainable: bool) -> Result<Parameters> {
    let prepare = |(name, tensor): (String, Tensor)| {
        let tensor = tensor.contiguous()?;
        let tensor = if trainable { Var::from_tensor(&tensor)?.as_tensor().clone() } else { tensor };
        Ok((name, tensor))
    };
    Ok(tensors.into_iter().map(prepare).collect::<Result<Vec<_>>>()?.into_iter().collect())
}

fn values_of(count: usize, random: bool) -> String {
    if random { "fresh values".into() } else { format!("{count} of {count} tensors") }
}

/// Images `[B, 3, H, W]` without what lies beyond their last whole patches.
fn whole_patches(images: &Tensor, patch_size: usize) -> Result<Tensor> {
    let (_, _, height, width) = images.dims4()?;
    let whole = |side: usize| side / patch_size * patch_size;
    if whole(height) == 0 || whole(width) == 0 {
        candle_core::bail!("images of {height}x{width}: expected at least one patch of {patch_size} pixels");
    }
    images.narrow(2, 0, whole(height))?.narrow(3, 0, whole(width))
}

/// Rows and columns of the features of a ResNet.
fn resnet_grid(images: &Tensor) -> Result<(usize, usize)> {
    let (_, _, height, width) = images.dims4()?;
    if height == 0 || width == 0 || height % RESNET_STRIDE != 0 || width % RESNET_STRIDE != 0 {
        candle_core::bail!(
            "images of {height}x{width}: expected sides that are multiples of {RESNET_STRIDE}"
        );
    }
    Ok((height / RESNET_STRIDE, width / RESNET_STRIDE))
}

/// A map `[B, D, rows, columns]` as one feature a place, `[B, N, D]`.
fn rows(map: &Tensor) -> Result<Tensor> {
    map.flatten_from(2)?.transpose(1, 2)?.contiguous()
}
