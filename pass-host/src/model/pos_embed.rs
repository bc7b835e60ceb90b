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

/// Learned embeddings of a square grid `[1, base², D]` and their resized versions.
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
