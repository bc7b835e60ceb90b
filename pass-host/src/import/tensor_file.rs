//! A file of named tensors, opened to read some of them: of PyTorch or safetensors, told apart by how it starts.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use flate2::Crc;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use super::error::Problem;
use super::{torch, zip};

/// Bytes looked at to tell what a file is.
const HEAD: u64 = 512;
/// Bytes of the header of a safetensors file, as its reader allows.
const LARGEST_HEADER: u64 = 100_000_000;
/// Where an archive of the `tar` program, the format of PyTorch before 0.2, says what it is.
const TAR_MARK: (usize, &[u8]) = (257, b"ustar");

/// What a tensor is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Element {
    /// Floating-point numbers.
    Float(DType),
    /// Anything else, by its name; no weight is made of it.
    Other(String),
}

/// Values in the file, one after the other.
#[derive(Clone, Debug)]
pub(super) struct Storage {
    pub(super) bytes: Range<u64>,
    pub(super) crc: Option<u32>,
}

/// A tensor that was not read yet.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) shape: Vec<usize>,
    /// In elements, one for each axis.
    pub(super) strides: Vec<usize>,
    /// The first element, counted from the start of the storage.
    pub(super) offset: usize,
    pub(super) element: Element,
    pub(super) storage: Storage,
}

/// Tensors by name.
pub(super) type Entries = BTreeMap<String, Entry>;

/// An open file.
#[derive(Debug)]
pub(super) struct TensorFile {
    file: File,
    /// The dictionaries of the file by their key; that of the tensors at the top by the empty one.
    pub(super) parts: BTreeMap<String, Entries>,
    /// Starts of the storages whose checksum is right.
    intact: HashSet<u64>,
}

impl TensorFile {
    /// Finds the tensors of a file.
    ///
    /// # Errors
    /// [`Problem`] for a file that is cut, damaged or of another kind.
    pub(super) fn open(path: &Path) -> Result<Self, Problem> {
        let mut file = File::open(path).map_err(Problem::Read)?;
        let mut head = Vec::new();
        (&mut file).take(HEAD).read_to_end(&mut head).map_err(Problem::Read)?;
        let parts = if head.starts_with(zip::START) {
            torch::archive(&mut file)?
        } else if head.starts_with(torch::LEGACY_START) {
            torch::legacy(&mut file)?
        } else if head.get(8) == Some(&b'{') {
            BTreeMap::from([(String::new(), safetensors(&mut file)?)])
        } else {
            let (at, mark) = TAR_MARK;
            let tar = head.get(at..).is_some_and(|rest| rest.starts_with(mark));
            return Err(if tar { Problem::Tar } else { Problem::NoTensors { start: start_of(&head) } });
        };
        Ok(Self { file, parts, intact: HashSet::new() })
    }

    /// The values of a tensor, row-major.
    ///
    /// # Errors
    /// [`Problem`] for values that lie outside their storage, are damaged, no floating-point numbers or not finite.
    pub(super) fn read(&mut self, name: &str, entry: &Entry) -> Result<Vec<f32>, Problem> {
        let unexpected = |field, expected: &str, found| Problem::unexpected(name, field, expected, found);
        let dtype = match &entry.element {
            Element::Float(dtype) => *dtype,
            Element::Other(other) => return Err(unexpected("numbers", "floating-point ones", other.clone())),
        };
        let size = dtype.size_in_bytes() as u64;
        let held = (entry.storage.bytes.end - entry.storage.bytes.start) / size;
        let outside = || {
            let Entry { shape, strides, offset, .. } = entry;
            let found = format!("shape {shape:?}, strides {strides:?}, offset {offset}");
            unexpected("place", &format!("each of its values once among the {held} stored"), found)
        };
        let (count, span) = extent(&entry.shape, &entry.strides).ok_or_else(outside)?;
        if count == 0 {
            return Ok(Vec::new());
        }
        let end = (entry.offset as u64).checked_add(span as u64).ok_or_else(outside)?;
        if end > held || count > span {
            return Err(outside());
        }
        let start = entry.offset as u64 * size;
        let bytes = self.bytes(name, &entry.storage, start..end * size)?;
        let stored: Vec<f32> =
            Tensor::from_raw_buffer(&bytes, dtype, &[span], &Device::Cpu)?.to_dtype(DType::F32)?.to_vec1()?;
        let values = match count == span && is_row_major(&entry.shape, &entry.strides) {
            true => stored,
            false => gather(&stored, &entry.shape, &entry.strides, count),
        };
        match values.iter().find(|value| !value.is_finite()) {
            Some(value) => Err(unexpected("values", "finite numbers", value.to_string())),
            None => Ok(values),
        }
    }

    /// A range of a storage, whose checksum is looked at the first time.
    fn bytes(&mut self, name: &str, storage: &Storage, range: Range<u64>) -> Result<Vec<u8>, Problem> {
        let unchecked = storage.crc.filter(|_| !self.intact.contains(&storage.bytes.start));
        let Some(expected) = unchecked else {
            let start = storage.bytes.start + range.start;
            return read_range(&mut self.file, start..start + (range.end - range.start));
        };
        let bytes = read_range(&mut self.file, storage.bytes.clone())?;
        let mut crc = Crc::new();
        crc.update(&bytes);
        if crc.sum() != expected {
            return Err(Problem::Checksum { name: name.into() });
        }
        self.intact.insert(storage.bytes.start);
        Ok(bytes[range.start as usize..range.end as usize].to_vec())
    }
}

