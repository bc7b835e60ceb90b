//! Finding and aggregating positives on grids of 14², 28² and 56² patches: the throughput in patches stays the same,
//! since the cost is linear in their number. Beside it the textbook's way, all similarities of all patches of which a mask
//! leaves the neighbors, whose cost is quadratic.
//!
//! `cargo bench -p pass-core`, and with `--features matrixmultiply`.

use std::hint::black_box;

use divan::Bencher;
use divan::counter::ItemsCount;
use ndarray::{Array2, ArrayView2};
use pass_core::aggregation::AggregationHead;
use pass_core::class_attention::{ClassAttention, ClassAttentionParameters};
use pass_core::layers::LayerNorm;
use pass_core::matching::{Matches, match_into, match_scratch_len};
use pass_core::neighborhood::{Border, Neighborhood, Window};
use pass_core::shape::{PatchGrid, Tokens};

const K: usize = 4;
const SIDES: [usize; 3] = [14, 28, 56];

fn main() {
    check_against_exhaustive_search();
    divan::main();
}

/// Matching of ViT-S features.
#[divan::bench(args = SIDES)]
fn matching(bencher: Bencher<'_, '_>, side: usize) {
    let features = numbers(side * side * 384);
    let mut job = Matching::new(side);
    bencher.counter(ItemsCount::new(side * side)).bench_local(|| job.run(black_box(&features), 384));
}

/// The same by the matrix of all similarities.
#[divan::bench(args = SIDES, sample_count = 5)]
fn matching_all_pairs(bencher: Bencher<'_, '_>, side: usize) {
    let features = numbers(side * side * 384);
    let mask = mask(&Matching::new(side).neighborhood);
    bencher.counter(ItemsCount::new(side * side)).bench_local(|| all_pairs(black_box(&features), 384, &mask));
}

/// Aggregation of ViT-Ti features: two blocks over all patches and every positive set.
#[divan::bench(args = SIDES, sample_count = 5)]
fn aggregation(bencher: Bencher<'_, '_>, side: usize) {
    const DIM: usize = 192;
    let n = side * side;
    let features = numbers(n * DIM);
    let mut job = Matching::new(side);
    job.run(&features, DIM);
    let weights = [(); 2].map(|()| {
        ClassAttentionParameters::from_fn(|name| {
            let mut values = numbers(ClassAttentionParameters::<()>::len_of(name, DIM, 4 * DIM));
            values.iter_mut().for_each(|value| *value *= 0.05);
            values
        })
    });
    let block = |weights| ClassAttention::new(weights, 3).expect("a block");
    let blocks = weights.each_ref().map(|weights| block(weights.as_ref().map(Vec::as_slice)));
    let (class, ones, zeros) = (numbers(DIM), vec![1.0; DIM], vec![0.0; DIM]);
    let norm = LayerNorm::new(&ones, &zeros).expect("a norm");
    let head = AggregationHead::new(&class, &blocks, norm).expect("a head");
    let matches = Matches::new(&job.matches, n, K).expect("matches");
    let mut scratch = vec![0.0; head.scratch_len(n)];
    let mut out = vec![0.0; (n + 1) * DIM];
    bencher.counter(ItemsCount::new(n)).bench_local(|| {
        let tokens = Tokens::new(black_box(&features), n, DIM).expect("tokens");
        head.aggregate_into(tokens, matches, &mut scratch, &mut out).expect("targets");
    });
}

struct Matching {
    neighborhood: Neighborhood,
    scratch: Vec<f32>,
    matches: Vec<u32>,
}

impl Matching {
    fn new(side: usize) -> Self {
        let grid = PatchGrid::new(side, side).expect("a grid");
        let neighborhood = Neighborhood::new(grid, Window::Side(3), Border::Wrap).expect("a window");
        let scratch = vec![0.0; match_scratch_len(&neighborhood)];
        Self { neighborhood, scratch, matches: vec![0; grid.n_patches() * K] }
    }

    fn run(&mut self, features: &[f32], dim: usize) {
        let tokens = Tokens::new(features, self.neighborhood.grid().n_patches(), dim).expect("tokens");
        match_into(tokens, &self.neighborhood, K, &mut self.scratch, &mut self.matches).expect("matches");
    }
}

/// 0 where a column is a neighbor of its row, `-inf` everywhere else.
fn mask(neighborhood: &Neighborhood) -> Array2<f32> {
    let n = neighborhood.grid().n_patches();
    let mut mask = Array2::from_elem((n, n), f32::NEG_INFINITY);
    for patch in 0..n {
        neighborhood.candidates(patch).for_each(|candidate| mask[[patch, candidate]] = 0.0);
    }
    mask
}

/// Positives `[N, K]` by one product of all normalized features with each other, a mask, and the `K` largest of each row.
fn all_pairs(features: &[f32], dim: usize, mask: &Array2<f32>) -> Vec<u32> {
    let mut unit = ArrayView2::from_shape((mask.nrows(), dim), features).expect("features").to_owned();
    for mut row in unit.rows_mut() {
        let norm = row.dot(&row).sqrt();
        row /= norm;
    }
    let similarities = unit.dot(&unit.t()) + mask;
    let best = similarities.rows().into_iter().flat_map(|row| {
        // the K best so far, best first
        let mut best = [(f32::NEG_INFINITY, u32::MAX); K];
        for (column, &similarity) in row.iter().enumerate() {
            if similarity > best[K - 1].0 {
                let place = best.partition_point(|&(better, _)| better >= similarity);
                best[place..].rotate_right(1);
                best[place] = (similarity, column as u32);
            }
        }
        best.map(|(_, column)| column)
    });
    best.collect()
}

/// Nothing is timed before it agrees with a search that computes every similarity of every patch.
fn check_against_exhaustive_search() {
    let (side, dim) = (14, 384);
    let features = numbers(side * side * dim);
    let mut job = Matching::new(side);
    job.run(&features, dim);
    assert_eq!(job.matches, all_pairs(&features, dim, &mask(&job.neighborhood)), "all pairs, masked");
    let token = |patch: usize| features[patch * dim..(patch + 1) * dim].iter().map(|&value| f64::from(value));
    let cosine = |a: usize, b: usize| {
        let norm = |patch: usize| token(patch).map(|value| value * value).sum::<f64>().sqrt();
        token(a).zip(token(b)).map(|(a, b)| a * b).sum::<f64>() / (norm(a) * norm(b))
    };
    for patch in 0..side * side {
        let mut best: Vec<usize> = job.neighborhood.candidates(patch).collect();
        best.sort_by(|&a, &b| cosine(patch, b).total_cmp(&cosine(patch, a)));
        let found = &job.matches[patch * K..(patch + 1) * K];
        let gap = cosine(patch, best[K - 1]) - cosine(patch, best[K]);
        assert!(
            gap < 1e-6 || best[..K].iter().all(|&index| found.contains(&(index as u32))),
            "patch {patch}"
        );
    }
}

/// Numbers in `[-1, 1)` from a linear congruential sequence.
fn numbers(len: usize) -> Vec<f32> {
    let mut state = len as u32;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 8_388_608.0 - 1.0
        })
        .collect()
}
