//! Listing many images, and opening the list again: folders of a thousand files each, one tar, one shard.
//!
//! `PASS_NAMES`: how many images; 20,000 without it. The files are empty or nearly so: only their names matter.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pass_host::config::DataConfig;
use pass_host::data::ImageIndex;
use pass_host::data::shard::{NewImage, ShardWriter, Stored};

/// Images of a folder, as in a data set of a thousand classes.
const FOLDER: usize = 1000;
/// Times that each list is opened again.
const ROUNDS: usize = 5;

#[expect(clippy::print_stdout, reason = "a bench reports on standard output")]
fn main() {
    let names = std::env::var("PASS_NAMES").ok().map_or(20_000, |names| names.parse().expect("a number"));
    let dir = tempfile::tempdir().expect("a folder");
    let dir = dir.path();
    let sources = [("folders", folders(dir, names)), ("tar", tar(dir, names)), ("shard", shard(dir, names))];
    // what has just been written may change without a new time stamp, so a list of it is not trusted
    std::thread::sleep(Duration::from_secs(3));
    println!(
        "{names} images: seconds to list them, and to open the list again (fastest and slowest of {ROUNDS})"
    );
    for (name, source) in sources {
        let cache = dir.join(format!("{name}.index"));
        let listed = open(&source, &cache, names);
        let mut again: Vec<f64> = (0..ROUNDS).map(|_| open(&source, &cache, names)).collect();
        again.sort_by(f64::total_cmp);
        let size = fs::metadata(&cache).map_or(0, |file| file.len()) as f64 / 1e6;
        let (fastest, slowest) = (again[0], again[ROUNDS - 1]);
        println!("{name:>8}  {listed:7.3}  {fastest:7.3} {slowest:7.3}  list of {size:.1} MB");
    }
}

/// Seconds to have the index, and one name of it.
fn open(source: &Path, cache: &Path, names: usize) -> f64 {
    let images = vec![source.to_str().expect("UTF-8").to_owned()];
    let config = DataConfig { images, ..DataConfig::default() };
    let start = Instant::now();
    let index = ImageIndex::build(&config, Some(cache)).expect("images");
    assert_eq!(index.len(), names);
    assert!(index.name(names - 1).ends_with(&name(names - 1)));
    start.elapsed().as_secs_f64()
}

fn name(image: usize) -> String {
    format!("n{:08}/{image:08}.jpg", image / FOLDER)
}

fn folders(dir: &Path, names: usize) -> PathBuf {
    let root = dir.join("folders");
    for image in 0..names {
        let path = root.join(name(image));
        if image.is_multiple_of(FOLDER) {
            fs::create_dir_all(path.parent().expect("a folder")).expect("space");
        }
        File::create(path).expect("space");
    }
    root
}

fn tar(dir: &Path, names: usize) -> PathBuf {
    let path = dir.join("images.tar");
    let mut tar = tar::Builder::new(BufWriter::new(File::create(&path).expect("space")));
    for image in 0..names {
        let mut header = tar::Header::new_ustar();
        header.set_size(8);
        header.set_mode(0o644);
        let bytes = (image as u64).to_le_bytes();
        tar.append_data(&mut header, name(image), &bytes[..]).expect("space");
    }
    tar.into_inner().and_then(|file| Ok(file.into_inner()?)).expect("space");
    path
}

fn shard(dir: &Path, names: usize) -> PathBuf {
    let path = dir.join("images.shard");
    let mut writer = ShardWriter::create(&path).expect("space");
    for image in 0..names {
        let bytes = (image as u64).to_le_bytes().to_vec();
        let new = NewImage { bytes, width: 1, height: 1, stored: Stored::Original };
        writer.push(name(image).as_bytes(), &new).expect("space");
    }
    writer.finish().expect("space");
    path
}
