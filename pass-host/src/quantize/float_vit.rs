//! The float network that a `.pass` file stands for, in the form of the file: raw pixels in, normalization and LayerScale
//! folded into the weights, positions of one grid. One image at a time, so that memory is that of one image.

use ndarray::{Array1, Array2, ArrayView2, Axis, s};
use pass_edge::format::{Architecture, Normalization};

use crate::model::LAYER_NORM_EPS;
use crate::ops::product::{Before, Threads, multiply};

/// `y = x·weightᵀ + bias`.
#[derive(Clone, Debug, PartialEq)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Array2<f32>,
    /// `[out]`.
    pub bias: Array1<f32>,
}

impl Linear {
    /// `x` `[rows, in]` to `[rows, out]`.
    pub fn forward(&self, x: ArrayView2<'_, f32>) -> Array2<f32> {
        let mut out = Array2::zeros((x.nrows(), self.weight.nrows()));
        multiply(out.view_mut(), Before::Ignored, 1.0, x, self.weight.t(), Threads::All);
        out += &self.bias;
        out
    }
}

/// LayerNorm over the channels.
#[derive(Clone, Debug, PartialEq)]
pub struct Norm {
    /// `[D]`.
    pub weight: Array1<f32>,
    /// `[D]`.
    pub bias: Array1<f32>,
}

impl Norm {
    /// Every row of `x` `[rows, D]`.
    pub fn forward(&self, x: ArrayView2<'_, f32>) -> Array2<f32> {
        let mut out = x.to_owned();
        for mut row in out.rows_mut() {
            let mean = row.sum() / row.len() as f32;
            row -= mean;
            let variance = row.iter().map(|x| x * x).sum::<f32>() / row.len() as f32;
            row *= 1.0 / (variance + LAYER_NORM_EPS as f32).sqrt();
            row *= &self.weight;
            row += &self.bias;
        }
        out
    }
}

/// One transformer block.
#[derive(Clone, Debug, PartialEq)]
pub struct Block {
    /// Before attention.
    pub norm1: Norm,
    /// Queries, keys, values, each `[heads, D/heads]`.
    pub qkv: Linear,
    /// After attention.
    pub proj: Linear,
    /// Before the MLP.
    pub norm2: Norm,
    /// Into the hidden layer.
    pub fc1: Linear,
    /// Out of it.
    pub fc2: Linear,
}

/// Something that sees the input of every linear map of a block and may change it: a quantizer, an observer.
pub trait AtInput {
    /// `layer` is 0 qkv, 1 proj, 2 fc1, 3 fc2.
    fn at_input(&mut self, layer: usize, x: Array2<f32>) -> Array2<f32>;
}

/// Lets everything pass.
pub struct AsItIs;

impl AtInput for AsItIs {
    fn at_input(&mut self, _layer: usize, x: Array2<f32>) -> Array2<f32> {
        x
    }
}

impl Block {
    /// The block's linear maps in the order of [`AtInput`].
    pub fn layers(&self) -> [&Linear; 4] {
        [&self.qkv, &self.proj, &self.fc1, &self.fc2]
    }

    /// The same, to be changed.
    pub fn layers_mut(&mut self) -> [&mut Linear; 4] {
        [&mut self.qkv, &mut self.proj, &mut self.fc1, &mut self.fc2]
    }

    /// `x` `[T, D]` becomes the block's output.
    pub fn forward(&self, x: &mut Array2<f32>, heads: usize, at: &mut impl AtInput) {
        let input = at.at_input(0, self.norm1.forward(x.view()));
        let attended = at.at_input(1, attention(&self.qkv.forward(input.view()), heads));
        *x += &self.proj.forward(attended.view());
        let input = at.at_input(2, self.norm2.forward(x.view()));
        let mut hidden = self.fc1.forward(input.view());
        hidden.mapv_inplace(pass_core::math::gelu);
        let hidden = at.at_input(3, hidden);
        *x += &self.fc2.forward(hidden.view());
    }
}

