//! Writing `.pass` files (feature `alloc`): the host's quantizer hands in numbers, the layout is decided here.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use xxhash_rust::xxh3::xxh3_64;

use crate::error::{Error, Problem, Result};
use crate::features;
use crate::format::{
    ALIGNMENT, Architecture, Contract, Header, INPUT_MULTIPLE, Kind, MAGIC, Mode, Normalization, PANEL,
    PREAMBLE, SelfTest, TensorEntry, TensorSpec, VERSION, Visit, walk_block, walk_embedding, walk_tail,
};
use crate::image::Image;
use crate::kernels::Kernel;
use crate::model::Model;
use crate::scratch::{ScratchBuffer, ScratchLen};
use crate::self_test::digest;

/// The numbers of one tensor, row-major, without padding.
#[derive(Clone, Debug, PartialEq)]
pub enum TensorData {
    /// For [`Kind::F32`].
    F32(Vec<f32>),
    /// For [`Kind::Int8`].
    Int8(Vec<i8>),
}

/// Everything in a file that is not a tensor.
#[derive(Clone, Copy, Debug)]
pub struct Description<'a> {
    /// A name for people, at most 64 bytes.
    pub name: &'a str,
    /// Sizes.
    pub architecture: Architecture,
    /// Normalization of the pixels (folded into the patch embedding by the caller).
    pub normalization: Normalization,
    /// How finely weights are rounded; the caller keeps to its [`Mode::weight_limit`].
    pub mode: Mode,
    /// Promised accuracy.
    pub contract: Contract,
    /// Seed of the self-test image.
    pub self_test_seed: u64,
}

/// A whole `.pass` file: `tensor(name, rows, columns)` gives the numbers of each tensor that [`crate::format`] lists,
/// except `self_test.feature`, which is computed here together with its digest.
///
/// # Errors
/// [`Error::OutOfRange`] and the like for an impossible description; [`Error::Tensor`] for numbers of the wrong type,
/// in the wrong number or not finite.
pub fn write(
    description: &Description<'_>,
    tensor: &mut dyn FnMut(&str, usize, usize) -> TensorData,
) -> Result<Vec<u8>> {
    let architecture = description.architecture;
    architecture.validate()?;
    let mut collected = Collector { tensor, tensors: Vec::new() };
    walk_embedding(&architecture, &mut collected)?;
    for block in 0..architecture.depth as usize {
        walk_block(&architecture, block, &mut collected)?;
    }
    walk_tail(&architecture, &mut collected)?;
    let mut tensors = collected.tensors;

    let mut self_test = SelfTest { seed: description.self_test_seed, digest: 0 };
    let draft = assemble(description, self_test, &tensors)?;
    let model = Model::from_verified_bytes(&draft)?;
    let mut scratch = ScratchBuffer::new(ScratchLen::of(&architecture));
    let mut out = vec![0.0; model.output_len()];
    let image = Image::generated(self_test.seed, architecture.image_size());
    features(&model, &image, Kernel::Scalar, &mut scratch.scratch(), &mut out)?;
    self_test.digest = digest(&out);
    if let Some(last) = tensors.last_mut() {
        last.bytes = out.iter().take(architecture.dim()).flat_map(|value| value.to_le_bytes()).collect();
    }
    assemble(description, self_test, &tensors)
}

/// The bytes of an int8 tensor in panels, from row-major `[rows, columns]`.
pub fn pack_panels(values: &[i8], rows: usize, columns: usize) -> Vec<u8> {
    let inputs = columns.next_multiple_of(INPUT_MULTIPLE);
    let mut packed = vec![0; rows.next_multiple_of(PANEL) * inputs];
    for (row, values) in values.chunks_exact(columns).take(rows).enumerate() {
        for (column, value) in values.iter().enumerate() {
            let at = row / PANEL * PANEL * inputs + column / 4 * (4 * PANEL) + row % PANEL * 4 + column % 4;
            packed[at] = value.cast_unsigned();
        }
    }
    packed
}

struct NamedTensor {
    name: String,
    spec: TensorSpec,
    bytes: Vec<u8>,
}

struct Collector<'t> {
    tensor: &'t mut dyn FnMut(&str, usize, usize) -> TensorData,
    tensors: Vec<NamedTensor>,
}

impl Visit for Collector<'_> {
    type Tensor = ();

    fn tensor(&mut self, spec: TensorSpec) -> Result<()> {
        let name = match spec.block {
            Some(block) => format!("blocks.{block}.{}", spec.name),
            None => spec.name.to_owned(),
        };
        let computed_here = spec.name == "self_test.feature";
        let data = if computed_here {
            TensorData::F32(vec![0.0; spec.columns])
        } else {
            (self.tensor)(&name, spec.rows, spec.columns)
        };
        let expected = spec.rows * spec.columns;
        let bytes = match (spec.kind, data) {
            (Kind::F32, TensorData::F32(values)) if values.len() == expected => {
                if !values.iter().all(|value| value.is_finite()) {
                    return Err(spec.error(Problem::NotFinite));
                }
                values.iter().flat_map(|value| value.to_le_bytes()).collect()
            }
            (Kind::Int8, TensorData::Int8(values)) if values.len() == expected => {
                pack_panels(&values, spec.rows, spec.columns)
            }
            (Kind::F32, TensorData::F32(_)) | (Kind::Int8, TensorData::Int8(_)) => {
                return Err(spec.error(Problem::Length));
            }
            _ => return Err(spec.error(Problem::Kind)),
        };
        self.tensors.push(NamedTensor { name, spec, bytes });
        Ok(())
    }
}

fn assemble(description: &Description<'_>, self_test: SelfTest, tensors: &[NamedTensor]) -> Result<Vec<u8>> {
    let header = Header {
        name: description.name,
        architecture: description.architecture,
        normalization: description.normalization,
        mode: description.mode,
        contract: description.contract,
        self_test,
        tensors: tensors.len() as u32,
    };
    header.validate()?;
    // offsets are varints in the header that precedes them: repeat until its length no longer changes
    let mut header_bytes = Vec::new();
    loop {
        let length = header_bytes.len();
        header_bytes = encode_header(&header, tensors, length)?;
        if header_bytes.len() == length {
            break;
        }
    }
    let mut file = Vec::new();
    file.extend_from_slice(&MAGIC);
    file.extend_from_slice(&VERSION.to_le_bytes());
    file.extend_from_slice(&(header_bytes.len() as u32).to_le_bytes());
    file.extend_from_slice(&header_bytes);
    for tensor in tensors {
        file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
        file.extend_from_slice(&tensor.bytes);
    }
    let checksum = xxh3_64(&file);
    file.extend_from_slice(&checksum.to_le_bytes());
    Ok(file)
}

/// Header and table for a header of `length` bytes.
fn encode_header(header: &Header<'_>, tensors: &[NamedTensor], length: usize) -> Result<Vec<u8>> {
    let mut bytes = postcard::to_extend(header, Vec::new()).map_err(|_| Error::Header)?;
    let mut end = PREAMBLE + length;
    for tensor in tensors {
        let offset = end.next_multiple_of(ALIGNMENT);
        end = offset + tensor.bytes.len();
        let entry = TensorEntry {
            name: &tensor.name,
            kind: tensor.spec.kind,
            shape: (tensor.spec.rows as u32, tensor.spec.columns as u32),
            offset: offset as u64,
        };
        bytes = postcard::to_extend(&entry, bytes).map_err(|_| Error::Header)?;
    }
    Ok(bytes)
}
