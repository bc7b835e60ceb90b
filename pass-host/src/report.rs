//! A run as one HTML page that needs no network: curves, a verdict in plain words, crops, pictures, tables, configuration.
//!
//! Whatever is missing or broken in a run folder (lines of the log, images, checkpoints, evaluations) is said on the page
//! and does not keep the rest from being shown.
//!
//! | module | job |
//! |---|---|
//! | [`log`] | `metrics.jsonl`, any numeric keys, broken lines counted |
//! | [`verdict`] | what the numbers mean, in words |
//! | [`curves`] | which numbers share a chart |
//! | [`pictures`] | crops as the network sees them, maps of the first, middle and last checkpoint |
//! | [`tables`] | results of evaluations, bad images |
//! | [`page`] | HTML, every text escaped |

pub mod curves;
pub mod log;
pub mod page;
pub mod pictures;
pub mod tables;
pub mod verdict;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use candle_core::Device;

use crate::checkpoint::{self, CHECKPOINTS, CheckpointError};
use crate::config::TrainConfig;
use crate::metrics::METRICS;
use crate::train::{CONFIG, NON_FINITE, QUARANTINE};
use log::Log;
use page::{Html, Slots};
use verdict::Level;

/// The file in the run folder.
pub const REPORT: &str = "report.html";
/// The folder of evaluation results in the run folder.
pub const EVALUATION: &str = "evaluation";

const TEMPLATE: &str = include_str!("report/page.html");
const STYLE: &str = include_str!("report/page.css");
const SCRIPT: &str = include_str!("report/curves.js");

/// Everything `report` needs.
#[derive(Clone, Debug)]
pub struct ReportSettings {
    /// The run folder.
    pub run: PathBuf,
    /// The file; `None` = `report.html` in the run folder.
    pub out: Option<PathBuf>,
    /// Folder with results of evaluations; `None` = `evaluation` in the run folder.
    pub evaluations: Option<PathBuf>,
    /// Images of crops and pictures, as in `data.images`; none = those of the run.
    pub images: Vec<String>,
    /// Where pictures are computed.
    pub device: Device,
}

/// What was written.
#[derive(Clone, Debug, serde::Serialize)]
pub struct ReportSummary {
    /// The file.
    pub file: PathBuf,
    /// Its size.
    pub bytes: usize,
    /// Log steps.
    pub steps: usize,
    /// The verdict in one sentence.
    pub verdict: String,
    /// What could not be shown, and why.
    pub missing: Vec<String>,
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReportError {
    /// No run folder.
    #[error("`{}` is no run folder: expected `{CONFIG}` or `{METRICS}` in it", path.display())]
    NoRun {
        /// The path.
        path: PathBuf,
    },
    /// A file of the run that is there cannot be read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The page cannot be written.
    #[error(transparent)]
    Write(#[from] CheckpointError),
}

impl ReportError {
    /// What to try.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NoRun { .. } => Some("name the folder given to `pass-host train --out`".into()),
            Self::Read { .. } => None,
            Self::Write(error) => error.hint(),
        }
    }
}

/// The bytes of a file; `None` if there is no such file.
fn read(path: &Path) -> Result<Option<Vec<u8>>, ReportError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ReportError::Read { path: path.to_owned(), source }),
    }
}

/// Writes the report of a run: the whole page or nothing.
///
/// # Errors
/// [`ReportError`].
pub fn write(settings: &ReportSettings) -> Result<ReportSummary, ReportError> {
    let run = &settings.run;
    let config_text = read(&run.join(CONFIG))?.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let metrics = read(&run.join(METRICS))?;
    if config_text.is_none() && metrics.is_none() {
        return Err(ReportError::NoRun { path: run.clone() });
    }
    let mut missing = Vec::new();
    let config = match config_text.as_deref().map(TrainConfig::from_toml) {
        Some(Ok(config)) => Some(config),
        Some(Err(error)) => {
            let error = error.to_string();
            missing.push(format!(
                "`{CONFIG}` cannot be understood: {}",
                error.lines().next().unwrap_or_default()
            ));
            None
        }
        None => {
            missing.push(format!("there is no `{CONFIG}`"));
            None
        }
    };
    let log = Log::read(metrics.as_deref().unwrap_or_default());
    let bad_images = tables::bad_images(&read(&run.join(QUARANTINE))?.unwrap_or_default());
    let skipped =
        read(&run.join(NON_FINITE))?.map_or(0, |bytes| bytes.iter().filter(|b| **b == b'\n').count());
    let facts = verdict::Facts { bad_images: bad_images.len(), skipped };
    let judged = verdict::judge(&log, config.as_ref(), facts);

    let pictures = pictures::of_run(settings, config.as_ref());
    missing.extend(pictures.missing.iter().cloned());
    let evaluations = settings.evaluations.clone().unwrap_or_else(|| run.join(EVALUATION));
    let (evaluations, unreadable) = tables::evaluations(&evaluations);
    missing.extend(unreadable);

    let absolute = std::path::absolute(run).unwrap_or_else(|_| run.clone());
    let name = absolute.file_name().map_or_else(|| absolute.to_string_lossy(), |name| name.to_string_lossy());
    let mut slots = Slots::default();
    slots.text("title", &name);
    slots.text("subtitle", &verdict::subtitle(&log, config.as_ref()));
    slots.text("level", judged.level.name());
    slots.text("headline", &judged.headline);
    slots.html("findings", findings(&judged));
    slots.html("log-faults", log_faults(&log));
    slots.html("data", Html::json(&curves::data(&log, config.as_ref())));
    slots.html("crops", pictures.crops);
    slots.html("maps", pictures.maps);
    slots.html("evaluations", evaluations);
    slots.html("bad-images", bad_images.html());
    slots.html("missing", Html::list("missing", &missing));
    slots.html("config", Html::pre(config_text.as_deref().unwrap_or("(not there)")));
    slots.text("version", env!("CARGO_PKG_VERSION"));
    slots.html("style", Html::trusted(STYLE));
    slots.html("script", Html::trusted(SCRIPT));
    let text = slots.fill(TEMPLATE);
    let file = settings.out.clone().unwrap_or_else(|| run.join(REPORT));
    checkpoint::write_atomically(&file, text.as_bytes())?;
    Ok(ReportSummary { file, bytes: text.len(), steps: log.len(), verdict: judged.headline, missing })
}

fn findings(judged: &verdict::Verdict) -> Html {
    let mut list = Html::default();
    for finding in &judged.findings {
        list.open("li", &[("class", finding.level.name())]);
        list.open("p", &[]).prose(&finding.text).close("p");
        if let Some(advice) = &finding.advice {
            list.open("p", &[("class", "advice")]).text("Try: ").prose(advice).close("p");
        }
        list.close("li");
    }
    list
}

fn log_faults(log: &Log) -> Html {
    let mut html = Html::default();
    if log.faults() > 0 {
        html.open("p", &[("class", Level::Warning.name())]);
        html.text(&format!(
            "{} of the lines of {METRICS} could not be used: {}",
            log.faults(),
            log.first_faults().join("; ")
        ));
        html.close("p");
    }
    html
}

/// Where a run keeps its checkpoints.
fn checkpoints(run: &Path) -> PathBuf {
    run.join(CHECKPOINTS)
}
