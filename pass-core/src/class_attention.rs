//! One class-attention block: a class token gathers from the patches, which stay as they are (CaiT without LayerScale).
//!
//! ```text
//! v = LN1(concat(c, x))                       class token first
//! q = Wq·v₀·(D/H)^-½,  k = Wk·v,  val = Wv·v  the class token is among the keys and values
//! c = c + Wproj·(softmax(q·kᵀ)·val)
//! c = c + MLP(LN2(c))                         exact GELU, only the class token
//! ```

mod gradient;
mod parameters;

pub use parameters::ClassAttentionParameters;

use crate::error::{Error, Result, check_length, check_scratch};
use crate::layers::{LayerNorm, Linear};
use crate::math::{add_scaled, dot, gelu, sqrt};
use crate::rows::{rows_of, rows_of_mut};
use crate::shape::{Tokens, copy, part, part_mut, row, take};
use crate::softmax::softmax_mut;

/// A class-attention block with its weights.
#[derive(Clone, Copy, Debug)]
pub struct ClassAttention<'a> {
    norm1: LayerNorm<'a>,
    query: Linear<'a>,
    key: Linear<'a>,
    value: Linear<'a>,
    projection: Linear<'a>,
    norm2: LayerNorm<'a>,
    fc1: Linear<'a>,
    fc2: Linear<'a>,
    heads: usize,
}

