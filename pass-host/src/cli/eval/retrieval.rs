//! `pass-host eval retrieval`

use std::path::PathBuf;

use clap::Args;

use super::super::output;
use super::encoder_args::{EncoderArgs, above_zero, at_least_one, percent};
use crate::error::Error;
use crate::evaluate::retrieval::{self, RetrievalReport, RetrievalSettings};
use crate::evaluate::segment::dataset::{Dataset, DatasetOptions};

/// Parse scenes by the labels of the nearest training patches (dense retrieval); nothing is trained.
#[derive(Debug, Args)]
#[command(
    after_help = "Data: DIR/images/{train,val}/NAME.jpg, DIR/labels/{train,val}/NAME.png, and the classes in
DIR/dataset.json (`classes`, `ignore_index`) or DIR/classes.txt (`NUMBER NAME` a line).

Examples:
  pass-host eval retrieval --weights runs/mine --data CAMVID
  pass-host eval retrieval --weights runs/mine --data CAMVID --memory 50000 --size 224x224"
)]
pub(in crate::cli) struct RetrievalArgs {
    /// Images and masks.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// The label of pixels that do not count [default: as the data says, else 255].
    #[arg(long, value_name = "LABEL")]
    ignore: Option<u8>,
    /// Height and width images are resized to, multiples of the patch size [default: their own, in whole patches].
    #[arg(long, value_name = "HxW", value_parser = size)]
    size: Option<(usize, usize)>,
    /// Most patches in the memory, shared evenly by the training images, rare classes first; 0 = all.
    #[arg(long, value_name = "N", default_value_t = RetrievalSettings::default().memory)]
    memory: usize,
    /// Neighbors of a patch.
    #[arg(long, value_name = "N", default_value_t = RetrievalSettings::default().k)]
    k: usize,
    /// Temperature of the cross-attention over the neighbors.
    #[arg(long, value_name = "T", default_value_t = RetrievalSettings::default().temperature)]
    temperature: f64,
    /// Seed of the choice of patches.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Images computed together.
    #[arg(long, value_name = "N", default_value_t = RetrievalSettings::default().batch)]
    images_per_pass: usize,
    #[command(flatten)]
    pub(super) encoder: EncoderArgs,
}

/// `224x224`, or one number for both.
fn size(text: &str) -> Result<(usize, usize), String> {
    let (height, width) = text.split_once('x').unwrap_or((text, text));
    match (height.parse(), width.parse()) {
        (Ok(height @ 1..=16384), Ok(width @ 1..=16384)) => Ok((height, width)),
        _ => Err("expected HEIGHTxWIDTH in pixels, for example 224x224".into()),
    }
}

pub(super) fn run(args: RetrievalArgs) -> Result<u8, Error> {
    at_least_one(&[("--k", args.k), ("--images-per-pass", args.images_per_pass)])?;
    above_zero("--temperature", args.temperature)?;
    let settings = RetrievalSettings {
        size: args.size,
        memory: args.memory,
        k: args.k,
        temperature: args.temperature,
        seed: args.seed,
        batch: args.images_per_pass,
    };
    let data =
        Dataset::open(&args.data, &DatasetOptions { ignore: args.ignore, ..DatasetOptions::default() })?;
    let encoder = args.encoder.open()?;
    let progress = output::bar();
    let report = retrieval::run(&encoder, &data, &settings, &mut |done, all| {
        progress.set_length(all as u64);
        progress.set_position(done as u64);
    })?;
    progress.finish_and_clear();
    args.encoder.report(&report, &table(&report))?;
    Ok(0)
}

fn table(report: &RetrievalReport) -> String {
    let mut text = format!(
        "{} of {} patches of {} training images in memory, {} images judged\n",
        report.memory, report.train_patches, report.train_images, report.val_images
    );
    let classes = &report.scores.classes;
    let width = classes.iter().map(|class| class.name.chars().count()).max().unwrap_or(0);
    for class in classes {
        let name = &class.name;
        let iou = class.iou.map_or_else(|| "absent".into(), percent);
        text += &format!("  {name:<width$}  {iou:>9}\n");
    }
    let score = |value: Option<f64>| value.map_or_else(|| "none".into(), percent);
    text + &format!(
        "retrieval: mIoU {}, pixels right {}\n",
        score(report.scores.mean_iou),
        score(report.scores.accuracy)
    )
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_are_height_and_width() {
        assert_eq!(size("224x448"), Ok((224, 448)));
        assert_eq!(size("96"), Ok((96, 96)));
        for text in ["", "x", "0x3", "3x0", "-1", "99999", "3x3x3"] {
            assert!(size(text).is_err(), "{text}");
        }
    }
}
