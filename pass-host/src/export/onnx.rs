//! ONNX: the backbone with the class token's head as one graph, for onnxruntime, TensorRT and their like.
//!
//! | input, output | shape | what |
//! |---|---|---|
//! | `images` | `[batch, 3, H, W]` | RGB, normalized (or pixels from 0 to 255, [`PixelInput`]) |
//! | `patch_tokens` | `[batch, N, D]` | what `pass-host features` writes, patches row by row |
//! | `class_token` | `[batch, D]` | the same with `--tokens class` |
//!
//! The batch is open. H and W are fixed, with the positions of their grid baked in by the trainer's own resize, or open
//! ([`Grid::Dynamic`]), with that resize in the graph ([`positions`]). Pixels right of and below the last whole patch are not read,
//! as in the strided convolution of the published models.

mod graph;
mod network;
mod positions;
mod quantized;

use graph::{GraphBuilder, Side};
use network::{BackboneLayers, FloatLayers, Positions, Sizes, backbone, class_feature};
use quantized::QuantizedLayers;

use super::ExportError;
use super::source::Source;
use crate::config::run::{Grid, PixelInput};
use crate::quantize::input_scales::InputScales;
use crate::quantize::pass_file::PassFile;

/// protobuf messages are smaller than this.
const MOST_BYTES: usize = i32::MAX as usize;

/// Image size `(height, width)` and grid of patches of a graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    /// In pixels.
    pub(super) size: (usize, usize),
    /// Rows and columns of whole patches.
    pub(super) grid: (usize, usize),
}

impl Frame {
    /// The frame of images of `size`.
    ///
    /// # Errors
    /// [`ExportError::Size`] for images smaller than a patch.
    pub(super) fn of(size: (usize, usize), patch_size: usize) -> Result<Self, ExportError> {
        let grid = (size.0 / patch_size, size.1 / patch_size);
        match grid.0 > 0 && grid.1 > 0 {
            true => Ok(Self { size, grid }),
            false => Err(ExportError::Size { height: size.0, width: size.1, patch_size }),
        }
    }
}

/// The graph of float weights.
///
/// # Errors
/// [`ExportError`] for a size without a patch, and for a network that one file cannot hold.
pub(super) fn float(source: &Source, grid: Grid, input: PixelInput) -> Result<Vec<u8>, ExportError> {
    let layers = FloatLayers { source, prefix: "backbone." };
    let (frame, positions) = match grid {
        Grid::Fixed(size) => {
            let frame = Frame::of(size, source.architecture.patch_size)?;
            (Some(frame), Positions::Fixed(source.positions_of(frame.grid)?))
        }
        Grid::Dynamic => (None, Positions::Dynamic),
    };
    let (mean, std) = source.normalization;
    let mut graph = GraphBuilder::default();
    let images = match input {
        PixelInput::Normalized => IMAGES.to_owned(),
        PixelInput::Bytes => {
            let factor = std.map(|std| 1.0 / (255.0 * std));
            let offset = [0, 1, 2].map(|channel| -mean[channel] / std[channel]);
            per_channel(&mut graph, factor, offset)
        }
    };
    finish(graph, &layers, source, frame, &positions, &images, input)
}

/// The graph of the int8 weights of a `.pass` file made from `source`, whose aggregation head stays float; activations have the
/// given `scales`, or one a token.
///
/// # Errors
/// [`ExportError`] for a network that one file cannot hold.
pub(super) fn quantized(
    source: &Source,
    file: &PassFile,
    scales: Option<&InputScales>,
    input: PixelInput,
) -> Result<Vec<u8>, ExportError> {
    let layers = QuantizedLayers { file, scales };
    let frame = Frame::of(file.architecture.image_size(), source.architecture.patch_size)?;
    let positions = Positions::Fixed(file.floats("pos_embed")?.to_vec());
    let (mean, std) = source.normalization;
    let mut graph = GraphBuilder::default();
    // its patch embedding takes bytes minus 128
    let images = match input {
        PixelInput::Normalized => {
            let factor = std.map(|std| 255.0 * std);
            per_channel(&mut graph, factor, mean.map(|mean| 255.0 * mean - 128.0))
        }
        PixelInput::Bytes => per_channel(&mut graph, [1.0; 3], [-128.0; 3]),
    };
    finish(graph, &layers, source, Some(frame), &positions, &images, input)
}

/// The name of the input.
const IMAGES: &str = "images";
/// The names of the outputs.
const OUTPUTS: [&str; 2] = ["patch_tokens", "class_token"];

/// `images·factor + offset`
fn per_channel(graph: &mut GraphBuilder, factor: [f32; 3], offset: [f32; 3]) -> String {
    let factor = graph.floats("pixels.factor", &[1, 3, 1, 1], &factor);
    let offset = graph.floats("pixels.offset", &[1, 3, 1, 1], &offset);
    let scaled = graph.node("Mul", "pixels.scaled", &[IMAGES, &factor], &[]);
    graph.node("Add", "pixels", &[&scaled, &offset], &[])
}

fn finish(
    mut graph: GraphBuilder,
    layers: &dyn BackboneLayers,
    source: &Source,
    frame: Option<Frame>,
    positions: &Positions,
    images: &str,
    input: PixelInput,
) -> Result<Vec<u8>, ExportError> {
    let sizes = &source.architecture;
    let sizes = Sizes { dim: sizes.dim, depth: sizes.depth, heads: sizes.heads };
    let tokens = backbone(&mut graph, layers, source, sizes, positions, images)?;
    graph.node("Identity", OUTPUTS[0], &[&tokens.patches], &[]);
    class_feature(&mut graph, source, sizes, &tokens, IMAGES, OUTPUTS[1])?;
    let batch = Side::Called("batch");
    let (height, width, patches) = match frame {
        Some(Frame { size, grid }) => (Side::Of(size.0), Side::Of(size.1), Side::Of(grid.0 * grid.1)),
        None => (Side::Called("height"), Side::Called("width"), Side::Called("patches")),
    };
    let dim = Side::Of(sizes.dim);
    let (mean, std) = source.normalization;
    let text = |value: &[f32; 3]| format!("{value:?}");
    let metadata = [
        ("input", input.name().to_owned()),
        ("mean", text(&mean)),
        ("std", text(&std)),
        ("patch_size", source.architecture.patch_size.to_string()),
    ]
    .map(|(key, value)| (format!("pass.{key}"), value));
    let bytes = graph.finish(
        &[(IMAGES, vec![batch, Side::Of(3), height, width])],
        &[(OUTPUTS[0], vec![batch, patches, dim]), (OUTPUTS[1], vec![batch, dim])],
        &metadata,
    );
    match bytes.len() <= MOST_BYTES {
        true => Ok(bytes),
        false => Err(ExportError::TooLarge { bytes: bytes.len(), limit: MOST_BYTES }),
    }
}

#[cfg(test)]
mod tests;
