//! Files that are complete or not there at all.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// A file beside its place, moved there when it is complete and removed if it never is.
pub(super) struct Draft {
    path: PathBuf,
    temporary: PathBuf,
    pub(super) writer: BufWriter<File>,
}

impl Drop for Draft {
    /// Once moved there is nothing to remove.
    fn drop(&mut self) {
        fs::remove_file(&self.temporary).ok();
    }
}

impl Draft {
    /// Opens it.
    pub(super) fn create(path: PathBuf) -> io::Result<Self> {
        let mut name = std::ffi::OsString::from(".tmp-");
        name.push(path.file_name().unwrap_or_default());
        let temporary = path.with_file_name(name);
        let writer = BufWriter::with_capacity(1 << 14, File::create(&temporary)?);
        Ok(Self { path, temporary, writer })
    }

    /// Everything on disk, under its temporary name.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        self.writer.flush()?;
        self.writer.get_ref().sync_all()
    }

    /// Moves it to its place.
    pub(super) fn publish(self) -> io::Result<()> {
        fs::rename(&self.temporary, &self.path)
    }
}

/// Writes a whole file.
pub(super) fn write_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut draft = Draft::create(path.to_owned())?;
    draft.writer.write_all(bytes)?;
    draft.sync()?;
    draft.publish()
}
