//! Where a run reads its default images and writes its results.

use std::path::{Path, PathBuf};

use crate::checkpoint::{CHECKPOINTS, LATEST};
use crate::error::Error;
use crate::metrics::METRICS;

/// The photos that come with the source, relative to the workspace.
const PHOTOS: &str = "fixtures/photos";

/// The bundled photos: in the current folder or one above it, else in the workspace this program was built in.
pub(super) fn bundled_photos() -> Result<PathBuf, Error> {
    let here = std::env::current_dir().unwrap_or_default();
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    here.ancestors().chain(workspace).map(|folder| folder.join(PHOTOS)).find(|p| p.is_dir()).ok_or_else(
        || {
            Error::usage(
                "no images given, and the bundled photos are not here",
                format!("name a folder of images, or run inside the source tree, which holds `{PHOTOS}`"),
            )
        },
    )
}

/// The resolved configuration of a run, in its folder.
pub(super) const CONFIG: &str = "config.toml";

/// The first `runs/<preset>-<n>` that does not exist.
pub(super) fn next_free(runs: &Path, preset: &str) -> PathBuf {
    (1..).map(|n| runs.join(format!("{preset}-{n}"))).find(|p| !p.exists()).expect("the numbers do not end")
}

/// The last of the `runs/<preset>-<n>` that exist without a gap.
pub(super) fn newest(runs: &Path, preset: &str) -> Option<PathBuf> {
    (1..).map(|n| runs.join(format!("{preset}-{n}"))).take_while(|p| p.exists()).last()
}

/// True if the folder holds (the beginning of) a run.
pub(super) fn holds_run(folder: &Path) -> bool {
    [CONFIG, METRICS, CHECKPOINTS].iter().any(|name| folder.join(name).exists())
}

/// The run folder that `path` means: itself, or two above if it is a checkpoint folder.
pub(super) fn run_of(path: &Path) -> Result<PathBuf, Error> {
    if path.join("manifest.json").is_file() {
        let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        if let Some(run) = absolute.parent().and_then(Path::parent) {
            return Ok(run.to_owned());
        }
    }
    if path.join(CHECKPOINTS).is_dir() {
        return Ok(path.to_owned());
    }
    Err(Error::usage(
        format!("`{}` holds nothing to resume", path.display()),
        format!("name a run folder (it holds `{CHECKPOINTS}/{LATEST}`) or one of its checkpoint folders"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_folders_are_numbered() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(newest(dir.path(), "demo"), None);
        for n in 1..=3 {
            let free = next_free(dir.path(), "demo");
            assert_eq!(free, dir.path().join(format!("demo-{n}")));
            std::fs::create_dir(&free).unwrap();
            assert!(!holds_run(&free));
            assert_eq!(newest(dir.path(), "demo"), Some(free));
        }
    }

    #[test]
    fn a_checkpoint_folder_belongs_to_its_run() {
        let dir = tempfile::tempdir().unwrap();
        assert!(run_of(dir.path()).is_err());
        let checkpoint = dir.path().join("checkpoints/step-00000001");
        std::fs::create_dir_all(&checkpoint).unwrap();
        assert!(holds_run(dir.path()));
        std::fs::write(checkpoint.join("manifest.json"), "{}").unwrap();
        assert_eq!(run_of(dir.path()).unwrap(), dir.path());
        assert_eq!(run_of(&checkpoint).unwrap(), dir.path());
    }
}
