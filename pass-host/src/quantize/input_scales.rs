//! One scale for each tensor that meets int8 weights, measured on photos: for runtimes whose int8 kernels take no other.
//!
//! The device needs none of this, it has a scale per token. A scale maps ±127 to a range; values beyond are clipped. Of some shares of the
//! largest magnitude, each tensor takes the one with the smallest error of rounding and clipping together: squared, over the squared
//! values of its token, averaged over the tokens. Tensors that lose too much even so, because a few tokens are much larger than all
//! others, stay float.

use std::collections::HashMap;

use ndarray::{Array2, ArrayView1};

use super::float_vit::AtInput;
use super::pass_file::PassFile;
use super::{Photos, QuantizeError};

/// Ranges that are tried, as shares of the largest magnitude.
const SHARES: [f32; 14] = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05];
/// Error above which a tensor stays float. With all 48 tensors of a DINOv2 ViT-S/14 in int8 the mean cosine of its patch tokens to
/// float was 0.990, without the 9 beyond this 0.9988.
const MOST_LOST: f64 = 1e-3;
/// Largest magnitude of an int8 activation.
const LIMIT: f32 = 127.0;
/// The linear maps of a block in the order of [`AtInput`].
const LAYERS: [&str; 4] = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"];

/// Scales by the name of the layer whose input they are of; tensors without one stay float.
#[derive(Clone, Debug)]
pub struct InputScales(HashMap<String, f32>);

impl InputScales {
    /// The scale of the input of a layer.
    pub fn of(&self, layer: &str) -> Option<f32> {
        self.0.get(layer).copied()
    }

    /// How many tensors have one.
    pub fn count(&self) -> usize {
        self.0.len()
    }
}

/// Measures the inputs of the linear maps of `file` on up to `images` photos of `sources`.
///
/// # Errors
/// [`QuantizeError`] if there is no photo that can be used.
pub fn measure(file: &PassFile, sources: &[String], images: usize) -> Result<InputScales, QuantizeError> {
    let vit = file.dequantized()?;
    let photos = Photos::read(sources, images, &vit, |_, _| {})?;
    let heads = vit.architecture.heads as usize;
    let mut tokens: Vec<Array2<f32>> = photos.views.iter().map(|view| vit.embed(view.data())).collect();
    let mut scales = HashMap::new();
    for (index, block) in vit.blocks.iter().enumerate() {
        let mut largest = Largest([0.0; 4]);
        for x in &tokens {
            block.forward(&mut x.clone(), heads, &mut largest);
        }
        let mut errors = Errors::of(largest.0);
        for x in &mut tokens {
            block.forward(x, heads, &mut errors);
        }
        for (layer, name) in LAYERS.into_iter().enumerate() {
            let (share, lost) = errors.best(layer);
            if lost <= MOST_LOST {
                scales.insert(format!("blocks.{index}.{name}"), scale(errors.largest[layer], share));
            }
        }
    }
    Ok(InputScales(scales))
}

/// A scale that nothing is divided by zero with.
fn scale(largest: f32, share: f32) -> f32 {
    (largest * share / LIMIT).max(f32::MIN_POSITIVE)
}

/// The largest magnitude of every input.
struct Largest([f32; 4]);

impl AtInput for Largest {
    fn at_input(&mut self, layer: usize, x: Array2<f32>) -> Array2<f32> {
        self.0[layer] = x.iter().fold(self.0[layer], |most, value| most.max(value.abs()));
        x
    }
}

/// The error of every range, summed over tokens, and how many they are.
struct Errors {
    largest: [f32; 4],
    sums: [[f64; SHARES.len()]; 4],
    tokens: [usize; 4],
}

impl Errors {
    fn of(largest: [f32; 4]) -> Self {
        Self { largest, sums: [[0.0; SHARES.len()]; 4], tokens: [0; 4] }
    }

    /// The share with the smallest error, and that error.
    fn best(&self, layer: usize) -> (f32, f64) {
        let sums = &self.sums[layer];
        let best = (0..SHARES.len()).min_by(|a, b| sums[*a].total_cmp(&sums[*b])).unwrap_or(0);
        (SHARES[best], sums[best] / self.tokens[layer].max(1) as f64)
    }
}

impl AtInput for Errors {
    fn at_input(&mut self, layer: usize, x: Array2<f32>) -> Array2<f32> {
        for token in x.rows() {
            let energy: f64 = token.iter().map(|value| f64::from(*value).powi(2)).sum();
            for (sum, share) in self.sums[layer].iter_mut().zip(SHARES) {
                let error = squared_error(token, scale(self.largest[layer], share));
                *sum += error / energy.max(f64::MIN_POSITIVE);
            }
            self.tokens[layer] += 1;
        }
        x
    }
}

/// Of a token after rounding to ±127 steps of `scale`.
fn squared_error(x: ArrayView1<'_, f32>, scale: f32) -> f64 {
    let error = |value: &f32| {
        let rounded = (value / scale).round_ties_even().clamp(-LIMIT, LIMIT) * scale;
        f64::from(value - rounded).powi(2)
    };
    x.iter().map(error).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lone_outlier_is_clipped_an_even_spread_is_not_and_a_few_huge_tokens_lose_too_much() {
        let best = |x: &Array2<f32>| {
            let mut largest = Largest([0.0; 4]);
            largest.at_input(2, x.clone());
            let mut errors = Errors::of(largest.0);
            errors.at_input(2, x.clone());
            errors.best(2)
        };
        let even = Array2::from_shape_fn((40, 50), |(i, j)| (i * 50 + j) as f32 / 1000.0 - 1.0);
        let (share, lost) = best(&even);
        assert!(share == 1.0 && lost < MOST_LOST, "{lost}");
        let mut outlier = Array2::from_shape_fn((400, 50), |(i, j)| ((i * 50 + j) % 99) as f32 / 99.0 - 0.5);
        outlier[[0, 0]] = 30.0;
        assert!(best(&outlier).0 < 0.5);
        let mut huge = even.clone();
        huge.row_mut(0).mapv_inplace(|value| 60.0 * value);
        let (share, lost) = best(&huge);
        assert!(lost > MOST_LOST, "{share} {lost}");
        assert_eq!(best(&Array2::zeros((2, 3))).1, 0.0);
    }
}
