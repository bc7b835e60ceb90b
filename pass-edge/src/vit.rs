//! The forward pass, in the order of the trainer's backbone.

use crate::error::{Error, Result, prefix_mut, split_mut};
use crate::format::{Architecture, Block, INPUT_MULTIPLE, Linear, Mode, Norm, floats};
use crate::image::Image;
use crate::kernels::{Arithmetic, I8Rows, Job, Kernel};
use crate::model::Model;
use crate::ops::attention::{Projections, StoreProjections, attend};
use crate::ops::layer_norm::LayerNorm;
use crate::ops::linear::{Epilogue, linear};
use crate::ops::quantize::QuantizeI8;
use crate::parallel::{MOST_THREADS, Pool, Serial, for_parts, used_threads};
use crate::scratch::{Plan, Scratch, ScratchLen, TILE};
use pass_core::rows::{rows_of, rows_of_mut};

/// Features of an image of exactly the model's size.
///
/// - `kernel`: how it is computed; never what.
/// - `scratch`: at least [`crate::scratch_len`] of working memory.
/// - `out`: `[N + P, D]`: patch tokens in row-major order of the grid, then class token and registers, if the model has any;
///   what lies beyond [`Model::output_len`] is left alone.
///
/// # Errors
/// [`Error::LengthMismatch`] for an image of another size or a buffer that is too short.
pub fn features(
    model: &Model<'_>,
    image: &Image<'_>,
    kernel: Kernel,
    scratch: &mut Scratch<'_>,
    out: &mut [f32],
) -> Result<()> {
    features_with_pool(model, image, kernel, &Serial, scratch, out)
}

/// [`features`] on several threads; the same bits whatever their number.
///
/// - `scratch`: at least [`crate::scratch::ScratchLen::with_threads`] for the threads of the pool.
///
/// # Errors
/// Those of [`features`].
pub fn features_with_pool(
    model: &Model<'_>,
    image: &Image<'_>,
    kernel: Kernel,
    pool: &dyn Pool,
    scratch: &mut Scratch<'_>,
    out: &mut [f32],
) -> Result<()> {
    kernel.dispatch(Forward { model, image, pool, scratch, out })
}

/// The arguments of [`features`], waiting for a kernel.
struct Forward<'a, 'm, 's> {
    model: &'a Model<'m>,
    image: &'a Image<'m>,
    pool: &'a dyn Pool,
    scratch: &'a mut Scratch<'s>,
    out: &'a mut [f32],
}

/// Working memory of a thread: for the tile it works on.
struct Tile<'a> {
    normed: &'a mut [f32],
    wide: &'a mut [f32],
    words: &'a mut [i16],
    inputs: &'a mut [i8],
    scales: [f32; TILE],
    mode: Mode,
}

impl Tile<'_> {
    /// `layer` on the quantized rows, into `out` or, without one, into `wide`.
    fn linear<K: Arithmetic>(
        &mut self,
        kernel: K,
        rows: usize,
        width: usize,
        layer: &Linear<&[u8]>,
        epilogue: Epilogue,
        out: Option<&mut [f32]>,
    ) -> Result<()> {
        let inputs = I8Rows::prepare(kernel, rows, width, self.inputs, self.words, self.mode)?;
        linear(kernel, inputs, &self.scales, layer, epilogue, out.unwrap_or(self.wide))
    }
}

