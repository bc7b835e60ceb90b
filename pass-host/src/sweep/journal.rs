//! What is done: `sweep.json` in the folder of a sweep, renewed after every job.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::SweepError;
use super::plan::Job;
use crate::checkpoint::write_atomically;

/// The file.
pub const JOURNAL: &str = "sweep.json";

/// A job that ended well.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its arguments.
    pub arguments: Vec<String>,
}

impl Record {
    /// Of a job as it is planned.
    pub fn of(job: &Job) -> Self {
        Self { arguments: job.arguments.clone() }
    }
}

/// All records by the names of jobs.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    records: BTreeMap<String, Record>,
}

impl Journal {
    /// That of the folder `out`; empty if there is none yet.
    ///
    /// # Errors
    /// [`SweepError::Read`], [`SweepError::Journal`].
    pub fn open(out: &Path) -> Result<Self, SweepError> {
        let path = out.join(JOURNAL);
        let records = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|error| SweepError::Journal { path: path.clone(), message: error.to_string() })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(source) => return Err(SweepError::Read { path, source }),
        };
        Ok(Self { path, records })
    }

    /// Whether the job ended well with the same arguments, and its result is still there.
    pub fn is_done(&self, job: &Job) -> bool {
        self.records.get(&job.name).is_some_and(|record| *record == Record::of(job)) && job.result.is_file()
    }

    /// The job counts as not done; told to the disk with the next record.
    pub(super) fn forget(&mut self, job: &Job) {
        self.records.remove(&job.name);
    }

    /// Writes down that a job ended well.
    ///
    /// # Errors
    /// [`SweepError::Write`].
    pub fn record(&mut self, job: &Job, record: Record) -> Result<(), SweepError> {
        self.records.insert(job.name.clone(), record);
        let text = serde_json::to_string_pretty(&self.records).unwrap_or_default();
        Ok(write_atomically(&self.path, format!("{text}\n").as_bytes())?)
    }
}
