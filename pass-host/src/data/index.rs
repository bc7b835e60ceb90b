//! The list of all images: sorted, hashed, small.
//!
//! Images are ordered by the path of the folder, tar or shard that holds them, then by name (in a shard by place), so the
//! images of one holder are neighbors and only the names are stored: 8 bytes and the name for a file (about 30 MB for a
//! million), 16 more for the place inside a tar, nothing for an image of a shard.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3Default;

use super::error::DataError;
use super::index_cache;
use super::shard::ShardError;
use super::sources::{self, Content, Findings, Holder};
use crate::config::DataConfig;

/// Image files beyond this size are refused as a whole.
const MAX_FILE_BYTES: u64 = 1 << 30;

/// The sorted list of all images of a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ImageIndex {
    /// In order; the images of holder `h` are `first[h]..first[h + 1]`.
    holders: Vec<Holder>,
    first: Vec<u64>,
    /// Images of folders and tars before holder `h`: those whose names are listed here.
    listed: Vec<u64>,
    names: Vec<u8>,
    /// Where the name of listed image `i` ends in `names`.
    name_end: Vec<u64>,
    /// Offset and length per listed image when there are tars, else empty.
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
    /// An image of a shard.
    #[error(transparent)]
    Shard(#[from] ShardError),
    /// Anything else.
    #[error("input/output error: {0}")]
    Io(#[from] io::Error),
}

/// Where an image is.
enum Place<'a> {
    /// In a folder or tar; its number among all images of folders and tars.
    Listed(&'a Holder, usize),
    /// In a shard; its number there.
    Entry(&'a Holder, usize),
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
            let twice = sorted.last().is_some_and(|last| last.path == holders[holder].path);
            if twice && holders[holder].shard().is_some() {
                return Err(DataError::Duplicate { name: holders[holder].path.display().to_string() });
            }
            if !twice {
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
        let (mut first, mut listed) = (vec![0], vec![0]);
        let mut left = if limit > 0 { limit } else { usize::MAX };
        for (rank, holder) in sorted.iter().enumerate() {
            let before = |rank: usize| images.partition_point(|image| (image.holder as usize) < rank);
            let count = holder.shard().map_or(before(rank + 1) - before(rank), |shard| shard.len()).min(left);
            left -= count;
            first.push(first[rank] + count as u64);
            listed.push(listed[rank] + if holder.shard().is_some() { 0 } else { count as u64 });
        }
        images.truncate(listed[sorted.len()] as usize);
        let mut index = Self {
            holders: sorted,
            first,
            listed,
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

    /// The index with its shards open, after it was read from disk.
    pub(super) fn reopened(mut self) -> Result<Self, DataError> {
        self.holders.iter_mut().try_for_each(Holder::reopen)?;
        Ok(self)
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.first.last().map_or(0, |&count| count as usize)
    }

    /// Whether there is none; [`ImageIndex::build`] refuses that.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Absolute path of image `i`; of one inside a tar or shard, the path of that file and the path inside, joined.
    ///
    /// # Panics
    /// When `i` is not less than [`ImageIndex::len`].
    pub fn name(&self, i: usize) -> String {
        let (holder, name) = self.holder_and_name(i);
        full_name(holder, &name)
    }

    /// Names of images below the folder that all sources share: they do not depend on where the data lies, and no two
    /// images have the same. The function that is returned panics as [`ImageIndex::name`] does.
    pub fn relative_names(&self) -> impl Fn(usize) -> Vec<u8> {
        let root = self.common_root();
        move |i| {
            let (holder, name) = self.holder_and_name(i);
            let below = holder.path.strip_prefix(&root).unwrap_or(&holder.path);
            let mut full = below.as_os_str().as_encoded_bytes().to_vec();
            if !full.is_empty() {
                full.push(b'/');
            }
            full.extend_from_slice(&name);
            full
        }
    }

    /// The folder (or tar, or shard) that all sources with images share.
    fn common_root(&self) -> PathBuf {
        let used = (0..self.holders.len()).filter(|&h| self.first[h] < self.first[h + 1]);
        let root = |h: usize| {
            let holder = &self.holders[h];
            to_path(&path_bytes(holder)[..holder.root_length.min(path_bytes(holder).len())])
        };
        let shared = |a: PathBuf, b: PathBuf| {
            a.components().zip(b.components()).take_while(|(a, b)| a == b).map(|(a, _)| a).collect()
        };
        used.map(root).reduce(shared).unwrap_or_default()
    }

    /// The bytes of image `i`: a whole image file. Those of a shard are not copied.
    ///
    /// # Errors
    /// [`ReadError`] when the file has vanished, cannot be read or is not plausible as an image.
    ///
    /// # Panics
    /// When `i` is not less than [`ImageIndex::len`].
    pub fn read(&self, i: usize) -> Result<Cow<'_, [u8]>, ReadError> {
        let (holder, listed) = match self.place(i) {
            Place::Entry(holder, entry) => {
                let shard = holder.shard().ok_or(ReadError::Vanished)?;
                return Ok(Cow::Borrowed(shard.image(entry)?));
            }
            Place::Listed(holder, listed) => (holder, listed),
        };
        let open = |path: &Path| {
            File::open(path).map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => ReadError::Vanished,
                _ => ReadError::Io(error),
            })
        };
        let check =
            |bytes: u64| if bytes > MAX_FILE_BYTES { Err(ReadError::TooLarge { bytes }) } else { Ok(()) };
        match &holder.content {
            Content::Tar(archive) => {
                let (offset, length) = self.spans[listed];
                check(length)?;
                let mut file = open(archive)?;
                file.seek(SeekFrom::Start(offset))?;
                let mut bytes = vec![0; length as usize];
                file.read_exact(&mut bytes)?;
                Ok(Cow::Owned(bytes))
            }
            Content::Folder | Content::Shard(_) => {
                let mut file = open(&holder.path.join(to_path(self.listed_name(listed))))?;
                let length = file.metadata()?.len();
                check(length)?;
                let mut bytes = Vec::with_capacity(length as usize + 1);
                file.by_ref().take(MAX_FILE_BYTES).read_to_end(&mut bytes)?;
                Ok(Cow::Owned(bytes))
            }
        }
    }

    /// Hash of the sorted list: number of images, their names relative to the sources, and their places in tars; of a
    /// shard, its content. Moving the data as a whole does not change it; adding, removing or renaming an image does.
    pub fn manifest_hash(&self) -> u64 {
        self.manifest_hash
    }

    fn compute_hash(&self) -> u64 {
        let mut hash = Xxh3Default::new();
        hash.update(&(self.len() as u64).to_le_bytes());
        for (h, holder) in self.holders.iter().enumerate() {
            if let Some(shard) = holder.shard() {
                hash.update(&(self.first[h + 1] - self.first[h]).to_le_bytes());
                hash.update(&shard.content_hash().to_le_bytes());
            }
            let relative = path_bytes(holder).get(holder.root_length..).unwrap_or_default();
            for i in self.listed[h] as usize..self.listed[h + 1] as usize {
                for part in [relative, self.listed_name(i)] {
                    hash.update(&(part.len() as u64).to_le_bytes());
                    hash.update(part);
                }
                if let Some((offset, length)) = self.spans.get(i) {
                    hash.update(&offset.to_le_bytes());
                    hash.update(&length.to_le_bytes());
                }
            }
        }
        hash.digest()
    }

    fn place(&self, i: usize) -> Place<'_> {
        let h = self.first.partition_point(|&first| first <= i as u64) - 1;
        let (holder, within) = (&self.holders[h], i - self.first[h] as usize);
        match holder.content {
            Content::Shard(_) => Place::Entry(holder, within),
            Content::Folder | Content::Tar(_) => Place::Listed(holder, self.listed[h] as usize + within),
        }
    }

    /// A damaged entry of a shard is called by its number; reading it tells what is wrong.
    fn holder_and_name(&self, i: usize) -> (&Holder, Cow<'_, [u8]>) {
        match self.place(i) {
            Place::Listed(holder, listed) => (holder, Cow::Borrowed(self.listed_name(listed))),
            Place::Entry(holder, entry) => {
                let known = holder.shard().and_then(|shard| shard.entry(entry).ok());
                let name = known.map(|entry| Cow::Borrowed(entry.name));
                (holder, name.unwrap_or_else(|| Cow::Owned(format!("#{entry}").into_bytes())))
            }
        }
    }

    fn listed_name(&self, i: usize) -> &[u8] {
        let start = if i == 0 { 0 } else { self.name_end[i - 1] };
        &self.names[start as usize..self.name_end[i] as usize]
    }

    /// Whether the parts fit together, so that no method can fail on an index that was read from disk.
    pub(super) fn is_consistent(&self) -> bool {
        let ascending = |ends: &[u64]| ends.windows(2).all(|pair| pair[0] <= pair[1]);
        let bounds = |ends: &[u64]| ends.len() == self.holders.len() + 1 && ends[0] == 0 && ascending(ends);
        let fits = |(h, holder): (usize, &Holder)| {
            let count = self.first[h + 1] - self.first[h];
            let listed = self.listed[h + 1] - self.listed[h];
            match (&holder.content, holder.shard()) {
                (Content::Shard(_), Some(shard)) => listed == 0 && count <= shard.len() as u64,
                (Content::Shard(_), None) => false,
                (Content::Tar(_), _) => listed == count && self.spans.len() == self.name_end.len(),
                (Content::Folder, _) => listed == count,
            }
        };
        bounds(&self.first)
            && bounds(&self.listed)
            && self.listed.last() == Some(&(self.name_end.len() as u64))
            && ascending(&self.name_end)
            && self.name_end.last().is_none_or(|&end| end == self.names.len() as u64)
            && (self.spans.is_empty() || self.spans.len() == self.name_end.len())
            && self.holders.iter().enumerate().all(fits)
            && self.manifest_hash == self.compute_hash()
    }
}

fn path_bytes(holder: &Holder) -> &[u8] {
    holder.path.as_os_str().as_encoded_bytes()
}

fn full_name(holder: &Holder, name: &[u8]) -> String {
    match holder.content {
        // whatever a shard calls its images, they are inside it
        Content::Shard(_) => format!("{}/{}", holder.path.display(), String::from_utf8_lossy(name)),
        Content::Folder | Content::Tar(_) => holder.path.join(to_path(name)).to_string_lossy().into_owned(),
    }
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
