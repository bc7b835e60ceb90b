//! Positives of a patch: the most similar of its candidates (PASS, matching of adjacent patches).
//!
//! `s(i, j) = xᵢ·xⱼ / (max(‖xᵢ‖, ε)·max(‖xⱼ‖, ε))` of the un-normalized backbone features; the released code takes
//! those of the teacher.

use crate::error::{Error, Result, check_length, check_scratch};
use crate::math::{dot, norm};
use crate::neighborhood::Neighborhood;
use crate::rows::{rows_of, rows_of_mut};
use crate::shape::{MAX_PATCHES, Tokens, part, part_mut, take};

/// Smallest norm a feature is divided by: the reference normalizes with this bound.
pub const NORM_EPSILON: f32 = 1e-12;

/// Fills the places of a row that no candidate is left for.
pub const NO_MATCH: u32 = u32::MAX;

/// Cosine similarity of every patch with each of its candidates.
///
/// - `tokens`: `[N, D]`, un-normalized.
/// - `scratch`: at least `N` values ([`similarity_scratch_len`]).
/// - `out`: `[N, M]` with `M` = [`Neighborhood::max_candidates`], in the order of [`Neighborhood::candidates`];
///   unitless, in `[-1, 1]`; the places past the last candidate of a patch hold `-inf`.
///
/// Similarity is symmetric and so is being a candidate: each pair is computed once.
///
/// # Errors
/// [`Error::LengthMismatch`] if `tokens`, `scratch` or `out` does not fit the grid.
pub fn similarities_into(
    tokens: Tokens<'_>,
    neighborhood: &Neighborhood,
    scratch: &mut [f32],
    out: &mut [f32],
) -> Result<()> {
    let n = neighborhood.grid().n_patches();
    let slots = neighborhood.max_candidates();
    check_length("tokens of the grid", n, tokens.len())?;
    check_scratch("similarity scratch", similarity_scratch_len(neighborhood), scratch.len())?;
    check_length("similarities", n.saturating_mul(slots), out.len())?;

    let inverse_norms = part_mut(scratch, 0, n);
    for (inverse, token) in inverse_norms.iter_mut().zip(tokens.iter()) {
        *inverse = 1.0 / norm(token).max(NORM_EPSILON);
    }
    out.fill(f32::NEG_INFINITY);
    let mut put = |patch: usize, slot: usize, cosine| {
        if let Some(out) = out.get_mut(patch * slots + slot) {
            *out = cosine;
        }
    };
    for (patch, &inverse) in inverse_norms.iter().enumerate() {
        for (slot, candidate) in neighborhood.candidates(patch).enumerate() {
            let Some(&other) = inverse_norms.get(candidate).filter(|_| candidate > patch) else { continue };
            let cosine = dot(tokens.row(patch), tokens.row(candidate)) * inverse * other;
            put(patch, slot, cosine);
            if let Some(mirrored) = neighborhood.slot(candidate, patch) {
                put(candidate, mirrored, cosine);
            }
        }
    }
    Ok(())
}

/// Values of scratch memory [`similarities_into`] needs.
pub const fn similarity_scratch_len(neighborhood: &Neighborhood) -> usize {
    neighborhood.grid().n_patches()
}

/// Selects the `k` most similar candidates of each patch, most similar first.
///
/// - `similarities`: `[N, M]` as written by [`similarities_into`].
/// - `out`: `[N, k]` flat patch indices. Equal similarities keep the lower index; one that is not a number ranks last.
///   A patch with fewer than `k` candidates has all of them, then [`NO_MATCH`].
///
/// # Errors
/// [`Error::LengthMismatch`] if a buffer does not fit; [`Error::OutOfRange`] if `k` is 0 or more than any patch has
/// candidates.
pub fn top_k_into(
    similarities: &[f32],
    neighborhood: &Neighborhood,
    k: usize,
    out: &mut [u32],
) -> Result<()> {
    let n = neighborhood.grid().n_patches();
    let slots = neighborhood.max_candidates();
    if k == 0 || k > slots {
        return Err(Error::OutOfRange { what: "k", min: 1, max: slots, actual: k });
    }
    check_length("similarities", n.saturating_mul(slots), similarities.len())?;
    check_length("matches", n.saturating_mul(k), out.len())?;

    let rows = rows_of(similarities, slots).zip(rows_of_mut(out, k));
    for (patch, (row, best)) in rows.enumerate() {
        best.fill(NO_MATCH);
        for (&similarity, candidate) in row.iter().zip(neighborhood.candidates(patch)) {
            let rank = rankable(similarity);
            // Candidates come in ascending order, so a later one must be strictly better to pass an earlier one. From
            // its place on, every better-known one moves down; the last one leaves.
            let (mut moving, mut found) = (candidate as u32, false);
            for place in best.iter_mut() {
                found = found || *place == NO_MATCH || rank > rank_of(*place, patch, row, neighborhood);
                if found {
                    core::mem::swap(place, &mut moving);
                }
            }
        }
    }
    Ok(())
}

