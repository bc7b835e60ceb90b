//! Where features go: a file that is complete or not there, or JSON lines.

use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use super::file::{FeatureFile, FileFormat};
use crate::cli::error::Error;
use crate::cli::output;

/// Exit code after Ctrl-C, by convention 128 + the number of the signal.
const INTERRUPTED: i32 = 130;

/// What `--out` asks for.
#[derive(Clone, Debug)]
pub(super) enum Destination {
    File { path: PathBuf, format: FileFormat },
    Lines,
}

impl Destination {
    /// By the name.
    pub(super) fn of(out: &Path) -> Result<Self, Error> {
        if out.as_os_str() == "-" {
            return Ok(Self::Lines);
        }
        match FileFormat::of(out) {
            Some(format) => Ok(Self::File { path: out.to_owned(), format }),
            None => Err(Error::usage(
                format!("`--out {}`: expected a name ending in .safetensors or .npy, or `-`", out.display()),
                "the ending chooses the format, for example `--out features.npy`",
            )),
        }
    }
}

/// Takes features one image at a time.
pub(super) enum Sink {
    /// Shared with whoever handles signals; empty once that has ended the file.
    File {
        path: PathBuf,
        open: Arc<Mutex<Option<FeatureFile>>>,
    },
    Lines {
        writer: BufWriter<io::Stdout>,
        shape: Vec<usize>,
        line: Vec<u8>,
    },
}

/// One image on standard output.
#[derive(Serialize)]
struct Line<'a> {
    index: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    shape: &'a [usize],
    features: &'a [f32],
}

impl Sink {
    /// Opens it for vectors with the axes `shape`. When the program is told to stop, a file of a stream is completed and
    /// one of images, whose number is known to be larger, is not written.
    pub(super) fn create(destination: Destination, shape: &[usize], stream: bool) -> Result<Self, Error> {
        let (path, format) = match destination {
            Destination::File { path, format } => (path, format),
            Destination::Lines => {
                let writer = BufWriter::with_capacity(1 << 16, io::stdout());
                return Ok(Self::Lines { writer, shape: shape.to_vec(), line: Vec::new() });
            }
        };
        let file = FeatureFile::create(&path, format, shape, !stream);
        let file = file.map_err(|source| Error::Write { path: path.clone(), source })?;
        let open = Arc::new(Mutex::new(Some(file)));
        let shared = Arc::clone(&open);
        let shared_path = path.clone();
        let handler = move || {
            let Some(file) = lock(&shared).take() else { return };
            if !stream {
                drop(file);
                process::exit(INTERRUPTED);
            }
            let code = match complete(file, &shared_path).and_then(|line| output::print(&line)) {
                Ok(()) => 0,
                Err(error) => {
                    output::print_error(&error);
                    1
                }
            };
            process::exit(code);
        };
        // without a handler a signal ends the program as ever and leaves the temporary file behind
        ctrlc::set_handler(handler).ok();
        Ok(Self::File { path, open })
    }

    /// The features of an image.
    pub(super) fn append(&mut self, index: u64, name: Option<&str>, features: &[f32]) -> Result<(), Error> {
        match self {
            Self::File { path, open } => {
                let mut open = lock(open);
                let Some(file) = open.as_mut() else { wait_for_the_end(open) };
                file.append(name, features).map_err(|source| Error::Write { path: path.clone(), source })
            }
            Self::Lines { writer, shape, line } => {
                line.clear();
                serde_json::to_writer(&mut *line, &Line { index, name, shape, features })
                    .map_err(|error| Error::Output(error.into()))?;
                line.push(b'\n');
                // flushed line by line: the reader of a stream wants each frame when it is there
                writer.write_all(line).and_then(|()| writer.flush()).map_err(|error| match error.kind() {
                    io::ErrorKind::BrokenPipe => Error::ReaderGone,
                    _ => Error::Output(error),
                })
            }
        }
    }

    /// Completes the file; gives a line about it.
    pub(super) fn finish(self) -> Result<Option<String>, Error> {
        let Self::File { path, open } = &self else { return Ok(None) };
        let mut open = lock(open);
        let Some(file) = open.take() else { wait_for_the_end(open) };
        drop(open);
        complete(file, path).map(Some)
    }
}

impl Drop for Sink {
    /// An unfinished file is removed, although the signal handler, which lives on, shares it.
    fn drop(&mut self) {
        if let Self::File { open, .. } = self {
            lock(open).take();
        }
    }
}

fn complete(file: FeatureFile, path: &Path) -> Result<String, Error> {
    let shape = file.finish().map_err(|source| Error::Write { path: path.to_owned(), source })?;
    let sides: Vec<_> = shape.iter().map(usize::to_string).collect();
    Ok(format!("{}: [{}]\n", path.display(), sides.join(", ")))
}

fn lock(open: &Mutex<Option<FeatureFile>>) -> MutexGuard<'_, Option<FeatureFile>> {
    open.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The signal handler has the file and is about to end the program.
fn wait_for_the_end(guard: MutexGuard<'_, Option<FeatureFile>>) -> ! {
    drop(guard);
    loop {
        std::thread::park();
    }
}
