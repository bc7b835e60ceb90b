//! A shard being written: images in order, then names and index; whole or not there at all.

use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::format::{ENTRY_BYTES, Entry, HEADER_BYTES, Header, Stored};

/// Bytes collected before they are written.
const BUFFER: usize = 1 << 22;

/// One image for a shard.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// A complete image file.
    pub bytes: Vec<u8>,
    /// Width in pixels, upright.
    pub width: u32,
    /// Height in pixels, upright.
    pub height: u32,
    /// How it is stored.
    pub stored: Stored,
}

/// A finished shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Length of the file.
    pub bytes: u64,
    /// Checksum of all names and entries.
    pub content_hash: u64,
}

/// Writes a shard beside its place; nothing is at its place before [`ShardWriter::finish`], and what was not finished
/// is removed.
#[derive(Debug)]
pub struct ShardWriter {
    path: PathBuf,
    temporary: PathBuf,
    writer: BufWriter<File>,
    /// Where the next image begins.
    position: u64,
    names: Vec<u8>,
    /// The entries; the offsets of their names are counted from the first one until the end is known.
    entries: Vec<Pending>,
    finished: bool,
}

#[derive(Debug)]
struct Pending {
    offset: u64,
    length: u64,
    checksum: u64,
    name_end: usize,
    width: u32,
    height: u32,
    stored: Stored,
}

impl Drop for ShardWriter {
    fn drop(&mut self) {
        if !self.finished {
            fs::remove_file(&self.temporary).ok();
        }
    }
}

impl ShardWriter {
    /// Starts the shard that will be at `path`.
    ///
    /// # Errors
    /// What the file system refuses; [`io::ErrorKind::WouldBlock`] while another process writes it.
    pub fn create(path: &Path) -> io::Result<Self> {
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            fs::create_dir_all(folder)?;
        }
        if path.is_dir() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        let mut name = std::ffi::OsString::from(".tmp-");
        name.push(path.file_name().ok_or(io::ErrorKind::InvalidFilename)?);
        let temporary = path.with_file_name(name);
        let file = File::options().create(true).write(true).truncate(false).open(&temporary)?;
        // not emptied before it is ours: a second writer must leave the first one's bytes alone
        file.try_lock()?;
        file.set_len(0)?;
        let mut writer = BufWriter::with_capacity(BUFFER, file);
        writer.write_all(&[0; HEADER_BYTES])?;
        Ok(Self {
            path: path.into(),
            temporary,
            writer,
            position: HEADER_BYTES as u64,
            names: Vec::new(),
            entries: Vec::new(),
            finished: false,
        })
    }

    /// Adds an image; names are not looked at, and need not be unique for the format's sake.
    ///
    /// # Errors
    /// What the file system refuses.
    pub fn push(&mut self, name: &[u8], image: &NewImage) -> io::Result<()> {
        self.writer.write_all(&image.bytes)?;
        self.names.extend_from_slice(name);
        let length = image.bytes.len() as u64;
        self.entries.push(Pending {
            offset: self.position,
            length,
            checksum: xxh3_64(&image.bytes),
            name_end: self.names.len(),
            width: image.width,
            height: image.height,
            stored: image.stored,
        });
        self.position += length;
        Ok(())
    }

    /// Writes names, index and header, makes them durable and gives the file its name.
    ///
    /// # Errors
    /// What the file system refuses.
    pub fn finish(mut self) -> io::Result<Written> {
        let names = self.position;
        let index = names + self.names.len() as u64;
        let mut content = Xxh3::new();
        content.update(&self.names);
        self.writer.write_all(&self.names)?;
        let mut start = 0;
        for (number, entry) in self.entries.iter().enumerate() {
            let Pending { offset, length, checksum, name_end, width, height, stored } = *entry;
            let name = &self.names[start..name_end];
            let entry = Entry { offset, length, checksum, name, width, height, stored };
            let bytes = entry.to_bytes(number as u64, names + start as u64);
            content.update(&bytes);
            self.writer.write_all(&bytes)?;
            start = name_end;
        }
        let header = Header {
            images: self.entries.len() as u64,
            names,
            names_length: self.names.len() as u64,
            index,
            length: index + (self.entries.len() * ENTRY_BYTES) as u64,
            content: content.digest(),
        };
        self.writer.seek(SeekFrom::Start(0))?;
        self.writer.write_all(&header.to_bytes())?;
        self.writer.flush()?;
        self.writer.get_ref().sync_all()?;
        fs::rename(&self.temporary, &self.path)?;
        self.finished = true;
        if cfg!(unix) {
            let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty());
            File::open(folder.unwrap_or(Path::new(".")))?.sync_all()?;
        }
        Ok(Written { bytes: header.length, content_hash: header.content })
    }
}
