//! `pass-host eval vos`

use std::path::{Path, PathBuf};

use clap::Args;
use pass_core::propagation::Propagation;

use crate::allocator;
use crate::checkpoint::write_atomically;
use crate::cli::{ComputeArgs, output};
use crate::config::run::Network;
use crate::device;
use crate::error::Error;
use crate::evaluate::vos::{self, Judged, PropagationSettings, Selection, VosReport, VosSettings};
use crate::model::encoder::EncoderOptions;

/// Video object segmentation (DAVIS 2017): follow the objects of each first mask, and score the masks.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  pass-host eval vos --weights runs/demo-1 --data DAVIS --out masks --json vos.json
  pass-host eval vos --weights runs/demo-1 --data DAVIS --sequences dog,blackswan
  pass-host eval vos --predictions masks --data DAVIS --csv vos.csv")]
pub(in crate::cli) struct VosArgs {
    /// Trained weights: a run folder, a checkpoint folder, a safetensors file; `random:W` = fresh values.
    #[arg(long, value_name = "W", required_unless_present = "predictions", conflicts_with = "predictions")]
    weights: Option<String>,
    /// Score ready masks DIR/SEQUENCE/FRAME.png instead, without a network.
    #[arg(long, value_name = "DIR")]
    predictions: Option<PathBuf>,
    /// The data set: JPEGImages/480p, Annotations/480p, ImageSets.
    #[arg(long, value_name = "ROOT")]
    data: PathBuf,
    /// Only these sequences, separated by commas.
    #[arg(long, value_name = "NAMES", value_delimiter = ',', conflicts_with_all = ["year", "split"])]
    sequences: Option<Vec<String>>,
    /// Year of the list of sequences.
    #[arg(long, value_name = "YEAR", default_value = "2017")]
    year: String,
    /// The list of sequences: ImageSets/YEAR/SPLIT.txt.
    #[arg(long, value_name = "SPLIT", default_value = "val")]
    split: String,
    /// Write the masks as PNG files with a palette: DIR/SEQUENCE/FRAME.png.
    #[arg(long, value_name = "DIR", conflicts_with = "predictions")]
    out: Option<PathBuf>,
    /// Write the frames with their masks painted over them: a strip and a moving picture a sequence, DIR/SEQUENCE.png, .gif.
    #[arg(long, value_name = "DIR")]
    overlay: Option<PathBuf>,
    /// Write the figures as one JSON object to FILE, or to standard output.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    json: Option<PathBuf>,
    /// Write the figures as a table with a row an object.
    #[arg(long, value_name = "F")]
    csv: Option<PathBuf>,
    /// `teacher` or `student`.
    #[arg(long, value_enum, value_name = "NETWORK", default_value = "teacher", hide_possible_values = true)]
    network: Network,
    /// Attention heads, for files that do not tell [default: width / 64].
    #[arg(long, value_name = "N")]
    heads: Option<usize>,
    #[command(flatten)]
    rule: RuleArgs,
    #[command(flatten)]
    pub(in crate::cli) compute: ComputeArgs,
}

/// How labels travel; the defaults are those of the published evaluations.
#[derive(Debug, Args)]
#[command(next_help_heading = "Rule")]
struct RuleArgs {
    /// Pixels of the short side of a frame, as the network sees it.
    #[arg(long, value_name = "PIXELS", default_value_t = 480, value_parser = clap::value_parser!(u16).range(1..=4320))]
    resolution: u16,
    /// Rows and columns of patches that an object may move from a remembered frame; 0: any number.
    #[arg(long, value_name = "PATCHES", default_value_t = Propagation::DAVIS.radius)]
    neighborhood: usize,
    /// Most similar patches that decide about a patch.
    #[arg(long, value_name = "K", default_value_t = Propagation::DAVIS.top_k)]
    topk: usize,
    /// Frames remembered beside the first one.
    #[arg(long, value_name = "N", default_value_t = Propagation::DAVIS.previous_frames)]
    context: usize,
    /// Temperature of the affinity.
    #[arg(long, value_name = "T", default_value_t = Propagation::DAVIS.temperature)]
    temperature: f32,
    /// Normalize with .228 instead of .229, as the published script does by mistake [default: as in training].
    #[arg(long)]
    std_typo: bool,
}

pub(super) fn run(args: VosArgs) -> Result<u8, Error> {
    allocator::return_memory();
    let rule = &args.rule;
    if rule.topk == 0 || !(rule.temperature.is_finite() && rule.temperature > 0.0) {
        return Err(Error::usage(
            format!(
                "`--topk {}` and `--temperature {}`: expected 1 or more, and more than 0",
                rule.topk, rule.temperature
            ),
            "leave them out for the published rule",
        ));
    }
    let judged = match (args.weights, args.predictions) {
        (Some(weights), _) => Judged::Weights(PropagationSettings {
            weights,
            options: EncoderOptions { network: args.network, heads: args.heads, ..Default::default() },
            device: device::choose(args.compute.device, args.compute.precision)?.device,
            rule: Propagation {
                previous_frames: rule.context,
                radius: rule.neighborhood,
                top_k: rule.topk,
                temperature: rule.temperature,
            },
            short_side: rule.resolution.into(),
            std_typo: rule.std_typo,
            out: args.out,
        }),
        (None, Some(predictions)) => Judged::Predictions(predictions),
        (None, None) => {
            return Err(Error::usage(
                "nothing to evaluate",
                "give `--weights W`, or `--predictions DIR` with ready masks",
            ));
        }
    };
    let selection = match args.sequences {
        Some(names) => Selection::Named(names),
        None => Selection::Listed { year: args.year, split: args.split },
    };
    let bar = output::steps_bar();
    let report =
        vos::run(&VosSettings { data: args.data, selection, judged, overlay: args.overlay }, |progress| {
            bar.set_message(format!("frames, {}", progress.sequence));
            bar.set_length(progress.all as u64);
            bar.set_position(progress.done as u64);
        })?;
    bar.finish_and_clear();
    write_report(&report, args.json.as_deref(), args.csv.as_deref())?;
    Ok(0)
}

fn write_report(report: &VosReport, json: Option<&Path>, csv: Option<&Path>) -> Result<(), Error> {
    if let Some(path) = csv {
        write_atomically(path, report.csv().as_bytes())?;
    }
    output::note(&report.judged);
    output::report(json, report, &report.table())?;
    if let Some(speed) = report.frames_per_s {
        output::note(&format!("{speed:.2} frames per second"));
    }
    Ok(())
}
