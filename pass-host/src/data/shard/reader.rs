//! A shard, read in place.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use memmap2::Mmap;
use xxhash_rust::xxh3::xxh3_64;

use super::error::ShardError;
use super::format::{Entry, Header, MAGIC};

/// An open shard. It holds nothing but the map: memory does not grow with the number of images.
#[derive(Debug)]
pub struct Shard<B = Mmap> {
    file: B,
    header: Header,
}

/// Whether the file at `path` begins like a shard; one that cannot be read does not.
pub fn is_shard(path: &Path) -> bool {
    let mut start = [0; MAGIC.len()];
    File::open(path).and_then(|mut file| file.read_exact(&mut start)).is_ok() && start == *MAGIC
}

impl Shard {
    /// Maps the shard at `path` and checks its header.
    ///
    /// The map follows the file: who wants to change a shard writes another and renames it, as
    /// [`ShardWriter`](super::ShardWriter) does.
    ///
    /// # Errors
    /// [`ShardError`] for a file that is no whole shard of this version.
    pub fn open(path: &Path) -> Result<Self, ShardError> {
        let file = File::open(path)?;
        if file.metadata()?.len() == 0 {
            // an empty file cannot be mapped everywhere
            return Err(ShardError::NotAShard);
        }
        Self::from_bytes(map(&file)?)
    }
}

#[expect(unsafe_code, reason = "mapping a file is unsafe: another process may change it meanwhile")]
fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the map is only read, as bytes of any value, and every use checks them. Shards are replaced by renaming,
    // which leaves the mapped file as it is.
    unsafe { Mmap::map(file) }
}

impl<B: AsRef<[u8]>> Shard<B> {
    /// The shard in these bytes.
    ///
    /// # Errors
    /// As [`Shard::open`].
    pub fn from_bytes(file: B) -> Result<Self, ShardError> {
        let header = Header::read(file.as_ref())?;
        Ok(Self { file, header })
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.header.images as usize
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Checksum of all names and entries, and so of all images.
    pub fn content_hash(&self) -> u64 {
        self.header.content
    }

    /// What the index says about image `i`.
    ///
    /// # Errors
    /// [`ShardError`] if there is no such image or its entry is damaged.
    pub fn entry(&self, i: usize) -> Result<Entry<'_>, ShardError> {
        Entry::read(self.file.as_ref(), &self.header, i)
    }

    /// The bytes of image `i`: a complete image file.
    ///
    /// # Errors
    /// [`ShardError`] if there is no such image, or its entry or its bytes are damaged.
    pub fn image(&self, i: usize) -> Result<&[u8], ShardError> {
        let entry = self.entry(i)?;
        let range = entry.offset as usize..(entry.offset + entry.length) as usize;
        let bytes = self.file.as_ref().get(range).unwrap_or_default();
        if xxh3_64(bytes) != entry.checksum {
            return Err(ShardError::Image { entry: i });
        }
        Ok(bytes)
    }
}
