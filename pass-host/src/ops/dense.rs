//! The passes of a linear layer and of the exact GELU over row-major slices.

use super::buffer::build;
use super::lanes::{add_multiple, normal, widest};
use super::product::{Before, Threads, multiply};
use ndarray::{ArrayView2, ArrayViewMut2};
use rayon::prelude::*;

/// Rows of one task of the passes over rows (not of the products).
pub(super) const ROWS: usize = 32;

/// The weight of a linear layer, `[outputs, inputs]`.
#[derive(Clone, Copy)]
pub(super) struct Weight<'a> {
    values: &'a [f32],
    outputs: usize,
    inputs: usize,
}

impl<'a> Weight<'a> {
    /// # Panics
    /// If there are other than `outputs · inputs` values, or none.
    pub(super) fn new(values: &'a [f32], outputs: usize, inputs: usize) -> Self {
        assert!(values.len() == outputs * inputs && outputs * inputs > 0, "a weight of {outputs} x {inputs}");
        Self { values, outputs, inputs }
    }

    pub(super) fn outputs(&self) -> usize {
        self.outputs
    }

    fn matrix(&self) -> ArrayView2<'a, f32> {
        matrix(self.values, self.inputs)
    }

    /// `y = x Wᵀ`, or `y += x Wᵀ`; `x`: `[R, inputs]`, `y`: `[R, outputs]`.
    pub(super) fn apply(&self, x: &[f32], before: Before, y: &mut [f32]) {
        let y = matrix_mut(y, self.outputs);
        multiply(y, before, 1.0, matrix(x, self.inputs), self.matrix().t(), Threads::All);
    }

    /// `dx = scale · dy W`.
    pub(super) fn input_gradient(&self, scale: f32, dy: &[f32], dx: &mut [f32]) {
        let dx = matrix_mut(dx, self.inputs);
        multiply(dx, Before::Ignored, scale, matrix(dy, self.outputs), self.matrix(), Threads::All);
    }

    /// `dW = scale · dyᵀ x`.
    pub(super) fn gradient(&self, scale: f32, dy: &[f32], x: &[f32]) -> Vec<f32> {
        let (mut d_weight, _) = build(self.outputs * self.inputs, ROWS * self.inputs, |_, _| ());
        let (out, x) = (matrix_mut(&mut d_weight, self.inputs), matrix(x, self.inputs));
        multiply(out, Before::Ignored, scale, matrix(dy, self.outputs).t(), x, Threads::All);
        d_weight
    }
}

/// A row-major matrix over a slice.
fn matrix(values: &[f32], columns: usize) -> ArrayView2<'_, f32> {
    let rows = values.len() / columns;
    ArrayView2::from_shape((rows, columns), values).expect("whole rows")
}

/// The same, for writing.
fn matrix_mut(values: &mut [f32], columns: usize) -> ArrayViewMut2<'_, f32> {
    let rows = values.len() / columns;
    ArrayViewMut2::from_shape((rows, columns), values).expect("whole rows")
}

/// The factor of a row; 1 without factors.
#[inline(always)]
fn factor(scale: Option<&[f32]>, row: usize) -> f32 {
    match scale {
        Some(scale) => scale[row],
        None => 1.0,
    }
}

/// `rows` rows, each `bias`.
pub(super) fn repeated(bias: &[f32], rows: usize) -> Vec<f32> {
    let columns = bias.len();
    build(rows * columns, ROWS * columns, |_, part| {
        part.chunks_exact_mut(columns).for_each(|row| row.copy_from_slice(bias));
    })
    .0
}

/// `x + scale · bias`: where the product of a residual branch is added; `scale`: one factor per row.
pub(super) fn residual(x: &[f32], bias: &[f32], scale: Option<&[f32]>) -> Vec<f32> {
    let columns = bias.len();
    build(x.len(), ROWS * columns, |part, out| {
        let x = &x[part * ROWS * columns..][..out.len()];
        widest!({
            for (i, (out, x)) in out.chunks_exact_mut(columns).zip(x.chunks_exact(columns)).enumerate() {
                let factor = factor(scale, part * ROWS + i);
                for ((out, &x), &bias) in out.iter_mut().zip(x).zip(bias) {
                    *out = factor.mul_add(bias, x);
                }
            }
        });
    })
    .0
}

/// Multiplies every row with its factor.
pub(super) fn scale_rows(values: &mut [f32], columns: usize, scale: Option<&[f32]>) {
    if scale.is_none() {
        return;
    }
    values.par_chunks_mut(ROWS * columns).enumerate().for_each(|(part, values)| {
        widest!({
            for (i, row) in values.chunks_exact_mut(columns).enumerate() {
                let factor = factor(scale, part * ROWS + i);
                row.iter_mut().for_each(
                    #[inline(always)]
                    |value| *value *= factor,
                );
            }
        });
    });
}

/// `u -> scale · GELU(u)` in place.
pub(super) fn gelu(u: &mut [f32], columns: usize, scale: Option<&[f32]>) {
    u.par_chunks_mut(ROWS * columns).enumerate().for_each(|(part, u)| {
        widest!({
            for (i, u) in u.chunks_exact_mut(columns).enumerate() {
                let factor = factor(scale, part * ROWS + i);
                for u in u.iter_mut() {
                    *u *= normal(*u).0 * factor;
                }
            }
        });
    });
}

