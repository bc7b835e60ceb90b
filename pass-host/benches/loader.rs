//! Decoding and augmentation: each operation, whole images on one thread, and the loader.
//!
//! - `PASS_PHOTOS`: the folder of photos; the bundled ones without it.
//! - `PASS_PEER_PYTHON`: a Python with torch, torchvision and Pillow. The same work is then also done by
//!   `benches/peer/loader.py`, one thread each, in turns, and the ratio of the fastest rounds is printed.
//! - `PASS_SOURCES=1`: the whole loader on the folder, a tar and shards of it, in turns; images a second and processor time.

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
use pass_host::pack::{self, PackFormat, PackSettings};

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
    if std::env::var_os("PASS_SOURCES").is_some() {
        compare_sources();
    }
}

fn folder() -> PathBuf {
    let bundled = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/photos");
    std::env::var_os("PASS_PHOTOS").map_or_else(bundled, PathBuf::from)
}

fn index() -> ImageIndex {
    index_of(&folder())
}

fn index_of(source: &Path) -> ImageIndex {
    let images = vec![source.to_string_lossy().into_owned()];
    ImageIndex::build(&DataConfig { images, limit: PHOTOS, ..DataConfig::default() }, None)
        .expect("PASS_PHOTOS holds images")
}

fn files() -> Vec<Vec<u8>> {
    let index = index();
    (0..index.len()).map(|i| index.read(i).expect("a photo is readable").into_owned()).collect()
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
    let images = index.len() / BATCH * BATCH;
    bencher.counter(ItemsCount::new(images)).bench_local(|| load_all(&index, workers));
}

/// The loader, one worker, on shards of the folder.
#[divan::bench(args = SHARDS.map(|(name, ..)| name), sample_count = 5)]
fn loader_shard(bencher: Bencher<'_, '_>, name: &str) {
    let dir = tempfile::tempdir().expect("a folder");
    let index = Arc::new(index_of(&packed(dir.path(), name)));
    let images = index.len() / BATCH * BATCH;
    bencher.counter(ItemsCount::new(images)).bench_local(|| load_all(&index, 1));
}

/// Images a batch of the loader.
const BATCH: usize = 20;
/// What shards hold: files as they are, or images with a shorter side of 256 pixels.
const SHARDS: [(&str, PackFormat, Option<u32>); 3] = [
    ("original", PackFormat::Original, None),
    ("jpeg 256", PackFormat::Jpeg, Some(256)),
    ("raw 256", PackFormat::Raw, Some(256)),
];

/// One pass over the images; how many it were.
fn load_all(index: &Arc<ImageIndex>, workers: usize) -> usize {
    let mut loader = Loader::start(LoaderSettings {
        index: Arc::clone(index),
        augment: AugmentConfig::default(),
        seed: 0,
        batch: BATCH,
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
    (0..index.len() / BATCH).map(|_| loader.next().expect("sound photos").images.len()).sum()
}

/// The shard of [`SHARDS`] with this name, written into `dir`.
fn packed(dir: &Path, name: &str) -> PathBuf {
    let &(_, format, size) = SHARDS.iter().find(|shard| shard.0 == name).expect("one of the shards");
    let out = dir.join(name);
    let settings = PackSettings {
        images: vec![folder().to_string_lossy().into_owned()],
        limit: PHOTOS,
        out: out.clone(),
        format,
        size,
        quality: 90,
        max_megapixels: MAX_MEGAPIXELS,
        interrupted: Arc::default(),
    };
    pack::run(&settings, |_, _| ()).expect("photos that can be packed");
    out
}

/// The photos as a tar, written into `dir`.
fn archived(dir: &Path) -> PathBuf {
    let path = dir.join("photos.tar");
    let mut tar = tar::Builder::new(std::fs::File::create(&path).expect("space"));
    for (image, file) in files().iter().enumerate() {
        let mut header = tar::Header::new_ustar();
        header.set_size(file.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, format!("{image:06}.jpg"), &file[..]).expect("space");
    }
    tar.finish().expect("space");
    path
}

/// Processor seconds of this process, user and system, where the system tells.
fn processor_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    // user and system time in hundredths of a second
    fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

#[expect(clippy::print_stdout, reason = "a bench reports on standard output")]
fn compare_sources() {
    let dir = tempfile::tempdir().expect("a folder");
    let shards = SHARDS.map(|(name, ..)| (name, packed(dir.path(), name)));
    let files = [("folder", folder()), ("tar", archived(dir.path()))];
    let sources: Vec<_> = files.into_iter().chain(shards).collect();
    let indices: Vec<_> = sources.iter().map(|(_, path)| Arc::new(index_of(path))).collect();
    let mut fastest = vec![f64::INFINITY; sources.len()];
    let mut processor = vec![0.0; sources.len()];
    let mut images = 0;
    for _ in 0..ROUNDS {
        for (source, index) in indices.iter().enumerate() {
            let (start, before) = (Instant::now(), processor_seconds());
            images = load_all(index, 1);
            fastest[source] = fastest[source].min(start.elapsed().as_secs_f64());
            processor[source] += processor_seconds() - before;
        }
    }
    println!(
        "one worker, {ROUNDS} rounds in turns: images a second (fastest), processor ms an image, ratio of these"
    );
    for (source, (name, path)) in sources.iter().enumerate() {
        println!(
            "{name:>9} {:8.1} {:8.2} {:6.2}  {:.1} MB",
            images as f64 / fastest[source],
            1e3 * processor[source] / (ROUNDS * images) as f64,
            processor[0] / processor[source],
            std::fs::metadata(path).map_or(0, |file| if file.is_file() { file.len() } else { 0 }) as f64
                / 1e6
        );
    }
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
