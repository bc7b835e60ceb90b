//! Header and index entries as bytes.

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::error::ShardError;

/// The version written, and the only one read.
pub const VERSION: u32 = 1;
pub(super) const MAGIC: &[u8; 16] = b"pass image shard";
pub(super) const HEADER_BYTES: usize = 80;
pub(super) const ENTRY_BYTES: usize = 56;

/// How an image is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
#[repr(u32)]
pub enum Stored {
    /// The bytes of the source.
    Original = 0,
    /// Encoded anew as JPEG.
    Jpeg = 1,
    /// Raw pixels, as binary PPM.
    Raw = 2,
}

/// Where the parts of a shard lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) images: u64,
    pub(super) names: u64,
    pub(super) names_length: u64,
    pub(super) index: u64,
    pub(super) length: u64,
    pub(super) content: u64,
}

/// One image of the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// First byte in the file.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// XXH3-64 of these bytes.
    pub checksum: u64,
    /// Path below the common folder of the sources.
    pub name: &'a [u8],
    /// Width in pixels, upright.
    pub width: u32,
    /// Height in pixels, upright.
    pub height: u32,
    /// How the image is stored.
    pub stored: Stored,
}

/// The eight bytes at `at`; a missing one counts as 0, which no caller relies on.
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

impl Header {
    pub(super) fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..16].copy_from_slice(MAGIC);
        bytes[16..20].copy_from_slice(&VERSION.to_le_bytes());
        let Self { images, names, names_length, index, length, content } = self;
        for (place, value) in [images, names, names_length, index, length, content].into_iter().enumerate() {
            bytes[24 + 8 * place..32 + 8 * place].copy_from_slice(&value.to_le_bytes());
        }
        let checksum = xxh3_64(&bytes[..72]);
        bytes[72..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads and checks the header of a whole file.
    pub(super) fn read(file: &[u8]) -> Result<Self, ShardError> {
        if !file.starts_with(MAGIC) {
            return Err(ShardError::NotAShard);
        }
        let found = file.len() as u64;
        let Some(bytes) = file.first_chunk::<HEADER_BYTES>() else {
            return Err(ShardError::Length { expected: HEADER_BYTES as u64, found });
        };
        let version = u32_at(bytes, 16);
        if version != VERSION {
            return Err(ShardError::Version { found: version });
        }
        if u64_at(bytes, 72) != xxh3_64(&bytes[..72]) {
            return Err(ShardError::Header);
        }
        let field = |place: usize| u64_at(bytes, 24 + 8 * place);
        let header = Self {
            images: field(0),
            names: field(1),
            names_length: field(2),
            index: field(3),
            length: field(4),
            content: field(5),
        };
        if header.length != found {
            return Err(ShardError::Length { expected: header.length, found });
        }
        header.check()
    }

    /// The parts follow each other and fill the file.
    fn check(self) -> Result<Self, ShardError> {
        let wrong = |field, found| Err(ShardError::Layout { field, found });
        if self.names < HEADER_BYTES as u64 || self.names > self.length {
            return wrong("names offset", self.names);
        }
        if self.names.checked_add(self.names_length) != Some(self.index) {
            return wrong("index offset", self.index);
        }
        let index = self.images.checked_mul(ENTRY_BYTES as u64);
        if index.and_then(|bytes| self.index.checked_add(bytes)) != Some(self.length) {
            return wrong("images", self.images);
        }
        Ok(self)
    }
}

impl<'a> Entry<'a> {
    /// The entry with this number, whose name begins at `name_offset`.
    pub(super) fn to_bytes(self, number: u64, name_offset: u64) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        for (place, value) in [self.offset, self.length, self.checksum, name_offset].into_iter().enumerate() {
            bytes[8 * place..8 * place + 8].copy_from_slice(&value.to_le_bytes());
        }
        let small = [self.name.len() as u32, self.width, self.height, self.stored as u32];
        for (place, value) in small.into_iter().enumerate() {
            bytes[32 + 4 * place..36 + 4 * place].copy_from_slice(&value.to_le_bytes());
        }
        let checksum = entry_checksum(&bytes, self.name, number);
        bytes[48..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads and checks entry `number` of a file.
    pub(super) fn read(file: &'a [u8], header: &Header, number: usize) -> Result<Self, ShardError> {
        let images = header.images as usize;
        let at = (number < images).then(|| header.index as usize + number * ENTRY_BYTES);
        let Some(bytes) = at.and_then(|at| file.get(at..)).and_then(<[u8]>::first_chunk::<ENTRY_BYTES>)
        else {
            return Err(ShardError::NoSuchImage { entry: number, images });
        };
        let wrong = |field, found| Err(ShardError::EntryField { entry: number, field, found });
        let (offset, length, name_offset) = (u64_at(bytes, 0), u64_at(bytes, 8), u64_at(bytes, 24));
        let name_length = u64::from(u32_at(bytes, 32));
        let within = |start: u64, length: u64, low: u64, high: u64| {
            start >= low && start.checked_add(length).is_some_and(|end| end <= high)
        };
        if !within(name_offset, name_length, header.names, header.index) {
            return wrong("name offset", name_offset);
        }
        let name = file.get(name_offset as usize..(name_offset + name_length) as usize).unwrap_or_default();
        if u64_at(bytes, 48) != entry_checksum(bytes, name, number as u64) {
            return Err(ShardError::Entry { entry: number });
        }
        if !within(offset, length, HEADER_BYTES as u64, header.names) {
            return wrong("offset", offset);
        }
        let (width, height) = (u32_at(bytes, 36), u32_at(bytes, 40));
        if width == 0 || height == 0 {
            return wrong(if width == 0 { "width" } else { "height" }, 0);
        }
        let stored = match u32_at(bytes, 44) {
            0 => Stored::Original,
            1 => Stored::Jpeg,
            2 => Stored::Raw,
            other => return wrong("format", other.into()),
        };
        Ok(Self { offset, length, checksum: u64_at(bytes, 16), name, width, height, stored })
    }
}

fn entry_checksum(entry: &[u8; ENTRY_BYTES], name: &[u8], number: u64) -> u64 {
    let mut hash = Xxh3::with_seed(number);
    hash.update(&entry[..48]);
    hash.update(name);
    hash.digest()
}
