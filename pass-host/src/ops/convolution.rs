//! Convolutions of images, as the product of the kernels with the patches under them; optionally followed by the ReLU.

use super::access::{output, stored, tensor, values};
use super::buffer::build;
use super::product::{Before, Threads, multiply};
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use ndarray::{ArrayView2, ArrayViewMut2};
use rayon::prelude::*;

/// How kernels lie on an image; the same along both axes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Pixels from one place of the kernel to the next.
    pub stride: usize,
    /// Zeros around the image.
    pub padding: usize,
    /// Pixels from one tap of the kernel to the next.
    pub dilation: usize,
}

/// What follows the convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rectifier {
    /// Nothing.
    None,
    /// `max(u, 0)`.
    Relu,
}

impl Placement {
    /// Places along an axis of this length.
    fn places(self, side: usize, kernel: usize) -> Option<usize> {
        let span = (kernel.checked_sub(1)? * self.dilation).checked_add(1)?;
        Some((side + 2 * self.padding).checked_sub(span)? / self.stride.max(1) + 1)
    }
}

pub(super) fn check(x: &Tensor, weight: &Tensor, bias: &Tensor, placement: Placement) -> Result<()> {
    let (_, channels, height, width) = x.dims4()?;
    let (outputs, inputs, rows, columns) = weight.dims4()?;
    let fits = placement.stride > 0
        && placement.dilation > 0
        && rows == columns
        && inputs == channels
        && bias.dims() == [outputs]
        && [height, width].iter().all(|side| placement.places(*side, rows).is_some());
    match fits {
        true => Ok(()),
        false => bail!(
            "convolution: images {:?}, kernels {:?}, bias {:?} and {placement:?} do not fit",
            x.shape(),
            weight.shape(),
            bias.shape()
        ),
    }
}

pub(super) fn composition(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    placement: Placement,
    rectifier: Rectifier,
) -> Result<Tensor> {
    let Placement { stride, padding, dilation } = placement;
    let kernel = weight.dim(3)?;
    // what no place of the kernel reaches is taken off: the tensor library's backward pass takes it to be the same along
    // both axes
    let mut x = x.clone();
    for axis in [2, 3] {
        let side = x.dim(axis)? + 2 * padding;
        let unused = (side - (kernel - 1) * dilation - 1) % stride;
        x = x.pad_with_zeros(axis, padding, padding)?.narrow(axis, 0, side - unused)?;
    }
    let y = x.contiguous()?.conv2d(weight, 0, stride, dilation, 1)?;
    let y = y.broadcast_add(&bias.reshape((1, bias.elem_count(), 1, 1))?)?;
    match rectifier {
        Rectifier::None => Ok(y),
        Rectifier::Relu => y.relu(),
    }
}

pub(super) fn fused(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    placement: Placement,
    rectifier: Rectifier,
) -> Result<Tensor> {
    let operation = Convolution { placement, rectifier };
    x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, operation)
}

struct Convolution {
    placement: Placement,
    rectifier: Rectifier,
}

/// Sizes of one call.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    channels: usize,
    outputs: usize,
    kernel: usize,
    /// Rows and columns of an image.
    image: (usize, usize),
    /// Rows and columns of places.
    places: (usize, usize),
    placement: Placement,
}

impl Sizes {
    fn new(x: &Shape, weight: &Shape, placement: Placement) -> Result<Self> {
        let (batch, channels, height, width) = x.dims4()?;
        let (outputs, _, _, kernel) = weight.dims4()?;
        match (placement.places(height, kernel), placement.places(width, kernel)) {
            (Some(rows), Some(columns)) => {
                let (image, places) = ((height, width), (rows, columns));
                Ok(Self { batch, channels, outputs, kernel, image, places, placement })
            }
            _ => bail!("convolution: kernels of {kernel} do not fit images of {height}x{width}"),
        }
    }

    /// Values of an image, of the places of one output, and under one place.
    fn lengths(&self) -> (usize, usize, usize) {
        let image = self.channels * self.image.0 * self.image.1;
        (image, self.places.0 * self.places.1, self.channels * self.kernel * self.kernel)
    }

    /// Whether the patches under the kernel are the image itself.
    fn is_pointwise(&self) -> bool {
        self.kernel == 1 && self.placement == (Placement { stride: 1, padding: 0, dilation: 1 })
    }

    /// Where tap `tap` of the kernel lies for the first place, before the image by at most the padding, and the places for
    /// which it lies inside: their range along an axis of `side` pixels.
    fn inside(&self, tap: usize, side: usize, places: usize) -> (usize, std::ops::Range<usize>) {
        let Placement { stride, padding, dilation } = self.placement;
        let shift = tap * dilation;
        let first = padding.saturating_sub(shift).div_ceil(stride);
        let last = (side + padding).saturating_sub(shift).div_ceil(stride).min(places);
        (shift, first.min(last)..last)
    }

