//! Soft labels from frame to frame on all cores (SEMANTICS §6): the fast twin of `pass_core::propagation::Clip`.
//!
//! Patches are kept line by line along the shorter side of the grid. A block of target lines and the lines within reach of it
//! in one context frame are two contiguous matrices, so their cosines are one product; a frame's product is reduced to
//! the best candidates of every target before the next one is formed. Memory therefore grows with the window, never with
//! the square of the patches, and each frame is normalized once.

use std::collections::VecDeque;
use std::ops::Range;

use ndarray::{ArrayView2, ArrayViewMut2};
use pass_core::propagation::ClipShape;
use pass_core::shape::PatchGrid;
use rayon::prelude::*;

use crate::ops::lanes::{dot, widest};
use crate::ops::product::{Before, Threads, multiply};

/// Target patches of a block, at least about: enough for the products to be worth their preparation.
const BLOCK: usize = 64;
/// Smallest length that features are divided by.
const NORM_EPSILON: f32 = 1e-12;

/// The frames of a clip that take part.
#[derive(Debug)]
pub struct Propagation {
    shape: ClipShape,
    lines: Lines,
    /// The first frame, then the previous ones, oldest first.
    context: VecDeque<Remembered>,
}

/// A frame of the context, patches line by line.
#[derive(Debug)]
struct Remembered {
    /// `[N, D]`, unit length.
    features: Vec<f32>,
    /// `[N, C]`
    labels: Vec<f32>,
}

impl Propagation {
    /// Starts with the first frame.
    ///
    /// - `tokens`: `[N, D]`, patches row by row, un-normalized.
    /// - `labels`: `[N, C]`, one-hot.
    ///
    /// # Errors
    /// [`pass_core::Error::LengthMismatch`] if they do not fit the shape.
    pub fn new(shape: ClipShape, tokens: &[f32], labels: &[f32]) -> pass_core::Result<Self> {
        let lines = Lines::of(shape.grid());
        check("tokens of the first frame", shape.grid().n_patches() * shape.dim(), tokens.len())?;
        check("labels of the first frame", shape.frame_labels_len(), labels.len())?;
        let first = Remembered {
            features: lines.unit_features(tokens, shape.dim()),
            labels: lines.reordered(labels, shape.classes()),
        };
        Ok(Self { shape, lines, context: VecDeque::from([first]) })
    }

    /// Soft labels `[N, C]` of the next frame, which is one of the context from here on; `tokens` as for the first frame.
    ///
    /// A patch whose similarities are all not a number gets zeros.
    ///
    /// # Errors
    /// [`pass_core::Error::LengthMismatch`] if `tokens` does not fit the shape.
    pub fn next(&mut self, tokens: &[f32]) -> pass_core::Result<Vec<f32>> {
        let (dim, classes) = (self.shape.dim(), self.shape.classes());
        check("tokens of a frame", self.shape.grid().n_patches() * dim, tokens.len())?;
        let target = self.lines.unit_features(tokens, dim);
        let lines = (BLOCK / self.lines.len).max(1);
        let block = lines * self.lines.len;
        let mut labels = vec![0.0; self.shape.frame_labels_len()];
        let tasks = labels.par_chunks_mut(block * classes).zip(target.par_chunks(block * dim)).enumerate();
        tasks.for_each_init(Vec::new, |products, (index, (out, target))| {
            let first = index * lines;
            self.label_block(first..first + target.len() / (self.lines.len * dim), target, products, out);
        });
        let found = self.lines.row_by_row(&labels, classes);
        if self.context.len() > self.shape.rule().previous_frames {
            self.context.remove(1);
        }
        if self.shape.rule().previous_frames > 0 {
            self.context.push_back(Remembered { features: target, labels });
        }
        Ok(found)
    }

