//! What the user names -> groups of image files: folders (recursive), single files, `@lists`, tars, shards.

use std::io;
use std::path::{Path, PathBuf, absolute};
use std::sync::Arc;

use walkdir::WalkDir;

use super::archive;
use super::error::DataError;
use super::index_cache::Stamp;
use super::shard::{Shard, is_shard};

/// Name endings that folders and tars are searched for, in lower case.
pub(super) const EXTENSIONS: [&str; 16] = [
    "jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "dib", "tif", "tiff", "ppm", "pgm", "pbm", "pnm",
    "pam", "gif",
];

/// One image found in a folder or tar, and its name there; those of a shard are not listed.
#[derive(Debug)]
pub(super) struct Found {
    /// Index into [`Findings::holders`].
    pub(super) holder: u32,
    /// File name, or path inside the tar.
    pub(super) name: Vec<u8>,
    /// Offset and length inside the tar.
    pub(super) span: Option<(u64, u64)>,
}

/// A folder, a tar or a shard.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub(super) struct Holder {
    /// Absolute path; images are called `path/name`.
    pub(super) path: PathBuf,
    /// The bytes of `path` that vary with where the data set lies; the rest takes part in the manifest hash.
    pub(super) root_length: usize,
    pub(super) content: Content,
}

/// What holds images.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub(super) enum Content {
    /// A folder.
    Folder,
    /// The tar to read from: the one that was named, or its unpacked copy.
    Tar(PathBuf),
    /// An open shard; `None` in an index that was just read from the cache.
    Shard(#[serde(skip)] Option<Arc<Shard>>),
}

impl Holder {
    pub(super) fn shard(&self) -> Option<&Arc<Shard>> {
        match &self.content {
            Content::Shard(shard) => shard.as_ref(),
            Content::Folder | Content::Tar(_) => None,
        }
    }

    /// Opens the shard that a cached index names.
    pub(super) fn reopen(&mut self) -> Result<(), DataError> {
        if let Content::Shard(shard) = &mut self.content {
            *shard = Some(open_shard(&self.path)?);
        }
        Ok(())
    }
}

fn open_shard(path: &Path) -> Result<Arc<Shard>, DataError> {
    Shard::open(path).map(Arc::new).map_err(|source| DataError::Shard { path: path.to_owned(), source })
}

/// Everything the sources hold.
#[derive(Debug, Default)]
pub(super) struct Findings {
    pub(super) holders: Vec<Holder>,
    pub(super) images: Vec<Found>,
    /// What to look at to see whether the listing is still valid.
    pub(super) stamps: Vec<Stamp>,
}

impl Findings {
    fn add_holder(&mut self, path: PathBuf, root: &Path, content: Content) -> u32 {
        let root_length = root.as_os_str().len();
        self.holders.push(Holder { path, root_length, content });
        self.holders.len() as u32 - 1
    }

    fn add_file(&mut self, path: &Path) -> Result<(), DataError> {
        let path = absolute(path).map_err(|source| DataError::Io { path: path.to_owned(), source })?;
        let parent = path.parent().unwrap_or(Path::new("")).to_owned();
        let name = path.file_name().unwrap_or_default().as_encoded_bytes().to_vec();
        let holder = match self.holders.last() {
            Some(last) if last.path == parent => self.holders.len() as u32 - 1,
            _ => self.add_holder(parent.clone(), &parent, Content::Folder),
        };
        self.images.push(Found { holder, name, span: None });
        Ok(())
    }
}

/// Searches `sources`; gzip tars are unpacked beside `cache`.
pub(super) fn find(sources: &[String], cache: Option<&Path>) -> Result<Findings, DataError> {
    let mut found = Findings::default();
    for source in sources {
        if let Some(list) = source.strip_prefix('@') {
            add_list(&mut found, Path::new(list))?;
            continue;
        }
        let path = Path::new(source);
        let metadata = std::fs::metadata(path).map_err(|error| missing_or(path, error))?;
        if metadata.is_dir() {
            add_folder(&mut found, path)?;
        } else if is_shard(path) {
            add_shard(&mut found, path)?;
        } else if archive::is_tar_name(path) {
            add_tar(&mut found, path, cache)?;
        } else {
            found.stamps.push(Stamp::of(path)?);
            found.add_file(path)?;
        }
    }
    Ok(found)
}

