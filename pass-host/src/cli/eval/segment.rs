//! `pass-host eval segment`

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{HumanDuration, ProgressBar};

use super::encoder_args::EncoderArgs;
use crate::cli::train::catch_interrupts;
use crate::cli::{output, run_folder};
use crate::config::run::Ending;
use crate::config::segment::{HeadKind, SegmentConfig, SegmentPreset};
use crate::device::{self, Precision};
use crate::error::Error;
use crate::evaluate::segment::dataset::{DatasetOptions, Layout};
use crate::evaluate::segment::{self, Event, SegmentReport, SegmentSettings};

/// Semantic segmentation: train a head (and the backbone, if wanted) on labelled images; mIoU, aAcc, mAcc.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  pass-host eval segment --weights runs/demo-1 --data camvid --head linear
  pass-host eval segment --weights runs/demo-1 --data camvid --head fpn --preset small --json
  pass-host eval segment --weights vit_s16.safetensors --data ADEChallengeData2016 --head fpn
  pass-host eval segment --weights random:runs/demo-1 --data camvid --head linear    untrained

Layouts: camvid  images/{train,val}  labels/{train,val}
         ade20k  images/{training,validation}  annotations/…  (label 0 is unlabelled)
         voc     JPEGImages  SegmentationClass  ImageSets/Segmentation/{train,val}.txt
Ctrl-C writes a checkpoint; `--resume` goes on, with the same result as without the stop.")]
pub(in crate::cli) struct SegmentArgs {
    /// The folder of images and masks.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// `linear` (one layer on the last block) or `fpn` (Semantic FPN on four blocks).
    #[arg(long, value_enum, value_name = "HEAD", hide_possible_values = true)]
    head: HeadKind,
    /// `paper` (40 000 iterations of 16 crops of 512) or `small` (600 of 4 crops of 224), for the FPN.
    #[arg(long, value_enum, value_name = "PRESET", default_value = "paper", hide_possible_values = true)]
    preset: SegmentPreset,
    /// Run folder: checkpoints and result.json [default: runs/segment-N].
    #[arg(long, value_name = "RUNDIR")]
    out: Option<PathBuf>,
    /// Continue the run in `--out`.
    #[arg(long, requires = "out")]
    resume: bool,
    /// Write every prediction as an index PNG to this folder, and some beside image and labels to its `overlays`.
    #[arg(long, value_name = "DIR")]
    predictions: Option<PathBuf>,
    /// Layout of the folder: `auto` (the one that fits), `camvid`, `ade20k` or `voc`.
    #[arg(long, value_name = "LAYOUT", default_value = "auto", value_parser = layout, help_heading = "Data")]
    layout: LayoutChoice,
    /// List of classes: one a line, or `INDEX NAME` [default: dataset.json, classes.txt or objectInfo150.txt in DIR].
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    classes: Option<PathBuf>,
    /// Label that does not count [default: that of dataset.json, else 255].
    #[arg(long, value_name = "LABEL", help_heading = "Data")]
    ignore: Option<u8>,
    /// Label 0 does not count and the others are one too high [default: only for ade20k].
    #[arg(
        long,
        value_name = "BOOL",
        num_args = 0..=1,
        default_missing_value = "true",
        hide_possible_values = true,
        help_heading = "Data"
    )]
    reduce_zero_label: Option<bool>,

    /// The backbone does not learn [default for linear].
    #[arg(long, conflicts_with = "fine_tune", help_heading = "Training")]
    freeze: bool,
    /// The backbone learns too [default for fpn].
    #[arg(long, help_heading = "Training")]
    fine_tune: bool,
    /// Optimizer steps [default: linear 1000, fpn as the preset].
    #[arg(long, value_name = "N", help_heading = "Training")]
    iterations: Option<u64>,
    /// Pictures a step [default: 16; preset small 4].
    #[arg(long, value_name = "N", help_heading = "Training")]
    batch: Option<usize>,
    /// Learning rate after warm-up, falling linearly to 0 [default: linear 1e-2, fpn 6e-5; preset small 3e-4].
    #[arg(long, value_name = "LR", help_heading = "Training")]
    lr: Option<f64>,
    /// Side of a training crop in pixels [default: 512; preset small 224].
    #[arg(long, value_name = "PIXELS", help_heading = "Training")]
    crop: Option<usize>,
    /// Shorter side of a whole picture when judged; 0 = as it is [default: linear 0, fpn `--crop`, else 512; small 288].
    #[arg(long, value_name = "PIXELS", help_heading = "Training")]
    size: Option<usize>,
    /// Seed of everything random.
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Training")]
    seed: u64,
    /// Memory for kept features of the linear head, in GiB [default: 4].
    #[arg(long, value_name = "GIB", help_heading = "Training")]
    cache: Option<f64>,
    /// Iterations from one checkpoint to the next [default: linear 500, fpn 2000; preset small 200].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), help_heading = "Training")]
    checkpoint_every: Option<u64>,
    #[command(flatten)]
    pub(super) encoder: EncoderArgs,
}

