//! The numbers of a `.pass` file by name, for what is made from it (`export --quantized`).

use std::collections::HashMap;
use std::path::Path;

use ndarray::{Array1, Array2};
use pass_edge::format::{Architecture, Contract, Header, Kind, Mode, Normalization, TensorEntry};
use pass_edge::model::Model;

use super::QuantizeError;
use super::float_vit::{Block, FloatVit, Linear, Norm};

/// Bytes before the header, whose length is the last four of them.
const PREAMBLE: usize = 16;
/// Outputs in a panel of int8 weights, and inputs in a group of it (see [`pass_edge::format`]).
const PANEL: usize = 16;
/// Inputs in a group.
const GROUP: usize = 4;

/// A tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    /// Row-major.
    Floats(Vec<f32>),
    /// Row-major, without the padding of the file.
    Int8s(Vec<i8>),
}

/// A whole file, checked.
#[derive(Clone, Debug)]
pub struct PassFile {
    /// Every size.
    pub architecture: Architecture,
    /// 8-bit or 7-bit weights.
    pub mode: Mode,
    /// The accuracy it promises.
    pub contract: Contract,
    /// How pixels were normalized; part of the patch embedding.
    pub normalization: Normalization,
    tensors: HashMap<String, Values>,
}

impl PassFile {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// [`QuantizeError`] for a file that cannot be read, and for everything that the device refuses.
    pub fn open(path: &Path) -> Result<Self, QuantizeError> {
        let bytes =
            std::fs::read(path).map_err(|source| QuantizeError::Read { path: path.into(), source })?;
        let device = |error| QuantizeError::Device { path: Some(path.into()), error };
        let model = Model::from_bytes(&bytes).map_err(device)?;
        let header = pass_edge::Error::Header;
        let tensors = tensors(&bytes).ok_or(header).map_err(device)?;
        Ok(Self {
            architecture: *model.architecture(),
            mode: model.mode(),
            contract: *model.contract(),
            normalization: *model.normalization(),
            tensors,
        })
    }

    /// The float tensor of that name.
    ///
    /// # Errors
    /// If the file has none.
    pub fn floats(&self, name: &str) -> Result<&[f32], QuantizeError> {
        match self.tensors.get(name) {
            Some(Values::Floats(values)) => Ok(values),
            _ => Err(missing(name)),
        }
    }

    /// The int8 weights of that name, `[out, in]`.
    ///
    /// # Errors
    /// If the file has none.
    pub fn int8s(&self, name: &str) -> Result<&[i8], QuantizeError> {
        match self.tensors.get(name) {
            Some(Values::Int8s(values)) => Ok(values),
            _ => Err(missing(name)),
        }
    }

    /// The float network of the rounded weights.
    ///
    /// # Errors
    /// If a tensor is missing.
    pub fn dequantized(&self) -> Result<FloatVit, QuantizeError> {
        let (patches, dim) = (self.architecture.patches(), self.architecture.dim());
        let prefix = match self.architecture.prefix_tokens() {
            0 => Array2::zeros((0, dim)),
            tokens => self.matrix("prefix_tokens", tokens, dim)?,
        };
        let block = |block: u32| {
            let name = |layer: &str| format!("blocks.{block}.{layer}");
            Ok(Block {
                norm1: self.norm(&name("norm1"))?,
                qkv: self.linear(&name("attn.qkv"))?,
                proj: self.linear(&name("attn.proj"))?,
                norm2: self.norm(&name("norm2"))?,
                fc1: self.linear(&name("mlp.fc1"))?,
                fc2: self.linear(&name("mlp.fc2"))?,
            })
        };
        Ok(FloatVit {
            architecture: self.architecture,
            normalization: self.normalization,
            patch: self.linear("patch_embed.proj")?,
            positions: self.matrix("pos_embed", patches, dim)?,
            prefix,
            blocks: (0..self.architecture.depth).map(block).collect::<Result<_, QuantizeError>>()?,
            norm: if self.architecture.final_norm { Some(self.norm("norm")?) } else { None },
        })
    }

    fn matrix(&self, name: &str, rows: usize, columns: usize) -> Result<Array2<f32>, QuantizeError> {
        Array2::from_shape_vec((rows, columns), self.floats(name)?.to_vec()).map_err(|_| missing(name))
    }

    fn norm(&self, layer: &str) -> Result<Norm, QuantizeError> {
        let part =
            |part: &str| self.floats(&format!("{layer}.{part}")).map(|values| Array1::from(values.to_vec()));
        Ok(Norm { weight: part("weight")?, bias: part("bias")? })
    }

    fn linear(&self, layer: &str) -> Result<Linear, QuantizeError> {
        let part = |part: &str| self.floats(&format!("{layer}.{part}"));
        let (scale, bias) = (part("scale")?, Array1::from(part("bias")?.to_vec()));
        let name = format!("{layer}.weight");
        let weight = self.int8s(&name)?;
        let inputs = weight.len() / bias.len();
        let values = weight.iter().enumerate().map(|(at, value)| f32::from(*value) * scale[at / inputs]);
        let weight = Array2::from_shape_vec((bias.len(), inputs), values.collect());
        Ok(Linear { weight: weight.map_err(|_| missing(&name))?, bias })
    }
}

