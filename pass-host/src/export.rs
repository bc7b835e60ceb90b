//! Trained weights as files for others to load, each with a model card beside it.
//!
//! | format | what | class token of own weights |
//! |---|---|---|
//! | `safetensors` | backbone and aggregation head by the names of the released checkpoints | in the aggregation head |
//! | `timm`, `mmsegmentation`, `mmdetection` | the backbone by others' names | none: the aggregation head stays out |
//! | `huggingface`, `huggingface-ijepa` | a folder for `ViTModel`, one for `IJepaModel` | `ViTModel`: one that no patch sees and that means nothing |
//! | `onnx` | a graph, float or with the int8 weights of a `.pass` file | an output, through the aggregation head |

mod card;
mod huggingface;
mod onnx;
mod openmmlab;
mod source;
mod timm;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::Tensor;

use crate::checkpoint::{CheckpointError, write_atomically};
use crate::config::run::{ExportFormat, ExportSettings, Grid};
use crate::model::weights::{WeightsError, metadata};
use crate::quantize::pass_file::PassFile;
use crate::quantize::{QuantizeError, input_scales};
use source::Source;

/// Photos that the scales of activations are measured on.
const CALIBRATION_IMAGES: usize = 32;

/// What was written.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Exported {
    /// The file or folder.
    pub file: PathBuf,
    /// The model card.
    pub card: PathBuf,
    /// Tensors in it.
    pub tensors: usize,
    /// Values in it.
    pub values: usize,
    /// How to load it.
    pub usage: String,
}

/// Why an export failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// The weights cannot be used.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// A network of convolutions.
    #[error("`{}` is a ResNet: expected a Vision Transformer", path.display())]
    ResNet {
        /// The file.
        path: PathBuf,
    },
    /// A part that the format has no place for.
    #[error("`--to {format}`: no place for {what}, which these weights have")]
    Unsupported {
        /// The format, as on the command line.
        format: &'static str,
        /// The part.
        what: &'static str,
    },
    /// Weights without aggregation head by the names of those that have one.
    #[error(
        "`--to safetensors`: expected own weights with an aggregation head, found a backbone with timm's names"
    )]
    NoAggregation,
    /// A size without a patch.
    #[error("size: expected at least one patch of {patch_size} pixels, found {height}x{width}")]
    Size {
        /// The height asked for.
        height: usize,
        /// The width asked for.
        width: usize,
        /// Side of a patch.
        patch_size: usize,
    },
    /// The `.pass` file cannot be used.
    #[error(transparent)]
    Quantized(#[from] QuantizeError),
    /// Positions of a `.pass` file are of one grid.
    #[error("`--quantized`: a .pass file has positions for {}x{} pixels, found {found}", own.0, own.1)]
    FixedGrid {
        /// The size of the file.
        own: (usize, usize),
        /// The size asked for.
        found: String,
    },
    /// More than one file of the format holds.
    #[error("the graph has {bytes} bytes: expected at most {limit}")]
    TooLarge {
        /// Its bytes.
        bytes: usize,
        /// What a protobuf message holds.
        limit: usize,
    },
    /// The file cannot be written.
    #[error("cannot write `{}`", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: CheckpointError,
    },
    /// A folder cannot be made.
    #[error("cannot make the folder `{}`", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The tensor library refused.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl ExportError {
    /// What to try.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Weights(error) => error.hint(),
            Self::Quantized(error) => error.hint(),
            Self::Write { source, .. } => source.hint(),
            Self::ResNet { .. } => Some("its file has torchvision's names already: load it with `torchvision.models.resnet50`".into()),
            Self::Unsupported { .. } => Some("`--to timm` and `--to onnx` take every Vision Transformer".into()),
            Self::NoAggregation => Some("`--to timm` writes it, every command here reads that".into()),
            Self::FixedGrid { .. } => Some("leave `--size` and `--dynamic-grid` out, or quantize for another size: `pass-host quantize --size`".into()),
            Self::Folder { .. } => Some("`--out` is a folder for this format".into()),
            Self::Size { .. } | Self::TooLarge { .. } | Self::Tensor(_) => None,
        }
    }
}

