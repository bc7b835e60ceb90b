//! Many runs, each trained and judged alike, and one table: ablations, seeds, comparisons of methods.
//!
//! | module | job |
//! |---|---|
//! | [`plan`] | from the file to runs and their command lines, everything checked first |
//! | [`journal`] | what is done, so that a sweep goes on where it was stopped |
//! | [`table`] | the results as Markdown, CSV and HTML |
//!
//! A run is trained and judged by this very program in processes of their own: the memory of one is gone before the next
//! begins, a failure costs one row, and every number of the table has a command that makes it again.

pub mod journal;
pub mod plan;
pub mod table;

use std::fs;
use std::io;
use std::path::PathBuf;

use serde::Serialize;
use serde_json::Value;

use crate::checkpoint::{CheckpointError, write_atomically};
use crate::config::ConfigError;
use journal::{Journal, Record};
use plan::{Job, Kind, Plan, Run};
use table::Results;

/// The tables in the folder of a sweep: `table.md`, `table.csv`, `table.html`.
pub const TABLE: &str = "table";

/// Why there is no sweep.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SweepError {
    /// A file cannot be read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is not TOML, or has other keys or types.
    #[error("{}: {message}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What the parser met, with line and column.
        message: String,
    },
    /// A value that makes no sense.
    #[error("{}: `{field}`: expected {expected}, found {found}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key, with the name of its row or evaluation.
        field: String,
        /// What it may be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// The configuration of a row.
    #[error("{}: row `{row}`", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// The name of the row.
        row: String,
        /// What is wrong.
        source: ConfigError,
    },
    /// The journal is damaged.
    #[error("`{}` is no journal of a sweep: {message}", path.display())]
    Journal {
        /// The file.
        path: PathBuf,
        /// What the parser met.
        message: String,
    },
    /// Results cannot be written, or another process is at work in the folder.
    #[error(transparent)]
    Write(#[from] CheckpointError),
    /// A folder cannot be made.
    #[error("cannot create `{}`", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A job cannot be started.
    #[error("cannot start `{command}`")]
    Start {
        /// The command line.
        command: String,
        /// Why.
        source: io::Error,
    },
}

impl SweepError {
    /// What to try.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Syntax { .. } => Some("`pass-host sweep --help` shows such a file".into()),
            Self::Row { source, .. } => source.hint(),
            Self::Write(error) => error.hint(),
            Self::Journal { .. } => Some(
                "remove it; evaluations are done again, finished runs are recognized by their checkpoints"
                    .into(),
            ),
            _ => None,
        }
    }
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Ended {
    /// With this JSON object on its standard output.
    Well(Value),
    /// Not well, with this exit code (none: killed by a signal).
    Badly(Option<i32>),
    /// A person wanted the sweep to end.
    Interrupted,
}

/// What a sweep did.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// The folder.
    pub out: PathBuf,
    /// Jobs done, now and before.
    pub done: usize,
    /// Jobs of the sweep.
    pub jobs: usize,
    /// Jobs that failed, by their titles.
    pub failed: Vec<String>,
    /// Whether a person ended it.
    pub interrupted: bool,
    /// One entry a run.
    pub results: Results,
}

