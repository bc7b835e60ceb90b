//! Decoding and augmentation: each operation, whole images on one thread, and the loader.
//!
//! - `PASS_PHOTOS`: the folder of photos; the bundled ones without it.
//! - `PASS_PEER_PYTHON`: a Python with torch, torchvision and Pillow. The same work is then also done by
//!   `benches/peer/loader.py`, one thread each, in turns, and the ratio of the fastest rounds is printed.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use divan::Bencher;
use divan::counter::ItemsCount;
use pass_host::config::{AugmentConfig, DataConfig};
use pass_host::data::augment::{
    Augmenter, CropBox, Planes, Resampler, adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation,
    gaussian_blur, grayscale, normalize_into, plans,
};
use pass_host::data::decode::{Encoded, Rgb8Image, decode_rgb};
use pass_host::data::{ImageIndex, Loader, LoaderSettings, Part};

/// Photos in one round.
const PHOTOS: usize = 200;
/// Rounds of the comparison with the peer.
const ROUNDS: usize = 5;
const MAX_MEGAPIXELS: f64 = 180.0;

fn main() {
    divan::main();
    if let Some(python) = std::env::var_os("PASS_PEER_PYTHON") {
        compare_with_peer(Path::new(&python));
    }
}

fn folder() -> PathBuf {
    let bundled = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/photos");
    std::env::var_os("PASS_PHOTOS").map_or_else(bundled, PathBuf::from)
}

fn index() -> ImageIndex {
    let images = vec![folder().to_string_lossy().into_owned()];
    ImageIndex::build(&DataConfig { images, limit: PHOTOS, ..DataConfig::default() }, None)
        .expect("PASS_PHOTOS holds images")
}

fn files() -> Vec<Vec<u8>> {
    let index = index();
    (0..index.len()).map(|i| index.read(i).expect("a photo is readable")).collect()
}

fn photo() -> Rgb8Image {
    decode_rgb(&files()[0], MAX_MEGAPIXELS).expect("a photo is sound")
}

fn crop_of(photo: &Rgb8Image) -> Planes {
    let mut planes = Planes::default();
    Resampler::default().crop_resize(photo, whole(photo), 1, 224, 224, &mut planes);
    planes
}

fn whole(photo: &Rgb8Image) -> CropBox {
    CropBox { left: 0, top: 0, width: photo.width, height: photo.height }
}

#[divan::bench]
fn decode(bencher: Bencher<'_, '_>) {
    let files = files();
    bencher.counter(ItemsCount::new(files.len())).bench_local(|| {
        files
            .iter()
            .map(|file| decode_rgb(file, MAX_MEGAPIXELS).expect("a photo is sound").data.len())
            .sum::<usize>()
    });
}

/// One image: decode, two global and two local crops, normalized.
fn work(file: &[u8], image: u64, augmenter: &mut Augmenter, planes: &mut Planes, out: &mut Vec<f32>) {
    let config = AugmentConfig::default();
    let encoded = Encoded::open(file, MAX_MEGAPIXELS).expect("a photo is sound");
    let (width, height) = encoded.upright_size();
    let photo = encoded.decode(1).expect("a photo is sound");
    for plan in plans(&config, 0, 0, image, width, height) {
        augmenter.apply_into(&photo, 1, &plan, planes);
        out.resize(planes.data().len(), 0.0);
        normalize_into(planes, config.mean, config.std, out);
    }
}

fn work_on_all(files: &[Vec<u8>]) {
    let (mut augmenter, mut planes, mut out) = (Augmenter::default(), Planes::default(), Vec::new());
    for (image, file) in files.iter().enumerate() {
        work(file, image as u64, &mut augmenter, &mut planes, &mut out);
    }
}

#[divan::bench]
fn decode_and_augment(bencher: Bencher<'_, '_>) {
    let files = files();
    bencher.counter(ItemsCount::new(files.len())).bench_local(|| work_on_all(&files));
}

