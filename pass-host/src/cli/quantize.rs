//! `pass-host quantize`

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;

use super::output;
use super::quantizing_bar::QuantizingBar;
use crate::config::run::Network;
use crate::error::Error;
use crate::quantize::{self, QuantizeReport, QuantizeSettings};
use pass_edge::format::Mode;

/// Write trained weights as one int8 file for the device, with the accuracy it keeps.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  pass-host quantize runs/demo-1 --calibrate PHOTOS --out model.pass
  pass-host quantize vit_s14.safetensors --calibrate PHOTOS --size 224 --mode fast --out model.pass

Exit codes: 0 written, 1 failed or below --min-cosine (nothing is written then), 2 wrong usage.")]
pub(super) struct QuantizeArgs {
    /// A run folder, a checkpoint folder, or a safetensors file with own or timm's names.
    #[arg(value_name = "RUN|W")]
    source: PathBuf,
    /// Real photos: folders, image files, tars, shards or @lists. Half of those taken calibrate, the others measure.
    #[arg(long, value_name = "IMAGES", required = true, num_args = 1..)]
    calibrate: Vec<String>,
    /// The file to write.
    #[arg(long, value_name = "M.pass")]
    out: PathBuf,
    /// `exact` (8-bit weights) or `fast` (7-bit weights, faster on processors without 8-bit dot products).
    #[arg(long, value_name = "MODE", default_value = "exact", value_parser = mode)]
    mode: Mode,
    /// Mean cosine of patch tokens to float below which nothing is written.
    #[arg(long, value_name = "X", default_value_t = 0.995)]
    min_cosine: f64,
    /// Image size, `PIXELS` or `HEIGHTxWIDTH`, multiples of the patch size [default: as in training].
    #[arg(long, value_name = "SIZE", value_parser = super::image_size)]
    size: Option<(usize, usize)>,
    /// Photos to calibrate on; as many others are measured on.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = positive)]
    images: usize,
    /// Attention heads, for files that do not tell [default: width / 64].
    #[arg(long, value_name = "N", value_parser = positive)]
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

fn mode(text: &str) -> Result<Mode, String> {
    match text {
        "exact" => Ok(Mode::Exact),
        "fast" => Ok(Mode::Fast),
        _ => Err("expected `exact` or `fast`".to_owned()),
    }
}

pub(super) fn positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| "expected 1 or more".to_owned())
}

pub(super) fn run(args: QuantizeArgs) -> Result<u8, Error> {
    if !(-1.0..=1.0).contains(&args.min_cosine) {
        return Err(Error::usage(
            format!("`--min-cosine`: expected a number from -1 to 1, found {}", args.min_cosine),
            "the default is 0.995",
        ));
    }
    let settings = QuantizeSettings {
        source: args.source,
        network: args.network,
        calibrate: args.calibrate,
        images: args.images,
        out: args.out,
        mode: args.mode,
        size: args.size,
        heads: args.heads,
        min_cosine: args.min_cosine,
    };
    let bar = QuantizingBar::new();
    let report = quantize::run(&settings, |progress| bar.show(progress))?;
    drop(bar);
    output::warn_left_out(&report.bad);
    if args.json {
        output::print_json(&report)?;
    } else {
        report.notes.iter().for_each(|note| output::note(note));
        output::print(&table(&report))?;
    }
    Ok(0)
}

fn table(report: &QuantizeReport) -> String {
    let fidelity = &report.fidelity;
    let mut text = String::from("block   cosine to float\n");
    for (block, cosine) in report.blocks.iter().enumerate() {
        // writing into a String cannot fail
        writeln!(text, "{block:>5}   {cosine:.5}").ok();
    }
    writeln!(
        text,
        "device  {:.5}  first percentile {:.5}  nearest patch {:.1} %\n\
         calibrated on {} photos, measured on {} others by the device's code\n\
         {}: {} weights, {:.1} MB",
        fidelity.mean,
        fidelity.first_percentile,
        100.0 * fidelity.nearest_patch,
        report.calibrated_on,
        fidelity.images,
        report.file.display(),
        report.mode,
        report.bytes as f64 / 1e6
    )
    .ok();
    text
}
