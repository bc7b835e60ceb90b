//! Random Vision Transformers and photos, and the plainest quantizer.

use std::collections::BTreeMap;

use pass_edge::format::{Architecture, Contract, Mode, Normalization};
use pass_edge::writer::{Description, TensorData, write};

pub(crate) const NORMALIZATION: Normalization =
    Normalization { mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225] };

/// A model with float weights, by their names in the file (`….weight`, `….bias`).
pub(crate) struct FloatVit {
    pub(crate) architecture: Architecture,
    pub(crate) mode: Mode,
    pub(crate) tensors: BTreeMap<String, Vec<f32>>,
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn uniform(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1_u64 << 24) as f32
    }

    /// About normal: the sum of four uniform numbers, scaled to deviation 1.
    fn normal(&mut self) -> f32 {
        ((0..4).map(|_| self.uniform()).sum::<f32>() - 2.0) * 3.0_f32.sqrt()
    }
}

impl FloatVit {
    pub(crate) fn random(architecture: Architecture, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut tensors = BTreeMap::new();
        let (dim, hidden) = (architecture.dim(), architecture.hidden as usize);
        let mut add = |name: String, len: usize, mean: f32, deviation: f32| {
            tensors.insert(name, (0..len).map(|_| mean + deviation * random.normal()).collect());
        };
        let mut linear = |name: &str, outputs: usize, inputs: usize| {
            add(format!("{name}.weight"), outputs * inputs, 0.0, 1.5 / (inputs as f32).sqrt());
            add(format!("{name}.bias"), outputs, 0.0, 0.1);
        };
        linear("patch_embed.proj", dim, architecture.patch_inputs());
        for block in 0..architecture.depth {
            linear(&format!("blocks.{block}.attn.qkv"), 3 * dim, dim);
            linear(&format!("blocks.{block}.attn.proj"), dim, dim);
            linear(&format!("blocks.{block}.mlp.fc1"), hidden, dim);
            linear(&format!("blocks.{block}.mlp.fc2"), dim, hidden);
        }
        let mut norm = |name: &str| {
            add(format!("{name}.weight"), dim, 1.0, 0.2);
            add(format!("{name}.bias"), dim, 0.0, 0.2);
        };
        for block in 0..architecture.depth {
            norm(&format!("blocks.{block}.norm1"));
            norm(&format!("blocks.{block}.norm2"));
        }
        norm("norm");
        add("pos_embed".to_owned(), architecture.patches() * dim, 0.0, 0.3);
        add("prefix_tokens".to_owned(), architecture.prefix_tokens() * dim, 0.0, 1.0);
        add("pca.mean".to_owned(), dim, 0.0, 1.0);
        add("pca.basis".to_owned(), architecture.pca_components as usize * dim, 0.0, 1.0);
        tensors.insert("contract.block_cosine".to_owned(), vec![1.0; architecture.depth as usize]);
        Self { architecture, mode: Mode::Exact, tensors }
    }

    pub(crate) fn tensor(&self, name: &str) -> &[f32] {
        self.tensors.get(name).unwrap_or_else(|| panic!("no tensor `{name}`"))
    }

    /// Weight and bias as the file holds them: normalization folded into the patch embedding.
    fn folded(&self, layer: &str) -> (Vec<f32>, Vec<f32>) {
        let mut weight = self.tensor(&format!("{layer}.weight")).to_vec();
        let mut bias = self.tensor(&format!("{layer}.bias")).to_vec();
        if layer == "patch_embed.proj" {
            let inputs = self.architecture.patch_inputs();
            for (weight, bias) in weight.chunks_exact_mut(inputs).zip(&mut bias) {
                for (input, weight) in weight.iter_mut().enumerate() {
                    let channel = input / (inputs / 3);
                    let (mean, std) = (NORMALIZATION.mean[channel], NORMALIZATION.std[channel]);
                    *bias += *weight * (128.0 / 255.0 - mean) / std;
                    *weight /= 255.0 * std;
                }
            }
        }
        (weight, bias)
    }

    pub(crate) fn description(&self) -> Description<'static> {
        Description {
            name: "random",
            architecture: self.architecture,
            normalization: NORMALIZATION,
            mode: self.mode,
            contract: Contract {
                images: 0,
                images_hash: 0,
                mean_cosine: 0.99,
                first_percentile: 0.98,
                min_cosine: 0.95,
            },
            self_test_seed: 7,
        }
    }

    /// The `.pass` file: weights to the nearest step per output.
    pub(crate) fn quantized(&self) -> Vec<u8> {
        let mut numbers = |name: &str, _rows: usize, columns: usize| {
            let Some((layer, part)) = name.rsplit_once('.') else {
                return TensorData::F32(self.tensor(name).to_vec());
            };
            if layer.ends_with("norm")
                || layer.ends_with("norm1")
                || layer.ends_with("norm2")
                || !self.tensors.contains_key(&format!("{layer}.weight"))
            {
                return TensorData::F32(self.tensor(name).to_vec());
            }
            let (weight, bias) = self.folded(layer);
            let inputs = weight.len() / bias.len();
            let scale = |row: &[f32]| {
                row.iter().fold(0.0_f32, |most, w| most.max(w.abs())) / f32::from(self.mode.weight_limit())
            };
            match part {
                "weight" => {
                    assert_eq!(columns, inputs, "{name}");
                    let rows = weight.chunks_exact(inputs);
                    TensorData::Int8(
                        rows.flat_map(|row| row.iter().map(|w| (w / scale(row)).round() as i8)).collect(),
                    )
                }
                "scale" => TensorData::F32(weight.chunks_exact(inputs).map(scale).collect()),
                _ => TensorData::F32(bias),
            }
        };
        write(&self.description(), &mut numbers).expect("a valid model")
    }
}

/// A random photo: smooth waves with noise, so that patches differ from each other.
pub(crate) fn photo(architecture: &Architecture, seed: u64) -> Vec<u8> {
    let (height, width) = architecture.image_size();
    let mut random = Random::new(seed);
    let waves: Vec<[f32; 3]> =
        (0..9).map(|_| [random.normal() * 0.1, random.normal() * 0.1, random.normal()]).collect();
    let mut bytes = Vec::with_capacity(3 * height * width);
    for y in 0..height {
        for x in 0..width {
            for channel in 0..3 {
                let wave = |[fy, fx, phase]: &[f32; 3]| (fy * y as f32 + fx * x as f32 + phase).sin();
                let value: f32 = waves[3 * channel..][..3].iter().map(wave).sum();
                bytes.push((128.0 + 35.0 * value + 8.0 * random.normal()) as u8);
            }
        }
    }
    bytes
}
