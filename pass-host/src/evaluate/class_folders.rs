//! Folders of classes: `train/CLASS/*.jpg` and `val/CLASS/*.jpg`; the name of a folder is the name of its class. A shard
//! whose images are called so stands for such folders.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use walkdir::WalkDir;

use super::EvaluateError;
use crate::data::is_image_name;
use crate::data::shard::{Shard, is_shard};

/// An image and its class.
#[derive(Clone, Debug)]
pub struct Labelled {
    /// The file; of an image in a shard, the shard and the name in it, joined.
    pub path: PathBuf,
    /// Index into [`ClassFolders::classes`].
    pub class: usize,
    /// The shard that holds it, and its number there.
    pub shard: Option<(Arc<Shard>, usize)>,
}

impl Labelled {
    /// The bytes of the image file.
    ///
    /// # Errors
    /// The reason, for people.
    pub fn read(&self) -> Result<Cow<'_, [u8]>, String> {
        match &self.shard {
            Some((shard, i)) => shard.image(*i).map(Cow::Borrowed).map_err(|error| error.to_string()),
            None => {
                fs::read(&self.path).map(Cow::Owned).map_err(|error| format!("input/output error: {error}"))
            }
        }
    }
}

/// Images to learn from and images to judge with.
#[derive(Clone, Debug)]
pub struct ClassFolders {
    /// Names of the classes, sorted.
    pub classes: Vec<String>,
    /// Images to learn from, by class, then by path.
    pub train: Vec<Labelled>,
    /// Images to judge with, by class, then by path.
    pub val: Vec<Labelled>,
}

/// The images of one split by class; their class numbers are not known yet.
struct Split {
    place: PathBuf,
    classes: BTreeMap<String, Vec<Labelled>>,
}

impl ClassFolders {
    /// The splits `data/train` and `data/val`, of a folder or a shard.
    ///
    /// # Errors
    /// As [`ClassFolders::open_splits`].
    pub fn open(data: &Path) -> Result<Self, EvaluateError> {
        if !is_shard(data) {
            return Self::open_splits(&data.join("train"), &data.join("val"));
        }
        let shard = open_shard(data)?;
        let split = |name| Split::of_shard(&shard, data, name);
        Self::join(split("train")?, split("val")?)
    }

    /// Two folders of class folders, or shards of such. Images may lie in folders below a class folder; names that begin with
    /// a dot are skipped. A class of `train` need not appear in `val`.
    ///
    /// # Errors
    /// [`EvaluateError`] for splits without classes, classes without images, and classes of `val` that `train` lacks.
    pub fn open_splits(train: &Path, val: &Path) -> Result<Self, EvaluateError> {
        let split = |path: &Path| match is_shard(path) {
            true => Split::of_shard(&open_shard(path)?, path, ""),
            false => Split::of_folder(path),
        };
        Self::join(split(train)?, split(val)?)
    }

    fn join(train: Split, val: Split) -> Result<Self, EvaluateError> {
        let classes: Vec<String> = train.classes.keys().cloned().collect();
        if let [class] = classes.as_slice() {
            return Err(EvaluateError::OneClass { path: train.place, class: class.clone() });
        }
        if let Some(class) = val.classes.keys().find(|class| !train.classes.contains_key(*class)) {
            let class = class.clone();
            return Err(EvaluateError::UnknownClass { class, val: val.place, train: train.place });
        }
        let numbered = |split: Split| {
            let images = split.classes.into_iter().flat_map(|(name, images)| {
                let class = classes.binary_search(&name).unwrap_or_default();
                images.into_iter().map(move |image| Labelled { class, ..image })
            });
            images.collect()
        };
        let (train, val) = (numbered(train), numbered(val));
        Ok(Self { classes, train, val })
    }

    /// At most `images` images of each split, as evenly over the classes and within them as possible.
    #[must_use]
    pub fn limited(self, images: usize) -> Self {
        let classes = self.classes.len();
        Self { train: limited(self.train, images, classes), val: limited(self.val, images, classes), ..self }
    }
}

fn open_shard(path: &Path) -> Result<Arc<Shard>, EvaluateError> {
    Shard::open(path).map(Arc::new).map_err(|source| EvaluateError::Shard { path: path.into(), source })
}

impl Split {
    fn of_folder(place: &Path) -> Result<Self, EvaluateError> {
        let images = |name: String| Ok((images_below(&place.join(&name))?, name));
        let named = class_names(place)?.into_iter().map(images).collect::<Result<Vec<_>, EvaluateError>>()?;
        let classes = named.into_iter().map(|(images, name)| (name, images)).collect();
        Ok(Self { place: place.into(), classes })
    }

