//! The command line: arguments as types, one file per verb. Only this module prints.

mod bench;
mod completions;
mod compute;
mod decode;
mod draft;
mod error;
mod features;
mod footprint;
mod info;
mod meter;
mod model_file;
mod output;
mod pictures;
mod prepare;
mod track;
mod verify;

use clap::{Parser, Subcommand};

use error::Error;
pub(crate) use output::print_error;

/// Patch features of images from a `.pass` model, on the device.
#[derive(Debug, Parser)]
#[command(name = "pass-edge", version, max_term_width = 110, arg_required_else_help = true, after_help = EXAMPLES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
First steps:
  pass-edge info model.pass                            what the file is and promises
  pass-edge verify model.pass                          whether this machine keeps the promise
  pass-edge features model.pass PHOTOS --out f.npy     features of images

Exit codes: 0 done, 1 failed, 2 wrong usage.";

#[derive(Debug, Subcommand)]
enum Command {
    Features(features::FeaturesArgs),
    Track(track::TrackArgs),
    Bench(bench::BenchArgs),
    Info(info::InfoArgs),
    Verify(verify::VerifyArgs),
    Completions(completions::CompletionsArgs),
}

/// Does what the command line says; the exit code, if all went well.
pub(crate) fn run(cli: Cli) -> Result<u8, Error> {
    footprint::return_large_blocks();
    match cli.command {
        Command::Features(args) => features::run(&args),
        Command::Track(args) => track::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Verify(args) => verify::run(&args),
        Command::Completions(args) => completions::run(&args),
    }
}