/// Files in the making.
struct Export {
    /// Name and content; the first is the weights.
    files: Vec<(String, Vec<u8>)>,
    /// Names in the folder `--out`, not `--out` itself.
    folder: bool,
    usage: Vec<String>,
    interface: Vec<String>,
}

/// Writes the weights of a run, a checkpoint, or a file of `export` or `import`, and the card.
///
/// # Errors
/// [`ExportError`]; files are replaced whole or not at all.
pub fn run(settings: &ExportSettings) -> Result<Exported, ExportError> {
    let source = Source::open(&settings.source, settings.network, settings.heads)?;
    let quantized = match &settings.quantized {
        Some(path) => Some(pass_file(path, &source)?),
        None => None,
    };
    let name = settings.out.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let export = match settings.to {
        ExportFormat::Onnx => graph(settings, &source, quantized.as_ref(), &name)?,
        ExportFormat::Huggingface | ExportFormat::HuggingfaceIjepa => {
            transformers(settings.to, &source, &name)?
        }
        _ => state(settings.to, &source, &name)?,
    };
    let text = card::text(
        &source,
        &card::Card {
            name: &name,
            format: format_name(settings.to),
            usage: &export.usage,
            interface: &export.interface,
            quantized: quantized.as_ref(),
            files: &export.files,
        },
    );
    let out = &settings.out;
    let path_of = |name: &str| if export.folder { out.join(name) } else { out.clone() };
    if export.folder {
        std::fs::create_dir_all(out).map_err(|source| ExportError::Folder { path: out.clone(), source })?;
    }
    for (name, bytes) in &export.files {
        write(&path_of(name), bytes)?;
    }
    let card = match export.folder {
        true => out.join("README.md"),
        false => out.with_file_name(format!("{name}.md")),
    };
    write(&card, text.as_bytes())?;
    let (tensors, values) = (source.tensors.len(), source.tensors.values().map(Tensor::elem_count).sum());
    Ok(Exported { file: out.clone(), card, tensors, values, usage: export.usage.join("\n") })
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), ExportError> {
    write_atomically(path, bytes).map_err(|source| ExportError::Write { path: path.into(), source })
}

fn format_name(format: ExportFormat) -> &'static str {
    match format {
        ExportFormat::Safetensors => "pass-host",
        ExportFormat::Timm => "timm",
        ExportFormat::Huggingface | ExportFormat::HuggingfaceIjepa => "transformers",
        ExportFormat::Mmsegmentation => "mmsegmentation",
        ExportFormat::Mmdetection => "mmdetection (ViTDet)",
        ExportFormat::Onnx => "ONNX runtimes",
    }
}

/// A `.pass` file of the network of `source`.
fn pass_file(path: &Path, source: &Source) -> Result<PassFile, ExportError> {
    let file = PassFile::open(path)?;
    let (ours, theirs) = (&source.architecture, &file.architecture);
    let fields = [
        ("width", ours.dim, theirs.dim()),
        ("depth", ours.depth, theirs.depth as usize),
        ("heads", ours.heads, theirs.heads as usize),
        ("hidden width", source.hidden, theirs.hidden as usize),
        ("patch size", ours.patch_size, theirs.patch_size as usize),
        ("class token", source.parts.class_token.into(), theirs.class_token.into()),
        ("registers", source.parts.registers, theirs.register_tokens as usize),
        ("final norm", source.has_final_norm().into(), theirs.final_norm.into()),
    ];
    match fields.into_iter().find(|(_, ours, theirs)| ours != theirs) {
        None => Ok(file),
        Some((field, expected, found)) => Err(ExportError::Quantized(QuantizeError::OtherNetwork {
            path: path.into(),
            field,
            expected: expected.to_string(),
            found: found.to_string(),
        })),
    }
}

