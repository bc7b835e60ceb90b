use super::*;
use crate::evaluate::index_png::{IndexImage, encode, voc_color};
use image::{ImageFormat, RgbImage};

/// Writes a gray image and its mask.
fn sample(images: &Path, masks: &Path, name: &str, size: (u32, u32), indices: &[u8]) {
    fs::create_dir_all(images).unwrap();
    fs::create_dir_all(masks).unwrap();
    let picture = RgbImage::from_pixel(size.0, size.1, image::Rgb([90, 90, 90]));
    picture.save_with_format(images.join(format!("{name}.png")), ImageFormat::Png).unwrap();
    let mask = IndexImage { width: size.0, height: size.1, indices: indices.to_vec() };
    let palette: Vec<[u8; 3]> = (0..=255).map(voc_color).collect();
    fs::write(masks.join(format!("{name}.png")), encode(&mask, &palette).unwrap()).unwrap();
}

/// A CamVid folder of one image a split with classes a, b, c and 11 ignored.
fn camvid() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for split in ["train", "val"] {
        let [images, masks] = ["images", "labels"].map(|kind| dir.path().join(kind).join(split));
        sample(&images, &masks, "one", (2, 2), &[0, 1, 2, 11]);
    }
    fs::write(dir.path().join(DESCRIPTION), r#"{"classes": ["a", "b", "c"], "ignore_index": 11}"#).unwrap();
    dir
}

fn open(dir: &Path) -> Result<Dataset, SegmentError> {
    Dataset::open(dir, &DatasetOptions::default())
}

fn message(error: SegmentError) -> String {
    assert!(error.hint().is_none_or(|hint| !hint.is_empty()));
    error.to_string()
}

#[test]
fn camvid_folders_are_read() {
    let dir = camvid();
    let dataset = open(dir.path()).unwrap();
    assert_eq!((dataset.layout, dataset.ignore, dataset.reduce_zero_label), (Layout::Camvid, 11, false));
    assert_eq!(dataset.classes.names, ["a", "b", "c"]);
    assert_eq!(dataset.load(&dataset.train[0]).unwrap().labels, [0, 1, 2, IGNORED]);
    let other = Dataset::open(dir.path(), &DatasetOptions { ignore: Some(2), ..DatasetOptions::default() });
    let error = other.as_ref().unwrap().load(&dataset.train[0]).unwrap_err();
    assert!(message(error).contains("label 11 at column 1, row 1"));
    assert_ne!(other.unwrap().fingerprint(), dataset.fingerprint());
}

#[test]
fn ade20k_folders_reserve_zero() {
    let dir = tempfile::tempdir().unwrap();
    for split in ["training", "validation"] {
        let [images, masks] = ["images", "annotations"].map(|kind| dir.path().join(kind).join(split));
        sample(&images, &masks, "one", (4, 1), &[0, 1, 2, 255]);
    }
    fs::write(dir.path().join("classes.txt"), "wall\nbuilding\n").unwrap();
    let dataset = open(dir.path()).unwrap();
    assert_eq!((dataset.layout, dataset.reduce_zero_label), (Layout::Ade20k, true));
    assert_eq!(dataset.load(&dataset.val[0]).unwrap().labels, [IGNORED, 0, 1, IGNORED]);
    assert_eq!(dataset.stored_label(1), 2);
    let kept = DatasetOptions { reduce_zero_label: Some(false), ..DatasetOptions::default() };
    let dataset = Dataset::open(dir.path(), &kept).unwrap();
    assert!(message(dataset.load(&dataset.val[0]).unwrap_err()).contains("label 2"));
}

#[test]
fn voc_lists_choose_the_images() {
    let dir = tempfile::tempdir().unwrap();
    let [images, masks] = ["JPEGImages", "SegmentationClass"].map(|kind| dir.path().join(kind));
    for name in ["one", "two", "unused"] {
        sample(&images, &masks, name, (2, 1), &[15, 255]);
    }
    let sets = dir.path().join("ImageSets/Segmentation");
    fs::create_dir_all(&sets).unwrap();
    fs::write(sets.join("train.txt"), "two\n").unwrap();
    fs::write(sets.join("val.txt"), "one\n\n").unwrap();
    let dataset = open(dir.path()).unwrap();
    assert_eq!((dataset.layout, dataset.train.len(), dataset.val.len()), (Layout::Voc, 1, 1));
    assert_eq!((dataset.train[0].name.as_str(), dataset.classes.len()), ("two", 21));
    assert_eq!(dataset.load(&dataset.train[0]).unwrap().labels, [15, IGNORED]);
    fs::write(sets.join("val.txt"), "one\nthree\n").unwrap();
    let error = message(open(dir.path()).unwrap_err());
    assert!(error.contains("val.txt` line 2") && error.contains("three"), "{error}");
}

#[test]
fn every_defect_names_its_file() {
    assert!(message(open(tempfile::tempdir().unwrap().path()).unwrap_err()).contains("known layouts"));

    let dir = camvid();
    fs::remove_file(dir.path().join("labels/val/one.png")).unwrap();
    let error = message(open(dir.path()).unwrap_err());
    assert!(error.contains("1 of 1 images have no mask") && error.contains("one.png"), "{error}");

    let dir = camvid();
    fs::remove_file(dir.path().join("images/train/one.png")).unwrap();
    let error = message(open(dir.path()).unwrap_err());
    assert!(error.contains("images/train") && error.contains("holds no images"), "{error}");

    let dir = camvid();
    sample(&dir.path().join("other"), &dir.path().join("labels/train"), "one", (3, 1), &[0, 0, 0]);
    let dataset = open(dir.path()).unwrap();
    let error = message(dataset.load(&dataset.train[0]).unwrap_err());
    assert!(error.contains("labels/train/one.png") && error.contains("expected 2x2"), "{error}");

    let dir = camvid();
    let color = RgbImage::from_pixel(2, 2, image::Rgb([1, 1, 1]));
    color.save(dir.path().join("labels/train/one.png")).unwrap();
    let dataset = open(dir.path()).unwrap();
    assert!(message(dataset.load(&dataset.train[0]).unwrap_err()).contains("RGB colors"));

    let dir = camvid();
    fs::write(dir.path().join("images/train/one.png"), b"\x89PNG\r\n").unwrap();
    let dataset = open(dir.path()).unwrap();
    assert!(message(dataset.load(&dataset.train[0]).unwrap_err()).contains("images/train/one.png"));

    let dir = camvid();
    fs::write(dir.path().join(DESCRIPTION), "{\"classes\": 3}").unwrap();
    assert!(message(open(dir.path()).unwrap_err()).contains("dataset.json` line 1"));

    let dir = camvid();
    fs::remove_file(dir.path().join(DESCRIPTION)).unwrap();
    assert!(message(open(dir.path()).unwrap_err()).contains("tells the classes"));

    let dir = camvid();
    let twin = dir.path().join("images/train/one.jpg");
    fs::copy(dir.path().join("images/train/one.png"), twin).unwrap();
    assert!(message(open(dir.path()).unwrap_err()).contains("share one mask"));
}

#[test]
fn a_limited_set_is_taken_evenly() {
    let dir = camvid();
    let mut set = open(dir.path()).unwrap();
    let sample = |i: usize| Sample { name: i.to_string(), image: "i".into(), mask: "m".into() };
    set.train = (0..10).map(sample).collect();
    let names = |set: Dataset| set.train.iter().map(|sample| sample.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(set.clone().limited(3)), ["0", "3", "6"]);
    assert_eq!(names(set.limited(99)).len(), 10);
}