/// A layout, or whichever fits.
#[derive(Clone, Copy, Debug)]
struct LayoutChoice(Option<Layout>);

fn layout(text: &str) -> Result<LayoutChoice, String> {
    match text {
        "auto" => Ok(LayoutChoice(None)),
        "camvid" => Ok(LayoutChoice(Some(Layout::Camvid))),
        "ade20k" => Ok(LayoutChoice(Some(Layout::Ade20k))),
        "voc" => Ok(LayoutChoice(Some(Layout::Voc))),
        _ => Err("expected auto, camvid, ade20k or voc".into()),
    }
}

/// Steps of warm-up as a share of a run whose length was chosen, at most.
const WARMUP_SHARE: u64 = 10;

pub(super) fn run(args: SegmentArgs) -> Result<u8, Error> {
    let settings = settings(&args)?;
    catch_interrupts(&settings.interrupted, true);
    output::note(&format!("run folder {}", settings.out.display()));
    let mut shown = Shown::default();
    let report = segment::run(&settings, |event| shown.show(event))?;
    shown.clear();
    args.encoder.report(&report, &table(&report))?;
    Ok(0)
}

fn settings(args: &SegmentArgs) -> Result<SegmentSettings, Error> {
    let config = config(args);
    if let Some((flag, expected, found)) = config.invalid() {
        return Err(Error::usage(format!("`{flag}`: expected {expected}, found {found}"), "leave it out"));
    }
    let compute = device::choose(args.encoder.compute.device, args.encoder.compute.precision)?;
    if args.encoder.compute.precision == Precision::Bf16 {
        return Err(Error::usage("`--precision bf16`: segmentation computes in f32", "leave it out"));
    }
    Ok(SegmentSettings {
        weights: args.encoder.weights.clone(),
        network: args.encoder.network,
        heads: args.encoder.heads,
        data: args.data.clone(),
        dataset: DatasetOptions {
            layout: args.layout.0,
            classes: args.classes.clone(),
            ignore: args.ignore,
            reduce_zero_label: args.reduce_zero_label,
        },
        config,
        out: args.out.clone().unwrap_or_else(|| run_folder::next_free(Path::new("runs"), "segment")),
        resume: args.resume,
        predictions: args.predictions.clone(),
        device: compute.device,
        interrupted: Arc::default(),
    })
}

fn config(args: &SegmentArgs) -> SegmentConfig {
    let preset = SegmentConfig::preset(args.head, args.preset);
    let size = match (args.size, args.crop, args.head) {
        (Some(size), ..) => size,
        (None, Some(crop), HeadKind::Fpn) => crop,
        _ => preset.size,
    };
    SegmentConfig {
        fine_tune: (preset.fine_tune || args.fine_tune) && !args.freeze,
        warmup: args.iterations.map_or(preset.warmup, |n| preset.warmup.min(n / WARMUP_SHARE)),
        iterations: args.iterations.unwrap_or(preset.iterations),
        batch: args.batch.unwrap_or(preset.batch),
        lr: args.lr.unwrap_or(preset.lr),
        crop: args.crop.unwrap_or(preset.crop),
        size,
        seed: args.seed,
        cache_gib: args.cache.unwrap_or(preset.cache_gib),
        checkpoint_every: args.checkpoint_every.unwrap_or(preset.checkpoint_every),
        ..preset
    }
}

/// What a person sees meanwhile on standard error: a bar on a terminal, now and then a line elsewhere.
#[derive(Default)]
struct Shown {
    stage: &'static str,
    bar: Option<ProgressBar>,
    started: Option<Instant>,
    /// Where this part of the stage began.
    first: u64,
    losses: Losses,
}

/// Lines a stage prints where standard error is no terminal.
const LINES: u64 = 20;

/// Mean loss since the last line.
#[derive(Default)]
struct Losses {
    sum: f64,
    count: u32,
}

impl Shown {
    fn show(&mut self, event: Event) {
        match event {
            Event::Note(line) => match &self.bar {
                Some(bar) => bar.suspend(|| output::note(&line)),
                None => output::note(&line),
            },
            Event::Features { done, total } => self.advance("features", done as u64, total as u64, ""),
            Event::Judged { done, total } => self.advance("judging", done as u64, total as u64, ""),
            Event::Step { iteration, total, loss, lr } => {
                self.losses.sum += loss;
                self.losses.count += 1;
                let mean = self.losses.sum / f64::from(self.losses.count);
                self.advance("training", iteration, total, &format!("  loss {mean:.4}  lr {lr:.2e}"));
                if iteration.is_multiple_of((total / LINES).max(1)) {
                    self.losses = Losses::default();
                }
            }
        }
    }

