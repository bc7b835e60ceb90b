//! Softmax attention of one head over strided views: the core of self-attention and class attention.
//!
//! The probabilities are not kept for the backward pass: one more product per head costs less than writing and reading
//! `N²` numbers, and memory stays bounded by [`QUERIES`] rows per thread whatever the image size.

use super::lanes::{dot, softmax, widest};
use super::product::{Before, Threads, multiply};
use ndarray::{ArrayView2, ArrayViewMut, ArrayViewMut2, Axis, RemoveAxis, s};

/// Queries whose scores are held at once.
const QUERIES: usize = 256;

/// What a head reads.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a> {
    /// `[M, d]`
    pub q: ArrayView2<'a, f32>,
    /// `[T, d]`
    pub k: ArrayView2<'a, f32>,
    /// `[T, d]`
    pub v: ArrayView2<'a, f32>,
}

impl Inputs<'_> {
    /// `d^-½`.
    fn scale(&self) -> f32 {
        1.0 / (self.q.ncols() as f32).sqrt()
    }

    /// Probabilities of the queries `from..to` over all tokens, into the front of `scratch`.
    fn probabilities(&self, from: usize, to: usize, scratch: &mut [f32]) {
        let tokens = self.k.nrows();
        let mut scores = view(scratch, to - from, tokens);
        let q = self.q.slice(s![from..to, ..]);
        multiply(scores.view_mut(), Before::Ignored, self.scale(), q, self.k.t(), Threads::One);
        widest!({
            for row in scratch[..(to - from) * tokens].chunks_exact_mut(tokens) {
                softmax(row);
            }
        });
    }
}

/// Matrix over the front of a slice.
fn view(values: &mut [f32], rows: usize, columns: usize) -> ArrayViewMut2<'_, f32> {
    ArrayViewMut2::from_shape((rows, columns), &mut values[..rows * columns])
        .expect("a slice of rows · columns values is such a matrix")
}

/// `out = softmax(q kᵀ d^-½) v`, `out: [M, d]`.
pub(super) fn attend(inputs: Inputs<'_>, mut out: ArrayViewMut2<'_, f32>) {
    let (queries, tokens) = (inputs.q.nrows(), inputs.k.nrows());
    let mut scratch = vec![0.0; queries.min(QUERIES) * tokens];
    for from in (0..queries).step_by(QUERIES) {
        let to = (from + QUERIES).min(queries);
        inputs.probabilities(from, to, &mut scratch);
        let p = view(&mut scratch, to - from, tokens);
        multiply(out.slice_mut(s![from..to, ..]), Before::Ignored, 1.0, p.view(), inputs.v, Threads::One);
    }
}

/// Where the gradients of a head go; all are overwritten.
pub(super) struct Gradients<'a> {
    /// `[M, d]`
    pub q: ArrayViewMut2<'a, f32>,
    /// `[T, d]`
    pub k: ArrayViewMut2<'a, f32>,
    /// `[T, d]`
    pub v: ArrayViewMut2<'a, f32>,
}

/// The gradients of [`attend`] for a gradient `d_out` of its result.
pub(super) fn attend_backward(inputs: Inputs<'_>, d_out: ArrayView2<'_, f32>, mut gradients: Gradients<'_>) {
    let (queries, tokens) = (inputs.q.nrows(), inputs.k.nrows());
    let rows = queries.min(QUERIES);
    let (mut p_scratch, mut d_scratch) = (vec![0.0; rows * tokens], vec![0.0; rows * tokens]);
    for from in (0..queries).step_by(QUERIES) {
        let to = (from + QUERIES).min(queries);
        let rows = to - from;
        let before = if from == 0 { Before::Ignored } else { Before::Kept };
        let d_out = d_out.slice(s![from..to, ..]);
        inputs.probabilities(from, to, &mut p_scratch);
        let p = view(&mut p_scratch, rows, tokens);
        multiply(gradients.v.view_mut(), before, 1.0, p.t(), d_out, Threads::One);
        multiply(view(&mut d_scratch, rows, tokens), Before::Ignored, 1.0, d_out, inputs.v.t(), Threads::One);
        // through the softmax: ds = p · (dp − Σ p dp)
        let (p, d) = (&p_scratch[..rows * tokens], &mut d_scratch[..rows * tokens]);
        widest!({
            for (p, d) in p.chunks_exact(tokens).zip(d.chunks_exact_mut(tokens)) {
                let mean = dot(p, d);
                for i in 0..tokens {
                    d[i] = p[i] * (d[i] - mean);
                }
            }
        });
        let ds = view(&mut d_scratch, rows, tokens);
        let (scale, q) = (inputs.scale(), inputs.q.slice(s![from..to, ..]));
        multiply(
            gradients.q.slice_mut(s![from..to, ..]),
            Before::Ignored,
            scale,
            ds.view(),
            inputs.k,
            Threads::One,
        );
        multiply(gradients.k.view_mut(), before, scale, ds.t(), q, Threads::One);
    }
}

/// The sub-views along the first axis, each writable on its own.
pub(super) fn split<D: RemoveAxis>(view: ArrayViewMut<'_, f32, D>) -> Vec<ArrayViewMut<'_, f32, D::Smaller>> {
    let len = view.len_of(Axis(0));
    let mut parts = Vec::with_capacity(len);
    let mut rest = view;
    for _ in 0..len {
        let (first, others) = rest.split_at(Axis(0), 1);
        parts.push(first.index_axis_move(Axis(0), 0));
        rest = others;
    }
    parts
}
