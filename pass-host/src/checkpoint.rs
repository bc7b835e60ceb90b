//! What survives a kill: checkpoints that are complete or not there at all.
//!
//! A checkpoint is the folder `checkpoints/step-XXXXXXXX/` with one safetensors file per part (`student`, `teacher`,
//! `optimizer`), `state.json`, and `manifest.json` with the length and the xxh3-128 checksum of every other file. It is
//! written to a `.tmp-` folder beside it, every file and the folder are synced, then the folder is renamed; the text file
//! `checkpoints/latest`, which names the checkpoint to continue from, is replaced last. A kill at any instant leaves the
//! previous checkpoint in force and at most a `.tmp-` folder, removed by the next [`prepare`].

mod error;
mod lock;
mod manifest;
mod read;
mod write;

pub use error::CheckpointError;
pub use lock::{RunLock, lock_run};
pub use read::{Checkpoint, Rejected, open_at, open_latest, read_tensors, weights_at};
pub use write::{prepare, save, write_atomically, write_tensors};

/// The folder of checkpoints in a run folder.
pub const CHECKPOINTS: &str = "checkpoints";
/// The text file naming the checkpoint to continue from.
pub const LATEST: &str = "latest";
const MANIFEST: &str = "manifest.json";
const STATE: &str = "state.json";
/// Beginning of the names of everything unfinished.
const TEMPORARY: &str = ".tmp-";

/// The folder name of the checkpoint after `step` steps.
pub fn folder_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// The step in a folder name made by [`folder_name`].
fn step_of(name: &str) -> Option<u64> {
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (folder_name(step) == name).then_some(step)
}

#[cfg(test)]
mod tests;
