//! What can be wrong with a shard.

use std::io;

use super::format::VERSION;

/// Why a shard, or one image of it, cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShardError {
    /// The file begins with something else.
    #[error("it is not a shard: it does not begin with `pass image shard`")]
    NotAShard,
    /// Another version of the format.
    #[error("the shard has format version {found}, this program reads version {VERSION}")]
    Version {
        /// The version of the file.
        found: u32,
    },
    /// The file is shorter or longer than its header says.
    #[error("expected a file of {expected} bytes, found {found}")]
    Length {
        /// Bytes according to the header.
        expected: u64,
        /// Bytes there are.
        found: u64,
    },
    /// The header does not match its checksum.
    #[error("the header is damaged: its checksum does not match")]
    Header,
    /// A field of the header contradicts the others.
    #[error("the header is inconsistent: `{field}` is {found}")]
    Layout {
        /// The field.
        field: &'static str,
        /// Its value.
        found: u64,
    },
    /// There is no such image.
    #[error("image {entry} of a shard of {images}")]
    NoSuchImage {
        /// The image asked for, from 0.
        entry: usize,
        /// Images there are.
        images: usize,
    },
    /// An entry does not match its checksum.
    #[error("damaged shard: the checksum of index entry {entry} does not match")]
    Entry {
        /// Its number, from 0.
        entry: usize,
    },
    /// A field of an entry points outside or means nothing.
    #[error("damaged shard: `{field}` of index entry {entry} is {found}")]
    EntryField {
        /// Its number, from 0.
        entry: usize,
        /// The field.
        field: &'static str,
        /// Its value.
        found: u64,
    },
    /// The bytes of an image do not match their checksum.
    #[error("damaged shard: the checksum of image {entry} does not match")]
    Image {
        /// Its number, from 0.
        entry: usize,
    },
    /// The file cannot be opened or mapped.
    #[error("input/output error")]
    Io(#[from] io::Error),
}

impl ShardError {
    /// What the reader can do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::NotAShard => "`pass-host pack IMAGES --out F` writes shards".into(),
            Self::Version { found } if *found > VERSION => "a newer pass-host reads it".into(),
            Self::Version { .. } => "pack the images again".into(),
            Self::Io(_) => "check that the file exists and may be read".into(),
            _ => "the file is damaged or cut off; copy it again, or pack the images again".into(),
        }
    }
}
