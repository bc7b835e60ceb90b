//! The frames of a clip that take part, in the caller's memory.

use core::ops::Range;

use super::Propagation;
use super::affinity::{Frame, LANES, Voting};
use crate::error::{Error, Result, check_length, check_scratch};
use crate::matching::NORM_EPSILON;
use crate::math::norm;
use crate::shape::{PatchGrid, Tokens, copy, row, row_mut, take};

/// Every size of a clip; gives the lengths of its buffers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClipShape {
    pub(super) rule: Propagation,
    pub(super) grid: PatchGrid,
    pub(super) dim: usize,
    pub(super) classes: usize,
}

impl ClipShape {
    /// Frames of `grid` patches with `dim` features each, labeled with `classes` classes (background included).
    ///
    /// # Errors
    /// [`Error::OutOfRange`] if `top_k`, `dim` or `classes` is 0; [`Error::NotPositive`] for the temperature.
    pub fn new(rule: Propagation, grid: PatchGrid, dim: usize, classes: usize) -> Result<Self> {
        rule.validate()?;
        for (what, size) in [("token dimension", dim), ("classes", classes)] {
            if size == 0 {
                return Err(Error::OutOfRange { what, min: 1, max: usize::MAX, actual: 0 });
            }
        }
        Ok(Self { rule, grid, dim, classes })
    }

    /// The rule.
    pub const fn rule(&self) -> Propagation {
        self.rule
    }

    /// The grid of every frame.
    pub const fn grid(&self) -> PatchGrid {
        self.grid
    }

    /// `D`, the features of a patch.
    pub const fn dim(&self) -> usize {
        self.dim
    }

    /// `C`, the classes.
    pub const fn classes(&self) -> usize {
        self.classes
    }

    /// Values of the soft labels of a frame: `N·C`.
    pub const fn frame_labels_len(&self) -> usize {
        self.grid.n_patches().saturating_mul(self.classes)
    }

    /// Values that [`Clip::new`] needs for features: of the first frame, the previous ones and the target.
    pub const fn features_len(&self) -> usize {
        self.frame_features_len().saturating_mul(self.slots())
    }

    /// Values that [`Clip::new`] needs for labels.
    pub const fn labels_len(&self) -> usize {
        self.frame_labels_len().saturating_mul(self.slots())
    }

    /// Values of scratch memory for one call of [`Clip::propagate_into`]: each thread has its own.
    pub const fn scratch_len(&self) -> usize {
        self.votes_len().saturating_mul(self.grid.width()).saturating_add(self.top_k())
    }

    /// Similarities of one target patch: of the windows of all context frames.
    pub(super) const fn votes_len(&self) -> usize {
        let window =
            self.longest_window(self.grid.height()).saturating_mul(self.longest_window(self.grid.width()));
        window.saturating_mul(self.slots() - 1)
    }

    /// No more than the context patches there can be.
    pub(super) const fn top_k(&self) -> usize {
        let most = self.grid.n_patches().saturating_mul(self.slots() - 1);
        if self.rule.top_k < most { self.rule.top_k } else { most }
    }

    const fn longest_window(&self, side: usize) -> usize {
        let window = self.rule.radius.saturating_mul(2).saturating_add(1);
        if self.rule.radius == 0 || window > side { side } else { window }
    }

    /// Coordinates on an axis of `side` patches within reach of `center`.
    pub(super) fn window(&self, center: usize, side: usize) -> Range<usize> {
        match self.rule.radius {
            0 => 0..side,
            radius => {
                center.saturating_sub(radius)..side.min(center.saturating_add(radius).saturating_add(1))
            }
        }
    }

    /// Frames in memory: the first, the previous ones, the target.
    const fn slots(&self) -> usize {
        self.rule.previous_frames.saturating_add(2)
    }

    /// Values of a row of patches in one feature: padded, so that a vector of neighbors can be read anywhere.
    pub(super) const fn stride(&self) -> usize {
        self.grid.width().next_multiple_of(LANES)
    }

