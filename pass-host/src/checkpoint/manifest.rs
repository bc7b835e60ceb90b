//! `manifest.json`: length and checksum of every file of a checkpoint.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use super::CheckpointError;

/// Version of the layout of a checkpoint folder.
pub(super) const FORMAT: u32 = 1;

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    pub(super) format: u32,
    pub(super) step: u64,
    pub(super) files: BTreeMap<String, FileSum>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileSum {
    pub(super) bytes: u64,
    /// 32 hexadecimal digits.
    pub(super) xxh3_128: String,
}

impl FileSum {
    /// Reads the file once, in pieces.
    pub(super) fn of(path: &Path) -> Result<Self, CheckpointError> {
        let io = |source| CheckpointError::Io { action: "read", path: path.to_owned(), source };
        let mut file = File::open(path).map_err(io)?;
        let mut hash = Xxh3::new();
        let mut bytes = 0;
        let mut piece = vec![0; 1 << 20];
        loop {
            let n = file.read(&mut piece).map_err(io)?;
            if n == 0 {
                return Ok(Self { bytes, xxh3_128: format!("{:032x}", hash.digest128()) });
            }
            hash.update(&piece[..n]);
            bytes += n as u64;
        }
    }

    /// Compares the file with this entry.
    pub(super) fn verify(&self, path: &Path) -> Result<(), CheckpointError> {
        let found = Self::of(path)?;
        let damaged = |what, expected, found| {
            Err(CheckpointError::Damaged { path: path.to_owned(), what, expected, found })
        };
        if found.bytes != self.bytes {
            return damaged("length in bytes", self.bytes.to_string(), found.bytes.to_string());
        }
        if found.xxh3_128 != self.xxh3_128 {
            return damaged("xxh3-128 checksum", self.xxh3_128.clone(), found.xxh3_128);
        }
        Ok(())
    }
}
