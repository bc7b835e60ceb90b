//! A patch and its positives become one target: the aggregation head, and the mean that replaces it in an ablation.
//!
//! The head starts every query from one shared class token. Used over all patches it gives the image's class token;
//! used over the positives of a patch it gives that patch's target (PASS, aggregation module). Both uses share blocks,
//! token and the final LayerNorm.
//!
//! What acts on each patch alone is computed once per patch and block and then gathered: `LN1`, keys and values; and in
//! the first block, where all queries are the same token, its query, key and value once in all. The cost is linear in
//! the number of patches, and the numbers are those of running the block once per positive set.

use crate::class_attention::{ClassAttention, Tile};
use crate::error::{Error, Result, check_length, check_scratch};
use crate::layers::LayerNorm;
use crate::matching::Matches;
use crate::math::add_scaled;
use crate::rows::rows_of_mut;
use crate::shape::{Tokens, copy, part_mut, row_mut, take};

/// Class tokens that go through a block together: enough rows for a matrix product, few enough to stay in the cache.
const TILE: usize = 32;

/// The aggregation head with its weights.
#[derive(Clone, Copy, Debug)]
pub struct AggregationHead<'a> {
    class: &'a [f32],
    blocks: &'a [ClassAttention<'a>],
    norm: LayerNorm<'a>,
}

