//! Matrix products over strided views: the one place that calls the `gemm` crate.
#![expect(
    unsafe_code,
    reason = "gemm takes raw pointers; shapes and bounds are proved here from array views"
)]

use ndarray::{ArrayView2, ArrayViewMut2};

/// How many threads one product may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Threads {
    /// The calling thread: inside a task that is already one of many.
    One,
    /// All of the current rayon pool.
    All,
}

/// What the product does with the values already in its destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Before {
    /// They are overwritten.
    Ignored,
    /// The product is added to them.
    Kept,
}

/// `out = scale · a · b` (or `out += …`), `a: [m, k]`, `b: [k, n]`, `out: [m, n]`, any strides.
///
/// Every element is summed over `k` in an order that depends on the three sizes only, so the bits do not depend on
/// the number of threads.
///
/// # Panics
/// If the shapes do not fit each other.
pub(crate) fn multiply(
    mut out: ArrayViewMut2<'_, f32>,
    before: Before,
    scale: f32,
    a: ArrayView2<'_, f32>,
    b: ArrayView2<'_, f32>,
    threads: Threads,
) {
    let ((m, k), n) = (a.dim(), b.ncols());
    assert_eq!(b.nrows(), k, "inner sizes of a product");
    assert_eq!(out.dim(), (m, n), "destination of a product");
    let parallelism = match threads {
        Threads::One => gemm::Parallelism::None,
        Threads::All => gemm::Parallelism::Rayon(rayon::current_num_threads()),
    };
    let [out_rows, out_columns] = [out.strides()[0], out.strides()[1]];
    // SAFETY: each view guarantees that every index below its shape, times its strides, stays inside a live
    // allocation; the shapes were compared above; `out` is an exclusive borrow, so it overlaps neither input.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            out_columns,
            out_rows,
            before == Before::Kept,
            a.as_ptr(),
            a.strides()[1],
            a.strides()[0],
            b.as_ptr(),
            b.strides()[1],
            b.strides()[0],
            1.0,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{numbers, with_threads};
    use super::*;
    use ndarray::{Array2, s};

    fn plain(a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>) -> Array2<f32> {
        Array2::from_shape_fn((a.nrows(), b.ncols()), |(i, j)| {
            (0..a.ncols()).map(|k| f64::from(a[[i, k]]) * f64::from(b[[k, j]])).sum::<f64>() as f32
        })
    }

    #[test]
    fn strided_transposed_and_accumulated_products_match_the_definition() {
        for (m, k, n) in [(1, 1, 1), (3, 5, 2), (17, 64, 33), (1, 70, 31), (65, 1, 16), (196, 64, 196)] {
            let a = Array2::from_shape_vec((m, 2 * k), numbers(1, 2 * m * k)).unwrap();
            let b = Array2::from_shape_vec((n, k), numbers(2, n * k)).unwrap();
            let mut out = Array2::<f32>::ones((m, 2 * n));
            let (a, b) = (a.slice(s![.., k..]), b.t());
            multiply(out.slice_mut(s![.., n..]), Before::Kept, 0.5, a, b, Threads::One);
            let expected = plain(a, b);
            for ((i, j), &value) in expected.indexed_iter() {
                let found = out[[i, n + j]];
                assert!((found - (1.0 + 0.5 * value)).abs() < 1e-4, "{m}x{k}x{n} [{i}, {j}]: {found}");
                assert_eq!(out[[i, j]], 1.0, "written outside the destination");
            }
        }
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        for (m, k, n) in
            [(1568, 192, 768), (333, 2048, 517), (192, 1568, 192), (256, 1856, 2048), (37, 768, 4096)]
        {
            let a = Array2::from_shape_vec((m, k), numbers(3, m * k)).unwrap();
            let b = Array2::from_shape_vec((n, k), numbers(4, n * k)).unwrap();
            let run = |threads| {
                with_threads(threads, || {
                    let mut out = Array2::<f32>::zeros((m, n));
                    multiply(out.view_mut(), Before::Ignored, 1.0, a.view(), b.t(), Threads::All);
                    out
                })
            };
            let one = run(1);
            for threads in [2, 3, 5] {
                assert!(one == run(threads), "{m}x{k}x{n} on {threads} threads");
            }
        }
    }
}
