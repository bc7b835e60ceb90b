//! Position embeddings of any grid: bicubic interpolation as a fixed matrix product, so that gradients pass through.

use std::collections::HashMap;
use std::sync::Mutex;

use candle_core::{DType, Device, Result, Tensor};

/// Cubic convolution coefficient of the reference's `interpolate(mode="bicubic")`.
pub(crate) const CUBIC_A: f64 = -0.75;
/// Added to the target size by [`ResizeRule::Offset`].
pub(crate) const OFFSET: f64 = 0.1;

/// Which scale maps target coordinates to source coordinates (SEMANTICS §1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ResizeRule {
    /// Scale `(side + 0.1) / base`, for the coordinates too: pre-training and video evaluation.
    Offset,
    /// Scale `side / base`: fine-tuning for segmentation.
    Size,
}

impl ResizeRule {
    /// As in the metadata of weights.
    pub fn name(self) -> &'static str {
        match self {
            Self::Offset => "offset",
            Self::Size => "size",
        }
    }
}

/// Wavelengths of [`sin_cos_positions`] span 2π to this many times as much.
const TEMPERATURE: f64 = 1e4;

/// Fixed embeddings of a `side · side` grid, `[side², dim]` row by row (MoCo-v3).
///
/// With `w_i = 10⁴^(−i/(D/4))`, the patch of row `y` and column `x` is `[sin y·w | cos y·w | sin x·w | cos x·w]`.
/// `dim` is a multiple of 4; what is over of another stays 0.
pub fn sin_cos_positions(side: usize, dim: usize) -> Vec<f32> {
    let quarter = dim / 4;
    let mut positions = vec![0f32; side * side * dim];
    for (patch, out) in positions.chunks_exact_mut(dim.max(1)).enumerate() {
        for (axis, place) in [patch / side, patch % side].into_iter().enumerate() {
            for i in 0..quarter {
                let angle = place as f64 * TEMPERATURE.powf(-(i as f64) / quarter as f64);
                out[2 * axis * quarter + i] = angle.sin() as f32;
                out[(2 * axis + 1) * quarter + i] = angle.cos() as f32;
            }
        }
    }
    positions
}

/// Embeddings of a square grid `[1, base², D]` and their resized versions.
pub struct PositionEmbedding {
    embedding: Tensor,
    base: usize,
    rule: ResizeRule,
    matrices: Mutex<HashMap<(usize, usize), Tensor>>,
}

impl PositionEmbedding {
    /// Wraps `embedding` `[1, base², D]`.
    ///
    /// # Errors
    /// If the number of positions is not a square.
    pub fn new(embedding: Tensor, rule: ResizeRule) -> Result<Self> {
        let (_, positions, _) = embedding.dims3()?;
        let base = positions.isqrt();
        if base * base != positions {
            candle_core::bail!(
                "position embedding: expected a square number of positions, found {positions}"
            );
        }
        Ok(Self { embedding, base, rule, matrices: Mutex::default() })
    }

    /// The same embedding with another rule.
    pub fn with_rule(self, rule: ResizeRule) -> Result<Self> {
        Self::new(self.embedding, rule)
    }

    /// The embedding of a `(height, width)` grid, `[1, height·width, D]`.
    pub fn resized(&self, grid: (usize, usize)) -> Result<Tensor> {
        if grid == (self.base, self.base) {
            return Ok(self.embedding.clone());
        }
        let matrix = {
            let mut matrices = self.matrices.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            match matrices.get(&grid) {
                Some(matrix) => matrix.clone(),
                None => {
                    let matrix = self.matrix(grid, self.embedding.device())?;
                    matrices.insert(grid, matrix.clone());
                    matrix
                }
            }
        };
        let matrix = matrix.to_dtype(self.embedding.dtype())?;
        matrix.matmul(&self.embedding.squeeze(0)?)?.unsqueeze(0)
    }

