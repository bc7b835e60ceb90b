//! The list of all images: sorted, hashed, small.
//!
//! Images are ordered by the path of the folder or tar that holds them, then by name, so the images of one holder are
//! neighbors and only the names are stored: 8 bytes and the name for a file (about 30 MB for a million), 16 more for
//! the place inside a tar.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3Default;

use super::error::DataError;
use super::index_cache;
use super::sources::{self, Findings, Holder};
use crate::config::DataConfig;

/// Image files beyond this size are refused as a whole.
const MAX_FILE_BYTES: u64 = 1 << 30;

/// The sorted list of all images of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageIndex {
    /// In order; the images of holder `h` are `first[h]..first[h + 1]`.
    holders: Vec<Holder>,
    first: Vec<u64>,
    names: Vec<u8>,
    /// Where name `i` ends in `names`.
    name_end: Vec<u64>,
    /// Offset and length per image when there are tars, else empty.
    spans: Vec<(u64, u64)>,
    manifest_hash: u64,
}

/// Why the bytes of an image could not be read. The text is the reason written to the quarantine list.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The file was there when it was listed.
    #[error("input/output error: the file has vanished")]
    Vanished,
    /// The file is larger than any image.
    #[error("{bytes} bytes are more than an image file may have ({MAX_FILE_BYTES})")]
    TooLarge {
        /// Its size.
        bytes: u64,
    },
    /// Anything else.
    #[error("input/output error: {0}")]
    Io(#[from] io::Error),
}

impl ImageIndex {
    /// Lists the images of `config.images`, the first `config.limit` of them if that is positive.
    ///
    /// With a `cache` file the list is read from there if it still holds, and written there if not.
    ///
    /// # Errors
    /// [`DataError`] for sources that are missing, unreadable, overlapping or without images.
    pub fn build(config: &DataConfig, cache: Option<&Path>) -> Result<Self, DataError> {
        if config.images.is_empty() {
            return Err(DataError::NoSource);
        }
        if let Some(index) = cache.and_then(|cache| index_cache::load(cache, &config.images, config.limit)) {
            return Ok(index);
        }
        let mut found = sources::find(&config.images, cache)?;
        let stamps = std::mem::take(&mut found.stamps);
        let index = Self::from_findings(found, config.limit)?;
        if index.is_empty() {
            return Err(DataError::NothingFound { sources: config.images.clone() });
        }
        if let Some(cache) = cache {
            index_cache::store(cache, &config.images, config.limit, stamps, &index)?;
        }
        Ok(index)
    }

    fn from_findings(found: Findings, limit: usize) -> Result<Self, DataError> {
        let Findings { holders, mut images, .. } = found;
        let mut order: Vec<usize> = (0..holders.len()).collect();
        order.sort_by(|&a, &b| path_bytes(&holders[a]).cmp(path_bytes(&holders[b])));
        let mut sorted: Vec<Holder> = Vec::new();
        let mut rank = vec![0; holders.len()];
        for holder in order {
            // the same folder, reached twice, is one holder: its images then meet as duplicates
            if sorted.last().is_none_or(|last| last.path != holders[holder].path) {
                sorted.push(holders[holder].clone());
            }
            rank[holder] = sorted.len() as u32 - 1;
        }
        for image in &mut images {
            image.holder = rank[image.holder as usize];
        }
        images.sort_unstable_by(|a, b| (a.holder, &a.name).cmp(&(b.holder, &b.name)));
        if let Some(twice) =
            images.windows(2).find(|pair| (pair[0].holder, &pair[0].name) == (pair[1].holder, &pair[1].name))
        {
            let holder = &sorted[twice[0].holder as usize];
            return Err(DataError::Duplicate { name: full_name(holder, &twice[0].name) });
        }
        if limit > 0 {
            images.truncate(limit);
        }
        let mut first = Vec::with_capacity(sorted.len() + 1);
        for holder in 0..=sorted.len() as u32 {
            first.push(images.partition_point(|image| image.holder < holder) as u64);
        }
        let mut index = Self {
            holders: sorted,
            first,
            names: Vec::with_capacity(images.iter().map(|image| image.name.len()).sum()),
            name_end: Vec::with_capacity(images.len()),
            spans: Vec::new(),
            manifest_hash: 0,
        };
        if images.iter().any(|image| image.span.is_some()) {
            index.spans = images.iter().map(|image| image.span.unwrap_or_default()).collect();
        }
        for image in images {
            index.names.extend_from_slice(&image.name);
            index.name_end.push(index.names.len() as u64);
        }
        index.manifest_hash = index.compute_hash();
        Ok(index)
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.name_end.len()
    }

