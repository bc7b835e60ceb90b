//! `pass-host export`

use std::path::PathBuf;

use clap::Args;

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
    /// `safetensors` (whole network, the names of the released checkpoints) or `timm` (backbone, timm's names).
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

fn start(_settings: ExportSettings) -> Result<u8, Error> {
    // LEAD: the body becomes the call of `crate::export::run(settings)?` and the printing of its result
    Err(Error::usage("export is not part of this build", "use a complete build"))
}
