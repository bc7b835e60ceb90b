//! The backbone: a Vision Transformer without final norm and, as trained here, without class token (SEMANTICS §1).
//! Backbones of other methods bring prefix tokens (class token, registers), which go before the patches.

use candle_core::{Result, Tensor};

use super::parameters::Parameters;
use super::pos_embed::{PositionEmbedding, ResizeRule};
use super::{Architecture, LAYER_NORM_EPS};
use crate::ops::Ops;

/// Uniform draws in `[0, 1)` for stochastic depth: one row of `[batch]` numbers for each application, in order
/// (first block with a positive rate: attention, then MLP; next block …).
pub type DropPathDraws = [Vec<f64>];

/// Image patches -> patch features.
pub struct Vit {
    patch_size: usize,
    patch_weight: Tensor,
    patch_bias: Tensor,
    positions: PositionEmbedding,
    /// `[1, P, D]`
    prefix: Option<Tensor>,
    blocks: Vec<Block>,
    drop_rates: Vec<f64>,
    ops: Ops,
}

struct Block {
    norm1: [Tensor; 2],
    qkv: [Tensor; 2],
    proj: [Tensor; 2],
    norm2: [Tensor; 2],
    fc1: [Tensor; 2],
    fc2: [Tensor; 2],
    heads: usize,
}

/// Weight and bias of the layer called `name`.
pub(super) fn weight_and_bias(parameters: &Parameters, name: &str) -> Result<[Tensor; 2]> {
    Ok([parameters.get(&format!("{name}.weight"))?, parameters.get(&format!("{name}.bias"))?])
}

impl Vit {
    /// The backbone whose tensors are called `{prefix}.…`; `{prefix}.prefix_tokens` `[1, P, D]` may be there or not.
    pub fn new(parameters: &Parameters, prefix: &str, architecture: &Architecture, ops: Ops) -> Result<Self> {
        let [patch_weight, patch_bias] = weight_and_bias(parameters, &format!("{prefix}.patch_embed.proj"))?;
        let blocks = (0..architecture.depth)
            .map(|block| Block::new(parameters, &format!("{prefix}.blocks.{block}"), architecture.heads))
            .collect::<Result<_>>()?;
        let last = architecture.depth.max(2) - 1;
        Ok(Self {
            patch_size: architecture.patch_size,
            patch_weight,
            patch_bias,
            positions: PositionEmbedding::new(
                parameters.get(&format!("{prefix}.pos_embed"))?,
                ResizeRule::Offset,
            )?,
            prefix: parameters.find(&format!("{prefix}.prefix_tokens")),
            blocks,
            drop_rates: (0..architecture.depth)
                .map(|block| architecture.drop_path * block as f64 / last as f64)
                .collect(),
            ops,
        })
    }

    /// The same backbone with another rule for positions of other grids.
    pub fn with_positions(self, rule: ResizeRule) -> Result<Self> {
        Ok(Self { positions: self.positions.with_rule(rule)?, ..self })
    }

    /// Tokens P before the patches.
    pub fn prefix_tokens(&self) -> usize {
        self.prefix.as_ref().map_or(0, |tokens| tokens.dims()[1])
    }

    /// Cuts images `[B, 3, H, W]` into flattened patches `[B, N, 3·p·p]` and tells their grid `(height, width)`.
    pub fn patchify(&self, images: &Tensor) -> Result<(Tensor, (usize, usize))> {
        let (_, _, height, width) = images.dims4()?;
        let grid = (height / self.patch_size, width / self.patch_size);
        Ok((self.ops.patchify(images, self.patch_size)?, grid))
    }

    /// Draws that [`Vit::forward`] consumes: two for each block with a positive rate.
    pub fn drop_path_applications(&self) -> usize {
        2 * self.drop_rates.iter().filter(|rate| **rate > 0.0).count()
    }

    /// Prefix tokens, then patch embedding plus position embedding, `[B, P + N, D]`.
    pub fn embed(&self, patches: &Tensor, grid: (usize, usize)) -> Result<Tensor> {
        let weight = self.patch_weight.flatten_from(1)?;
        let tokens = self.ops.linear(patches, &weight, Some(&self.patch_bias))?;
        // in the precision of the parameters: the gradient of the embedding is a sum over images
        let (dtype, positions) = (tokens.dtype(), self.positions.resized(grid)?);
        let tokens = tokens.to_dtype(positions.dtype())?.broadcast_add(&positions)?.to_dtype(dtype)?;
        let Some(prefix) = &self.prefix else { return Ok(tokens) };
        let (batch, _, dim) = tokens.dims3()?;
        let prefix = prefix.broadcast_as((batch, prefix.dim(1)?, dim))?.contiguous()?.to_dtype(dtype)?;
        Tensor::cat(&[&prefix, &tokens], 1)
    }

