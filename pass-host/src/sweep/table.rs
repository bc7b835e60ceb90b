//! The results of a sweep as Markdown, CSV and HTML: a row a configuration, mean and standard deviation over its seeds.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use super::journal::Journal;
use super::plan::{Job, Kind, Plan};
use crate::report::page::Html;

const STYLE: &str = include_str!("../report/page.css");

/// The results of all runs that are there.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Results {
    /// One entry a run, in the order of the plan.
    pub runs: Vec<RunResult>,
}

/// The results of one run.
#[derive(Clone, Debug, Serialize)]
pub struct RunResult {
    /// The row, from 0.
    #[serde(skip)]
    pub row: usize,
    /// Its name.
    pub name: String,
    /// The seed.
    pub seed: u64,
    /// The run folder.
    pub run: PathBuf,
    /// Optimizer steps; `None` if it is not trained, or not yet.
    pub steps: Option<u64>,
    /// The value of every column; `None` = not there yet.
    pub values: Vec<Option<f64>>,
}

/// Mean and standard deviation over seeds.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Cell {
    mean: f64,
    /// Of the sample (divided by n − 1); `None` for one seed.
    deviation: Option<f64>,
    seeds: usize,
}

impl Cell {
    fn of(values: &[f64]) -> Option<Self> {
        let count = values.len();
        if count == 0 {
            return None;
        }
        let mean = values.iter().sum::<f64>() / count as f64;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let deviation = (count > 1).then(|| (squares / (count - 1) as f64).sqrt());
        Some(Self { mean, deviation, seeds: count })
    }

    /// In percent.
    fn shown(self) -> String {
        match self.deviation {
            Some(deviation) => format!("{:.1} ± {:.1}", 100.0 * self.mean, 100.0 * deviation),
            None => format!("{:.1}", 100.0 * self.mean),
        }
    }
}

/// The number at `path` (keys joined by dots) of a JSON value. Keys may hold dots themselves.
fn number_at(value: &Value, path: &str) -> Option<f64> {
    if let Some(found) = value.get(path) {
        return found.as_f64();
    }
    path.match_indices('.').find_map(|(at, _)| number_at(value.get(&path[..at])?, &path[at + 1..]))
}

fn read(path: &Path) -> Option<Value> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

impl Results {
    /// What the jobs that are done have left.
    pub fn read(plan: &Plan, journal: &Journal) -> Self {
        let result = |job: &Job| journal.is_done(job).then(|| read(&job.result)).flatten();
        let runs = plan.runs.iter().map(|run| {
            let (training, evaluations): (Vec<&Job>, Vec<&Job>) =
                run.jobs.iter().partition(|job| job.kind == Kind::Training);
            let steps = training.first().and_then(|job| result(job)?.get("step")?.as_u64());
            let results: Vec<Option<Value>> = evaluations.iter().map(|job| result(job)).collect();
            let values = plan.evaluations.iter().zip(&results).flat_map(|(evaluation, result)| {
                evaluation
                    .columns
                    .iter()
                    .map(move |column| result.as_ref().and_then(|result| number_at(result, &column.path)))
            });
            RunResult {
                row: run.row,
                name: plan.rows[run.row].clone(),
                seed: run.seed,
                run: run.folder.clone(),
                steps,
                values: values.collect(),
            }
        });
        Self { runs: runs.collect() }
    }