    /// Calls `visit(place, pixel, count)` for every stretch of a row of places whose tap lies inside of the image.
    fn visit(&self, tap: (usize, usize), mut visit: impl FnMut(usize, usize, usize)) {
        let Placement { stride, padding, .. } = self.placement;
        let (row_shift, rows) = self.inside(tap.0, self.image.0, self.places.0);
        let (column_shift, columns) = self.inside(tap.1, self.image.1, self.places.1);
        if columns.is_empty() {
            return;
        }
        for row in rows {
            let y = row * stride + row_shift - padding;
            let x = columns.start * stride + column_shift - padding;
            visit(row * self.places.1 + columns.start, y * self.image.1 + x, columns.len());
        }
    }

    /// The values under the kernel at every place, `[C·k·k, places]`.
    fn patches(&self, image: &[f32]) -> Vec<f32> {
        let (_, places, length) = self.lengths();
        let (taps, stride) = (self.kernel * self.kernel, self.placement.stride);
        let pixels = self.image.0 * self.image.1;
        let (patches, _) = build(length * places, places, |row, out| {
            let (channel, tap) = (row / taps, row % taps);
            let plane = &image[channel * pixels..][..pixels];
            self.visit((tap / self.kernel, tap % self.kernel), |place, pixel, count| {
                let out = &mut out[place..place + count];
                match stride {
                    1 => out.copy_from_slice(&plane[pixel..pixel + count]),
                    _ => {
                        let taken = plane[pixel..].iter().step_by(stride);
                        out.iter_mut().zip(taken).for_each(|(out, value)| *out = *value);
                    }
                }
            });
        });
        patches
    }

    /// Adds what is under the kernel at every place, `[C·k·k, places]`, to the pixels it lies on.
    fn scatter(&self, patches: &[f32], image: &mut [f32]) {
        let (_, places, _) = self.lengths();
        let (taps, stride) = (self.kernel * self.kernel, self.placement.stride);
        let pixels = self.image.0 * self.image.1;
        image.par_chunks_mut(pixels.max(1)).enumerate().for_each(|(channel, plane)| {
            for tap in 0..taps {
                let row = &patches[(channel * taps + tap) * places..][..places];
                self.visit((tap / self.kernel, tap % self.kernel), |place, pixel, count| {
                    let onto = plane[pixel..].iter_mut().step_by(stride);
                    onto.zip(&row[place..place + count]).for_each(|(pixel, value)| *pixel += *value);
                });
            }
        });
    }
}

impl Convolution {
    fn forward(&self, x: &[f32], weight: &[f32], bias: &[f32], sizes: Sizes) -> Result<Vec<f32>> {
        let (image, places, length) = sizes.lengths();
        let outputs = sizes.outputs;
        let (mut y, _) =
            build(sizes.batch * outputs * places, places, |row, out| out.fill(bias[row % outputs]));
        let weight = matrix(weight, outputs, length)?;
        for (x, y) in x.chunks_exact(image.max(1)).zip(y.chunks_exact_mut((outputs * places).max(1))) {
            let gathered;
            let patches = match sizes.is_pointwise() {
                true => x,
                false => {
                    gathered = sizes.patches(x);
                    &gathered
                }
            };
            let patches = matrix(patches, length, places)?;
            multiply(matrix_mut(y, outputs, places)?, Before::Kept, 1.0, weight, patches, Threads::All);
        }
        if self.rectifier == Rectifier::Relu {
            y.par_chunks_mut(places.max(1)).for_each(|row| {
                // a comparison rather than `max`: it keeps NaN
                row.iter_mut().for_each(|value| *value = if *value < 0.0 { 0.0 } else { *value });
            });
        }
        Ok(y)
    }

