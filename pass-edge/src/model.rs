//! A validated, borrowed view of a `.pass` file: nothing is copied, nothing allocated.

use xxhash_rust::xxh3::xxh3_64;

use crate::error::{Error, Problem, Result};
use crate::format::{
    ALIGNMENT, Architecture, Block, CHECKSUM, Contract, Embedding, Header, Kind, MAGIC, Mode, Normalization,
    PREAMBLE, SelfTest, Tail, TensorEntry, TensorSpec, VERSION, Visit, floats, walk_block, walk_embedding,
    walk_tail,
};

/// A model read in place.
#[derive(Clone, Copy, Debug)]
pub struct Model<'a> {
    bytes: &'a [u8],
    header: Header<'a>,
    embedding: Embedding<&'a [u8]>,
    tail: Tail<&'a [u8]>,
    blocks_start: usize,
    block_stride: usize,
}

impl<'a> Model<'a> {
    /// Reads a `.pass` file of which `bytes` is the whole: flash, a memory map, a buffer. Alignment does not matter.
    ///
    /// # Errors
    /// Everything that can be wrong with a file; no bytes make this panic.
    pub fn from_bytes(bytes: &'a [u8]) -> Result<Self> {
        check_preamble(bytes)?;
        let (content, stored) = bytes.split_last_chunk::<CHECKSUM>().ok_or(Error::NotAModel)?;
        let (stored, computed) = (u64::from_le_bytes(*stored), xxh3_64(content));
        if stored != computed {
            return Err(Error::Checksum { stored, computed });
        }
        Self::from_verified_bytes(bytes)
    }

    /// [`Model::from_bytes`] without the checksum, for memory that something else vouches for (a boot loader's signature).
    /// Everything else is validated.
    ///
    /// # Errors
    /// As [`Model::from_bytes`].
    pub fn from_verified_bytes(bytes: &'a [u8]) -> Result<Self> {
        let header_bytes = check_preamble(bytes)?;
        let (header, table) =
            postcard::take_from_bytes::<Header<'a>>(header_bytes).map_err(|_| Error::Header)?;
        header.validate()?;
        let architecture = header.architecture;
        let end = bytes.len().checked_sub(CHECKSUM).ok_or(Error::NotAModel)?;
        let file = bytes.get(..end).ok_or(Error::NotAModel)?;
        let mut reader = TableReader {
            tensors: TensorReader { file, at: PREAMBLE + header_bytes.len() },
            table,
            entries: 0,
            weight_limit: header.mode.weight_limit(),
        };
        let embedding = walk_embedding(&architecture, &mut reader)?;
        let blocks_start = reader.tensors.at;
        let mut block_stride = 0;
        for block in 0..architecture.depth as usize {
            walk_block(&architecture, block, &mut reader)?;
            if block == 0 {
                // every block has the same tensors, and a block starts at the alignment of its first tensor
                block_stride =
                    reader.tensors.at.next_multiple_of(ALIGNMENT) - blocks_start.next_multiple_of(ALIGNMENT);
            }
        }
        let tail = walk_tail(&architecture, &mut reader)?;
        if !reader.table.is_empty() || reader.entries != header.tensors {
            return Err(Error::Header);
        }
        if reader.tensors.at != end {
            return Err(Error::LengthMismatch {
                what: "file",
                expected: reader.tensors.at.saturating_add(CHECKSUM),
                actual: bytes.len(),
            });
        }
        Ok(Self {
            bytes: file,
            header,
            embedding,
            tail,
            blocks_start: blocks_start.next_multiple_of(ALIGNMENT),
            block_stride,
        })
    }

    /// Every size.
    pub fn architecture(&self) -> &Architecture {
        &self.header.architecture
    }