/// Bytes of the file, all of them or an error that tells where it ends.
pub(super) fn read_range(file: &mut File, range: Range<u64>) -> Result<Vec<u8>, Problem> {
    let mut bytes = Vec::new();
    let wanted = range.end.saturating_sub(range.start);
    let read =
        file.seek(SeekFrom::Start(range.start)).and_then(|_| file.take(wanted).read_to_end(&mut bytes));
    let found = read.map_err(Problem::Read)? as u64;
    match found == wanted {
        true => Ok(bytes),
        false => Err(Problem::Cut { found: range.start + found, expected: Some(range.end) }),
    }
}

/// The tensors of a safetensors file.
fn safetensors(file: &mut File) -> Result<Entries, Problem> {
    let found = file.seek(SeekFrom::End(0)).map_err(Problem::Read)?;
    let length = read_range(file, 0..8)?.try_into().map(u64::from_le_bytes).unwrap_or(u64::MAX);
    if length > LARGEST_HEADER {
        let expected = format!("at most {LARGEST_HEADER} bytes");
        return Err(Problem::unexpected("header", "length", expected, length.to_string()));
    }
    let start = 8 + length;
    let header = read_range(file, 8..start)?;
    let metadata: Metadata = serde_json::from_slice(&header).map_err(Problem::Header)?;
    let expected = start + metadata.data_len() as u64;
    if found != expected {
        return Err(Problem::Cut { found, expected: Some(expected) });
    }
    let entry = |info: &TensorInfo| Entry {
        strides: row_major(&info.shape),
        shape: info.shape.clone(),
        offset: 0,
        element: match info.dtype {
            Dtype::F64 => Element::Float(DType::F64),
            Dtype::F32 => Element::Float(DType::F32),
            Dtype::F16 => Element::Float(DType::F16),
            Dtype::BF16 => Element::Float(DType::BF16),
            other => Element::Other(format!("{other:?}")),
        },
        storage: Storage {
            bytes: start + info.data_offsets.0 as u64..start + info.data_offsets.1 as u64,
            crc: None,
        },
    };
    Ok(metadata.tensors().into_iter().map(|(name, info)| (name, entry(info))).collect())
}

/// Strides of a tensor without gaps.
fn row_major(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1usize; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis].saturating_mul(shape[axis]);
    }
    strides
}

/// Whether the values lie row by row; strides of axes of length 1 mean nothing.
fn is_row_major(shape: &[usize], strides: &[usize]) -> bool {
    let expected = row_major(shape);
    shape.iter().zip(strides).zip(&expected).all(|((side, found), expected)| *side == 1 || found == expected)
}

/// Number of values, and length of the stretch of storage they lie in; nothing if they fit no memory.
fn extent(shape: &[usize], strides: &[usize]) -> Option<(usize, usize)> {
    if shape.len() != strides.len() {
        return None;
    }
    let count = shape.iter().try_fold(1usize, |product, side| product.checked_mul(*side))?;
    if count == 0 {
        return Some((0, 0));
    }
    let last = shape
        .iter()
        .zip(strides)
        .try_fold(0usize, |sum, (side, stride)| sum.checked_add((side - 1).checked_mul(*stride)?))?;
    Some((count, last.checked_add(1)?))
}

/// Strided values in row-major order.
fn gather(stored: &[f32], shape: &[usize], strides: &[usize], count: usize) -> Vec<f32> {
    let mut values = Vec::with_capacity(count);
    let mut position = vec![0usize; shape.len()];
    let mut at = 0;
    for _ in 0..count {
        values.push(stored[at]);
        for axis in (0..shape.len()).rev() {
            position[axis] += 1;
            at += strides[axis];
            if position[axis] < shape[axis] {
                break;
            }
            at -= shape[axis] * strides[axis];
            position[axis] = 0;
        }
    }
    values
}

/// How a file starts, for people.
fn start_of(head: &[u8]) -> String {
    match head {
        [] => "nothing".into(),
        head => format!("`{}`", head[..head.len().min(16)].escape_ascii()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strided_values_come_row_by_row() {
        let stored: Vec<f32> = (0..12).map(|value| value as f32).collect();
        // a [3, 4] matrix, transposed; every second column of it; a channels-last image
        assert_eq!(gather(&stored, &[4, 3], &[1, 4], 12)[..4], [0.0, 4.0, 8.0, 1.0]);
        assert_eq!(gather(&stored, &[3, 2], &[4, 2], 6), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(gather(&stored, &[2, 2, 3], &[1, 6, 2], 12)[..4], [0.0, 2.0, 4.0, 6.0]);
        assert_eq!(gather(&[7.0], &[], &[], 1), [7.0]);
    }

    #[test]
    fn extents_never_overflow() {
        assert_eq!(extent(&[3, 4], &[4, 1]), Some((12, 12)));
        assert_eq!(extent(&[3, 4], &[1, 3]), Some((12, 12)));
        assert_eq!(extent(&[0, usize::MAX], &[1, 1]), Some((0, 0)));
        assert_eq!(extent(&[2, 2], &[usize::MAX, 1]), None);
        assert_eq!(extent(&[usize::MAX, 2], &[0, 0]), None);
        assert_eq!(extent(&[2], &[1, 1]), None);
        assert!(is_row_major(&[1, 5, 1], &[77, 1, 9]) && !is_row_major(&[2, 2], &[1, 2]));
    }
}
