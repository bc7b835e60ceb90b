//! `pass-host eval linear`

use clap::Args;

use super::super::output;
use super::encoder_args::{EncoderArgs, above_zero, at_least_one, percent};
use super::folder_args::FolderArgs;
use crate::error::Error;
use crate::evaluate::image_features::Views;
use crate::evaluate::linear::{self, LinearReport, LinearSettings, USUAL_RATES};

/// Classify with a linear layer on frozen features; several learning rates are trained at once.
///
/// The rate is chosen on a tenth of the training images; classifiers trained again on all of them are judged.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  pass-host eval linear --weights runs/mine --data FLOWERS
  pass-host eval linear --weights runs/mine --data FLOWERS --crops 10 --epochs 50 --json linear.json")]
pub(in crate::cli) struct LinearArgs {
    #[command(flatten)]
    folders: FolderArgs,
    /// Learning rates for a batch of 256; the real ones follow the batch linearly [default: 16 from 1e-5 to 1].
    #[arg(long, value_name = "LR,...", value_delimiter = ',', default_values_t = USUAL_RATES, hide_default_value = true)]
    lrs: Vec<f64>,
    /// Passes over all views of the training images.
    #[arg(long, value_name = "N", default_value_t = 100)]
    epochs: usize,
    /// Views a step.
    #[arg(long, value_name = "N", default_value_t = 128)]
    batch: usize,
    /// Random resized crops of a training image, with flips, beside its center view [default: the mirror image alone].
    #[arg(long, value_name = "N")]
    crops: Option<usize>,
    /// Subtract the mean of each feature and divide by its standard deviation first.
    #[arg(long)]
    standardize: bool,
    /// Seed of weights, order, crops and held-out images.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    pub(super) encoder: EncoderArgs,
}

pub(super) fn run(args: LinearArgs) -> Result<u8, Error> {
    at_least_one(&[("--epochs", args.epochs), ("--batch", args.batch)])?;
    args.lrs.iter().try_for_each(|&lr| above_zero("--lrs", lr))?;
    let settings = LinearSettings {
        rates: args.lrs.clone(),
        epochs: args.epochs,
        batch: args.batch,
        standardize: args.standardize,
        views: match args.crops {
            None => Views::CenterAndMirror,
            Some(repeats) => Views::Crops { repeats, seed: args.seed },
        },
        seed: args.seed,
    };
    let sets = args.folders.open()?;
    let encoder = args.encoder.open()?;
    let extraction = args.folders.extraction(&encoder)?;
    let progress = output::bar();
    let report = linear::run(&encoder, &sets, &extraction, &settings, &mut |done, all| {
        progress.set_length(all as u64);
        progress.set_position(done as u64);
    })?;
    progress.finish_and_clear();
    output::warn_left_out(&report.bad);
    if report.at_the_edge {
        let lr = report.linear.lr;
        output::warn(&format!(
            "the best learning rate, {lr}, is the last of those tried: give others with `--lrs`"
        ));
    }
    args.encoder.report(&report, &table(&report))?;
    Ok(0)
}

fn table(report: &LinearReport) -> String {
    let mut text = format!(
        "{} classes, {} training images with {} views, {} judged at {} px\n  {:>10}  {:>12}  {:>10}  {:>9}  {:>9}\n",
        report.classes,
        report.train_images,
        report.views,
        report.val_images,
        report.size,
        "lr",
        "held-out",
        "loss",
        "top-1",
        "top-5"
    );
    for score in &report.rates {
        let mark = if score.lr == report.linear.lr { '*' } else { ' ' };
        let loss = score.train_loss.map_or_else(|| "diverged".into(), |loss| format!("{loss:.4}"));
        text += &format!(
            "{mark} {:>10}  {:>12}  {loss:>10}  {:>9}  {:>9}\n",
            score.lr,
            percent(score.held_out_top1),
            percent(score.top1),
            percent(score.top5)
        );
    }
    text + &format!(
        "linear: top-1 {}, top-5 {} (* chosen on held-out training images)\n",
        percent(report.linear.top1),
        percent(report.linear.top5)
    )
}