    /// Labels of the targets on some lines.
    fn label_block(&self, targets: Range<usize>, target: &[f32], products: &mut Vec<f32>, out: &mut [f32]) {
        let Lines { count, len, .. } = self.lines;
        let (dim, classes) = (self.shape.dim(), self.shape.classes());
        let reach = self.window(targets.start, count).start..self.window(targets.end - 1, count).end;
        let (rows, columns) = (targets.len() * len, reach.len() * len);
        products.resize(rows * columns, 0.0);
        let mut votes = vec![Votes::new(self.shape.rule().top_k); rows];
        for (frame, Remembered { features, .. }) in self.context.iter().enumerate() {
            let source = &features[reach.start * len * dim..reach.end * len * dim];
            multiply(
                matrix_mut(products, rows, columns),
                Before::Ignored,
                1.0,
                matrix(target, rows, dim),
                matrix(source, columns, dim).t(),
                Threads::One,
            );
            for (row, (votes, similarities)) in
                votes.iter_mut().zip(products.chunks_exact(columns)).enumerate()
            {
                let places = self.window(row % len, len);
                for line in self.window(targets.start + row / len, count) {
                    let start = (line - reach.start) * len;
                    let patch = line * len + places.start;
                    votes.take(&similarities[start..][places.clone()], frame, patch);
                }
            }
        }
        for (votes, out) in votes.into_iter().zip(out.chunks_exact_mut(classes)) {
            votes.count(self.shape.rule().temperature, out, |frame, patch| {
                &self.context[frame].labels[patch * classes..][..classes]
            });
        }
    }

    /// Coordinates on an axis of `side` patches within reach of `center`.
    fn window(&self, center: usize, side: usize) -> Range<usize> {
        match self.shape.rule().radius {
            0 => 0..side,
            radius => {
                center.saturating_sub(radius)..side.min(center.saturating_add(radius).saturating_add(1))
            }
        }
    }
}

fn check(what: &'static str, expected: usize, actual: usize) -> pass_core::Result<()> {
    match expected == actual {
        true => Ok(()),
        false => Err(pass_core::Error::LengthMismatch { what, expected, actual }),
    }
}

fn matrix(values: &[f32], rows: usize, columns: usize) -> ArrayView2<'_, f32> {
    ArrayView2::from_shape((rows, columns), values).expect("rows · columns values are such a matrix")
}

fn matrix_mut(values: &mut [f32], rows: usize, columns: usize) -> ArrayViewMut2<'_, f32> {
    ArrayViewMut2::from_shape((rows, columns), values).expect("rows · columns values are such a matrix")
}

/// The most similar context patches of one target.
#[derive(Clone, Debug)]
struct Votes {
    /// The largest similarities, best first; as many as decide.
    best: Vec<f32>,
    top_k: usize,
    /// All that were not below the last of `best` when they came: similarity, frame, patch.
    candidates: Vec<(f32, u32, u32)>,
}

impl Votes {
    fn new(top_k: usize) -> Self {
        Self { best: Vec::new(), top_k, candidates: Vec::new() }
    }

    /// The `top_k`-th largest similarity so far; `-∞` while there are fewer.
    fn threshold(&self) -> f32 {
        match self.best.last() {
            Some(&last) if self.best.len() == self.top_k => last,
            _ => f32::NEG_INFINITY,
        }
    }

    /// Similarities of neighbors on a line, the first of which is `patch` of `frame`.
    fn take(&mut self, similarities: &[f32], frame: usize, patch: usize) {
        let mut threshold = self.threshold();
        for (place, &similarity) in similarities.iter().enumerate() {
            // false for what is not a number
            if similarity >= threshold {
                self.candidates.push((similarity, frame as u32, (patch + place) as u32));
                if similarity > threshold {
                    let rank = self.best.partition_point(|&better| better >= similarity);
                    if self.best.len() == self.top_k {
                        self.best.pop();
                    }
                    self.best.insert(rank, similarity);
                    threshold = self.threshold();
                }
            }
        }
    }

