//! Attention of one tile of queries to all keys, head by head: no attention matrix beyond the rows of the tile exists.
//!
//! Queries, keys and values of a tile of 16 tokens are stored together: `[q | k | v]`, each `[heads, 16·d]`, `d` channels
//! a head, as the products read them: queries `[token][channel]`; keys `[channel/2][token][2]`: one panel of 16 tokens;
//! values `[channel/16][token/2][16][2]`: panels of 16 channels whose groups of tokens go on in the next tile.

use super::elementary::{LANES, exp2_nonpositive, largest, sum_lanes};
use super::quantize::{quantize_i16, quantize_i16_within};
use crate::error::{Error, Result};
use crate::kernels::{Arithmetic, CHUNK, I16Panels, I16Product, PAIR, Sums, Work};
use crate::scratch::TILE;
use pass_core::rows::{rows_of, rows_of_mut};

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
    /// Scales of a head's queries, keys or values (`part` 0, 1, 2) in tile `index`.
    fn tile_scales(&self, part: usize, head: usize, index: usize) -> Option<&'a [f32; TILE]> {
        self.scales.as_chunks::<TILE>().0.get((3 * index + part) * self.heads + head)
    }

    /// The same for all tiles, one after the other.
    fn gather_scales(&self, part: usize, head: usize, gathered: &mut [f32]) {
        for (index, gathered) in gathered.as_chunks_mut::<TILE>().0.iter_mut().enumerate() {
            *gathered = *self.tile_scales(part, head, index).unwrap_or(&[0.0; TILE]);
        }
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
        let d = dim.checked_div(heads).unwrap_or(0);
        // softmax is taken to the base 2
        let query_scale = core::f32::consts::LOG2_E / pass_core::math::sqrt(d as f32);
        if qkv.len() < TILE * 3 * dim {
            values.fill(0);
            scales.fill(0.0);
        }
        let parts = rows_of_mut(values, TILE * d).zip(scales.as_chunks_mut::<TILE>().0).enumerate();
        for (part, (values, scales)) in parts {
            let inputs =
                rows_of(qkv, 3 * dim).map(|row| row.get(part * d..(part + 1) * d).unwrap_or_default());
            match part.checked_div(heads).unwrap_or(0) {
                0 => {
                    for ((x, queries), scale) in inputs.zip(rows_of_mut(values, d)).zip(scales) {
                        *scale = quantize_i16(x, queries) * query_scale;
                    }
                }
                1 => store_keys(inputs, d, values, scales),
                _ => store_values(inputs, d, values, scales),
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

/// `attended[row] = softmax(q·kᵀ/√d)·v` for the `rows` queries from `first` on, all in one tile.
///
/// - `scores`: `[16, padded tokens]`, then two rows more for the scales of keys and values; `weights`: `[16, padded tokens]`.
/// - `attended`: `[16, D]`.
///
/// The scale of a value multiplies its attention weight before that is quantized, so one integer product serves all tokens.
pub(crate) fn attend<K: Arithmetic>(
    kernel: K,
    projections: &Projections<'_>,
    first: usize,
    rows: usize,
    scores: &mut [f32],
    weights: &mut [i16],
    attended: &mut [f32],
) -> Result<()> {
    let &Projections { values, tokens, heads, dim, .. } = projections;
    let d = dim.checked_div(heads).unwrap_or(0);
    let padded = tokens.next_multiple_of(TILE);
    let tile_len = 3 * TILE * dim;
    let short =
        Error::LengthMismatch { what: "projections", expected: padded * 3 * dim, actual: values.len() };
    let (scores, scales) = scores.split_at_mut_checked(TILE * padded).ok_or(short)?;
    let (key_scales, value_scales) = scales.split_at_mut_checked(padded).ok_or(short)?;
    let value_scales = value_scales.get_mut(..padded).ok_or(short)?;
    let weights = weights.get_mut(..TILE * padded).ok_or(short)?;
    let (index, first_row) = (first / TILE, first % TILE);
    let mut sums = Sums::new();
    for head in 0..heads {
        let place = |part: usize| (part * heads + head) * TILE * d;
        let queries = values.get(index * tile_len + place(0) + first_row * d..).ok_or(short)?;
        let query_scales = projections.tile_scales(0, head, index).ok_or(short)?;
        let query_scales = query_scales.get(first_row..).ok_or(short)?;
        projections.gather_scales(1, head, key_scales);
        projections.gather_scales(2, head, value_scales);

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
            kernel.matmul_i16(I16Product::new(queries, d, rows, panels, &mut sums.0)?);
            let key_scales = key_scales.get(first_tile * TILE..).ok_or(short)?;
            let key_scales = key_scales.get(..tiles * TILE).ok_or(short)?;
            let scores = scores.get_mut(first_tile * TILE..).ok_or(short)?;
            kernel.vectorize(ScaleScores { sums: &sums.0, rows, query_scales, key_scales, scores, padded });
        }

        let mut factors = [0.0; TILE];
        kernel.vectorize(SoftmaxWeights {
            scores,
            rows,
            tokens,
            value_scales,
            weights,
            factors: &mut factors,
        });

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
                kernel.matmul_i16(I16Product::new(weights, padded, rows, panels, &mut sums.0)?);
                let attended = attended.get_mut(head * d + first_channel..).ok_or(short)?;
                let first = first_tile == 0;
                kernel.vectorize(AddWeighted {
                    sums: &sums.0,
                    columns,
                    factors: &factors,
                    rows,
                    first,
                    attended,
                    dim,
                });
            }
        }
    }
    Ok(())
}

