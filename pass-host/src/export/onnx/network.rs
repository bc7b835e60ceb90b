//! A Vision Transformer as a graph of standard operators.
//!
//! `LayerNormalization` is one node; GELU is the error function's composition and attention is written out, so that runtimes
//! older than those operators read the file and newer ones find the patterns that they fuse.

use super::graph::GraphBuilder;
use crate::export::ExportError;
use crate::export::source::Source;
use crate::model::{CLASS_ATTENTION_BLOCKS, LAYER_NORM_EPS};
use crate::onnx::Attribute;

/// Multiplies by weights `[out, in]`, which it finds by the name of the layer: float ones, or int8 ones with what belongs to them.
pub(super) trait Layers {
    /// `x·weightᵀ + bias` of the layer called `layer`; `x` is `[B, T, in]`, so is the output.
    fn linear(&self, graph: &mut GraphBuilder, layer: &str, x: &str) -> Result<String, ExportError>;

    /// Weight and bias of the norm called `layer`.
    fn norm(&self, layer: &str) -> Result<[Vec<f32>; 2], ExportError>;
}

/// The layers of a backbone.
pub(super) trait BackboneLayers: Layers {
    /// The patch embedding `[B, D, rows, columns]` of the images.
    fn patches(&self, graph: &mut GraphBuilder, images: &str) -> Result<String, ExportError>;
}

/// Where positions come from.
pub(super) enum Positions {
    /// `[N, D]`, of one grid.
    Fixed(Vec<f32>),
    /// Resized when the graph runs.
    Dynamic,
}

/// Sizes that the graph is made of.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) dim: usize,
    pub(super) depth: usize,
    pub(super) heads: usize,
}

/// Patch tokens `[B, N, D]` and prefix tokens `[B, P, D]` of a backbone, behind its final norm if it has one.
pub(super) struct Tokens {
    pub(super) all: String,
    pub(super) patches: String,
}

/// The backbone: embedding, blocks, final norm.
pub(super) fn backbone(
    graph: &mut GraphBuilder,
    layers: &dyn BackboneLayers,
    source: &Source,
    sizes: Sizes,
    positions: &Positions,
    images: &str,
) -> Result<Tokens, ExportError> {
    let Sizes { dim, depth, .. } = sizes;
    let map = layers.patches(graph, images)?;
    let flat = graph.reshape("patch_embed.flat", &map, &[0, dim as i64, -1]);
    let patches = graph.transpose("patch_embed.tokens", &flat, &[0, 2, 1]);
    let positions = match positions {
        Positions::Fixed(values) => graph.floats("pos_embed", &[1, values.len() / dim, dim], values),
        Positions::Dynamic => super::positions::resized(graph, source, &map)?,
    };
    let mut x = graph.node("Add", "embed", &[&patches, &positions], &[]);
    let prefix = source.prefix_tokens();
    if prefix > 0 {
        let tokens = source.values("backbone.prefix_tokens")?;
        let tokens = graph.floats("prefix_tokens", &[1, prefix, dim], &tokens);
        let tokens = for_every_image(graph, "prefix", &tokens, prefix, dim, images);
        x = graph.node("Concat", "embed.all", &[&tokens, &x], &[Attribute::of_int("axis", 1)]);
    }
    for block in 0..depth {
        x = transformer_block(graph, layers, sizes, &format!("blocks.{block}"), &x)?;
    }
    if source.has_final_norm() {
        x = norm(graph, "norm", layers.norm("norm")?, &x);
    }
    let patches = match prefix {
        0 => x.clone(),
        prefix => {
            let from = graph.ints("patches.from", &[prefix as i64]);
            let to = graph.ints("patches.to", &[i64::MAX]);
            let axis = graph.ints("patches.axis", &[1]);
            graph.node("Slice", "patches", &[&x, &from, &to, &axis], &[])
        }
    };
    Ok(Tokens { all: x, patches })
}

/// One feature an image, `[B, D]`, as [`Encoder::class_features`](crate::model::encoder::Encoder::class_features) makes it.
pub(super) fn class_feature(
    graph: &mut GraphBuilder,
    source: &Source,
    sizes: Sizes,
    tokens: &Tokens,
    images: &str,
    out: &str,
) -> Result<(), ExportError> {
    if source.has_aggregation() {
        let class = aggregation_head(graph, source, sizes, &tokens.patches, images)?;
        let axis = graph.ints("class.axis", &[1]);
        graph.node("Squeeze", out, &[&class, &axis], &[]);
    } else if source.prefix_tokens() > 0 {
        let first = graph.constant(&crate::onnx::TensorProto::of_ints("class.first", &[], &[0]));
        graph.node("Gather", out, &[&tokens.all, &first], &[Attribute::of_int("axis", 1)]);
    } else {
        let attributes = [Attribute::of_ints("axes", &[1]), Attribute::of_int("keepdims", 0)];
        graph.node("ReduceMean", out, &[&tokens.patches], &attributes);
    }
    Ok(())
}

