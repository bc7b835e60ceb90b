//! What can go wrong with foreign weights.

use std::io;
use std::path::PathBuf;

use super::Origin;
use super::pickle::PickleError;
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
        /// What it was said to be.
        from: Origin,
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
    /// The file system refused.
    #[error("it cannot be read")]
    Read(#[source] io::Error),
    /// The file ends before its content does.
    #[error("the file ends early, after {found} bytes{}", expected.map_or(String::new(), |bytes| format!(" of {bytes}")))]
    Cut {
        /// Bytes that are there.
        found: u64,
        /// Bytes that should be there, where the file tells.
        expected: Option<u64>,
    },
    /// The file is of another kind.
    #[error("it is neither a file of `torch.save` nor safetensors: it starts with {start}")]
    NoTensors {
        /// Its first bytes.
        start: String,
    },
    /// A file of a PyTorch before 0.2.
    #[error("it is a tar archive, which PyTorch stopped writing with version 0.2")]
    Tar,
    /// The zip archive of a PyTorch file is broken.
    #[error("its zip archive is damaged: {what}")]
    Archive {
        /// What is wrong.
        what: &'static str,
    },
    /// A compressed archive.
    #[error("member `{name}` of its zip archive is compressed, which `torch.save` never does")]
    Packed {
        /// The member.
        name: String,
    },
    /// The archive lacks something.
    #[error("its zip archive has no member `{name}`")]
    Member {
        /// The member.
        name: String,
    },
    /// Bytes changed after they were written.
    #[error("`{name}`: its bytes do not match their checksum")]
    Checksum {
        /// The tensor or the member.
        name: String,
    },
    /// The description of the tensors is broken.
    #[error("the pickle that describes its tensors is damaged")]
    Pickle {
        /// How.
        source: PickleError,
    },
    /// The header of a safetensors file is broken.
    #[error("its safetensors header is damaged")]
    Header(#[source] serde_json::Error),
    /// Something else than tensors by name.
    #[error("it holds {found}, not a dictionary of tensors")]
    NoStateDict {
        /// What it is.
        found: String,
    },
    /// The tensors are not where the origin has them.
    #[error("no tensors {expected}; found {found}")]
    Part {
        /// Where they were looked for.
        expected: String,
        /// Where there are some.
        found: String,
    },
    /// The width does not tell the number of heads.
    #[error("the network is {dim} wide, which {heads} heads do not divide")]
    Heads {
        /// Width.
        dim: usize,
        /// Heads asked for, or of the origin.
        heads: usize,
    },
    /// A flag that means nothing here.
    #[error("`{flag}` has no meaning for this file: {reason}")]
    Flag {
        /// The flag.
        flag: &'static str,
        /// Why.
        reason: &'static str,
    },
    /// The tensor library refused.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
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
            Self::Content { source, from, .. } => return Some(source.hint(*from)),
        };
        Some(hint.into())
    }
}

impl Problem {
    fn hint(&self, from: Origin) -> String {
        let onnx = from == Origin::Dinov2Onnx;
        let hint = match self {
            Self::Damaged { .. } | Self::NoGraph | Self::TooMany { .. } => {
                "this is no intact ONNX file; copy or download it again"
            }
            Self::External { .. } => {
                "save the model as one file: `onnx.save(onnx.load(F), G, save_as_external_data=False)`"
            }
            Self::Unexpected { field: "data_type", .. } => {
                "export the model in float32, not quantized or halved"
            }
            Self::Unexpected { field: "raw_data" | "float_data" | "dims" | "values" | "place", .. }
            | Self::Cut { .. }
            | Self::Archive { .. }
            | Self::Member { .. }
            | Self::Checksum { .. }
            | Self::Header(_)
            | Self::Pickle { source: PickleError::Ends } => {
                "the download or copy was cut off or damaged; fetch the file again"
            }
            Self::Read(_) => "give a file that can be read, not a folder or a pipe",
            Self::Pickle { .. } => {
                "nothing in it was run; if PyTorch loads it, save the tensors alone: `torch.save(model.state_dict(), F)`"
            }
            Self::NoTensors { .. } => {
                "give the .pth, .pth.tar, .pkl or .safetensors file itself; a page of a website saved in its place starts with `<`"
            }
            Self::Tar | Self::Packed { .. } => {
                "load it with PyTorch and save it again: `torch.save(torch.load(F), G)`"
            }
            Self::NoStateDict { .. } => {
                "save the tensors alone, in Python: `torch.save(model.state_dict(), F)`"
            }
            Self::Heads { .. } => "give the number of attention heads with `--heads N`",
            Self::Flag { .. } => "leave it out",
            _ if onnx => {
                "`dinov2-onnx` reads DINOv2 backbones of `transformers` (Dinov2Model, GELU MLP) as `torch.onnx.export` writes them"
            }
            _ => {
                return format!(
                    "`--from {}` reads {}; `pass-host help import` lists the others",
                    from.name(),
                    from.reads()
                );
            }
        };
        hint.into()
    }
}
