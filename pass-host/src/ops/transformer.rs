//! All blocks of a Vision Transformer as one operation over the rows of all crops: products run over crops of every
//! size at once, nothing but the blocks' own intermediate values is kept, and no gradient passes through candle's store
//! between the blocks.
//!
//! For its backward pass a block keeps its input, the packed projections, the attention's result, the tokens between
//! its halves and the input of the GELU: `10·R·D` values; normalized tokens, probabilities and the GELU are formed
//! again. With `recompute` it keeps only its input and runs forward once more, with the same bits.

use super::Ops;
use super::access::{output, stored, tensor, values, with_values};
use super::attention::{self, Sequences};
use super::buffer::zeros;
use super::dense::{Weight, column_sums, gelu, gelu_backward, gelu_into, repeated, residual, scale_rows};
use super::gradient_sink::GradientSink;
use super::layer_norm::{add_gradient, normalize};
use super::product::Before;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use std::sync::{Mutex, PoisonError};

/// The tensors of one pre-norm block, each weight with its bias.
#[derive(Clone, Debug)]
pub struct BlockWeights {
    /// LayerNorm before the attention, `[D]`.
    pub norm1: [Tensor; 2],
    /// Packed projections, `[3D, D]`.
    pub qkv: [Tensor; 2],
    /// Projection after the attention, `[D, D]`.
    pub proj: [Tensor; 2],
    /// LayerNorm before the MLP, `[D]`.
    pub norm2: [Tensor; 2],
    /// First layer of the MLP, `[hidden, D]`.
    pub fc1: [Tensor; 2],
    /// Second layer of the MLP, `[D, hidden]`.
    pub fc2: [Tensor; 2],
}

impl BlockWeights {
    pub(super) fn tensors(&self) -> [&Tensor; 12] {
        let pairs = [&self.norm1, &self.qkv, &self.proj, &self.norm2, &self.fc1, &self.fc2];
        in_order(pairs.map(|pair| [&pair[0], &pair[1]]))
    }

    /// The same values without variables.
    pub(super) fn detached(&self) -> Self {
        let detached = |pair: &[Tensor; 2]| [pair[0].detach(), pair[1].detach()];
        Self {
            norm1: detached(&self.norm1),
            qkv: detached(&self.qkv),
            proj: detached(&self.proj),
            norm2: detached(&self.norm2),
            fc1: detached(&self.fc1),
            fc2: detached(&self.fc2),
        }
    }
}

/// How the blocks are run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Attention heads.
    pub heads: usize,
    /// ε of the LayerNorms.
    pub eps: f64,
    /// Which rows belong together.
    pub groups: Vec<Sequences>,
    /// Factors of the residual branches of every block, attention and MLP, one per image of all groups; `None` = 1.
    pub scales: Vec<[Option<Vec<f32>>; 2]>,
    /// Whether the backward pass runs every block forward again instead of keeping its intermediate values.
    pub recompute: bool,
}

impl Plan {
    fn rows(&self) -> usize {
        self.groups.iter().map(Sequences::rows).sum()
    }

    /// Factors per row instead of per image.
    fn by_row(&self, scale: Option<&[f32]>) -> Option<Vec<f32>> {
        let scale = scale?;
        let images = self.groups.iter().flat_map(|group| std::iter::repeat_n(group.tokens, group.images));
        Some(images.zip(scale).flat_map(|(tokens, &factor)| std::iter::repeat_n(factor, tokens)).collect())
    }
}

