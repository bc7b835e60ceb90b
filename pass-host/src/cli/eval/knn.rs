//! `pass-host eval knn`

use clap::Args;

use super::super::output;
use super::encoder_args::{EncoderArgs, above_zero, at_least_one, percent};
use super::folder_args::FolderArgs;
use crate::error::Error;
use crate::evaluate::knn::{self, KnnReport, USUAL_K, USUAL_TEMPERATURE};

/// Classify by the nearest training images (weighted k-NN, as DINO does it); nothing is trained.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  pass-host eval knn --weights runs/mine --data FLOWERS
  pass-host eval knn --weights runs/mine --train A --val B --k 10,20 --json knn.json")]
pub(in crate::cli) struct KnnArgs {
    #[command(flatten)]
    folders: FolderArgs,
    /// Numbers of neighbors; more than there are training images are all of them.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_values_t = USUAL_K)]
    k: Vec<usize>,
    /// Temperature: a neighbor votes with weight exp(cosine / T).
    #[arg(long, value_name = "T", default_value_t = USUAL_TEMPERATURE)]
    temperature: f64,
    #[command(flatten)]
    pub(super) encoder: EncoderArgs,
}

pub(super) fn run(args: KnnArgs) -> Result<u8, Error> {
    above_zero("--temperature", args.temperature)?;
    args.k.iter().try_for_each(|&k| at_least_one(&[("--k", k)]))?;
    let sets = args.folders.open()?;
    let encoder = args.encoder.open()?;
    let extraction = args.folders.extraction(&encoder)?;
    let progress = output::bar();
    let report = knn::run(&encoder, &sets, &extraction, &args.k, args.temperature, &mut |done, all| {
        progress.set_length(all as u64);
        progress.set_position(done as u64);
    })?;
    progress.finish_and_clear();
    output::warn_left_out(&report.bad);
    for score in report.knn.iter().filter(|score| score.used < score.k) {
        output::note(&format!(
            "k = {}: there are only {} training images, all of them vote",
            score.k, score.used
        ));
    }
    args.encoder.report(&report, &table(&report))?;
    Ok(0)
}

fn table(report: &KnnReport) -> String {
    let mut text = format!(
        "{} classes, {} training images, {} judged at {} px\n{:>8}  {:>9}  {:>9}\n",
        report.classes, report.train_images, report.val_images, report.size, "k", "top-1", "top-5"
    );
    for score in &report.knn {
        text += &format!("{:>8}  {:>9}  {:>9}\n", score.k, percent(score.top1), percent(score.top5));
    }
    text
}
