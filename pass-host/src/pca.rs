//! Principal components of patch features.

use ndarray::{Array1, Array2, ArrayView2};

use crate::random::{Purpose, Stream};

/// Directions carried beside the wanted ones: the more, the faster close ones come apart.
const GUARD: usize = 8;
/// Most passes; a spectrum so flat that they do not suffice has no direction that means anything.
const PASSES: usize = 500;
/// A direction is found when `|C v - λ v|` is below this share of the largest variance.
const TOLERANCE: f64 = 1e-10;
/// Sweeps of the Jacobi method: it converges quadratically, a matrix of 11 needs about 6.
const SWEEPS: usize = 30;

/// Mean and first directions of a cloud of features.
#[derive(Clone, Debug, PartialEq)]
pub struct PrincipalComponents {
    /// `[D]`.
    pub mean: Array1<f32>,
    /// `[components, D]`: unit length, by falling variance, largest entry positive; arbitrary where no variance is left.
    pub directions: Array2<f32>,
}

impl PrincipalComponents {
    /// Of the rows of all `blocks` `[.., D]` together, by subspace iteration on the covariance in double precision. The
    /// result depends on nothing but the numbers.
    ///
    /// # Panics
    /// When the blocks differ in D.
    pub fn of(blocks: &[ArrayView2<'_, f32>], components: usize) -> Self {
        let dim = blocks.first().map_or(0, |block| block.ncols());
        let count = blocks.iter().map(|block| block.nrows()).sum::<usize>().max(1) as f64;
        let mut mean = Array1::<f64>::zeros(dim);
        for row in blocks.iter().flat_map(|block| block.rows()) {
            mean.zip_mut_with(&row, |sum, x| *sum += f64::from(*x));
        }
        mean /= count;
        let mut covariance = Array2::<f64>::zeros((dim, dim));
        for block in blocks {
            let centered = block.mapv(f64::from) - &mean;
            covariance += &centered.t().dot(&centered);
        }
        covariance /= count;
        let mut directions = Array2::zeros((components, dim));
        for (mut row, direction) in
            directions.rows_mut().into_iter().zip(leading(&covariance, components).rows())
        {
            let largest =
                direction.iter().fold(0.0_f64, |most, v| if v.abs() > most.abs() { *v } else { most });
            row.assign(&direction.mapv(|v| (v * largest.signum()) as f32));
        }
        Self { mean: mean.mapv(|v| v as f32), directions }
    }

    /// Coordinates `[.., components]` of features `[.., D]`.
    pub fn project(&self, features: ArrayView2<'_, f32>) -> Array2<f32> {
        (&features - &self.mean).dot(&self.directions.t())
    }
}

/// The first `components` eigenvectors `[components, D]` of a symmetric matrix without negative eigenvalues.
fn leading(matrix: &Array2<f64>, components: usize) -> Array2<f64> {
    let dim = matrix.nrows();
    let components = components.min(dim);
    let width = (components + GUARD).min(dim);
    let mut stream = Stream::new(0, Purpose::Init, &[dim as u64]);
    let mut basis = Array2::from_shape_simple_fn((width, dim), || stream.range(-1.0, 1.0));
    orthonormalize(&mut basis);
    for _ in 0..PASSES {
        let image = basis.dot(matrix);
        let (values, vectors) = eigen(&image.dot(&basis.t()));
        let residual =
            vectors.dot(&image) - &(vectors.dot(&basis) * values.view().insert_axis(ndarray::Axis(1)));
        let limit = TOLERANCE * values.first().copied().unwrap_or(0.0);
        let found = residual.rows().into_iter().take(components).all(|row| row.dot(&row).sqrt() <= limit);
        basis = if found { vectors.dot(&basis) } else { vectors.dot(&image) };
        if found {
            break;
        }
        orthonormalize(&mut basis);
    }
    basis.slice_move(ndarray::s![..components, ..])
}

/// Gram-Schmidt over the rows, twice for the sake of rounding; a row without anything of its own becomes zero.
fn orthonormalize(rows: &mut Array2<f64>) {
    let largest = rows.rows().into_iter().map(|row| row.dot(&row).sqrt()).fold(0.0, f64::max);
    for index in 0..rows.nrows() {
        let (earlier, mut later) = rows.view_mut().split_at(ndarray::Axis(0), index);
        let mut row = later.row_mut(0);
        for _ in 0..2 {
            for other in earlier.rows() {
                let share = other.dot(&row);
                row.scaled_add(-share, &other);
            }
        }
        let norm = row.dot(&row).sqrt();
        let factor = if norm > 1e-13 * largest { norm.recip() } else { 0.0 };
        row *= factor;
    }
}

/// All eigenvalues, falling, and eigenvectors (rows) of a symmetric matrix, by cyclic Jacobi rotations.
pub(crate) fn eigen(matrix: &Array2<f64>) -> (Array1<f64>, Array2<f64>) {
    let n = matrix.nrows();
    let (mut a, mut vectors) = (matrix.clone(), Array2::<f64>::eye(n));
    for _ in 0..SWEEPS {
        let outside: f64 = a.indexed_iter().filter(|((i, j), _)| i != j).map(|(_, v)| v * v).sum();
        if outside <= f64::EPSILON.powi(2) * a.diag().dot(&a.diag()) {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                if a[(p, q)] == 0.0 {
                    continue;
                }
                let theta = (a[(q, q)] - a[(p, p)]) / (2.0 * a[(p, q)]);
                let tangent = theta.signum() / (theta.abs() + theta.hypot(1.0));
                let cosine = tangent.hypot(1.0).recip();
                let sine = tangent * cosine;
                for k in 0..n {
                    let (x, y) = (a[(k, p)], a[(k, q)]);
                    (a[(k, p)], a[(k, q)]) = (cosine * x - sine * y, sine * x + cosine * y);
                }
                for k in 0..n {
                    let (x, y) = (a[(p, k)], a[(q, k)]);
                    (a[(p, k)], a[(q, k)]) = (cosine * x - sine * y, sine * x + cosine * y);
                    let (x, y) = (vectors[(p, k)], vectors[(q, k)]);
                    (vectors[(p, k)], vectors[(q, k)]) = (cosine * x - sine * y, sine * x + cosine * y);
                }
            }
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|i, j| a[(*j, *j)].total_cmp(&a[(*i, *i)]));
    (order.iter().map(|i| a[(*i, *i)]).collect(), vectors.select(ndarray::Axis(0), &order))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cloud whose directions have close variances, `[rows, dim]`.
    fn cloud(rows: usize, dim: usize, seed: u64) -> Array2<f32> {
        let mut stream = Stream::new(seed, Purpose::Subset, &[]);
        let mixing = Array2::from_shape_simple_fn((dim, dim), || stream.range(-1.0, 1.0));
        let spread =
            Array2::from_shape_fn((rows, dim), |(_, d)| stream.range(-1.0, 1.0) / (1.0 + 0.1 * d as f64));
        (spread.dot(&mixing) + 3.0).mapv(|x| x as f32)
    }

    #[test]
    fn joint_components_equal_the_full_decomposition() {
        let (a, b) = (cloud(90, 24, 1), cloud(50, 24, 2));
        let found = PrincipalComponents::of(&[a.view(), b.view()], 3);
        let all = ndarray::concatenate![ndarray::Axis(0), a, b].mapv(f64::from);
        let mean = all.mean_axis(ndarray::Axis(0)).unwrap();
        let centered = all - &mean;
        let covariance = centered.t().dot(&centered) / 140.0;
        let (values, vectors) = eigen(&covariance);
        for component in 0..3 {
            let vector = vectors.row(component);
            let gap = covariance.dot(&vector) - &vector * values[component];
            assert!(gap.dot(&gap).sqrt() < 1e-10 * values[0], "the reference itself");
            let direction = found.directions.row(component).mapv(f64::from);
            assert!((direction.dot(&vector).abs() - 1.0).abs() < 1e-6, "component {component}");
            let largest = direction.iter().copied().max_by(|x, y| x.abs().total_cmp(&y.abs())).unwrap();
            assert!(largest > 0.0);
        }
        let projected = found.project(a.view());
        let expected = (&a.row(7) - &found.mean).dot(&found.directions.row(2));
        assert!((projected[(7, 2)] - expected).abs() < 1e-4);
    }

    #[test]
    fn the_long_axis_of_a_cloud_comes_first() {
        let cloud = Array2::from_shape_fn((64, 3), |(row, column)| {
            let t = row as f32 / 64.0 - 0.5;
            [5.0 + 4.0 * t, 1.0 + (row % 7) as f32 * 0.1, -4.0 * t][column]
        });
        let PrincipalComponents { mean, directions } = PrincipalComponents::of(&[cloud.view()], 2);
        assert!((mean[1] - 1.298).abs() < 0.02, "{mean}");
        let half = 0.5_f32.sqrt();
        assert!(
            (directions[(0, 0)].abs() - half).abs() < 0.01 && (directions[(0, 2)].abs() - half).abs() < 0.01
        );
        assert!((directions.row(0).dot(&directions.row(1))).abs() < 1e-5 && directions[(1, 1)] > 0.99);
    }

    #[test]
    fn clouds_without_extent_have_no_directions() {
        let point = Array2::from_elem((5, 4), 2.5_f32);
        let found = PrincipalComponents::of(&[point.view()], 3);
        assert!(found.project(point.view()).iter().all(|x| x.abs() < 1e-6));
        let narrow = PrincipalComponents::of(&[Array2::from_elem((1, 2), 1.0_f32).view()], 3);
        assert_eq!(narrow.directions.dim(), (3, 2));
        assert_eq!(PrincipalComponents::of(&[], 3).mean.len(), 0);
    }
}
