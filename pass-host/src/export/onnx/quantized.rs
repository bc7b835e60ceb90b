//! The int8 layers of a `.pass` file between QuantizeLinear and DequantizeLinear.
//!
//! Weights are the integers of the file, one scale an output, behind a DequantizeLinear. Activations are quantized as the device does
//! it: symmetric int8 with a scale per token, the largest magnitude of its row over 127. QuantizeLinear takes a scale per slice of an
//! axis, and scales may be computed, so tokens of all images become one axis for it. Given scales measured on photos
//! ([`input_scales`](crate::quantize::input_scales)), an activation has one scale instead, a constant, as runtimes want it that fuse
//! the pairs into int8 kernels, or stays float where one scale would lose too much. The products of attention, which the device forms in 12-bit integers, stay float: no operator has
//! 12 bits.

use super::graph::GraphBuilder;
use super::network::{BackboneLayers, Layers, patch_convolution};
use crate::export::ExportError;
use crate::onnx::{Attribute, INT8, TensorProto};
use crate::quantize::input_scales::InputScales;
use crate::quantize::pass_file::PassFile;

/// Largest magnitude of an int8 activation.
const LIMIT: f32 = 127.0;
/// Instead of the scale of a row of zeros, by which nothing can be divided.
const SMALLEST_SCALE: f32 = 1e-30;

/// The layers of a file.
pub(super) struct QuantizedLayers<'f> {
    pub(super) file: &'f PassFile,
    /// Scales of activations; nothing = one a token, computed.
    pub(super) scales: Option<&'f InputScales>,
}

/// A linear map of the file.
struct Linear<'f> {
    /// `[out, in]`
    weight: &'f [i8],
    scale: &'f [f32],
    bias: &'f [f32],
}

impl QuantizedLayers<'_> {
    fn layer(&self, layer: &str) -> Result<Linear<'_>, ExportError> {
        Ok(Linear {
            weight: self.file.int8s(&format!("{layer}.weight"))?,
            scale: self.file.floats(&format!("{layer}.scale"))?,
            bias: self.file.floats(&format!("{layer}.bias"))?,
        })
    }
}

impl Layers for QuantizedLayers<'_> {
    fn linear(&self, graph: &mut GraphBuilder, layer: &str, x: &str) -> Result<String, ExportError> {
        let Linear { weight, scale, bias } = self.layer(layer)?;
        let (outputs, inputs) = (bias.len(), weight.len() / bias.len());
        let transposed: Vec<i8> =
            (0..inputs * outputs).map(|at| weight[at % outputs * inputs + at / outputs]).collect();
        let weight = dequantized_weight(graph, layer, &[inputs, outputs], &transposed, scale, 1);
        let x = match self.scales.map(|scales| scales.of(layer)) {
            Some(Some(scale)) => rounded(graph, &format!("{layer}.input"), x, scale),
            Some(None) => x.to_owned(),
            None => per_token(graph, layer, x, inputs),
        };
        let bias = graph.floats(&format!("{layer}.bias"), &[outputs], bias);
        let product = graph.node("MatMul", &format!("{layer}.product"), &[&x, &weight], &[]);
        Ok(graph.node("Add", layer, &[&product, &bias], &[]))
    }

    fn norm(&self, layer: &str) -> Result<[Vec<f32>; 2], ExportError> {
        let value = |part: &str| self.file.floats(&format!("{layer}.{part}"));
        Ok([value("weight")?.to_vec(), value("bias")?.to_vec()])
    }
}

impl BackboneLayers for QuantizedLayers<'_> {
    fn patches(&self, graph: &mut GraphBuilder, images: &str) -> Result<String, ExportError> {
        let layer = "patch_embed.proj";
        let Linear { weight, scale, bias } = self.layer(layer)?;
        let side = self.file.architecture.patch_size as usize;
        let weight = dequantized_weight(graph, layer, &[bias.len(), 3, side, side], weight, scale, 0);
        let bias = graph.floats(&format!("{layer}.bias"), &[bias.len()], bias);
        // bytes minus 128 are integers already
        let images = rounded(graph, "pixels.whole", images, 1.0);
        Ok(patch_convolution(graph, [&images, &weight, &bias], side))
    }
}

/// Weights with a scale per slice of `axis`.
fn dequantized_weight(
    graph: &mut GraphBuilder,
    layer: &str,
    dims: &[usize],
    weight: &[i8],
    scale: &[f32],
    axis: i64,
) -> String {
    let weight = graph.constant(&TensorProto::of_int8s(&format!("{layer}.weight"), dims, weight));
    let zeros = TensorProto::of_int8s(&format!("{layer}.zero"), &[scale.len()], &vec![0; scale.len()]);
    let zeros = graph.constant(&zeros);
    let scale = graph.floats(&format!("{layer}.scale"), &[scale.len()], scale);
    let name = format!("{layer}.weight.float");
    graph.node("DequantizeLinear", &name, &[&weight, &scale, &zeros], &[Attribute::of_int("axis", axis)])
}

/// `x` rounded to int8 with one scale.
fn rounded(graph: &mut GraphBuilder, name: &str, x: &str, scale: f32) -> String {
    let scale = graph.float(&format!("{name}.scale"), scale);
    let zero = graph.constant(&TensorProto::of_int8s("int8.zero", &[], &[0]));
    let rounded = graph.node("QuantizeLinear", &format!("{name}.int8"), &[x, &scale, &zero], &[]);
    graph.node("DequantizeLinear", &format!("{name}.float"), &[&rounded, &scale, &zero], &[])
}

/// `x` `[B, T, width]` rounded to int8 with a scale per token.
fn per_token(graph: &mut GraphBuilder, layer: &str, x: &str, width: usize) -> String {
    let name = |part: &str| format!("{layer}.input.{part}");
    let rows = graph.reshape(&name("rows"), x, &[-1, width as i64]);
    let magnitudes = graph.node("Abs", &name("abs"), &[&rows], &[]);
    let attributes = [Attribute::of_ints("axes", &[1]), Attribute::of_int("keepdims", 0)];
    let largest = graph.node("ReduceMax", &name("largest"), &[&magnitudes], &attributes);
    let limit = graph.float("int8.limit", LIMIT);
    let scale = graph.node("Div", &name("scale"), &[&largest, &limit], &[]);
    let smallest = graph.float("int8.smallest", SMALLEST_SCALE);
    let scale = graph.node("Max", &name("scale.positive"), &[&scale, &smallest], &[]);
    let nothing = graph.float("int8.nothing", 0.0);
    let zeros = graph.node("Mul", &name("zeros"), &[&scale, &nothing], &[]);
    let to_int8 = [Attribute::of_int("to", i64::from(INT8))];
    let zeros = graph.node("Cast", &name("zeros.int8"), &[&zeros], &to_int8);
    let axis = [Attribute::of_int("axis", 0)];
    let rounded = graph.node("QuantizeLinear", &name("int8"), &[&rows, &scale, &zeros], &axis);
    let rounded = graph.node("DequantizeLinear", &name("float"), &[&rounded, &scale, &zeros], &axis);
    let shape = graph.node("Shape", &name("shape"), &[x], &[]);
    graph.node("Reshape", &name("tokens"), &[&rounded, &shape], &[])
}