fn missing(name: &str) -> QuantizeError {
    candle_core::Error::Msg(format!("tensor `{name}` is missing")).into()
}

/// Every tensor of the table; `None` for a table that a checked file does not have.
fn tensors(file: &[u8]) -> Option<HashMap<String, Values>> {
    let (preamble, rest) = file.split_first_chunk::<PREAMBLE>()?;
    let length = u32::from_le_bytes(*preamble.last_chunk()?) as usize;
    let (header, mut table) = postcard::take_from_bytes::<Header<'_>>(rest.get(..length)?).ok()?;
    let mut tensors = HashMap::new();
    for _ in 0..header.tensors {
        let (entry, left) = postcard::take_from_bytes::<TensorEntry<'_>>(table).ok()?;
        table = left;
        let stored = file.get(usize::try_from(entry.offset).ok()?..)?;
        let (rows, columns) = (entry.shape.0 as usize, entry.shape.1 as usize);
        let values = match entry.kind {
            Kind::F32 => {
                let (numbers, _) = stored.get(..4 * rows * columns)?.as_chunks();
                Values::Floats(numbers.iter().map(|&number| f32::from_le_bytes(number)).collect())
            }
            Kind::Int8 => Values::Int8s(unpacked(stored, rows, columns)?),
        };
        tensors.insert(entry.name.to_owned(), values);
    }
    Some(tensors)
}

/// Int8 weights in panels as rows.
fn unpacked(panels: &[u8], rows: usize, columns: usize) -> Option<Vec<i8>> {
    let padded = columns.next_multiple_of(PANEL);
    let mut values = Vec::with_capacity(rows * columns);
    for row in 0..rows {
        let panel = panels.get(row / PANEL * PANEL * padded..)?;
        for column in 0..columns {
            let at = column / GROUP * GROUP * PANEL + row % PANEL * GROUP + column % GROUP;
            values.push(panel.get(at)?.cast_signed());
        }
    }
    Some(values)
}

#[cfg(test)]
mod tests {
    use pass_edge::writer::{Description, TensorData, write};

    use super::*;

    #[test]
    fn every_tensor_comes_back_as_it_was_given_to_the_writer() {
        let architecture = Architecture {
            dim: 32,
            depth: 2,
            heads: 2,
            hidden: 48,
            patch_size: 3,
            grid: (2, 3),
            class_token: true,
            register_tokens: 1,
            final_norm: true,
            layer_scale_folded: false,
            pca_components: 0,
        };
        let contract =
            Contract { images: 1, images_hash: 2, mean_cosine: 0.9, first_percentile: 0.8, min_cosine: 0.7 };
        let description = Description {
            name: "tiny",
            architecture,
            normalization: Normalization { mean: [0.0; 3], std: [1.0; 3] },
            mode: Mode::Exact,
            contract,
            self_test_seed: 1,
        };
        let mut given = HashMap::new();
        let mut state = 0_u32;
        let bytes = write(&description, &mut |name: &str, rows: usize, columns: usize| {
            let mut next = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as i32 % 255 - 127
            };
            let values: Vec<i32> = (0..rows * columns).map(|_| next()).collect();
            let linear = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "patch_embed.proj"];
            if name.ends_with(".weight") && linear.iter().any(|layer| name.contains(layer)) {
                let values: Vec<i8> = values.iter().map(|value| *value as i8).collect();
                given.insert(name.to_owned(), Values::Int8s(values.clone()));
                return TensorData::Int8(values);
            }
            let values: Vec<f32> = values.iter().map(|value| *value as f32 / 127.0).collect();
            given.insert(name.to_owned(), Values::Floats(values.clone()));
            TensorData::F32(values)
        })
        .unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tiny.pass");
        std::fs::write(&path, &bytes).unwrap();
        let file = PassFile::open(&path).unwrap();
        assert_eq!((file.architecture, file.contract, file.mode), (architecture, contract, Mode::Exact));
        for (name, values) in &given {
            assert_eq!(file.tensors.get(name), Some(values), "{name}");
        }
        let vit = file.dequantized().unwrap();
        let (Values::Int8s(weights), Values::Floats(scales)) =
            (&given["blocks.1.mlp.fc1.weight"], &given["blocks.1.mlp.fc1.scale"])
        else {
            panic!("kinds")
        };
        assert_eq!(vit.blocks[1].fc1.weight[[47, 31]], f32::from(weights[47 * 32 + 31]) * scales[47]);
        assert!(file.floats("pos_embed.weight").is_err() && file.int8s("pos_embed").is_err());

        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        let error = PassFile::open(&path).unwrap_err().to_string();
        assert!(error.contains("tiny.pass"), "{error}");
    }
}