/// `softmax(q·kᵀ/√d)·v` head by head, from `qkv` `[T, 3·D]` to `[T, D]`.
fn attention(qkv: &Array2<f32>, heads: usize) -> Array2<f32> {
    let (tokens, dim) = (qkv.nrows(), qkv.ncols() / 3);
    let d = dim / heads;
    let mut out = Array2::zeros((tokens, dim));
    let mut scores = Array2::zeros((tokens, tokens));
    for head in 0..heads {
        let part = |part: usize| {
            let start = part * dim + head * d;
            qkv.slice(s![.., start..start + d])
        };
        let scale = (d as f32).sqrt().recip();
        multiply(scores.view_mut(), Before::Ignored, scale, part(0), part(1).reversed_axes(), Threads::All);
        for mut row in scores.rows_mut() {
            let most = row.iter().copied().fold(f32::MIN, f32::max);
            row.mapv_inplace(|score| (score - most).exp());
            let total = row.sum();
            row /= total;
        }
        let out = out.slice_mut(s![.., head * d..(head + 1) * d]);
        multiply(out, Before::Ignored, 1.0, scores.view(), part(2), Threads::All);
    }
    out
}

/// A Vision Transformer with float weights, folded as in a `.pass` file.
#[derive(Clone, Debug)]
pub struct FloatVit {
    /// Every size.
    pub architecture: Architecture,
    /// How pixels were normalized, before that was folded.
    pub normalization: Normalization,
    /// From pixels minus 128 to tokens, `[D, 3·p·p]`.
    pub patch: Linear,
    /// `[N, D]`.
    pub positions: Array2<f32>,
    /// Class token, then registers, `[P, D]`.
    pub prefix: Array2<f32>,
    /// The blocks.
    pub blocks: Vec<Block>,
    /// After the last block, if the network has one.
    pub norm: Option<Norm>,
}

impl FloatVit {
    /// Folds `(value/255 − mean)/std` into the patch embedding, which then takes bytes minus 128.
    pub(super) fn fold_normalization(&mut self) {
        let per_channel = self.patch.weight.ncols() / 3;
        let Normalization { mean, std } = self.normalization;
        for (mut weight, bias) in self.patch.weight.rows_mut().into_iter().zip(&mut self.patch.bias) {
            for (input, weight) in weight.iter_mut().enumerate() {
                let channel = input / per_channel;
                *bias += *weight * (128.0 / 255.0 - mean[channel]) / std[channel];
                *weight /= 255.0 * std[channel];
            }
        }
    }

    /// The pixels of every patch minus 128, `[N, 3·p·p]`: one plane a channel. `planes` is `[3, H, W]`.
    pub(super) fn patches(&self, planes: &[u8]) -> Array2<f32> {
        let (height, width) = self.architecture.image_size();
        let (side, columns) = (self.architecture.patch_size as usize, self.architecture.grid.1 as usize);
        Array2::from_shape_fn((self.architecture.patches(), 3 * side * side), |(patch, input)| {
            let (channel, y, x) = (input / (side * side), input / side % side, input % side);
            let (y, x) = (patch / columns * side + y, patch % columns * side + x);
            f32::from(planes[(channel * height + y) * width + x]) - 128.0
        })
    }

    /// Tokens before the first block, `[N + P, D]`: patches first, as in the file.
    pub(super) fn embed(&self, planes: &[u8]) -> Array2<f32> {
        let patches = self.patch.forward(self.patches(planes).view()) + &self.positions;
        let mut tokens = Array2::zeros((self.architecture.tokens(), self.architecture.dim()));
        let (mut first, mut last) = tokens.view_mut().split_at(Axis(0), patches.nrows());
        first.assign(&patches);
        last.assign(&self.prefix);
        tokens
    }

    /// The final norm, if there is one.
    pub(super) fn finish(&self, x: Array2<f32>) -> Array2<f32> {
        match &self.norm {
            Some(norm) => norm.forward(x.view()),
            None => x,
        }
    }

    /// Features `[N + P, D]` of an image `[3, H, W]`, patch tokens first.
    pub fn forward(&self, planes: &[u8]) -> Array2<f32> {
        let mut x = self.embed(planes);
        for block in &self.blocks {
            block.forward(&mut x, self.architecture.heads as usize, &mut AsItIs);
        }
        self.finish(x)
    }
}