    const fn frame_features_len(&self) -> usize {
        self.grid.height().saturating_mul(self.stride()).saturating_mul(self.dim)
    }
}

/// A clip being labeled, frame by frame.
///
/// ```
/// use pass_core::{propagation::{Clip, ClipShape, Propagation}, shape::{PatchGrid, Tokens}};
///
/// let shape = ClipShape::new(Propagation::DAVIS, PatchGrid::new(1, 3)?, 2, 2)?;
/// let (mut features, mut labels) = (vec![0.0; shape.features_len()], vec![0.0; shape.labels_len()]);
/// let first = [1.0, 0.0, 0.0, 1.0, 0.0, 1.0]; // an object on the left, [N, D]
/// let mask = [0.0, 1.0, 1.0, 0.0, 1.0, 0.0]; // [N, C]
/// let mut clip = Clip::new(shape, &mut features, &mut labels, Tokens::new(&first, 3, 2)?, &mask)?;
///
/// let second = [0.0, 1.0, 0.0, 1.0, 1.0, 0.0]; // it moved to the right
/// clip.set_target(Tokens::new(&second, 3, 2)?)?;
/// let (mut scratch, mut soft) = (vec![0.0; shape.scratch_len()], [0.0; 6]);
/// clip.propagate_into(0..3, &mut scratch, &mut soft)?;
/// clip.keep_target(&soft)?; // one of the context frames from here on
/// assert!(soft[5] > 0.99 && soft[1] < 0.01);
/// # Ok::<(), pass_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Clip<'a> {
    shape: ClipShape,
    /// A slot a frame, `[height, D, stride]` each: neighbors of a row lie side by side in every feature.
    features: &'a mut [f32],
    /// A slot a frame, `[N, C]` each.
    labels: &'a mut [f32],
    /// Frames kept after the first one.
    kept: usize,
    has_target: bool,
}

