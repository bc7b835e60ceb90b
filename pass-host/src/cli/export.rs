//! `pass-host export`

use std::path::PathBuf;

use clap::Args;

use super::output;
use crate::config::run::{ExportFormat, ExportSettings, Grid, Network, PixelInput};
use crate::error::Error;

/// Write trained weights for other programs, with a model card beside them.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  pass-host export runs/demo-1 --to safetensors --out teacher.safetensors
  pass-host export runs/demo-1 --to timm --out backbone.safetensors
  pass-host export runs/demo-1 --to huggingface --out FOLDER
  pass-host export runs/demo-1 --to onnx --size 480x854 --out vit.onnx
  pass-host export runs/demo-1 --to onnx --dynamic-grid --input bytes --out vit.onnx
  pass-host export runs/demo-1 --to onnx --quantized model.pass --out vit-int8.onnx
  pass-host export runs/demo-1 --to onnx --quantized m.pass --calibrate PHOTOS --out vit.onnx")]
pub(super) struct ExportArgs {
    /// A run folder, a checkpoint folder, or a file of `export` or `import`.
    #[arg(value_name = "RUN|W")]
    source: PathBuf,
    /// For whom it is.
    #[arg(long, value_enum, value_name = "FORMAT")]
    to: ExportFormat,
    /// The file to write, a folder for transformers; the card goes to F.md, or README.md in the folder.
    #[arg(long, value_name = "F")]
    out: PathBuf,
    /// `teacher` or `student`.
    #[arg(long, value_enum, value_name = "NETWORK", default_value = "teacher", hide_possible_values = true)]
    network: Network,
    /// Attention heads, for a file that does not tell.
    #[arg(long, value_name = "N", value_parser = super::quantize::positive)]
    heads: Option<usize>,
    /// Images that a graph takes, `PIXELS` or `HEIGHTxWIDTH`; pixels beyond the last whole patch are not read [default: as
    /// in training].
    #[arg(long, value_name = "SIZE", value_parser = super::image_size, conflicts_with = "dynamic_grid")]
    size: Option<(usize, usize)>,
    /// A graph for images of any size: positions are resized in it.
    #[arg(long)]
    dynamic_grid: bool,
    /// Pixels that a graph takes: `normalized` or `bytes` (0 to 255, the graph normalizes).
    #[arg(long, value_enum, value_name = "INPUT", default_value = "normalized", hide_possible_values = true)]
    input: PixelInput,
    /// A `.pass` file of these weights: a graph with its int8 weights and scales (QuantizeLinear, DequantizeLinear).
    #[arg(long, value_name = "M.pass")]
    quantized: Option<PathBuf>,
    /// Photos to measure one scale an activation on, as TensorRT and int8 kernels want it [default: a scale per token,
    /// computed in the graph, as on the device].
    #[arg(long, value_name = "IMAGES", requires = "quantized")]
    calibrate: Vec<String>,
    /// Write a summary as one JSON object to standard output.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: ExportArgs) -> Result<u8, Error> {
    if args.to != ExportFormat::Onnx {
        let given = [
            ("--size", args.size.is_some()),
            ("--dynamic-grid", args.dynamic_grid),
            ("--input", args.input != PixelInput::Normalized),
            ("--quantized", args.quantized.is_some()),
        ];
        if let Some((flag, _)) = given.into_iter().find(|(_, given)| *given) {
            return Err(Error::usage(
                format!("`{flag}` is for `--to onnx`"),
                "leave it out, or export a graph",
            ));
        }
    }
    if args.out.file_name().is_none() {
        return Err(Error::usage(
            format!("`--out {}`: expected a name", args.out.display()),
            "for example `--out model.onnx`",
        ));
    }
    let grid = match args.dynamic_grid {
        true => Some(Grid::Dynamic),
        false => args.size.map(Grid::Fixed),
    };
    let settings = ExportSettings {
        source: args.source,
        to: args.to,
        network: args.network,
        heads: args.heads,
        out: args.out,
        grid,
        input: args.input,
        quantized: args.quantized,
        calibrate: args.calibrate,
    };
    let exported = crate::export::run(&settings)?;
    output::note(&format!(
        "{}: {} tensors, {:.1} million values; {}",
        exported.file.display(),
        exported.tensors,
        exported.values as f64 / 1e6,
        exported.card.display()
    ));
    match args.json {
        true => output::print_json(&exported)?,
        false => output::print(&format!("{}\n", exported.usage))?,
    }
    Ok(0)
}
