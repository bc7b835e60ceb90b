//! The frames of a video as files, in order.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::cli::error::Error;
use crate::cli::pictures::is_image_name;

/// A frame and what its mask is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FrameFile {
    pub(super) path: PathBuf,
    /// Without ending.
    pub(super) name: String,
}

/// At least one frame; no two of them have the same name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sequence {
    pub(super) frames: Vec<FrameFile>,
}

impl Sequence {
    /// The images of a folder by name, or those of `@LIST.txt` as they are listed.
    pub(super) fn find(frames: &Path) -> Result<Self, Error> {
        let list = frames.to_str().and_then(|text| text.strip_prefix('@')).map(Path::new);
        let paths = match list {
            Some(list) => listed(list)?,
            None => in_folder(frames)?,
        };
        if paths.is_empty() {
            let what = if list.is_some() { "lists no frames" } else { "holds no images" };
            return Err(Error::usage(
                format!("`{}` {what}", frames.display()),
                "FRAMES is a folder of images, or @LIST.txt with the path of an image on each line",
            ));
        }
        let mut names: BTreeMap<String, &Path> = BTreeMap::new();
        for path in &paths {
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            if let Some(other) = names.insert(name, path) {
                return Err(Error::usage(
                    format!("`{}` and `{}` would have the same mask", other.display(), path.display()),
                    "masks are named like their frames, without the ending: rename one of them",
                ));
            }
        }
        let named = |path: PathBuf| {
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            FrameFile { path, name }
        };
        Ok(Self { frames: paths.into_iter().map(named).collect() })
    }

    /// No mask or overlay may replace a frame or the first mask.
    pub(super) fn refuse_overwriting(
        &self,
        mask: &Path,
        out: &Path,
        overlay: Option<&Path>,
    ) -> Result<(), Error> {
        let folder_of = |path: &Path| {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
            folder.unwrap_or(Path::new(".")).canonicalize().ok()
        };
        let out = (out, out.canonicalize().ok());
        let overlay = overlay.map(|overlay| (overlay, overlay.canonicalize().ok()));
        for (folder, place) in [Some(&out), overlay.as_ref()].into_iter().flatten() {
            let inputs = self.frames.iter().map(|frame| frame.path.as_path()).chain([mask]);
            if let Some(path) = inputs.into_iter().find(|path| place.is_some() && folder_of(path) == *place) {
                return Err(Error::usage(
                    format!("masks in `{}` could replace `{}`", folder.display(), path.display()),
                    "choose a folder without frames and masks in it",
                ));
            }
        }
        if let Some((folder, place)) = overlay
            && (folder == out.0 || (place.is_some() && place == out.1))
        {
            return Err(Error::usage(
                "`--overlay` and `--out` name the same folder",
                "an overlay has the name of its mask: choose another folder",
            ));
        }
        Ok(())
    }
}

fn listed(list: &Path) -> Result<Vec<PathBuf>, Error> {
    let text = fs::read_to_string(list).map_err(|source| Error::Read { path: list.to_owned(), source })?;
    let folder = list.parent().unwrap_or(Path::new(""));
    Ok(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(|line| folder.join(line)).collect())
}

/// Images of the folder itself, hidden ones left out.
fn in_folder(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let read = |source| Error::Read { path: folder.to_owned(), source };
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(read)? {
        let path = entry.map_err(read)?.path();
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if !hidden && is_image_name(&path) && path.is_file() {
            paths.push(path);
        }
    }
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    paths.sort_by(|a, b| natural(&name(a), &name(b)));
    Ok(paths)
}

/// Order of names in which runs of digits are numbers: `frame9` before `frame10`.
fn natural(a: &str, b: &str) -> Ordering {
    let (mut left, mut right) = (a, b);
    while let (Some(x), Some(y)) = (left.chars().next(), right.chars().next()) {
        let order = if x.is_ascii_digit() && y.is_ascii_digit() {
            let (x, rest) = leading_number(left);
            left = rest;
            let (y, rest) = leading_number(right);
            right = rest;
            (x.len(), x).cmp(&(y.len(), y))
        } else {
            (left, right) = (&left[x.len_utf8()..], &right[y.len_utf8()..]);
            x.cmp(&y)
        };
        if order != Ordering::Equal {
            return order;
        }
    }
    // equal as numbers (07 and 7), or one is the beginning of the other
    (left.len(), a).cmp(&(right.len(), b))
}

/// The digits a text begins with, without leading zeros, and the rest of it.
fn leading_number(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    (text[..end].trim_start_matches('0'), &text[end..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_in_the_order_of_their_numbers() {
        let sorted =
            ["a.png", "f.png", "f1.png", "f02.png", "f2.png", "f2b.png", "f10.png", "f00099.png", "g1.png"];
        let mut names = sorted;
        names.reverse();
        names.sort_by(|a, b| natural(a, b));
        assert_eq!(names, sorted);
    }

    #[test]
    fn a_folder_gives_its_own_images() {
        let folder = tempfile::tempdir().expect("a folder");
        for name in ["10.jpg", "9.JPG", ".8.jpg", "notes.txt", "more/1.jpg"] {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
            fs::write(path, b"").expect("a file");
        }
        let names = |path: &Path| {
            Sequence::find(path).map(|found| found.frames.into_iter().map(|f| f.name).collect::<Vec<_>>())
        };
        assert_eq!(names(folder.path()).expect("frames"), ["9", "10"]);
        fs::write(folder.path().join("list.txt"), "more/1.jpg\n\n 10.jpg \n").expect("a file");
        let list = PathBuf::from(format!("@{}", folder.path().join("list.txt").display()));
        assert_eq!(names(&list).expect("frames"), ["1", "10"]);
        fs::write(folder.path().join("10.png"), b"").expect("a file");
        let error = names(folder.path()).expect_err("two masks called 10").to_string();
        assert!(error.contains("10.jpg` and `") && error.contains("the same mask"), "{error}");
        assert!(names(&folder.path().join("nowhere")).is_err());
    }
}