pub(super) fn check(x: &Tensor, blocks: &[BlockWeights], plan: &Plan) -> Result<()> {
    let (rows, dim) = x.dims2()?;
    if rows != plan.rows() || rows == 0 {
        bail!("transformer: {:?} need x [{}, D], found {:?}", plan.groups, plan.rows(), x.shape())
    }
    if plan.heads == 0 || dim == 0 || dim % plan.heads != 0 {
        bail!("transformer: {} heads do not divide D of x {:?}", plan.heads, x.shape())
    }
    let images: usize = plan.groups.iter().map(|group| group.images).sum();
    let wrong = |scale: &Option<Vec<f32>>| scale.as_ref().is_some_and(|scale| scale.len() != images);
    if plan.scales.len() != blocks.len() || plan.scales.iter().flatten().any(wrong) {
        bail!("transformer: {} blocks and {images} images need as many factors", blocks.len())
    }
    for (index, block) in blocks.iter().enumerate() {
        let hidden = block.fc1[0].dim(0)?;
        let expected: [(&str, &[Tensor; 2], usize, Option<usize>); 6] = [
            ("norm1", &block.norm1, dim, None),
            ("qkv", &block.qkv, 3 * dim, Some(dim)),
            ("proj", &block.proj, dim, Some(dim)),
            ("norm2", &block.norm2, dim, None),
            ("fc1", &block.fc1, hidden, Some(dim)),
            ("fc2", &block.fc2, dim, Some(hidden)),
        ];
        for (name, [weight, bias], outputs, inputs) in expected {
            let shape: Vec<usize> = std::iter::once(outputs).chain(inputs).collect();
            if weight.dims() != shape || bias.dims() != [outputs] {
                bail!(
                    "transformer: block {index}, {name}: expected {shape:?} and [{outputs}], found {:?} and {:?}",
                    weight.shape(),
                    bias.shape()
                )
            }
        }
    }
    Ok(())
}

/// One block by single operations, on the tokens `[B, N, D]` of one group.
pub(super) fn block(
    ops: Ops,
    x: &Tensor,
    weights: &BlockWeights,
    heads: usize,
    eps: f64,
    [attention_scale, mlp_scale]: [Option<&[f32]>; 2],
) -> Result<Tensor> {
    let BlockWeights { norm1, qkv, proj, norm2, fc1, fc2 } = weights;
    let normed = ops.layer_norm(x, &norm1[0], &norm1[1], eps)?;
    let packed = ops.linear(&normed, &qkv[0], Some(&qkv[1]))?; // [B, N, 3D]
    let attended = ops.attention(&packed, heads)?;
    let branch = ops.linear(&attended, &proj[0], Some(&proj[1]))?;
    let x = ops.add_scaled(x, &branch, attention_scale)?;
    let normed = ops.layer_norm(&x, &norm2[0], &norm2[1], eps)?;
    let hidden = ops.linear_gelu(&normed, &fc1[0], &fc1[1])?;
    let branch = ops.linear(&hidden, &fc2[0], Some(&fc2[1]))?;
    ops.add_scaled(&x, &branch, mlp_scale)
}

pub(super) fn composition(ops: Ops, x: &Tensor, blocks: &[BlockWeights], plan: &Plan) -> Result<Tensor> {
    let dim = x.dim(1)?;
    let (mut row, mut image) = (0, 0);
    let mut outputs = Vec::with_capacity(plan.groups.len());
    for group in &plan.groups {
        let mut tokens = x.narrow(0, row, group.rows())?.reshape((group.images, group.tokens, dim))?;
        for (weights, scales) in blocks.iter().zip(&plan.scales) {
            let scales = [&scales[0], &scales[1]]
                .map(|scale| scale.as_ref().map(|scale| &scale[image..image + group.images]));
            tokens = block(ops, &tokens, weights, plan.heads, plan.eps, scales)?;
        }
        outputs.push(tokens.reshape((group.rows(), dim))?);
        (row, image) = (row + group.rows(), image + group.images);
    }
    Tensor::cat(&outputs, 0)
}

pub(super) fn fused(x: &Tensor, blocks: &[BlockWeights], plan: &Plan, sink: &GradientSink) -> Result<Tensor> {
    let x = x.contiguous()?;
    let scales = |part: usize| plan.scales.iter().map(move |scales| plan.by_row(scales[part].as_deref()));
    let operation = Transformer {
        blocks: blocks.to_vec(),
        scales: scales(0).zip(scales(1)).map(|(attention, mlp)| [attention, mlp]).collect(),
        plan: plan.clone(),
        tracked: x.track_op(),
        sink: sink.clone(),
        saved: Mutex::default(),
    };
    x.apply_op1(operation)
}

