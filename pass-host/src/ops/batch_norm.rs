//! Batch normalization over all positions of a channels-last map, followed by ReLU.

use super::access::{output, stored, tensor, values};
use super::buffer::build;
use super::lanes::widest;
use candle_core::{CpuStorage, CustomOp3, D, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

/// Positions of one task.
const ROWS: usize = 512;

/// Mean and biased variance of every channel over a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    /// `[C]`.
    pub mean: Vec<f32>,
    /// `[C]`.
    pub variance: Vec<f32>,
    /// Positions they were taken over.
    pub count: usize,
}

pub(super) fn check(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<()> {
    let channels = x.dim(D::Minus1)?;
    if x.elem_count() == 0 || weight.dims() != [channels] || bias.dims() != [channels] {
        bail!(
            "batch_norm: x {:?} needs weight and bias [{channels}], found {:?} and {:?}",
            x.shape(),
            weight.shape(),
            bias.shape()
        )
    }
    Ok(())
}

pub(super) fn composition(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<(Tensor, Moments)> {
    let channels = x.dim(D::Minus1)?;
    let rows = x.reshape(((), channels))?;
    let mean = rows.mean_keepdim(0)?;
    let centered = rows.broadcast_sub(&mean)?;
    let variance = centered.sqr()?.mean_keepdim(0)?;
    let normalized = centered.broadcast_div(&(&variance + eps)?.sqrt()?)?;
    let y = normalized.broadcast_mul(weight)?.broadcast_add(bias)?.relu()?.reshape(x.shape())?;
    let vector = |t: &Tensor| t.detach().flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>();
    let moments =
        Moments { mean: vector(&mean)?, variance: vector(&variance)?, count: x.elem_count() / channels };
    Ok((y, moments))
}

pub(super) fn fused(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<(Tensor, Moments)> {
    let x = x.contiguous()?;
    let moments = {
        let (storage, layout) = x.storage_and_layout();
        moments(stored(&storage, layout)?, x.dim(D::Minus1)?)
    };
    let inverse = moments.variance.iter().map(|v| (1.0 / (f64::from(*v) + eps).sqrt()) as f32).collect();
    let operation = BatchNorm { mean: moments.mean.clone(), inverse };
    Ok((x.apply_op3(&weight.contiguous()?, &bias.contiguous()?, operation)?, moments))
}

/// Sums over the positions of `N` quantities per channel: `add(row_start, channel)` per position, parts in parallel,
/// then the parts in order.
fn channel_sums<const N: usize>(
    rows: usize,
    channels: usize,
    part: impl Fn(std::ops::Range<usize>, &mut [Vec<f64>; N]) + Sync,
) -> [Vec<f64>; N] {
    let zeros = || std::array::from_fn(|_| vec![0f64; channels]);
    let parts: Vec<[Vec<f64>; N]> = (0..rows.div_ceil(ROWS))
        .into_par_iter()
        .map(|index| {
            let mut sums = zeros();
            part(index * ROWS..((index + 1) * ROWS).min(rows), &mut sums);
            sums
        })
        .collect();
    let mut total = zeros();
    for sums in &parts {
        for (total, sums) in total.iter_mut().zip(sums) {
            total.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
        }
    }
    total
}

/// Two passes, so that a mean far from zero costs no digits.
fn moments(x: &[f32], channels: usize) -> Moments {
    let count = x.len() / channels;
    let [sum] = channel_sums(count, channels, |rows, [sum]| {
        let sum = &mut sum[..channels];
        for row in x[rows.start * channels..rows.end * channels].chunks_exact(channels) {
            widest!({
                for i in 0..channels {
                    sum[i] += f64::from(row[i]);
                }
            });
        }
    });
    let mean: Vec<f32> = sum.iter().map(|sum| (sum / count as f64) as f32).collect();
    let [squares] = channel_sums(count, channels, |rows, [squares]| {
        let (squares, mean) = (&mut squares[..channels], &mean[..channels]);
        for row in x[rows.start * channels..rows.end * channels].chunks_exact(channels) {
            widest!({
                for i in 0..channels {
                    let centered = f64::from(row[i] - mean[i]);
                    squares[i] = centered.mul_add(centered, squares[i]);
                }
            });
        }
    });
    let variance = squares.iter().map(|squares| (squares / count as f64) as f32).collect();
    Moments { mean, variance, count }
}

struct BatchNorm {
    mean: Vec<f32>,
    inverse: Vec<f32>,
}

impl CustomOp3 for BatchNorm {
    fn name(&self) -> &'static str {
        "batch_norm_relu"
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
        let x = values(x, x_layout)?;
        let (weight, bias) = (values(weight, weight_layout)?, values(bias, bias_layout)?);
        let channels = weight.len();
        let (y, _) = build(x.len(), ROWS * channels, |part, y| {
            let x = &x[part * ROWS * channels..][..y.len()];
            let (mean, inverse) = (&self.mean[..channels], &self.inverse[..channels]);
            widest!({
                for (y, x) in y.chunks_exact_mut(channels).zip(x.chunks_exact(channels)) {
                    for i in 0..channels {
                        let value = ((x[i] - mean[i]) * inverse[i]).mul_add(weight[i], bias[i]);
                        // a comparison rather than `max`: it keeps NaN
                        y[i] = if value < 0.0 { 0.0 } else { value };
                    }
                }
            });
        });
        output(y, x_layout.shape())
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let gradient = gradient.contiguous()?;
        let ((x_storage, x_layout), (weight_storage, weight_layout)) =
            (x.storage_and_layout(), weight.storage_and_layout());
        let ((y_storage, y_layout), (dy_storage, dy_layout)) =
            (result.storage_and_layout(), gradient.storage_and_layout());
        let (x_values, weights) = (stored(&x_storage, x_layout)?, stored(&weight_storage, weight_layout)?);
        let (y, dy) = (stored(&y_storage, y_layout)?, stored(&dy_storage, dy_layout)?);
        let channels = weights.len();
        let count = x_values.len() / channels;
        // Σ g and Σ g·normalized, g = gradient of the value before ReLU
        let [d_bias, d_weight] = channel_sums(count, channels, |rows, [d_bias, d_weight]| {
            let (d_bias, d_weight) = (&mut d_bias[..channels], &mut d_weight[..channels]);
            let (mean, inverse) = (&self.mean[..channels], &self.inverse[..channels]);
            for row in rows {
                let place = row * channels..(row + 1) * channels;
                let (x, y, dy) = (&x_values[place.clone()], &y[place.clone()], &dy[place]);
                widest!({
                    for i in 0..channels {
                        let g = if y[i] > 0.0 { dy[i] } else { 0.0 };
                        d_bias[i] += f64::from(g);
                        d_weight[i] += f64::from(g * ((x[i] - mean[i]) * inverse[i]));
                    }
                });
            }
        });
        let mean_of = |sums: &[f64]| -> Vec<f32> { sums.iter().map(|s| (s / count as f64) as f32).collect() };
        let (mean_g, along) = (mean_of(&d_bias), mean_of(&d_weight));
        let dx = if x.track_op() {
            let (dx, _) = build(x_values.len(), ROWS * channels, |part, dx| {
                let place = part * ROWS * channels..part * ROWS * channels + dx.len();
                let rows = x_values[place.clone()].chunks_exact(channels);
                let rows =
                    rows.zip(y[place.clone()].chunks_exact(channels)).zip(dy[place].chunks_exact(channels));
                let (mean, inverse) = (&self.mean[..channels], &self.inverse[..channels]);
                let (mean_g, along) = (&mean_g[..channels], &along[..channels]);
                for (((x, y), dy), dx) in rows.zip(dx.chunks_exact_mut(channels)) {
                    widest!({
                        for i in 0..channels {
                            let g = if y[i] > 0.0 { dy[i] } else { 0.0 };
                            let normalized = (x[i] - mean[i]) * inverse[i];
                            dx[i] = weights[i] * inverse[i] * (g - mean_g[i] - normalized * along[i]);
                        }
                    });
                }
            });
            Some(tensor(dx, x.shape())?)
        } else {
            None
        };
        let single = |sums: Vec<f64>| tensor(sums.iter().map(|&s| s as f32).collect(), channels);
        Ok((
            dx,
            weight.track_op().then(|| single(d_weight)).transpose()?,
            bias.track_op().then(|| single(d_bias)).transpose()?,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Ops, testing::*};
    use super::{Moments, ROWS};
    use candle_core::Tensor;

    #[test]
    fn fused_agrees_with_composition_and_finite_differences() {
        for (rows, channels) in [(3, 1), (17, 5), (ROWS + 3, 2)] {
            let shapes: [&[usize]; 3] = [&[1, rows, 2, channels], &[channels], &[channels]];
            check(&|ops, t| Ok(ops.batch_norm_relu(&t[0], &t[1], &t[2], 1e-5)?.0), &shapes);
        }
    }

    #[test]
    fn moments_are_those_of_each_channel() {
        let x = Tensor::new(&[[[[1.0f32, 1000.0], [3.0, 1002.0]]]], &candle_core::Device::Cpu).unwrap();
        let one = Tensor::new(&[1.0f32, 1.0], &candle_core::Device::Cpu).unwrap();
        for ops in [Ops::fused(), Ops::reference()] {
            let (y, moments) = ops.batch_norm_relu(&x, &one, &one.zeros_like().unwrap(), 0.0).unwrap();
            assert_eq!(moments, Moments { mean: vec![2.0, 1001.0], variance: vec![1.0, 1.0], count: 2 });
            assert_close("normalized", &flat(&y), &[0.0, 0.0, 1.0, 1.0], 1e-6);
        }
    }

    #[test]
    fn wrong_shapes_are_refused() {
        let error =
            Ops::fused().batch_norm_relu(&random(1, &[2, 3]), &random(2, &[4]), &random(3, &[3]), 1e-5);
        assert!(error.unwrap_err().to_string().contains("[3]"));
    }
}
