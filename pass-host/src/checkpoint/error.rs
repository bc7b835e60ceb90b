//! What can go wrong with a checkpoint.

use std::io::ErrorKind;
use std::path::PathBuf;

use super::Rejected;

/// Why a checkpoint was not written, found, accepted or loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The file system refused.
    #[error("cannot {action} `{}`", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// A file that the manifest names has another length or checksum, or is no file at all.
    #[error("`{}` is damaged: {what}: expected {expected}, found {found}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Length, checksum, ….
        what: &'static str,
        /// What the manifest says.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A JSON file cannot be understood.
    #[error("`{}` cannot be understood", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// A safetensors file cannot be written or understood.
    #[error("`{}`: not usable as safetensors", path.display())]
    SafeTensors {
        /// The file.
        path: PathBuf,
        /// Why.
        source: candle_core::Error,
    },
    /// Two tensors of one part have the same name.
    #[error("two tensors of `{part}` are called `{name}`")]
    Duplicate {
        /// The part.
        part: String,
        /// The name.
        name: String,
    },
    /// There are checkpoints, but none is intact.
    #[error("no intact checkpoint in `{}`: {}", dir.display(),
        rejected.iter().map(|r| r.to_string()).collect::<Vec<_>>().join("; "))]
    NoneValid {
        /// The folder of checkpoints.
        dir: PathBuf,
        /// Every checkpoint that was tried.
        rejected: Vec<Rejected>,
    },
    /// A folder that is neither a checkpoint nor a run with one.
    #[error("`{}` holds no checkpoint", path.display())]
    NoWeights {
        /// The folder.
        path: PathBuf,
    },
    /// Another process is training in this folder.
    #[error("the run folder `{}` is in use by another process", run.display())]
    InUse {
        /// The run folder.
        run: PathBuf,
    },
}

impl CheckpointError {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Io { source, .. } => match source.kind() {
                ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Some(
                    "free some space, or keep fewer checkpoints with `--set checkpoint.keep=1`, then go on with `--resume auto`"
                        .into(),
                ),
                ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
                    Some("choose a folder you may write to with `--out`".into())
                }
                _ => None,
            },
            Self::Damaged { .. } | Self::Json { .. } | Self::SafeTensors { .. } => {
                Some("copy the file again, or continue from another checkpoint with `--resume DIR`".into())
            }
            Self::NoneValid { .. } => {
                Some("copy the run folder again, or start a new run with another `--out`".into())
            }
            Self::NoWeights { .. } => {
                Some("name a run folder, one of its checkpoint folders, or a safetensors file".into())
            }
            Self::InUse { .. } => Some("wait for it to end, or choose another `--out`".into()),
            Self::Duplicate { .. } => None,
        }
    }
}