impl Job for Forward<'_, '_, '_> {
    type Output = Result<()>;

    fn run<K: Arithmetic>(self, kernel: K) -> Result<()> {
        let a = *self.model.architecture();
        let (height, width) = a.image_size();
        for (what, expected, actual) in
            [("image height", height, self.image.size().0), ("image width", width, self.image.size().1)]
        {
            if expected != actual {
                return Err(Error::LengthMismatch { what, expected, actual });
            }
        }
        let plan = Plan::of(&a);
        let threads = used_threads(self.pool);
        let len = ScratchLen::with_threads(&a, threads);
        let floats = prefix_mut("scratch floats", len.floats, self.scratch.floats)?;
        let (scales, tile_floats) = split_mut("scratch floats", plan.scales, floats)?;
        let words = prefix_mut("scratch words", len.words, self.scratch.words)?;
        let (values, tile_words) = split_mut("scratch words", plan.projections, words)?;
        let bytes = prefix_mut("scratch bytes", len.bytes, self.scratch.bytes)?;
        let x = prefix_mut("out", self.model.output_len(), self.out)?;
        let mut parts = rows_of_mut(tile_floats, plan.tile_floats)
            .zip(rows_of_mut(tile_words, plan.tile_words))
            .zip(rows_of_mut(bytes, plan.tile_bytes))
            .map(|((floats, words), inputs)| {
                let (normed, wide) = floats.split_at_mut_checked(a.dim()).unwrap_or_default();
                Tile { normed, wide, words, inputs, scales: [0.0; TILE], mode: self.model.mode() }
            });
        let mut tiles: [Option<Tile<'_>>; MOST_THREADS] = core::array::from_fn(|_| parts.next());
        let tile_len = TILE * a.dim();
        let scales_len = TILE * 3 * a.heads as usize;
        // tiles of a thread, where whole tiles are written; elsewhere its rows, which are shared more evenly
        let share = a.tokens().div_ceil(TILE).div_ceil(threads);
        let share_rows = a.tokens().div_ceil(threads).next_multiple_of(2);
        let parts = rows_of_mut(x, share_rows * a.dim()).enumerate().zip(tiles.iter_mut().flatten());
        for_parts(self.pool, parts, |((part, x), tile)| {
            embed(kernel, self.model, self.image, part * share_rows, x, tile)
        })?;
        for block in 0..a.depth as usize {
            let block = self.model.block(block)?;
            let parts = rows_of_mut(x, share * tile_len)
                .zip(rows_of_mut(values, share * 3 * tile_len))
                .zip(rows_of_mut(scales, share * scales_len))
                .zip(tiles.iter_mut().flatten());
            for_parts(self.pool, parts, |(((x, values), scales), tile)| {
                let values = rows_of_mut(values, 3 * tile_len).zip(rows_of_mut(scales, scales_len));
                rows_of_mut(x, tile_len).zip(values).try_for_each(|(x, (values, scales))| {
                    project(kernel, &a, &block, x, values, scales, tile)
                })
            })?;
            let projections =
                Projections { values, scales, tokens: a.tokens(), heads: a.heads as usize, dim: a.dim() };
            let parts = rows_of_mut(x, share_rows * a.dim()).enumerate().zip(tiles.iter_mut().flatten());
            for_parts(self.pool, parts, |((part, mut x), tile)| {
                let mut first = part * share_rows;
                while !x.is_empty() {
                    // up to the next tile of queries
                    let len = ((TILE - first % TILE) * a.dim()).min(x.len());
                    let (rows, rest) = x.split_at_mut(len);
                    attend_and_mix(kernel, &a, &block, &projections, first, rows, tile)?;
                    (x, first) = (rest, first + TILE - first % TILE);
                }
                Ok(())
            })?;
        }
        if let Some(norm) = &self.model.tail().norm {
            let Some(Some(tile)) = tiles.first_mut() else { return Ok(()) };
            for x in rows_of_mut(x, a.dim()) {
                kernel.vectorize(LayerNorm { x, norm, out: tile.normed });
                for (x, value) in x.iter_mut().zip(tile.normed.iter()) {
                    *x = *value;
                }
            }
        }
        Ok(())
    }
}

