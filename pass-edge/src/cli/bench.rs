//! `pass-edge bench`

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use pass_edge::format::{Architecture, generated_pixel};
use pass_edge::image::{Image, PixelOrder};
use pass_edge::kernels::Kernel;
use serde::Serialize;

use super::compute::{ComputeArgs, Engine};
use super::error::Error;
use super::model_file::ModelFile;
use super::output;

/// Measure time an image, memory, and time to load.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  pass-edge bench model.pass
  pass-edge bench model.pass --all-kernels --threads 1 --rounds 20 --json")]
pub(super) struct BenchArgs {
    /// The model.
    #[arg(value_name = "M.pass")]
    model: PathBuf,
    /// Images measured, after one that is not.
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rounds: u32,
    /// Measure every kernel this processor has, in turns.
    #[arg(long, conflicts_with = "kernel")]
    all_kernels: bool,
    /// Write one JSON object to standard output.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    compute: ComputeArgs,
}

#[derive(Serialize)]
struct Report {
    model: PathBuf,
    file_bytes: usize,
    mode: &'static str,
    /// `(height, width)` in pixels.
    image_size: (usize, usize),
    threads: usize,
    rounds: u32,
    /// Mapping and validating the file: every byte is read.
    load_ms: f64,
    scratch_bytes: usize,
    /// Largest resident memory of the process; `None` where the system does not say.
    rss_bytes: Option<u64>,
    /// Multiplications of the forward pass, in 10⁹.
    gmac: f64,
    kernels: Vec<Timing>,
}

#[derive(Serialize)]
struct Timing {
    kernel: &'static str,
    median_ms: f64,
    best_ms: f64,
    p95_ms: f64,
    images_per_s: f64,
    gmac_per_s: f64,
}

pub(super) fn run(args: &BenchArgs) -> Result<u8, Error> {
    let kernels: Vec<_> =
        if args.all_kernels { Kernel::available().collect() } else { vec![args.compute.kernel()?] };
    let start = Instant::now();
    let file = ModelFile::open(&args.model)?;
    let model = file.model()?;
    let load_ms = milliseconds(start);

    let (height, width) = model.architecture().image_size();
    let pixels: Vec<u8> = (0..3 * (height * width) as u64).map(|index| generated_pixel(0, index)).collect();
    let image = Image::new(&pixels, (height, width), 3 * width, PixelOrder::Rgb)?;
    let mut engine = Engine::new(model, Kernel::Scalar, args.compute.pool()?);
    let mut times = vec![Vec::with_capacity(args.rounds as usize); kernels.len()];
    for round in 0..=args.rounds {
        for (kernel, times) in kernels.iter().zip(&mut times) {
            engine.use_kernel(*kernel);
            let start = Instant::now();
            engine.features(&image)?;
            // the first round fetches code and model into memory
            if round > 0 {
                times.push(milliseconds(start));
            }
        }
    }
    let gmac = multiplications(model.architecture()) as f64 / 1e9;
    let report = Report {
        model: args.model.clone(),
        file_bytes: file.len(),
        mode: model.mode().name(),
        image_size: (height, width),
        threads: args.compute.threads(),
        rounds: args.rounds,
        load_ms,
        scratch_bytes: engine.scratch_bytes(),
        rss_bytes: peak_rss(),
        gmac,
        kernels: kernels.iter().zip(times).map(|(kernel, times)| timing(*kernel, times, gmac)).collect(),
    };
    if args.json {
        output::print_json(&report)?;
    } else {
        output::print(&text(&report))?;
    }
    Ok(0)
}

fn milliseconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}

fn timing(kernel: Kernel, mut times: Vec<f64>, gmac: f64) -> Timing {
    times.sort_by(f64::total_cmp);
    // the smallest time that `share` of all do not exceed
    let quantile =
        |share: f64| times[((share * times.len() as f64).ceil() as usize).clamp(1, times.len()) - 1];
    let median_ms = quantile(0.5);
    Timing {
        kernel: kernel.name(),
        median_ms,
        best_ms: times[0],
        p95_ms: quantile(0.95),
        images_per_s: 1e3 / median_ms,
        gmac_per_s: gmac * 1e3 / median_ms,
    }
}

/// Multiplications of all matrix products.
fn multiplications(a: &Architecture) -> u64 {
    let (dim, hidden, tokens) = (a.dim() as u64, u64::from(a.hidden), a.tokens() as u64);
    let linear = 4 * dim * dim + 2 * dim * hidden;
    let block = tokens * linear + 2 * tokens * tokens * dim;
    a.patches() as u64 * dim * a.patch_inputs() as u64 + u64::from(a.depth) * block
}

/// Peak resident memory, where the system tells it as a file.
fn peak_rss() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}

fn text(r: &Report) -> String {
    let mib = |bytes: u64| format!("{:.2} MiB", bytes as f64 / f64::from(1 << 20));
    let mut text = output::table(&[
        ("model", format!("{}, {}, {}", r.model.display(), mib(r.file_bytes as u64), r.mode)),
        ("image", format!("{} × {} pixels, {:.3} GMAC", r.image_size.0, r.image_size.1, r.gmac)),
        ("load", format!("{:.2} ms", r.load_ms)),
        ("scratch", mib(r.scratch_bytes as u64)),
        ("peak RSS", r.rss_bytes.map_or("unknown".to_owned(), mib)),
        ("threads", r.threads.to_string()),
        ("rounds", r.rounds.to_string()),
    ]);
    text += &format!(
        "\n{:12} {:>10} {:>10} {:>10} {:>10} {:>10}\n",
        "kernel", "median ms", "best ms", "p95 ms", "images/s", "GMAC/s"
    );
    for t in &r.kernels {
        text += &format!(
            "{:12} {:10.2} {:10.2} {:10.2} {:10.1} {:10.1}\n",
            t.kernel, t.median_ms, t.best_ms, t.p95_ms, t.images_per_s, t.gmac_per_s
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vit_tiny_has_one_and_a_quarter_billion_multiplications() {
        let count = multiplications(&Architecture::vit_tiny(16, (14, 14)));
        // 196 · 192 · 768 + 12 · (196 · 12 · 192² + 2 · 196² · 192)
        assert_eq!(count, 28_901_376 + 12 * (86_704_128 + 14_751_744));
    }

    #[test]
    fn quantiles_are_of_the_times_measured() {
        let timing = timing(Kernel::Scalar, (1..=20).rev().map(f64::from).collect(), 0.5);
        assert_eq!((timing.best_ms, timing.median_ms, timing.p95_ms), (1.0, 10.0, 19.0));
        assert_eq!((timing.images_per_s, timing.gmac_per_s), (100.0, 50.0));
    }
}
