//! Attention of one tile of queries to all keys, head by head: no attention matrix beyond the rows of the tile exists.
//!
//! Queries, keys and values of a tile of 16 tokens are stored together: `[q | k | v]`, each `[heads, 16·d]`, `d` channels
//! a head, as the products read them: queries `[token][channel]`; keys `[channel/2][token][2]`: one panel of 16 tokens;
//! values `[channel/16][token/2][16][2]`: panels of 16 channels whose groups of tokens go on in the next tile.

use super::elementary::{LANES, exp_nonpositive, largest, sum};
use super::quantize::quantize_i16;
use crate::error::{Error, Result};
use crate::kernels::{Arithmetic, CHUNK, I16Panels, I16Product, PAIR, Work};
use crate::scratch::TILE;

/// Channels of a head, at most (`Architecture::validate`).
const MOST_CHANNELS: usize = 512;
/// Tiles whose weighted values are summed as integers: 512 tokens, so that a sum stays below 2³¹.
const SUMMED_TILES: usize = 512 / TILE;

/// Queries, keys and values of all tokens.
pub(crate) struct Projections<'a> {
    /// `[tiles, 3, heads, 16·d]`.
    pub(crate) values: &'a [i16],
    /// `[tiles, 3, heads, 16]`.
    pub(crate) scales: &'a [f32],
    pub(crate) tokens: usize,
    pub(crate) heads: usize,
    pub(crate) dim: usize,
}

impl<'a> Projections<'a> {
    /// Scales of a head's queries, keys or values (`part` 0, 1, 2), tile by tile.
    #[inline(always)]
    fn part_scales(&self, part: usize, head: usize) -> impl Iterator<Item = &'a [f32; TILE]> + use<'a> {
        let step = 3 * self.heads;
        self.scales.as_chunks::<TILE>().0.iter().skip(part * self.heads + head).step_by(step)
    }
}

/// Quantizes the rows `qkv` `[rows, 3·D]` of one tile into its place; rows the tile lacks are zeros.
pub(crate) struct StoreProjections<'a> {
    pub(crate) qkv: &'a [f32],
    pub(crate) dim: usize,
    pub(crate) heads: usize,
    pub(crate) values: &'a mut [i16],
    pub(crate) scales: &'a mut [f32],
}

impl Work for StoreProjections<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { qkv, dim, heads, values, scales } = self;
        let d = dim / heads;
        let query_scale = 1.0 / pass_core::math::sqrt(d as f32);
        if qkv.len() < TILE * 3 * dim {
            values.fill(0);
            scales.fill(0.0);
        }
        let parts = values.chunks_exact_mut(TILE * d).zip(scales.chunks_exact_mut(TILE)).enumerate();
        for (part, (values, scales)) in parts {
            let rows =
                qkv.chunks_exact(3 * dim).map(|row| row.get(part * d..(part + 1) * d).unwrap_or_default());
            match part / heads {
                0 => {
                    for ((x, queries), scale) in rows.zip(values.chunks_exact_mut(d)).zip(scales) {
                        *scale = quantize_i16(x, queries) * query_scale;
                    }
                }
                1 => store_keys(rows, d, values, scales),
                _ => store_values(rows, d, values, scales),
            }
        }
    }
}

/// Keys `[channel/2][token][2]`.
#[inline(always)]
fn store_keys<'a>(rows: impl Iterator<Item = &'a [f32]>, d: usize, values: &mut [i16], scales: &mut [f32]) {
    let mut buffer = [0; MOST_CHANNELS];
    let quantized = buffer.get_mut(..d).unwrap_or_default();
    for (row, (x, scale)) in rows.zip(scales).enumerate() {
        *scale = quantize_i16(x, quantized);
        for (group, pair) in values.as_chunks_mut::<PAIR>().0.iter_mut().zip(quantized.as_chunks::<2>().0) {
            if let Some(place) = group.as_chunks_mut::<2>().0.get_mut(row) {
                *place = *pair;
            }
        }
    }
}

/// Values `[channel/16][token/2][16][2]`: two tokens at a time fill whole groups.
#[inline(always)]
fn store_values<'a>(
    mut rows: impl Iterator<Item = &'a [f32]>,
    d: usize,
    values: &mut [i16],
    scales: &mut [f32],
) {
    let mut buffers = [[0; MOST_CHANNELS]; 2];
    for (pair, scales) in scales.as_chunks_mut::<2>().0.iter_mut().enumerate() {
        for (buffer, scale) in buffers.iter_mut().zip(scales) {
            let quantized = buffer.get_mut(..d).unwrap_or_default();
            match rows.next() {
                Some(x) => *scale = quantize_i16(x, quantized),
                None => quantized.fill(0),
            }
        }
        let [even, odd] = &buffers;
        let channels = even.as_chunks::<LANES>().0.iter().zip(odd.as_chunks::<LANES>().0);
        for (panel, (even, odd)) in values.chunks_exact_mut(TILE * LANES).zip(channels) {
            if let Some(group) = panel.as_chunks_mut::<PAIR>().0.get_mut(pair) {
                for lane in 0..LANES {
                    group[2 * lane] = even[lane];
                    group[2 * lane + 1] = odd[lane];
                }
            }
        }
    }
}

