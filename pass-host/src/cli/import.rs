//! `pass-host import`

use std::collections::BTreeSet;
use std::path::PathBuf;

use clap::Args;

use super::output;
use crate::error::Error;
use crate::import::{ImportSettings, Imported, Origin};

/// Turn weights of others into one safetensors file with timm's names.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  pass-host import dinov2_small.onnx --from dinov2-onnx --out vit_s14.safetensors")]
pub(super) struct ImportArgs {
    /// The file with the weights.
    #[arg(value_name = "FILE")]
    source: PathBuf,
    /// `dinov2-onnx` (a DINOv2 backbone of `transformers`, exported to ONNX; what stands behind it is left out).
    #[arg(long, value_enum, value_name = "ORIGIN", hide_possible_values = true)]
    from: Origin,
    /// The safetensors file to write.
    #[arg(long, value_name = "F")]
    out: PathBuf,
    /// Write a summary as one JSON object to standard output.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: ImportArgs) -> Result<u8, Error> {
    start(ImportSettings { source: args.source, from: args.from, out: args.out }, args.json)
}

fn start(settings: ImportSettings, json: bool) -> Result<u8, Error> {
    let imported = crate::import::run(&settings)?;
    if json {
        output::print_json(&imported)?;
    } else {
        output::print(&summary(&imported))?;
    }
    Ok(0)
}

fn summary(imported: &Imported) -> String {
    let sizes = &imported.backbone;
    let left_out = match imported.left_out.len() {
        0 => String::new(),
        count => {
            let parts: BTreeSet<&str> =
                imported.left_out.iter().filter_map(|name| name.split('.').next()).collect();
            let parts: Vec<&str> = parts.into_iter().collect();
            format!("; {count} tensors of other parts left out ({})", parts.join(", "))
        }
    };
    format!(
        "{} of {} backbone tensors{left_out}\n\
         ViT: {} wide, {} blocks, {} heads, MLP {} wide, {}x{} pixels a patch, {}x{} positions, {} registers\n\
         {}: {} tensors, {:.1} million values\n\
         {}\n",
        imported.used,
        imported.found,
        sizes.dim,
        sizes.depth,
        sizes.heads,
        sizes.hidden,
        sizes.patch_size,
        sizes.patch_size,
        sizes.grid,
        sizes.grid,
        sizes.registers,
        imported.file.display(),
        imported.tensors,
        imported.values as f64 / 1e6,
        imported.usage,
    )
}
