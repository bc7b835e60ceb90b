use std::fs;
use std::path::Path;

use super::*;
use crate::config::DataConfig;
use crate::random::{Purpose, Stream};

/// A folder of `count` small PNG pictures, and its index.
fn pictures(root: &Path, count: usize) {
    for i in 0..count {
        let mut stream = Stream::new(3, Purpose::Subset, &[i as u64]);
        let (width, height) = (20 + stream.below(30) as u32, 20 + stream.below(30) as u32);
        let pixels = (0..width * height * 3).map(|_| stream.bits() as u8).collect();
        let picture = image::RgbImage::from_raw(width, height, pixels).unwrap();
        picture.save(root.join(format!("{i:03}.png"))).unwrap();
    }
}

fn settings(root: &Path) -> LoaderSettings {
    let images = vec![root.to_str().unwrap().to_owned()];
    let index = ImageIndex::build(&DataConfig { images, ..DataConfig::default() }, None).unwrap();
    LoaderSettings {
        index: Arc::new(index),
        augment: AugmentConfig { global_size: 16, local_size: 8, ..AugmentConfig::default() },
        seed: 7,
        batch: 4,
        part: Part::WHOLE,
        workers: 2,
        prefetch: 2,
        cursor: 0,
        max_bad: 0.05,
        max_megapixels: 1.0,
        quarantine: None,
        known_bad: Vec::new(),
    }
}

/// A batch whose crops were made by the workers.
#[derive(Clone, Debug, PartialEq)]
struct Made {
    start: u64,
    epoch: u64,
    images: Vec<u64>,
    global: Vec<f32>,
    local: Vec<f32>,
}

fn take(settings: LoaderSettings, count: usize) -> Vec<Made> {
    let mut loader = Loader::start(settings).unwrap();
    let next = |_| {
        let Batch { start, epoch, images, views } = loader.next().unwrap();
        let Views::Crops { global, local } = views else { panic!("no device takes them") };
        Made { start, epoch, images, global, local }
    };
    (0..count).map(next).collect()
}

#[test]
fn batches_do_not_depend_on_workers_prefetch_or_start() {
    let dir = tempfile::tempdir().unwrap();
    pictures(dir.path(), 14);
    let base = settings(dir.path());
    let expected = take(base.clone(), 8);
    for (workers, prefetch) in [(1, 1), (4, 1), (3, 5)] {
        assert_eq!(take(LoaderSettings { workers, prefetch, ..base.clone() }, 8), expected);
    }
    assert_eq!(take(LoaderSettings { cursor: 14 + 8, ..base.clone() }, 3), expected[5..]);
    assert_eq!(
        take(LoaderSettings { cursor: 12, ..base.clone() }, 3),
        expected[3..6],
        "no batch is left in epoch 0"
    );
    assert_ne!(take(LoaderSettings { seed: 8, ..base }, 1)[0].global, expected[0].global);
}

#[test]
fn ranks_together_see_the_batch_of_one() {
    let dir = tempfile::tempdir().unwrap();
    pictures(dir.path(), 14);
    fs::write(dir.path().join("003.png"), b"no picture").unwrap();
    let whole = LoaderSettings { max_bad: 1.0, ..settings(dir.path()) };
    let expected = take(whole.clone(), 7);
    for ranks in [2, 4] {
        let batch = 4 / ranks;
        let part = |rank| LoaderSettings { batch, part: Part { rank, ranks }, ..whole.clone() };
        let parts: Vec<_> = (0..ranks).map(|rank| take(part(rank), 7)).collect();
        for (number, expected) in expected.iter().enumerate() {
            let of = |rank: usize| &parts[rank][number];
            assert!(
                (0..ranks).all(|rank| (of(rank).start, of(rank).epoch) == (expected.start, expected.epoch))
            );
            let images: Vec<u64> = (0..ranks).flat_map(|rank| of(rank).images.clone()).collect();
            assert_eq!(images, expected.images, "{ranks} ranks, batch {number}");
            let crop = 3 * 16 * 16;
            for place in 0..4 {
                let own = place % batch * crop;
                assert_eq!(
                    of(place / batch).global[own..own + crop],
                    expected.global[place * crop..][..crop]
                );
            }
        }
    }
}

