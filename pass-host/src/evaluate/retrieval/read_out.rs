//! From the nearest patches of the bank to a label for every pixel.

use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use super::super::neighbors::nearest;
use super::bank::Bank;
use crate::ops::{Taps, largest_class};

/// Soft labels of patches, `[Q, C]`: cross-attention over the `k` nearest patches of the bank, with weights
/// `softmax(cosine / temperature)` and the shares of the classes as values.
///
/// - `queries`: `[Q, D]`, L2-normalized.
pub fn read_out(bank: &Bank, queries: ArrayView2<'_, f32>, k: usize, temperature: f64) -> Array2<f32> {
    let neighbors = nearest(bank.features(), queries, k);
    let classes = if bank.is_empty() { 0 } else { bank.shares(0).len() };
    let mut soft = Array2::zeros((queries.nrows(), classes));
    let rows: Vec<_> = soft.rows_mut().into_iter().zip(&neighbors).collect();
    rows.into_par_iter().for_each(|(mut row, neighbors)| {
        // the first is the most similar: no exponent is above 0
        let best = neighbors.first().map_or(0.0, |first| f64::from(first.similarity));
        let weight = |similarity: f32| ((f64::from(similarity) - best) / temperature).exp();
        let whole: f64 = neighbors.iter().map(|neighbor| weight(neighbor.similarity)).sum();
        let mut sums = vec![0.0; classes];
        for neighbor in neighbors {
            let weight = weight(neighbor.similarity) / whole;
            for (sum, &share) in sums.iter_mut().zip(bank.shares(neighbor.row)) {
                *sum += weight * f64::from(share);
            }
        }
        row.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum as f32);
    });
    soft
}

/// The class of every pixel, `[height, width]`: soft labels of a grid, enlarged bilinearly, largest wins; equal ones go to
/// the lower class.
///
/// - `soft`: `[rows · columns, C]`, C at most 255.
///
/// # Panics
/// If `soft` is empty or of another size than the grid.
pub fn enlarge(
    soft: ArrayView2<'_, f32>,
    (rows, columns): (usize, usize),
    (height, width): (usize, usize),
) -> Vec<u8> {
    let map: Vec<f32> = soft.iter().copied().collect();
    largest_class(&map, soft.ncols(), &Taps::bilinear(rows, height), &Taps::bilinear(columns, width))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::arr2;

    #[test]
    fn nearer_patches_count_more() {
        let mut bank = Bank::new(2, 2);
        bank.push(&[1.0, 0.0], &[1.0, 0.0]);
        bank.push(&[0.0, 1.0], &[0.0, 1.0]);
        bank.push(&[0.6, 0.8], &[0.5, 0.5]);
        let soft = read_out(&bank, arr2(&[[1.0, 0.0]]).view(), 2, 0.1);
        // weights of the two nearest: 1 and e^(-0.4 / 0.1)
        let e = (-4.0f64).exp();
        assert!((f64::from(soft[[0, 0]]) - (1.0 + 0.5 * e) / (1.0 + e)).abs() < 1e-6);
        assert!((soft.sum() - 1.0).abs() < 1e-6);
        assert!(soft == read_out(&bank, arr2(&[[1.0, 0.0]]).view(), 2, 0.1));
    }

    #[test]
    fn enlarging_is_bilinear_and_keeps_the_size_it_is_given() {
        let soft = arr2(&[[1.0, 0.0], [0.0, 1.0]]);
        // at width 4 the weights of the second patch are 0, 1/4, 3/4, 1
        assert_eq!(enlarge(soft.view(), (1, 2), (1, 4)), [0, 0, 1, 1]);
        assert_eq!(
            enlarge(soft.view(), (2, 1), (3, 2)),
            [0, 0, 0, 0, 1, 1],
            "an even middle goes to the lower class"
        );
        assert_eq!(enlarge(soft.view(), (1, 2), (1, 1)), [0]);
    }
}
