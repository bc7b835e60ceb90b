//! Folders of classes: `train/CLASS/*.jpg` and `val/CLASS/*.jpg`; the name of a folder is the name of its class.

use std::fs;
use std::path::{Path, PathBuf};

use walkdir::WalkDir;

use super::EvaluateError;
use crate::data::is_image_name;

/// An image and its class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Labelled {
    /// The file.
    pub path: PathBuf,
    /// Index into [`ClassFolders::classes`].
    pub class: usize,
}

/// Images to learn from and images to judge with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClassFolders {
    /// Names of the classes, sorted.
    pub classes: Vec<String>,
    /// Images to learn from, by class, then by path.
    pub train: Vec<Labelled>,
    /// Images to judge with, by class, then by path.
    pub val: Vec<Labelled>,
}

impl ClassFolders {
    /// The splits `data/train` and `data/val`.
    ///
    /// # Errors
    /// As [`ClassFolders::open_splits`].
    pub fn open(data: &Path) -> Result<Self, EvaluateError> {
        Self::open_splits(&data.join("train"), &data.join("val"))
    }

    /// Two folders of class folders. Images may lie in folders below a class folder; names that begin with a dot are
    /// skipped. A class of `train` need not appear in `val`.
    ///
    /// # Errors
    /// [`EvaluateError`] for splits without classes, classes without images, and classes of `val` that `train` lacks.
    pub fn open_splits(train: &Path, val: &Path) -> Result<Self, EvaluateError> {
        let classes = class_names(train)?;
        if let [class] = classes.as_slice() {
            return Err(EvaluateError::OneClass { path: train.into(), class: class.clone() });
        }
        let mut sets = Self { classes, train: Vec::new(), val: Vec::new() };
        for (class, name) in sets.classes.iter().enumerate() {
            add_images(&mut sets.train, &train.join(name), class)?;
        }
        for name in class_names(val)? {
            let Ok(class) = sets.classes.binary_search(&name) else {
                return Err(EvaluateError::UnknownClass {
                    class: name,
                    val: val.into(),
                    train: train.into(),
                });
            };
            add_images(&mut sets.val, &val.join(name), class)?;
        }
        Ok(sets)
    }

    /// At most `images` images of each split, as evenly over the classes and within them as possible.
    #[must_use]
    pub fn limited(self, images: usize) -> Self {
        let classes = self.classes.len();
        Self { train: limited(self.train, images, classes), val: limited(self.val, images, classes), ..self }
    }
}

/// Names of the class folders of a split, sorted.
fn class_names(split: &Path) -> Result<Vec<String>, EvaluateError> {
    if !split.is_dir() {
        return Err(EvaluateError::NotAFolder { path: split.into(), expected: "a folder of class folders" });
    }
    let read = |source| EvaluateError::Read { path: split.into(), source };
    let (mut names, mut images) = (Vec::new(), 0);
    for entry in fs::read_dir(split).map_err(read)? {
        let entry = entry.map_err(read)?;
        let name = entry.file_name();
        if name.as_encoded_bytes().starts_with(b".") {
            continue;
        }
        if entry.path().is_dir() {
            let name = name.into_string().map_err(|name| {
                let reason = format!("the name of class folder {name:?} is not UTF-8");
                read(std::io::Error::new(std::io::ErrorKind::InvalidData, reason))
            })?;
            names.push(name);
        } else {
            images += usize::from(is_image_name(name.as_encoded_bytes()));
        }
    }
    if names.is_empty() {
        return Err(EvaluateError::NoClasses { path: split.into(), images });
    }
    names.sort_unstable();
    Ok(names)
}

fn add_images(list: &mut Vec<Labelled>, folder: &Path, class: usize) -> Result<(), EvaluateError> {
    let hidden = |entry: &walkdir::DirEntry| {
        entry.depth() > 0 && entry.file_name().as_encoded_bytes().starts_with(b".")
    };
    let first = list.len();
    for entry in WalkDir::new(folder).follow_links(true).into_iter().filter_entry(|entry| !hidden(entry)) {
        let entry = entry.map_err(|error| EvaluateError::Read {
            path: error.path().unwrap_or(folder).to_owned(),
            source: error.into(),
        })?;
        if !entry.file_type().is_dir() && is_image_name(entry.file_name().as_encoded_bytes()) {
            list.push(Labelled { path: entry.into_path(), class });
        }
    }
    if list.len() == first {
        return Err(EvaluateError::EmptyClass { path: folder.into() });
    }
    list[first..].sort_unstable_by(|a, b| a.path.cmp(&b.path));
    Ok(())
}

