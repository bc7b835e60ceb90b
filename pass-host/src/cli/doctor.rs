//! `pass-host doctor`: what this machine and this build can do.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use clap::Args;
use serde::Serialize;

use super::{output, thread_count};
use crate::device::{CUDA_COMPILED, open_cuda};
use crate::distributed::ENGINES;
use crate::error::Error;

/// Show version, processor, memory, devices and speed; check that results can be written.
#[derive(Debug, Args)]
pub(super) struct DoctorArgs {
    /// Folder to check for write access.
    #[arg(long, value_name = "DIR", default_value = "runs")]
    out: PathBuf,
    /// Compute threads of the speed test [default: one per core].
    #[arg(long, value_name = "N", value_parser = thread_count)]
    pub(super) threads: Option<usize>,
    /// Write one JSON object.
    #[arg(long)]
    json: bool,
}

/// How long the speed test runs.
const BENCHMARK: Duration = Duration::from_secs(1);
/// Side of the matrices of the speed test: large enough to be limited by arithmetic.
const SIDE: usize = 512;
/// Devices looked for.
const MOST_DEVICES: usize = 16;

#[derive(Serialize)]
struct Report {
    version: &'static str,
    target: String,
    cpu_features: Vec<&'static str>,
    cores: usize,
    threads: usize,
    /// Bytes; `None` where the system does not say.
    memory_total: Option<u64>,
    memory_available: Option<u64>,
    cuda_compiled: bool,
    cuda_devices: usize,
    /// Why there is no CUDA device.
    cuda_problem: Option<String>,
    /// Engines for several processes that are built in.
    engines: Vec<&'static str>,
    out: PathBuf,
    /// Why `out` cannot be written; `None` = it can.
    out_problem: Option<String>,
    gflops_f32: f64,
}

pub(super) fn run(args: DoctorArgs) -> Result<u8, Error> {
    let (memory_total, memory_available) = memory();
    let (cuda_devices, cuda_problem) = cuda();
    let out_problem = write_problem(&args.out);
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        target: format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
        cpu_features: cpu_features(),
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        threads: rayon::current_num_threads(),
        memory_total,
        memory_available,
        cuda_compiled: CUDA_COMPILED,
        cuda_devices,
        cuda_problem,
        engines: ENGINES.iter().filter(|(_, built_in)| *built_in).map(|(name, _)| *name).collect(),
        out: args.out,
        out_problem,
        gflops_f32: gflops(),
    };
    if args.json {
        output::print_json(&report)?;
    } else {
        output::print(&text(&report))?;
    }
    Ok(u8::from(report.out_problem.is_some()))
}

fn text(r: &Report) -> String {
    let gib = |bytes: Option<u64>| {
        bytes.map_or("unknown".into(), |b| format!("{:.1} GiB", b as f64 / f64::from(1 << 30)))
    };
    let cuda = match (r.cuda_compiled, &r.cuda_problem) {
        (false, _) => "not built in (cargo build --release -p pass-host --features cuda)".into(),
        (true, Some(problem)) => format!("built in, not usable: {problem}"),
        (true, None) => format!("{} devices", r.cuda_devices),
    };
    let out = match &r.out_problem {
        None => format!("{} is writable", r.out.display()),
        Some(problem) => format!("{} is NOT writable: {problem}", r.out.display()),
    };
    let engines = match r.engines.is_empty() {
        true => "one process (several: cargo build --release -p pass-host --features mpi)".into(),
        false => r.engines.join(" "),
    };
    let features = if r.cpu_features.is_empty() { "none detected".into() } else { r.cpu_features.join(" ") };
    format!(
        "pass-host  {}\ntarget     {}\nfeatures   {features}\ncores      {}, {} compute threads\n\
         memory     {} total, {} available\ncuda       {cuda}\nranks      {engines}\nout        {out}\nspeed      {:.0} GFLOP/s (f32 product)\n",
        r.version,
        r.target,
        r.cores,
        r.threads,
        gib(r.memory_total),
        gib(r.memory_available),
        r.gflops_f32,
    )
}

/// The instruction sets of this processor that the products can use.
fn cpu_features() -> Vec<&'static str> {
    macro_rules! detected {
        ($detect:ident: $($name:tt),+) => { [$(($name, std::arch::$detect!($name))),+] };
    }
    #[cfg(target_arch = "x86_64")]
    let all = detected!(is_x86_feature_detected: "sse4.2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vnni", "avx512bf16", "avxvnni");
    #[cfg(target_arch = "aarch64")]
    let all = detected!(is_aarch64_feature_detected: "neon", "fp16", "dotprod", "i8mm", "bf16", "sve");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let all: [(&str, bool); 0] = [];
    all.into_iter().filter(|(_, present)| *present).map(|(name, _)| name).collect()
}

/// Total and available memory in bytes, where the system tells it as a file.
fn memory() -> (Option<u64>, Option<u64>) {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = |key: &str| {
        let line = text.lines().find(|line| line.starts_with(key))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
    };
    (kib("MemTotal:"), kib("MemAvailable:"))
}

/// Number of usable CUDA devices, and why there are none.
fn cuda() -> (usize, Option<String>) {
    match open_cuda(0) {
        Err(error) => (0, Some(error.to_string())),
        Ok(_) => (1 + (1..MOST_DEVICES).take_while(|index| open_cuda(*index).is_ok()).count(), None),
    }
}

/// Why no file can be made in `folder` (or where it would be created); leaves nothing behind.
fn write_problem(folder: &Path) -> Option<String> {
    let absolute = match std::path::absolute(folder) {
        Ok(path) => path,
        Err(error) => return Some(error.to_string()),
    };
    let existing = absolute.ancestors().find(|path| path.exists())?;
    let probe = existing.join(format!(".pass-host-doctor-{}", std::process::id()));
    match std::fs::write(&probe, b"x") {
        Ok(()) => std::fs::remove_file(&probe).err().map(|e| e.to_string()),
        Err(error) => Some(error.to_string()),
    }
}

/// Speed of f32 matrix products on the CPU, in 10⁹ operations a second: the best of many short runs.
fn gflops() -> f64 {
    let product = || -> candle_core::Result<f64> {
        let matrix = Tensor::ones((SIDE, SIDE), DType::F32, &Device::Cpu)?;
        let (mut best, begin) = (f64::MAX, Instant::now());
        while begin.elapsed() < BENCHMARK {
            let start = Instant::now();
            matrix.matmul(&matrix)?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        Ok(2.0 * (SIDE as f64).powi(3) / best / 1e9)
    };
    // a product of two matrices of ones on the CPU has no way to fail; 0 would say so if it did
    product().unwrap_or(0.0)
}