/// `--to onnx`
fn graph(
    settings: &ExportSettings,
    source: &Source,
    quantized: Option<&PassFile>,
    name: &str,
) -> Result<Export, ExportError> {
    let trained = source.architecture.grid * source.architecture.patch_size;
    let mut activations = None;
    let (bytes, size) = match quantized {
        None => {
            let grid = settings.grid.unwrap_or(Grid::Fixed((trained, trained)));
            (onnx::float(source, grid, settings.input)?, grid)
        }
        Some(file) => {
            let own = file.architecture.image_size();
            match settings.grid {
                None => {}
                Some(Grid::Fixed(size)) if size == own => {}
                Some(Grid::Fixed((height, width))) => {
                    return Err(ExportError::FixedGrid { own, found: format!("{height}x{width}") });
                }
                Some(Grid::Dynamic) => return Err(ExportError::FixedGrid { own, found: "any".into() }),
            }
            let scales = match settings.calibrate.as_slice() {
                [] => None,
                photos => Some(input_scales::measure(file, photos, CALIBRATION_IMAGES)?),
            };
            activations = Some(match &scales {
                None => {
                    "Activations are int8 with a scale per token that the graph computes, as on the device."
                        .to_owned()
                }
                Some(scales) => format!(
                    "{} of the {} activations that meet int8 weights are int8 with one constant scale, measured on photos; the others \
                     would lose too much by it and stay float. The accuracy below is that of a scale per token.",
                    scales.count(),
                    4 * source.architecture.depth
                ),
            });
            (onnx::quantized(source, file, scales.as_ref(), settings.input)?, Grid::Fixed(own))
        }
    };
    let sides = match size {
        Grid::Fixed((height, width)) => format!("{height}, {width}"),
        Grid::Dynamic => "H, W".into(),
    };
    let class = match (source.has_aggregation(), source.prefix_tokens()) {
        (true, _) => "the class token of the aggregation head, behind its norm",
        (false, 0) => "the mean of the patch tokens: this backbone has no class token",
        (false, _) => "the class token of the backbone",
    };
    let mut interface = vec![
        format!(
            "Input `images` [batch, 3, {sides}]: RGB, {}. Pixels beyond the last whole patch are not read.",
            match settings.input {
                crate::config::run::PixelInput::Normalized => "normalized as above",
                crate::config::run::PixelInput::Bytes => "values from 0 to 255; the graph normalizes",
            }
        ),
        format!("Output `patch_tokens` [batch, N, {}], patches row by row.", source.architecture.dim),
        format!("Output `class_token` [batch, {}]: {class}.", source.architecture.dim),
    ];
    interface.extend(activations);
    let usage = vec![
        "import onnxruntime".into(),
        format!("session = onnxruntime.InferenceSession('{name}')"),
        "patch_tokens, class_token = session.run(None, {'images': images})".into(),
    ];
    Ok(Export { files: vec![(name.to_owned(), bytes)], folder: false, usage, interface })
}

/// `--to huggingface`, `--to huggingface-ijepa`
fn transformers(format: ExportFormat, source: &Source, name: &str) -> Result<Export, ExportError> {
    let dim = source.architecture.dim;
    let (folder, class, interface) = match format {
        ExportFormat::HuggingfaceIjepa => (
            huggingface::ijepa(source)?,
            "IJepaModel",
            vec![format!("`last_hidden_state` [batch, N, {dim}]: patch tokens behind the final norm.")],
        ),
        _ if source.parts.class_token => (
            huggingface::vit(source)?,
            "ViTModel",
            vec![format!(
                "`last_hidden_state` [batch, 1 + N, {dim}]: class token, then patch tokens, behind the final norm."
            )],
        ),
        _ => (
            huggingface::vit(source)?,
            "ViTModel",
            vec![
                format!(
                    "`last_hidden_state[:, 1:, :{dim}]`: patch tokens behind the norm of the aggregation head."
                ),
                format!(
                    "These weights were trained without a class token, which ViTModel always has: token 0 is one that no patch \
                     attends to, by {} channels more that are zero for patches. It means nothing. `--to huggingface-ijepa` \
                     needs none of this; `--to onnx` has the class token of the aggregation head.",
                    source.architecture.heads
                ),
            ],
        ),
    };
    let pretty = |value: &serde_json::Value| format!("{value:#}\n").into_bytes();
    let weights = serialized(folder.tensors, HashMap::from([("format".into(), "pt".into())]))?;
    let files = vec![
        ("model.safetensors".into(), weights),
        ("preprocessor_config.json".into(), pretty(&folder.preprocessor)),
        ("config.json".into(), pretty(&folder.config)),
    ];
    let usage = vec![
        format!("from transformers import {class}"),
        format!("model = {class}.from_pretrained('{name}', add_pooling_layer=False)"),
        "tokens = model(images).last_hidden_state".into(),
    ];
    Ok(Export { files, folder: true, usage, interface })
}

