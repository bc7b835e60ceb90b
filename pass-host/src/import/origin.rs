//! Where each released file keeps its backbone: the dictionary, what stands before the names, what is left out.

use serde::Serialize;

use super::error::Problem;
use super::tensor_file::{Entries, TensorFile};
use crate::config::run::Network;

/// What the weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// A DINOv2 backbone of the Python package `transformers`, exported to ONNX, with or without a decoder behind it.
    Dinov2Onnx,
    /// SelfPatch: a checkpoint of its training, or the backbone alone.
    Selfpatch,
    /// DINO: a checkpoint of its training, or the backbone alone.
    Dino,
    /// timm and DeiT.
    Timm,
    /// MoCo v3.
    MocoV3,
    /// MoBY with DeiT.
    Moby,
    /// torchvision's ResNet-50, and DINO's.
    TorchvisionResnet50,
    /// MoCo v2.
    MocoV2,
    /// SwAV.
    Swav,
    /// DenseCL.
    Densecl,
    /// ReSim.
    Resim,
    /// DetCo.
    Detco,
}

/// What network an origin holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    /// A Vision Transformer with timm's names.
    Vit,
    /// SelfPatch's backbone and aggregation head.
    SelfPatch,
    ResNet,
}

/// How a file of an origin is laid out.
struct Layout {
    /// Keys of the dictionary with the tensors, the first that is there counts; "" is the top.
    parts: &'static [&'static str],
    /// What stands before the names of the wanted network; the first that is there counts.
    prefixes: &'static [&'static str],
    /// Starts of the names that are no part of it.
    left_out: &'static [&'static str],
}

impl Origin {
    /// As typed on the command line.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Dinov2Onnx => "dinov2-onnx",
            Self::Selfpatch => "selfpatch",
            Self::Dino => "dino",
            Self::Timm => "timm",
            Self::MocoV3 => "moco-v3",
            Self::Moby => "moby",
            Self::TorchvisionResnet50 => "torchvision-resnet50",
            Self::MocoV2 => "moco-v2",
            Self::Swav => "swav",
            Self::Densecl => "densecl",
            Self::Resim => "resim",
            Self::Detco => "detco",
        }
    }

    /// What it reads, as the end of "`--from X` reads …".
    pub(super) fn reads(self) -> &'static str {
        match self {
            Self::Dinov2Onnx => "ONNX files of DINOv2 backbones",
            Self::Selfpatch => {
                "`teacher` or `student` with `backbone.*` and `ca_head.*`, or a plain backbone without class token"
            }
            Self::Dino => {
                "`teacher` or `student` with `backbone.*`, or a plain Vision Transformer with class token"
            }
            Self::Timm => {
                "a plain Vision Transformer (`patch_embed.*`, `blocks.*`, `norm.*`), also below `model` or `state_dict`"
            }
            Self::MocoV3 => {
                "`state_dict` with `module.base_encoder.*` and `module.momentum_encoder.*`, Vision Transformers"
            }
            Self::Moby => "`model` with `encoder.*` and `encoder_k.*`, Vision Transformers of DeiT",
            Self::TorchvisionResnet50 => "a plain ResNet-50 (`conv1.*`, `layer1.*` to `layer4.*`)",
            Self::MocoV2 | Self::Resim => "`state_dict` with a ResNet-50 at `module.encoder_q.*`",
            Self::Swav => "a ResNet-50 with `projection_head.*` and `prototypes.*`, each behind `module.`",
            Self::Densecl | Self::Detco => "`state_dict` with a plain ResNet-50",
        }
    }

    pub(super) fn family(self) -> Family {
        match self {
            Self::Dinov2Onnx | Self::Dino | Self::Timm | Self::MocoV3 | Self::Moby => Family::Vit,
            Self::Selfpatch => Family::SelfPatch,
            Self::TorchvisionResnet50
            | Self::MocoV2
            | Self::Swav
            | Self::Densecl
            | Self::Resim
            | Self::Detco => Family::ResNet,
        }
    }

    /// Where a file keeps `network`; nothing for files that hold a single one.
    fn layout(self, network: Option<Network>) -> Option<Layout> {
        let layout = |parts, prefixes, left_out| Some(Layout { parts, prefixes, left_out });
        let teacher = network == Some(Network::Teacher);
        match (self, network) {
            (Self::Selfpatch, Some(Network::Student)) => layout(&["student"], &[""], &["c_head.", "p_head."]),
            (Self::Selfpatch, _) => layout(&["teacher", ""], &[""], &["c_head.", "p_head."]),
            (Self::Dino, Some(Network::Student)) => layout(&["student"], &["backbone.", ""], &["head."]),
            (Self::Dino, _) => layout(&["teacher", ""], &["backbone.", ""], &["head."]),
            (Self::MocoV3, _) if teacher => layout(
                &["state_dict", ""],
                &["momentum_encoder."],
                &["base_encoder.", "predictor.", "momentum_encoder.head."],
            ),
            (Self::MocoV3, _) => layout(
                &["state_dict", ""],
                &["base_encoder."],
                &["momentum_encoder.", "predictor.", "base_encoder.head."],
            ),
            (Self::Moby, _) if teacher => layout(
                &["model", ""],
                &["encoder_k."],
                &["encoder.", "encoder_k.head.", "projector.", "projector_k.", "predictor.", "queue"],
            ),
            (Self::Moby, _) => layout(
                &["model", ""],
                &["encoder."],
                &["encoder_k.", "encoder.head.", "projector.", "projector_k.", "predictor.", "queue"],
            ),
            (Self::MocoV2, _) if teacher => {
                layout(&["state_dict", ""], &["encoder_k."], &["encoder_q.", "encoder_k.fc.", "queue"])
            }
            (Self::MocoV2, _) => {
                layout(&["state_dict", ""], &["encoder_q."], &["encoder_k.", "encoder_q.fc.", "queue"])
            }
            (Self::Resim, _) if teacher => layout(
                &["state_dict", ""],
                &["encoder_k."],
                &["encoder_q.", "encoder_k.fc.", "encoder_k.fpn_", "fpn_", "queue"],
            ),
            (Self::Resim, _) => layout(
                &["state_dict", ""],
                &["encoder_q."],
                &["encoder_k.", "encoder_q.fc.", "encoder_q.fpn_", "fpn_", "queue"],
            ),
            (_, Some(_)) => None,
            (Self::Timm, None) => {
                layout(&["model", "state_dict", ""], &[""], &["head.", "head_dist.", "pre_logits."])
            }
            (Self::TorchvisionResnet50, None) => layout(&["state_dict", "model", ""], &[""], &["fc."]),
            (Self::Swav, None) => layout(&["state_dict", ""], &[""], &["projection_head.", "prototypes."]),
            (Self::Densecl, None) => layout(
                &["state_dict", ""],
                &["backbone.", ""],
                &["encoder_q.", "encoder_k.", "queue", "neck.", "head."],
            ),
            (Self::Detco, None) => layout(&["state_dict", ""], &[""], &["fc."]),
            (Self::Dinov2Onnx, None) => None,
        }
    }
}

