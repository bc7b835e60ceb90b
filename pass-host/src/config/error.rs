//! What can be wrong with a configuration.

use std::fmt;
use std::path::PathBuf;

/// Where a value was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The preset of this name.
    Preset(String),
    /// A line (from 1) of a file.
    File(PathBuf, usize),
    /// `--set` with this text.
    Set(String),
    /// A dedicated flag, for example `--batch`.
    Flag(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Preset(name) => write!(f, "preset {name}"),
            Self::File(path, line) => write!(f, "{} line {line}", path.display()),
            Self::Set(text) => write!(f, "--set {text}"),
            Self::Flag(flag) => f.write_str(flag),
        }
    }
}

/// One thing wrong with one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where the value came from.
    pub origin: Origin,
    /// The dotted key.
    pub key: String,
    /// What is wrong with it.
    pub fault: Fault,
}

/// What is wrong with a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// No such key.
    UnknownKey {
        /// The nearest known key.
        suggestion: Option<String>,
        /// The section that was looked in; empty = top level.
        section: String,
        /// What that section holds.
        known: Vec<&'static str>,
    },
    /// A value of the wrong type or out of range.
    BadValue {
        /// What is allowed.
        expected: String,
        /// What is there.
        found: String,
    },
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { origin, key, fault } = self;
        match fault {
            Fault::UnknownKey { suggestion, section, known } => {
                write!(f, "{origin}: unknown key `{key}`")?;
                if let Some(suggestion) = suggestion {
                    write!(f, ", did you mean `{suggestion}`?")?;
                }
                let place = if section.is_empty() { "the top level".into() } else { format!("[{section}]") };
                write!(f, " ({place} holds: {})", known.join(", "))
            }
            Fault::BadValue { expected, found } => {
                write!(f, "{origin}: `{key}`: expected {expected}, found {found}")
            }
        }
    }
}

/// Why no configuration came about.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("{} line {line}, column {column}: not valid TOML: {message}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// From 1.
        column: usize,
        /// What the parser met.
        message: String,
    },
    /// `--set` without `=`.
    #[error("`--set {text}`: expected KEY=VALUE, for example `--set optim.batch=64`")]
    Assignment {
        /// The text given.
        text: String,
    },
    /// No such preset.
    #[error("unknown preset `{name}`{}", suggestion.as_ref().map(|s| format!(", did you mean `{s}`?")).unwrap_or_default())]
    UnknownPreset {
        /// The name given.
        name: String,
        /// The nearest preset.
        suggestion: Option<String>,
    },
    /// Unknown keys, wrong types or values out of range; all that were found.
    #[error("{}", list(problems))]
    Invalid {
        /// In the order of the configuration.
        problems: Vec<Problem>,
    },
    /// Fewer images than one batch.
    #[error("{images} images are fewer than one batch of {batch}{}", of_ranks(*batch, *ranks))]
    TooFewImages {
        /// Images found.
        images: usize,
        /// Images of a step, `optim.batch` of every rank.
        batch: usize,
        /// Ranks that share it.
        ranks: usize,
    },
    /// One image a step for a method that compares images.
    #[error("`image.method` `{method}` normalizes over the images of a step: expected 2 or more, found 1")]
    BatchOfOne {
        /// The method.
        method: &'static str,
    },
    /// Queues that do not hold whole batches.
    #[error("`image.queue`: expected a multiple of {batch}{}, found {queue}", of_ranks(*batch, *ranks))]
    Queue {
        /// Keys in a queue.
        queue: usize,
        /// Images of a step, `optim.batch` of every rank.
        batch: usize,
        /// Ranks that share it.
        ranks: usize,
    },
    /// The configuration is not the one the run was started with.
    #[error("the run cannot continue with another configuration: {}",
        differences.iter().map(|(key, then, now)| format!("`{key}` was {then}, is now {now}")).collect::<Vec<_>>().join("; "))]
    Changed {
        /// `(key, then, now)`.
        differences: Vec<(String, String, String)>,
    },
}

fn of_ranks(batch: usize, ranks: usize) -> String {
    if ranks > 1 { format!(" ({ranks} ranks of {})", batch / ranks) } else { String::new() }
}

/// One problem on one line; several as a list.
fn list(problems: &[Problem]) -> String {
    match problems {
        [one] => format!("invalid configuration: {one}"),
        many => {
            let lines: Vec<String> = many.iter().map(|p| format!("\n  - {p}")).collect();
            format!("invalid configuration, {} problems:{}", many.len(), lines.concat())
        }
    }
}

impl ConfigError {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Read { .. } => {
                "give an existing TOML file; `pass-host config show demo > my.toml` writes one".into()
            }
            Self::Syntax { .. } => "`pass-host config show demo` prints a valid file to compare with".into(),
            Self::Assignment { .. } | Self::Invalid { .. } => {
                "`pass-host config show demo` prints every key with its meaning".into()
            }
            Self::UnknownPreset { .. } => "`pass-host config list` names the presets".into(),
            Self::TooFewImages { images, ranks, .. } => {
                format!("add images, or use a smaller batch: `--batch {}`", (images / ranks).max(1))
            }
            Self::BatchOfOne { .. } => "use a larger batch, for example `--batch 8`".into(),
            Self::Queue { queue, batch, .. } => format!(
                "the keys of a step replace as many in the queue: `--set image.queue={}`, or another `--batch`",
                queue.div_ceil(*batch) * batch
            ),
            Self::Changed { .. } => {
                "give the same values, or start a new run from these weights: `--init RUN --out NEW`".into()
            }
        })
    }
}
