//! `pass-host import`

use std::collections::BTreeSet;
use std::path::PathBuf;

use clap::Args;

use super::output;
use crate::config::run::Network;
use crate::error::Error;
use crate::import::{ImportSettings, Imported, Origin, Sizes};

/// Turn weights of others into one safetensors file, checked to be whole.
///
/// Vision Transformers get timm's names, SelfPatch this project's own, ResNet-50 torchvision's. Files are only read:
/// nothing in a .pth file is ever run. Every tensor of the backbone must be there, and no other.
#[derive(Debug, Args)]
#[command(after_help = ORIGINS)]
pub(super) struct ImportArgs {
    /// The file with the weights: .pth, .pth.tar, .pkl (`torch.save`, zip or older), .safetensors, or .onnx.
    #[arg(value_name = "FILE")]
    source: PathBuf,
    /// Where they come from; see the list below.
    #[arg(long, value_enum, value_name = "ORIGIN", hide_possible_values = true)]
    from: Origin,
    /// The safetensors file to write.
    #[arg(long, value_name = "F")]
    out: PathBuf,
    /// Which of the two networks of a file: `teacher` (momentum, key encoder) or `student` (online, base, query encoder)
    /// [default: the one its method evaluates].
    #[arg(long, value_enum, value_name = "NETWORK", hide_possible_values = true)]
    network: Option<Network>,
    /// Attention heads [default: 12 for moco-v3 (16 from 1024 channels), else channels / 64]; no shape tells them.
    #[arg(long, value_name = "N", value_parser = side)]
    heads: Option<usize>,
    /// Resize the position embeddings to N x N patches [default: as trained].
    #[arg(long, value_name = "N", value_parser = side)]
    grid: Option<usize>,
    /// Write a summary as one JSON object to standard output.
    #[arg(long)]
    json: bool,
}

const ORIGINS: &str = "\
Origins:
  selfpatch             checkpoint: `teacher`, `student`; also a plain backbone without class token
  dino                  checkpoint: `teacher`, `student`; also the plain backbone
  timm                  Vision Transformers of timm and DeiT; also below `model`, `state_dict`
  moco-v3               `state_dict`: base_encoder (student, default), momentum_encoder (teacher)
  moby                  `model`: encoder (student, default), encoder_k (teacher), with DeiT
  dinov2-onnx           a DINOv2 backbone of `transformers`, exported to ONNX
  torchvision-resnet50  plain ResNet-50, also that of DINO
  moco-v2, resim        ResNet-50: encoder_q (student, default), encoder_k (teacher)
  swav, densecl, detco  ResNet-50

Left out, and counted: projection heads, predictors, classifiers, queues, the other network.

Examples:
  pass-host import dino_deitsmall16_pretrain.pth --from dino --out dino_s16.safetensors
  pass-host import checkpoint.pth --from selfpatch --network teacher --out selfpatch.safetensors
  pass-host import vit-s-300ep.pth.tar --from moco-v3 --grid 30 --out mocov3_s16.safetensors
  pass-host import dinov2_small.onnx --from dinov2-onnx --out vit_s14.safetensors";

fn side(text: &str) -> Result<usize, String> {
    text.parse()
        .ok()
        .filter(|n| (1..=1024).contains(n))
        .ok_or_else(|| "expected a number from 1 to 1024".to_owned())
}

pub(super) fn run(args: ImportArgs) -> Result<u8, Error> {
    let ImportArgs { source, from, out, network, heads, grid, json } = args;
    let imported = crate::import::run(&ImportSettings { source, from, out, network, heads, grid })?;
    if json {
        output::print_json(&imported)?;
    } else {
        output::print(&summary(&imported))?;
    }
    Ok(0)
}

fn summary(imported: &Imported) -> String {
    let left_out = match imported.left_out.len() {
        0 => String::new(),
        count => {
            let parts: BTreeSet<&str> = imported.left_out.iter().map(|name| part(name)).collect();
            let parts: Vec<&str> = parts.into_iter().collect();
            format!("; {count} tensors of other parts left out ({})", parts.join(", "))
        }
    };
    let sizes = match &imported.backbone {
        Sizes::Vit(sizes) => format!(
            "ViT: {} wide, {} blocks, {} heads, MLP {} wide, {}x{} pixels a patch, {}x{} positions, {} registers",
            sizes.dim,
            sizes.depth,
            sizes.heads,
            sizes.hidden,
            sizes.patch_size,
            sizes.patch_size,
            sizes.grid,
            sizes.grid,
            sizes.registers,
        ),
        Sizes::ResNet(sizes) => {
            let [_, _, third, fourth] = sizes.outer;
            format!("ResNet-50: layer 3 {third} wide, layer 4 {fourth} wide")
        }
    };
    let notes: String = imported.notes.iter().map(|note| format!("{note}\n")).collect();
    format!(
        "{} of {} backbone tensors{left_out}\n{sizes}\n{notes}{}: {} tensors, {:.1} million values\n{}\n",
        imported.used,
        imported.found,
        imported.file.display(),
        imported.tensors,
        imported.values as f64 / 1e6,
        imported.usage,
    )
}

/// What a tensor belongs to: the last name before those of layers and their parts.
fn part(name: &str) -> &str {
    if name.ends_with("num_batches_tracked") {
        return "batch counters";
    }
    let name = name.strip_prefix("module.").unwrap_or(name);
    let inner = ["head", "fc"].into_iter().find_map(|head| {
        let at = name.find(&format!(".{head}."))?;
        Some(&name[..at + 1 + head.len()])
    });
    inner.or_else(|| name.split('.').next()).unwrap_or(name)
}
