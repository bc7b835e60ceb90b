//! Projection head of DINO: three linear layers, L2-normalized bottleneck, weight-normalized last layer (SEMANTICS §3).

use candle_core::{Result, Tensor};

use super::parameters::Parameters;
use super::vit::weight_and_bias;
use crate::ops::{GradientSink, HeadWeights, Ops, Statistics, Targets};

/// ε of the L2 normalization of the bottleneck.
const NORMALIZE_EPS: f64 = 1e-12;

/// Tokens `[.., D]` -> prototype logits `[.., K]`.
pub struct ProjectionHead {
    weights: HeadWeights,
    ops: Ops,
    sink: GradientSink,
}

impl ProjectionHead {
    /// The head whose tensors are called `{prefix}.…`.
    pub fn new(parameters: &Parameters, prefix: &str, ops: Ops) -> Result<Self> {
        let layer = |index| weight_and_bias(parameters, &format!("{prefix}.mlp.{index}"));
        let weights = HeadWeights {
            // the indices in between belong to the activations
            layers: [layer(0)?, layer(2)?, layer(4)?],
            magnitude: parameters.get(&format!("{prefix}.last_layer.weight_g"))?,
            direction: parameters.get(&format!("{prefix}.last_layer.weight_v"))?,
            eps: NORMALIZE_EPS,
        };
        Ok(Self { weights, ops, sink: parameters.sink().clone() })
    }

    /// Output of the three layers before normalization, `[.., bottleneck]`.
    pub fn bottleneck(&self, tokens: &Tensor) -> Result<Tensor> {
        self.weights.bottleneck(self.ops, tokens)
    }

    /// Unit vectors of tokens, `[.., bottleneck]`.
    pub fn unit(&self, tokens: &Tensor) -> Result<Tensor> {
        self.ops.l2_normalize(&self.bottleneck(tokens)?, NORMALIZE_EPS)
    }

    /// Prototype logits of unit vectors, `[.., K]`, without temperature. They are linear: the logits of a mean are the
    /// mean of the logits.
    pub fn unit_logits(&self, unit: &Tensor) -> Result<Tensor> {
        self.weights.logits(self.ops, unit)
    }

    /// Prototype logits of a bottleneck.
    pub fn logits(&self, bottleneck: &Tensor) -> Result<Tensor> {
        self.unit_logits(&self.ops.l2_normalize(bottleneck, NORMALIZE_EPS)?)
    }

    /// Tokens to logits.
    pub fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        self.unit_logits(&self.unit(tokens)?)
    }

    /// Cross-entropy between the logits of tokens `[R, D]` and those of a teacher.
    pub fn loss(&self, tokens: &Tensor, targets: &Targets<'_>) -> Result<(Tensor, Statistics)> {
        self.ops.projection_loss(tokens, &self.weights, targets, &self.sink)
    }
}