    /// Output of the last block, `[B, P + N, D]`; `draws` switches stochastic depth on.
    pub fn forward(
        &self,
        patches: &Tensor,
        grid: (usize, usize),
        draws: Option<&DropPathDraws>,
    ) -> Result<Tensor> {
        self.forward_visiting(patches, grid, draws, |_, _| Ok(()))
    }

    /// [`Vit::forward`] that shows the output of every block as `visit(block, tokens)`.
    pub fn forward_visiting(
        &self,
        patches: &Tensor,
        grid: (usize, usize),
        draws: Option<&DropPathDraws>,
        mut visit: impl FnMut(usize, &Tensor) -> Result<()>,
    ) -> Result<Tensor> {
        let mut x = self.embed(patches, grid)?;
        let mut draws = draws.map(|draws| draws.iter());
        for (index, block) in self.blocks.iter().enumerate() {
            let rate = self.drop_rates[index];
            let mut scale = || match &mut draws {
                Some(draws) if rate > 0.0 => match draws.next() {
                    Some(uniform) => Ok(Some(keep_scale(rate, uniform))),
                    None => candle_core::bail!("stochastic depth: too few draws for block {index}"),
                },
                _ => Ok(None),
            };
            let (attention, mlp) = (scale()?, scale()?);
            x = block.forward(&x, attention.as_deref(), mlp.as_deref(), self.ops)?;
            visit(index, &x)?;
        }
        Ok(x)
    }

    /// Softmax attention of the last block, `[B, heads, P + N, P + N]`, row = query.
    pub fn last_attention(&self, patches: &Tensor, grid: (usize, usize)) -> Result<Tensor> {
        let mut x = self.embed(patches, grid)?;
        let Some((last, others)) = self.blocks.split_last() else {
            candle_core::bail!("a backbone without blocks has no attention");
        };
        for block in others {
            x = block.forward(&x, None, None, self.ops)?;
        }
        self.ops.attention_weights(&last.packed_qkv(&x, self.ops)?, last.heads)
    }
}

/// Factor of a residual branch per sample: `floor(keep + u) / keep` with `keep = 1 - rate`.
fn keep_scale(rate: f64, uniform: &[f64]) -> Vec<f32> {
    let keep = 1.0 - rate;
    uniform.iter().map(|u| ((keep + u).floor() / keep) as f32).collect()
}

impl Block {
    fn new(parameters: &Parameters, name: &str, heads: usize) -> Result<Self> {
        let layer = |part: &str| weight_and_bias(parameters, &format!("{name}.{part}"));
        Ok(Self {
            norm1: layer("norm1")?,
            qkv: layer("attn.qkv")?,
            proj: layer("attn.proj")?,
            norm2: layer("norm2")?,
            fc1: layer("mlp.fc1")?,
            fc2: layer("mlp.fc2")?,
            heads,
        })
    }

    fn packed_qkv(&self, x: &Tensor, ops: Ops) -> Result<Tensor> {
        let normed = ops.layer_norm(x, &self.norm1[0], &self.norm1[1], LAYER_NORM_EPS)?;
        ops.linear(&normed, &self.qkv[0], Some(&self.qkv[1])) // [B, N, 3D]
    }

    fn forward(
        &self,
        x: &Tensor,
        attention_scale: Option<&[f32]>,
        mlp_scale: Option<&[f32]>,
        ops: Ops,
    ) -> Result<Tensor> {
        let attended = ops.attention(&self.packed_qkv(x, ops)?, self.heads)?;
        let branch = ops.linear(&attended, &self.proj[0], Some(&self.proj[1]))?;
        let x = ops.add_scaled(x, &branch, attention_scale)?;
        let normed = ops.layer_norm(&x, &self.norm2[0], &self.norm2[1], LAYER_NORM_EPS)?;
        let hidden = ops.linear_gelu(&normed, &self.fc1[0], &self.fc1[1])?;
        let branch = ops.linear(&hidden, &self.fc2[0], Some(&self.fc2[1]))?;
        ops.add_scaled(&x, &branch, mlp_scale)
    }
}

#[cfg(test)]
mod tests {
    use super::keep_scale;

    #[test]
    fn kept_branches_are_rescaled_and_dropped_ones_vanish() {
        assert_eq!(keep_scale(0.5, &[0.0, 0.49, 0.5, 0.99]), [0.0, 0.0, 2.0, 2.0]);
        assert_eq!(keep_scale(0.0, &[0.0, 0.99]), [1.0, 1.0]);
    }
}