    /// Cells of the table: rows in the order of the file, those without a run left out.
    fn cells<'a>(&self, plan: &'a Plan) -> Vec<(&'a str, Vec<Option<Cell>>)> {
        let columns = plan.columns().count();
        let row = |(index, name)| {
            let runs: Vec<&RunResult> = self.runs.iter().filter(|run| run.row == index).collect();
            let cell = |column: usize| {
                let values: Vec<f64> = runs.iter().filter_map(|run| run.values[column]).collect();
                Cell::of(&values)
            };
            (!runs.is_empty()).then(|| (name, (0..columns).map(cell).collect()))
        };
        plan.rows.iter().map(String::as_str).enumerate().filter_map(row).collect()
    }

    /// Name, then each cell as text and whether it is the best of its column.
    fn texts<'a>(&self, rows: &[(&'a str, Vec<Option<Cell>>)]) -> Vec<(&'a str, Vec<(String, bool)>)> {
        // the largest mean of a column, if there is a smaller one
        let best = |column: usize| {
            let means = rows.iter().filter_map(|(_, cells)| Some(cells[column]?.mean));
            let least = means.clone().fold(f64::INFINITY, f64::min);
            Some(means.fold(f64::NEG_INFINITY, f64::max)).filter(|most| *most > least)
        };
        let text = |(column, cell): (usize, &Option<Cell>)| match cell {
            Some(cell) => (cell.shown(), best(column) == Some(cell.mean)),
            None => ("–".to_owned(), false),
        };
        rows.iter().map(|(name, cells)| (*name, cells.iter().enumerate().map(text).collect())).collect()
    }

    /// How many seeds the cells stand for.
    fn caption(rows: &[(&str, Vec<Option<Cell>>)]) -> String {
        let seeds = |cells: &[Option<Cell>]| cells.iter().flatten().map(|cell| cell.seeds).max().unwrap_or(0);
        let several: Vec<String> = rows
            .iter()
            .map(|(name, cells)| (*name, seeds(cells)))
            .filter(|(_, seeds)| *seeds > 1)
            .map(|(name, seeds)| format!("{name}: {seeds}"))
            .collect();
        let numbers = "In percent; the best of a column in bold.";
        match several.is_empty() {
            true => format!("{numbers} One seed a row, so a difference may be chance."),
            false => format!(
                "{numbers} Mean ± standard deviation over seeds ({}); other rows have one seed.",
                several.join(", ")
            ),
        }
    }

    /// The table, its caption, and the commands that made it.
    pub fn markdown(&self, plan: &Plan) -> String {
        let rows = self.cells(plan);
        let mut text = String::from("| |");
        for (_, column) in plan.columns() {
            write!(text, " {} |", cell_of_markdown(&column.heading)).ok();
        }
        text += "\n|---|";
        text += &"---|".repeat(plan.columns().count());
        text.push('\n');
        for (name, cells) in self.texts(&rows) {
            write!(text, "| {} |", cell_of_markdown(name)).ok();
            for (cell, best) in cells {
                let mark = if best { "**" } else { "" };
                write!(text, " {mark}{cell}{mark} |").ok();
            }
            text.push('\n');
        }
        write!(text, "\n{}\n\n## Commands\n\n```\n", Self::caption(&rows)).ok();
        for job in plan.jobs() {
            writeln!(text, "{}", command_line(job)).ok();
        }
        text += "```\n";
        text
    }

    /// One line a run, numbers as they are in the results.
    pub fn csv(&self, plan: &Plan) -> String {
        let mut text = String::from("row,seed,steps,run");
        for (_, column) in plan.columns() {
            write!(text, ",{}", cell_of_csv(&column.heading)).ok();
        }
        text.push('\n');
        for run in &self.runs {
            let steps = run.steps.map(|steps| steps.to_string()).unwrap_or_default();
            let folder = run.run.display().to_string();
            write!(text, "{},{},{steps},{}", cell_of_csv(&run.name), run.seed, cell_of_csv(&folder)).ok();
            for value in &run.values {
                write!(text, ",{}", value.map(|value| value.to_string()).unwrap_or_default()).ok();
            }
            text.push('\n');
        }
        text
    }

    /// A page that needs no network.
    pub fn html(&self, plan: &Plan) -> String {
        let rows = self.cells(plan);
        let title = plan.out.display().to_string();
        let mut page = Html::trusted("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">");
        page.open("meta", &[("name", "viewport"), ("content", "width=device-width, initial-scale=1")]);
        page.open("title", &[]).text(&title).close("title");
        page.append(&Html::trusted("<style>"))
            .append(&Html::trusted(STYLE))
            .append(&Html::trusted("</style></head>"));
        page.open("body", &[]).open("header", &[]);
        page.open("h1", &[]).text(&title).close("h1").close("header").open("main", &[]).open("section", &[]);
        page.open("div", &[("class", "scroll")]).open("table", &[]).open("thead", &[]).open("tr", &[]);
        page.open("th", &[]).close("th");
        for (_, column) in plan.columns() {
            page.open("th", &[]).text(&column.heading).close("th");
        }
        page.close("tr").close("thead").open("tbody", &[]);
        for (name, cells) in self.texts(&rows) {
            page.open("tr", &[]).open("td", &[]).text(name).close("td");
            for (cell, best) in cells {
                page.open("td", &[("class", "number")]);
                match best {
                    true => page.open("b", &[]).text(&cell).close("b"),
                    false => page.text(&cell),
                };
                page.close("td");
            }
            page.close("tr");
        }
        page.close("tbody").close("table").close("div");
        page.open("p", &[("class", "about")]).text(&Self::caption(&rows)).close("p").close("section");
        let commands: Vec<String> = plan.jobs().map(command_line).collect();
        page.open("section", &[]).open("details", &[]).open("summary", &[]).text("Commands").close("summary");
        page.append(&Html::pre(&commands.join("\n"))).close("details").close("section");
        page.close("main").close("body").close("html");
        page.into_string()
    }
}

/// A job as a person types it.
pub fn command_line(job: &Job) -> String {
    let words = job.arguments.iter().map(|word| {
        let plain = |character: char| character.is_ascii_alphanumeric() || "-_./=:,@+".contains(character);
        match !word.is_empty() && word.chars().all(plain) {
            true => word.clone(),
            false => format!("'{}'", word.replace('\'', r"'\''")),
        }
    });
    std::iter::once("pass-host".to_owned()).chain(words).collect::<Vec<_>>().join(" ")
}

fn cell_of_markdown(text: &str) -> String {
    text.replace('\\', "\\\\").replace('|', "\\|").replace('\n', " ")
}

fn cell_of_csv(text: &str) -> String {
    match text.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.to_owned(),
    }
}