/// Patch embedding plus position embedding, or the prefix tokens, for the tokens `x` from `first` on.
fn embed<K: Arithmetic>(
    kernel: K,
    model: &Model<'_>,
    image: &Image<'_>,
    first: usize,
    x: &mut [f32],
    tile: &mut Tile<'_>,
) -> Result<()> {
    let (a, embedding) = (model.architecture(), model.embedding());
    let tokens = floats(embedding.positions).chain(floats(embedding.prefix.unwrap_or_default()));
    for (x, value) in x.iter_mut().zip(tokens.skip(first * a.dim())) {
        *x = value;
    }
    let (side, columns) = (a.patch_size as usize, a.grid.1 as usize);
    let inputs = a.patch_inputs().next_multiple_of(INPUT_MULTIPLE);
    let patches = (a.patches().saturating_sub(first) * a.dim()).min(x.len());
    let patches = x.get_mut(..patches).unwrap_or_default();
    for (x, first) in rows_of_mut(patches, TILE * a.dim()).zip((first..).step_by(TILE)) {
        let rows = x.len().checked_div(a.dim()).unwrap_or(0);
        for (patch, index) in rows_of_mut(tile.inputs, inputs).zip(first..first + rows) {
            let place = |divided: Option<usize>| divided.unwrap_or(0) * side;
            let corner = (place(index.checked_div(columns)), place(index.checked_rem(columns)));
            patch.fill(0);
            image.patch_into(corner, side, patch);
        }
        // pixels are integers: they carry no scale
        tile.scales = [1.0; TILE];
        tile.linear(kernel, rows, inputs, &embedding.patch, Epilogue::Add, Some(x))?;
    }
    Ok(())
}

/// LayerNorm and quantization of the rows of a tile.
fn norm_and_quantize<K: Arithmetic>(
    kernel: K,
    x: &[f32],
    norm: &Norm<&[u8]>,
    dim: usize,
    tile: &mut Tile<'_>,
) {
    let rows = rows_of(x, dim).zip(rows_of_mut(tile.inputs, dim)).zip(&mut tile.scales);
    for ((x, inputs), scale) in rows {
        kernel.vectorize(LayerNorm { x, norm, out: tile.normed });
        *scale = kernel.vectorize(QuantizeI8 { x: tile.normed, out: inputs });
    }
}

/// Queries, keys and values of a tile.
fn project<K: Arithmetic>(
    kernel: K,
    a: &Architecture,
    block: &Block<&[u8]>,
    x: &[f32],
    values: &mut [i16],
    scales: &mut [f32],
    tile: &mut Tile<'_>,
) -> Result<()> {
    let dim = a.dim();
    let rows = x.len().checked_div(dim).unwrap_or(0);
    norm_and_quantize(kernel, x, &block.norm1, dim, tile);
    tile.linear(kernel, rows, dim, &block.qkv, Epilogue::Store, None)?;
    let qkv = tile.wide.get(..rows * 3 * dim).unwrap_or_default();
    kernel.vectorize(StoreProjections { qkv, dim, heads: a.heads as usize, values, scales });
    Ok(())
}

/// `x += proj(attention)`, then `x += fc2(GELU(fc1(norm2(x))))`, for tokens of one tile, `first` the first of them.
fn attend_and_mix<K: Arithmetic>(
    kernel: K,
    a: &Architecture,
    block: &Block<&[u8]>,
    projections: &Projections<'_>,
    first: usize,
    x: &mut [f32],
    tile: &mut Tile<'_>,
) -> Result<()> {
    let (dim, hidden) = (a.dim(), a.hidden as usize);
    let rows = x.len().checked_div(dim).unwrap_or(0);
    let (attended, scores) = split_mut("scratch floats", TILE * dim, tile.wide)?;
    attend(kernel, projections, first, rows, scores, tile.words, attended)?;
    quantize_rows(kernel, attended, dim, rows, tile.inputs, &mut tile.scales);
    tile.linear(kernel, rows, dim, &block.proj, Epilogue::Add, Some(x))?;

    norm_and_quantize(kernel, x, &block.norm2, dim, tile);
    tile.linear(kernel, rows, dim, &block.fc1, Epilogue::Gelu, None)?;
    quantize_rows(kernel, tile.wide, hidden, rows, tile.inputs, &mut tile.scales);
    tile.linear(kernel, rows, hidden, &block.fc2, Epilogue::Add, Some(x))
}

fn quantize_rows<K: Arithmetic>(
    kernel: K,
    x: &[f32],
    width: usize,
    count: usize,
    quantized: &mut [i8],
    scales: &mut [f32; TILE],
) {
    let all = rows_of(x, width).zip(rows_of_mut(quantized, width)).zip(scales).take(count);
    for ((x, quantized), scale) in all {
        *scale = kernel.vectorize(QuantizeI8 { x, out: quantized });
    }
}
