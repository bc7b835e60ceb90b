//! `pass-host eval`: what features are worth, one protocol a verb.

mod encoder_args;
mod folder_args;
mod knn;
mod linear;
mod retrieval;

use clap::Subcommand;

use super::ComputeArgs;
use crate::error::Error;

/// Judge trained weights: classification and scene parsing without labels in training.
#[derive(Debug, Subcommand)]
pub(super) enum EvalCommand {
    Knn(knn::KnnArgs),
    Linear(linear::LinearArgs),
    Retrieval(retrieval::RetrievalArgs),
}

impl EvalCommand {
    pub(super) fn compute(&self) -> &ComputeArgs {
        match self {
            Self::Knn(args) => &args.encoder.compute,
            Self::Linear(args) => &args.encoder.compute,
            Self::Retrieval(args) => &args.encoder.compute,
        }
    }
}

pub(super) fn run(command: EvalCommand) -> Result<u8, Error> {
    match command {
        EvalCommand::Knn(args) => knn::run(args),
        EvalCommand::Linear(args) => linear::run(args),
        EvalCommand::Retrieval(args) => retrieval::run(args),
    }
}
