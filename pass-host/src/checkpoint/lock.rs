//! One process per run folder.

use std::fs::{self, File, TryLockError};
use std::path::Path;

use super::CheckpointError;
use super::write::io;

/// The file that is locked.
const LOCK: &str = ".lock";

/// Holds a run folder until dropped. The system releases it when the process ends, however it ends.
#[derive(Debug)]
pub struct RunLock {
    _file: File,
}

/// Creates the run folder if needed and takes it for this process.
///
/// # Errors
/// [`CheckpointError::InUse`] if another process holds it, [`CheckpointError::Io`] if it cannot be created or written.
pub fn lock_run(run: &Path) -> Result<RunLock, CheckpointError> {
    fs::create_dir_all(run).map_err(io("create", run))?;
    let path = run.join(LOCK);
    let file = File::create(&path).map_err(io("write", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(RunLock { _file: file }),
        Err(TryLockError::WouldBlock) => Err(CheckpointError::InUse { run: run.to_owned() }),
        Err(TryLockError::Error(source)) => Err(io("lock", &path)(source)),
    }
}