/// The share of each class is what is left, divided by the classes that are left, smallest class first.
fn limited(list: Vec<Labelled>, images: usize, classes: usize) -> Vec<Labelled> {
    let mut by_class: Vec<Vec<Labelled>> = vec![Vec::new(); classes];
    for image in list {
        by_class[image.class].push(image);
    }
    let mut order: Vec<usize> = (0..classes).collect();
    order.sort_by_key(|&class| by_class[class].len());
    let mut left = images;
    for (place, &class) in order.iter().enumerate() {
        let members = &mut by_class[class];
        let share = members.len().min(left / (classes - place));
        left -= share;
        *members = (0..share).map(|i| members[i * members.len() / share].clone()).collect();
    }
    by_class.concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for file in files {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            if !file.ends_with('/') {
                fs::write(path, "").unwrap();
            }
        }
        root
    }

    #[test]
    fn classes_and_images_are_sorted_and_matched_by_name() {
        let root = tree(&[
            "train/dog/2.jpg",
            "train/dog/1.JPG",
            "train/cat/x/3.png",
            "train/cat/notes.txt",
            "train/.cache/a.jpg",
            "train/owl/4.webp",
            "val/owl/5.jpg",
            "val/cat/6.jpg",
        ]);
        let sets = ClassFolders::open(root.path()).unwrap();
        assert_eq!(sets.classes, ["cat", "dog", "owl"]);
        let names = |list: &[Labelled]| {
            list.iter()
                .map(|i| format!("{} {}", i.path.strip_prefix(root.path()).unwrap().display(), i.class))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            names(&sets.train),
            ["train/cat/x/3.png 0", "train/dog/1.JPG 1", "train/dog/2.jpg 1", "train/owl/4.webp 2"]
        );
        assert_eq!(names(&sets.val), ["val/cat/6.jpg 0", "val/owl/5.jpg 2"]);
    }

    #[test]
    fn each_fault_names_the_folder() {
        let cases: [(&[&str], &str); 6] = [
            (&["train/a/1.jpg", "train/b/1.jpg"], "val`: expected a folder of class folders, found nothing"),
            (
                &["train/1.jpg", "val/a/1.jpg"],
                "train`: expected a folder of images for each class, found 1 images",
            ),
            (&["train/a/1.jpg", "val/a/1.jpg"], "found only `a`"),
            (&["train/a/1.jpg", "train/b/1.txt", "val/a/1.jpg"], "train/b` holds no image"),
            (&["train/a/1.jpg", "train/b/1.jpg", "val/c/1.jpg"], "class `c` of"),
            (&["train/a/1.jpg", "train/b/1.jpg", "val/b/1.txt"], "val/b` holds no image"),
        ];
        for (files, expected) in cases {
            let root = tree(files);
            let error = ClassFolders::open(root.path()).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
            assert!(error.hint().is_some());
        }
    }

    #[test]
    fn a_limit_is_shared_by_the_classes() {
        let list = |counts: &[usize]| -> Vec<Labelled> {
            let image = |class, i| Labelled { path: format!("{class}/{i}").into(), class };
            counts.iter().enumerate().flat_map(|(class, &n)| (0..n).map(move |i| image(class, i))).collect()
        };
        for (counts, images, expected) in [
            (&[10, 10, 10][..], 6, &[2, 2, 2][..]),
            (&[10, 1, 10], 7, &[3, 1, 3]),
            (&[2, 2, 2], 100, &[2, 2, 2]),
            (&[5, 5, 5], 2, &[0, 1, 1]),
        ] {
            let kept = limited(list(counts), images, counts.len());
            let count = |class| kept.iter().filter(|image| image.class == class).count();
            assert_eq!((0..counts.len()).map(count).collect::<Vec<_>>(), expected, "{counts:?} {images}");
        }
        let spread = limited(list(&[10, 10]), 4, 2);
        assert_eq!(spread[..2].iter().map(|i| i.path.to_str().unwrap()).collect::<Vec<_>>(), ["0/0", "0/5"]);
    }
}
