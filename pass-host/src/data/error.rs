//! What can go wrong between a path on the command line and a batch of crops.

use std::io;
use std::path::PathBuf;

use super::shard::ShardError;

/// An error of the data pipeline.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// `data.images` is empty.
    #[error("no image source given")]
    NoSource,
    /// The sources hold no image.
    #[error("no image found in {sources}", sources = .sources.join(", "))]
    NothingFound {
        /// The sources as given.
        sources: Vec<String>,
    },
    /// A source does not exist.
    #[error("image source `{}` does not exist", .path.display())]
    SourceMissing {
        /// The path as given.
        path: PathBuf,
    },
    /// A file or folder could not be read.
    #[error("cannot read `{}`", .path.display())]
    Io {
        /// What was being read.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A list names a file that is not there.
    #[error("`{}` line {line}: `{}` does not exist", .list.display(), .path.display())]
    ListedMissing {
        /// The list.
        list: PathBuf,
        /// Line number, from 1.
        line: usize,
        /// The path as listed, joined with the folder of the list.
        path: PathBuf,
    },
    /// A file given as a tar is none.
    #[error("`{}` is not a readable tar archive", .path.display())]
    NotATar {
        /// The file.
        path: PathBuf,
        /// What the reader found.
        #[source]
        source: io::Error,
    },
    /// A file that begins like a shard cannot be used.
    #[error("`{}` is not a readable shard", .path.display())]
    Shard {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: ShardError,
    },
    /// The same image was given twice.
    #[error("image `{name}` is given twice")]
    Duplicate {
        /// Its full name.
        name: String,
    },
    /// Writing the index cache, an unpacked archive or the quarantine file failed.
    #[error("cannot write `{}`", .path.display())]
    Write {
        /// What was being written.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// There are fewer images than a batch holds.
    #[error("{images} images cannot fill a batch of {batch}")]
    TooFewImages {
        /// Images found.
        images: usize,
        /// Images a batch.
        batch: usize,
    },
    /// A setting of the loader makes no sense.
    #[error("`{field}`: expected {expected}, found {found}")]
    Setting {
        /// The setting.
        field: &'static str,
        /// What it may be.
        expected: &'static str,
        /// What it is.
        found: String,
    },
    /// More images are bad than the run accepts.
    #[error("{bad} of {seen} images are bad, more than `data.max_bad` = {max_bad} allows:{files}")]
    TooManyBad {
        /// Distinct bad images.
        bad: usize,
        /// Distinct images seen so far.
        seen: usize,
        /// The accepted share.
        max_bad: f64,
        /// Up to ten of them with their reasons, one a line.
        files: String,
    },
    /// A worker thread ended in a panic; this is a defect of the program.
    #[error("a loader thread failed on image `{name}`: {message}")]
    Worker {
        /// The image at hand.
        name: String,
        /// The panic message.
        message: String,
    },
    /// The device took no batch.
    #[error("a batch cannot be sent to the device")]
    Upload(#[source] candle_core::Error),
    /// The thread that sends batches ended in a panic; this is a defect of the program.
    #[error("the loader thread that sends batches has ended")]
    Ended,
}

impl DataError {
    /// What the reader can do about it.
    pub fn hint(&self) -> Option<String> {
        let extensions = super::sources::EXTENSIONS.join(", ");
        Some(match self {
            Self::NoSource => "name folders, image files, tars, shards or @list.txt".to_owned(),
            Self::NothingFound { .. } => format!(
                "folders and tars are searched for files named *.{{{extensions}}} (any case; names that begin with a dot are skipped)"
            ),
            Self::SourceMissing { path } if path.to_string_lossy().ends_with(".txt") => {
                "a list of images is given with a leading `@`: @list.txt".to_owned()
            }
            Self::SourceMissing { .. } => "check the spelling; relative paths start at the current folder".to_owned(),
            Self::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                "the current user may not read it; change its permissions or leave it out".to_owned()
            }
            Self::Io { .. } => "check that the disk is mounted and the path still exists".to_owned(),
            Self::ListedMissing { .. } => {
                "one path a line, relative to the folder of the list; empty lines and lines that begin with # are skipped"
                    .to_owned()
            }
            Self::NotATar { .. } => {
                "the file may be cut off or of another kind; `tar tf FILE` lists a sound archive".to_owned()
            }
            Self::Shard { source, .. } => source.hint(),
            Self::Duplicate { .. } => "the sources overlap; give each folder, file or list entry once".to_owned(),
            Self::Write { .. } => "check free space and permissions of that folder".to_owned(),
            Self::TooFewImages { images, .. } => {
                format!("lower the batch to at most {images} (`--batch`) or give more images")
            }
            Self::Setting { .. } | Self::Worker { .. } | Self::Ended => return None,
            Self::Upload(_) => "if memory ran out, a smaller `--batch`".to_owned(),
            Self::TooManyBad { .. } => {
                "repair or remove these files, or raise `data.max_bad`; all of them are in quarantine.tsv".to_owned()
            }
        })
    }
}
