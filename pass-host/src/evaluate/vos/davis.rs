//! The DAVIS folder layout: `JPEGImages/480p/SEQUENCE/*.jpg`, `Annotations/480p/SEQUENCE/*.png`,
//! `ImageSets/YEAR/SPLIT.txt`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path, PathBuf};

use super::error::VosError;

/// The folder of the resolution at which the published results were measured.
const RESOLUTION: &str = "480p";

/// Which sequences.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selection {
    /// These.
    Named(Vec<String>),
    /// Those of `ImageSets/{year}/{split}.txt`.
    Listed {
        /// For example 2017.
        year: String,
        /// For example `val`.
        split: String,
    },
}

/// A frame and its true mask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Name without ending.
    pub name: String,
    /// The picture; may not be there where only masks are compared.
    pub image: PathBuf,
    /// The true mask.
    pub annotation: PathBuf,
}

/// Frames in order: at least three.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Its folder.
    pub name: String,
    /// By name.
    pub frames: Vec<Frame>,
}

/// Finds the selected sequences of a data set; with `images`, every mask must have its frame and the other way round.
///
/// # Errors
/// [`VosError`] for the first file that is not where it should be.
pub fn sequences(root: &Path, selection: &Selection, images: bool) -> Result<Vec<Sequence>, VosError> {
    if !root.is_dir() {
        return Err(VosError::Layout { path: root.to_owned(), expected: "the folder of a data set" });
    }
    let mut names = match selection {
        Selection::Named(names) => names.clone(),
        Selection::Listed { year, split } => listed(root, year, split)?,
    };
    let mut seen = std::collections::BTreeSet::new();
    names.retain(|name| seen.insert(name.clone()));
    if names.is_empty() {
        return Err(VosError::NoSequence { source_name: "`--sequences`".into() });
    }
    names.into_iter().map(|name| sequence(root, name, images)).collect()
}

fn listed(root: &Path, year: &str, split: &str) -> Result<Vec<String>, VosError> {
    let path = root.join("ImageSets").join(year).join(format!("{split}.txt"));
    if !path.is_file() {
        return Err(VosError::Layout { path, expected: "a list of sequences" });
    }
    let text = fs::read_to_string(&path).map_err(|source| VosError::Read { path: path.clone(), source })?;
    let mut names = Vec::new();
    for (line, name) in text.lines().map(str::trim).enumerate().filter(|(_, name)| !name.is_empty()) {
        if !is_folder_name(name) || name.contains(char::is_whitespace) {
            return Err(VosError::List { path, line: line + 1, found: name.to_owned() });
        }
        names.push(name.to_owned());
    }
    match names.is_empty() {
        true => Err(VosError::NoSequence { source_name: format!("`{}`", path.display()) }),
        false => Ok(names),
    }
}

/// One plain component: nothing that leads to another folder.
fn is_folder_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name)
}

fn sequence(root: &Path, name: String, with_images: bool) -> Result<Sequence, VosError> {
    if !is_folder_name(&name) {
        return Err(VosError::BadName { name });
    }
    let folder = |kind: &str| root.join(kind).join(RESOLUTION).join(&name);
    let (images, annotations) = (folder("JPEGImages"), folder("Annotations"));
    let masks = files(&annotations, &["png"], "the masks of a sequence")?;
    let mut pictures = match with_images {
        true => files(&images, &["jpg", "jpeg"], "the frames of a sequence")?,
        false => BTreeMap::new(),
    };
    if masks.len() < 3 {
        return Err(VosError::TooShort { folder: annotations, frames: masks.len() });
    }
    let mut frames = Vec::with_capacity(masks.len());
    for (name, annotation) in masks {
        let image = pictures.remove(&name);
        let image = match (image, with_images) {
            (Some(image), _) => image,
            (None, false) => images.join(format!("{name}.jpg")),
            (None, true) => {
                let path = images.join(format!("{name}.jpg"));
                return Err(VosError::MissingFrame { path, of: annotation, what: "frame" });
            }
        };
        frames.push(Frame { name, image, annotation });
    }
    if let Some((name, of)) = pictures.into_iter().next() {
        let path = annotations.join(format!("{name}.png"));
        return Err(VosError::MissingFrame { path, of, what: "mask" });
    }
    Ok(Sequence { name, frames })
}

