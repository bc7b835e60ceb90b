//! The aggregation head: class-attention blocks that hold the class token (SEMANTICS §2).
//!
//! One set of blocks serves two uses: the class token attends over all patches, and (teacher) one more token per
//! patch, started from the same class token, attends over that patch's positives. LayerNorm, keys and values act on
//! each patch alone, so they are computed once per block for both uses (SEMANTICS §12).

use candle_core::{D, Result, Tensor};

use super::parameters::Parameters;
use super::vit::weight_and_bias;
use super::{CLASS_ATTENTION_BLOCKS, LAYER_NORM_EPS};
use crate::ops::{Ops, Positives};

/// What the head makes of the patch features of a batch, before the final norm.
pub struct Aggregated {
    /// The class token after attending over all patches, `[B, 1, D]`.
    pub class: Tensor,
    /// Each patch's aggregate of its positives, `[B, N, D]`.
    pub patches: Option<Tensor>,
}

/// Two class-attention blocks, the class token and the norm that all outputs share.
pub struct AggregationHead {
    class_token: Tensor,
    blocks: Vec<ClassAttentionBlock>,
    norm: [Tensor; 2],
    ops: Ops,
}

impl AggregationHead {
    /// The head whose tensors are called `{prefix}.…`.
    pub fn new(parameters: &Parameters, prefix: &str, heads: usize, ops: Ops) -> Result<Self> {
        let block =
            |index| ClassAttentionBlock::new(parameters, &format!("{prefix}.cls_blocks.{index}"), heads, ops);
        Ok(Self {
            class_token: parameters.get(&format!("{prefix}.cls_token"))?,
            blocks: (0..CLASS_ATTENTION_BLOCKS).map(block).collect::<Result<_>>()?,
            norm: weight_and_bias(parameters, &format!("{prefix}.norm"))?,
            ops,
        })
    }

    /// Class token (and, given positives, one aggregate per patch) of features `[B, N, D]`.
    pub fn forward(&self, features: &Tensor, positives: Option<&Positives>) -> Result<Aggregated> {
        self.forward_visiting(features, positives, |_, _| Ok(()))
    }

    /// [`AggregationHead::forward`] that shows the tokens after every block.
    pub fn forward_visiting(
        &self,
        features: &Tensor,
        positives: Option<&Positives>,
        mut visit: impl FnMut(usize, &Aggregated) -> Result<()>,
    ) -> Result<Aggregated> {
        let (batch, _, dim) = features.dims3()?;
        let dtype = features.dtype();
        let class = self.class_token.broadcast_as((batch, 1, dim))?.contiguous()?.to_dtype(dtype)?;
        // before the first block every patch's token is the same class token: [1, 1, D] stands for all of them
        let patches = positives.map(|_| self.class_token.to_dtype(dtype)).transpose()?;
        let mut tokens = Aggregated { class, patches };
        for (index, block) in self.blocks.iter().enumerate() {
            let keys_values = block.keys_values(features)?;
            let patches = match (&tokens.patches, positives) {
                (Some(patches), Some(positives)) => {
                    Some(block.attend_positives(patches, &keys_values, positives)?)
                }
                _ => None,
            };
            tokens = Aggregated { class: block.attend_all(&tokens.class, &keys_values)?, patches };
            visit(index, &tokens)?;
        }
        Ok(tokens)
    }

    /// Softmax weights of the token of every block over features `[B, N, D]`, each `[B, heads, 1, 1 + N]`, the token
    /// itself first. Over all patches of an image it is the class token's attention; over the positives of a patch it is
    /// what each adds to the patch's target.
    pub fn attention_weights(&self, features: &Tensor) -> Result<Vec<Tensor>> {
        let (batch, _, dim) = features.dims3()?;
        let token = self.class_token.broadcast_as((batch, 1, dim))?.contiguous()?;
        let mut token = token.to_dtype(features.dtype())?;
        let mut weights = Vec::with_capacity(self.blocks.len());
        for block in &self.blocks {
            let keys_values = block.keys_values(features)?;
            weights.push(block.attention_weights(&token, &keys_values)?);
            token = block.attend_all(&token, &keys_values)?;
        }
        Ok(weights)
    }

    /// The final LayerNorm, shared by class, patch and aggregated tokens.
    pub fn normalize(&self, tokens: &Tensor) -> Result<Tensor> {
        self.ops.layer_norm(tokens, &self.norm[0], &self.norm[1], LAYER_NORM_EPS)
    }
}

/// One pre-norm class-attention block (CaiT without LayerScale): only the class token is a query and only it changes.
pub struct ClassAttentionBlock {
    norm1: [Tensor; 2],
    query: [Tensor; 2],
    key: [Tensor; 2],
    value: [Tensor; 2],
    proj: [Tensor; 2],
    norm2: [Tensor; 2],
    fc1: [Tensor; 2],
    fc2: [Tensor; 2],
    heads: usize,
    ops: Ops,
}

