//! What can go wrong with foreign weights.

use std::path::PathBuf;

use crate::checkpoint::CheckpointError;

/// Why weights were not imported. Nothing is written then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// The file cannot be read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is longer than its format allows.
    #[error("`{}` has {bytes} bytes, more than the {limit} an ONNX file can have", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
        /// The limit of the format.
        limit: u64,
    },
    /// The content is not what `--from` promises.
    #[error("`{}` cannot be imported", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Problem,
    },
    /// The tensors cannot be laid out as safetensors.
    #[error("cannot write `{}`", path.display())]
    SafeTensors {
        /// The file.
        path: PathBuf,
        /// Why.
        source: safetensors::SafeTensorError,
    },
    /// The file cannot be written.
    #[error("cannot write `{}`", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: CheckpointError,
    },
}

/// What is wrong inside a file of foreign weights.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// A message of the file is broken.
    #[error("the {what} cannot be decoded")]
    Damaged {
        /// Which message.
        what: String,
        /// Where inside it.
        source: prost::DecodeError,
    },
    /// A file without a computation.
    #[error("the model has no field `graph`")]
    NoGraph,
    /// Counts no real model has.
    #[error("the graph has {found} {what}, more than {limit}")]
    TooMany {
        /// Nodes or initializers.
        what: &'static str,
        /// How many there are.
        found: usize,
        /// How many are accepted.
        limit: usize,
    },
    /// A name that should be unique.
    #[error("two {what} are called `{name}`")]
    Duplicate {
        /// Initializers or values.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// A tensor is not there.
    #[error("tensor `{name}` is missing")]
    Missing {
        /// Its name.
        name: String,
    },
    /// The values are in another file.
    #[error("tensor `{name}`: its values are not in this file but beside it (external data)")]
    External {
        /// Its name.
        name: String,
    },
    /// A tensor, a node or a value of the graph is not as it has to be.
    #[error("`{name}`: {field}: expected {expected}, found {found}")]
    Unexpected {
        /// The name in the file.
        name: String,
        /// Which property of it.
        field: &'static str,
        /// What has to be there.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A tensor that no known layer accounts for.
    #[error("tensor `{name}` belongs to the backbone, but to no layer known here")]
    NotUnderstood {
        /// Its name.
        name: String,
    },
    /// A tensor whose values never reach the features.
    #[error("tensor `{name}` does not lead to the final norm")]
    Disconnected {
        /// Its name.
        name: String,
    },
}

impl Problem {
    pub(super) fn unexpected(
        name: &str,
        field: &'static str,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Self {
        Self::Unexpected { name: name.into(), field, expected: expected.into(), found: found.into() }
    }
}

impl ImportError {
    /// What to try.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Read { .. } | Self::SafeTensors { .. } => return None,
            Self::Write { source, .. } => return source.hint(),
            Self::TooLarge { .. } => "name the .onnx file itself, not an archive of it",
            Self::Content { source, .. } => match source {
                Problem::Damaged { .. } | Problem::NoGraph | Problem::TooMany { .. } => {
                    "this is no intact ONNX file; copy or download it again"
                }
                Problem::External { .. } => {
                    "save the model as one file: `onnx.save(onnx.load(F), G, save_as_external_data=False)`"
                }
                Problem::Unexpected { field: "data_type", .. } => {
                    "export the model in float32, not quantized or halved"
                }
                Problem::Unexpected { field: "raw_data" | "float_data" | "dims" | "values", .. } => {
                    "the file is damaged; copy or download it again"
                }
                _ => {
                    "`dinov2-onnx` reads DINOv2 backbones of `transformers` (Dinov2Model, GELU MLP) as `torch.onnx.export` writes them"
                }
            },
        };
        Some(hint.into())
    }
}