impl<'a> AggregationHead<'a> {
    /// `class`: the shared class token, `[D]`; `blocks`: two in the paper; `norm`: the final LayerNorm.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] if the widths differ; [`Error::OutOfRange`] if there is no block.
    pub fn new(class: &'a [f32], blocks: &'a [ClassAttention<'a>], norm: LayerNorm<'a>) -> Result<Self> {
        if blocks.is_empty() {
            return Err(Error::OutOfRange { what: "aggregation blocks", min: 1, max: usize::MAX, actual: 0 });
        }
        for block in blocks {
            check_length("aggregation block", norm.dim(), block.dim())?;
        }
        check_length("class token", norm.dim(), class.len())?;
        Ok(Self { class, blocks, norm })
    }

    /// The teacher's targets: the class token over all patches, then one token per patch over its positives.
    ///
    /// - `patches`: `[N, D]`, un-normalized; `matches`: of the same `N` patches.
    /// - `scratch`: at least [`AggregationHead::scratch_len`] values.
    /// - `out`: `[1 + N, D]`, after the final LayerNorm. A patch without positives attends to the class token alone.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] if a buffer does not fit.
    pub fn aggregate_into(
        &self,
        patches: Tokens<'_>,
        matches: Matches<'_>,
        scratch: &mut [f32],
        out: &mut [f32],
    ) -> Result<()> {
        check_length("matches", patches.len(), matches.len())?;
        self.check_door(patches, scratch, out)?;
        self.run(patches, Some(matches), scratch, out);
        self.norm.rows_mut(out);
        Ok(())
    }

    /// The student's view: the class token over all patches, then the patches themselves.
    ///
    /// - `patches`: `[N, D]`, un-normalized.
    /// - `scratch`: at least [`AggregationHead::scratch_len`] values.
    /// - `out`: `[1 + N, D]`, after the final LayerNorm.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] if a buffer does not fit.
    pub fn class_into(&self, patches: Tokens<'_>, scratch: &mut [f32], out: &mut [f32]) -> Result<()> {
        self.check_door(patches, scratch, out)?;
        let mut rest = &mut *out;
        let class = take(&mut rest, self.class.len());
        self.run(patches, None, scratch, class);
        copy(patches.as_slice(), rest);
        self.norm.rows_mut(out);
        Ok(())
    }

    /// Values of scratch memory the head needs for `n` patches: keys and values, one tile, one row of scores per head.
    pub const fn scratch_len(&self, n: usize) -> usize {
        let mut longest = 0;
        let mut index = 0;
        while index < self.blocks.len() {
            let block = &self.blocks[index];
            let tile = Tile::len(tile_rows(n), block.dim(), block.hidden());
            let len = tile.saturating_add(block.heads().saturating_mul(n.saturating_add(1)));
            longest = if len > longest { len } else { longest };
            index += 1;
        }
        n.saturating_mul(2 * self.class.len()).saturating_add(longest)
    }

    fn check_door(&self, patches: Tokens<'_>, scratch: &[f32], out: &[f32]) -> Result<()> {
        check_length("token dimension", self.class.len(), patches.dim())?;
        check_length("aggregated tokens", (patches.len() + 1).saturating_mul(patches.dim()), out.len())?;
        check_scratch("aggregation scratch", self.scratch_len(patches.len()), scratch.len())
    }

    /// Runs the blocks on the class tokens `out`: token 0 over all patches, token `1 + i` over the positives of `i`.
    fn run(&self, patches: Tokens<'_>, matches: Option<Matches<'_>>, scratch: &mut [f32], out: &mut [f32]) {
        let (n, dim) = (patches.len(), patches.dim());
        let mut working = scratch;
        let (keys, values) = (take(&mut working, n * dim), take(&mut working, n * dim));
        for (depth, block) in self.blocks.iter().enumerate() {
            let mut rest = &mut *working;
            let scores = take(&mut rest, block.heads() * (n + 1));
            block.keys_values(patches, rest, keys, values);
            let mut tile = Tile::carve(rest, tile_rows(n), dim, block.hidden());
            let shared = depth == 0;
            if shared {
                rows_of_mut(out, dim).for_each(|token| copy(self.class, token));
                block.own_projections(self.class, &mut tile);
            }
            for (index, class) in rows_of_mut(out, tile_rows(n) * dim).enumerate() {
                if !shared {
                    block.own_projections(class, &mut tile);
                }
                for slot in 0..class.len() / dim.max(1) {
                    let own = if shared { 0 } else { slot };
                    let context = row_mut(tile.context, slot, dim);
                    let (queries, own_keys, own_values) = (&*tile.queries, &*tile.keys, &*tile.values);
                    match (index * tile_rows(n) + slot).checked_sub(1).zip(matches) {
                        None => {
                            block.attend(
                                own,
                                queries,
                                own_keys,
                                own_values,
                                keys,
                                values,
                                0..n,
                                scores,
                                context,
                            );
                        }
                        Some((patch, matches)) => {
                            let positives = matches.of(patch);
                            let scores = part_mut(scores, 0, block.heads() * (positives.len() + 1));
                            let attended = positives.iter().map(|&index| index as usize);
                            block.attend(
                                own, queries, own_keys, own_values, keys, values, attended, scores, context,
                            );
                        }
                    }
                }
                block.finish(class, &mut tile);
            }
        }
    }
}

const fn tile_rows(n: usize) -> usize {
    if n < TILE { n + 1 } else { TILE }
}

/// The mean of each patch's positives, `[N, D]` (the ablation without aggregation).
///
/// - `patches`: `[N, D]`, un-normalized; `matches`: of the same patches.
/// - `out`: `[N, D]`. A patch without positives keeps its own feature.
///
/// # Errors
/// [`Error::LengthMismatch`] if `matches` or `out` does not fit.
pub fn mean_into(patches: Tokens<'_>, matches: Matches<'_>, out: &mut [f32]) -> Result<()> {
    check_length("matches", patches.len(), matches.len())?;
    check_length("mean tokens", patches.as_slice().len(), out.len())?;
    for (patch, out) in rows_of_mut(out, patches.dim()).enumerate() {
        let positives = matches.of(patch);
        if positives.is_empty() {
            copy(patches.row(patch), out);
            continue;
        }
        out.fill(0.0);
        let share = 1.0 / positives.len() as f32;
        for &index in positives {
            add_scaled(out, share, patches.row(index as usize));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::class_attention::tests::{Owned, uniform};
    use crate::matching::NO_MATCH;
    use crate::shape::row;
    use proptest::prelude::*;
    use std::vec;
    use std::vec::Vec;

    struct Case {
        n: usize,
        dim: usize,
        heads: usize,
        k: usize,
        depth: usize,
    }

    /// The head as the reference runs it: every positive set gathered, every block run whole on it.
    fn twin(
        class: &[f32],
        blocks: &[ClassAttention<'_>],
        norm: LayerNorm<'_>,
        x: &[f32],
        sets: &[Vec<u32>],
    ) -> Vec<f32> {
        let dim = class.len();
        let mut out = Vec::new();
        for set in sets {
            let gathered: Vec<f32> = set.iter().flat_map(|&i| row(x, i as usize, dim).to_vec()).collect();
            let tokens = Tokens::new(&gathered, set.len(), dim).unwrap();
            let mut token = class.to_vec();
            for block in blocks {
                let mut next = vec![0.0; dim];
                let mut attention = vec![0.0; block.heads() * (set.len() + 1)];
                let mut scratch = vec![0.0; block.scratch_len(set.len())];
                block.forward_into(tokens, &token, &mut scratch, &mut next, &mut attention).unwrap();
                token = next;
            }
            norm.rows_mut(&mut token);
            out.extend(token);
        }
        out
    }

    fn check(case: &Case, seed: u32) {
        let Case { n, dim, heads, k, depth } = *case;
        let mut state = seed;
        let mut draw = |len: usize| -> Vec<f32> { (0..len).map(|_| uniform(&mut state)).collect() };
        let (x, class, weight, bias) = (draw(n * dim), draw(dim), draw(dim), draw(dim));
        let owned: Vec<_> = (0..depth).map(|i| Owned::new(dim, 2 * dim, seed + i as u32)).collect();
        let blocks: Vec<_> = owned.iter().map(|owned| owned.block(heads)).collect();
        let norm = LayerNorm::new(&weight, &bias).unwrap();
        let head = AggregationHead::new(&class, &blocks, norm).unwrap();
        let indices: Vec<u32> = (0..n * k)
            .map(|i| if i % k > 0 && (i / k).is_multiple_of(5) { NO_MATCH } else { ((i * 7 + 3) % n) as u32 })
            .collect();
        let matches = Matches::new(&indices, n, k).unwrap();
        let tokens = Tokens::new(&x, n, dim).unwrap();

        // Scratch full of NaN: nothing may be read before it is written.
        let mut scratch = vec![f32::NAN; head.scratch_len(n)];
        let mut out = vec![f32::NAN; (n + 1) * dim];
        head.aggregate_into(tokens, matches, &mut scratch, &mut out).unwrap();
        let mut sets = vec![(0..n as u32).collect::<Vec<_>>()];
        sets.extend((0..n).map(|patch| matches.of(patch).to_vec()));
        let expected = twin(&class, &blocks, norm, &x, &sets);
        for (found, expected) in out.iter().zip(&expected) {
            assert!((found - expected).abs() < 2e-5, "{found} {expected}");
        }

        let mut student = vec![f32::NAN; (n + 1) * dim];
        scratch.fill(f32::NAN);
        head.class_into(tokens, &mut scratch, &mut student).unwrap();
        assert_eq!(student[..dim], out[..dim]);
        let mut normed = x.clone();
        norm.rows_mut(&mut normed);
        assert_eq!(student[dim..], normed);
    }

    #[test]
    fn the_shortcut_gives_the_numbers_of_running_every_set_on_its_own() {
        for (seed, case) in [
            Case { n: 1, dim: 4, heads: 1, k: 1, depth: 1 },
            Case { n: 9, dim: 8, heads: 2, k: 4, depth: 2 },
            Case { n: 31, dim: 6, heads: 3, k: 2, depth: 2 },
            Case { n: 32, dim: 12, heads: 3, k: 8, depth: 3 },
            Case { n: 70, dim: 8, heads: 4, k: 3, depth: 2 },
        ]
        .iter()
        .enumerate()
        {
            check(case, seed as u32 + 1);
        }
    }

    proptest! {
        #[test]
        fn means_lie_between_their_positives(x in proptest::collection::vec(-1.0_f32..1.0, 12)) {
            let indices = [1, 2, 0, NO_MATCH, NO_MATCH, NO_MATCH, 3, 3];
            let mut out = [0.0; 12];
            let matches = Matches::new(&indices, 4, 2).unwrap();
            mean_into(Tokens::new(&x, 4, 3).unwrap(), matches, &mut out).unwrap();
            for d in 0..3 {
                prop_assert!((out[d] - (x[3 + d] + x[6 + d]) / 2.0).abs() < 1e-6);
                prop_assert_eq!(out[3 + d], x[d]);
                prop_assert_eq!(out[6 + d], x[6 + d]);
                prop_assert!((out[9 + d] - x[9 + d]).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn wrong_sizes_are_refused() {
        let owned = Owned::new(4, 8, 1);
        let blocks = [owned.block(2)];
        let norm = LayerNorm::new(&[1.0; 4], &[0.0; 4]).unwrap();
        assert!(AggregationHead::new(&[0.0; 4], &[], norm).is_err());
        assert!(AggregationHead::new(&[0.0; 5], &blocks, norm).is_err());
        let wide = LayerNorm::new(&[1.0; 5], &[0.0; 5]).unwrap();
        assert!(AggregationHead::new(&[0.0; 5], &blocks, wide).is_err());
        let head = AggregationHead::new(&[0.0; 4], &blocks, norm).unwrap();
        let x = [0.0; 12];
        let tokens = Tokens::new(&x, 3, 4).unwrap();
        let matches = Matches::new(&[1, 2, 0], 3, 1).unwrap();
        let mut scratch = vec![0.0; head.scratch_len(3)];
        assert!(head.aggregate_into(tokens, matches, &mut scratch, &mut [0.0; 16]).is_ok());
        assert!(head.aggregate_into(tokens, matches, &mut scratch, &mut [0.0; 12]).is_err());
        assert!(head.aggregate_into(tokens, matches, &mut scratch[1..], &mut [0.0; 16]).is_err());
        let fewer = Matches::new(&[1, 0], 2, 1).unwrap();
        assert!(head.aggregate_into(tokens, fewer, &mut scratch, &mut [0.0; 16]).is_err());
        assert!(head.class_into(Tokens::new(&x, 4, 3).unwrap(), &mut scratch, &mut [0.0; 16]).is_err());
        assert!(mean_into(tokens, fewer, &mut [0.0; 12]).is_err());
        assert!(mean_into(tokens, matches, &mut [0.0; 11]).is_err());
    }
}
