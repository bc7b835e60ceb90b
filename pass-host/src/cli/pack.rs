//! `pass-host pack`

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use clap::Args;

use super::{output, thread_count};
use crate::config::DataConfig;
use crate::error::Error;
use crate::pack::{self, PackError, PackFormat, PackSettings, PackSummary};

/// Pack images into one file that training reads in place (a shard).
///
/// A shard stands wherever folders and tars do, also beside them: it is recognized by its content, not by its name.
/// Training on one with original bytes gives the same numbers as on the folder it was made from. Bad images are left out
/// and listed with the reason in F.quarantine.tsv.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  pass-host pack PHOTOS --out photos.shard                              the files as they are
  pass-host pack PHOTOS --out photos.shard --format jpeg --size 512     smaller, less to decode
  pass-host pack PHOTOS --out photos.shard --format raw --size 256      nothing to decode, 200 KB an image
  pass-host train photos.shard MORE_PHOTOS more.tar

A global crop shows a quarter of the image or more: from a shorter side of twice its size on it is hardly enlarged.")]
pub(super) struct PackArgs {
    /// Folders, image files, tars, shards or @lists.
    #[arg(value_name = "IMAGES", required = true)]
    images: Vec<String>,
    /// The shard to write; a file of this name is replaced once the new one is complete.
    #[arg(long, value_name = "F")]
    out: PathBuf,
    /// `original` (the bytes of the files), `jpeg` (encoded anew) or `raw` (pixels).
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "original", hide_possible_values = true)]
    format: PackFormat,
    /// Shorter side in pixels to which larger images are reduced, for `jpeg` and `raw` [default: as they are].
    #[arg(long, value_name = "PIXELS")]
    size: Option<u32>,
    /// Quality of `jpeg`, 1 to 100.
    #[arg(long, value_name = "N", default_value_t = 90)]
    quality: u8,
    /// Use only the first N images (sorted order).
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    limit: usize,
    /// Decoding and encoding threads [default: one per core]. The file is the same for any number.
    #[arg(long, value_name = "N", value_parser = thread_count)]
    pub(super) workers: Option<usize>,
    /// Write a summary as one JSON object to standard output.
    #[arg(long)]
    json: bool,
}

/// What shells report for a program ended by Ctrl-C: 128 + SIGINT.
const INTERRUPTED: u8 = 130;

pub(super) fn run(args: PackArgs) -> Result<u8, Error> {
    let settings = PackSettings {
        images: args.images,
        limit: args.limit,
        out: args.out,
        format: args.format,
        size: args.size,
        quality: args.quality,
        max_megapixels: DataConfig::default().max_megapixels,
        interrupted: Arc::default(),
    };
    catch_interrupts(&settings.interrupted);
    let bar = output::bar();
    let result = pack::run(&settings, |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    let summary = match result {
        Err(PackError::Interrupted) => {
            output::note(&PackError::Interrupted.to_string());
            return Ok(INTERRUPTED);
        }
        result => result?,
    };
    if args.json {
        output::print_json(&summary)?;
    } else {
        output::print(&text(&summary))?;
    }
    if let Some(list) = &summary.quarantine {
        let all = summary.images + summary.bad;
        output::warn(&format!("left out {} of {all} images, listed in {}", summary.bad, list.display()));
    }
    Ok(0)
}

fn catch_interrupts(interrupted: &Arc<AtomicUsize>) {
    let interrupted = Arc::clone(interrupted);
    let caught = ctrlc::set_handler(move || {
        interrupted.fetch_add(1, Ordering::SeqCst);
    });
    if let Err(error) = caught {
        output::warn(&format!("Ctrl-C will leave an unfinished file: {error}"));
    }
}

fn text(summary: &PackSummary) -> String {
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    let format = match summary.format {
        PackFormat::Original => "original files",
        PackFormat::Jpeg => "encoded anew",
        PackFormat::Raw => "raw pixels",
    };
    format!(
        "{}: {} images, {format}, {:.1} MB (sources {:.1} MB), {:.0} s\nnext: pass-host train {0} --out runs/mine\n",
        summary.file.display(),
        summary.images,
        megabytes(summary.bytes),
        megabytes(summary.source_bytes),
        summary.seconds,
    )
}
