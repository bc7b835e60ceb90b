//! The linear head: one linear layer on standardized patch features.
//!
//! Features are standardized channel by channel with the statistics of the training pictures, found once before
//! training: what a BatchNorm in front of the layer converges to while the backbone is frozen, without its noise. The
//! map from features to logits stays affine.

use candle_core::{DType, Device, Result, Tensor, Var};

use crate::model::parameters::Parameters;
use crate::ops::Ops;
use crate::random::{Purpose, Stream};

/// Standard deviation of the first weights.
const WEIGHT_STD: f64 = 0.01;
/// Added to the variance of a channel.
const EPS: f64 = 1e-6;

/// Patch features -> logits of every patch.
pub struct LinearHead {
    parameters: Parameters,
    /// `[D]`.
    mean: Tensor,
    /// `[D]`, the inverse standard deviation.
    inverse: Tensor,
}

const WEIGHT: &str = "decode_head.conv_seg.weight";
const BIAS: &str = "decode_head.conv_seg.bias";
const MEAN: &str = "decode_head.standardize.mean";
const INVERSE: &str = "decode_head.standardize.inverse";

impl LinearHead {
    /// Small weights, no standardization yet.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn new(dim: usize, classes: usize, seed: u64, device: &Device) -> Result<Self> {
        let mut stream = Stream::new(seed, Purpose::Init, &[xxhash_rust::xxh3::xxh3_64(WEIGHT.as_bytes())]);
        let weight: Vec<f32> = (0..classes * dim).map(|_| (WEIGHT_STD * stream.normal()) as f32).collect();
        let weight = Var::from_vec(weight, (classes, dim), device)?;
        let bias = Var::zeros(classes, DType::F32, device)?;
        let named = [(WEIGHT, weight), (BIAS, bias)];
        Ok(Self {
            parameters: named.into_iter().map(|(n, v)| (n.to_owned(), v.as_tensor().clone())).collect(),
            mean: Tensor::zeros(dim, DType::F32, device)?,
            inverse: Tensor::ones(dim, DType::F32, device)?,
        })
    }

    /// Standardizes with these statistics from now on.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn standardize(&mut self, statistics: &Statistics) -> Result<()> {
        let device = self.mean.device().clone();
        let (mean, inverse) = statistics.mean_and_inverse();
        self.mean = Tensor::new(mean, &device)?;
        self.inverse = Tensor::new(inverse, &device)?;
        Ok(())
    }

    /// Logits `[B, N, C]` of features `[B, N, D]`.
    ///
    /// # Errors
    /// If the width is another.
    pub fn logits(&self, features: &Tensor, ops: Ops) -> Result<Tensor> {
        let x = features.broadcast_sub(&self.mean)?.broadcast_mul(&self.inverse)?;
        ops.linear(&x, &self.parameters.get(WEIGHT)?, Some(&self.parameters.get(BIAS)?))
    }

    /// What is learned.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// Takes over the standardization, as [`LinearHead::buffers`] gives it.
    ///
    /// # Errors
    /// If `get` does.
    pub fn restore(&mut self, mut get: impl FnMut(&str) -> Result<Tensor>) -> Result<()> {
        let device = self.mean.device().clone();
        self.mean = get(MEAN)?.to_device(&device)?;
        self.inverse = get(INVERSE)?.to_device(&device)?;
        Ok(())
    }

    /// What is kept beside it.
    pub fn buffers(&self) -> Vec<(String, Tensor)> {
        vec![(MEAN.into(), self.mean.clone()), (INVERSE.into(), self.inverse.clone())]
    }
}

/// Mean and variance per channel, over many features.
#[derive(Clone, Debug)]
pub struct Statistics {
    sums: Vec<f64>,
    squares: Vec<f64>,
    count: u64,
}

impl Statistics {
    /// Of nothing yet.
    pub fn new(dim: usize) -> Self {
        Self { sums: vec![0.0; dim], squares: vec![0.0; dim], count: 0 }
    }

    /// Takes in features, row by row `D` values.
    pub fn add(&mut self, features: &[f32]) {
        for row in features.chunks_exact(self.sums.len()) {
            for ((sum, square), &value) in self.sums.iter_mut().zip(&mut self.squares).zip(row) {
                let value = f64::from(value);
                *sum += value;
                *square += value * value;
            }
            self.count += 1;
        }
    }

    fn mean_and_inverse(&self) -> (Vec<f32>, Vec<f32>) {
        let count = self.count.max(1) as f64;
        let each = self.sums.iter().zip(&self.squares);
        each.map(|(sum, square)| {
            let mean = sum / count;
            let variance = (square / count - mean * mean).max(0.0);
            (mean as f32, (1.0 / (variance + EPS).sqrt()) as f32)
        })
        .unzip()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_standardized_before_the_layer() -> Result<()> {
        let mut head = LinearHead::new(2, 3, 0, &Device::Cpu)?;
        let features = Tensor::new(&[[[1f32, 10.0], [3.0, 10.0], [5.0, 40.0]]], &Device::Cpu)?;
        let mut statistics = Statistics::new(2);
        statistics.add(&features.flatten_all()?.to_vec1::<f32>()?);
        head.standardize(&statistics)?;
        let weight = head.parameters().get(WEIGHT)?.to_vec2::<f32>()?;
        let logits = head.logits(&features, Ops::fused())?.to_vec3::<f32>()?;
        let (a, b) = ((8f32 / 3.0).sqrt(), 200f32.sqrt());
        for (row, x) in [[-2.0 / a, -10.0 / b], [0.0, -10.0 / b], [2.0 / a, 20.0 / b]].iter().enumerate() {
            for class in 0..3 {
                let expected = weight[class][0] * x[0] + weight[class][1] * x[1];
                assert!((logits[0][row][class] - expected).abs() < 1e-6);
            }
        }
        Ok(())
    }
}
