//! `pass-host bench`

use std::fmt::Write;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use toml::Value;

use super::{ComputeArgs, output};
use crate::allocator;
use crate::bench::{self, BenchReport, BenchSettings, CPU_BATCH, GPU_BATCH};
use crate::config::{Layers, Resolved};
use crate::device;
use crate::error::Error;

/// Measure how fast this machine trains.
#[derive(Debug, Subcommand)]
pub(super) enum BenchCommand {
    Train(Box<TrainArgs>),
}

impl BenchCommand {
    pub(super) fn compute(&self) -> &ComputeArgs {
        match self {
            Self::Train(args) => &args.compute,
        }
    }
}

/// Time training steps: images a second, where the time goes, memory, and the share of what the device can do.
///
/// Nothing is trained that is kept and nothing is written. With images the steps include loading them, without they get
/// random ones. The arithmetic of a step is counted from its architecture and set beside the speed of one large product
/// measured on the same device.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  pass-host bench train --preset paper-vit-s16 --steps 20 --json
  pass-host bench train photos.shard --batch 64 --device cuda --precision bf16
  pass-host bench train --preset paper-vit-ti16-coco --batch 4 --threads 2 --ops reference")]
pub(super) struct TrainArgs {
    /// Folders, image files, tars, shards or @lists [default: random images, already in memory].
    #[arg(value_name = "IMAGES")]
    images: Vec<String>,
    /// Steps to time.
    #[arg(long, value_name = "N", default_value_t = 20)]
    steps: usize,
    /// Steps before the clock starts.
    #[arg(long, value_name = "N", default_value_t = 3)]
    warmup: usize,
    /// Images a step [default: 8, on a GPU 64; the presets' batches are meant for many GPUs].
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Decoding and augmentation threads [default: one per core].
    #[arg(long, value_name = "N")]
    workers: Option<usize>,
    /// Where crops are made: `cpu`, or `gpu` if the processor cannot feed the GPU; the same pixels.
    #[arg(long, value_name = "WHERE", value_parser = ["cpu", "gpu"], hide_possible_values = true)]
    augment: Option<String>,
    /// Training operations: `fused`, or the slow plain compositions `reference`.
    #[arg(long, value_name = "KIND", value_parser = ["fused", "reference"], hide_possible_values = true)]
    ops: Option<String>,
    /// Starting point of the configuration [default: paper-vit-s16].
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// TOML file with the keys that differ from the preset.
    #[arg(long, value_name = "F.toml")]
    config: Option<PathBuf>,
    /// Set any key, for example `--set augment.local_crops=8`; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Write the result as one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    compute: ComputeArgs,
}

pub(super) fn run(command: BenchCommand) -> Result<u8, Error> {
    match command {
        BenchCommand::Train(args) => train(*args),
    }
}

fn train(args: TrainArgs) -> Result<u8, Error> {
    if args.steps == 0 {
        return Err(Error::usage("`--steps`: expected 1 or more, found 0", "the default is 20"));
    }
    allocator::keep_memory();
    let compute = device::choose(args.compute.device, args.compute.precision)?;
    let json = args.json;
    let default_batch = if compute.device.is_cpu() { CPU_BATCH } else { GPU_BATCH };
    let Resolved { config, preset, .. } = layers(&args, default_batch).resolve()?;
    let settings = BenchSettings {
        config,
        preset,
        warmup: args.warmup,
        steps: args.steps,
        compute,
        threads: rayon::current_num_threads(),
    };
    let bar = output::steps_bar();
    bar.set_message("steps");
    let report = bench::run(&settings, |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    if json {
        output::print_json(&report)?;
    } else {
        output::print(&table(&report))?;
    }
    Ok(0)
}

/// The configuration layers the flags name.
fn layers(args: &TrainArgs, default_batch: usize) -> Layers {
    let mut flags: Vec<(&'static str, &'static str, Value)> = Vec::new();
    if !args.images.is_empty() {
        let images = args.images.iter().cloned().map(Value::String).collect();
        flags.push(("IMAGES", "data.images", Value::Array(images)));
    }
    // a batch that was set by key or file counts as asked for
    let asked =
        args.sets.iter().any(|set| set.trim_start().starts_with("optim.batch")) || args.config.is_some();
    let batch = args.batch.or((!asked).then_some(default_batch));
    for (flag, key, number) in
        [("--batch", "optim.batch", batch), ("--workers", "data.workers", args.workers)]
    {
        flags.extend(number.map(|n| (flag, key, Value::Integer(n.try_into().unwrap_or(i64::MAX)))));
    }
    for (flag, key, word) in [("--augment", "augment.device", &args.augment), ("--ops", "ops", &args.ops)] {
        flags.extend(word.clone().map(|word| (flag, key, Value::String(word))));
    }
    Layers {
        preset: args.preset.clone(),
        default_preset: String::new(),
        file: args.config.clone(),
        sets: args.sets.clone(),
        flags,
    }
}

fn table(report: &BenchReport) -> String {
    let r = report;
    let images = r.images.map_or("random images".to_owned(), |count| format!("{count} images"));
    let mut text = format!(
        "{} ({}), batch {}, {}, {}, {} threads, {images}, {} steps after {}\n\n",
        r.preset,
        // the name as in the configuration
        serde_json::to_value(r.arch)
            .ok()
            .and_then(|name| name.as_str().map(str::to_owned))
            .unwrap_or_default(),
        r.batch,
        r.device,
        r.precision,
        r.threads,
        r.steps,
        r.warmup,
    );
    // writing into a String cannot fail
    let mut line = |name: &str, value: String| writeln!(text, "{name:<16}{value}").ok();
    line("images/s", format!("{:.2}", r.images_per_s));
    line(
        "step",
        format!(
            "{:.3} s median, {:.3} fastest, {:.3} slowest",
            r.seconds.median, r.seconds.min, r.seconds.max
        ),
    );
    let parts = [
        ("  data wait", r.split.data_wait),
        ("  upload", r.split.upload),
        ("  forward", r.split.forward),
        ("  backward", r.split.backward),
        ("  update", r.split.update),
    ];
    for (name, seconds) in parts {
        line(name, format!("{seconds:.3} s  {:>5.1} %", 100.0 * seconds / r.seconds.median));
    }
    let megabytes = |mb: Option<f64>| mb.map_or("unknown".to_owned(), |mb| format!("{mb:.0} MB"));
    line("peak memory", megabytes(r.peak_memory_mb));
    if r.device_memory_mb.is_some() {
        line("on the GPU", megabytes(r.device_memory_mb));
    }
    line("arithmetic", format!("{:.1} billion multiply-adds a step", r.multiply_adds.total as f64 / 1e9));
    for part in &r.multiply_adds.parts {
        let sum = part.forward + part.backward + part.teacher;
        let share = 100.0 * sum as f64 / r.multiply_adds.total as f64;
        line(&format!("  {}", part.part), format!("{share:>5.1} %"));
    }
    line(
        "speed",
        format!(
            "{:.3} TFLOP/s, {:.0} % of one large product ({:.3})",
            r.tflops,
            100.0 * r.share_of_product,
            r.product_tflops
        ),
    );
    text
}
