//! Position embeddings of any grid, resized when the graph runs: [`PositionEmbedding`](crate::model::pos_embed) in operators.
//!
//! `Resize` has no operator for the rule that pre-training uses (a tenth of a patch in the scale, SEMANTICS §1), so both axes are
//! interpolated by a matrix `[side, base]` that is formed from the side: cubic weights of four taps, put in their columns by comparing
//! indices.

use super::graph::GraphBuilder;
use crate::export::ExportError;
use crate::export::source::Source;
use crate::model::pos_embed::{CUBIC_A, OFFSET, ResizeRule};
use crate::onnx::{Attribute, FLOAT, TensorProto};

/// Coefficients `[power, tap]` of the cubic convolution: powers 3, 2, 1, 0 of the fraction, taps -1, 0, 1, 2.
const CUBIC: [[f64; 4]; 4] = [
    [CUBIC_A, CUBIC_A + 2.0, -CUBIC_A - 2.0, -CUBIC_A],
    [-2.0 * CUBIC_A, -CUBIC_A - 3.0, 2.0 * CUBIC_A + 3.0, CUBIC_A],
    [CUBIC_A, 0.0, -CUBIC_A, 0.0],
    [0.0, 1.0, 0.0, 0.0],
];

/// Positions `[1, N, D]` for the grid of the patch embedding `map` `[B, D, rows, columns]`.
pub(super) fn resized(graph: &mut GraphBuilder, source: &Source, map: &str) -> Result<String, ExportError> {
    let (base, dim) = (source.architecture.grid, source.architecture.dim);
    let shape = graph.node("Shape", "grid.shape", &[map], &[]);
    let sides = [("rows", 2), ("columns", 3)].map(|(name, axis)| {
        let index = graph.constant(&TensorProto::of_ints(&format!("grid.{name}.axis"), &[], &[axis]));
        graph.node("Gather", &format!("grid.{name}"), &[&shape, &index], &[Attribute::of_int("axis", 0)])
    });
    let offset = match source.positions {
        ResizeRule::Size => None,
        ResizeRule::Offset => Some(offset(graph, &sides, base)),
    };
    let [rows, columns] = [0, 1].map(|axis| interpolation(graph, &sides[axis], base, offset.as_deref()));
    let table = source.values("backbone.pos_embed")?;
    let table = graph.floats("pos_embed", &[base, base * dim], &table);
    let table = graph.node("MatMul", "pos_embed.rows", &[&rows, &table], &[]);
    let table = graph.reshape("pos_embed.split", &table, &[-1, base as i64, dim as i64]);
    let table = graph.node("MatMul", "pos_embed.columns", &[&columns, &table], &[]);
    Ok(graph.reshape("pos_embed.resized", &table, &[1, -1, dim as i64]))
}

/// What is added to a side: nothing if both are those of the table, which is then used as it is.
fn offset(graph: &mut GraphBuilder, sides: &[String; 2], base: usize) -> String {
    let base = graph.constant(&TensorProto::of_ints("grid.base", &[], &[base as i64]));
    let same =
        [0, 1].map(|axis| graph.node("Equal", &format!("{}.same", sides[axis]), &[&sides[axis], &base], &[]));
    let same = graph.node("And", "grid.same", &[&same[0], &same[1]], &[]);
    let (nothing, offset) = (graph.float("grid.nothing", 0.0), graph.float("grid.tenth", OFFSET as f32));
    graph.node("Where", "grid.offset", &[&same, &nothing, &offset], &[])
}

/// The interpolation matrix `[side, base]` of one axis, twin of `pos_embed::interpolation`.
fn interpolation(graph: &mut GraphBuilder, side: &str, base: usize, offset: Option<&str>) -> String {
    let name = |part: &str| format!("{side}.{part}");
    let to_float = [Attribute::of_int("to", i64::from(FLOAT))];
    let zero = graph.constant(&TensorProto::of_ints("grid.zero", &[], &[0]));
    let one = graph.constant(&TensorProto::of_ints("grid.one", &[], &[1]));
    let targets = graph.node("Range", &name("range"), &[&zero, side, &one], &[]);
    let targets = graph.node("Cast", &name("targets"), &[&targets], &to_float);
    let mut extent = graph.node("Cast", &name("extent"), &[side], &to_float);
    if let Some(offset) = offset {
        extent = graph.node("Add", &name("extent.offset"), &[&extent, offset], &[]);
    }
    // (target + 1/2)·base/extent − 1/2
    let (half, sides) = (graph.float("grid.half", 0.5), graph.float("grid.sides", base as f32));
    let centers = graph.node("Add", &name("centers"), &[&targets, &half], &[]);
    let scaled = graph.node("Mul", &name("scaled"), &[&centers, &sides], &[]);
    let scaled = graph.node("Div", &name("divided"), &[&scaled, &extent], &[]);
    let at = graph.node("Sub", &name("source"), &[&scaled, &half], &[]);
    let first = graph.node("Floor", &name("first"), &[&at], &[]);
    let fraction = graph.node("Sub", &name("fraction"), &[&at, &first], &[]);
    // the weights of the four taps are cubic polynomials of the fraction
    let last = graph.ints("grid.last", &[1]);
    let exponents = graph.floats("grid.exponents", &[4], &[3.0, 2.0, 1.0, 0.0]);
    let fraction = graph.node("Unsqueeze", &name("fraction.column"), &[&fraction, &last], &[]);
    let powers = graph.node("Pow", &name("powers"), &[&fraction, &exponents], &[]);
    let cubic = CUBIC.as_flattened().iter().map(|value| *value as f32).collect::<Vec<_>>();
    let cubic = graph.floats("grid.cubic", &[4, 4], &cubic);
    let weights = graph.node("MatMul", &name("taps"), &[&powers, &cubic], &[]);
    let weights = graph.node("Unsqueeze", &name("taps.row"), &[&weights, &last], &[]);
    // the taps lie at first − 1 … first + 2, inside the table
    let first = graph.node("Unsqueeze", &name("first.column"), &[&first, &last], &[]);
    let steps = graph.floats("grid.steps", &[4], &[-1.0, 0.0, 1.0, 2.0]);
    let index = graph.node("Add", &name("index"), &[&first, &steps], &[]);
    let (low, high) = (graph.float("grid.low", 0.0), graph.float("grid.high", (base - 1) as f32));
    let index = graph.node("Clip", &name("index.inside"), &[&index, &low, &high], &[]);
    let deepest = graph.ints("grid.deepest", &[2]);
    let index = graph.node("Unsqueeze", &name("index.column"), &[&index, &deepest], &[]);
    let places: Vec<f32> = (0..base).map(|place| place as f32).collect();
    let places = graph.floats("grid.places", &[base], &places);
    let hits = graph.node("Equal", &name("hits"), &[&index, &places], &[]);
    let hits = graph.node("Cast", &name("hits.float"), &[&hits], &to_float);
    let matrix = graph.node("MatMul", &name("spread"), &[&weights, &hits], &[]);
    graph.node("Squeeze", &name("matrix"), &[&matrix, &last], &[])
}