#[test]
fn what_another_rank_found_is_written_down_and_not_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("pics");
    fs::create_dir(&root).unwrap();
    pictures(&root, 8);
    let quarantine = dir.path().join("quarantine.tsv");
    let base = LoaderSettings { max_bad: 1.0, quarantine: Some(quarantine.clone()), ..settings(&root) };
    let mut loader =
        Loader::start(LoaderSettings { known_bad: vec![(2, "torn".into())], ..base.clone() }).unwrap();
    loader.learn_bad(5, "hole").unwrap();
    loader.learn_bad(5, "again").unwrap();
    assert!(!loader.next().unwrap().images.contains(&2), "it was known before the first batch");
    let later: Vec<Batch> = (0..4).map(|_| loader.next().unwrap()).collect();
    assert!(later[2..].iter().all(|batch| !batch.images.contains(&5)));
    let text = fs::read_to_string(&quarantine).unwrap();
    assert!(text.lines().count() == 2 && text.contains("torn") && text.contains("hole"), "{text}");
    assert_eq!(loader.take_found(), [], "it found none itself");
    fs::write(root.join("000.png"), b"").unwrap();
    let mut alone = Loader::start(LoaderSettings { quarantine: None, ..base }).unwrap();
    (0..4).for_each(|_| drop(alone.next().unwrap()));
    assert_eq!(alone.take_found(), [(0, "the file is empty".to_owned())]);
    assert_eq!(alone.take_found(), []);
}

#[test]
fn an_epoch_shows_each_image_at_most_once_and_drops_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    pictures(dir.path(), 14);
    let batches = take(settings(dir.path()), 6);
    for (epoch, batches) in batches.chunks(3).enumerate() {
        let mut images: Vec<_> = batches.iter().flat_map(|batch| batch.images.clone()).collect();
        assert!(batches.iter().all(|batch| batch.epoch == epoch as u64));
        images.sort_unstable();
        images.dedup();
        assert_eq!(images.len(), 12);
    }
    assert_eq!(batches[4].start, 14 + 4);
}

#[test]
fn crops_lie_crop_by_crop() {
    let dir = tempfile::tempdir().unwrap();
    pictures(dir.path(), 4);
    let settings = settings(dir.path());
    let batch = &take(settings.clone(), 1)[0];
    assert_eq!((batch.global.len(), batch.local.len()), (2 * 4 * 3 * 16 * 16, 2 * 4 * 3 * 8 * 8));
    let bytes = settings.index.read(batch.images[2] as usize).unwrap();
    let picture = crate::data::decode::decode_rgb(&bytes, 1.0).unwrap();
    let plans =
        crate::data::augment::plans(&settings.augment, 7, 0, batch.images[2], picture.width, picture.height);
    for (crop, plan) in plans.iter().enumerate() {
        let mut planes = crate::data::augment::Planes::default();
        crate::data::augment::Augmenter::default().apply_into(&picture, 1, plan, &mut planes);
        let mut expected = vec![0.0; planes.data().len()];
        crate::data::augment::normalize_into(
            &planes,
            settings.augment.mean,
            settings.augment.std,
            &mut expected,
        );
        let (values, crop) = if crop < 2 { (&batch.global, crop) } else { (&batch.local, crop - 2) };
        let start = (crop * 4 + 2) * expected.len();
        assert_eq!(values[start..start + expected.len()], expected);
    }
}

#[test]
fn bad_images_are_replaced_and_written_down_and_the_run_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("pics");
    fs::create_dir(&root).unwrap();
    pictures(&root, 41);
    let index = settings(&root).index;
    let whole = fs::read(root.join("007.png")).unwrap();
    fs::write(root.join("007.png"), &whole[..whole.len() / 2]).unwrap();
    fs::remove_file(root.join("030.png")).unwrap();
    let quarantine = dir.path().join("quarantine.tsv");
    let base = LoaderSettings { index, quarantine: Some(quarantine.clone()), ..settings(&root) };
    let expected = take(base.clone(), 30);
    assert!(expected.iter().all(|batch| !batch.images.contains(&7) && !batch.images.contains(&30)));
    let text = fs::read_to_string(&quarantine).unwrap();
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines.len(), 2, "{text}");
    assert!(lines[0].contains("007.png\ttruncated PNG"), "{text}");
    assert!(lines[1].contains("030.png\tinput/output error: the file has vanished"), "{text}");
    for (workers, first) in [(1, 0), (3, 0), (2, 11)] {
        let cursor = expected[first].start;
        let again = take(LoaderSettings { workers, cursor, ..base.clone() }, 30 - first);
        assert_eq!(again, expected[first..], "with the list of the first run");
        let fresh = LoaderSettings { workers, cursor, quarantine: None, ..base.clone() };
        assert_eq!(take(fresh, 30 - first), expected[first..], "without it");
    }
    assert_eq!(fs::read_to_string(&quarantine).unwrap(), text, "nothing is listed twice");
}

#[test]
fn too_many_bad_images_stop_the_run_with_their_names() {
    let dir = tempfile::tempdir().unwrap();
    pictures(dir.path(), 40);
    for i in 0..3 {
        fs::write(dir.path().join(format!("{i:03}.png")), b"").unwrap();
    }
    let mut loader = Loader::start(settings(dir.path())).unwrap();
    let error = (0..10).find_map(|_| loader.next().err()).expect("three of forty are more than 5 %");
    let text = error.to_string();
    assert!(matches!(error, DataError::TooManyBad { bad: 3, .. }), "{text}");
    assert!(text.contains("002.png: the file is empty"), "{text}");
    assert!(error.hint().unwrap().contains("max_bad"));
}

