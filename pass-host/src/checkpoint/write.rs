//! Writing: everything or nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde::Serialize;

use super::manifest::{FORMAT, FileSum, Manifest};
use super::{CheckpointError, LATEST, MANIFEST, STATE, TEMPORARY, folder_name, step_of};

/// Creates the folder of checkpoints and removes what killed writes left in it; returns how many leftovers there were.
///
/// # Errors
/// [`CheckpointError::Io`] if the folder cannot be created, listed or cleaned.
pub fn prepare(dir: &Path) -> Result<usize, CheckpointError> {
    fs::create_dir_all(dir).map_err(io("create", dir))?;
    let mut removed = 0;
    for entry in fs::read_dir(dir).map_err(io("list", dir))? {
        let path = entry.map_err(io("list", dir))?.path();
        let unfinished = path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with(TEMPORARY));
        if unfinished {
            if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) }
                .map_err(io("remove", &path))?;
            removed += 1;
        }
    }
    Ok(removed)
}

/// Writes the checkpoint after `step` steps into `dir` and returns its folder.
///
/// - `parts`: `(file stem, named tensors)`; the bytes depend on names and values only, not on the order.
/// - `keep`: the newest this many checkpoints stay; `keep_every`: so does every step divisible by it (0 = none). The one
///   just written always stays.
///
/// # Errors
/// [`CheckpointError`]; the checkpoints that were there before stay valid.
pub fn save(
    dir: &Path,
    step: u64,
    parts: &[(&str, &[(String, Tensor)])],
    state: &impl Serialize,
    keep: usize,
    keep_every: usize,
) -> Result<PathBuf, CheckpointError> {
    fs::create_dir_all(dir).map_err(io("create", dir))?;
    let name = folder_name(step);
    let unfinished = dir.join(format!("{TEMPORARY}{name}"));
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished).map_err(io("remove", &unfinished))?;
    }
    fs::create_dir(&unfinished).map_err(io("create", &unfinished))?;
    let written = write_files(&unfinished, step, parts, state);
    if let Err(error) = written {
        // best effort: on a full disk these bytes are the ones most missed, and `prepare` removes what stays
        fs::remove_dir_all(&unfinished).ok();
        return Err(error);
    }
    let finished = dir.join(&name);
    discard(dir, &finished)?;
    fs::rename(&unfinished, &finished).map_err(io("rename", &unfinished))?;
    sync_dir(dir)?;
    write_atomically(&dir.join(LATEST), format!("{name}\n").as_bytes())?;
    prune(dir, step, keep, keep_every)?;
    Ok(finished)
}

/// Fills a fresh folder and syncs it.
pub(super) fn write_files(
    folder: &Path,
    step: u64,
    parts: &[(&str, &[(String, Tensor)])],
    state: &impl Serialize,
) -> Result<(), CheckpointError> {
    let mut files = BTreeMap::new();
    for (stem, tensors) in parts {
        let name = format!("{stem}.safetensors");
        let path = folder.join(&name);
        write_tensors(&path, tensors)?;
        files.insert(name, FileSum::of(&path)?);
    }
    let path = folder.join(STATE);
    write_json(&path, state)?;
    files.insert(STATE.to_owned(), FileSum::of(&path)?);
    write_json(&folder.join(MANIFEST), &Manifest { format: FORMAT, step, files })?;
    sync_dir(folder)
}

/// Writes named tensors as one synced safetensors file, sorted, so that equal tensors give equal bytes. An existing file
/// is replaced only once the new one is complete.
///
/// # Errors
/// [`CheckpointError`] on a name used twice and on what the file system refuses.
pub fn write_tensors(path: &Path, tensors: &[(String, Tensor)]) -> Result<(), CheckpointError> {
    let unusable = |source| CheckpointError::SafeTensors { path: path.to_owned(), source };
    let mut names = BTreeSet::new();
    let mut on_cpu = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        if !names.insert(name) {
            let part = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            return Err(CheckpointError::Duplicate { part, name: name.clone() });
        }
        on_cpu.push((name, tensor.to_device(&Device::Cpu).map_err(unusable)?));
    }
    safetensors::serialize_to_file(on_cpu, None, path).map_err(|error| match error {
        safetensors::SafeTensorError::IoError(source) => io("write", path)(source),
        other => unusable(other.into()),
    })?;
    File::open(path).and_then(|file| file.sync_all()).map_err(io("sync", path))
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<(), CheckpointError> {
    let mut text = serde_json::to_vec_pretty(value)
        .map_err(|source| CheckpointError::Json { path: path.to_owned(), source })?;
    text.push(b'\n');
    write_synced(path, &text)
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(io("write", path))
}

/// Replaces a file by `bytes` in one instant: readers and a crash see the old content or the new.
///
/// # Errors
/// [`CheckpointError::Io`].
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let unfinished = parent.join(format!("{TEMPORARY}{name}"));
    write_synced(&unfinished, bytes).inspect_err(|_| {
        fs::remove_file(&unfinished).ok();
    })?;
    fs::rename(&unfinished, path).map_err(io("replace", path))?;
    sync_dir(parent)
}

/// Removes old checkpoints: neither among the newest `keep`, nor a multiple of `keep_every`, nor `just_written`.
fn prune(dir: &Path, just_written: u64, keep: usize, keep_every: usize) -> Result<(), CheckpointError> {
    let mut steps = Vec::new();
    for entry in fs::read_dir(dir).map_err(io("list", dir))? {
        let name = entry.map_err(io("list", dir))?.file_name();
        steps.extend(name.to_str().and_then(step_of));
    }
    steps.sort_unstable_by(|a, b| b.cmp(a));
    for step in steps.into_iter().skip(keep.max(1)) {
        let for_good = keep_every > 0 && step.is_multiple_of(keep_every as u64);
        if step != just_written && !for_good {
            discard(dir, &dir.join(folder_name(step)))?;
        }
    }
    Ok(())
}

/// Removes a checkpoint if it is there. It loses its name first, so that a kill leaves no half checkpoint under it.
fn discard(dir: &Path, checkpoint: &Path) -> Result<(), CheckpointError> {
    if !checkpoint.exists() {
        return Ok(());
    }
    let name = checkpoint.file_name().unwrap_or_default().to_string_lossy();
    let doomed = dir.join(format!("{TEMPORARY}old-{name}"));
    if doomed.exists() {
        fs::remove_dir_all(&doomed).map_err(io("remove", &doomed))?;
    }
    fs::rename(checkpoint, &doomed).map_err(io("rename", checkpoint))?;
    fs::remove_dir_all(&doomed).map_err(io("remove", &doomed))
}

/// Makes the names in a folder durable. Only Unix can sync a folder; elsewhere the rename alone has to do.
fn sync_dir(dir: &Path) -> Result<(), CheckpointError> {
    if cfg!(unix) {
        File::open(dir).and_then(|folder| folder.sync_all()).map_err(io("sync", dir))?;
    }
    Ok(())
}

pub(super) fn io(action: &'static str, path: &Path) -> impl Fn(std::io::Error) -> CheckpointError {
    move |source| CheckpointError::Io { action, path: path.to_owned(), source }
}
