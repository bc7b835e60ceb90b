//! LayerNorm over the channels of one token.

use super::elementary::sum;
use crate::format::{Norm, floats};
use crate::kernels::Work;

/// ε of every LayerNorm of the backbone.
const EPSILON: f32 = 1e-6;

/// `(x − mean)/sqrt(variance + ε) · weight + bias` over `x` `[D]`, D a multiple of 16, into `out` `[D]`.
pub(crate) struct LayerNorm<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) norm: &'a Norm<&'a [u8]>,
    pub(crate) out: &'a mut [f32],
}

impl Work for LayerNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { x, norm, out } = self;
        let count = x.len() as f32;
        let mean = sum(x, |x| x) / count;
        let variance = sum(x, |x| (x - mean) * (x - mean)) / count;
        let inverse = 1.0 / pass_core::math::sqrt(variance + EPSILON);
        let parameters = floats(norm.weight).zip(floats(norm.bias));
        for ((out, x), (weight, bias)) in out.iter_mut().zip(x).zip(parameters) {
            *out = (x - mean) * inverse * weight + bias;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_normed_row_has_the_mean_and_deviation_of_its_parameters() {
        let x: [f32; 32] = core::array::from_fn(|i| (i * i % 37) as f32);
        let bytes = |value: f32| -> [u8; 128] { core::array::from_fn(|i| value.to_le_bytes()[i % 4]) };
        let mut out = [0.0; 32];
        LayerNorm { x: &x, norm: &Norm { weight: &bytes(2.0), bias: &bytes(0.5) }, out: &mut out }.run();
        let mean = out.iter().sum::<f32>() / 32.0;
        let variance = out.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / 32.0;
        assert!((mean - 0.5).abs() < 1e-6 && (variance - 4.0).abs() < 1e-5, "{mean} {variance}");
    }
}