/// The tensors of the wanted network.
#[derive(Debug)]
pub(super) struct Selected {
    /// By the names that remain when everything before them is taken off.
    pub(super) entries: Entries,
    /// What stood before them.
    pub(super) prefix: String,
    /// Names that belong to other parts.
    pub(super) left_out: Vec<String>,
}

/// Finds the tensors of `network` in a file of `origin`.
///
/// # Errors
/// [`Problem`] if the dictionary is not there, if the file holds no such network, and for a tensor of no known part.
pub(super) fn select(
    file: &TensorFile,
    origin: Origin,
    network: Option<Network>,
) -> Result<Selected, Problem> {
    let layout = origin
        .layout(network)
        .ok_or(Problem::Flag { flag: "--network", reason: "files of this origin hold one network" })?;
    let part = layout.parts.iter().find_map(|part| file.parts.get(*part));
    let entries = part.ok_or_else(|| Problem::Part {
        expected: describe(layout.parts.iter().copied(), " or "),
        found: describe(file.parts.keys().map(String::as_str), ", "),
    })?;
    // what `DataParallel` puts before every name
    let wrapper = match entries.keys().all(|name| name.starts_with("module.")) {
        true => "module.",
        false => "",
    };
    let names = || entries.keys().filter_map(|name| name.strip_prefix(wrapper));
    let prefix = (layout.prefixes.iter()).find(|prefix| names().any(|name| name.starts_with(**prefix)));
    let prefix = prefix.ok_or_else(|| Problem::Part {
        expected: format!("called `{}*`", layout.prefixes.join("*` or `")),
        found: names().next().map_or("nothing".into(), |name| format!("`{name}`")),
    })?;
    let mut selected =
        Selected { entries: Entries::new(), prefix: format!("{wrapper}{prefix}"), left_out: Vec::new() };
    for (whole, entry) in entries {
        let name = whole.strip_prefix(wrapper).unwrap_or(whole);
        // counters of batch normalization, which nothing reads after training
        let counter = origin.family() == Family::ResNet && name.ends_with(".num_batches_tracked");
        if counter || layout.left_out.iter().any(|start| name.starts_with(start)) {
            selected.left_out.push(whole.clone());
        } else if let Some(name) = name.strip_prefix(prefix) {
            selected.entries.insert(name.to_owned(), entry.clone());
        } else {
            return Err(Problem::NotUnderstood { name: whole.clone() });
        }
    }
    Ok(selected)
}

/// Places of tensors, for people.
fn describe<'a>(parts: impl Iterator<Item = &'a str>, between: &str) -> String {
    let parts: Vec<String> = parts
        .map(|part| match part {
            "" => "at the top".into(),
            part => format!("below `{part}`"),
        })
        .collect();
    match parts.is_empty() {
        true => "none at all".into(),
        false => parts.join(between),
    }
}
