//! Reading: only what its manifest vouches for.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde::de::DeserializeOwned;

use super::manifest::{FORMAT, Manifest};
use super::write::io;
use super::{CHECKPOINTS, CheckpointError, LATEST, MANIFEST, STATE, folder_name, step_of};

/// A checkpoint whose every file has the length and checksum of its manifest.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    manifest: Manifest,
    rejected: Vec<Rejected>,
}

/// A checkpoint that was passed over, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// The checkpoint folder.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

/// Opens the checkpoint named by `latest`, or the newest intact one if that is missing or damaged; `None` if there are no
/// checkpoints. [`Checkpoint::rejected`] lists what was passed over.
///
/// # Errors
/// [`CheckpointError::NoneValid`] if there are checkpoints but none is intact, [`CheckpointError::Io`] if `dir` cannot be
/// listed.
pub fn open_latest(dir: &Path) -> Result<Option<Checkpoint>, CheckpointError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io("list", dir)(error)),
    };
    let mut steps = Vec::new();
    for entry in entries {
        let name = entry.map_err(io("list", dir))?.file_name();
        steps.extend(name.to_str().and_then(step_of));
    }
    steps.sort_unstable_by(|a, b| b.cmp(a));
    let latest = fs::read(dir.join(LATEST)).ok();
    let named = latest.as_deref().and_then(|bytes| step_of(std::str::from_utf8(bytes).ok()?.trim()));
    let mut rejected = Vec::new();
    let order = named.into_iter().chain(steps.into_iter().filter(|step| Some(*step) != named));
    for step in order {
        let path = dir.join(folder_name(step));
        match Checkpoint::open(&path) {
            Ok(checkpoint) => return Ok(Some(Checkpoint { rejected, ..checkpoint })),
            Err(error) => rejected.push(Rejected { path, reason: chain(&error) }),
        }
    }
    if rejected.is_empty() {
        Ok(None)
    } else {
        Err(CheckpointError::NoneValid { dir: dir.to_owned(), rejected })
    }
}

/// An error with its sources in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

impl Checkpoint {
    /// Opens and verifies one checkpoint folder.
    ///
    /// # Errors
    /// [`CheckpointError`] naming the file that is missing, damaged or not understood.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let file = path.join(MANIFEST);
        let text = fs::read(&file).map_err(io("read", &file))?;
        let manifest: Manifest = serde_json::from_slice(&text)
            .map_err(|source| CheckpointError::Json { path: file.clone(), source })?;
        let differs = |what, expected: String, found: String| {
            Err(CheckpointError::Damaged { path: file.clone(), what, expected, found })
        };
        if manifest.format != FORMAT {
            return differs("format version", FORMAT.to_string(), manifest.format.to_string());
        }
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if let Some(step) = step_of(name)
            && step != manifest.step
        {
            return differs("step", step.to_string(), manifest.step.to_string());
        }
        if !manifest.files.contains_key(STATE) {
            return differs("files", format!("an entry for {STATE}"), "none".into());
        }
        for (name, sum) in &manifest.files {
            let plain = Path::new(name).file_name().is_some_and(|n| n == name.as_str());
            if !plain {
                return differs("file name", "a name without folders".into(), format!("{name:?}"));
            }
            sum.verify(&path.join(name))?;
        }
        Ok(Self { path: path.to_owned(), manifest, rejected: Vec::new() })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Steps done when it was written.
    pub fn step(&self) -> u64 {
        self.manifest.step
    }

    /// The newer checkpoints [`open_latest`] passed over.
    pub fn rejected(&self) -> &[Rejected] {
        &self.rejected
    }

    /// The tensors of the part `stem`.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] or [`CheckpointError::SafeTensors`].
    pub fn tensors(&self, stem: &str, device: &Device) -> Result<BTreeMap<String, Tensor>, CheckpointError> {
        read_tensors(&self.path.join(format!("{stem}.safetensors")), device)
    }

    /// `state.json`.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] or [`CheckpointError::Json`].
    pub fn state<T: DeserializeOwned>(&self) -> Result<T, CheckpointError> {
        let path = self.path.join(STATE);
        let text = fs::read(&path).map_err(io("read", &path))?;
        serde_json::from_slice(&text).map_err(|source| CheckpointError::Json { path, source })
    }
}

/// The checkpoint that `path` means: that very folder, or the one to continue from of a run folder; `None` if it is
/// neither or the run has none yet.
///
/// # Errors
/// As [`Checkpoint::open`] and [`open_latest`].
pub fn open_at(path: &Path) -> Result<Option<Checkpoint>, CheckpointError> {
    if path.join(MANIFEST).is_file() {
        return Checkpoint::open(path).map(Some);
    }
    open_latest(&path.join(CHECKPOINTS))
}

/// The weights that `path` means: a safetensors file, or the part `stem` (`teacher`, `student`) of a checkpoint folder or
/// of the newest checkpoint of a run folder.
///
/// # Errors
/// [`CheckpointError::NoWeights`] if it is none of these; as [`open_at`] and [`read_tensors`].
pub fn weights_at(
    path: &Path,
    stem: &str,
    device: &Device,
) -> Result<BTreeMap<String, Tensor>, CheckpointError> {
    if path.is_dir() {
        let found = open_at(path)?.ok_or_else(|| CheckpointError::NoWeights { path: path.to_owned() })?;
        return found.tensors(stem, device);
    }
    read_tensors(path, device)
}

/// Every tensor of a safetensors file.
///
/// # Errors
/// [`CheckpointError::Io`] or [`CheckpointError::SafeTensors`].
pub fn read_tensors(path: &Path, device: &Device) -> Result<BTreeMap<String, Tensor>, CheckpointError> {
    let bytes = fs::read(path).map_err(io("read", path))?;
    let tensors = candle_core::safetensors::load_buffer(&bytes, device)
        .map_err(|source| CheckpointError::SafeTensors { path: path.to_owned(), source })?;
    Ok(tensors.into_iter().collect())
}
