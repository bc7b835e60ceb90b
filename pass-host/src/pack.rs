//! Packing: all images of any sources into one [shard](crate::data::shard), in the order in which training numbers them.
//!
//! Images are decoded to be sure of them; one that is bad is left out and listed in `F.quarantine.tsv`. The bytes of the
//! shard depend on the images and the settings alone, not on the number of threads.

mod encode;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use rayon::prelude::*;
use serde::Serialize;

use crate::checkpoint::{CheckpointError, write_atomically};
use crate::config::DataConfig;
use crate::data::quarantine;
use crate::data::shard::{NewImage, ShardWriter};
use crate::data::{DataError, ImageIndex};

/// Images a thread that are prepared before the next ones are written.
const AHEAD: usize = 8;

/// What images become.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum PackFormat {
    /// The bytes of the source, unchanged.
    #[default]
    Original,
    /// Encoded anew as JPEG.
    Jpeg,
    /// Raw pixels.
    Raw,
}

/// Everything `pack` needs.
#[derive(Clone, Debug)]
pub struct PackSettings {
    /// As in `data.images`.
    pub images: Vec<String>,
    /// Only the first this many; 0 = all.
    pub limit: usize,
    /// The shard to write.
    pub out: PathBuf,
    /// What images become.
    pub format: PackFormat,
    /// Length of the shorter side in pixels of images that are larger; `None` = as they are. Not for
    /// [`PackFormat::Original`].
    pub size: Option<u32>,
    /// JPEG quality, 1 to 100.
    pub quality: u8,
    /// Images with more pixels than this are bad (millions of pixels).
    pub max_megapixels: f64,
    /// More than 0: end, and leave nothing.
    pub interrupted: Arc<AtomicUsize>,
}

/// What `pack` did.
#[derive(Clone, Debug, Serialize)]
pub struct PackSummary {
    /// The shard.
    pub file: PathBuf,
    /// What images became.
    pub format: PackFormat,
    /// Shorter side asked for.
    pub size: Option<u32>,
    /// JPEG quality, if it played a part.
    pub quality: Option<u8>,
    /// Images in the shard.
    pub images: usize,
    /// Bad images left out.
    pub bad: usize,
    /// Where they are listed, if there are any.
    pub quarantine: Option<PathBuf>,
    /// Bytes of the shard.
    pub bytes: u64,
    /// Bytes of the image files it was made from.
    pub source_bytes: u64,
    /// Checksum of its content, 16 hexadecimal digits.
    pub content: String,
    /// Seconds it took.
    pub seconds: f64,
}

/// Why nothing was packed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PackError {
    /// The images.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Settings that contradict each other or make no sense.
    #[error("`{field}`: expected {expected}, found {found}")]
    Setting {
        /// The setting.
        field: &'static str,
        /// What it may be.
        expected: &'static str,
        /// What it is.
        found: String,
    },
    /// Not one image is good.
    #[error("none of {count} images can be used; the first, `{name}`: {reason}")]
    AllBad {
        /// Images.
        count: usize,
        /// The first.
        name: String,
        /// Why.
        reason: String,
    },
    /// The shard cannot be written.
    #[error("cannot write `{}`", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The list of bad images cannot be written.
    #[error(transparent)]
    Quarantine(#[from] CheckpointError),
    /// A person wanted it to end.
    #[error("interrupted; nothing was written")]
    Interrupted,
}

impl PackError {
    /// What to try.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Data(error) => error.hint(),
            Self::Quarantine(error) => error.hint(),
            Self::Write { source, .. } if source.kind() == std::io::ErrorKind::WouldBlock => {
                Some("another process is writing it; wait for it or choose another name".into())
            }
            Self::Write { .. } => Some("check free space and permissions of that folder".into()),
            Self::Setting { .. } | Self::AllBad { .. } | Self::Interrupted => None,
        }
    }
}

/// Packs; `progress(done, all)` is called now and then.
///
/// # Errors
/// [`PackError`]; the file that was there before stays.
pub fn run(
    settings: &PackSettings,
    mut progress: impl FnMut(usize, usize),
) -> Result<PackSummary, PackError> {
    let started = Instant::now();
    check(settings)?;
    let data = DataConfig {
        images: settings.images.clone(),
        limit: settings.limit,
        max_megapixels: settings.max_megapixels,
        ..DataConfig::default()
    };
    let index = ImageIndex::build(&data, None)?;
    let all = index.len();
    let name = index.relative_names();
    let write = |source| PackError::Write { path: settings.out.clone(), source };
    let mut writer = ShardWriter::create(&settings.out).map_err(write)?;
    let (mut images, mut source_bytes, mut bad) = (0, 0, Vec::new());
    let window = AHEAD * rayon::current_num_threads();
    for first in (0..all).step_by(window) {
        if settings.interrupted.load(Ordering::Relaxed) > 0 {
            return Err(PackError::Interrupted);
        }
        let range = first..all.min(first + window);
        let prepared: Vec<_> = range.clone().into_par_iter().map(|i| prepare(&index, i, settings)).collect();
        for (i, prepared) in range.clone().zip(prepared) {
            match prepared {
                Ok((image, length)) => {
                    writer.push(&name(i), &image).map_err(write)?;
                    images += 1;
                    source_bytes += length;
                }
                Err(reason) => bad.push((index.name(i), reason)),
            }
        }
        progress(range.end, all);
    }
    if let (0, Some((name, reason))) = (images, bad.first()) {
        return Err(PackError::AllBad { count: all, name: name.clone(), reason: reason.clone() });
    }
    let list = quarantine_path(&settings.out);
    if bad.is_empty() {
        // that of an earlier shard of this name
        fs::remove_file(&list).ok();
    } else {
        let lines: String = bad.iter().map(|(name, reason)| quarantine::line(name, reason)).collect();
        write_atomically(&list, lines.as_bytes())?;
    }
    let written = writer.finish().map_err(write)?;
    Ok(PackSummary {
        file: settings.out.clone(),
        format: settings.format,
        size: settings.size,
        quality: (settings.format == PackFormat::Jpeg).then_some(settings.quality),
        images,
        bad: bad.len(),
        quarantine: (!bad.is_empty()).then_some(list),
        bytes: written.bytes,
        source_bytes,
        content: format!("{:016x}", written.content_hash),
        seconds: started.elapsed().as_secs_f64(),
    })
}

fn check(settings: &PackSettings) -> Result<(), PackError> {
    let wrong = |field, expected, found| Err(PackError::Setting { field, expected, found });
    if let Some(size) = settings.size {
        if settings.format == PackFormat::Original {
            let expected = "none with `--format original`, whose bytes stay as they are";
            return wrong("--size", expected, size.to_string());
        }
        if size == 0 {
            return wrong("--size", "at least 1 pixel", size.to_string());
        }
    }
    if !(1..=100).contains(&settings.quality) {
        return wrong("--quality", "1 to 100", settings.quality.to_string());
    }
    Ok(())
}

/// The image for the shard and the length of its source, or the reason why it cannot be used.
fn prepare(index: &ImageIndex, image: usize, settings: &PackSettings) -> Result<(NewImage, u64), String> {
    let bytes = index.read(image).map_err(|error| error.to_string())?;
    let image = encode::encode(&bytes, settings)?;
    Ok((image, bytes.len() as u64))
}

/// `photos.shard` -> `photos.shard.quarantine.tsv`.
fn quarantine_path(out: &Path) -> PathBuf {
    let mut name = out.file_name().unwrap_or_default().to_owned();
    name.push(".quarantine.tsv");
    out.with_file_name(name)
}
