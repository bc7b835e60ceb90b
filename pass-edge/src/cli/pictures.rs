//! Image files, one after the other: named ones as they are named, those of a folder in sorted order.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use pass_edge::image::{Image, PixelOrder};
use walkdir::{DirEntry, WalkDir};

use super::decode::{DecodeError, Picture, decode};
use super::error::Error;

/// Name endings that folders are searched for, in lower case.
const EXTENSIONS: [&str; 16] = [
    "jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "dib", "tif", "tiff", "ppm", "pgm", "pbm", "pnm",
    "pam", "gif",
];
/// Files beyond this size are refused as a whole.
const MOST_BYTES: u64 = 1 << 30;

/// Why a file gives no picture.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PictureError {
    #[error(transparent)]
    Decode(#[from] DecodeError),
    #[error("{bytes} bytes are more than an image file may have ({MOST_BYTES})")]
    TooLarge { bytes: u64 },
    #[error("input/output error: {0}")]
    Io(#[from] io::Error),
}

/// The pictures of all inputs. Folders are read as they are reached, so their number does not cost memory.
pub(super) struct Pictures {
    paths: Box<dyn Iterator<Item = Result<PathBuf, walkdir::Error>>>,
    max_megapixels: f64,
}

impl Pictures {
    /// Checks that the inputs are there.
    pub(super) fn find(inputs: Vec<PathBuf>, max_megapixels: f64) -> Result<Self, Error> {
        for path in &inputs {
            fs::metadata(path).map_err(|source| Error::Read { path: path.clone(), source })?;
        }
        let paths = inputs.into_iter().flat_map(|input| paths(&input));
        Ok(Self { paths: Box::new(paths), max_megapixels })
    }
}

impl Iterator for Pictures {
    type Item = (String, Result<Picture, PictureError>);

    fn next(&mut self) -> Option<Self::Item> {
        Some(match self.paths.next()? {
            Ok(path) => (path.display().to_string(), read_picture(&path, self.max_megapixels)),
            Err(error) => {
                let path = error.path().unwrap_or(Path::new("")).display().to_string();
                (path, Err(io::Error::from(error).into()))
            }
        })
    }
}

impl Picture {
    /// The picture as the library sees it.
    pub(super) fn image(&self) -> pass_edge::Result<Image<'_>> {
        Image::new(&self.rgb, (self.height, self.width), 3 * self.width, PixelOrder::Rgb)
    }
}

/// Reads and decodes a file.
pub(super) fn read_picture(path: &Path, max_megapixels: f64) -> Result<Picture, PictureError> {
    let file = File::open(path)?;
    let bytes = file.metadata()?.len();
    if bytes > MOST_BYTES {
        return Err(PictureError::TooLarge { bytes });
    }
    let mut contents = Vec::with_capacity(bytes as usize + 1);
    file.take(MOST_BYTES).read_to_end(&mut contents)?;
    Ok(decode(&contents, max_megapixels)?)
}

/// A file, or the images of a folder: its own by name, then those of its folders. Hidden files and folders are left
/// out, as are links that lead nowhere.
fn paths(input: &Path) -> impl Iterator<Item = Result<PathBuf, walkdir::Error>> + use<> {
    let files_first = |a: &DirEntry, b: &DirEntry| {
        (a.file_type().is_dir(), a.file_name()).cmp(&(b.file_type().is_dir(), b.file_name()))
    };
    let shown = |entry: &DirEntry| entry.depth() == 0 || !starts_with_dot(entry);
    let entries = WalkDir::new(input).follow_links(true).sort_by(files_first).into_iter().filter_entry(shown);
    entries.filter_map(|entry| match entry {
        Ok(entry) if entry.file_type().is_dir() => None,
        Ok(entry) => (entry.depth() == 0 || is_image_name(entry.path())).then(|| Ok(entry.into_path())),
        Err(error) => {
            let leads_nowhere = error.io_error().is_some_and(|io| io.kind() == io::ErrorKind::NotFound);
            (!leads_nowhere).then_some(Err(error))
        }
    })
}

fn starts_with_dot(entry: &DirEntry) -> bool {
    entry.file_name().as_encoded_bytes().starts_with(b".")
}

/// Whether a name ends like that of an image.
pub(super) fn is_image_name(path: &Path) -> bool {
    let extension = path.extension().map(|extension| extension.to_string_lossy().to_lowercase());
    extension.is_some_and(|extension| EXTENSIONS.contains(&extension.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_searched_in_sorted_order() {
        let folder = tempfile::tempdir().expect("a folder");
        for name in
            ["b/1.png", "b/c/2.JPG", "a.png", "z.tiff", "a/9.bmp", "notes.txt", ".hidden/1.png", "a/.x.png"]
        {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
            fs::write(path, b"").expect("a file");
        }
        let found: Vec<_> = paths(folder.path())
            .map(|path| path.expect("readable").strip_prefix(folder.path()).expect("inside").to_owned())
            .collect();
        assert_eq!(found, ["a.png", "z.tiff", "a/9.bmp", "b/1.png", "b/c/2.JPG"].map(PathBuf::from));
        // a file that is named is taken whatever it is called
        assert_eq!(paths(&folder.path().join("notes.txt")).count(), 1);
    }
}