/// `x += proj(attention(norm1(x)))`, `x += mlp(norm2(x))`.
fn transformer_block(
    graph: &mut GraphBuilder,
    layers: &dyn Layers,
    sizes: Sizes,
    name: &str,
    x: &str,
) -> Result<String, ExportError> {
    let normed = norm(graph, &format!("{name}.norm1"), layers.norm(&format!("{name}.norm1"))?, x);
    let qkv = layers.linear(graph, &format!("{name}.attn.qkv"), &normed)?;
    let parts = ["q", "k", "v"].map(|part| format!("{name}.attn.{part}"));
    let [q, k, v] = parts.each_ref().map(String::as_str);
    graph.node_with(
        "Split",
        &format!("{name}.attn.split"),
        &[&qkv],
        &[q, k, v],
        &[Attribute::of_int("axis", 2)],
    );
    let attended = attention(graph, sizes, &format!("{name}.attn"), [q, k, v]);
    let branch = layers.linear(graph, &format!("{name}.attn.proj"), &attended)?;
    let x = graph.node("Add", &format!("{name}.attn.residual"), &[x, &branch], &[]);
    let normed = norm(graph, &format!("{name}.norm2"), layers.norm(&format!("{name}.norm2"))?, &x);
    let branch = mlp(graph, layers, name, &normed)?;
    Ok(graph.node("Add", &format!("{name}.mlp.residual"), &[&x, &branch], &[]))
}

fn mlp(graph: &mut GraphBuilder, layers: &dyn Layers, block: &str, x: &str) -> Result<String, ExportError> {
    let hidden = layers.linear(graph, &format!("{block}.mlp.fc1"), x)?;
    let hidden = gelu(graph, &format!("{block}.mlp.gelu"), &hidden);
    layers.linear(graph, &format!("{block}.mlp.fc2"), &hidden)
}

/// `softmax(q·kᵀ/√d)·v` head by head; queries `[B, Q, D]`, keys and values `[B, T, D]`.
fn attention(graph: &mut GraphBuilder, sizes: Sizes, name: &str, [q, k, v]: [&str; 3]) -> String {
    let Sizes { dim, heads, .. } = sizes;
    let d = dim / heads;
    let by_head = |graph: &mut GraphBuilder, part: &str, x: &str, order: &[i64]| {
        let name = format!("{name}.{part}.heads");
        let split = graph.reshape(&name, x, &[0, 0, heads as i64, d as i64]);
        graph.transpose(&format!("{name}.first"), &split, order)
    };
    let q = by_head(graph, "q", q, &[0, 2, 1, 3]);
    let k = by_head(graph, "k", k, &[0, 2, 3, 1]);
    let v = by_head(graph, "v", v, &[0, 2, 1, 3]);
    let scale = graph.float("attention.scale", (d as f32).sqrt().recip());
    let q = graph.node("Mul", &format!("{name}.q.scaled"), &[&q, &scale], &[]);
    let scores = graph.node("MatMul", &format!("{name}.scores"), &[&q, &k], &[]);
    let weights =
        graph.node("Softmax", &format!("{name}.softmax"), &[&scores], &[Attribute::of_int("axis", -1)]);
    let out = graph.node("MatMul", &format!("{name}.mixed"), &[&weights, &v], &[]);
    let out = graph.transpose(&format!("{name}.tokens"), &out, &[0, 2, 1, 3]);
    graph.reshape(&format!("{name}.joined"), &out, &[0, 0, dim as i64])
}

/// `x/2 · (1 + erf(x/√2))`
fn gelu(graph: &mut GraphBuilder, name: &str, x: &str) -> String {
    let root = graph.float("gelu.root", std::f32::consts::SQRT_2);
    let one = graph.float("gelu.one", 1.0);
    let half = graph.float("gelu.half", 0.5);
    let scaled = graph.node("Div", &format!("{name}.scaled"), &[x, &root], &[]);
    let erf = graph.node("Erf", &format!("{name}.erf"), &[&scaled], &[]);
    let sum = graph.node("Add", &format!("{name}.sum"), &[&erf, &one], &[]);
    let product = graph.node("Mul", &format!("{name}.product"), &[x, &sum], &[]);
    graph.node("Mul", name, &[&product, &half], &[])
}

fn norm(graph: &mut GraphBuilder, name: &str, [weight, bias]: [Vec<f32>; 2], x: &str) -> String {
    let weight = graph.floats(&format!("{name}.weight"), &[weight.len()], &weight);
    let bias = graph.floats(&format!("{name}.bias"), &[bias.len()], &bias);
    let attributes = [Attribute::of_int("axis", -1), Attribute::of_float("epsilon", LAYER_NORM_EPS as f32)];
    graph.node("LayerNormalization", name, &[x, &weight, &bias], &attributes)
}