    /// The images of a shard whose names begin with `split` and a class.
    fn of_shard(shard: &Arc<Shard>, path: &Path, split: &str) -> Result<Self, EvaluateError> {
        let place = path.join(split);
        let (mut classes, mut loose) = (BTreeMap::<String, Vec<Labelled>>::new(), 0);
        for i in 0..shard.len() {
            let entry =
                shard.entry(i).map_err(|source| EvaluateError::Shard { path: path.into(), source })?;
            let name = String::from_utf8_lossy(entry.name);
            let Ok(below) = Path::new(name.as_ref()).strip_prefix(split) else { continue };
            let Some((class, _)) = below.to_str().and_then(|below| below.split_once('/')) else {
                loose += 1;
                continue;
            };
            let shard = Some((Arc::clone(shard), i));
            let image = Labelled { path: path.join(name.trim_start_matches('/')), class: 0, shard };
            classes.entry(class.to_owned()).or_default().push(image);
        }
        if classes.is_empty() {
            return Err(EvaluateError::NoClasses { path: place, images: loose });
        }
        classes.values_mut().for_each(|images| images.sort_unstable_by(|a, b| a.path.cmp(&b.path)));
        Ok(Self { place, classes })
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

fn images_below(folder: &Path) -> Result<Vec<Labelled>, EvaluateError> {
    let hidden = |entry: &walkdir::DirEntry| {
        entry.depth() > 0 && entry.file_name().as_encoded_bytes().starts_with(b".")
    };
    let mut images = Vec::new();
    for entry in WalkDir::new(folder).follow_links(true).into_iter().filter_entry(|entry| !hidden(entry)) {
        let entry = entry.map_err(|error| EvaluateError::Read {
            path: error.path().unwrap_or(folder).to_owned(),
            source: error.into(),
        })?;
        if !entry.file_type().is_dir() && is_image_name(entry.file_name().as_encoded_bytes()) {
            images.push(Labelled { path: entry.into_path(), class: 0, shard: None });
        }
    }
    if images.is_empty() {
        return Err(EvaluateError::EmptyClass { path: folder.into() });
    }
    images.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    Ok(images)
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
    use crate::data::shard::{NewImage, ShardWriter, Stored};

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
    fn a_shard_of_class_folders_stands_for_them() {
        let images = ["train/dog/1.jpg", "train/cat/x/3.png", "train/cat/2.jpg", "val/cat/6.jpg"];
        let root = tree(&images);
        let pack = |name: &str, images: &[&str]| {
            let path = root.path().join(name);
            let mut writer = ShardWriter::create(&path).unwrap();
            for image in images {
                let bytes = image.as_bytes().to_vec();
                let new = NewImage { bytes, width: 1, height: 1, stored: Stored::Original };
                writer.push(image.as_bytes(), &new).unwrap();
            }
            writer.finish().unwrap();
            path
        };
        let folders = ClassFolders::open(root.path()).unwrap();
        let shard = pack("s", &[&images[..], &["notes/a.jpg"]].concat());
        let names = |list: &[Labelled], root: &Path| {
            let name = |i: &Labelled| format!("{} {}", i.path.strip_prefix(root).unwrap().display(), i.class);
            list.iter().map(name).collect::<Vec<_>>()
        };
        let found = ClassFolders::open(&shard).unwrap();
        assert_eq!(found.classes, folders.classes);
        assert_eq!(names(&found.train, &shard), names(&folders.train, root.path()));
        assert_eq!(names(&found.val, &shard), names(&folders.val, root.path()));
        assert_eq!(found.train[0].read().unwrap(), &b"train/cat/2.jpg"[..]);
        let (train, val) = (pack("t", &["cat/1.jpg", "dog/2.jpg"]), pack("v", &["dog/3.jpg"]));
        let split = ClassFolders::open_splits(&train, &val).unwrap();
        assert_eq!((split.classes, split.val[0].class), (vec!["cat".to_owned(), "dog".to_owned()], 1));
        let error = ClassFolders::open_splits(&train, &pack("loose", &["1.jpg"])).unwrap_err();
        assert!(error.to_string().contains("found 1 images and no such folder"), "{error}");
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
            let image = |class, i| Labelled { path: format!("{class}/{i}").into(), class, shard: None };
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
