//! `pass-host eval`: what features are worth, one protocol a verb.

mod encoder_args;
mod folder_args;
mod knn;
mod linear;
mod retrieval;
mod segment;

use clap::Subcommand;

use crate::error::Error;

/// Judge trained features by the protocols of the paper.
#[derive(Debug, Subcommand)]
pub(super) enum EvalCommand {
    Knn(knn::KnnArgs),
    Linear(linear::LinearArgs),
    Retrieval(retrieval::RetrievalArgs),
    Segment(Box<segment::SegmentArgs>),
}

impl EvalCommand {
    /// Compute threads asked for.
    pub(super) fn threads(&self) -> Option<usize> {
        let compute = match self {
            Self::Knn(args) => &args.encoder.compute,
            Self::Linear(args) => &args.encoder.compute,
            Self::Retrieval(args) => &args.encoder.compute,
            Self::Segment(args) => &args.compute,
        };
        compute.threads
    }
}

pub(super) fn run(command: EvalCommand) -> Result<u8, Error> {
    match command {
        EvalCommand::Knn(args) => knn::run(args),
        EvalCommand::Linear(args) => linear::run(args),
        EvalCommand::Retrieval(args) => retrieval::run(args),
        EvalCommand::Segment(args) => segment::run(*args),
    }
}
