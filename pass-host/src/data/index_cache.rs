//! The index on disk, so that a million files are listed once.
//!
//! File: magic, checksum (xxh3 of the rest), then postcard. It is used only when it was made for the same sources and
//! nothing it was made from has changed since: every folder, list, tar and shard carries a stamp of its modification time. A
//! damaged, foreign or outdated cache is made anew, never trusted.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use super::error::DataError;
use super::index::ImageIndex;

const MAGIC: &[u8; 16] = b"pass image index";
/// Raised with every change of the format.
const VERSION: u32 = 2;
/// Something that changed this shortly before it was listed may change again without a new time stamp.
const CLOCK_GRAIN_NANOS: u128 = 2_000_000_000;

/// The state of a folder, list, tar or shard when it was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Stamp {
    path: PathBuf,
    modified_nanos: u128,
    length: u64,
}

impl Stamp {
    /// The present state of `path`.
    pub(super) fn of(path: &Path) -> Result<Self, DataError> {
        let read = || {
            let metadata = std::fs::metadata(path)?;
            Ok((nanos(metadata.modified()?), if metadata.is_dir() { 0 } else { metadata.len() }))
        };
        let (modified_nanos, length) = read().map_err(|source: io::Error| {
            let path = path.to_owned();
            match source.kind() {
                io::ErrorKind::NotFound => DataError::SourceMissing { path },
                _ => DataError::Io { path, source },
            }
        })?;
        Ok(Self { path: path.to_owned(), modified_nanos, length })
    }
}

fn nanos(time: SystemTime) -> u128 {
    time.duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_nanos())
}

/// What an index was made from.
#[derive(Debug, Serialize, Deserialize)]
struct Origin {
    version: u32,
    sources: Vec<String>,
    folder: PathBuf,
    limit: usize,
    made_nanos: u128,
    stamps: Vec<Stamp>,
}

/// The index in `cache`, if it is sound and still holds for these sources.
pub(super) fn load(cache: &Path, sources: &[String], limit: usize) -> Option<ImageIndex> {
    let bytes = std::fs::read(cache).ok()?;
    let (checksum, body) = bytes.strip_prefix(MAGIC)?.split_first_chunk()?;
    if xxh3_64(body) != u64::from_le_bytes(*checksum) {
        return None;
    }
    let (origin, rest): (Origin, _) = postcard::take_from_bytes(body).ok()?;
    let still_holds = origin.version == VERSION
        && origin.sources == sources
        && origin.limit == limit
        && std::env::current_dir().is_ok_and(|folder| folder == origin.folder)
        && origin.stamps.iter().all(|stamp| {
            stamp.modified_nanos + CLOCK_GRAIN_NANOS < origin.made_nanos
                && Stamp::of(&stamp.path).is_ok_and(|now| now == *stamp)
        });
    if !still_holds {
        return None;
    }
    let index: ImageIndex = postcard::from_bytes(rest).ok()?;
    let index = index.reopened().ok()?;
    index.is_consistent().then_some(index)
}

/// Writes the index to `cache`.
pub(super) fn store(
    cache: &Path,
    sources: &[String],
    limit: usize,
    stamps: Vec<Stamp>,
    index: &ImageIndex,
) -> Result<(), DataError> {
    let failed = |source| DataError::Write { path: cache.to_owned(), source };
    let origin = Origin {
        version: VERSION,
        sources: sources.to_vec(),
        folder: std::env::current_dir().map_err(failed)?,
        limit,
        made_nanos: nanos(SystemTime::now()),
        stamps,
    };
    let encode = |error: postcard::Error| failed(io::Error::other(error));
    let body = postcard::to_extend(&origin, Vec::new()).map_err(encode)?;
    let body = postcard::to_extend(index, body).map_err(encode)?;
    replace_file(cache, |out| {
        out.write_all(MAGIC)?;
        out.write_all(&xxh3_64(&body).to_le_bytes())?;
        out.write_all(&body)
    })
}

/// Writes a file so that it is either there in full or not at all.
pub(super) fn replace_file(
    path: &Path,
    write: impl FnOnce(&mut File) -> io::Result<()>,
) -> Result<(), DataError> {
    let failed = |source| DataError::Write { path: path.to_owned(), source };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    if let Some(folder) = folder {
        std::fs::create_dir_all(folder).map_err(failed)?;
    }
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.partial", std::process::id()));
    let partial = path.with_file_name(name);
    let result = File::create(&partial)
        .and_then(|mut file| {
            write(&mut file)?;
            file.sync_all()
        })
        .and_then(|()| std::fs::rename(&partial, path));
    if result.is_err() {
        // the first error is the one to report
        let _ = std::fs::remove_file(&partial);
    }
    result.map_err(failed)
}
