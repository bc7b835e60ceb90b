//! A model file, mapped into memory: its pages are shared with the page cache, nothing is copied.
#![expect(unsafe_code, reason = "mapping a file is unsafe: another process may change it meanwhile")]

use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use pass_edge::model::Model;

use super::error::Error;

/// An open model file.
#[derive(Debug)]
pub(super) struct ModelFile {
    path: PathBuf,
    map: Mmap,
}

impl ModelFile {
    /// Maps the file.
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        let read = |source| Error::Read { path: path.to_owned(), source };
        let file = File::open(path).map_err(read)?;
        let length = file.metadata().map_err(read)?.len();
        if length == 0 {
            // an empty file cannot be mapped everywhere
            return Err(Error::Model { path: path.to_owned(), source: pass_edge::Error::NotAModel });
        }
        // SAFETY: the map is only read, as bytes of any value. Programs replace models by renaming, which leaves the mapped
        // file as it is; one that is overwritten in place would change features, which the self-test at start is for.
        let map = unsafe { Mmap::map(&file) }.map_err(read)?;
        Ok(Self { path: path.to_owned(), map })
    }

    /// Validates the file.
    pub(super) fn model(&self) -> Result<Model<'_>, Error> {
        Model::from_bytes(&self.map).map_err(|source| Error::Model { path: self.path.clone(), source })
    }

    /// Its size in bytes.
    pub(super) fn len(&self) -> usize {
        self.map.len()
    }
}
