//! `pass-host eval`: what features are worth, one protocol a verb.

mod encoder_args;
mod folder_args;
mod knn;
mod linear;
mod retrieval;
mod segment;
mod vos;

use clap::Subcommand;

use super::ComputeArgs;
use crate::error::Error;

/// Judge trained features by the protocols of the papers.
#[derive(Debug, Subcommand)]
#[command(arg_required_else_help = true)]
pub(super) enum EvalCommand {
    Vos(vos::VosArgs),
    Segment(Box<segment::SegmentArgs>),
    Retrieval(retrieval::RetrievalArgs),
    Knn(knn::KnnArgs),
    Linear(linear::LinearArgs),
}

impl EvalCommand {
    pub(super) fn compute(&self) -> &ComputeArgs {
        match self {
            Self::Vos(args) => &args.compute,
            Self::Segment(args) => &args.encoder.compute,
            Self::Retrieval(args) => &args.encoder.compute,
            Self::Knn(args) => &args.encoder.compute,
            Self::Linear(args) => &args.encoder.compute,
        }
    }
}

pub(super) fn run(command: EvalCommand) -> Result<u8, Error> {
    match command {
        EvalCommand::Vos(args) => vos::run(args),
        EvalCommand::Segment(args) => segment::run(*args),
        EvalCommand::Retrieval(args) => retrieval::run(args),
        EvalCommand::Knn(args) => knn::run(args),
        EvalCommand::Linear(args) => linear::run(args),
    }
}