/// One safetensors file.
fn state(format: ExportFormat, source: &Source, name: &str) -> Result<Export, ExportError> {
    let normed = match (source.has_final_norm(), source.has_aggregation()) {
        (false, true) => {
            "Patch tokens before the final norm (timm: `get_intermediate_layers(x, norm=False)`) are those of `pass-host features`; \
             the norm is that of the aggregation head, which holds the class token and is not part of this file."
        }
        (true, _) => "Patch tokens behind the final norm are those of `pass-host features`.",
        (false, false) => "Patch tokens are those of `pass-host features`.",
    };
    let mut interface = vec![normed.to_owned()];
    let (tensors, mut told, usage) = match format {
        ExportFormat::Safetensors => {
            if !source.has_aggregation() {
                return Err(ExportError::NoAggregation);
            }
            interface = vec![
                "`backbone.…` is the network, `ca_head.…` the aggregation head, which holds the class token."
                    .into(),
            ];
            let tensors = source.tensors.clone().into_iter().collect();
            let usage = vec![format!("pass-host features IMAGES --weights {name}")];
            (tensors, metadata(&source.architecture, &source.normalization), usage)
        }
        ExportFormat::Mmsegmentation => {
            let usage = openmmlab_usage(&openmmlab::mmsegmentation_config(source), name);
            (openmmlab::mmsegmentation(source)?, HashMap::new(), usage)
        }
        ExportFormat::Mmdetection => {
            interface = vec![
                "Patch tokens as a map, before any norm; fine-tuning learns the norm that follows.".into(),
            ];
            let usage = openmmlab_usage(&openmmlab::mmdetection_config(source), name);
            (openmmlab::mmdetection(source)?, HashMap::new(), usage)
        }
        _ => {
            let call = timm::constructor(source);
            let told = HashMap::from([
                ("timm".into(), call.clone()),
                ("heads".into(), source.architecture.heads.to_string()),
                ("positions".into(), source.positions.name().into()),
            ]);
            let usage = vec![
                "from safetensors.torch import load_file; from timm.models import VisionTransformer"
                    .to_owned(),
                format!("model = {call}"),
                format!("model.load_state_dict(load_file('{name}'), strict=True)"),
            ];
            (timm::tensors(source)?, told, usage)
        }
    };
    told.insert("format".into(), "pt".into());
    let files = vec![(name.to_owned(), serialized(tensors, told)?)];
    Ok(Export { files, folder: false, usage, interface })
}

/// OpenMMLab's loader reads what `torch.save` writes.
fn openmmlab_usage(config: &str, name: &str) -> Vec<String> {
    let checkpoint = Path::new(name).with_extension("pth");
    let checkpoint = checkpoint.display();
    vec![
        format!(
            "python -c \"import torch, safetensors.torch as s; torch.save(s.load_file('{name}'), '{checkpoint}')\""
        ),
        format!(
            "backbone={}, init_cfg=dict(type='Pretrained', checkpoint='{checkpoint}'))",
            config.strip_suffix(')').unwrap_or(config)
        ),
    ]
}

fn serialized(
    mut tensors: Vec<(String, Tensor)>,
    metadata: HashMap<String, String>,
) -> Result<Vec<u8>, ExportError> {
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    let tensors = tensors
        .into_iter()
        .map(|(name, tensor)| Ok((name, tensor.contiguous()?)))
        .collect::<candle_core::Result<Vec<_>>>()?;
    safetensors::serialize(tensors, Some(metadata))
        .map_err(|error| candle_core::Error::Msg(format!("safetensors: {error}")).into())
}
