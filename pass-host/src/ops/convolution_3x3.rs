//! 3x3 convolution, stride 1, zero padding 1, channels last: nine products of shifted views, without unfolding.
//!
//! In a map with one more row and column of zeros on each side, a shift is an offset of the flattened rows. A product
//! over the padded width also computes two columns nobody reads, which costs less than copying every pixel nine times.

use super::access::{output, stored, tensor, values};
use super::product::{Before, Threads, multiply};
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use ndarray::{ArrayView2, ArrayViewMut2};

/// Side of the kernel.
const SIDE: usize = 3;

pub(super) fn check(x: &Tensor, weight: &Tensor) -> Result<()> {
    let (_, _, _, channels) = x.dims4()?;
    let (outputs, inputs, height, width) = weight.dims4()?;
    if inputs != channels || (height, width) != (SIDE, SIDE) || x.elem_count() * outputs == 0 {
        bail!("convolution: weight {:?} needs x [B, H, W, {inputs}], found {:?}", weight.shape(), x.shape())
    }
    Ok(())
}

pub(super) fn composition(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (batch, height, width, inputs) = x.dims4()?;
    let outputs = weight.dim(0)?;
    let padded = x.pad_with_zeros(1, 1, 1)?.pad_with_zeros(2, 1, 1)?;
    let mut shifted = Vec::with_capacity(SIDE * SIDE);
    for row in 0..SIDE {
        for column in 0..SIDE {
            shifted.push(padded.narrow(1, row, height)?.narrow(2, column, width)?);
        }
    }
    let unfolded = Tensor::cat(&shifted, 3)?.reshape((batch * height * width, SIDE * SIDE * inputs))?;
    let weight = weight.permute((0, 2, 3, 1))?.reshape((outputs, SIDE * SIDE * inputs))?;
    unfolded.matmul(&weight.t()?)?.reshape((batch, height, width, outputs))
}

pub(super) fn fused(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op2(&weight.contiguous()?, Convolution)
}

struct Convolution;

/// Sizes of one convolution.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    height: usize,
    width: usize,
}

impl Sizes {
    fn of(shape: &Shape) -> Result<(Self, usize)> {
        let (batch, height, width, channels) = shape.dims4()?;
        Ok((Self { batch, height, width }, channels))
    }

    /// Rows of a padded map, flattened.
    fn padded(self) -> usize {
        (self.height + 2) * (self.width + 2)
    }

    /// Flattened padded rows from the first pixel of a map to its last.
    fn span(self) -> usize {
        self.height * (self.width + 2) - 2
    }

    /// Copies an image `[H, W, C]` into the middle of zeros `[H + 2, W + 2, C]`.
    fn pad(self, image: &[f32], channels: usize, padded: &mut [f32]) {
        let (row, padded_row) = (self.width * channels, (self.width + 2) * channels);
        for (y, image) in image.chunks_exact(row).enumerate() {
            padded[(y + 1) * padded_row + channels..][..row].copy_from_slice(image);
        }
    }
}

/// `[9, I, O]` from `[O, I, 3, 3]`, or for the gradient of the input `[9, O, I]` with the kernel turned around.
fn by_shift(weight: &[f32], outputs: usize, inputs: usize, turned: bool) -> Vec<f32> {
    let shifts = SIDE * SIDE;
    let mut sorted = vec![0f32; weight.len()];
    for o in 0..outputs {
        for i in 0..inputs {
            let kernel = &weight[(o * inputs + i) * shifts..][..shifts];
            for (shift, &value) in kernel.iter().enumerate() {
                let place = match turned {
                    false => (shift * inputs + i) * outputs + o,
                    true => ((shifts - 1 - shift) * outputs + o) * inputs + i,
                };
                sorted[place] = value;
            }
        }
    }
    sorted
}

/// Offset of each shift in flattened padded rows.
fn offsets(sizes: Sizes) -> impl Iterator<Item = usize> {
    (0..SIDE * SIDE).map(move |shift| shift / SIDE * (sizes.width + 2) + shift % SIDE)
}

fn matrix(values: &[f32], rows: usize, columns: usize) -> Result<ArrayView2<'_, f32>> {
    ArrayView2::from_shape((rows, columns), &values[..rows * columns]).map_err(candle_core::Error::wrap)
}

fn matrix_mut(values: &mut [f32], rows: usize, columns: usize) -> Result<ArrayViewMut2<'_, f32>> {
    ArrayViewMut2::from_shape((rows, columns), &mut values[..rows * columns])
        .map_err(candle_core::Error::wrap)
}

/// Convolves `x` `[B, H, W, I]` with weights `[9, I, O]`.
fn convolve(x: &[f32], weights: &[f32], sizes: Sizes, inputs: usize, outputs: usize) -> Result<Vec<f32>> {
    let image = sizes.height * sizes.width;
    let mut y = Vec::with_capacity(sizes.batch * image * outputs);
    let mut padded = vec![0f32; sizes.padded() * inputs];
    let mut wide = vec![0f32; (sizes.span() + 2) * outputs];
    for x in x.chunks_exact(image * inputs) {
        sizes.pad(x, inputs, &mut padded);
        for (shift, offset) in offsets(sizes).enumerate() {
            multiply(
                matrix_mut(&mut wide, sizes.span(), outputs)?,
                if shift == 0 { Before::Ignored } else { Before::Kept },
                1.0,
                matrix(&padded[offset * inputs..], sizes.span(), inputs)?,
                matrix(&weights[shift * inputs * outputs..], inputs, outputs)?,
                Threads::All,
            );
        }
        for row in wide.chunks_exact((sizes.width + 2) * outputs) {
            y.extend_from_slice(&row[..sizes.width * outputs]);
        }
    }
    Ok(y)
}