/// `attended[row] = softmax(q·kᵀ/√d)·v` for the `rows` queries of tile `index`.
///
/// - `scores`: `[16, padded tokens]` at least; `weights`: exactly that.
/// - `attended`: `[16, D]`.
///
/// The scale of a value multiplies its attention weight before that is quantized, so one integer product serves all tokens.
pub(crate) fn attend<K: Arithmetic>(
    kernel: K,
    projections: &Projections<'_>,
    index: usize,
    rows: usize,
    scores: &mut [f32],
    weights: &mut [i16],
    attended: &mut [f32],
) -> Result<()> {
    let &Projections { values, tokens, heads, dim, .. } = projections;
    let d = dim / heads;
    let padded = tokens.next_multiple_of(TILE);
    let tile_len = 3 * TILE * dim;
    let short =
        Error::LengthMismatch { what: "projections", expected: padded * 3 * dim, actual: values.len() };
    let mut sums = [0_i32; TILE * CHUNK];
    for head in 0..heads {
        let place = |part: usize| (part * heads + head) * TILE * d;
        let queries = values.get(index * tile_len + place(0)..).ok_or(short)?;
        let query_scales = projections.part_scales(0, head).nth(index).ok_or(short)?;

        for first_tile in (0..padded / TILE).step_by(CHUNK / TILE) {
            let tiles = (CHUNK / TILE).min(padded / TILE - first_tile);
            let panels = I16Panels {
                values: values.get(first_tile * tile_len + place(1)..).ok_or(short)?,
                panels: tiles,
                panel_stride: tile_len,
                run: d / 2,
                runs: 1,
                run_stride: 0,
            };
            kernel.matmul_i16(I16Product::new(queries, d, rows, panels, &mut sums)?);
            let scores = scores.get_mut(first_tile * TILE..).unwrap_or_default();
            for (row, (sums, query_scale)) in
                sums.chunks_exact(tiles * TILE).zip(query_scales).take(rows).enumerate()
            {
                let scores = scores.get_mut(row * padded..).unwrap_or_default();
                let key_scales = projections.part_scales(1, head).skip(first_tile);
                kernel.vectorize(ScaleScores { sums, query_scale: *query_scale, key_scales, scores });
            }
        }

        let mut factors = [0.0; TILE];
        let all = scores.chunks_exact_mut(padded).zip(weights.chunks_exact_mut(padded)).zip(&mut factors);
        for ((scores, weights), factor) in all.take(rows) {
            let value_scales = projections.part_scales(2, head);
            *factor = kernel.vectorize(SoftmaxWeights { scores, tokens, value_scales, weights });
        }

        for first_tile in (0..padded / TILE).step_by(SUMMED_TILES) {
            let runs = SUMMED_TILES.min(padded / TILE - first_tile);
            let weights = weights.get(first_tile * TILE..).ok_or(short)?;
            for first_channel in (0..d).step_by(CHUNK) {
                let columns = CHUNK.min(d - first_channel);
                let start = first_tile * tile_len + place(2) + first_channel * TILE;
                let panels = I16Panels {
                    values: values.get(start..).ok_or(short)?,
                    panels: columns / LANES,
                    panel_stride: LANES * TILE,
                    run: TILE / 2,
                    runs,
                    run_stride: tile_len,
                };
                kernel.matmul_i16(I16Product::new(weights, padded, rows, panels, &mut sums)?);
                let all = sums.chunks_exact(columns).zip(attended.chunks_exact_mut(dim)).zip(&factors);
                for ((sums, attended), factor) in all.take(rows) {
                    let start = head * d + first_channel;
                    let attended = attended.get_mut(start..start + columns).unwrap_or_default();
                    if first_tile == 0 {
                        attended.fill(0.0);
                    }
                    kernel.vectorize(AddWeighted { sums, factor: *factor, attended });
                }
            }
        }
    }
    Ok(())
}

/// `scores = sums · (query scale · key scale)`.
struct ScaleScores<'a, I> {
    sums: &'a [i32],
    query_scale: f32,
    key_scales: I,
    scores: &'a mut [f32],
}

impl<'a, I: Iterator<Item = &'a [f32; TILE]>> Work for ScaleScores<'_, I> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { sums, query_scale, key_scales, scores } = self;
        let lanes = scores.as_chunks_mut::<TILE>().0.iter_mut().zip(sums.as_chunks::<TILE>().0);
        for ((scores, sums), key_scales) in lanes.zip(key_scales) {
            for lane in 0..TILE {
                scores[lane] = sums[lane] as f32 * (query_scale * key_scales[lane]);
            }
        }
    }
}

/// `attended += sums · factor`.
struct AddWeighted<'a> {
    sums: &'a [i32],
    factor: f32,
    attended: &'a mut [f32],
}

impl Work for AddWeighted<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { sums, factor, attended } = self;
        for (attended, sum) in attended.iter_mut().zip(sums) {
            *attended += *sum as f32 * factor;
        }
    }
}

/// Softmax of a row of scores, times the scale of each value, quantized; gives the factor of the integer weights.
struct SoftmaxWeights<'a, I> {
    scores: &'a mut [f32],
    tokens: usize,
    value_scales: I,
    weights: &'a mut [i16],
}

impl<'a, I: Iterator<Item = &'a [f32; TILE]>> Work for SoftmaxWeights<'_, I> {
    type Output = f32;

    #[inline(always)]
    fn run(self) -> f32 {
        let Self { scores, tokens, value_scales, weights } = self;
        for padding in scores.iter_mut().skip(tokens) {
            *padding = f32::MIN;
        }
        let most = largest(scores, f32::MIN, |score| score);
        for score in scores.iter_mut() {
            *score = exp_nonpositive(*score - most);
        }
        let total = sum(scores, |weight| weight);
        for (scores, value_scales) in scores.as_chunks_mut::<TILE>().0.iter_mut().zip(value_scales) {
            for lane in 0..TILE {
                scores[lane] *= value_scales[lane];
            }
        }
        quantize_i16(scores, weights) / total
    }
}