    fn advance(&mut self, stage: &'static str, done: u64, total: u64, numbers: &str) {
        if self.stage != stage {
            self.clear();
            *self = Self {
                stage,
                bar: std::io::stderr().is_terminal().then(output::steps_bar),
                started: Some(Instant::now()),
                first: done.saturating_sub(1),
                losses: std::mem::take(&mut self.losses),
            };
        }
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_message(format!("{stage}{numbers}"));
            bar.set_position(done);
        } else if done.is_multiple_of((total / LINES).max(1)) || done == total {
            let passed = self.started.map_or(Duration::ZERO, |started| started.elapsed());
            let each = passed.as_secs_f64() / (done - self.first).max(1) as f64;
            let left = HumanDuration(Duration::from_secs_f64(each * (total - done) as f64));
            output::note(&format!("{stage} {done}/{total}{numbers}  {left} left"));
        }
    }

    fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

/// The result for people.
fn table(report: &SegmentReport) -> String {
    let Some(scores) = &report.scores else {
        return format!(
            "interrupted after {} of {} iterations; the same command with `--resume --out {}` goes on\n",
            report.iterations,
            report.config.iterations,
            report.run.display()
        );
    };
    let percent = |share: Option<f64>| match share {
        Some(share) => format!("{:.2}", 100.0 * share),
        None => "-".to_owned(),
    };
    let width = scores.classes.iter().map(|class| class.name.chars().count()).max().unwrap_or(0).max(5);
    let mut text = format!("{:width$}  {:>6}  {:>6}\n", "class", "IoU", "Acc");
    for class in &scores.classes {
        let (iou, accuracy) = (percent(class.iou), percent(class.accuracy));
        text += &format!("{:width$}  {iou:>6}  {accuracy:>6}\n", class.name);
    }
    let [mean_iou, accuracy, mean_accuracy] =
        [scores.mean_iou, scores.accuracy, scores.mean_accuracy].map(percent);
    text += &format!(
        "\nmIoU {mean_iou}   aAcc {accuracy}   mAcc {mean_accuracy}   ({} pictures, {} iterations, {:.0} s)\n",
        report.val_images,
        report.iterations,
        report.training_seconds + report.judging_seconds
    );
    if report.ending == Ending::Done {
        text += &format!("run folder: {}\n", report.run.display());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command, eval::EvalCommand};
    use clap::Parser;

    fn parse(line: &str) -> Result<SegmentSettings, Error> {
        let words = ["pass-host", "eval", "segment", "--weights", "w", "--data", "d"];
        let words = words.into_iter().chain(line.split_whitespace());
        match Cli::try_parse_from(words).unwrap().command {
            Command::Eval(EvalCommand::Segment(args)) => settings(&args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn flags_change_the_preset() {
        let linear = parse("--head linear").unwrap().config;
        assert!(!linear.fine_tune && linear.size == 0 && linear.iterations == 1000);
        let fpn = parse("--head fpn").unwrap().config;
        assert!(
            fpn.fine_tune && (fpn.iterations, fpn.batch, fpn.crop, fpn.warmup) == (40_000, 16, 512, 1500)
        );
        let own = parse("--head fpn --preset small --freeze --crop 128 --iterations 50 --lr 1e-2").unwrap();
        let own = own.config;
        assert!(!own.fine_tune && (own.crop, own.size, own.iterations, own.warmup) == (128, 128, 50, 5));
        assert!(parse("--head linear --fine-tune").unwrap().config.fine_tune);
    }

    #[test]
    fn data_flags_are_understood() {
        let settings =
            parse("--head linear --layout ade20k --ignore 11 --reduce-zero-label --classes c.txt").unwrap();
        let dataset = settings.dataset;
        assert_eq!((dataset.layout, dataset.ignore), (Some(Layout::Ade20k), Some(11)));
        assert_eq!((dataset.reduce_zero_label, dataset.classes), (Some(true), Some("c.txt".into())));
        let dataset = parse("--head linear --layout auto --reduce-zero-label false").unwrap().dataset;
        assert_eq!((dataset.layout, dataset.reduce_zero_label), (None, Some(false)));
    }

    #[test]
    fn nonsense_is_a_usage_error() {
        for line in ["--head linear --batch 0", "--head fpn --crop 3", "--head linear --lr=-1"] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
        }
    }
}