    /// Whether there is none; [`ImageIndex::build`] refuses that.
    pub fn is_empty(&self) -> bool {
        self.name_end.is_empty()
    }

    /// Absolute path of image `i`; of a tar member, the path of the tar and the path inside, joined.
    ///
    /// # Panics
    /// When `i` is not less than [`ImageIndex::len`].
    pub fn name(&self, i: usize) -> String {
        full_name(self.holder(i), self.name_bytes(i))
    }

    /// The bytes of image `i`.
    ///
    /// # Errors
    /// [`ReadError`] when the file has vanished, cannot be read or is not plausible as an image.
    ///
    /// # Panics
    /// When `i` is not less than [`ImageIndex::len`].
    pub fn read(&self, i: usize) -> Result<Vec<u8>, ReadError> {
        let holder = self.holder(i);
        let open = |path: &Path| {
            File::open(path).map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => ReadError::Vanished,
                _ => ReadError::Io(error),
            })
        };
        let check =
            |bytes: u64| if bytes > MAX_FILE_BYTES { Err(ReadError::TooLarge { bytes }) } else { Ok(()) };
        match &holder.archive {
            Some(archive) => {
                let (offset, length) = self.spans[i];
                check(length)?;
                let mut file = open(archive)?;
                file.seek(SeekFrom::Start(offset))?;
                let mut bytes = vec![0; length as usize];
                file.read_exact(&mut bytes)?;
                Ok(bytes)
            }
            None => {
                let mut file = open(&holder.path.join(to_path(self.name_bytes(i))))?;
                let length = file.metadata()?.len();
                check(length)?;
                let mut bytes = Vec::with_capacity(length as usize + 1);
                file.by_ref().take(MAX_FILE_BYTES).read_to_end(&mut bytes)?;
                Ok(bytes)
            }
        }
    }

    /// Hash of the sorted list: number of images, their names relative to the sources, and their places in tars.
    /// Moving the data as a whole does not change it; adding, removing or renaming an image does.
    pub fn manifest_hash(&self) -> u64 {
        self.manifest_hash
    }

    fn compute_hash(&self) -> u64 {
        let mut hash = Xxh3Default::new();
        hash.update(&(self.len() as u64).to_le_bytes());
        for i in 0..self.len() {
            let holder = self.holder(i);
            let relative = path_bytes(holder).get(holder.root_length..).unwrap_or_default();
            for part in [relative, self.name_bytes(i)] {
                hash.update(&(part.len() as u64).to_le_bytes());
                hash.update(part);
            }
            if let Some((offset, length)) = self.spans.get(i) {
                hash.update(&offset.to_le_bytes());
                hash.update(&length.to_le_bytes());
            }
        }
        hash.digest()
    }

    fn holder(&self, i: usize) -> &Holder {
        let after = self.first.partition_point(|&first| first <= i as u64);
        &self.holders[after - 1]
    }

    fn name_bytes(&self, i: usize) -> &[u8] {
        let start = if i == 0 { 0 } else { self.name_end[i - 1] };
        &self.names[start as usize..self.name_end[i] as usize]
    }

    /// Whether the parts fit together, so that no method can fail on an index that was read from disk.
    pub(super) fn is_consistent(&self) -> bool {
        let ascending = |ends: &[u64]| ends.windows(2).all(|pair| pair[0] <= pair[1]);
        self.first.len() == self.holders.len() + 1
            && self.first.first() == Some(&0)
            && self.first.last() == Some(&(self.len() as u64))
            && ascending(&self.first)
            && ascending(&self.name_end)
            && self.name_end.last().is_none_or(|&end| end == self.names.len() as u64)
            && (self.spans.len() == self.len()
                || self.spans.is_empty() && self.holders.iter().all(|holder| holder.archive.is_none()))
            && self.manifest_hash == self.compute_hash()
    }
}

fn path_bytes(holder: &Holder) -> &[u8] {
    holder.path.as_os_str().as_encoded_bytes()
}

fn full_name(holder: &Holder, name: &[u8]) -> String {
    holder.path.join(to_path(name)).to_string_lossy().into_owned()
}

#[cfg(unix)]
fn to_path(name: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    PathBuf::from(std::ffi::OsStr::from_bytes(name))
}

#[cfg(not(unix))]
fn to_path(name: &[u8]) -> PathBuf {
    PathBuf::from(String::from_utf8_lossy(name).into_owned())
}

#[cfg(test)]
mod tests;
