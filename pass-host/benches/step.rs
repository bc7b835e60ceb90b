//! One training step (DINO + PASS) on random crops, timed whole, with the arithmetic floor beside it.
//!
//! ```text
//! cargo bench -p pass-host --bench step -- [--arch vit_tiny|vit_small] [--batch N] [--steps N] [--threads N] [--reference]
//!     [--recompute]
//! python pass-host/benches/peer/step.py --threads 2 --steps 5      # the published algorithm in PyTorch
//! ```
//!
//! The floor is the multiply-adds that the step needs (SEMANTICS §12's savings taken), divided by the speed of one
//! large product measured in the same run.
#![expect(clippy::print_stdout, reason = "a benchmark reports to its reader")]

use std::time::Instant;

use candle_core::{Device, Result, Tensor};
use pass_host::config::{Arch, OpsKind, TrainConfig};
use pass_host::cost::StepCost;
use pass_host::objective::forward::{CropGroup, Crops};
use pass_host::train::trainer::{Schedule, Trainer};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

struct Options {
    arch: Arch,
    batch: usize,
    steps: usize,
    threads: usize,
    ops: OpsKind,
    recompute: bool,
}

fn options() -> Options {
    let mut options = Options {
        arch: Arch::VitTiny,
        batch: 4,
        steps: 5,
        threads: 2,
        ops: OpsKind::Fused,
        recompute: false,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut number = || arguments.next().and_then(|value| value.parse().ok()).expect("a number");
        match argument.as_str() {
            "--batch" => options.batch = number(),
            "--steps" => options.steps = number(),
            "--threads" => options.threads = number(),
            "--recompute" => options.recompute = true,
            "--reference" => options.ops = OpsKind::Reference,
            "--arch" => {
                options.arch = match arguments.next().as_deref() {
                    Some("vit_tiny") => Arch::VitTiny,
                    Some("vit_small") => Arch::VitSmall,
                    other => panic!("--arch vit_tiny or vit_small, found {other:?}"),
                }
            }
            "--bench" => {}
            other => panic!("unknown option `{other}`"),
        }
    }
    options
}

fn crops(config: &TrainConfig, applications: usize) -> Result<Crops> {
    let group = |crops: usize, side: usize| {
        let rows = crops * config.optim.batch;
        let images = Tensor::randn(0f32, 1.0, (rows, 3, side, side), &Device::Cpu)?;
        Ok::<_, candle_core::Error>(CropGroup {
            images,
            crops,
            drop_path: Some(vec![vec![0.5; rows]; applications]),
        })
    };
    Ok(Crops {
        batch: config.optim.batch,
        global: group(2, config.augment.global_size)?,
        local: Some(group(config.augment.local_crops, config.augment.local_size)?),
    })
}

/// Multiply-adds a second of one large product.
fn product_speed() -> Result<f64> {
    let side = 1536;
    let a = Tensor::randn(0f32, 1.0, (side, side), &Device::Cpu)?;
    let b = Tensor::randn(0f32, 1.0, (side, side), &Device::Cpu)?;
    let mut best = f64::MAX;
    for _ in 0..5 {
        let start = Instant::now();
        a.matmul(&b)?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok((side as f64).powi(3) / best)
}

/// Seconds of processor time that this process has used on all threads, where the system tells (in hundredths).
fn cpu_seconds() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/stat").ok()?;
    // user and system time; the name before them is in parentheses and may hold spaces
    let fields: Vec<&str> = status.rsplit_once(')')?.1.split_whitespace().collect();
    Some((fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?) / 100.0)
}

/// Peak resident memory in MB, where the system tells.
fn peak_memory() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<f64>().ok()? / 1024.0)
}

fn main() -> Result<()> {
    let options = options();
    // candle's own pool of spinning threads slows everything else down: one thread, as in the program
    // SAFETY: nothing has started a thread yet.
    unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };
    pass_host::allocator::keep_memory();
    rayon::ThreadPoolBuilder::new()
        .num_threads(options.threads)
        .build_global()
        .expect("first use of the pool");
    let mut config = TrainConfig { ops: options.ops, recompute: options.recompute, ..TrainConfig::default() };
    config.model.arch = options.arch;
    config.head.class_prototypes = 4096;
    config.optim.batch = options.batch;
    let student = Trainer::fresh_student(&config, &Device::Cpu)?;
    let mut trainer = Trainer::new(&config, student, &Device::Cpu)?;
    let batch = [crops(&config, trainer.student.backbone.drop_path_applications())?];
    let schedule = Schedule {
        lr: 1e-4,
        weight_decay: 0.04,
        momentum: 0.996,
        next_momentum: 0.996,
        teacher_temp: 0.04,
        train_last_layer: true,
    };
    let mut seconds = Vec::new();
    let (mut loss, mut first_loss) = (0.0, None);
    let mut cpu_start = None;
    for step in 0..=options.steps {
        let start = Instant::now();
        let report = trainer.step(&batch, &schedule)?.expect("finite");
        loss = report.loss;
        first_loss.get_or_insert(loss);
        if step > 0 {
            seconds.push(start.elapsed().as_secs_f64());
        } else {
            cpu_start = cpu_seconds();
        }
    }
    let cpu = cpu_seconds().zip(cpu_start).map(|(end, start)| (end - start) / options.steps as f64);
    seconds.sort_by(f64::total_cmp);
    let peak = peak_memory();
    let speed = product_speed()?;
    let macs = StepCost::of(&config)?.total as f64;
    let (min, median) = (seconds[0], seconds[seconds.len() / 2]);
    println!(
        "{}",
        serde_json::json!({
            "arch": format!("{:?}", options.arch),
            "batch": options.batch,
            "threads": options.threads,
            "ops": format!("{:?}", options.ops),
            "recompute": options.recompute,
            "cpu_seconds": cpu,
            "seconds_min": min,
            "seconds_median": median,
            "images_per_s": options.batch as f64 / median,
            "gmac": macs / 1e9,
            "product_gmac_per_s": speed / 1e9,
            "floor_seconds": macs / speed,
            "share_of_floor": macs / speed / median,
            "peak_mb": peak,
            "first_loss": first_loss,
            "last_loss": loss,
        })
    );
    Ok(())
}