    /// Mean of the labels of the best, ties included, weighted with `exp(similarity/τ)`.
    fn count<'l>(&self, temperature: f32, out: &mut [f32], labels: impl Fn(usize, usize) -> &'l [f32]) {
        let (threshold, mut total) = (self.threshold(), 0.0);
        let largest = self.best.first().copied().unwrap_or_default();
        for &(similarity, frame, patch) in self.candidates.iter().filter(|vote| vote.0 >= threshold) {
            // the largest is taken off first, so that no temperature overflows
            let weight = ((similarity - largest) / temperature).exp();
            total += weight;
            for (out, label) in out.iter_mut().zip(labels(frame as usize, patch as usize)) {
                *out += weight * label;
            }
        }
        if total > 0.0 {
            out.iter_mut().for_each(|label| *label /= total);
        }
    }
}

/// The order in which patches are kept: along the shorter side, so that few of a line are out of reach.
#[derive(Clone, Copy, Debug)]
struct Lines {
    /// Lines of the grid.
    count: usize,
    /// Patches of a line.
    len: usize,
    /// Lines are columns.
    columns: bool,
}

impl Lines {
    fn of(grid: PatchGrid) -> Self {
        let (height, width) = (grid.height(), grid.width());
        let columns = height < width;
        Self { count: height.max(width), len: height.min(width), columns }
    }

    /// Index, row by row, of the patch kept at `place`.
    fn patch(self, place: usize) -> usize {
        match self.columns {
            true => place % self.len * self.count + place / self.len,
            false => place,
        }
    }

    /// `[N, D]`, row by row, to unit vectors line by line.
    fn unit_features(self, tokens: &[f32], dim: usize) -> Vec<f32> {
        let mut features = vec![0.0; tokens.len()];
        features.par_chunks_mut(dim).enumerate().for_each(|(place, out)| {
            let token = &tokens[self.patch(place) * dim..][..dim];
            let length = widest!(dot(token, token)).sqrt().max(NORM_EPSILON);
            out.iter_mut().zip(token).for_each(|(out, value)| *out = value / length);
        });
        features
    }

    /// `[N, C]`, row by row, to line by line.
    fn reordered(self, values: &[f32], len: usize) -> Vec<f32> {
        (0..values.len() / len).flat_map(|place| &values[self.patch(place) * len..][..len]).copied().collect()
    }