impl<'a> Clip<'a> {
    /// Starts with the first frame.
    ///
    /// - `features`: [`ClipShape::features_len`] values of memory, `labels`: [`ClipShape::labels_len`].
    /// - `first_tokens`: `[N, D]`, un-normalized.
    /// - `first_labels`: `[N, C]`, one-hot ([`super::one_hot_into`]).
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] for the first buffer that does not fit the shape.
    pub fn new(
        shape: ClipShape,
        features: &'a mut [f32],
        labels: &'a mut [f32],
        first_tokens: Tokens<'_>,
        first_labels: &[f32],
    ) -> Result<Self> {
        check_length("features of the clip", shape.features_len(), features.len())?;
        check_length("labels of the clip", shape.labels_len(), labels.len())?;
        check_length("labels of the first frame", shape.frame_labels_len(), first_labels.len())?;
        check_tokens(&shape, first_tokens)?;
        let mut clip = Self { shape, features, labels, kept: 0, has_target: false };
        clip.store_features(0, first_tokens);
        clip.store_labels(0, first_labels);
        Ok(clip)
    }

    /// The sizes.
    pub const fn shape(&self) -> &ClipShape {
        &self.shape
    }

    /// Hands in the frame to be labeled next: `tokens` `[N, D]`, un-normalized. A target not kept is forgotten.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] if `tokens` does not fit the shape.
    pub fn set_target(&mut self, tokens: Tokens<'_>) -> Result<()> {
        check_tokens(&self.shape, tokens)?;
        self.store_features(self.slot(self.kept), tokens);
        self.has_target = true;
        Ok(())
    }

    /// Soft labels of the target's `patches`.
    ///
    /// - `scratch`: at least [`ClipShape::scratch_len`] values.
    /// - `out`: `[patches, C]`; each patch sums to 1 as far as the labels of the context do. A patch whose similarities
    ///   are all not a number gets zeros.
    ///
    /// Inlined into its caller, so that a caller compiled with more vector instructions lends them to the products;
    /// the result is the same.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for patches past the end; [`Error::LengthMismatch`] for a buffer that does not fit, or
    /// without a target.
    #[inline(always)]
    pub fn propagate_into(&self, patches: Range<usize>, scratch: &mut [f32], out: &mut [f32]) -> Result<()> {
        let n = self.shape.grid.n_patches();
        if patches.end > n || patches.start > patches.end {
            let actual = patches.start.max(patches.end);
            return Err(Error::OutOfRange { what: "patches", min: 0, max: n, actual });
        }
        check_length("target frames", 1, usize::from(self.has_target))?;
        check_scratch("propagation scratch", self.shape.scratch_len(), scratch.len())?;
        check_length(
            "soft labels",
            (patches.end - patches.start).saturating_mul(self.shape.classes),
            out.len(),
        )?;

        let voting = Voting { shape: &self.shape, target: self.frame(self.slot(self.kept)).features };
        let context = self.context();
        let width = self.shape.grid.width();
        let (mut patch, mut out) = (patches.start, out);
        while patch < patches.end {
            let (row, column) = self.shape.grid.position(patch);
            let count = (width - column).min(patches.end - patch);
            let block = take(&mut out, count * self.shape.classes);
            voting.label_row(row, column..column + count, context.clone(), scratch, block);
            patch += count;
        }
        Ok(())
    }

    /// Takes the target among the context frames with its soft labels `[N, C]`; the oldest but the first leaves.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] if `labels` does not fit the shape, or without a target.
    pub fn keep_target(&mut self, labels: &[f32]) -> Result<()> {
        check_length("target frames", 1, usize::from(self.has_target))?;
        check_length("soft labels", self.shape.frame_labels_len(), labels.len())?;
        self.store_labels(self.slot(self.kept), labels);
        self.kept += 1;
        self.has_target = false;
        Ok(())
    }

    /// How many frames take part: the first one, then the previous ones, oldest first.
    fn context(&self) -> (usize, impl Iterator<Item = Frame<'_>> + Clone) {
        let previous = self.kept.min(self.shape.rule.previous_frames);
        let frames = (0..previous + 1).map(move |place| match place {
            0 => self.frame(0),
            _ => self.frame(self.slot(self.kept - previous + place - 1)),
        });
        (previous + 1, frames)
    }

    /// Where the frame is that was (or will be) kept as number `index`: the target takes the place of the oldest frame
    /// no longer needed.
    const fn slot(&self, index: usize) -> usize {
        match index.checked_rem(self.shape.slots() - 1) {
            Some(place) => 1 + place,
            None => 1,
        }
    }

    fn frame(&self, slot: usize) -> Frame<'_> {
        Frame {
            features: row(self.features, slot, self.shape.frame_features_len()),
            labels: row(self.labels, slot, self.shape.frame_labels_len()),
        }
    }

    fn store_features(&mut self, slot: usize, tokens: Tokens<'_>) {
        let (stride, dim) = (self.shape.stride(), self.shape.dim);
        let len = self.shape.frame_features_len();
        let frame = row_mut(self.features, slot, len);
        frame.fill(0.0);
        for (patch, token) in tokens.iter().enumerate() {
            let (row, column) = self.shape.grid.position(patch);
            let length = norm(token).max(NORM_EPSILON);
            let places = frame.get_mut(row * dim * stride + column..).unwrap_or_default();
            for (place, value) in places.iter_mut().step_by(stride.max(1)).zip(token) {
                *place = value / length;
            }
        }
    }

    fn store_labels(&mut self, slot: usize, labels: &[f32]) {
        let len = self.shape.frame_labels_len();
        copy(labels, row_mut(self.labels, slot, len));
    }
}