    /// A name for people.
    pub fn name(&self) -> &'a str {
        self.header.name
    }

    /// Normalization of the pixels in training; already part of the patch embedding.
    pub fn normalization(&self) -> &Normalization {
        &self.header.normalization
    }

    /// How finely weights are rounded.
    pub fn mode(&self) -> Mode {
        self.header.mode
    }

    /// Promised accuracy.
    pub fn contract(&self) -> &Contract {
        &self.header.contract
    }

    /// Cosine to the float model after each block, as measured by the writer.
    pub fn block_cosines(&self) -> impl ExactSizeIterator<Item = f32> + 'a {
        floats(self.tail.block_cosine)
    }

    /// Mean `[D]` and basis `[components, D]` for pictures of the features, if the file has them.
    pub fn pca(
        &self,
    ) -> Option<(impl ExactSizeIterator<Item = f32> + 'a, impl ExactSizeIterator<Item = f32> + 'a)> {
        self.tail.pca.map(|(mean, basis)| (floats(mean), floats(basis)))
    }

    /// Seed and digest of the self-test.
    pub fn self_test(&self) -> SelfTest {
        self.header.self_test
    }

    /// Patch token 0 of the self-test: how far off a failing device is.
    pub fn self_test_feature(&self) -> impl ExactSizeIterator<Item = f32> + 'a {
        floats(self.tail.self_test)
    }

    /// Numbers that [`crate::features`] writes: `(N + P)·D`.
    pub fn output_len(&self) -> usize {
        self.architecture().tokens() * self.architecture().dim()
    }

    pub(crate) fn embedding(&self) -> &Embedding<&'a [u8]> {
        &self.embedding
    }

    pub(crate) fn tail(&self) -> &Tail<&'a [u8]> {
        &self.tail
    }

    /// The tensors of a block, cut out of the file anew: 18 slices a block need not be kept.
    pub(crate) fn block(&self, block: usize) -> Result<Block<&'a [u8]>> {
        let at = self.blocks_start + block * self.block_stride;
        walk_block(self.architecture(), block, &mut TensorReader { file: self.bytes, at })
    }
}

/// Checks magic, version and header length; gives the header with its table.
fn check_preamble(bytes: &[u8]) -> Result<&[u8]> {
    let (preamble, rest) = bytes.split_first_chunk::<PREAMBLE>().ok_or(Error::NotAModel)?;
    let [magic @ .., v0, v1, v2, v3, l0, l1, l2, l3] = *preamble;
    if magic != MAGIC {
        return Err(Error::NotAModel);
    }
    let found = u32::from_le_bytes([v0, v1, v2, v3]);
    if found != VERSION {
        return Err(Error::UnknownVersion { found, known: VERSION });
    }
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    rest.get(..length).ok_or(Error::LengthMismatch { what: "header", expected: length, actual: rest.len() })
}

/// Cuts tensors out of the file, one after the other.
struct TensorReader<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Visit for TensorReader<'a> {
    type Tensor = &'a [u8];

    fn tensor(&mut self, spec: TensorSpec) -> Result<&'a [u8]> {
        let start = self.at.checked_next_multiple_of(ALIGNMENT).ok_or(spec.error(Problem::Offset))?;
        let end = start.checked_add(spec.bytes()).ok_or(spec.error(Problem::Offset))?;
        let tensor = self.file.get(start..end).ok_or(spec.error(Problem::Offset))?;
        self.at = end;
        Ok(tensor)
    }
}

/// The same, checking the table and every number on the way.
struct TableReader<'a> {
    tensors: TensorReader<'a>,
    table: &'a [u8],
    entries: u32,
    weight_limit: i8,
}

impl<'a> Visit for TableReader<'a> {
    type Tensor = &'a [u8];

    fn tensor(&mut self, spec: TensorSpec) -> Result<&'a [u8]> {
        if self.table.is_empty() {
            return Err(spec.error(Problem::Name));
        }
        let (entry, rest) =
            postcard::take_from_bytes::<TensorEntry<'a>>(self.table).map_err(|_| Error::Header)?;
        self.table = rest;
        self.entries = self.entries.saturating_add(1);
        if !spec.is_called(entry.name) {
            return Err(spec.error(Problem::Name));
        }
        if entry.kind != spec.kind {
            return Err(spec.error(Problem::Kind));
        }
        if (entry.shape.0 as usize, entry.shape.1 as usize) != (spec.rows, spec.columns) {
            return Err(spec.error(Problem::Shape));
        }
        let before = self.tensors.at;
        let tensor = self.tensors.tensor(spec)?;
        if entry.offset != (self.tensors.at - tensor.len()) as u64 {
            return Err(spec.error(Problem::Offset));
        }
        let padding = self.tensors.file.get(before..self.tensors.at - tensor.len());
        if !padding.is_some_and(|padding| padding.iter().all(|byte| *byte == 0)) {
            return Err(spec.error(Problem::Offset));
        }
        if spec.kind == Kind::F32 && !floats(tensor).all(f32::is_finite) {
            return Err(spec.error(Problem::NotFinite));
        }
        if spec.kind == Kind::Int8 && largest_magnitude(tensor) > self.weight_limit.unsigned_abs() {
            return Err(spec.error(Problem::WeightLimit));
        }
        Ok(tensor)
    }
}

/// Of int8 values. Written so that the compiler makes vector code of it: every byte of a file passes here.
fn largest_magnitude(values: &[u8]) -> u8 {
    values.iter().fold(0, |largest, value| largest.max(value.cast_signed().unsigned_abs()))
}