    /// `[height·width, base²]`: the Kronecker product of the row and the column interpolation.
    fn matrix(&self, (height, width): (usize, usize), device: &Device) -> Result<Tensor> {
        let rows = interpolation(self.base, height, self.rule);
        let columns = interpolation(self.base, width, self.rule);
        let base = self.base;
        let mut matrix = vec![0f64; height * width * base * base];
        for y in 0..height {
            for x in 0..width {
                let out = &mut matrix[(y * width + x) * base * base..][..base * base];
                for source_y in 0..base {
                    let weight = rows[y * base + source_y];
                    if weight != 0.0 {
                        for source_x in 0..base {
                            out[source_y * base + source_x] = weight * columns[x * base + source_x];
                        }
                    }
                }
            }
        }
        Tensor::from_vec(matrix, (height * width, base * base), device)?.to_dtype(DType::F32)
    }
}

/// One axis: `[side, base]` cubic weights with half-pixel centers and clamped borders.
fn interpolation(base: usize, side: usize, rule: ResizeRule) -> Vec<f64> {
    let scale = match rule {
        ResizeRule::Offset => (side as f64 + OFFSET) / base as f64,
        ResizeRule::Size => side as f64 / base as f64,
    };
    let mut weights = vec![0f64; side * base];
    for target in 0..side {
        let source = (target as f64 + 0.5) / scale - 0.5;
        let first = source.floor();
        let t = source - first;
        for (tap, weight) in cubic_weights(t).into_iter().enumerate() {
            let index = (first as i64 + tap as i64 - 1).clamp(0, base as i64 - 1) as usize;
            weights[target * base + index] += weight;
        }
    }
    weights
}

/// Weights of the samples at -1, 0, 1, 2 for a position `t` in `[0, 1)` between samples 0 and 1.
fn cubic_weights(t: f64) -> [f64; 4] {
    let near = |x: f64| ((CUBIC_A + 2.0) * x - (CUBIC_A + 3.0)) * x * x + 1.0;
    let far = |x: f64| ((CUBIC_A * x - 5.0 * CUBIC_A) * x + 8.0 * CUBIC_A) * x - 4.0 * CUBIC_A;
    [far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_of_a_target_sum_to_one() {
        for rule in [ResizeRule::Offset, ResizeRule::Size] {
            for (base, side) in [(14, 6), (14, 30), (3, 1), (1, 5)] {
                let weights = interpolation(base, side, rule);
                for row in weights.chunks(base) {
                    assert!((row.iter().sum::<f64>() - 1.0).abs() < 1e-12);
                }
            }
        }
    }

    #[test]
    fn exact_rule_at_the_same_size_is_the_identity() {
        let weights = interpolation(7, 7, ResizeRule::Size);
        for (i, weight) in weights.iter().enumerate() {
            assert!((weight - f64::from(i % 8 == 0)).abs() < 1e-12);
        }
    }

    #[test]
    fn fixed_positions_are_sines_and_cosines_of_row_and_column() {
        let positions = sin_cos_positions(3, 8);
        // row 2, column 1: frequencies 1 and 10⁴^(−1/2)
        let expected = [2.0f64.sin(), 0.02f64.sin(), 2.0f64.cos(), 0.02f64.cos()].into_iter().chain([
            1.0f64.sin(),
            0.01f64.sin(),
            1.0f64.cos(),
            0.01f64.cos(),
        ]);
        for (found, expected) in positions[7 * 8..8 * 8].iter().zip(expected) {
            assert!((f64::from(*found) - expected).abs() < 1e-7, "{found} {expected}");
        }
    }

    #[test]
    fn gradient_passes_through_the_resize() -> Result<()> {
        let device = Device::Cpu;
        let variable = candle_core::Var::from_tensor(&Tensor::randn(0f32, 1.0, (1, 16, 3), &device)?)?;
        let embedding = PositionEmbedding::new(variable.as_tensor().clone(), ResizeRule::Offset)?;
        let loss = embedding.resized((2, 5))?.sum_all()?;
        let gradients = loss.backward()?;
        let gradient = gradients.get(&variable).expect("gradient").sum_all()?.to_scalar::<f32>()?;
        // every target row has weights that sum to one: 10 targets of 3 channels
        assert!((gradient - 30.0).abs() < 1e-3);
        Ok(())
    }
}