impl<'a> ClassAttention<'a> {
    /// Checks the weights of a block with `heads` heads; `D` is the width of the first LayerNorm.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] for a weight that does not fit `D`; [`Error::NotDivisible`] if `heads` does not
    /// divide it; [`Error::OutOfRange`] if there is no head.
    pub fn new(parameters: ClassAttentionParameters<&'a [f32]>, heads: usize) -> Result<Self> {
        let p = parameters;
        let norm1 = LayerNorm::new(p.norm1_weight, p.norm1_bias)?;
        let dim = norm1.dim();
        if heads == 0 {
            return Err(Error::OutOfRange { what: "heads", min: 1, max: dim, actual: 0 });
        }
        if !dim.is_multiple_of(heads) {
            return Err(Error::NotDivisible { what: "token dimension", actual: dim, divisor: heads });
        }
        let square = |weight, bias: &'a [f32]| {
            check_length("bias of an attention map", dim, bias.len())?;
            Linear::new(weight, bias, dim)
        };
        check_length("second LayerNorm", dim, p.norm2_weight.len())?;
        check_length("bias of the second MLP layer", dim, p.fc2_bias.len())?;
        let fc1 = Linear::new(p.fc1_weight, p.fc1_bias, dim)?;
        Ok(Self {
            norm1,
            query: square(p.query_weight, p.query_bias)?,
            key: square(p.key_weight, p.key_bias)?,
            value: square(p.value_weight, p.value_bias)?,
            projection: square(p.projection_weight, p.projection_bias)?,
            norm2: LayerNorm::new(p.norm2_weight, p.norm2_bias)?,
            fc1,
            fc2: Linear::new(p.fc2_weight, p.fc2_bias, fc1.n_out())?,
            heads,
        })
    }

    /// `D`, the width of a token.
    pub const fn dim(&self) -> usize {
        self.norm1.dim()
    }

    /// Width of the MLP's hidden layer, `4·D` in the paper.
    pub const fn hidden(&self) -> usize {
        self.fc1.n_out()
    }

    /// `H`, the number of heads.
    pub const fn heads(&self) -> usize {
        self.heads
    }

    /// The class token after the block.
    ///
    /// - `patches`: `[n, D]`, un-normalized; `class`: `[D]`.
    /// - `scratch`: at least [`ClassAttention::scratch_len`] values.
    /// - `out`: `[D]`; `attention`: `[H, 1 + n]`, each row sums to 1, the class token first.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] if a buffer does not fit.
    pub fn forward_into(
        &self,
        patches: Tokens<'_>,
        class: &[f32],
        scratch: &mut [f32],
        out: &mut [f32],
        attention: &mut [f32],
    ) -> Result<()> {
        let (dim, n) = (self.dim(), patches.len());
        check_length("token dimension", dim, patches.dim())?;
        check_length("class token", dim, class.len())?;
        check_length("class token out", dim, out.len())?;
        check_length("attention", self.heads.saturating_mul(n + 1), attention.len())?;
        check_scratch("class-attention scratch", self.scratch_len(n), scratch.len())?;

        let mut tile = scratch;
        let (keys, values) = (take(&mut tile, n * dim), take(&mut tile, n * dim));
        self.keys_values(patches, tile, keys, values);
        copy(class, out);
        let mut tile = Tile::carve(tile, 1, dim, self.hidden());
        self.own_projections(out, &mut tile);
        self.attend(0, tile.queries, tile.keys, tile.values, keys, values, 0..n, attention, tile.context);
        self.finish(out, &mut tile);
        Ok(())
    }

    /// Values of scratch memory [`ClassAttention::forward_into`] needs for `n` patches.
    pub const fn scratch_len(&self, n: usize) -> usize {
        n.saturating_mul(2 * self.dim()).saturating_add(Tile::len(1, self.dim(), self.hidden()))
    }

    /// Keys and values of all patches: `LN1`, `Wk` and `Wv` act on each patch alone, so they are the same for every
    /// class token and every positive set. `tile` is scratch of at least one row.
    pub(crate) fn keys_values(
        &self,
        patches: Tokens<'_>,
        tile: &mut [f32],
        keys: &mut [f32],
        values: &mut [f32],
    ) {
        let dim = self.dim();
        let rows = (tile.len() / dim.max(1) * dim).max(dim);
        for ((patches, keys), values) in
            rows_of(patches.as_slice(), rows).zip(rows_of_mut(keys, rows)).zip(rows_of_mut(values, rows))
        {
            let normed = part_mut(tile, 0, patches.len());
            self.norm1.rows(patches, normed);
            self.key.rows(normed, keys);
            self.value.rows(normed, values);
        }
    }

    /// Query, key and value of the class tokens `class` (`[T, D]`) themselves.
    pub(crate) fn own_projections(&self, class: &[f32], tile: &mut Tile<'_>) {
        let len = class.len();
        self.norm1.rows(class, part_mut(tile.normed, 0, len));
        let normed = part(tile.normed, 0, len);
        self.query.rows(normed, part_mut(tile.queries, 0, len));
        self.key.rows(normed, part_mut(tile.keys, 0, len));
        self.value.rows(normed, part_mut(tile.values, 0, len));
    }

    /// Attention of class token `token` of the tile over itself and the `attended` patches.
    ///
    /// - `own_queries`, `own_keys`, `own_values`: of the class tokens; `keys`, `values`: of all patches, `[N, D]`.
    /// - `weights`: `[H, 1 + n]` for `n` attended patches; `context`: `[D]`.
    pub(crate) fn attend(
        &self,
        token: usize,
        own_queries: &[f32],
        own_keys: &[f32],
        own_values: &[f32],
        keys: &[f32],
        values: &[f32],
        attended: impl Iterator<Item = usize> + Clone,
        weights: &mut [f32],
        context: &mut [f32],
    ) {
        let dim = self.dim();
        let width = (dim / self.heads.max(1)).max(1);
        let scale = 1.0 / sqrt(width as f32);
        let n = (weights.len() / self.heads.max(1)).max(1);
        let heads = rows_of_mut(weights, n).zip(rows_of_mut(context, width));
        for (head, (weights, context)) in heads.enumerate() {
            let of_head = |rows, index| part(row(rows, index, dim), head * width, width);
            let query = of_head(own_queries, token);
            if let Some((own, others)) = weights.split_first_mut() {
                *own = dot(query, of_head(own_keys, token)) * scale;
                for (weight, patch) in others.iter_mut().zip(attended.clone()) {
                    *weight = dot(query, of_head(keys, patch)) * scale;
                }
            }
            softmax_mut(weights);
            context.fill(0.0);
            if let Some((&own, others)) = weights.split_first() {
                add_scaled(context, own, of_head(own_values, token));
                for (&weight, patch) in others.iter().zip(attended.clone()) {
                    add_scaled(context, weight, of_head(values, patch));
                }
            }
        }
    }

    /// Projection and MLP with their residuals: `class` (`[T, D]`) moves on by the contexts in the tile.
    pub(crate) fn finish(&self, class: &mut [f32], tile: &mut Tile<'_>) {
        let len = class.len();
        let hidden = part_mut(tile.hidden, 0, len / self.dim().max(1) * self.hidden());
        let branch = part_mut(tile.normed, 0, len);
        self.projection.rows(part(tile.context, 0, len), branch);
        add_scaled(class, 1.0, branch);
        self.norm2.rows(class, branch);
        self.fc1.rows(branch, hidden);
        hidden.iter_mut().for_each(|value| *value = gelu(*value));
        self.fc2.rows(hidden, branch);
        add_scaled(class, 1.0, branch);
    }
}

/// Working memory for the class tokens of one tile.
pub(crate) struct Tile<'s> {
    pub(crate) normed: &'s mut [f32],
    pub(crate) queries: &'s mut [f32],
    pub(crate) keys: &'s mut [f32],
    pub(crate) values: &'s mut [f32],
    pub(crate) context: &'s mut [f32],
    hidden: &'s mut [f32],
}

impl<'s> Tile<'s> {
    pub(crate) const fn len(tokens: usize, dim: usize, hidden: usize) -> usize {
        tokens.saturating_mul(dim.saturating_mul(5).saturating_add(hidden))
    }

