//! Working memory handed in by the caller; its size is a `const fn` of the architecture.

use crate::error::{Error, Result};
use crate::format::{Architecture, INPUT_MULTIPLE};
use crate::model::Model;
use crate::parallel::MOST_THREADS;

/// Tokens computed together: the rows of a tile.
pub(crate) const TILE: usize = 16;

/// Elements of each type that [`crate::features`] needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScratchLen {
    /// `f32`: scales of queries, keys and values; rows of one tile.
    pub floats: usize,
    /// `i16`: queries, keys and values of all tokens; attention weights or quantized inputs of one tile.
    pub words: usize,
    /// `i8`: quantized inputs of one tile.
    pub bytes: usize,
}

const fn max(a: usize, b: usize) -> usize {
    if a > b { a } else { b }
}

impl ScratchLen {
    /// For an architecture and one thread.
    pub const fn of(a: &Architecture) -> Self {
        Self::with_threads(a, 1)
    }

    /// For an architecture and that many threads: each works on a tile of its own.
    pub const fn with_threads(a: &Architecture, threads: usize) -> Self {
        let plan = Plan::of(a);
        let threads = if threads < MOST_THREADS { threads } else { MOST_THREADS };
        Self {
            floats: plan.scales + threads * plan.tile_floats,
            words: plan.projections + threads * plan.tile_words,
            bytes: threads * plan.tile_bytes,
        }
    }

    /// All of it in bytes.
    pub const fn total_bytes(&self) -> usize {
        self.floats * size_of::<f32>() + self.words * size_of::<i16>() + self.bytes
    }
}

/// Working memory that `model` needs.
pub fn scratch_len(model: &Model<'_>) -> ScratchLen {
    ScratchLen::of(model.architecture())
}

/// How the scratch memory is divided.
pub(crate) struct Plan {
    /// Scales of all tiles: q, k, v of each head and row.
    pub(crate) scales: usize,
    /// Queries, keys and values of all tiles.
    pub(crate) projections: usize,
    /// f32 rows of the tile at work.
    pub(crate) tile_floats: usize,
    /// Attention weights, or quantized rows as words, of the tile at work.
    pub(crate) tile_words: usize,
    /// Quantized rows of the tile at work.
    pub(crate) tile_bytes: usize,
}

impl Plan {
    pub(crate) const fn of(a: &Architecture) -> Self {
        let (dim, hidden) = (a.dim(), a.hidden as usize);
        let padded_tokens = a.tokens().next_multiple_of(TILE);
        // one LayerNorm row, then the widest of: q, k, v; the hidden layer; attended values beside scores and scales of a head
        let widest = max(TILE * max(3 * dim, hidden), TILE * (dim + padded_tokens) + 2 * padded_tokens);
        let inputs = max(max(dim, hidden), a.patch_inputs().next_multiple_of(INPUT_MULTIPLE));
        Self {
            scales: padded_tokens * 3 * a.heads as usize,
            projections: padded_tokens * 3 * dim,
            tile_floats: dim + widest,
            tile_words: TILE * max(padded_tokens, inputs),
            tile_bytes: TILE * inputs,
        }
    }
}

/// Borrowed working memory. Its contents do not matter, before or after.
#[derive(Debug)]
pub struct Scratch<'a> {
    pub(crate) floats: &'a mut [f32],
    pub(crate) words: &'a mut [i16],
    pub(crate) bytes: &'a mut [i8],
}

impl<'a> Scratch<'a> {
    /// Working memory of at least `len`.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] with the slice that is too short.
    pub fn new(
        len: ScratchLen,
        floats: &'a mut [f32],
        words: &'a mut [i16],
        bytes: &'a mut [i8],
    ) -> Result<Self> {
        let sizes = [
            ("scratch floats", len.floats, floats.len()),
            ("scratch words", len.words, words.len()),
            ("scratch bytes", len.bytes, bytes.len()),
        ];
        match sizes.into_iter().find(|(_, needed, given)| given < needed) {
            Some((what, expected, actual)) => Err(Error::LengthMismatch { what, expected, actual }),
            None => Ok(Self { floats, words, bytes }),
        }
    }
}

/// Working memory on the heap, taken once; it starts at a cache line, because vectors that cross lines cost twice.
#[cfg(feature = "alloc")]
#[derive(Debug)]
pub struct ScratchBuffer {
    len: ScratchLen,
    floats: alloc::vec::Vec<f32>,
    words: alloc::vec::Vec<i16>,
    bytes: alloc::vec::Vec<i8>,
}

/// Bytes of a cache line.
#[cfg(feature = "alloc")]
const LINE: usize = 64;

/// `len` elements of `buffer` from the first cache line on.
#[cfg(feature = "alloc")]
fn from_line<T>(buffer: &mut [T], len: usize) -> &mut [T] {
    let before = buffer.as_ptr().align_offset(LINE);
    buffer.get_mut(before..).and_then(|rest| rest.get_mut(..len)).unwrap_or_default()
}

#[cfg(feature = "alloc")]
impl ScratchBuffer {
    /// Allocates `len`.
    pub fn new(len: ScratchLen) -> Self {
        Self {
            len,
            floats: alloc::vec![0.0; len.floats + LINE / size_of::<f32>()],
            words: alloc::vec![0; len.words + LINE / size_of::<i16>()],
            bytes: alloc::vec![0; len.bytes + LINE],
        }
    }

    /// Lends it to [`crate::features`].
    pub fn scratch(&mut self) -> Scratch<'_> {
        Scratch {
            floats: from_line(&mut self.floats, self.len.floats),
            words: from_line(&mut self.words, self.len.words),
            bytes: from_line(&mut self.bytes, self.len.bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vit_tiny_needs_half_a_mebibyte_and_vit_small_one() {
        const TINY: ScratchLen = ScratchLen::of(&Architecture::vit_tiny(16, (14, 14)));
        const SMALL: ScratchLen = ScratchLen::of(&Architecture::vit_small(16, (14, 14)));
        const { assert!(TINY.total_bytes() <= 512 * 1024) };
        const { assert!(SMALL.total_bytes() <= 1024 * 1024) };
    }
}