fn rank_of(candidate: u32, patch: usize, row: &[f32], neighborhood: &Neighborhood) -> f32 {
    neighborhood
        .slot(patch, candidate as usize)
        .and_then(|slot| row.get(slot))
        .map_or(f32::NEG_INFINITY, |similarity| rankable(*similarity))
}

/// A similarity that is not a number must not win.
fn rankable(similarity: f32) -> f32 {
    if similarity.is_nan() { f32::NEG_INFINITY } else { similarity }
}

/// The positives of every patch: [`similarities_into`], then [`top_k_into`].
///
/// - `tokens`: `[N, D]`, un-normalized.
/// - `scratch`: at least [`match_scratch_len`] values.
/// - `out`: `[N, k]` flat patch indices, most similar first, padded with [`NO_MATCH`].
///
/// # Errors
/// As the two functions it joins.
pub fn match_into(
    tokens: Tokens<'_>,
    neighborhood: &Neighborhood,
    k: usize,
    scratch: &mut [f32],
    out: &mut [u32],
) -> Result<()> {
    check_scratch("match scratch", match_scratch_len(neighborhood), scratch.len())?;
    let n = neighborhood.grid().n_patches();
    let mut rest = scratch;
    let norms = take(&mut rest, n);
    let similarities = take(&mut rest, n * neighborhood.max_candidates());
    similarities_into(tokens, neighborhood, norms, similarities)?;
    top_k_into(similarities, neighborhood, k, out)
}

/// Values of scratch memory [`match_into`] needs: `N·(1 + M)`.
pub const fn match_scratch_len(neighborhood: &Neighborhood) -> usize {
    neighborhood.grid().n_patches().saturating_mul(1 + neighborhood.max_candidates())
}

/// The positives of every patch, checked: `[N, k]` indices below `N`, padded at the end of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matches<'a> {
    indices: &'a [u32],
    k: usize,
}

impl<'a> Matches<'a> {
    /// Views `indices` as the matches of `n` patches.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] if `indices` does not hold `n * k` entries; [`Error::OutOfRange`] if `k` is 0 or an
    /// index points past the last patch and is not [`NO_MATCH`].
    pub fn new(indices: &'a [u32], n: usize, k: usize) -> Result<Self> {
        if k == 0 || n > MAX_PATCHES {
            return Err(Error::OutOfRange { what: "k", min: 1, max: n, actual: k });
        }
        check_length("matches", n.saturating_mul(k), indices.len())?;
        match indices.iter().find(|&&index| index != NO_MATCH && index as usize >= n) {
            Some(&index) => Err(Error::OutOfRange {
                what: "match",
                min: 0,
                max: n.saturating_sub(1),
                actual: index as usize,
            }),
            None => Ok(Self { indices, k }),
        }
    }

    /// The number of patches.
    pub const fn len(&self) -> usize {
        self.indices.len() / if self.k == 0 { 1 } else { self.k }
    }

    /// Whether there is no patch.
    pub const fn is_empty(&self) -> bool {
        self.indices.is_empty()
    }

    /// Most matches of a patch.
    pub const fn k(&self) -> usize {
        self.k
    }

    /// The matches of `patch`, most similar first; empty past the last patch.
    pub fn of(&self, patch: usize) -> &'a [u32] {
        let row = part(self.indices, patch.saturating_mul(self.k), self.k);
        row.split(|&index| index == NO_MATCH).next().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::neighborhood::{Border, Window};
    use crate::shape::PatchGrid;
    use proptest::prelude::*;
    use std::vec;
    use std::vec::Vec;

    fn place(height: usize, width: usize, window: Window, border: Border) -> Neighborhood {
        Neighborhood::new(PatchGrid::new(height, width).unwrap(), window, border).unwrap()
    }

    fn matches(data: &[f32], dim: usize, place: &Neighborhood, k: usize) -> Vec<u32> {
        let n = place.grid().n_patches();
        let mut out = vec![0; n * k];
        let mut scratch = vec![0.0; match_scratch_len(place)];
        match_into(Tokens::new(data, n, dim).unwrap(), place, k, &mut scratch, &mut out).unwrap();
        out
    }