impl ClassAttentionBlock {
    /// The block whose tensors are called `{name}.…`.
    pub fn new(parameters: &Parameters, name: &str, heads: usize, ops: Ops) -> Result<Self> {
        let layer = |part: &str| weight_and_bias(parameters, &format!("{name}.{part}"));
        Ok(Self {
            norm1: layer("norm1")?,
            query: layer("attn.q")?,
            key: layer("attn.k")?,
            value: layer("attn.v")?,
            proj: layer("attn.proj")?,
            norm2: layer("norm2")?,
            fc1: layer("mlp.fc1")?,
            fc2: layer("mlp.fc2")?,
            heads,
            ops,
        })
    }

    /// Packed keys and values `[.., 2D]` of tokens `[.., D]`.
    pub fn keys_values(&self, tokens: &Tensor) -> Result<Tensor> {
        let normed = self.ops.layer_norm(tokens, &self.norm1[0], &self.norm1[1], LAYER_NORM_EPS)?;
        self.packed_keys_values(&normed)
    }

    fn packed_keys_values(&self, normed: &Tensor) -> Result<Tensor> {
        let weight = Tensor::cat(&[&self.key[0], &self.value[0]], 0)?;
        let bias = Tensor::cat(&[&self.key[1], &self.value[1]], 0)?;
        self.ops.linear(normed, &weight, Some(&bias))
    }

    /// Query and packed own key and value of class tokens `[.., D]`.
    fn own(&self, class: &Tensor) -> Result<(Tensor, Tensor)> {
        let normed = self.ops.layer_norm(class, &self.norm1[0], &self.norm1[1], LAYER_NORM_EPS)?;
        let query = self.ops.linear(&normed, &self.query[0], Some(&self.query[1]))?;
        Ok((query, self.packed_keys_values(&normed)?))
    }

    /// One class token per image `[B, 1, D]` attends over itself and all patches' `keys_values` `[B, N, 2D]`.
    pub fn attend_all(&self, class: &Tensor, keys_values: &Tensor) -> Result<Tensor> {
        let (query, own) = self.own(class)?;
        let (key, value) = with_own(&own, keys_values)?;
        let attended = self.ops.class_attention(&query, &key, &value, self.heads)?;
        self.update(class, &attended)
    }

    /// Softmax weights of [`ClassAttentionBlock::attend_all`], `[B, heads, 1, 1 + N]`, the class token first.
    pub fn attention_weights(&self, class: &Tensor, keys_values: &Tensor) -> Result<Tensor> {
        let (query, own) = self.own(class)?;
        let (key, _) = with_own(&own, keys_values)?;
        let (batch, tokens, dim) = key.dims3()?;
        let split = |x: &Tensor, n| {
            x.reshape((batch, n, self.heads, dim / self.heads))?.transpose(1, 2)?.contiguous()
        };
        let scale = ((dim / self.heads) as f64).powf(-0.5);
        let scores = (split(&query, 1)?.matmul(&split(&key, tokens)?.transpose(2, 3)?)? * scale)?;
        let exponentials = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        exponentials.broadcast_div(&exponentials.sum_keepdim(D::Minus1)?)
    }

    /// One token per patch (`[B, N, D]`, or `[1, 1, D]` while all are equal) attends over itself and its positives.
    pub fn attend_positives(
        &self,
        tokens: &Tensor,
        keys_values: &Tensor,
        positives: &Positives,
    ) -> Result<Tensor> {
        let (query, own) = self.own(tokens)?;
        let attended = self.ops.neighbor_attention(&query, &own, keys_values, positives, self.heads)?;
        self.update(tokens, &attended)
    }

    /// Residual connections: `c += proj(attended)`, `c += mlp(norm2(c))`.
    fn update(&self, class: &Tensor, attended: &Tensor) -> Result<Tensor> {
        let ops = self.ops;
        let branch = ops.linear(attended, &self.proj[0], Some(&self.proj[1]))?;
        let class = branch.broadcast_add(class)?;
        let normed = ops.layer_norm(&class, &self.norm2[0], &self.norm2[1], LAYER_NORM_EPS)?;
        let hidden = ops.linear_gelu(&normed, &self.fc1[0], &self.fc1[1])?;
        let branch = ops.linear(&hidden, &self.fc2[0], Some(&self.fc2[1]))?;
        ops.add_scaled(&class, &branch, None)
    }
}

/// Keys and values `[B, 1 + N, D]` with the class token's own first.
fn with_own(own: &Tensor, keys_values: &Tensor) -> Result<(Tensor, Tensor)> {
    let all = Tensor::cat(&[own, keys_values], 1)?;
    let dim = all.dim(2)? / 2;
    Ok((all.narrow(2, 0, dim)?.contiguous()?, all.narrow(2, dim, dim)?.contiguous()?))
}
