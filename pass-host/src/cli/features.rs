//! `pass-host features`

use std::path::PathBuf;

use clap::Args;

use super::{ComputeArgs, output};
use crate::config::run::{FeatureSettings, Network, Tokens};
use crate::device;
use crate::error::Error;

/// Write features of images with trained weights: one vector per patch, or one per image.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  pass-host features PHOTOS --weights runs/demo-1 --out features.safetensors
  pass-host features cat.jpg dog.jpg --weights runs/demo-1 --tokens class --out features.npy")]
pub(super) struct FeaturesArgs {
    /// Folders, image files, tars, shards or @lists.
    #[arg(value_name = "IMAGES", required = true)]
    images: Vec<String>,
    /// Weights: a run folder, a checkpoint folder, a file of `export` or `import`; `random:W` = fresh values.
    #[arg(long, value_name = "W")]
    weights: String,
    /// The file to write: .safetensors or .npy; the image names go to a .images.txt beside it.
    #[arg(long, value_name = "F")]
    out: PathBuf,
    /// `patch` (one vector per patch) or `class` (one per image).
    #[arg(long, value_enum, value_name = "TOKENS", default_value = "patch", hide_possible_values = true)]
    tokens: Tokens,
    /// `teacher` or `student`.
    #[arg(long, value_enum, value_name = "NETWORK", default_value = "teacher", hide_possible_values = true)]
    network: Network,
    /// Attention heads, for a file that does not tell.
    #[arg(long, value_name = "N")]
    heads: Option<usize>,
    /// Size to which images are resized and cropped, `PIXELS` or `HEIGHTxWIDTH`; pixels beyond the last whole patch are not
    /// read [default: as in training].
    #[arg(long, value_name = "SIZE", value_parser = super::image_size)]
    size: Option<(usize, usize)>,
    /// Images computed together.
    #[arg(long, value_name = "N", default_value_t = 16)]
    batch: usize,
    /// Write a summary as one JSON object to standard output.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    pub(super) compute: ComputeArgs,
}

pub(super) fn run(args: FeaturesArgs) -> Result<u8, Error> {
    let extension = args.out.extension().and_then(|e| e.to_str()).unwrap_or_default();
    if !["safetensors", "npy"].contains(&extension) {
        return Err(Error::usage(
            format!("`--out {}`: expected a name ending in .safetensors or .npy", args.out.display()),
            "the ending chooses the format, for example `--out features.safetensors`",
        ));
    }
    if args.batch == 0 {
        return Err(Error::usage("`--batch`: expected 1 or more, found 0", "leave it out"));
    }
    let settings = FeatureSettings {
        images: args.images,
        weights: args.weights,
        out: args.out,
        tokens: args.tokens,
        network: args.network,
        heads: args.heads,
        size: args.size,
        batch: args.batch,
        compute: device::choose(args.compute.device, args.compute.precision)?,
        json: args.json,
    };
    start(settings)
}

fn start(settings: FeatureSettings) -> Result<u8, Error> {
    let progress = output::bar();
    let summary = crate::features::run(&settings, |done, all| {
        progress.set_length(all as u64);
        progress.set_position(done as u64);
    })?;
    progress.finish_and_clear();
    output::warn_left_out(&summary.bad);
    if settings.json {
        output::print_json(&summary)?;
    } else {
        let shape: Vec<String> = summary.shape.iter().map(usize::to_string).collect();
        output::print(&format!("{}: [{}]\n", summary.file.display(), shape.join(", ")))?;
    }
    Ok(0)
}
