//! The command line: arguments as types, one file per verb. Only this module prints.

mod bench;
mod completions;
mod config;
mod doctor;
mod eval;
mod export;
mod features;
mod import;
mod output;
mod pack;
mod quantize;
mod quantizing_bar;
mod report;
mod run_folder;
mod sweep;
mod train;
mod verify;
mod viz;

use clap::{Args, Parser, Subcommand};

pub use output::print_error;

use crate::device::{DeviceChoice, Precision};
use crate::error::Error;

/// Learns dense image features without labels (DINO + PASS) from a folder of pictures.
#[derive(Debug, Parser)]
#[command(name = "pass-host", version, max_term_width = 110, arg_required_else_help = true, after_help = EXAMPLES)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
First steps:
  pass-host train                              two minutes on the bundled photos
  pass-host train PHOTOS --out runs/mine       your own pictures
  pass-host features PHOTOS --weights runs/mine --out features.safetensors
  pass-host quantize runs/mine --calibrate PHOTOS --out model.pass

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 stopped by the guard (collapse or numbers that are not finite).";

#[derive(Debug, Subcommand)]
enum Command {
    Train(Box<train::TrainArgs>),
    Pack(pack::PackArgs),
    Sweep(sweep::SweepArgs),
    #[command(subcommand)]
    Eval(eval::EvalCommand),
    Features(features::FeaturesArgs),
    Export(export::ExportArgs),
    Quantize(quantize::QuantizeArgs),
    Verify(verify::VerifyArgs),
    Import(import::ImportArgs),
    #[command(subcommand)]
    Viz(viz::VizCommand),
    Report(report::ReportArgs),
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    #[command(subcommand)]
    Config(config::ConfigCommand),
    Doctor(doctor::DoctorArgs),
    Completions(completions::CompletionsArgs),
}

impl Cli {
    /// Compute threads asked for; `None` = the default of the thread pool.
    pub fn threads(&self) -> Option<usize> {
        let compute = match &self.command {
            Command::Train(args) => &args.compute,
            Command::Features(args) => &args.compute,
            Command::Eval(command) => command.compute(),
            Command::Viz(command) => command.compute(),
            Command::Bench(command) => command.compute(),
            Command::Report(args) => &args.compute,
            Command::Sweep(args) => &args.compute,
            Command::Pack(args) => return args.workers,
            Command::Doctor(args) => return args.threads,
            Command::Quantize(args) => return args.threads,
            Command::Verify(args) => return args.threads,
            Command::Export(_) | Command::Import(_) | Command::Config(_) | Command::Completions(_) => {
                return None;
            }
        };
        compute.threads
    }
}

/// Where to compute; the same flags for every command that does.
#[derive(Debug, Args)]
#[command(next_help_heading = "Compute")]
struct ComputeArgs {
    /// Device: `auto` (CUDA if built in and present, else CPU), `cpu`, `cuda`, or `cuda:N`.
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = str::parse::<DeviceChoice>)]
    device: DeviceChoice,
    /// Precision of training: `auto` (bf16 on CUDA, else f32), `f32`, or `bf16` with f32 weights (CUDA only). All else is f32.
    #[arg(long, value_enum, value_name = "PRECISION", default_value = "auto", hide_possible_values = true)]
    precision: Precision,
    /// Compute threads [default: one per core]. The result is the same for any number.
    #[arg(long, value_name = "N", value_parser = thread_count)]
    threads: Option<usize>,
}

fn thread_count(text: &str) -> Result<usize, String> {
    text.parse()
        .ok()
        .filter(|n| (1..=1024).contains(n))
        .ok_or_else(|| "expected a number from 1 to 1024".to_owned())
}

/// `224` or `480x854` as height and width.
fn image_size(text: &str) -> Result<(usize, usize), String> {
    let (height, width) = text.split_once('x').unwrap_or((text, text));
    match (height.parse(), width.parse()) {
        (Ok(height), Ok(width)) if height > 0 && width > 0 => Ok((height, width)),
        _ => Err("expected `PIXELS` or `HEIGHTxWIDTH`".to_owned()),
    }
}

/// Does what the command line says; the exit code, if all went well.
///
/// # Errors
/// Every failure, for [`print_error`].
pub fn run(cli: Cli) -> Result<u8, Error> {
    match cli.command {
        Command::Train(args) => train::run(*args),
        Command::Pack(args) => pack::run(args),
        Command::Sweep(args) => sweep::run(&args),
        Command::Eval(command) => eval::run(command),
        Command::Features(args) => features::run(args),
        Command::Export(args) => export::run(args),
        Command::Quantize(args) => quantize::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Import(args) => import::run(args),
        Command::Viz(command) => viz::run(command),
        Command::Report(args) => report::run(args),
        Command::Bench(command) => bench::run(command),
        Command::Config(command) => config::run(command),
        Command::Doctor(args) => doctor::run(args),
        Command::Completions(args) => completions::run(&args),
    }
}