/// What is happening, for the person.
pub enum Event<'a> {
    /// A job begins: its number from 1, how many there are, the job.
    Begins(usize, usize, &'a Job),
    /// Jobs that earlier calls have done.
    DoneBefore(usize),
    /// A job failed, with this exit code; what depends on it is left out.
    Failed(&'a Job, Option<i32>),
}

/// Does every job of `plan` that is not done yet, in order, and renews the tables after each.
///
/// `execute` runs one job. A failed training leaves out the evaluations of its run alone; another call tries again.
///
/// # Errors
/// [`SweepError`] if the folder cannot be used or a job cannot be started; what was done stays done.
pub fn run(
    plan: &Plan,
    mut execute: impl FnMut(&Job) -> Result<Ended, SweepError>,
    mut tell: impl FnMut(Event<'_>),
) -> Result<Summary, SweepError> {
    let _lock = crate::checkpoint::lock_run(&plan.out)?;
    let mut journal = Journal::open(&plan.out)?;
    let (mut failed, mut interrupted) = (Vec::new(), false);
    let jobs = plan.jobs().count();
    match plan.jobs().filter(|job| journal.is_done(job)).count() {
        0 => {}
        before => tell(Event::DoneBefore(before)),
    }
    let mut number = 0;
    'sweep: for run in &plan.runs {
        let mut trained = true;
        for job in &run.jobs {
            number += 1;
            if !trained || journal.is_done(job) {
                continue;
            }
            tell(Event::Begins(number, jobs, job));
            match execute(job)? {
                Ended::Interrupted => {
                    interrupted = true;
                    break 'sweep;
                }
                Ended::Badly(code) => {
                    tell(Event::Failed(job, code));
                    failed.push(job.title.clone());
                    trained &= job.kind != Kind::Training;
                }
                Ended::Well(result) => {
                    if let Some(folder) = job.result.parent() {
                        fs::create_dir_all(folder)
                            .map_err(|source| SweepError::Folder { path: folder.to_owned(), source })?;
                    }
                    let text = serde_json::to_string_pretty(&result).unwrap_or_else(|_| result.to_string());
                    write_atomically(&job.result, format!("{text}\n").as_bytes())?;
                    if job.kind == Kind::Training {
                        // results of the run's earlier weights
                        run.jobs.iter().for_each(|job| journal.forget(job));
                    }
                    journal.record(job, Record::of(job))?;
                    write_tables(plan, &Results::read(plan, &journal))?;
                }
            }
        }
    }
    let results = Results::read(plan, &journal);
    write_tables(plan, &results)?;
    let done = plan.jobs().filter(|job| journal.is_done(job)).count();
    Ok(Summary { out: plan.out.clone(), done, jobs, failed, interrupted, results })
}

fn write_tables(plan: &Plan, results: &Results) -> Result<(), SweepError> {
    for (ending, text) in
        [("md", results.markdown(plan)), ("csv", results.csv(plan)), ("html", results.html(plan))]
    {
        write_atomically(&plan.out.join(format!("{TABLE}.{ending}")), text.as_bytes())?;
    }
    Ok(())
}

impl Plan {
    /// Every job, in order.
    pub fn jobs(&self) -> impl Iterator<Item = &Job> {
        self.runs.iter().flat_map(|run: &Run| &run.jobs)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;

    /// Two rows, one with two seeds, and an untrained one; an evaluation with two columns.
    fn plan(dir: &Path) -> Plan {
        for folder in ["photos", "labelled"] {
            fs::create_dir_all(dir.join(folder)).unwrap();
        }
        let text = format!(
            r#"
            images = ["{0}/photos"]
            preset = "demo"
            [[evaluation]]
            name = "knn"
            protocol = "knn"
            data = "{0}/labelled"
            columns = [{{ heading = "top, 1", path = "knn.20.top1" }}, {{ heading = "a|b", path = "a.b" }}]
            [[row]]
            name = "fresh"
            untrained = true
            [[row]]
            name = "plain"
            set = ["patch.enabled=false"]
            seeds = [0, 1]
            [[row]]
            name = "full"
            "#,
            dir.display()
        );
        let file = dir.join("sweep.toml");
        fs::write(&file, text).unwrap();
        Plan::read(&file, Some(&dir.join("out")), &[]).unwrap()
    }

    /// What a job with these arguments returns: 20 % for the first seed of a row, 30 % for the second.
    fn result(job: &Job) -> Ended {
        match job.kind {
            Kind::Training => Ended::Well(json!({ "ending": "done", "step": 400 })),
            Kind::Evaluation => {
                let top1 = if job.name.contains("seed-1") { 0.3 } else { 0.2 };
                Ended::Well(json!({ "knn": { "20": { "top1": top1 } }, "a.b": 0.5 }))
            }
        }
    }

    #[test]
    fn a_sweep_goes_on_where_it_was_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let plan = plan(dir.path());
        assert_eq!(plan.jobs().count(), 7);
        let mut done = Vec::new();
        let first = run(
            &plan,
            |job| {
                if done.len() == 3 {
                    return Ok(Ended::Interrupted);
                }
                done.push(job.name.clone());
                Ok(result(job))
            },
            |_| {},
        )
        .unwrap();
        assert!(first.interrupted && first.done == 3, "{first:?}");
        let mut before = 0;
        let second = run(
            &plan,
            |job| {
                assert!(!done.contains(&job.name), "{} twice", job.name);
                done.push(job.name.clone());
                Ok(result(job))
            },
            |event| {
                if let Event::DoneBefore(jobs) = event {
                    before = jobs;
                }
            },
        )
        .unwrap();
        assert_eq!((before, second.done, second.failed.len()), (3, 7, 0));
        let nothing = run(&plan, |job| panic!("{}", job.name), |_| {}).unwrap();
        assert_eq!(nothing.done, 7);
    }

    #[test]
    fn a_failure_costs_its_run_alone_and_is_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let plan = plan(dir.path());
        let fails = |job: &Job| job.kind == Kind::Training && job.name.starts_with("plain/seed-1");
        let mut done = 0;
        let execute = |job: &Job| {
            done += 1;
            Ok(if fails(job) { Ended::Badly(Some(3)) } else { result(job) })
        };
        let summary = run(&plan, execute, |_| {}).unwrap();
        assert_eq!((done, summary.done), (6, 5), "its evaluation is left out");
        assert_eq!(summary.failed, ["plain, seed 1: training"]);
        let mut again = Vec::new();
        let execute = |job: &Job| {
            again.push(job.name.clone());
            Ok(result(job))
        };
        run(&plan, execute, |_| {}).unwrap();
        assert_eq!(again, ["plain/seed-1/train", "plain/seed-1/knn"]);
    }

    #[test]
    fn weights_that_are_trained_again_are_judged_again() {
        let dir = tempfile::tempdir().unwrap();
        let plan = plan(dir.path());
        run(&plan, |job| Ok(result(job)), |_| {}).unwrap();
        fs::remove_file(dir.path().join("out/full/seed-0/outcome.json")).unwrap();
        let mut again = Vec::new();
        let execute = |job: &Job| {
            again.push(job.name.clone());
            Ok(result(job))
        };
        run(&plan, execute, |_| {}).unwrap();
        assert_eq!(again, ["full/seed-0/train", "full/seed-0/knn"]);
    }

    #[test]
    fn another_command_is_another_job() {
        let dir = tempfile::tempdir().unwrap();
        let mut plan = plan(dir.path());
        run(&plan, |job| Ok(result(job)), |_| {}).unwrap();
        plan.runs[2].jobs[1].arguments.push("--images".to_owned());
        let mut again = 0;
        run(
            &plan,
            |job| {
                again += 1;
                Ok(result(job))
            },
            |_| {},
        )
        .unwrap();
        assert_eq!(again, 1);
    }

    #[test]
    fn tables_hold_means_deviations_and_commands() {
        let dir = tempfile::tempdir().unwrap();
        let plan = plan(dir.path());
        run(&plan, |job| Ok(result(job)), |_| {}).unwrap();
        let read = |ending: &str| fs::read_to_string(dir.path().join(format!("out/table.{ending}"))).unwrap();
        let markdown = read("md");
        for line in [
            r"| | top, 1 | a\|b |",
            "|---|---|---|",
            "| fresh | 20.0 | 50.0 |",
            "| plain | **25.0 ± 7.1** | 50.0 ± 0.0 |",
            "| full | 20.0 | 50.0 |",
            "In percent; the best of a column in bold. Mean ± standard deviation over seeds (plain: 2); other rows have one seed.",
        ] {
            assert!(markdown.lines().any(|found| found == line), "{line} in\n{markdown}");
        }
        assert_eq!(markdown.lines().filter(|line| line.starts_with("pass-host ")).count(), 7);
        let csv = read("csv");
        let lines: Vec<&str> = csv.lines().collect();
        assert_eq!(lines[0], "row,seed,steps,run,\"top, 1\",a|b");
        let folder = dir.path().join("out/plain/seed-1");
        assert_eq!(lines[2], format!("plain,1,400,{},0.3,0.5", folder.display()));
        assert!(lines[4].starts_with("fresh,0,,"), "{csv}");
        let html = read("html");
        assert!(html.contains("<td class=\"number\"><b>25.0 ± 7.1</b></td>"), "{html}");
    }

    #[test]
    fn a_damaged_journal_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let plan = plan(dir.path());
        fs::create_dir_all(&plan.out).unwrap();
        fs::write(plan.out.join("sweep.json"), "{").unwrap();
        let error = run(&plan, |job| Ok(result(job)), |_| {}).unwrap_err();
        assert!(error.to_string().contains("sweep.json") && error.hint().is_some(), "{error}");
    }
}