/// Gradient of the weights, `[O, I, 3, 3]`.
fn weight_gradient(x: &[f32], dy: &[f32], sizes: Sizes, inputs: usize, outputs: usize) -> Result<Vec<f32>> {
    let image = sizes.height * sizes.width;
    let shifts = SIDE * SIDE;
    let mut padded = vec![0f32; sizes.padded() * inputs];
    // the two columns nobody reads stay zero
    let mut wide = vec![0f32; (sizes.span() + 2) * outputs];
    let mut sorted = vec![0f32; shifts * inputs * outputs];
    for (x, dy) in x.chunks_exact(image * inputs).zip(dy.chunks_exact(image * outputs)) {
        sizes.pad(x, inputs, &mut padded);
        let rows = wide.chunks_exact_mut((sizes.width + 2) * outputs);
        for (wide, dy) in rows.zip(dy.chunks_exact(sizes.width * outputs)) {
            wide[..dy.len()].copy_from_slice(dy);
        }
        for (offset, sum) in offsets(sizes).zip(sorted.chunks_exact_mut(inputs * outputs)) {
            multiply(
                matrix_mut(sum, inputs, outputs)?,
                Before::Kept,
                1.0,
                matrix(&padded[offset * inputs..], sizes.span(), inputs)?.t(),
                matrix(&wide, sizes.span(), outputs)?,
                Threads::All,
            );
        }
    }
    let mut gradient = vec![0f32; sorted.len()];
    for (place, &value) in sorted.iter().enumerate() {
        let (shift, i, o) = (place / (inputs * outputs), place / outputs % inputs, place % outputs);
        gradient[(o * inputs + i) * shifts + shift] = value;
    }
    Ok(gradient)
}

impl CustomOp2 for Convolution {
    fn name(&self) -> &'static str {
        "convolution"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (sizes, inputs) = Sizes::of(x_layout.shape())?;
        let (outputs, ..) = weight_layout.shape().dims4()?;
        let sorted = by_shift(values(weight, weight_layout)?, outputs, inputs, false);
        let y = convolve(values(x, x_layout)?, &sorted, sizes, inputs, outputs)?;
        output(y, (sizes.batch, sizes.height, sizes.width, outputs))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (sizes, inputs) = Sizes::of(x.shape())?;
        let (outputs, ..) = weight.dims4()?;
        let gradient = gradient.contiguous()?;
        let ((x_storage, x_layout), (weight_storage, weight_layout), (dy_storage, dy_layout)) =
            (x.storage_and_layout(), weight.storage_and_layout(), gradient.storage_and_layout());
        let dy = stored(&dy_storage, dy_layout)?;
        let dx = if x.track_op() {
            let turned = by_shift(stored(&weight_storage, weight_layout)?, outputs, inputs, true);
            Some(tensor(convolve(dy, &turned, sizes, outputs, inputs)?, x.shape())?)
        } else {
            None
        };
        let d_weight = if weight.track_op() {
            let gradient = weight_gradient(stored(&x_storage, x_layout)?, dy, sizes, inputs, outputs)?;
            Some(tensor(gradient, weight.shape())?)
        } else {
            None
        };
        Ok((dx, d_weight))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Ops, testing::*};

    #[test]
    fn fused_agrees_with_composition_and_finite_differences() {
        for (height, width, inputs, outputs) in [(1, 1, 1, 1), (2, 3, 4, 5), (5, 4, 3, 2), (1, 7, 2, 3)] {
            let shapes: [&[usize]; 2] = [&[2, height, width, inputs], &[outputs, inputs, 3, 3]];
            check(&|ops, t| ops.convolution_3x3(&t[0], &t[1]), &shapes);
        }
    }

    #[test]
    fn it_is_the_convolution_of_the_tensor_library() {
        let (x, weight) = (random(1, &[2, 5, 6, 3]), random(2, &[4, 3, 3, 3]));
        let first = x.permute((0, 3, 1, 2)).unwrap().contiguous().unwrap();
        let expected = first.conv2d(&weight, 1, 1, 1, 1).unwrap().permute((0, 2, 3, 1)).unwrap();
        let found = Ops::fused().convolution_3x3(&x, &weight).unwrap();
        assert_close("conv2d", &flat(&found), &flat(&expected.contiguous().unwrap()), 1e-5);
    }

    #[test]
    fn another_number_of_channels_is_refused() {
        let error = Ops::fused().convolution_3x3(&random(1, &[1, 2, 2, 3]), &random(2, &[4, 5, 3, 3]));
        assert!(error.unwrap_err().to_string().contains("[B, H, W, 5]"));
    }
}