    #[test]
    fn ties_keep_the_lower_index() {
        let place = place(3, 3, Window::Side(3), Border::Wrap);
        assert_eq!(matches(&[1.0; 9], 1, &place, 4)[..4], [1, 2, 3, 4]);
    }

    #[test]
    fn most_similar_comes_first() {
        let place = place(1, 4, Window::All, Border::Clip);
        let data = [1.0, 0.0, -1.0, 0.1, 1.0, 1.0, 5.0, 1.0];
        assert_eq!(matches(&data, 2, &place, 3)[..3], [3, 2, 1]);
    }

    #[test]
    fn clipped_corners_have_fewer_matches() {
        let place = place(3, 3, Window::Side(3), Border::Clip);
        let found = matches(&[1.0; 9], 1, &place, 8);
        let view = Matches::new(&found, 9, 8).unwrap();
        assert_eq!(view.of(0), &[1, 3, 4]);
        assert_eq!(view.of(4), &[0, 1, 2, 3, 5, 6, 7, 8]);
        assert_eq!(view.of(9), &[] as &[u32]);
    }

    #[test]
    fn not_a_number_ranks_last_and_zero_features_are_allowed() {
        let place = place(1, 4, Window::All, Border::Clip);
        assert_eq!(matches(&[1.0, f32::NAN, 0.0, 1.0], 1, &place, 3)[..3], [3, 2, 1]);
        assert_eq!(matches(&[f32::NAN; 4], 1, &place, 3), [1, 2, 3, 0, 2, 3, 0, 1, 3, 0, 1, 2]);
        assert_eq!(matches(&[f32::MAX; 4], 1, &place, 1), [1, 0, 0, 0]);
    }

    #[test]
    fn wrong_sizes_are_refused() {
        let place = place(2, 2, Window::Side(3), Border::Wrap);
        let tokens = Tokens::new(&[0.0; 8], 4, 2).unwrap();
        let mut scratch = [0.0; 64];
        let run =
            |tokens, k, scratch: &mut [f32], out: &mut [u32]| match_into(tokens, &place, k, scratch, out);
        assert!(run(tokens, 2, &mut scratch, &mut [0; 8]).is_ok());
        assert!(run(tokens, 2, &mut scratch, &mut [0; 7]).is_err());
        assert!(run(tokens, 2, &mut scratch[..3], &mut [0; 8]).is_err());
        assert!(run(tokens, 0, &mut scratch, &mut []).is_err());
        assert!(run(tokens, 4, &mut scratch, &mut [0; 16]).is_err());
        assert!(run(Tokens::new(&[0.0; 8], 2, 4).unwrap(), 2, &mut scratch, &mut [0; 8]).is_err());
        assert!(Matches::new(&[0, 1, 4, 0], 4, 1).is_err());
        assert!(Matches::new(&[0, 1, NO_MATCH, 0], 4, 1).is_ok());
        assert!(Matches::new(&[], 0, 0).is_err());
    }

    proptest! {
        #[test]
        fn matches_are_the_best_candidates_of_a_double_precision_twin(
            height in 1_usize..5,
            width in 2_usize..5,
            wrap in any::<bool>(),
            data in proptest::collection::vec(-3.0_f32..3.0, 5 * 5 * 3),
        ) {
            let place = place(height, width, Window::Side(3), if wrap { Border::Wrap } else { Border::Clip });
            let (n, dim, k) = (height * width, 3, place.max_candidates().min(4));
            let found = matches(&data[..n * dim], dim, &place, k);
            let view = Matches::new(&found, n, k).unwrap();
            let cosine = |a: usize, b: usize| {
                let token = |i: usize| data[i * dim..(i + 1) * dim].iter().map(|&x| f64::from(x));
                let norm = |i: usize| token(i).map(|x| x * x).sum::<f64>().sqrt().max(1e-12);
                token(a).zip(token(b)).map(|(a, b)| a * b).sum::<f64>() / norm(a) / norm(b)
            };
            for patch in 0..n {
                let candidates: Vec<_> = place.candidates(patch).collect();
                let row = view.of(patch);
                prop_assert_eq!(row.len(), k.min(candidates.len()));
                let worst = row.iter().map(|&j| cosine(patch, j as usize)).fold(f64::INFINITY, f64::min);
                for &index in row {
                    prop_assert!(candidates.contains(&(index as usize)));
                }
                for candidate in candidates.into_iter().filter(|&j| !row.contains(&(j as u32))) {
                    prop_assert!(cosine(patch, candidate) <= worst + 1e-6);
                }
                for pair in row.windows(2) {
                    prop_assert!(cosine(patch, pair[0] as usize) >= cosine(patch, pair[1] as usize) - 1e-6);
                }
            }
        }
    }
}
