//! `pass-host report`

use std::path::PathBuf;

use clap::Args;

use super::{ComputeArgs, output};
use crate::device;
use crate::error::Error;
use crate::report::{ReportSettings, write};

/// Write a run as one HTML page: curves, a verdict in words, crops, pictures, tables, configuration.
///
/// The page needs no network. What is missing in the run folder is said on the page.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  pass-host report runs/mine                    writes runs/mine/report.html
  pass-host report runs/mine --out mine.html --images PHOTOS
  pass-host train PHOTOS --report-every 500     renews it during training")]
pub(super) struct ReportArgs {
    /// Run folder.
    #[arg(value_name = "RUN")]
    run: PathBuf,
    /// The file to write [default: RUN/report.html].
    #[arg(long, value_name = "F.html")]
    out: Option<PathBuf>,
    /// Folder with results of evaluations, one JSON file each [default: RUN/evaluation].
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Images of crops and pictures: a folder, file, tar or @list; may be repeated [default: those of the run].
    #[arg(long, value_name = "DIR")]
    images: Vec<String>,
    /// Write a summary as one JSON object to standard output.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    pub(super) compute: ComputeArgs,
}

pub(super) fn run(args: ReportArgs) -> Result<u8, Error> {
    let compute = device::choose(args.compute.device, args.compute.precision)?;
    let summary = write(&ReportSettings {
        run: args.run,
        out: args.out,
        evaluations: args.data,
        images: args.images,
        device: compute.device,
    })?;
    for reason in &summary.missing {
        output::warn(&format!("not on the page: {reason}"));
    }
    if args.json {
        output::print_json(&summary)?;
    } else {
        output::print(&format!("{}: {}\n", summary.file.display(), summary.verdict))?;
    }
    Ok(0)
}