fn missing_or(path: &Path, source: io::Error) -> DataError {
    let path = path.to_owned();
    if source.kind() == io::ErrorKind::NotFound {
        DataError::SourceMissing { path }
    } else {
        DataError::Io { path, source }
    }
}

/// Whether a file of this name is taken from a folder or tar.
pub(crate) fn is_image_name(name: &[u8]) -> bool {
    let Some(dot) = name.iter().rposition(|&byte| byte == b'.') else { return false };
    let extension = name[dot + 1..].to_ascii_lowercase();
    name[0] != b'.' && EXTENSIONS.iter().any(|known| known.as_bytes() == extension)
}

fn add_folder(found: &mut Findings, folder: &Path) -> Result<(), DataError> {
    let root = absolute(folder).map_err(|source| DataError::Io { path: folder.to_owned(), source })?;
    let hidden = |entry: &walkdir::DirEntry| {
        entry.depth() > 0 && entry.file_name().as_encoded_bytes().starts_with(b".")
    };
    // a folder is entered before its files are seen, but other folders come between them: the open ones form a stack
    let mut open: Vec<u32> = Vec::new();
    for entry in WalkDir::new(&root).follow_links(true).into_iter().filter_entry(|entry| !hidden(entry)) {
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) => {
                let path = error.path().unwrap_or(&root).to_owned();
                let broken_link = error.io_error().is_some_and(|e| e.kind() == io::ErrorKind::NotFound);
                if broken_link && error.depth() > 0 {
                    continue;
                }
                return Err(DataError::Io { path, source: error.into() });
            }
        };
        if entry.file_type().is_dir() {
            found.stamps.push(Stamp::of(entry.path())?);
            let holder = found.add_holder(entry.path().to_owned(), &root, Content::Folder);
            open.truncate(entry.depth());
            open.push(holder);
            continue;
        }
        let name = entry.file_name().as_encoded_bytes();
        if is_image_name(name)
            && let Some(&holder) = entry.depth().checked_sub(1).and_then(|depth| open.get(depth))
        {
            found.images.push(Found { holder, name: name.to_vec(), span: None });
        }
    }
    Ok(())
}

fn add_list(found: &mut Findings, list: &Path) -> Result<(), DataError> {
    found.stamps.push(Stamp::of(list)?);
    let bytes = std::fs::read(list).map_err(|error| missing_or(list, error))?;
    let text = String::from_utf8(bytes).map_err(|_| DataError::Io {
        path: list.to_owned(),
        source: io::Error::new(io::ErrorKind::InvalidData, "a list of paths is UTF-8 text"),
    })?;
    let folder = list.parent().unwrap_or(Path::new(""));
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let path = folder.join(line);
        if !path.is_file() {
            return Err(DataError::ListedMissing { list: list.to_owned(), line: index + 1, path });
        }
        if !is_image_name(path.file_name().unwrap_or_default().as_encoded_bytes()) && is_shard(&path) {
            add_shard(found, &path)?;
        } else {
            found.add_file(&path)?;
        }
    }
    Ok(())
}

fn add_shard(found: &mut Findings, shard: &Path) -> Result<(), DataError> {
    found.stamps.push(Stamp::of(shard)?);
    let path = absolute(shard).map_err(|source| DataError::Io { path: shard.to_owned(), source })?;
    let content = Content::Shard(Some(open_shard(&path)?));
    found.add_holder(path.clone(), &path, content);
    Ok(())
}

fn add_tar(found: &mut Findings, tar: &Path, cache: Option<&Path>) -> Result<(), DataError> {
    found.stamps.push(Stamp::of(tar)?);
    let path = absolute(tar).map_err(|source| DataError::Io { path: tar.to_owned(), source })?;
    let readable = archive::readable_tar(&path, cache)?;
    let root = path.parent().unwrap_or(Path::new("")).to_owned();
    let holder = found.add_holder(path.clone(), &root, Content::Tar(readable.clone()));
    for member in archive::members(&path, &readable)? {
        found.images.push(Found { holder, name: member.name, span: Some((member.offset, member.length)) });
    }
    Ok(())
}
