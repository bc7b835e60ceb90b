//! The backbone: a Vision Transformer without final norm and, as trained here, without class token (SEMANTICS §1).
//! Backbones of other methods bring prefix tokens (class token, registers), which go before the patches.

use candle_core::{Result, Tensor, Var};

use super::parameters::Parameters;
use super::pos_embed::{PositionEmbedding, ResizeRule};
use super::{Architecture, LAYER_NORM_EPS};
use crate::ops::{BlockWeights, GradientSink, Ops, Plan, Sequences};

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
    blocks: Vec<BlockWeights>,
    heads: usize,
    drop_rates: Vec<f64>,
    recompute: bool,
    ops: Ops,
    sink: GradientSink,
}

/// Crops of one size.
#[derive(Clone, Copy)]
pub struct CropPatches<'a> {
    /// Flattened patches `[B, N, 3·p·p]`.
    pub patches: &'a Tensor,
    /// Their grid, `(height, width)`.
    pub grid: (usize, usize),
    /// Switches stochastic depth on.
    pub draws: Option<&'a DropPathDraws>,
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
            .map(|block| block_weights(parameters, &format!("{prefix}.blocks.{block}")))
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
            heads: architecture.heads,
            drop_rates: (0..architecture.depth)
                .map(|block| architecture.drop_path * block as f64 / last as f64)
                .collect(),
            recompute: false,
            ops,
            sink: parameters.sink().clone(),
        })
    }

    /// The same backbone, whose backward pass runs the blocks forward again instead of keeping what they computed.
    pub fn recomputing(self, recompute: bool) -> Self {
        Self { recompute, ..self }
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
        Ok(self.forward_crops(&[CropPatches { patches, grid, draws }])?.remove(0))
    }

    /// [`Vit::forward`] of crops of several sizes at once: everything that acts on tokens alone runs over all of them.
    pub fn forward_crops(&self, crops: &[CropPatches<'_>]) -> Result<Vec<Tensor>> {
        let mut tokens = Vec::with_capacity(crops.len());
        let mut groups = Vec::with_capacity(crops.len());
        let mut scales = vec![[None, None]; self.blocks.len()];
        for crop in crops {
            let embedded = self.embed(crop.patches, crop.grid)?;
            let (images, count, _) = embedded.dims3()?;
            groups.push(Sequences { images, tokens: count });
            tokens.push(embedded.flatten(0, 1)?);
            for (all, own) in scales.iter_mut().zip(self.branch_scales(crop.draws)?) {
                for (all, own) in all.iter_mut().zip(own) {
                    // crops without stochastic depth beside others keep every branch
                    extend(all, own, images, groups.iter().map(|group| group.images).sum());
                }
            }
        }
        let plan = Plan { heads: self.heads, eps: LAYER_NORM_EPS, groups, scales, recompute: self.recompute };
        let mut tokens = Tensor::cat(&tokens, 0)?;
        if !tokens.track_op() && self.learns() {
            // embedded by frozen weights: without a variable here no backward pass would come to the blocks
            tokens = Var::from_tensor(&tokens)?.into_inner();
        }
        let features = self.ops.transformer(&tokens, &self.blocks, &plan, &self.sink)?;
        let mut row = 0;
        let mut by_crop = Vec::with_capacity(crops.len());
        for group in &plan.groups {
            let rows = features.narrow(0, row, group.rows())?;
            by_crop.push(rows.reshape((group.images, group.tokens, rows.dim(1)?))?);
            row += group.rows();
        }
        Ok(by_crop)
    }

    /// Whether the blocks are trained.
    fn learns(&self) -> bool {
        self.blocks.first().is_some_and(|block| block.qkv[0].track_op())
    }

    /// Factors of the residual branches of every block, attention and MLP, one per image.
    fn branch_scales(&self, draws: Option<&DropPathDraws>) -> Result<Vec<[Option<Vec<f32>>; 2]>> {
        let mut draws = draws.map(|draws| draws.iter());
        let mut of = |index: usize| match &mut draws {
            Some(draws) if self.drop_rates[index] > 0.0 => match draws.next() {
                Some(uniform) => Ok(Some(keep_scale(self.drop_rates[index], uniform))),
                None => candle_core::bail!("stochastic depth: too few draws for block {index}"),
            },
            _ => Ok(None),
        };
        (0..self.blocks.len()).map(|index| Ok([of(index)?, of(index)?])).collect()
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
        for (index, (block, scales)) in self.blocks.iter().zip(self.branch_scales(draws)?).enumerate() {
            x = self.block(&x, block, [scales[0].as_deref(), scales[1].as_deref()])?;
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
            x = self.block(&x, block, [None, None])?;
        }
        let normed = self.ops.layer_norm(&x, &last.norm1[0], &last.norm1[1], LAYER_NORM_EPS)?;
        self.ops.attention_weights(&self.ops.linear(&normed, &last.qkv[0], Some(&last.qkv[1]))?, self.heads)
    }

    fn block(&self, x: &Tensor, weights: &BlockWeights, scales: [Option<&[f32]>; 2]) -> Result<Tensor> {
        self.ops.transformer_block(x, weights, self.heads, LAYER_NORM_EPS, scales)
    }
}

/// Factor of a residual branch per sample: `floor(keep + u) / keep` with `keep = 1 - rate`.
fn keep_scale(rate: f64, uniform: &[f64]) -> Vec<f32> {
    let keep = 1.0 - rate;
    uniform.iter().map(|u| ((keep + u).floor() / keep) as f32).collect()
}

/// Appends the factors of `images` more images to those of the images before them, `total` in the end.
fn extend(all: &mut Option<Vec<f32>>, own: Option<Vec<f32>>, images: usize, total: usize) {
    if all.is_none() && own.is_none() {
        return;
    }
    let all = all.get_or_insert_with(|| vec![1.0; total - images]);
    match own {
        Some(own) => all.extend(own),
        None => all.resize(total, 1.0),
    }
}

/// The tensors of the block called `name`.
fn block_weights(parameters: &Parameters, name: &str) -> Result<BlockWeights> {
    let layer = |part: &str| weight_and_bias(parameters, &format!("{name}.{part}"));
    Ok(BlockWeights {
        norm1: layer("norm1")?,
        qkv: layer("attn.qkv")?,
        proj: layer("attn.proj")?,
        norm2: layer("norm2")?,
        fc1: layer("mlp.fc1")?,
        fc2: layer("mlp.fc2")?,
    })
}

#[cfg(test)]
mod tests {
    use super::{extend, keep_scale};

    #[test]
    fn crops_without_stochastic_depth_keep_every_branch() {
        let mut all = None;
        extend(&mut all, None, 2, 2);
        assert_eq!(all, None);
        extend(&mut all, Some(vec![0.0, 1.25]), 2, 4);
        extend(&mut all, None, 1, 5);
        assert_eq!(all, Some(vec![1.0, 1.0, 0.0, 1.25, 1.0]));
    }

    #[test]
    fn kept_branches_are_rescaled_and_dropped_ones_vanish() {
        assert_eq!(keep_scale(0.5, &[0.0, 0.49, 0.5, 0.99]), [0.0, 0.0, 2.0, 2.0]);
        assert_eq!(keep_scale(0.0, &[0.0, 0.99]), [1.0, 1.0]);
    }
}