fn check_tokens(shape: &ClipShape, tokens: Tokens<'_>) -> Result<()> {
    check_length("tokens of the grid", shape.grid.n_patches(), tokens.len())?;
    check_length("token dimension", shape.dim, tokens.dim())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec;
    use std::vec::Vec;

    /// Frames of features `[N, D]` and of labels `[N, C]`, first frame first; what the last frame gets.
    fn by_definition(
        shape: &ClipShape,
        target: &[f32],
        frames: &[(Vec<f32>, Vec<f32>)],
    ) -> (Vec<f64>, Vec<f64>) {
        let (n, width, classes) = (shape.grid.n_patches(), shape.grid.width(), shape.classes);
        let unit = |frame: &[f32], patch: usize| -> Vec<f64> {
            let token = frame[patch * shape.dim..][..shape.dim].iter().map(|&x| f64::from(x));
            let length = token.clone().map(|x| x * x).sum::<f64>().sqrt().max(1e-12);
            token.map(|x| x / length).collect()
        };
        let first_previous = frames.len().saturating_sub(shape.rule.previous_frames).max(1);
        let context: Vec<_> = frames[..1].iter().chain(&frames[first_previous..]).collect();
        let (mut out, mut gaps) = (vec![0.0; n * classes], vec![f64::INFINITY; n]);
        for patch in 0..n {
            let mut votes = vec![];
            for (features, labels) in &context {
                for other in 0..n {
                    let apart =
                        (patch / width).abs_diff(other / width).max((patch % width).abs_diff(other % width));
                    if shape.rule.radius == 0 || apart <= shape.rule.radius {
                        let (a, b) = (unit(target, patch), unit(features, other));
                        let cosine = a.iter().zip(&b).map(|(a, b)| a * b).sum::<f64>();
                        votes.push((cosine, &labels[other * classes..][..classes]));
                    }
                }
            }
            votes.sort_by(|a, b| b.0.total_cmp(&a.0));
            let kept = votes.len().min(shape.rule.top_k);
            if kept < votes.len() {
                gaps[patch] = votes[kept - 1].0 - votes[kept].0;
            }
            let weight = |cosine: f64| (cosine / f64::from(shape.rule.temperature)).exp();
            let total: f64 = votes[..kept].iter().map(|vote| weight(vote.0)).sum();
            for (cosine, labels) in &votes[..kept] {
                for (class, &label) in labels.iter().enumerate() {
                    out[patch * classes + class] += weight(*cosine) / total * f64::from(label);
                }
            }
        }
        (out, gaps)
    }

    struct Buffers {
        features: Vec<f32>,
        labels: Vec<f32>,
        scratch: Vec<f32>,
    }

    impl Buffers {
        fn new(shape: &ClipShape) -> Self {
            Self {
                features: vec![f32::NAN; shape.features_len()],
                labels: vec![f32::NAN; shape.labels_len()],
                scratch: vec![f32::NAN; shape.scratch_len()],
            }
        }
    }

    fn tokens<'t>(shape: &ClipShape, data: &'t [f32]) -> Tokens<'t> {
        Tokens::new(data, shape.grid.n_patches(), shape.dim).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 96 }))]
        #[test]
        fn labels_agree_with_a_dense_double_precision_twin_however_the_frame_is_divided(
            (height, width) in prop_oneof![(1_usize..6, 1_usize..7), (1_usize..3, 15_usize..36)],
            (radius, top_k, previous_frames) in (0_usize..5, 1_usize..7, 0_usize..4),
            (dim, classes) in (1_usize..6, 1_usize..4),
            cut in 0.0..1.0_f64,
            numbers in prop::collection::vec(-1.0_f32..1.0, 256),
        ) {
            let grid = PatchGrid::new(height, width).unwrap();
            let rule = Propagation { previous_frames, radius, top_k, temperature: 0.1 };
            let shape = ClipShape::new(rule, grid, dim, classes).unwrap();
            let n = grid.n_patches();
            // a frame a call; no two alike
            let frame = |number: usize| -> Vec<f32> {
                (0..n * dim)
                    .map(|i| numbers[(i * 7 + number * 31) % 256] + numbers[(i + number) * 13 % 251])
                    .collect()
            };
            let first: Vec<f32> =
                (0..n * classes).map(|i| f32::from(u8::from(i % classes == i / classes % classes))).collect();
            let mut buffers = Buffers::new(&shape);
            let mut history = vec![(frame(0), first.clone())];
            let first_frame = frame(0);
            let mut clip =
                Clip::new(shape, &mut buffers.features, &mut buffers.labels, tokens(&shape, &first_frame), &first)
                    .unwrap();
            for number in 1..6 {
                let target = frame(number);
                clip.set_target(tokens(&shape, &target)).unwrap();
                let mut soft = vec![f32::NAN; n * classes];
                clip.propagate_into(0..n, &mut buffers.scratch, &mut soft).unwrap();

                let (expected, gaps) = by_definition(&shape, &target, &history);
                for (i, (&found, expected)) in soft.iter().zip(expected).enumerate() {
                    // a near tie may go either way in single precision
                    prop_assert!(
                        (f64::from(found) - expected).abs() < 1e-4 || gaps[i / classes] < 1e-5,
                        "frame {number} value {i}: expected {expected}, found {found}"
                    );
                }
                let (left, right) = ((cut * n as f64) as usize, n);
                let mut parts = vec![f32::NAN; n * classes];
                let (one, two) = parts.split_at_mut(left * classes);
                clip.propagate_into(0..left, &mut buffers.scratch, one).unwrap();
                clip.propagate_into(left..right, &mut buffers.scratch, two).unwrap();
                prop_assert_eq!(&parts, &soft);

                clip.keep_target(&soft).unwrap();
                history.push((target, soft));
            }
        }
    }

    /// One frame of context with these features, 1 × 4 patches of 1 feature; labels of the last frame.
    fn propagate(rule: Propagation, first: [f32; 4], target: [f32; 4], labels: &[f32]) -> Vec<f32> {
        let shape = ClipShape::new(rule, PatchGrid::new(1, 4).unwrap(), 1, labels.len() / 4).unwrap();
        let mut buffers = Buffers::new(&shape);
        let mut clip =
            Clip::new(shape, &mut buffers.features, &mut buffers.labels, tokens(&shape, &first), labels)
                .unwrap();
        clip.set_target(tokens(&shape, &target)).unwrap();
        let mut soft = vec![f32::NAN; labels.len()];
        clip.propagate_into(0..4, &mut buffers.scratch, &mut soft).unwrap();
        soft
    }

    #[test]
    fn ties_at_the_threshold_all_vote() {
        let rule = Propagation { top_k: 1, radius: 0, ..Propagation::DAVIS };
        // every patch is as similar as every other: the top 1 is all four
        assert_eq!(propagate(rule, [1.0; 4], [2.0; 4], &[1.0, 0.0, 0.0, 0.0]), [0.25; 4]);
        // two candidates at the border, three inside
        let rule = Propagation { radius: 1, ..rule };
        assert_eq!(propagate(rule, [1.0; 4], [2.0; 4], &[1.0, 0.0, 0.0, 0.0]), [0.5, 1.0 / 3.0, 0.0, 0.0]);
    }

    #[test]
    fn a_window_with_fewer_candidates_than_top_k_lets_all_of_them_vote() {
        let rule = Propagation { radius: 1, top_k: 9, temperature: 1e30, ..Propagation::DAVIS };
        let soft = propagate(rule, [1.0, -1.0, 1.0, -1.0], [1.0; 4], &[1.0, 0.0, 0.0, 0.0]);
        assert_eq!(soft, [0.5, 1.0 / 3.0, 0.0, 0.0]);
    }

    #[test]
    fn a_small_temperature_does_not_overflow() {
        let rule = Propagation { temperature: 1e-6, ..Propagation::DAVIS };
        assert_eq!(propagate(rule, [1.0, -1.0, 0.0, 0.0], [1.0; 4], &[1.0, 0.0, 0.0, 0.0]), [1.0; 4]);
    }

    #[test]
    fn not_a_number_does_not_vote_and_zero_features_do() {
        let rule = Propagation { top_k: 4, ..Propagation::DAVIS };
        let labels = [1.0, 0.0, 0.5, 0.0];
        assert_eq!(propagate(rule, [f32::NAN, 0.0, f32::NAN, f32::INFINITY], [1.0; 4], &labels), [0.0; 4]);
        assert_eq!(propagate(rule, [1.0; 4], [f32::NAN; 4], &labels), [0.0; 4]);
        assert_eq!(propagate(rule, [1.0; 4], [0.0; 4], &labels), [0.375; 4]);
    }

    #[test]
    fn wrong_sizes_are_refused() {
        let grid = PatchGrid::new(2, 2).unwrap();
        let rule = Propagation { previous_frames: 1, ..Propagation::DAVIS };
        assert!(ClipShape::new(Propagation { top_k: 0, ..rule }, grid, 1, 1).is_err());
        assert!(ClipShape::new(Propagation { temperature: 0.0, ..rule }, grid, 1, 1).is_err());
        assert!(ClipShape::new(rule, grid, 0, 1).is_err());
        assert!(ClipShape::new(rule, grid, 1, 0).is_err());
        let endless =
            Propagation { previous_frames: usize::MAX, radius: usize::MAX, top_k: usize::MAX, ..rule };
        let shape = ClipShape::new(endless, grid, 1, 1).unwrap();
        let token = tokens(&shape, &[1.0; 4]);
        assert!(Clip::new(shape, &mut [0.0; 9], &mut [0.0; 9], token, &[1.0; 4]).is_err());

        let shape = ClipShape::new(rule, grid, 1, 1).unwrap();
        let mut buffers = Buffers::new(&shape);
        let (features, labels) = (&mut buffers.features, &mut buffers.labels);
        assert!(Clip::new(shape, &mut features[1..], labels, token, &[1.0; 4]).is_err());
        assert!(Clip::new(shape, features, &mut labels[1..], token, &[1.0; 4]).is_err());
        assert!(Clip::new(shape, features, labels, token, &[1.0; 3]).is_err());
        assert!(
            Clip::new(shape, features, labels, Tokens::new(&[1.0; 4], 2, 2).unwrap(), &[1.0; 4]).is_err()
        );
        assert!(
            Clip::new(shape, features, labels, Tokens::new(&[1.0; 3], 3, 1).unwrap(), &[1.0; 4]).is_err()
        );

        let mut clip = Clip::new(shape, features, labels, token, &[1.0; 4]).unwrap();
        let scratch = &mut buffers.scratch;
        assert!(clip.propagate_into(0..4, scratch, &mut [0.0; 4]).is_err(), "no target");
        assert!(clip.keep_target(&[0.0; 4]).is_err(), "no target");
        clip.set_target(token).unwrap();
        assert!(clip.propagate_into(0..5, scratch, &mut [0.0; 5]).is_err());
        assert!(clip.propagate_into(1..4, scratch, &mut [0.0; 4]).is_err());
        let len = scratch.len();
        assert!(clip.propagate_into(0..4, &mut scratch[..len - 1], &mut [0.0; 4]).is_err());
        #[expect(clippy::reversed_empty_ranges, reason = "what is refused here")]
        let reversed = 3..1;
        assert!(clip.propagate_into(reversed, scratch, &mut []).is_err());
        assert!(clip.propagate_into(4..4, scratch, &mut []).is_ok());
        assert!(clip.keep_target(&[0.0; 3]).is_err());
        assert!(clip.keep_target(&[0.0; 4]).is_ok());
    }
}