/// `scores = sums · (query scale · key scale)`, for as many keys as there are `key_scales`; rows of scores lie `padded` apart.
struct ScaleScores<'a> {
    sums: &'a [i32],
    rows: usize,
    query_scales: &'a [f32],
    key_scales: &'a [f32],
    scores: &'a mut [f32],
    padded: usize,
}

impl Work for ScaleScores<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { sums, rows, query_scales, key_scales, scores, padded } = self;
        let sums = rows_of(sums, key_scales.len());
        for ((scores, sums), query_scale) in
            rows_of_mut(scores, padded).zip(sums).zip(query_scales).take(rows)
        {
            let lanes = scores.as_chunks_mut::<LANES>().0.iter_mut().zip(sums.as_chunks::<LANES>().0);
            for ((scores, sums), key_scales) in lanes.zip(key_scales.as_chunks::<LANES>().0) {
                for lane in 0..LANES {
                    scores[lane] = sums[lane] as f32 * (query_scale * key_scales[lane]);
                }
            }
        }
    }
}

/// `attended = sums · factor`, or `+=` after the first part; rows of `attended` lie `dim` apart.
struct AddWeighted<'a> {
    sums: &'a [i32],
    columns: usize,
    factors: &'a [f32; TILE],
    rows: usize,
    first: bool,
    attended: &'a mut [f32],
    dim: usize,
}

impl Work for AddWeighted<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { sums, columns, factors, rows, first, attended, dim } = self;
        let sums = rows_of(sums, columns);
        for ((attended, sums), factor) in rows_of_mut(attended, dim).zip(sums).zip(factors).take(rows) {
            for (attended, sum) in attended.iter_mut().zip(sums) {
                let before = if first { 0.0 } else { *attended };
                *attended = before + *sum as f32 * factor;
            }
        }
    }
}

/// Softmax of rows of scores, times the scale of each value, quantized; `factors` are those of the integer weights.
struct SoftmaxWeights<'a> {
    scores: &'a mut [f32],
    rows: usize,
    tokens: usize,
    value_scales: &'a [f32],
    weights: &'a mut [i16],
    factors: &'a mut [f32; TILE],
}

impl Work for SoftmaxWeights<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { scores, rows, tokens, value_scales, weights, factors } = self;
        let padded = value_scales.len().max(1);
        let all = rows_of_mut(scores, padded).zip(rows_of_mut(weights, padded)).zip(factors);
        for ((scores, weights), factor) in all.take(rows) {
            for padding in scores.iter_mut().skip(tokens) {
                *padding = f32::MIN;
            }
            let most = largest(scores, f32::MIN, |score| score);
            let (mut totals, mut magnitudes) = ([0.0; LANES], [0_u32; LANES]);
            let lanes = scores.as_chunks_mut::<LANES>().0.iter_mut().zip(value_scales.as_chunks::<LANES>().0);
            for (scores, value_scales) in lanes {
                for lane in 0..LANES {
                    let weight = exp2_nonpositive(scores[lane] - most);
                    totals[lane] += weight;
                    scores[lane] = weight * value_scales[lane];
                    // numbers that are not negative are ordered as their bits; of a comparison of floats the compiler makes
                    // masked stores here, which are slow
                    magnitudes[lane] = magnitudes[lane].max(scores[lane].to_bits());
                }
            }
            let magnitude = f32::from_bits(magnitudes.into_iter().fold(0, u32::max));
            *factor = quantize_i16_within(scores, magnitude, weights) / sum_lanes(totals);
        }
    }
}
