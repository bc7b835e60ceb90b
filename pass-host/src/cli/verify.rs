//! `pass-host verify`

use std::path::PathBuf;

use clap::Args;

use super::output;
use super::quantizing_bar::QuantizingBar;
use crate::config::run::Network;
use crate::error::Error;
use crate::quantize::{self, VerifySettings};

/// Check a file for the device: its self-test, then its features against those of the float weights.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  pass-host verify model.pass --against runs/demo-1 --images PHOTOS

Exit codes: 0 the promise is kept, 1 it is not or the file is damaged, 2 wrong usage.")]
pub(super) struct VerifyArgs {
    /// The file of `pass-host quantize`.
    #[arg(value_name = "M.pass")]
    model: PathBuf,
    /// The weights it was made from: a run folder, a checkpoint folder or a safetensors file.
    #[arg(long, value_name = "W")]
    against: PathBuf,
    /// Photos: folders, image files, tars, shards or @lists.
    #[arg(long, value_name = "IMAGES", required = true, num_args = 1..)]
    images: Vec<String>,
    /// Photos compared, spread over all; 0 = all.
    #[arg(long, value_name = "N", default_value_t = 64)]
    limit: usize,
    /// Attention heads, for files that do not tell [default: width / 64].
    #[arg(long, value_name = "N")]
    heads: Option<usize>,
    /// `teacher` or `student`.
    #[arg(long, value_enum, value_name = "NETWORK", default_value = "teacher", hide_possible_values = true)]
    network: Network,
    /// Compute threads [default: one per core].
    #[arg(long, value_name = "N", value_parser = super::thread_count)]
    pub(super) threads: Option<usize>,
    /// Write a summary as one JSON object to standard output.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: VerifyArgs) -> Result<u8, Error> {
    let settings = VerifySettings {
        model: args.model,
        against: args.against,
        network: args.network,
        images: args.images,
        limit: args.limit,
        heads: args.heads,
    };
    let bar = QuantizingBar::new();
    let report = quantize::verify(&settings, |progress| bar.show(progress))?;
    drop(bar);
    output::warn_left_out(&report.bad);
    if args.json {
        output::print_json(&report)?;
    } else {
        let fidelity = &report.fidelity;
        output::print(&format!(
            "self-test passed\n\
             cosine to float over {} photos: mean {:.5}, first percentile {:.5}; nearest patch {:.1} %\n\
             promised mean {:.5}: {}\n",
            fidelity.images,
            fidelity.mean,
            fidelity.first_percentile,
            100.0 * fidelity.nearest_patch,
            report.promised,
            if report.kept { "kept" } else { "NOT kept" }
        ))?;
    }
    Ok(u8::from(!report.kept))
}
