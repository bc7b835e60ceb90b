//! The most similar rows of a bank, by comparing with every row: block by block, on all cores, without ever holding all
//! similarities.

use ndarray::{Array2, ArrayView2, Axis, s};
use rayon::prelude::*;

use crate::ops::product::{Before, Threads, multiply};

/// Queries of one task.
const QUERIES: usize = 64;
/// Most rows of the bank that are compared at once: with [`QUERIES`] rows the similarities stay in the cache.
const ROWS: usize = 1024;
/// Similarities that are looked at together: one comparison tells that none of them can matter.
const SCAN: usize = 16;

/// A row of the bank and how similar it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Neighbor {
    /// The row.
    pub row: usize,
    /// Its dot product with the query: the cosine, where both are L2-normalized.
    pub similarity: f32,
}

/// The `k` rows of `bank` (`[M, D]`) with the largest dot products for each of `queries` (`[Q, D]`), most similar first;
/// equal similarities keep the lower row. `k` is at most `M` here: fewer rows than asked for are all returned.
///
/// The result does not depend on the number of threads. Memory: `64 · 1024` similarities a thread.
///
/// # Panics
/// If the widths differ.
pub fn nearest(bank: ArrayView2<'_, f32>, queries: ArrayView2<'_, f32>, k: usize) -> Vec<Vec<Neighbor>> {
    assert_eq!(bank.ncols(), queries.ncols(), "width of bank and queries");
    let k = k.min(bank.nrows());
    if k == 0 {
        return vec![Vec::new(); queries.nrows()];
    }
    // equal parts: no small rest, for which the product might sum in another order
    let parts = bank.nrows().div_ceil(ROWS);
    let rows = bank.nrows().div_ceil(parts);
    let blocks: Vec<_> = queries.axis_chunks_iter(Axis(0), QUERIES).collect();
    let search = |queries: ArrayView2<'_, f32>| {
        let mut best: Vec<Best> = (0..queries.nrows()).map(|_| Best::new(k)).collect();
        let mut similarities = Array2::<f32>::zeros((queries.nrows(), rows));
        for (part, bank) in bank.axis_chunks_iter(Axis(0), rows).enumerate() {
            let mut out = similarities.slice_mut(s![.., ..bank.nrows()]);
            multiply(out.view_mut(), Before::Ignored, 1.0, queries, bank.t(), Threads::One);
            for (best, row) in best.iter_mut().zip(out.rows()) {
                // a row of a standard layout is one slice
                best.offer(part * rows, row.as_slice().unwrap_or(&[]));
            }
        }
        best.into_iter().map(|best| best.found).collect::<Vec<_>>()
    };
    blocks.into_par_iter().flat_map_iter(search).collect()
}

/// The best of what was seen so far, most similar first.
struct Best {
    k: usize,
    found: Vec<Neighbor>,
    /// A similarity must be above this to matter.
    bar: f32,
}

impl Best {
    fn new(k: usize) -> Self {
        Self { k, found: Vec::with_capacity(k + 1), bar: f32::NEG_INFINITY }
    }

    /// Looks at rows `first..` of the bank, which come after all rows seen before.
    fn offer(&mut self, first: usize, similarities: &[f32]) {
        for (chunk, values) in similarities.chunks(SCAN).enumerate() {
            if !values.iter().fold(false, |any, &value| any | (value > self.bar)) {
                continue;
            }
            for (i, &similarity) in values.iter().enumerate() {
                if similarity > self.bar {
                    self.insert(Neighbor { row: first + chunk * SCAN + i, similarity });
                }
            }
        }
    }

    fn insert(&mut self, neighbor: Neighbor) {
        let place = self.found.partition_point(|known| known.similarity >= neighbor.similarity);
        self.found.insert(place, neighbor);
        self.found.truncate(self.k);
        if let (true, Some(last)) = (self.found.len() == self.k, self.found.last()) {
            self.bar = last.similarity;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Purpose, Stream};

    fn random(seed: u64, rows: usize, dim: usize) -> Array2<f32> {
        let mut stream = Stream::new(seed, Purpose::Init, &[]);
        Array2::from_shape_fn((rows, dim), |_| stream.normal() as f32)
    }

    /// The definition: all similarities in f64, sorted.
    fn plain(bank: &Array2<f32>, queries: &Array2<f32>, k: usize) -> Vec<Vec<(usize, f64)>> {
        let dot = |a: ndarray::ArrayView1<'_, f32>, b: ndarray::ArrayView1<'_, f32>| {
            a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>()
        };
        let sorted = |query: ndarray::ArrayView1<'_, f32>| {
            let mut all: Vec<_> = bank.rows().into_iter().map(|row| dot(row, query)).enumerate().collect();
            all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            all.truncate(k);
            all
        };
        queries.rows().into_iter().map(sorted).collect()
    }

    #[test]
    fn the_nearest_are_those_of_the_definition() {
        for (bank, queries, dim, k) in
            [(1, 1, 3, 5), (7, 70, 16, 7), (2500, 65, 8, 30), (1025, 3, 33, 1), (40, 2, 5, 0)]
        {
            let (bank, queries) = (random(1, bank, dim), random(2, queries, dim));
            let found = nearest(bank.view(), queries.view(), k);
            let expected = plain(&bank, &queries, k);
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(&expected) {
                assert_eq!(found.len(), expected.len());
                for (found, &(row, similarity)) in found.iter().zip(expected) {
                    assert_eq!(found.row, row);
                    assert!((f64::from(found.similarity) - similarity).abs() < 1e-5);
                }
            }
        }
    }

    #[test]
    fn equal_rows_come_in_their_order_also_across_blocks() {
        let (distinct, copies) = (701, 4);
        let base = random(3, distinct, 48);
        let bank = Array2::from_shape_fn((distinct * copies, 48), |(row, i)| base[[row % distinct, i]]);
        let queries = random(4, 80, 48);
        for (neighbors, singles) in
            nearest(bank.view(), queries.view(), 20).iter().zip(nearest(base.view(), queries.view(), 5))
        {
            let rows: Vec<usize> = neighbors.iter().map(|neighbor| neighbor.row).collect();
            let expected: Vec<usize> =
                singles.iter().flat_map(|one| (0..copies).map(|copy| copy * distinct + one.row)).collect();
            assert_eq!(rows, expected);
        }
    }

    #[test]
    fn the_result_does_not_depend_on_the_number_of_threads() {
        let (bank, queries) = (random(5, 3000, 24), random(6, 300, 24));
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| nearest(bank.view(), queries.view(), 11))
        };
        let one = run(1);
        assert!(one == run(2) && one == run(5));
    }
}