    /// Splits `scratch`, which holds at least [`Tile::len`] values.
    pub(crate) fn carve(scratch: &'s mut [f32], tokens: usize, dim: usize, hidden: usize) -> Self {
        let mut scratch = scratch;
        Self {
            normed: take(&mut scratch, tokens * dim),
            queries: take(&mut scratch, tokens * dim),
            keys: take(&mut scratch, tokens * dim),
            values: take(&mut scratch, tokens * dim),
            context: take(&mut scratch, tokens * dim),
            hidden: take(&mut scratch, tokens * hidden),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::vec;
    use std::vec::Vec;

    /// Weights of a block as one owned list per parameter.
    pub(crate) struct Owned(ClassAttentionParameters<Vec<f32>>);

    impl Owned {
        pub(crate) fn new(dim: usize, hidden: usize, seed: u32) -> Self {
            let mut state = seed;
            Self(ClassAttentionParameters::from_fn(|name| {
                let len = ClassAttentionParameters::<()>::len_of(name, dim, hidden);
                let offset = if name.contains("norm") && name.ends_with("weight") { 1.0 } else { 0.0 };
                (0..len).map(|_| offset + 0.5 * uniform(&mut state)).collect()
            }))
        }

        pub(crate) fn block(&self, heads: usize) -> ClassAttention<'_> {
            ClassAttention::new(self.0.as_ref().map(|vec| vec.as_slice()), heads).unwrap()
        }

        pub(crate) fn parameters(&self) -> &ClassAttentionParameters<Vec<f32>> {
            &self.0
        }
    }

    /// A number in `[-1, 1)` from a small linear congruential sequence.
    pub(crate) fn uniform(state: &mut u32) -> f32 {
        *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (*state >> 8) as f32 / 8_388_608.0 - 1.0
    }

    #[test]
    fn without_patches_the_class_token_attends_to_itself() {
        let owned = Owned::new(6, 12, 1);
        let block = owned.block(2);
        let mut attention = [0.0; 2];
        let mut out = [0.0; 6];
        let mut scratch = vec![0.0; block.scratch_len(0)];
        let empty = Tokens::new(&[], 0, 6).unwrap();
        block.forward_into(empty, &[0.5; 6], &mut scratch, &mut out, &mut attention).unwrap();
        assert_eq!(attention, [1.0, 1.0]);
        assert!(out.iter().all(|value| value.is_finite()));
    }

    #[test]
    fn the_order_of_the_patches_changes_nothing() {
        let owned = Owned::new(8, 16, 7);
        let block = owned.block(4);
        let mut state = 3;
        let x: Vec<f32> = (0..24).map(|_| uniform(&mut state)).collect();
        let swapped = [&x[16..], &x[8..16], &x[..8]].concat();
        let run = |x: &[f32]| {
            let (mut out, mut attention) = (vec![0.0; 8], vec![0.0; 16]);
            let mut scratch = vec![0.0; block.scratch_len(3)];
            let tokens = Tokens::new(x, 3, 8).unwrap();
            block.forward_into(tokens, &[0.1; 8], &mut scratch, &mut out, &mut attention).unwrap();
            for row in attention.chunks(4) {
                assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
            }
            out
        };
        for (a, b) in run(&x).iter().zip(run(&swapped)) {
            assert!((a - b).abs() < 1e-5);
        }
    }

    #[test]
    fn wrong_sizes_are_refused() {
        let owned = Owned::new(6, 12, 1);
        let parameters = owned.parameters().as_ref().map(|vec| vec.as_slice());
        assert!(ClassAttention::new(parameters, 0).is_err());
        assert!(ClassAttention::new(parameters, 4).is_err());
        for name in ClassAttentionParameters::<()>::NAMES {
            let short =
                ClassAttentionParameters::from_fn(
                    |n| if n == name { &[] } else { *parameters.get(n).unwrap() },
                );
            assert!(ClassAttention::new(short, 2).is_err(), "{name}");
        }
        let block = owned.block(2);
        let x = Tokens::new(&[0.0; 12], 2, 6).unwrap();
        let mut scratch = vec![0.0; block.scratch_len(2)];
        let run = |class: usize, out: usize, attention: usize, scratch: &mut [f32]| {
            block.forward_into(x, &vec![0.0; class], scratch, &mut vec![0.0; out], &mut vec![0.0; attention])
        };
        assert!(run(6, 6, 6, &mut scratch).is_ok());
        assert!(run(5, 6, 6, &mut scratch).is_err());
        assert!(run(6, 7, 6, &mut scratch).is_err());
        assert!(run(6, 6, 5, &mut scratch).is_err());
        assert!(run(6, 6, 6, &mut scratch[1..]).is_err());
    }
}
