//! `pass-host eval`

mod segment;

use clap::Subcommand;

use crate::error::Error;

/// Judge trained features by the protocols of the paper.
#[derive(Debug, Subcommand)]
pub(super) enum EvalCommand {
    Segment(Box<segment::SegmentArgs>),
}

impl EvalCommand {
    /// Compute threads asked for.
    pub(super) fn threads(&self) -> Option<usize> {
        match self {
            Self::Segment(args) => args.compute.threads,
        }
    }
}

pub(super) fn run(command: EvalCommand) -> Result<u8, Error> {
    match command {
        EvalCommand::Segment(args) => segment::run(*args),
    }
}
