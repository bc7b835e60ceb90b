//! A linear map on int8 rows, with what follows it while the sums are still in the first-level cache.

use super::elementary::gelu;
use crate::error::Result;
use crate::format::{Linear, floats};
use crate::kernels::{Arithmetic, CHUNK, I8Product, I8Rows, Sums, Work};
use crate::scratch::TILE;
use pass_core::rows::{rows_of, rows_of_mut};

/// What is done with `y = W·x + b`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Epilogue {
    /// `out = y`.
    Store,
    /// `out = GELU(y)`.
    Gelu,
    /// `out += y`.
    Add,
}

/// `y[row] = (Σ q·w) · (scale[row] · layer.scale) + layer.bias`.
///
/// - `inputs`: `[rows, width]` int8, `width` the padded inputs of the layer; `scales`: one a row.
/// - `out`: `[rows, outputs]`.
pub(crate) fn linear<K: Arithmetic>(
    kernel: K,
    inputs: I8Rows<'_>,
    scales: &[f32; TILE],
    layer: &Linear<&[u8]>,
    epilogue: Epilogue,
    out: &mut [f32],
) -> Result<()> {
    let outputs = layer.bias.len() / size_of::<f32>();
    let mut sums = Sums::new();
    let parameters = layer.scale.chunks(4 * CHUNK).zip(layer.bias.chunks(4 * CHUNK));
    let weights = rows_of(layer.weight, CHUNK * inputs.depth());
    for (index, (weight, (scale, bias))) in weights.zip(parameters).enumerate() {
        kernel.matmul_i8(I8Product::new(inputs, weight, &mut sums.0)?);
        let first = index * CHUNK;
        kernel.vectorize(Finish {
            sums: &sums.0,
            scales,
            scale,
            bias,
            epilogue,
            first,
            rows: inputs.rows(),
            outputs,
            out,
        });
    }
    Ok(())
}

/// The sums of up to [`CHUNK`] outputs from `first` on, and what makes features of them.
struct Finish<'a> {
    sums: &'a [i32],
    scales: &'a [f32; TILE],
    scale: &'a [u8],
    bias: &'a [u8],
    epilogue: Epilogue,
    first: usize,
    rows: usize,
    outputs: usize,
    out: &'a mut [f32],
}

impl Work for Finish<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let columns = self.bias.len() / size_of::<f32>();
        let mut parameters = [[0.0_f32; CHUNK]; 2];
        for (kept, bytes) in parameters.iter_mut().zip([self.scale, self.bias]) {
            for (kept, value) in kept.iter_mut().zip(floats(bytes)) {
                *kept = value;
            }
        }
        let rows = rows_of(self.sums, columns).zip(rows_of_mut(self.out, self.outputs));
        for ((sums, out), scale) in rows.zip(self.scales).take(self.rows) {
            let out = out.get_mut(self.first..self.first + columns).unwrap_or_default();
            match self.epilogue {
                Epilogue::Store => finish_row(sums, *scale, &parameters, out, |_, y| y),
                Epilogue::Gelu => finish_row(sums, *scale, &parameters, out, |_, y| gelu(y)),
                Epilogue::Add => finish_row(sums, *scale, &parameters, out, |x, y| x + y),
            }
        }
    }
}

#[inline(always)]
fn finish_row(
    sums: &[i32],
    row_scale: f32,
    [scale, bias]: &[[f32; CHUNK]; 2],
    out: &mut [f32],
    apply: impl Fn(f32, f32) -> f32,
) {
    for (((out, sum), scale), bias) in out.iter_mut().zip(sums).zip(scale).zip(bias) {
        let y = *sum as f32 * (row_scale * scale) + bias;
        *out = apply(*out, y);
    }
}
