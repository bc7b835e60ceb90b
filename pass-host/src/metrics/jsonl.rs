//! `metrics.jsonl`: append-only, cut back when a run goes back to a checkpoint.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{Metrics, MetricsError, io};
use crate::checkpoint::{CheckpointError, write_atomically};

/// The open file.
#[derive(Debug)]
pub(super) struct Lines {
    path: PathBuf,
    file: File,
}

/// The one key that decides whether a line stays.
#[derive(Deserialize)]
struct Line {
    step: u64,
}

impl Lines {
    /// Opens the file with the lines up to step `resume`, or empty.
    pub(super) fn open(path: &Path, resume: Option<u64>) -> Result<Self, MetricsError> {
        let old = match resume {
            None => Vec::new(),
            Some(_) => match fs::read(path) {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
                Err(error) => return Err(io("read", path)(error)),
            },
        };
        write_atomically(path, &kept(&old, resume.unwrap_or(0))).map_err(|error| match error {
            CheckpointError::Io { action, path, source } => MetricsError::Io { action, path, source },
            other => io("write", path)(std::io::Error::other(other)),
        })?;
        let file = OpenOptions::new().append(true).open(path).map_err(io("open", path))?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Appends a line in a single write, so that a kill tears at most the last line.
    pub(super) fn write(&mut self, metrics: &Metrics) -> Result<(), MetricsError> {
        let mut line = serde_json::to_vec(metrics).map_err(|e| io("write", &self.path)(e.into()))?;
        line.push(b'\n');
        self.file.write_all(&line).map_err(io("write", &self.path))
    }

    pub(super) fn sync(&self) -> Result<(), MetricsError> {
        self.file.sync_data().map_err(io("sync", &self.path))
    }
}

/// The complete lines of `bytes` with a step of at most `last`; what is torn or no JSON is dropped.
fn kept(bytes: &[u8], last: u64) -> Vec<u8> {
    bytes
        .split_inclusive(|&b| b == b'\n')
        .filter(|line| line.ends_with(b"\n"))
        .filter(|line| serde_json::from_slice::<Line>(line).is_ok_and(|line| line.step <= last))
        .flatten()
        .copied()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{METRICS, MetricsLog};

    fn at(step: u64) -> Metrics {
        Metrics { step, loss: step as f64 / 3.0, grad_norm: f64::NAN, ..Metrics::default() }
    }

    #[test]
    fn keys_are_the_contract_in_order() {
        let line = serde_json::to_string(&at(1)).unwrap();
        let keys: Vec<&str> = line.split('"').skip(1).step_by(2).collect();
        assert_eq!(
            keys.join(", "),
            "step, epoch, loss, loss_image, loss_patch, lr, weight_decay, momentum, teacher_temp, grad_norm, \
             teacher_entropy_image, teacher_entropy_patch, kl_image, kl_patch, feature_std, positives_agreement, \
             images_per_s, data_wait"
        );
        assert!(line.contains("\"grad_norm\":null"));
        let probed = serde_json::to_string(&Metrics { knn_top1: Some(0.5), ..at(1) }).unwrap();
        assert!(probed.ends_with(",\"knn_top1\":0.5}"), "{probed}");
    }

    #[test]
    fn a_killed_and_resumed_log_equals_an_uninterrupted_one() {
        let (whole, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut log = MetricsLog::open(whole.path(), None, false).unwrap();
        (1..=9).for_each(|step| log.write(&at(step)).unwrap());

        let mut log = MetricsLog::open(killed.path(), None, false).unwrap();
        (1..=6).for_each(|step| log.write(&at(step)).unwrap());
        let path = killed.path().join(METRICS);
        let mut torn = fs::read(&path).unwrap();
        torn.extend_from_slice(b"{\"step\":4,\"ep");
        fs::write(&path, &torn).unwrap();
        let mut log = MetricsLog::open(killed.path(), Some(4), false).unwrap();
        (5..=7).for_each(|step| log.write(&at(step)).unwrap());
        log.rewind(6).unwrap();
        (7..=9).for_each(|step| log.write(&at(step)).unwrap());
        log.sync().unwrap();
        assert_eq!(
            fs::read_to_string(path).unwrap(),
            fs::read_to_string(whole.path().join(METRICS)).unwrap()
        );
    }

    #[test]
    fn a_new_run_starts_empty_and_a_missing_log_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        MetricsLog::open(dir.path(), Some(5), false).unwrap().write(&at(6)).unwrap();
        MetricsLog::open(dir.path(), None, false).unwrap();
        assert_eq!(fs::read(dir.path().join(METRICS)).unwrap(), b"");
        assert!(MetricsLog::open(&dir.path().join("none"), None, false).is_err());
    }

    #[test]
    fn hostile_lines_are_dropped() {
        let text =
            b"{\"step\":1}\nnot json\n{\"step\":-1}\n\n{\"step\":2}\n\xff\xfe\n{\"step\":3}\n{\"step\":1}";
        assert_eq!(kept(text, 2), b"{\"step\":1}\n{\"step\":2}\n");
    }
}