#[test]
fn nothing_but_bad_images_ends_in_an_error() {
    let dir = tempfile::tempdir().unwrap();
    for i in 0..30 {
        fs::write(dir.path().join(format!("{i:02}.jpg")), b"<html>404</html>").unwrap();
    }
    let error = Loader::start(settings(dir.path())).unwrap().next().unwrap_err();
    assert!(matches!(error, DataError::TooManyBad { .. }), "{error}");
    assert_eq!(error.to_string().lines().count(), 12, "ten files and how many more: {error}");
}

#[test]
fn the_limit_of_bad_images_allows_for_chance() {
    assert!(!is_past_limit(0, 0, 100, 0.0), "no bad image is never too many");
    assert!(is_past_limit(1, 100, 100, 0.0));
    assert!(!is_past_limit(2, 4, 1000, 0.05), "two of the first four may be chance");
    assert!(is_past_limit(30, 100, 100_000, 0.05), "thirty of the first hundred are not");
    assert!(!is_past_limit(5, 100, 100, 0.05));
    assert!(is_past_limit(6, 100, 100, 0.05));
}

#[test]
fn settings_that_cannot_work_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    pictures(dir.path(), 3);
    let error = Loader::start(settings(dir.path())).unwrap_err();
    assert!(matches!(error, DataError::TooFewImages { images: 3, batch: 4 }));
    assert!(error.hint().unwrap().contains("at most 3"));
    let zero = Loader::start(LoaderSettings { batch: 0, ..settings(dir.path()) }).unwrap_err();
    assert!(matches!(zero, DataError::Setting { field: "batch", .. }));
    let augment = AugmentConfig { device: AugmentDevice::Gpu, ..AugmentConfig::default() };
    let gpu = Loader::start(LoaderSettings { batch: 2, augment, ..settings(dir.path()) }).unwrap_err();
    assert!(matches!(gpu, DataError::Setting { field: "augment.device", .. }));
}

#[test]
fn dropping_a_loader_ends_its_threads() {
    let dir = tempfile::tempdir().unwrap();
    pictures(dir.path(), 8);
    let settings = settings(dir.path());
    let index = Arc::clone(&settings.index);
    let mut loader = Loader::start(LoaderSettings { workers: 4, ..settings }).unwrap();
    loader.next().unwrap();
    assert!(loader.data_wait().last > 0.0 && loader.data_wait().total >= loader.data_wait().last);
    drop(loader);
    assert_eq!(Arc::strong_count(&index), 1, "no thread holds the index any more");
}

/// The emulator stands for the device: workers, batches sent ahead and kernels together give the crops of the workers.
#[cfg(feature = "_emulator")]
#[test]
fn batches_on_a_device_are_those_of_the_processor() {
    use crate::ops::Uploader;
    use candle_core::{DType, Device};

    let dir = tempfile::tempdir().unwrap();
    pictures(dir.path(), 13);
    // too large to be sent
    image::RgbImage::from_fn(120, 90, |x, y| image::Rgb([x as u8, y as u8, (x * y) as u8]))
        .save(dir.path().join("large.png"))
        .unwrap();
    fs::write(dir.path().join("003.png"), b"no picture").unwrap();
    let base = LoaderSettings { max_bad: 1.0, ..settings(dir.path()) };
    let expected = take(base.clone(), 7);
    for device in [AugmentDevice::Cpu, AugmentDevice::Gpu] {
        let augment = AugmentConfig { device, ..base.augment.clone() };
        let settings = LoaderSettings { augment: augment.clone(), workers: 3, ..base.clone() };
        let uploader = Uploader::new(&Device::Cpu).unwrap();
        let mut loader = Loader::uploading(settings, uploader).unwrap();
        for expected in &expected {
            let Batch { start, epoch, images, views } = loader.next().unwrap();
            let Views::Uploaded(upload) = views else { panic!("the device has the pixels") };
            let crops = |crops, size| {
                let crops = upload.crops(crops, &(0..4), size, &augment, DType::F32).unwrap();
                crops.flatten_all().unwrap().to_vec1::<f32>().unwrap()
            };
            let made = Made { start, epoch, images, global: crops(0..2, 16), local: crops(2..4, 8) };
            assert!(made == *expected, "batch at {start}, crops by {device:?}");
        }
        assert_eq!(loader.take_found().len(), 1, "the bad image is known here too");
        assert!(loader.data_wait().total > 0.0);
        // ends its threads while two more batches are ready and one is held
        let held = loader.next().unwrap();
        drop(loader);
        drop(held);
    }
}
