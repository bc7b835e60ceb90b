//! Projection head of DINO: three linear layers, L2-normalized bottleneck, weight-normalized last layer (SEMANTICS §3).

use candle_core::{Result, Tensor};

use super::parameters::Parameters;
use super::vit::weight_and_bias;
use crate::ops::Ops;

/// ε of the L2 normalization of the bottleneck.
const NORMALIZE_EPS: f64 = 1e-12;

/// Tokens `[.., D]` -> prototype logits `[.., K]`.
pub struct ProjectionHead {
    layers: [[Tensor; 2]; 3],
    magnitude: Tensor,
    direction: Tensor,
    ops: Ops,
}

impl ProjectionHead {
    /// The head whose tensors are called `{prefix}.…`.
    pub fn new(parameters: &Parameters, prefix: &str, ops: Ops) -> Result<Self> {
        let layer = |index| weight_and_bias(parameters, &format!("{prefix}.mlp.{index}"));
        Ok(Self {
            // the indices in between belong to the activations
            layers: [layer(0)?, layer(2)?, layer(4)?],
            magnitude: parameters.get(&format!("{prefix}.last_layer.weight_g"))?,
            direction: parameters.get(&format!("{prefix}.last_layer.weight_v"))?,
            ops,
        })
    }

    /// Output of the three layers before normalization, `[.., bottleneck]`.
    pub fn bottleneck(&self, tokens: &Tensor) -> Result<Tensor> {
        let [first, second, third] = &self.layers;
        let hidden = self.ops.linear_gelu(tokens, &first[0], &first[1])?;
        let hidden = self.ops.linear_gelu(&hidden, &second[0], &second[1])?;
        self.ops.linear(&hidden, &third[0], Some(&third[1]))
    }

    /// Prototype logits of a bottleneck, `[.., K]`, without temperature.
    pub fn logits(&self, bottleneck: &Tensor) -> Result<Tensor> {
        let unit = self.ops.l2_normalize(bottleneck, NORMALIZE_EPS)?;
        let weight = self.ops.weight_norm(&self.direction, &self.magnitude)?; // [K, bottleneck]
        self.ops.linear(&unit, &weight, None)
    }

    /// Tokens to logits.
    pub fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        self.logits(&self.bottleneck(tokens)?)
    }
}
