//! Tars: where each image lies in them. A gzip tar is unpacked once to a plain tar, because a compressed stream
//! cannot be read from the middle: beside the index cache when there is one (and found again by the next run),
//! otherwise in the folder for temporary files.

use std::fs::File;
use std::io::{self, BufReader, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::xxh3_64;

use super::error::DataError;
use super::index_cache::{Stamp, replace_file};
use super::sources::is_image_name;

/// One image inside a tar.
pub(super) struct Member {
    /// Path inside the tar.
    pub(super) name: Vec<u8>,
    /// First byte.
    pub(super) offset: u64,
    /// Length in bytes.
    pub(super) length: u64,
}

/// Whether a file is treated as a tar: `.tar`, `.tar.gz`, `.tgz`.
pub(super) fn is_tar_name(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    [".tar", ".tar.gz", ".tgz"].iter().any(|ending| name.ends_with(ending))
}

/// The plain tar to read for the tar at `path`: itself, or its unpacked copy.
pub(super) fn readable_tar(path: &Path, cache: Option<&Path>) -> Result<PathBuf, DataError> {
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("tar")) {
        return Ok(path.to_owned());
    }
    let stamp = Stamp::of(path)?;
    let key = xxh3_64(format!("{stamp:?}").as_bytes());
    let folder = match cache.and_then(Path::parent) {
        Some(folder) => folder.to_owned(),
        None => std::env::temp_dir(),
    };
    let unpacked = folder.join(format!("pass-unpacked-{key:016x}.tar"));
    if unpacked.is_file() {
        return Ok(unpacked);
    }
    let mut sound = Ok(());
    replace_file(&unpacked, |out| {
        let file = BufReader::new(File::open(path)?);
        let mut decoder = flate2::bufread::MultiGzDecoder::new(file);
        let mut buffer = vec![0; 1 << 20];
        loop {
            match io::Read::read(&mut decoder, &mut buffer) {
                Ok(0) => return Ok(()),
                Ok(length) => io::Write::write_all(out, &buffer[..length])?,
                Err(error) => {
                    sound = Err(io::Error::new(error.kind(), error.to_string()));
                    return Err(error);
                }
            }
        }
    })
    .map_err(|error| match std::mem::replace(&mut sound, Ok(())) {
        Err(source) => DataError::NotATar { path: path.to_owned(), source },
        Ok(()) => error,
    })?;
    Ok(unpacked)
}

/// The images of the tar called `path`, read from the plain tar `readable`.
pub(super) fn members(path: &Path, readable: &Path) -> Result<Vec<Member>, DataError> {
    let not_a_tar = |source| DataError::NotATar { path: path.to_owned(), source };
    let mut file =
        File::open(readable).map_err(|source| DataError::Io { path: readable.to_owned(), source })?;
    let size =
        file.seek(SeekFrom::End(0)).and_then(|size| file.rewind().map(|()| size)).map_err(not_a_tar)?;
    if size == 0 {
        return Err(not_a_tar(io::Error::new(io::ErrorKind::UnexpectedEof, "the file is empty")));
    }
    let mut tar = tar::Archive::new(BufReader::new(file));
    let mut members = Vec::new();
    for entry in tar.entries_with_seek().map_err(not_a_tar)? {
        let entry = entry.map_err(not_a_tar)?;
        let name = entry.path_bytes().into_owned();
        let base = name.rsplit(|&byte| byte == b'/').next().unwrap_or_default();
        if !entry.header().entry_type().is_file() || !is_image_name(base) {
            continue;
        }
        let (offset, length) = (entry.raw_file_position(), entry.size());
        if offset.checked_add(length).is_none_or(|end| end > size) {
            let detail =
                format!("member `{}` reaches beyond the end of the file", String::from_utf8_lossy(&name));
            return Err(not_a_tar(io::Error::new(io::ErrorKind::UnexpectedEof, detail)));
        }
        members.push(Member { name, offset, length });
    }
    Ok(members)
}
