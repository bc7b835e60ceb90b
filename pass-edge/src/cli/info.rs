//! `pass-edge info`

use std::path::PathBuf;

use clap::Args;
use pass_edge::format::{Contract, Normalization};
use pass_edge::kernels::Kernel;
use pass_edge::model::Model;
use pass_edge::scratch::ScratchLen;
use serde::Serialize;

use super::compute::ComputeArgs;
use super::error::Error;
use super::model_file::ModelFile;
use super::output;

/// Show what a model file is: sizes, arithmetic, promised accuracy, memory it needs.
#[derive(Debug, Args)]
#[command(after_help = "Example:
  pass-edge info model.pass --json")]
pub(super) struct InfoArgs {
    /// The model.
    #[arg(value_name = "M.pass")]
    model: PathBuf,
    /// Write one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    compute: ComputeArgs,
}

#[derive(Serialize)]
struct Report<'a> {
    name: &'a str,
    file_bytes: usize,
    format_version: u32,
    architecture: pass_edge::format::Architecture,
    /// `(height, width)` in pixels.
    image_size: (usize, usize),
    patches: usize,
    prefix_tokens: usize,
    mode: &'static str,
    normalization: &'a Normalization,
    contract: &'a Contract,
    block_cosines: Vec<f32>,
    self_test_seed: u64,
    self_test_digest: String,
    threads: usize,
    scratch_bytes: usize,
    output_bytes: usize,
    kernel: &'static str,
    kernels: Vec<&'static str>,
}

pub(super) fn run(args: &InfoArgs) -> Result<u8, Error> {
    let file = ModelFile::open(&args.model)?;
    let model = file.model()?;
    let report = report(&model, file.len(), args.compute.kernel()?, args.compute.threads());
    if args.json {
        output::print_json(&report)?;
    } else {
        output::print(&text(&report))?;
    }
    Ok(0)
}

fn report<'a>(model: &'a Model<'_>, file_bytes: usize, kernel: Kernel, threads: usize) -> Report<'a> {
    let architecture = *model.architecture();
    Report {
        name: model.name(),
        file_bytes,
        format_version: pass_edge::format::VERSION,
        architecture,
        image_size: architecture.image_size(),
        patches: architecture.patches(),
        prefix_tokens: architecture.prefix_tokens(),
        mode: model.mode().name(),
        normalization: model.normalization(),
        contract: model.contract(),
        block_cosines: model.block_cosines().collect(),
        self_test_seed: model.self_test().seed,
        self_test_digest: format!("{:016x}", model.self_test().digest),
        threads,
        scratch_bytes: ScratchLen::with_threads(&architecture, threads).total_bytes(),
        output_bytes: 4 * model.output_len(),
        kernel: kernel.name(),
        kernels: Kernel::available().map(Kernel::name).collect(),
    }
}

fn text(r: &Report<'_>) -> String {
    let a = &r.architecture;
    let kib = |bytes: usize| format!("{:.1} KiB", bytes as f64 / 1024.0);
    let numbers = |values: &[f32], digits: usize| {
        values.iter().map(|value| format!("{value:.digits$}")).collect::<Vec<_>>().join(" ")
    };
    let yes = |value: bool| if value { "yes" } else { "no" };
    output::table(&[
        ("name", r.name.to_owned()),
        ("file", format!("{}, format version {}", kib(r.file_bytes), r.format_version)),
        ("network", format!("D {}, {} blocks, {} heads, hidden {}", a.dim, a.depth, a.heads, a.hidden)),
        (
            "tokens",
            format!(
                "{} patches ({} × {}), class token {}, {} registers",
                r.patches,
                a.grid.0,
                a.grid.1,
                yes(a.class_token),
                a.register_tokens
            ),
        ),
        ("image", format!("{} × {} pixels, patch {}", r.image_size.0, r.image_size.1, a.patch_size)),
        ("final norm", yes(a.final_norm).to_owned()),
        ("layer scale", if a.layer_scale_folded { "part of the weights" } else { "none" }.to_owned()),
        ("pca", format!("{} components", a.pca_components)),
        ("mode", r.mode.to_owned()),
        (
            "pixels",
            format!("mean {}, std {}", numbers(&r.normalization.mean, 3), numbers(&r.normalization.std, 3)),
        ),
        (
            "contract",
            format!(
                "cosine to float: mean {:.5}, first percentile {:.5}, refused below {:.3}; {} images, hash {:016x}",
                r.contract.mean_cosine,
                r.contract.first_percentile,
                r.contract.min_cosine,
                r.contract.images,
                r.contract.images_hash
            ),
        ),
        ("per block", numbers(&r.block_cosines, 5)),
        ("self-test", format!("seed {}, digest {}", r.self_test_seed, r.self_test_digest)),
        ("scratch", format!("{} for {} threads", kib(r.scratch_bytes), r.threads)),
        ("features", kib(r.output_bytes)),
        ("kernel", format!("{}; here: {}", r.kernel, r.kernels.join(" "))),
    ])
}
