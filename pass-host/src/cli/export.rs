//! `pass-host export`

use std::path::PathBuf;

use clap::Args;

use super::output;
use crate::config::run::{ExportFormat, ExportSettings, Network};
use crate::error::Error;

/// Write trained weights as one file for other programs.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  pass-host export runs/demo-1 --to safetensors --out teacher.safetensors
  pass-host export runs/demo-1 --to timm --out backbone.safetensors")]
pub(super) struct ExportArgs {
    /// A run folder, a checkpoint folder or a safetensors file.
    #[arg(value_name = "RUN|W")]
    source: PathBuf,
    /// `safetensors` (backbone and aggregation head, the names of the released checkpoints) or `timm` (backbone, timm's names).
    #[arg(long, value_enum, value_name = "FORMAT", hide_possible_values = true)]
    to: ExportFormat,
    /// The file to write.
    #[arg(long, value_name = "F")]
    out: PathBuf,
    /// `teacher` or `student`.
    #[arg(long, value_enum, value_name = "NETWORK", default_value = "teacher", hide_possible_values = true)]
    network: Network,
}

pub(super) fn run(args: ExportArgs) -> Result<u8, Error> {
    start(ExportSettings { source: args.source, to: args.to, network: args.network, out: args.out })
}

fn start(settings: ExportSettings) -> Result<u8, Error> {
    let exported = crate::export::run(&settings)?;
    output::note(&format!(
        "{}: {} tensors, {:.1} million values",
        exported.file.display(),
        exported.tensors,
        exported.values as f64 / 1e6
    ));
    output::print(&format!("{}\n", exported.usage))?;
    Ok(0)
}