#[divan::bench(args = [1, 2], sample_count = 5)]
fn loader(bencher: Bencher<'_, '_>, workers: usize) {
    let index = Arc::new(index());
    let batch = 20;
    let batches = index.len() / batch;
    bencher.counter(ItemsCount::new(batches * batch)).bench_local(|| {
        let mut loader = Loader::start(LoaderSettings {
            index: Arc::clone(&index),
            augment: AugmentConfig::default(),
            seed: 0,
            batch,
            part: Part::WHOLE,
            workers,
            prefetch: 2,
            cursor: 0,
            max_bad: 0.0,
            max_megapixels: MAX_MEGAPIXELS,
            quarantine: None,
            known_bad: Vec::new(),
        })
        .expect("enough photos");
        (0..batches).map(|_| loader.next().expect("sound photos").images.len()).sum::<usize>()
    });
}

#[divan::bench]
fn op_crop_resize(bencher: Bencher<'_, '_>) {
    let photo = photo();
    let (mut resampler, mut planes) = (Resampler::default(), Planes::default());
    bencher.bench_local(|| resampler.crop_resize(&photo, whole(&photo), 1, 224, 224, &mut planes));
}

#[divan::bench]
fn op_brightness(bencher: Bencher<'_, '_>) {
    let mut planes = crop_of(&photo());
    bencher.bench_local(|| adjust_brightness(&mut planes, 1.01));
}

#[divan::bench]
fn op_contrast(bencher: Bencher<'_, '_>) {
    let mut planes = crop_of(&photo());
    bencher.bench_local(|| adjust_contrast(&mut planes, 1.01));
}

#[divan::bench]
fn op_saturation(bencher: Bencher<'_, '_>) {
    let mut planes = crop_of(&photo());
    bencher.bench_local(|| adjust_saturation(&mut planes, 1.01));
}

#[divan::bench]
fn op_hue(bencher: Bencher<'_, '_>) {
    let mut planes = crop_of(&photo());
    bencher.bench_local(|| adjust_hue(&mut planes, 0.05));
}

#[divan::bench]
fn op_grayscale(bencher: Bencher<'_, '_>) {
    let mut planes = crop_of(&photo());
    bencher.bench_local(|| grayscale(&mut planes));
}

#[divan::bench]
fn op_blur(bencher: Bencher<'_, '_>) {
    let (mut planes, mut scratch) = (crop_of(&photo()), Planes::default());
    bencher.bench_local(|| gaussian_blur(&mut planes, 1.5, &mut scratch));
}

#[divan::bench]
fn op_normalize(bencher: Bencher<'_, '_>) {
    let planes = crop_of(&photo());
    let (config, mut out) = (AugmentConfig::default(), vec![0.0; 3 * 224 * 224]);
    bencher.bench_local(|| normalize_into(&planes, config.mean, config.std, &mut out));
}

#[expect(clippy::print_stdout, reason = "a bench reports on standard output")]
fn compare_with_peer(python: &Path) {
    let files = files();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/peer/loader.py");
    let mut peer = Command::new(python)
        .arg(script)
        .arg(folder())
        .arg(files.len().to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("PASS_PEER_PYTHON names a Python");
    let mut ask = peer.stdin.take().expect("standard input is piped");
    let mut answers = BufReader::new(peer.stdout.take().expect("standard output is piped")).lines();
    let (mut ours, mut theirs) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..ROUNDS {
        ask.write_all(b"go\n").expect("the peer listens");
        let answer = answers.next().expect("the peer answers").expect("text");
        theirs = theirs.min(answer.parse().expect("seconds"));
        let start = Instant::now();
        work_on_all(&files);
        ours = ours.min(start.elapsed().as_secs_f64());
    }
    drop(ask);
    peer.wait().expect("the peer ends");
    let rate = |seconds: f64| files.len() as f64 / seconds;
    println!(
        "images a second, one thread, fastest of {ROUNDS}: pass {:.1}, Pillow + torchvision {:.1}, ratio {:.2}",
        rate(ours),
        rate(theirs),
        theirs / ours
    );
}
