//! `pass-host eval`

mod vos;

use clap::Subcommand;

use super::ComputeArgs;
use crate::error::Error;

/// Measure what trained weights are good for, as the papers do.
#[derive(Debug, Subcommand)]
#[command(arg_required_else_help = true)]
pub(super) enum EvalCommand {
    Vos(vos::VosArgs),
}

impl EvalCommand {
    pub(super) fn compute(&self) -> &ComputeArgs {
        match self {
            Self::Vos(args) => &args.compute,
        }
    }
}

pub(super) fn run(command: EvalCommand) -> Result<u8, Error> {
    match command {
        EvalCommand::Vos(args) => vos::run(args),
    }
}
