//! The float forward pass that the int8 one stands for.

use crate::random_vit::{FloatVit, NORMALIZATION};

impl FloatVit {
    /// Features in float, `[N + P, D]` in the order of the device: patch tokens first.
    pub(crate) fn forward(&self, rgb: &[u8]) -> Vec<f32> {
        let a = &self.architecture;
        let (dim, side, columns) = (a.dim(), a.patch_size as usize, a.grid.1 as usize);
        let width = a.image_size().1;
        let mut patches = Vec::new();
        for patch in 0..a.patches() {
            for channel in 0..3 {
                for pixel in 0..side * side {
                    let (y, x) =
                        (patch / columns * side + pixel / side, patch % columns * side + pixel % side);
                    let value = f32::from(rgb[3 * (y * width + x) + channel]) / 255.0;
                    patches.push((value - NORMALIZATION.mean[channel]) / NORMALIZATION.std[channel]);
                }
            }
        }
        let mut x = self.linear("patch_embed.proj", &patches);
        add(&mut x, self.tensor("pos_embed"));
        x.extend_from_slice(self.tensor("prefix_tokens"));
        for block in 0..a.depth {
            let name = |part: &str| format!("blocks.{block}.{part}");
            let qkv = self.linear(&name("attn.qkv"), &self.norm(&name("norm1"), &x));
            add(&mut x, &self.linear(&name("attn.proj"), &attention(&qkv, dim, a.heads as usize)));
            let mut hidden = self.linear(&name("mlp.fc1"), &self.norm(&name("norm2"), &x));
            hidden.iter_mut().for_each(|h| *h = pass_edge::core::math::gelu(*h));
            add(&mut x, &self.linear(&name("mlp.fc2"), &hidden));
        }
        if a.final_norm { self.norm("norm", &x) } else { x }
    }

    fn linear(&self, layer: &str, x: &[f32]) -> Vec<f32> {
        let (weight, bias) = (self.tensor(&format!("{layer}.weight")), self.tensor(&format!("{layer}.bias")));
        let inputs = weight.len() / bias.len();
        let row = |x: &[f32]| {
            let outputs = weight.chunks_exact(inputs).zip(bias);
            outputs.map(|(w, b)| b + pass_edge::core::math::dot(w, x)).collect::<Vec<_>>()
        };
        x.chunks_exact(inputs).flat_map(row).collect()
    }

    fn norm(&self, name: &str, x: &[f32]) -> Vec<f32> {
        let (weight, bias) = (self.tensor(&format!("{name}.weight")), self.tensor(&format!("{name}.bias")));
        let row = |x: &[f32]| {
            let mean = x.iter().sum::<f32>() / x.len() as f32;
            let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / x.len() as f32;
            let normed = x.iter().map(|x| (x - mean) / (variance + 1e-6).sqrt());
            normed.zip(weight).zip(bias).map(|((x, w), b)| x * w + b).collect::<Vec<_>>()
        };
        x.chunks_exact(weight.len()).flat_map(row).collect()
    }
}

fn add(x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len());
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

fn attention(qkv: &[f32], dim: usize, heads: usize) -> Vec<f32> {
    let d = dim / heads;
    let tokens = qkv.len() / (3 * dim);
    let part = |token: usize, part: usize, head: usize| &qkv[token * 3 * dim + part * dim + head * d..][..d];
    let mut out = vec![0.0; tokens * dim];
    for head in 0..heads {
        for query in 0..tokens {
            let score = |key| {
                pass_edge::core::math::dot(part(query, 0, head), part(key, 1, head)) / (d as f32).sqrt()
            };
            let scores: Vec<f32> = (0..tokens).map(score).collect();
            let most = scores.iter().copied().fold(f32::MIN, f32::max);
            let weights: Vec<f32> = scores.iter().map(|score| (score - most).exp()).collect();
            let total: f32 = weights.iter().sum();
            for (key, weight) in weights.iter().enumerate() {
                for (channel, value) in part(key, 2, head).iter().enumerate() {
                    out[query * dim + head * d + channel] += weight / total * value;
                }
            }
        }
    }
    out
}