/// Files of a folder by name without ending; hidden ones are left out.
fn files(
    folder: &Path,
    endings: &[&str],
    expected: &'static str,
) -> Result<BTreeMap<String, PathBuf>, VosError> {
    if !folder.is_dir() {
        return Err(VosError::Layout { path: folder.to_owned(), expected });
    }
    let read = |source| VosError::Read { path: folder.to_owned(), source };
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).map_err(read)? {
        let path = entry.map_err(read)?.path();
        let ending = path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default();
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if endings.contains(&ending.as_str()) && !name.starts_with('.') {
            found.insert(name, path);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data_set(files: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for file in files {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "dog\n\n cat \n").unwrap();
        }
        root
    }

    const DOG: [&str; 6] = [
        "JPEGImages/480p/dog/00000.jpg",
        "JPEGImages/480p/dog/00001.jpg",
        "JPEGImages/480p/dog/00002.jpg",
        "Annotations/480p/dog/00000.png",
        "Annotations/480p/dog/00001.png",
        "Annotations/480p/dog/00002.png",
    ];

    fn named(name: &str) -> Selection {
        Selection::Named(vec![name.to_owned()])
    }

    fn val() -> Selection {
        Selection::Listed { year: "2017".into(), split: "val".into() }
    }

    #[test]
    fn frames_come_in_the_order_of_their_names() {
        let root = data_set(&DOG);
        let found = sequences(root.path(), &named("dog"), true).unwrap();
        let names: Vec<_> = found[0].frames.iter().map(|frame| frame.name.as_str()).collect();
        assert_eq!((found[0].name.as_str(), names), ("dog", vec!["00000", "00001", "00002"]));
        let twice = Selection::Named(vec!["dog".into(), "dog".into()]);
        assert_eq!(sequences(root.path(), &twice, true).unwrap(), found);
    }

    #[test]
    fn what_is_missing_is_named() {
        let check = |files: &[&str], selection: &Selection, images: bool, expected: &str| {
            let root = data_set(files);
            let error = sequences(root.path(), selection, images).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
            assert!(error.hint().is_some());
        };
        check(&DOG, &val(), true, "ImageSets/2017/val.txt` does not exist");
        check(&[&DOG[..], &["ImageSets/2017/val.txt"]].concat(), &val(), true, "480p/cat` does not exist");
        check(&DOG[..5], &named("dog"), true, "holds 2 masks");
        check(&DOG[1..], &named("dog"), true, "JPEGImages/480p/dog/00000.jpg` is missing");
        check(
            &[&DOG[..], &["JPEGImages/480p/dog/00003.jpg"]].concat(),
            &named("dog"),
            true,
            "dog/00003.png` is missing",
        );
        check(&DOG[3..], &named("dog"), true, "JPEGImages/480p/dog` does not exist");
        for name in ["../dog", "dog/", "", "/etc"] {
            check(&DOG, &named(name), false, "is no name of a sequence");
        }
        check(&DOG, &Selection::Named(vec![]), false, "names no sequence");
        let error = sequences(Path::new("nowhere"), &val(), true).unwrap_err().to_string();
        assert!(error.contains("`nowhere` does not exist"), "{error}");
    }

    #[test]
    fn masks_alone_are_enough_to_score() {
        let root = data_set(&DOG[3..]);
        assert_eq!(sequences(root.path(), &named("dog"), false).unwrap()[0].frames.len(), 3);
    }

    #[test]
    fn a_list_has_one_name_a_line() {
        let root = data_set(&[]);
        let list = root.path().join("ImageSets/2016/val.txt");
        fs::create_dir_all(list.parent().unwrap()).unwrap();
        fs::write(&list, "dog\n/JPEGImages/dog/0.jpg /Annotations/dog/0.png\n").unwrap();
        let selection = Selection::Listed { year: "2016".into(), split: "val".into() };
        let error = sequences(root.path(), &selection, true).unwrap_err().to_string();
        assert!(error.contains("line 2: expected the name of a sequence"), "{error}");
        fs::write(&list, "\n").unwrap();
        assert!(sequences(root.path(), &selection, true).unwrap_err().to_string().contains("no sequence"));
    }
}
