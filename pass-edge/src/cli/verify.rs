//! `pass-edge verify`

use std::path::PathBuf;

use clap::Args;
use pass_edge::kernels::Kernel;
use serde::Serialize;

use super::compute::{ComputeArgs, Engine};
use super::error::Error;
use super::model_file::ModelFile;
use super::output;

/// Check that this machine computes exactly the features the model file promises (exit code 1 if not).
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  pass-edge verify model.pass
  pass-edge verify model.pass --all-kernels --threads 1")]
pub(super) struct VerifyArgs {
    /// The model.
    #[arg(value_name = "M.pass")]
    model: PathBuf,
    /// Check every kernel this processor has.
    #[arg(long, conflicts_with = "kernel")]
    all_kernels: bool,
    /// Write one JSON object to standard output.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    compute: ComputeArgs,
}

#[derive(Serialize)]
struct Report {
    model: PathBuf,
    /// Digest of the features that the file promises.
    expected: String,
    /// What each kernel computed.
    kernels: Vec<Outcome>,
}

#[derive(Serialize)]
struct Outcome {
    kernel: &'static str,
    actual: String,
    ok: bool,
}

pub(super) fn run(args: &VerifyArgs) -> Result<u8, Error> {
    let file = ModelFile::open(&args.model)?;
    let model = file.model()?;
    let kernels: Vec<_> =
        if args.all_kernels { Kernel::available().collect() } else { vec![args.compute.kernel()?] };
    let expected = model.self_test().digest;
    let mut report =
        Report { model: args.model.clone(), expected: format!("{expected:016x}"), kernels: Vec::new() };
    let mut failure = None;
    for kernel in kernels {
        let actual = match Engine::new(model, kernel, args.compute.pool()?).verify() {
            Ok(()) => expected,
            Err(source @ pass_edge::Error::SelfTest { actual, .. }) => {
                failure = failure.or(Some(Error::SelfTest {
                    path: args.model.clone(),
                    kernel: kernel.name(),
                    source,
                }));
                actual
            }
            Err(error) => return Err(error.into()),
        };
        let outcome =
            Outcome { kernel: kernel.name(), actual: format!("{actual:016x}"), ok: actual == expected };
        report.kernels.push(outcome);
    }
    if args.json {
        output::print_json(&report)?;
    } else {
        let line = |outcome: &Outcome| {
            let verdict = if outcome.ok { "ok" } else { "MISMATCH" };
            format!(
                "{verdict:8}  kernel {}  expected {}  actual {}\n",
                outcome.kernel, report.expected, outcome.actual
            )
        };
        output::print(&report.kernels.iter().map(line).collect::<String>())?;
    }
    failure.map_or(Ok(0), Err)
}
