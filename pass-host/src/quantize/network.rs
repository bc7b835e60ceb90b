//! A network quantized block by block.

use ndarray::{Array1, Array2, Axis, concatenate, s};
use pass_edge::format::Mode;
use pass_edge::writer::TensorData;

use super::fidelity;
use super::float_vit::{AsItIs, AtInput, FloatVit, Linear, Norm};
use super::round::{Gram, Rounded, quantized_rows, round_with_feedback};
use super::smooth::smooth;
use crate::data::augment::Planes;
use crate::pca::PrincipalComponents;

/// Rows of activations that smoothing is chosen on.
const SAMPLED_ROWS: usize = 2048;

/// Quantizes every input as the device does.
struct AsOnDevice;

impl AtInput for AsOnDevice {
    fn at_input(&mut self, _layer: usize, x: Array2<f32>) -> Array2<f32> {
        quantized_rows(&x)
    }
}

/// Keeps every `step`-th row of every input.
struct Sample {
    step: usize,
    rows: [Vec<Array2<f32>>; 4],
}

impl AtInput for Sample {
    fn at_input(&mut self, layer: usize, x: Array2<f32>) -> Array2<f32> {
        self.rows[layer].push(x.slice(s![..;self.step, ..]).to_owned());
        x
    }
}

/// Quantizes every input and sums its statistics.
struct Statistics([Gram; 4]);

impl AtInput for Statistics {
    fn at_input(&mut self, layer: usize, x: Array2<f32>) -> Array2<f32> {
        let x = quantized_rows(&x);
        self.0[layer].add(x.view());
        x
    }
}

/// The integers of a network, beside its folded float weights.
pub(super) struct Quantized {
    patch: Rounded,
    blocks: Vec<[Rounded; 4]>,
    /// Mean cosine of patch tokens after each block, on the photos measured on.
    pub(super) block_cosines: Vec<f64>,
    pca: PrincipalComponents,
}

/// Smooths and rounds a network block by block; `vit` keeps its features.
pub(super) fn quantize(
    vit: &mut FloatVit,
    mode: Mode,
    calibration: &[&Planes],
    measured: &[&Planes],
    mut progress: impl FnMut(usize, usize),
) -> Quantized {
    let limit = mode.weight_limit();
    let patches = vit.architecture.patches();
    let heads = vit.architecture.heads as usize;
    let mut gram = Gram::new(vit.patch.weight.ncols());
    for view in calibration {
        gram.add(vit.patches(view.data()).view());
    }
    let patch = round_with_feedback(&vit.patch.weight, &gram, limit);
    let rounded_vit = {
        let mut rounded = FloatVit { blocks: Vec::new(), ..vit.clone() };
        rounded.patch.weight = patch.dequantized();
        rounded
    };
    // two streams of tokens an image: as in float, and as on the device
    let all = || calibration.iter().chain(measured);
    let mut exact: Vec<_> = all().map(|view| vit.embed(view.data())).collect();
    let mut rounded: Vec<_> = all().map(|view| rounded_vit.embed(view.data())).collect();
    let step = (calibration.len() * vit.architecture.tokens()).div_ceil(SAMPLED_ROWS).max(1);
    let (mut blocks, mut block_cosines) = (Vec::new(), Vec::new());
    let depth = vit.blocks.len();
    for (index, block) in vit.blocks.iter_mut().enumerate() {
        let mut sample = Sample { step, rows: Default::default() };
        for x in &exact[..calibration.len()] {
            block.forward(&mut x.clone(), heads, &mut sample);
        }
        let inputs = sample.rows.map(|rows| {
            let views: Vec<_> = rows.iter().map(|rows| rows.view()).collect();
            concatenate(Axis(0), &views).unwrap_or_default()
        });
        smooth(block, &inputs, limit);
        let mut statistics = Statistics(block.layers().map(|layer| Gram::new(layer.weight.ncols())));
        for x in &rounded[..calibration.len()] {
            block.forward(&mut x.clone(), heads, &mut statistics);
        }
        let [qkv, proj, fc1, fc2] = block.layers();
        let [g0, g1, g2, g3] = &statistics.0;
        let layers = [(qkv, g0), (proj, g1), (fc1, g2), (fc2, g3)]
            .map(|(layer, gram)| round_with_feedback(&layer.weight, gram, limit));
        let mut on_device = block.clone();
        for (layer, rounded) in on_device.layers_mut().into_iter().zip(&layers) {
            layer.weight = rounded.dequantized();
        }
        let mut cosines = Vec::new();
        for (image, (exact, rounded)) in exact.iter_mut().zip(&mut rounded).enumerate() {
            block.forward(exact, heads, &mut AsItIs);
            on_device.forward(rounded, heads, &mut AsOnDevice);
            if image >= calibration.len() {
                let [exact, rounded] = [&*exact, &*rounded].map(|x| x.slice(s![..patches, ..]));
                cosines.extend(fidelity::cosines(exact, rounded));
            }
        }
        block_cosines.push(fidelity::mean(&cosines).unwrap_or(f64::NAN));
        blocks.push(layers);
        progress(index + 1, depth);
    }
    let features: Vec<_> = exact.into_iter().take(calibration.len()).map(|x| vit.finish(x)).collect();
    let views: Vec<_> = features.iter().map(|image| image.slice(ndarray::s![..patches, ..])).collect();
    let pca = PrincipalComponents::of(&views, super::PCA_COMPONENTS);
    Quantized { patch, blocks, block_cosines, pca }
}

impl Quantized {
    /// The numbers of the tensor `name` of the file.
    pub(super) fn tensor(&self, vit: &FloatVit, name: &str) -> TensorData {
        let floats = |values: &Array2<f32>| TensorData::F32(values.iter().copied().collect());
        let list = |values: &Array1<f32>| TensorData::F32(values.to_vec());
        let linear = |rounded: &Rounded, linear: &Linear, part: &str| match part {
            "weight" => TensorData::Int8(rounded.values.iter().copied().collect()),
            "scale" => list(&rounded.scales),
            _ => list(&linear.bias),
        };
        let norm = |norm: &Norm, part: &str| list(if part == "weight" { &norm.weight } else { &norm.bias });
        let (layer, part) = name.rsplit_once('.').unwrap_or((name, ""));
        let in_block = layer.strip_prefix("blocks.").and_then(|rest| rest.split_once('.'));
        if let Some((block, layer)) =
            in_block.and_then(|(block, layer)| Some((block.parse::<usize>().ok()?, layer)))
        {
            let (float, [qkv, proj, fc1, fc2]) = (&vit.blocks[block], &self.blocks[block]);
            return match layer {
                "norm1" => norm(&float.norm1, part),
                "norm2" => norm(&float.norm2, part),
                "attn.qkv" => linear(qkv, &float.qkv, part),
                "attn.proj" => linear(proj, &float.proj, part),
                "mlp.fc1" => linear(fc1, &float.fc1, part),
                _ => linear(fc2, &float.fc2, part),
            };
        }
        match (layer, part) {
            ("patch_embed.proj", part) => linear(&self.patch, &vit.patch, part),
            ("pos_embed", _) => floats(&vit.positions),
            ("prefix_tokens", _) => floats(&vit.prefix),
            ("norm", part) => {
                vit.norm.as_ref().map_or(TensorData::F32(Vec::new()), |found| norm(found, part))
            }
            ("pca", "mean") => list(&self.pca.mean),
            ("pca", _) => floats(&self.pca.directions),
            _ => TensorData::F32(self.block_cosines.iter().map(|cosine| *cosine as f32).collect()),
        }
    }
}