    /// Gradients of x, weight and bias, each only if it is tracked.
    fn backward(
        &self,
        [x, weight, bias]: [&Tensor; 3],
        result: &Tensor,
        gradient: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let sizes = Sizes::new(x.shape(), weight.shape(), self.placement)?;
        let (image, places, length) = sizes.lengths();
        let outputs = sizes.outputs;
        let (result, gradient) = (result.contiguous()?, gradient.contiguous()?);
        let ((x_storage, x_layout), (weight_storage, weight_layout)) =
            (x.storage_and_layout(), weight.storage_and_layout());
        let ((y_storage, y_layout), (dy_storage, dy_layout)) =
            (result.storage_and_layout(), gradient.storage_and_layout());
        let (x_values, weights) = (stored(&x_storage, x_layout)?, stored(&weight_storage, weight_layout)?);
        let (y, dy) = (stored(&y_storage, y_layout)?, stored(&dy_storage, dy_layout)?);
        let (du, _) = build(dy.len(), places, |row, du| {
            let place = row * places..row * places + du.len();
            let open = |y: f32| self.rectifier == Rectifier::None || y > 0.0;
            for ((du, &y), &dy) in du.iter_mut().zip(&y[place.clone()]).zip(&dy[place]) {
                *du = if open(y) { dy } else { 0.0 };
            }
        });
        let (mut dx, _) = build(if x.track_op() { x_values.len() } else { 0 }, image, |_, _| ());
        let (mut d_weight, _) = build(weights.len(), length, |_, _| ());
        let weights = matrix(weights, outputs, length)?;
        for index in 0..sizes.batch {
            let du = matrix(&du[index * outputs * places..][..outputs * places], outputs, places)?;
            if weight.track_op() {
                let x = &x_values[index * image..][..image];
                let patches = sizes.patches(x);
                let patches = matrix(&patches, length, places)?;
                let out = matrix_mut(&mut d_weight, outputs, length)?;
                multiply(out, Before::Kept, 1.0, du, patches.t(), Threads::All);
            }
            if x.track_op() {
                let (mut patches, _) = build(length * places, places, |_, _| ());
                let out = matrix_mut(&mut patches, length, places)?;
                multiply(out, Before::Ignored, 1.0, weights.t(), du, Threads::All);
                sizes.scatter(&patches, &mut dx[index * image..][..image]);
            }
        }
        let d_bias: Vec<f32> = (0..outputs)
            .map(|output| {
                let row = |index: usize| &du[(index * outputs + output) * places..][..places];
                (0..sizes.batch)
                    .map(|index| row(index).iter().map(|du| f64::from(*du)).sum::<f64>())
                    .sum::<f64>() as f32
            })
            .collect();
        Ok([
            if x.track_op() { Some(tensor(dx, x.shape())?) } else { None },
            if weight.track_op() { Some(tensor(d_weight, weight.shape())?) } else { None },
            if bias.track_op() { Some(tensor(d_bias, outputs)?) } else { None },
        ])
    }
}

impl CustomOp3 for Convolution {
    fn name(&self) -> &'static str {
        "convolution"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let sizes = Sizes::new(x_layout.shape(), weight_layout.shape(), self.placement)?;
        let y = self.forward(
            values(x, x_layout)?,
            values(weight, weight_layout)?,
            values(bias, bias_layout)?,
            sizes,
        )?;
        output(y, (sizes.batch, sizes.outputs, sizes.places.0, sizes.places.1))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [x, weight, bias] = self.backward([x, weight, bias], result, gradient)?;
        Ok((x, weight, bias))
    }
}

fn matrix(values: &[f32], rows: usize, columns: usize) -> Result<ArrayView2<'_, f32>> {
    ArrayView2::from_shape((rows, columns), values).map_err(candle_core::Error::wrap)
}

fn matrix_mut(values: &mut [f32], rows: usize, columns: usize) -> Result<ArrayViewMut2<'_, f32>> {
    ArrayViewMut2::from_shape((rows, columns), values).map_err(candle_core::Error::wrap)
}

#[cfg(test)]
mod tests {
    use super::super::Ops;
    use super::super::testing::{check, random};
    use super::{Placement, Rectifier};

    #[test]
    fn fused_agrees_with_composition_and_finite_differences() {
        for (kernel, stride, padding, dilation, height, width) in [
            (1, 1, 0, 1, 3, 4),
            (1, 2, 0, 1, 4, 5),
            (3, 1, 1, 1, 5, 4),
            (3, 2, 1, 1, 6, 5),
            (3, 1, 2, 2, 4, 6),
            (7, 2, 3, 1, 8, 9),
            (3, 1, 4, 4, 3, 2),
        ] {
            for rectifier in [Rectifier::None, Rectifier::Relu] {
                let placement = Placement { stride, padding, dilation };
                check(
                    &|ops, t| ops.convolution(&t[0], &t[1], &t[2], placement, rectifier),
                    &[&[2, 3, height, width], &[4, 3, kernel, kernel], &[4]],
                );
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let placement = Placement { stride: 1, padding: 0, dilation: 1 };
        let run = |x: &[usize], weight: &[usize], bias: usize, placement| {
            let (x, weight, bias) = (random(1, x), random(2, weight), random(3, &[bias]));
            Ops::fused()
                .convolution(&x, &weight, &bias, placement, Rectifier::None)
                .map(|y| y.dims().to_vec())
        };
        assert_eq!(run(&[1, 2, 3, 3], &[4, 2, 3, 3], 4, placement).unwrap(), [1, 4, 1, 1]);
        assert!(run(&[1, 2, 3, 2], &[4, 2, 3, 3], 4, placement).is_err());
        assert!(run(&[1, 3, 3, 3], &[4, 2, 3, 3], 4, placement).is_err());
        assert!(run(&[1, 2, 3, 3], &[4, 2, 3, 3], 5, placement).is_err());
        assert!(run(&[1, 2, 3, 3], &[4, 2, 3, 2], 4, placement).is_err());
        assert!(run(&[1, 2, 3, 3], &[4, 2, 3, 3], 4, Placement { stride: 0, ..placement }).is_err());
    }
}