/// `out = scale · GELU(u)`.
pub(super) fn gelu_into(u: &[f32], columns: usize, scale: Option<&[f32]>, out: &mut [f32]) {
    let part = ROWS * columns;
    out.par_chunks_mut(part).zip(u.par_chunks(part)).enumerate().for_each(|(part, (out, u))| {
        widest!({
            for (i, (out, u)) in out.chunks_exact_mut(columns).zip(u.chunks_exact(columns)).enumerate() {
                let factor = factor(scale, part * ROWS + i);
                for (out, &u) in out.iter_mut().zip(u) {
                    *out = u * (normal(u).0 * factor);
                }
            }
        });
    });
}

/// 1 / √(2π).
pub(super) const INVERSE_SQRT_TAU: f32 = 0.398_942_3;

/// Backward pass of [`gelu`], which also gives its result again: `d` becomes the gradient of `u`, `u` becomes
/// `scale · GELU(u)`.
pub(super) fn gelu_backward(u: &mut [f32], d: &mut [f32], columns: usize, scale: Option<&[f32]>) {
    let part = ROWS * columns;
    u.par_chunks_mut(part).zip(d.par_chunks_mut(part)).enumerate().for_each(|(part, (u, d))| {
        widest!({
            for (i, (u, d)) in u.chunks_exact_mut(columns).zip(d.chunks_exact_mut(columns)).enumerate() {
                let factor = factor(scale, part * ROWS + i);
                for (u, d) in u.iter_mut().zip(d) {
                    let (phi, density) = normal(*u);
                    *d *= factor * (*u * INVERSE_SQRT_TAU).mul_add(density, phi);
                    *u *= phi * factor;
                }
            }
        });
    });
}

/// Rows that one task adds up.
const SUMMED_ROWS: usize = 128;

/// `Σ_rows scale · row` of a row-major matrix: parts of rows in parallel, then the parts in order.
pub(super) fn column_sums(values: &[f32], columns: usize, scale: Option<&[f32]>) -> Vec<f32> {
    let rows = values.len() / columns;
    let parts = rows.div_ceil(SUMMED_ROWS);
    let (shares, _) = build(parts * columns, columns, |part, share| {
        let first = part * SUMMED_ROWS * columns;
        let rows = &values[first..(first + SUMMED_ROWS * columns).min(values.len())];
        widest!({
            for (i, row) in rows.chunks_exact(columns).enumerate() {
                add_multiple(share, factor(scale, part * SUMMED_ROWS + i), row);
            }
        });
    });
    let mut total = vec![0.0; columns];
    for share in shares.chunks_exact(columns) {
        widest!(add_multiple(&mut total, 1.0, share));
    }
    total
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    fn double(values: &[f32]) -> Vec<f64> {
        values.iter().map(|&v| f64::from(v)).collect()
    }

    #[test]
    fn the_gelu_in_place_and_its_backward_pass_agree() {
        let (rows, columns) = (70, 33);
        let (u, d) = (numbers(1, rows * columns), numbers(2, rows * columns));
        let scale: Vec<f32> = (0..rows).map(|row| (row % 3) as f32).collect();
        for scale in [None, Some(&scale[..])] {
            let mut in_place = u.clone();
            gelu(&mut in_place, columns, scale);
            let mut into = vec![0.0; u.len()];
            gelu_into(&u, columns, scale, &mut into);
            let (mut again, mut gradient) = (u.clone(), d.clone());
            gelu_backward(&mut again, &mut gradient, columns, scale);
            assert_close("in place", &double(&in_place), &double(&into), 1e-7);
            assert_close("in the backward pass", &double(&again), &double(&into), 1e-7);
            let shifted = |by: f32| {
                let mut moved: Vec<f32> = u.iter().map(|u| u + by).collect();
                gelu(&mut moved, columns, scale);
                moved
            };
            let (up, down) = (shifted(1e-2), shifted(-1e-2));
            let slopes: Vec<f64> =
                (0..u.len()).map(|i| f64::from(d[i]) * f64::from(up[i] - down[i]) / 2e-2).collect();
            assert_close("gradient", &double(&gradient), &slopes, 1e-3);
        }
    }

    #[test]
    fn rows_are_summed_and_scaled() {
        let (rows, columns) = (300, 5);
        let values = numbers(1, rows * columns);
        let scale: Vec<f32> = (0..rows).map(|row| row as f32 / 100.0).collect();
        let mut scaled = values.clone();
        scale_rows(&mut scaled, columns, Some(&scale));
        let sums = column_sums(&values, columns, Some(&scale));
        assert_close("sums", &double(&sums), &double(&column_sums(&scaled, columns, None)), 1e-5);
        let plain: f64 = (0..rows).map(|row| f64::from(values[row * columns + 2] * scale[row])).sum();
        assert!((f64::from(sums[2]) - plain).abs() < 1e-3);
        let start = residual(&values, &[1.0, 2.0, 3.0, 4.0, 5.0], Some(&scale));
        assert!((start[7 * columns + 4] - (values[7 * columns + 4] + 0.35)).abs() < 1e-6);
        assert_eq!(repeated(&[1.0, 2.0], 2), [1.0, 2.0, 1.0, 2.0]);
    }
}