struct Transformer {
    blocks: Vec<BlockWeights>,
    /// Factors of the residual branches of every block, one per row.
    scales: Vec<[Option<Vec<f32>>; 2]>,
    plan: Plan,
    /// Whether a backward pass may follow.
    tracked: bool,
    sink: GradientSink,
    /// What the blocks keep for the backward pass, taken by it block by block.
    saved: Mutex<Vec<Saved>>,
}

/// What one block keeps.
struct Saved {
    /// Its input; `None` for the first block, whose input the graph has.
    input: Option<Vec<f32>>,
    /// Its intermediate values, unless they are formed again.
    inner: Option<Inner>,
}

/// Intermediate values of a block.
struct Inner {
    /// Packed projections, `[R, 3D]`.
    qkv: Vec<f32>,
    /// Result of the attention times the factors of its branch, `[R, D]`.
    attended: Vec<f32>,
    /// Tokens between the halves, `[R, D]`.
    middle: Vec<f32>,
    /// Input of the GELU, `[R, hidden]`.
    hidden: Vec<f32>,
}

/// The values of [`BlockWeights`] and where they are used.
struct Block<'a> {
    norm1: [&'a [f32]; 2],
    qkv: (Weight<'a>, &'a [f32]),
    proj: (Weight<'a>, &'a [f32]),
    norm2: [&'a [f32]; 2],
    fc1: (Weight<'a>, &'a [f32]),
    fc2: (Weight<'a>, &'a [f32]),
    scales: [Option<&'a [f32]>; 2],
    plan: &'a Plan,
}

/// Gradients of the tensors of a block, in the order of [`BlockWeights::tensors`].
type BlockGradients = [Vec<f32>; 12];

impl<'a> Block<'a> {
    fn new(tensors: [&'a [f32]; 12], scales: &'a [Option<Vec<f32>>; 2], plan: &'a Plan) -> Self {
        let [n1w, n1b, qkv_w, qkv_b, proj_w, proj_b, n2w, n2b, fc1_w, fc1_b, fc2_w, fc2_b] = tensors;
        let layer = |weight: &'a [f32], bias: &'a [f32]| {
            (Weight::new(weight, bias.len(), weight.len() / bias.len()), bias)
        };
        Self {
            norm1: [n1w, n1b],
            qkv: layer(qkv_w, qkv_b),
            proj: layer(proj_w, proj_b),
            norm2: [n2w, n2b],
            fc1: layer(fc1_w, fc1_b),
            fc2: layer(fc2_w, fc2_b),
            scales: [scales[0].as_deref(), scales[1].as_deref()],
            plan,
        }
    }

    fn normalized(&self, x: &[f32], [weight, bias]: [&[f32]; 2], out: &mut [f32]) {
        normalize(x, weight, bias, self.plan.eps as f32, out);
    }

    /// Everything up to the input of the GELU; `normed`: `[R, D]`, overwritten.
    fn inner(&self, x: &[f32], normed: &mut [f32]) -> Result<Inner> {
        let rows = self.plan.rows();
        let dim = x.len() / rows;
        self.normalized(x, self.norm1, normed);
        let mut qkv = repeated(self.qkv.1, rows);
        self.qkv.0.apply(normed, Before::Kept, &mut qkv);
        let mut attended = zeros(x.len());
        attention::forward(&qkv, &self.plan.groups, self.plan.heads, &mut attended)?;
        // the factor of the branch goes before its last layer: one product then adds to the residual stream itself
        scale_rows(&mut attended, dim, self.scales[0]);
        let mut middle = residual(x, self.proj.1, self.scales[0]);
        self.proj.0.apply(&attended, Before::Kept, &mut middle);
        self.normalized(&middle, self.norm2, normed);
        let mut hidden = repeated(self.fc1.1, rows);
        self.fc1.0.apply(normed, Before::Kept, &mut hidden);
        Ok(Inner { qkv, attended, middle, hidden })
    }

    /// The output of the block from its activated hidden values.
    fn output(&self, middle: &[f32], activated: &[f32]) -> Vec<f32> {
        let mut out = residual(middle, self.fc2.1, self.scales[1]);
        self.fc2.0.apply(activated, Before::Kept, &mut out);
        out
    }

    /// Turns the gradient of the output, `d`, into that of the input.
    fn backward(
        &self,
        x: &[f32],
        inner: Inner,
        d: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<BlockGradients> {
        let Inner { qkv, attended, middle, mut hidden } = inner;
        let (dim, width) = (x.len() / self.plan.rows(), self.fc1.0.outputs());
        let eps = self.plan.eps as f32;

        let d_hidden = &mut scratch.wide[..hidden.len()];
        self.fc2.0.input_gradient(1.0, d, d_hidden);
        gelu_backward(&mut hidden, d_hidden, width, self.scales[1]);
        let fc2 = [self.fc2.0.gradient(1.0, d, &hidden), column_sums(d, dim, self.scales[1])];
        drop(hidden);
        self.normalized(&middle, self.norm2, &mut scratch.normed);
        let fc1 = [self.fc1.0.gradient(1.0, d_hidden, &scratch.normed), column_sums(d_hidden, width, None)];
        self.fc1.0.input_gradient(1.0, d_hidden, &mut scratch.normed);
        let norm2 = add_gradient(&middle, self.norm2[0], eps, &scratch.normed, d);
        drop(middle);

        let proj = [self.proj.0.gradient(1.0, d, &attended), column_sums(d, dim, self.scales[0])];
        drop(attended);
        self.proj.0.input_gradient(1.0, d, &mut scratch.normed);
        scale_rows(&mut scratch.normed, dim, self.scales[0]);
        let d_qkv = &mut scratch.wide[..qkv.len()];
        attention::backward(&qkv, &self.plan.groups, self.plan.heads, &scratch.normed, d_qkv)?;
        drop(qkv);
        self.normalized(x, self.norm1, &mut scratch.normed);
        let packed = [self.qkv.0.gradient(1.0, d_qkv, &scratch.normed), column_sums(d_qkv, 3 * dim, None)];
        self.qkv.0.input_gradient(1.0, d_qkv, &mut scratch.normed);
        let norm1 = add_gradient(x, self.norm1[0], eps, &scratch.normed, d);
        Ok(in_order([norm1, packed, proj, norm2, fc1, fc2]))
    }
}

/// Buffers of a pass, used by every block.
struct Scratch {
    /// `[R, D]`
    normed: Vec<f32>,
    /// `[R, max(hidden, 3D)]`
    wide: Vec<f32>,
}

/// Six pairs one after the other.
fn in_order<T>(pairs: [[T; 2]; 6]) -> [T; 12] {
    let [[a, b], [c, d], [e, f], [g, h], [i, j], [k, l]] = pairs;
    [a, b, c, d, e, f, g, h, i, j, k, l]
}

impl Transformer {
    /// Calls `task` with the values of a block.
    fn with_block<R>(&self, index: usize, task: impl FnOnce(&Block<'_>) -> Result<R>) -> Result<R> {
        with_values(self.blocks[index].tensors(), |tensors| {
            task(&Block::new(tensors, &self.scales[index], &self.plan))
        })
    }

    fn scratch(&self, len: usize) -> Result<Scratch> {
        let rows = self.plan.rows();
        let mut widest = 3 * len / rows;
        for block in &self.blocks {
            widest = widest.max(block.fc1[0].dim(0)?);
        }
        Ok(Scratch { normed: zeros(len), wide: zeros(rows * widest) })
    }

    /// Output of the last block, and what the blocks keep for a backward pass.
    fn forward(&self, first: &[f32]) -> Result<(Vec<f32>, Vec<Saved>)> {
        let mut scratch = self.scratch(first.len())?;
        let mut saved = Vec::with_capacity(self.blocks.len());
        let mut before: Option<Vec<f32>> = None;
        for index in 0..self.blocks.len() {
            let x = before.as_deref().unwrap_or(first);
            let (out, inner) = self.with_block(index, |block| {
                let mut inner = block.inner(x, &mut scratch.normed)?;
                let width = block.fc1.0.outputs();
                if !self.tracked || self.plan.recompute {
                    gelu(&mut inner.hidden, width, block.scales[1]);
                    return Ok((block.output(&inner.middle, &inner.hidden), None));
                }
                let activated = &mut scratch.wide[..inner.hidden.len()];
                gelu_into(&inner.hidden, width, block.scales[1], activated);
                Ok((block.output(&inner.middle, activated), Some(inner)))
            })?;
            let input = before.replace(out);
            if self.tracked {
                saved.push(Saved { input, inner });
            }
        }
        Ok((before.unwrap_or_else(|| first.to_vec()), saved))
    }
}

impl CustomOp1 for Transformer {
    fn name(&self) -> &'static str {
        "transformer"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (out, saved) = self.forward(values(x, layout)?)?;
        *self.saved.lock().unwrap_or_else(PoisonError::into_inner) = saved;
        output(out, layout.shape())
    }

    fn bwd(&self, x: &Tensor, _result: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let saved = std::mem::take(&mut *self.saved.lock().unwrap_or_else(PoisonError::into_inner));
        if saved.len() != self.blocks.len() {
            bail!("transformer: a second backward pass, or one without a tracked forward pass")
        }
        let (storage, layout) = x.storage_and_layout();
        let first = stored(&storage, layout)?;
        let mut scratch = self.scratch(first.len())?;
        let mut d = with_values([&gradient.contiguous()?], |[gradient]| Ok(gradient.to_vec()))?;
        for (index, saved) in saved.into_iter().enumerate().rev() {
            let x = saved.input.as_deref().unwrap_or(first);
            let gradients = self.with_block(index, |block| {
                let inner = match saved.inner {
                    Some(inner) => inner,
                    None => block.inner(x, &mut scratch.normed)?,
                };
                block.backward(x, inner, &mut d, &mut scratch)
            })?;
            for (parameter, gradient) in self.blocks[index].tensors().into_iter().zip(gradients) {
                self.sink.add(parameter, gradient)?;
            }
        }
        Ok(Some(tensor(d, x.shape())?))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use candle_core::{DType, Device, Var};

    const DIM: usize = 24;
    const HIDDEN: usize = 40;
    const DEPTH: usize = 3;

    fn plan(recompute: bool) -> Plan {
        let kept =
            |seed: u64| Some(numbers(seed, 5).iter().map(|v| if *v > 0.3 { 0.0 } else { 1.25 }).collect());
        Plan {
            heads: 3,
            eps: 1e-6,
            groups: vec![Sequences { images: 2, tokens: 17 }, Sequences { images: 3, tokens: 6 }],
            scales: vec![[None, None], [kept(1), None], [kept(2), kept(3)]],
            recompute,
        }
    }

    fn blocks(dtype: DType) -> Vec<BlockWeights> {
        let tensor = |seed: u64, shape: &[usize]| {
            let values = (random(seed, shape) * 0.3).unwrap().to_dtype(dtype).unwrap();
            Var::from_tensor(&values).unwrap().as_tensor().clone()
        };
        (0..DEPTH as u64)
            .map(|block| {
                let pair = |seed: u64, shape: &[usize]| {
                    [tensor(100 * block + 2 * seed, shape), tensor(100 * block + 2 * seed + 1, &shape[..1])]
                };
                BlockWeights {
                    norm1: pair(1, &[DIM]),
                    qkv: pair(2, &[3 * DIM, DIM]),
                    proj: pair(3, &[DIM, DIM]),
                    norm2: pair(4, &[DIM]),
                    fc1: pair(5, &[HIDDEN, DIM]),
                    fc2: pair(6, &[DIM, HIDDEN]),
                }
            })
            .collect()
    }

    /// Output, gradient of the input, gradients of all parameters.
    fn pass(ops: Ops, recompute: bool, dtype: DType) -> Vec<Vec<f64>> {
        let plan = plan(recompute);
        let (blocks, sink) = (blocks(dtype), GradientSink::default());
        let x = Var::from_tensor(&random(7, &[plan.rows(), DIM]).to_dtype(dtype).unwrap()).unwrap();
        let out = ops.transformer(x.as_tensor(), &blocks, &plan, &sink).unwrap();
        let weights = random(99, out.dims()).to_dtype(dtype).unwrap();
        let store = (&out * weights).unwrap().sum_all().unwrap().backward().unwrap();
        let mut found = vec![flat(&out), flat(store.get(&x).unwrap())];
        for parameter in blocks.iter().flat_map(BlockWeights::tensors) {
            let gradient = sink.take(parameter).or_else(|| store.get(parameter).cloned());
            found.push(flat(&gradient.expect("a gradient")));
        }
        found
    }

    #[test]
    fn fused_agrees_with_composition() {
        let (fused, exact) =
            (pass(Ops::fused(), false, DType::F32), pass(Ops::reference(), false, DType::F64));
        for (i, (found, exact)) in fused.iter().zip(&exact).enumerate() {
            let largest = exact.iter().fold(1.0f64, |a, b| a.max(b.abs()));
            let scaled = |values: &[f64]| values.iter().map(|v| v / largest).collect::<Vec<_>>();
            assert_close(&format!("tensor {i}"), &scaled(found), &scaled(exact), 1e-5);
        }
    }

    #[test]
    fn bits_depend_neither_on_threads_nor_on_what_is_kept() {
        let one = with_threads(1, || pass(Ops::fused(), false, DType::F32));
        assert!(one == with_threads(3, || pass(Ops::fused(), false, DType::F32)), "threads");
        assert!(one == with_threads(2, || pass(Ops::fused(), true, DType::F32)), "recompute");
        let single = |recompute| pass(Ops::reference(), recompute, DType::F64);
        for (i, (kept, again)) in single(false).iter().zip(&single(true)).enumerate() {
            assert_close(&format!("tensor {i} by single operations"), kept, again, 1e-12);
        }
    }

    #[test]
    fn a_pass_that_is_not_tracked_gives_the_same_and_keeps_nothing() {
        let plan = plan(false);
        let blocks = blocks(DType::F32);
        let x = random(7, &[plan.rows(), DIM]);
        let out = Ops::fused().transformer(&x, &blocks, &plan, &GradientSink::default()).unwrap();
        assert!(!out.track_op());
        assert!(flat(&out) == pass(Ops::fused(), false, DType::F32)[0]);
    }

    #[test]
    fn wrong_shapes_are_refused() {
        let (blocks, sink) = (blocks(DType::F32), GradientSink::default());
        let refused = |x: &Tensor, blocks: &[BlockWeights], plan: &Plan| {
            Ops::fused().transformer(x, blocks, plan, &sink).unwrap_err().to_string()
        };
        let right = random(1, &[52, DIM]);
        assert!(refused(&random(1, &[51, DIM]), &blocks, &plan(false)).contains("[52, D]"));
        assert!(refused(&right, &blocks[1..], &plan(false)).contains("2 blocks"));
        assert!(refused(&right, &blocks, &Plan { heads: 5, ..plan(false) }).contains("5 heads"));
        let mut wrong = blocks.clone();
        wrong[1].fc2 = wrong[1].proj.clone();
        assert!(refused(&right, &wrong, &plan(false)).contains("block 1, fc2"));
        let zero = Tensor::zeros((52, DIM), DType::F32, &Device::Cpu).unwrap();
        assert!(Ops::fused().transformer(&zero, &blocks, &plan(true), &sink).is_ok());
    }
}
