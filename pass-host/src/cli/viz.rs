//! `pass-host viz`: what networks see, as PNG pages.

mod attention;
mod pca;
mod positives;
mod top_patches;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde::Serialize;

use super::{ComputeArgs, output};
use crate::config::run::Network;
use crate::device;
use crate::error::Error;
use crate::model::encoder::EncoderOptions;
use crate::picture::query::{self, Query};
use crate::picture::sheet::Sheet;
use crate::picture::view::{self, Layout, Photo, ViewSize};
use crate::picture::{self, Model, PictureError};

/// Draw what networks see: attention, positives, principal components.
#[derive(Debug, Subcommand)]
#[command(after_help = "Examples:
  pass-host viz top-patches cat.jpg --weights runs/dino --weights runs/pass --out pictures
  pass-host viz pca PHOTOS --weights runs/pass --size 448 --out pictures
  pass-host viz attention cat.jpg --weights runs/pass --per-head --out pictures")]
pub(super) enum VizCommand {
    TopPatches(top_patches::TopPatchesArgs),
    Attention(attention::AttentionArgs),
    Positives(positives::PositivesArgs),
    Pca(pca::PcaArgs),
}

impl VizCommand {
    pub(super) fn compute(&self) -> &ComputeArgs {
        let common = match self {
            Self::TopPatches(args) => &args.common,
            Self::Attention(args) => &args.common,
            Self::Positives(args) => &args.common,
            Self::Pca(args) => &args.common,
        };
        &common.compute
    }
}

/// What every picture needs; flattened last, since the heading of its compute flags holds for all that follow.
#[derive(Debug, Args)]
pub(super) struct CommonArgs {
    /// Images: files, folders, tars, shards or @lists.
    #[arg(value_name = "IMAGE", required = true)]
    images: Vec<String>,
    /// Trained weights: a run, a checkpoint or a safetensors file; `random:W` for untrained ones of the same kind. Repeat
    /// to compare.
    #[arg(long, value_name = "W", required = true)]
    weights: Vec<String>,
    /// Name of the weights on the page, once for each `--weights` [default: from the path].
    #[arg(long, value_name = "NAME")]
    label: Vec<String>,
    /// Folder for the PNG files.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Shorter side in pixels, or HEIGHTxWIDTH (480x854); rounded down to a multiple of the patch size.
    #[arg(long, value_name = "SIZE", default_value = "224", value_parser = str::parse::<ViewSize>)]
    size: ViewSize,
    /// Shorter side of a panel on the page in pixels, about.
    #[arg(long, value_name = "PIXELS", default_value_t = view::PANEL as u16, value_parser = clap::value_parser!(u16).range(32..=2048))]
    panel: u16,
    /// Draw at most N images.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=512))]
    limit: u16,
    /// `teacher` or `student` of a run.
    #[arg(long, value_enum, value_name = "NETWORK", default_value = "teacher", hide_possible_values = true)]
    network: Network,
    /// Attention heads, for weights files that do not tell.
    #[arg(long, value_name = "N")]
    heads: Option<usize>,
    /// Write a summary as one JSON object to standard output.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    compute: ComputeArgs,
}

impl CommonArgs {
    fn layout(&self) -> Layout {
        Layout { size: self.size, panel: self.panel.into() }
    }
}

/// Which patches are asked about.
#[derive(Debug, Args)]
struct QueryArgs {
    /// Query patch on the grid of the first weights, from 0; may be repeated [default: the center and two more].
    #[arg(long, value_name = "ROW,COLUMN", value_parser = Query::patch)]
    query: Vec<Query>,
    /// Query pixel of the upright image, from 0; may be repeated.
    #[arg(long, value_name = "X,Y", value_parser = Query::pixel)]
    at: Vec<Query>,
}

impl QueryArgs {
    fn queries(&self) -> Vec<Query> {
        let given: Vec<Query> = self.query.iter().chain(&self.at).copied().collect();
        if given.is_empty() { query::DEFAULT.to_vec() } else { given }
    }
}

/// What was written.
#[derive(Serialize)]
struct Summary {
    /// The file.
    file: PathBuf,
    /// Width and height in pixels.
    size: [usize; 2],
    /// The weights in the order of the columns.
    weights: Vec<String>,
    /// The images in the order of the rows.
    images: Vec<String>,
}

pub(super) fn run(command: VizCommand) -> Result<u8, Error> {
    match command {
        VizCommand::TopPatches(args) => top_patches::run(&args),
        VizCommand::Attention(args) => attention::run(&args),
        VizCommand::Positives(args) => positives::run(&args),
        VizCommand::Pca(args) => pca::run(&args),
    }
}

/// Opens weights and images, draws, and writes `NAME.png`.
fn draw(
    common: &CommonArgs,
    name: &str,
    figure: impl FnOnce(&[Model], &[Photo]) -> Result<Sheet, PictureError>,
) -> Result<u8, Error> {
    if !common.label.is_empty() && common.label.len() != common.weights.len() {
        return Err(Error::usage(
            format!("{} `--label` for {} `--weights`", common.label.len(), common.weights.len()),
            "give one name for each of the weights, in their order, or none",
        ));
    }
    let compute = device::choose(common.compute.device, common.compute.precision)?;
    let options =
        EncoderOptions { network: common.network, heads: common.heads, ..EncoderOptions::default() };
    let open = |(index, weights): (usize, &String)| {
        Model::open(weights, common.label.get(index).map(String::as_str), &options, &compute.device)
    };
    let models = common
        .weights
        .iter()
        .enumerate()
        .map(open)
        .collect::<Result<Vec<_>, _>>()
        .map_err(PictureError::from)?;
    let (photos, all) = picture::read_photos(&common.images, common.limit.into())?;
    if photos.len() < all {
        output::warn(&format!("{} of {all} images are drawn; `--limit` changes that", photos.len()));
    }
    let page = figure(&models, &photos)?.draw();
    let file = common.out.join(format!("{name}.png"));
    create(&common.out)?;
    picture::save(&page, &file)?;
    if common.json {
        output::print_json(&Summary {
            file,
            size: [page.width(), page.height()],
            weights: common.weights.clone(),
            images: photos.into_iter().map(|photo| photo.name).collect(),
        })?;
    } else {
        output::print(&format!("{}\n", file.display()))?;
    }
    Ok(0)
}

fn create(folder: &Path) -> Result<(), Error> {
    std::fs::create_dir_all(folder).map_err(|source| {
        let path = folder.to_owned();
        PictureError::from(crate::checkpoint::CheckpointError::Io { action: "create", path, source }).into()
    })
}