    /// `[N, C]`, line by line, to row by row.
    fn row_by_row(self, values: &[f32], len: usize) -> Vec<f32> {
        let mut out = vec![0.0; values.len()];
        for (place, value) in values.chunks_exact(len).enumerate() {
            out[self.patch(place) * len..][..len].copy_from_slice(value);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pass_core::propagation::{self, Clip};
    use pass_core::shape::Tokens;
    use proptest::prelude::*;

    use crate::random::{Purpose, Stream};

    fn numbers(seed: u64, count: usize) -> Vec<f32> {
        let mut stream = Stream::new(seed, Purpose::Subset, &[]);
        (0..count).map(|_| stream.uniform() as f32 - 0.5).collect()
    }

    type Rule = propagation::Propagation;

    /// Labels of every frame of a clip, by this module and by the scalar twin.
    fn twins(rule: Rule, grid: (usize, usize), dim: usize, frames: &[Vec<f32>]) -> Vec<[Vec<f32>; 2]> {
        let (grid, classes) = (PatchGrid::new(grid.0, grid.1).unwrap(), 3);
        let n = grid.n_patches();
        let shape = ClipShape::new(rule, grid, dim, classes).unwrap();
        let (mut features, mut labels) = (vec![0.0; shape.features_len()], vec![0.0; shape.labels_len()]);
        let mask: Vec<f32> =
            (0..n).flat_map(|i| (0..3).map(move |c| f32::from(u8::from(i % 3 == c)))).collect();
        let tokens = |frame: usize| Tokens::new(&frames[frame], n, dim).unwrap();
        let mut clip = Clip::new(shape, &mut features, &mut labels, tokens(0), &mask).unwrap();
        let mut fast = Propagation::new(shape, &frames[0], &mask).unwrap();
        let mut scratch = vec![f32::NAN; shape.scratch_len()];
        (1..frames.len())
            .map(|frame| {
                let mut slow = vec![f32::NAN; n * classes];
                clip.set_target(tokens(frame)).unwrap();
                clip.propagate_into(0..n, &mut scratch, &mut slow).unwrap();
                clip.keep_target(&slow).unwrap();
                [fast.next(&frames[frame]).unwrap(), slow]
            })
            .collect()
    }

    fn largest_difference([fast, slow]: &[Vec<f32>; 2]) -> f32 {
        fast.iter().zip(slow).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn all_sizes_agree_with_the_scalar_twin(
            height in 1_usize..14,
            width in 1_usize..23,
            dim in 8_usize..40,
            radius in 0_usize..6,
            top_k in 1_usize..40,
            previous_frames in 0_usize..4,
        ) {
            let rule = Rule { previous_frames, radius, top_k, temperature: 0.1 };
            let frames: Vec<_> = (0..6).map(|frame| numbers(frame, height * width * dim)).collect();
            for twins in twins(rule, (height, width), dim, &frames) {
                prop_assert!(largest_difference(&twins) < 1e-4, "{}", largest_difference(&twins));
            }
        }
    }

    #[test]
    fn no_window_and_more_votes_than_patches_work() {
        let rule = Rule { radius: 0, top_k: usize::MAX, ..Rule::DAVIS };
        let frames: Vec<_> = (0..4).map(|frame| numbers(frame, 15 * 8)).collect();
        for twins in twins(rule, (3, 5), 8, &frames) {
            assert!(largest_difference(&twins) < 1e-5);
            assert!(twins[0].chunks(3).all(|labels| (labels.iter().sum::<f32>() - 1.0).abs() < 1e-5));
        }
    }

    #[test]
    fn ties_with_the_last_vote_all_count() {
        // every patch looks the same: all of the window vote, whatever top-k says
        let rule = Rule { radius: 1, top_k: 2, ..Rule::DAVIS };
        let frames = vec![vec![0.25; 24 * 8]; 3];
        for twins in twins(rule, (4, 6), 8, &frames) {
            assert!(largest_difference(&twins) < 1e-6);
        }
        // the corner of the second frame sees two patches of each row and column
        let [fast, _] = &twins(rule, (4, 6), 8, &frames)[0];
        assert_eq!(fast[..3], [0.5, 0.5, 0.0]);
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        let shape = ClipShape::new(Rule::DAVIS, PatchGrid::new(30, 52).unwrap(), 96, 2).unwrap();
        let mask: Vec<f32> =
            (0..30 * 52).flat_map(|i| if i % 5 == 0 { [0.0, 1.0] } else { [1.0, 0.0] }).collect();
        let frames: Vec<_> = (0..3).map(|frame| numbers(frame, 30 * 52 * 96)).collect();
        let run = |threads: usize| {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
                let mut clip = Propagation::new(shape, &frames[0], &mask).unwrap();
                frames[1..].iter().map(|frame| clip.next(frame).unwrap()).collect::<Vec<_>>()
            })
        };
        let one = run(1);
        assert!([2, 3, 5].into_iter().all(|threads| run(threads) == one));
    }

    #[test]
    fn frames_of_another_size_are_refused() {
        let shape = ClipShape::new(Rule::DAVIS, PatchGrid::new(2, 3).unwrap(), 4, 2).unwrap();
        assert!(Propagation::new(shape, &[0.0; 23], &[0.0; 12]).is_err());
        assert!(Propagation::new(shape, &[0.0; 24], &[0.0; 13]).is_err());
        let mut clip = Propagation::new(shape, &[0.0; 24], &[0.0; 12]).unwrap();
        assert!(clip.next(&[0.0; 25]).is_err());
        assert_eq!(clip.next(&[f32::NAN; 24]).unwrap(), [0.0; 12]);
    }
}
