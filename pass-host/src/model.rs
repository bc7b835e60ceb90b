//! The network: Vision Transformer, aggregation head and projection heads; student and teacher are the same class.
//!
//! | file | job |
//! |---|---|
//! | [`parameters`] | names, shapes and first values of every tensor; strict loading |
//! | [`vit`] | the backbone, top to bottom |
//! | [`pos_embed`] | position embeddings of any grid |
//! | [`aggregation`] | the aggregation head, which holds the class token |
//! | [`head`] | projection heads with a weight-normalized last layer |
//! | [`mlp_head`] | projectors and predictors with batch normalization |
//! | [`weights`] | trained weights from a run, a checkpoint or an exported file |
//! | [`weights_file`] | a safetensors file: header first, then tensor by tensor |
//! | [`timm`] | backbones with class token, from files with timm's names |
//! | [`resnet`] | ResNet-50 with torchvision's names, for baselines |
//! | [`encoder`] | any of these, ready to be judged: images in, features out |

pub mod aggregation;
pub mod encoder;
pub mod head;
pub mod mlp_head;
pub mod parameters;
pub mod pos_embed;
pub mod resnet;
pub mod timm;
pub mod vit;
pub mod weights;
pub mod weights_file;

use candle_core::Result;

use crate::config::{Positions, TrainConfig, WeightInit};
use crate::objective::method;
use crate::ops::Ops;
use aggregation::AggregationHead;
use head::ProjectionHead;
use parameters::{Parameters, Specification};
use vit::Vit;

/// ε of every LayerNorm of the network.
pub const LAYER_NORM_EPS: f64 = 1e-6;
/// Hidden width of an MLP as a multiple of its input width.
pub const MLP_RATIO: usize = 4;
/// Class-attention blocks of the aggregation head.
pub const CLASS_ATTENTION_BLOCKS: usize = 2;

/// Every size of a network; two networks with equal architectures have the same parameter names and shapes.
#[derive(Clone, Debug, PartialEq)]
pub struct Architecture {
    /// Embedding width D.
    pub dim: usize,
    /// Transformer blocks.
    pub depth: usize,
    /// Attention heads.
    pub heads: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Side, in patches, of the square grid whose position embeddings are learned.
    pub grid: usize,
    /// Stochastic depth of the last block (student only).
    pub drop_path: f64,
    /// Hidden width of the projection heads.
    pub head_hidden: usize,
    /// Width of their normalized bottleneck.
    pub head_bottleneck: usize,
    /// Outputs K of the patch head; `None` without the patch objective.
    pub patch_prototypes: Option<usize>,
    /// Whether the student's last-layer magnitudes are frozen at 1.
    pub norm_last_layer: bool,
    /// The heads of the image-level method.
    pub image_heads: Vec<Specification>,
    /// Whether position embeddings are learned.
    pub positions: Positions,
    /// Whether the patch embedding keeps its first values.
    pub freeze_patch_embed: bool,
    /// First values of backbone and aggregation head.
    pub init: WeightInit,
}

impl Architecture {
    /// A backbone whose projection heads are unknown or not wanted.
    pub fn backbone_only(dim: usize, depth: usize, heads: usize, patch_size: usize, grid: usize) -> Self {
        Self {
            dim,
            depth,
            heads,
            patch_size,
            grid,
            drop_path: 0.0,
            head_hidden: 0,
            head_bottleneck: 0,
            patch_prototypes: None,
            norm_last_layer: true,
            image_heads: Vec::new(),
            positions: Positions::Learned,
            freeze_patch_embed: false,
            init: WeightInit::Normal,
        }
    }

    /// The architecture a configuration asks for.
    pub fn from_config(config: &TrainConfig) -> Self {
        let (dim, depth, heads) = config.dims();
        Self {
            dim,
            depth,
            heads,
            patch_size: config.model.patch_size,
            grid: config.augment.global_size / config.model.patch_size,
            drop_path: config.model.drop_path,
            head_hidden: config.head.hidden,
            head_bottleneck: config.head.bottleneck,
            patch_prototypes: config.patch.enabled.then_some(config.head.patch_prototypes),
            norm_last_layer: config.head.norm_last_layer,
            image_heads: method::of_config(config).heads(dim),
            positions: config.model.positions,
            freeze_patch_embed: config.model.freeze_patch_embed,
            init: config.model.init,
        }
    }
}

/// A student or a teacher. The heads of the image-level method are the method's, which finds them in `parameters`.
pub struct Network {
    /// All tensors by their checkpoint names.
    pub parameters: Parameters,
    /// Image -> patch features.
    pub backbone: Vit,
    /// Patch features -> class token and aggregated patch tokens.
    pub aggregation: AggregationHead,
    /// Patch token -> patch prototypes.
    pub patch_head: Option<ProjectionHead>,
}

impl Network {
    /// Wires `parameters` into layers; the layers share the tensors' storage.
    pub fn new(architecture: &Architecture, parameters: Parameters, ops: Ops) -> Result<Self> {
        let backbone = Vit::new(&parameters, "backbone", architecture, ops)?;
        let aggregation = AggregationHead::new(&parameters, "ca_head", architecture.heads, ops)?;
        let patch_head = match architecture.patch_prototypes {
            Some(_) => Some(ProjectionHead::new(&parameters, "p_head", ops)?),
            None => None,
        };
        Ok(Self { parameters, backbone, aggregation, patch_head })
    }
}
