//! `pass-host sweep`

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use clap::{Args, Parser, ValueEnum};
use serde_json::Value;

use super::train::catch_interrupts;
use super::{Cli, ComputeArgs, output};
use crate::device::{DeviceChoice, Precision};
use crate::error::Error;
use crate::sweep::plan::{Job, Kind, Plan};
use crate::sweep::table::command_line;
use crate::sweep::{self, Ended, Event, SweepError, TABLE};

/// Train and judge many configurations, one after the other, and write one table.
///
/// Every run is checked before the first begins. A sweep that was stopped goes on where it was when called again; runs are
/// continued from their checkpoints. The tables (Markdown, CSV, HTML) are renewed after every result.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct SweepArgs {
    /// The list of configurations and evaluations.
    #[arg(value_name = "F.toml")]
    file: PathBuf,
    /// Folder of all runs and of the tables [default: `out` of the file].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Only this row; may be repeated.
    #[arg(long = "row", value_name = "NAME")]
    rows: Vec<String>,
    /// Check everything and print the commands; run nothing.
    #[arg(long)]
    dry_run: bool,
    /// Write the results as one JSON object to standard output.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    pub(super) compute: ComputeArgs,
}

const EXAMPLE: &str = r#"A file (paths are seen from the current folder, `config` from the file's):
  out = "runs/ablations"
  images = ["PHOTOS"]
  config = "base.toml"                  # or preset = "…", or both; keys of every row
  set = ["optim.steps=1500"]
  seeds = [0, 1, 2]

  [[evaluation]]
  name = "video"
  protocol = "vos"                      # a verb of pass-host eval
  data = "DAVIS"
  arguments = ["--year", "2017"]        # of that verb
  columns = [{ heading = "J&F", path = "J&F_mean" }]      # in its JSON; optional

  [[row]]
  name = "DINO"
  set = ["patch.enabled=false"]

  [[row]]
  name = "DINO + PASS"                  # preset and seeds may differ, too

  [[row]]
  name = "random"
  untrained = true                      # fresh values in the network of the first trained row

Exit code: 1 if a run or an evaluation failed, 0 after Ctrl-C."#;

pub(super) fn run(args: &SweepArgs) -> Result<u8, Error> {
    let plan = Plan::read(&args.file, args.out.as_deref(), &args.rows)?;
    for job in plan.jobs() {
        let words = std::iter::once("pass-host".to_owned()).chain(job.arguments.iter().cloned());
        if let Err(error) = Cli::try_parse_from(words) {
            let reason = error.to_string();
            let reason = reason.lines().next().unwrap_or_default().trim_start_matches("error: ");
            return Err(Error::usage(
                format!("{}: {}: {reason}", args.file.display(), job.title),
                "see `pass-host eval --help` and the help of its verbs",
            ));
        }
    }
    if args.dry_run {
        let commands: String = plan.jobs().map(|job| command_line(job) + "\n").collect();
        return output::print(&commands).map(|()| 0);
    }
    let interrupted = Arc::new(AtomicUsize::new(0));
    catch_interrupts(&interrupted, false);
    let program = std::env::current_exe()
        .map_err(|source| SweepError::Start { command: "pass-host".to_owned(), source })?;
    let execute = |job: &Job| {
        let ended = execute(&program, job, &args.compute)?;
        Ok(if interrupted.load(Ordering::SeqCst) > 0 { Ended::Interrupted } else { ended })
    };
    let summary = sweep::run(&plan, execute, |event| match event {
        Event::Begins(number, jobs, job) => output::note(&format!("== {number} of {jobs}: {}", job.title)),
        Event::DoneBefore(jobs) => output::note(&format!("done before: {jobs} jobs")),
        Event::Failed(job, code) => {
            let code = code.map_or("a signal".to_owned(), |code| format!("exit code {code}"));
            output::warn(&format!("{} failed with {code}: {}", job.title, command_line(job)));
        }
    })?;
    if summary.interrupted {
        let (done, jobs) = (summary.done, summary.jobs);
        output::note(&format!("stopped after {done} of {jobs} jobs; the same command goes on"));
    }
    if args.json {
        output::print_json(&summary)?;
    } else {
        let table = summary.results.markdown(&plan);
        let table = table.split("\n\n## ").next().unwrap_or_default();
        let file = summary.out.join(TABLE);
        output::print(&format!("{table}\n\n{0}.md, {0}.csv, {0}.html\n", file.display()))?;
    }
    Ok(u8::from(!summary.failed.is_empty()))
}

/// Runs one job as a process of its own; its messages go to our standard error.
fn execute(program: &std::path::Path, job: &Job, compute: &ComputeArgs) -> Result<Ended, SweepError> {
    let mut command = Command::new(program);
    command.args(&job.arguments);
    if job.continues.as_ref().is_some_and(|run| run.join("checkpoints/latest").is_file()) {
        command.arg("--resume");
    }
    if compute.device != DeviceChoice::Auto {
        command.args(["--device", &compute.device.to_string()]);
    }
    if let (Kind::Training, Some(precision)) = (job.kind, precision(compute.precision)) {
        command.args(["--precision", &precision]);
    }
    if let Some(threads) = compute.threads {
        command.args(["--threads", &threads.to_string()]);
    }
    // what a job has printed before it failed belongs to the person
    let finished = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let finished = finished.map_err(|source| SweepError::Start { command: command_line(job), source })?;
    let result = serde_json::from_slice::<Value>(&finished.stdout);
    let ending = |result: &Value| result.get("ending").and_then(Value::as_str).map(str::to_owned);
    Ok(match result {
        Ok(result) if ending(&result).as_deref() == Some("interrupted") => Ended::Interrupted,
        Ok(result) if finished.status.success() => Ended::Well(result),
        _ => {
            std::io::stderr().write_all(&finished.stdout).ok();
            Ended::Badly(finished.status.code())
        }
    })
}

/// The word for a precision that was asked for.
fn precision(precision: Precision) -> Option<String> {
    match precision {
        Precision::Auto => None,
        asked => asked.to_possible_value().map(|value| value.get_name().to_owned()),
    }
}