/// Tokens `[1, count, D]` repeated for the images of the batch.
fn for_every_image(
    graph: &mut GraphBuilder,
    name: &str,
    tokens: &str,
    count: usize,
    dim: usize,
    images: &str,
) -> String {
    let batch = [Attribute::of_int("start", 0), Attribute::of_int("end", 1)];
    let batch = graph.node("Shape", &format!("{name}.batch"), &[images], &batch);
    let sides = graph.ints(&format!("{name}.sides"), &[count as i64, dim as i64]);
    let axis = [Attribute::of_int("axis", 0)];
    let shape = graph.node("Concat", &format!("{name}.shape"), &[&batch, &sides], &axis);
    graph.node("Expand", &format!("{name}.expanded"), &[tokens, &shape], &[])
}

/// Float layers by the names that they have in the weights, `prefix` before those of the graph.
pub(super) struct FloatLayers<'s> {
    pub(super) source: &'s Source,
    pub(super) prefix: &'static str,
}

impl Layers for FloatLayers<'_> {
    fn linear(&self, graph: &mut GraphBuilder, layer: &str, x: &str) -> Result<String, ExportError> {
        let stored = format!("{}{layer}", self.prefix);
        let weight = self.source.tensor(&format!("{stored}.weight"))?.t()?;
        let (inputs, outputs) = weight.dims2()?;
        let weight: Vec<f32> = weight.flatten_all()?.to_vec1()?;
        let weight = graph.floats(&format!("{layer}.weight"), &[inputs, outputs], &weight);
        let bias = self.source.values(&format!("{stored}.bias"))?;
        let bias = graph.floats(&format!("{layer}.bias"), &[outputs], &bias);
        let product = graph.node("MatMul", &format!("{layer}.product"), &[x, &weight], &[]);
        Ok(graph.node("Add", layer, &[&product, &bias], &[]))
    }

    fn norm(&self, layer: &str) -> Result<[Vec<f32>; 2], ExportError> {
        let value = |part: &str| self.source.values(&format!("{}{layer}.{part}", self.prefix));
        Ok([value("weight")?, value("bias")?])
    }
}

impl BackboneLayers for FloatLayers<'_> {
    fn patches(&self, graph: &mut GraphBuilder, images: &str) -> Result<String, ExportError> {
        let name = "patch_embed.proj";
        let weight = self.source.tensor(&format!("{}{name}.weight", self.prefix))?;
        let dims = weight.dims().to_vec();
        let weight = graph.floats(&format!("{name}.weight"), &dims, &weight.flatten_all()?.to_vec1::<f32>()?);
        let bias = self.source.values(&format!("{}{name}.bias", self.prefix))?;
        let bias = graph.floats(&format!("{name}.bias"), &[bias.len()], &bias);
        Ok(patch_convolution(graph, [images, &weight, &bias], dims[3]))
    }
}

/// A convolution whose windows touch: pixels beyond the last whole patch are not read.
pub(super) fn patch_convolution(graph: &mut GraphBuilder, inputs: [&str; 3], side: usize) -> String {
    let side = [side as i64; 2];
    let attributes = [Attribute::of_ints("kernel_shape", &side), Attribute::of_ints("strides", &side)];
    graph.node("Conv", "patch_embed.proj", &inputs, &attributes)
}

/// The class token after attending over all patches, behind the final norm, `[B, 1, D]`.
fn aggregation_head(
    graph: &mut GraphBuilder,
    source: &Source,
    sizes: Sizes,
    patches: &str,
    images: &str,
) -> Result<String, ExportError> {
    let head = FloatLayers { source, prefix: "" };
    let token = graph.floats("ca_head.cls_token", &[1, 1, sizes.dim], &source.values("ca_head.cls_token")?);
    let mut class = for_every_image(graph, "ca_head.class", &token, 1, sizes.dim, images);
    for block in 0..CLASS_ATTENTION_BLOCKS {
        let name = format!("ca_head.cls_blocks.{block}");
        let axis = [Attribute::of_int("axis", 1)];
        let all = graph.node("Concat", &format!("{name}.all"), &[&class, patches], &axis);
        let normed = norm(graph, &format!("{name}.norm1"), head.norm(&format!("{name}.norm1"))?, &all);
        let bounds = [0, 1].map(|bound: i64| graph.ints(&format!("ca_head.{bound}"), &[bound]));
        let own = [normed.as_str(), &bounds[0], &bounds[1], &bounds[1]];
        let own = graph.node("Slice", &format!("{name}.class"), &own, &[]);
        let q = head.linear(graph, &format!("{name}.attn.q"), &own)?;
        let k = head.linear(graph, &format!("{name}.attn.k"), &normed)?;
        let v = head.linear(graph, &format!("{name}.attn.v"), &normed)?;
        let attended = attention(graph, sizes, &format!("{name}.attn"), [&q, &k, &v]);
        let branch = head.linear(graph, &format!("{name}.attn.proj"), &attended)?;
        class = graph.node("Add", &format!("{name}.attn.residual"), &[&class, &branch], &[]);
        let normed = norm(graph, &format!("{name}.norm2"), head.norm(&format!("{name}.norm2"))?, &class);
        let branch = mlp(graph, &head, &name, &normed)?;
        class = graph.node("Add", &format!("{name}.mlp.residual"), &[&class, &branch], &[]);
    }
    Ok(norm(graph, "ca_head.norm", head.norm("ca_head.norm")?, &class))
}
