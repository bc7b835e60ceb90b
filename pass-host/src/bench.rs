//! How fast training is here: real steps on random or given images, timed part by part, beside what the arithmetic of the
//! step costs and what this device does at its best.

mod memory;
mod product;

use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;

use crate::config::{Arch, OpsKind, TrainConfig};
use crate::cost::StepCost;
use crate::data::augment::GLOBAL_CROPS;
use crate::data::loader::{Batch, Loader, LoaderSettings, Part, Views};
use crate::data::{DataError, ImageIndex};
use crate::device::{Compute, DeviceError};
use crate::objective::forward::Crops;
use crate::random::{Purpose, Stream};
use crate::train::batch::BatchPlan;
use crate::train::schedule::Schedules;
use crate::train::trainer::{NonFinite, Schedule, Trainer};
use memory::Memory;

/// Images a step on the CPU, unless told otherwise: the presets' batches are meant for clusters.
pub const CPU_BATCH: usize = 8;
/// The same on a GPU.
pub const GPU_BATCH: usize = 64;
/// Steps taken apart after those that are timed whole.
const SPLIT_STEPS: usize = 5;

/// Everything `bench train` needs.
#[derive(Clone, Debug)]
pub struct BenchSettings {
    /// The configuration; random images if it names none.
    pub config: TrainConfig,
    /// The preset it started from.
    pub preset: String,
    /// Steps before the clock starts.
    pub warmup: usize,
    /// Steps timed, at least 1.
    pub steps: usize,
    /// Where and in which precision to compute.
    pub compute: Compute,
    /// Compute threads.
    pub threads: usize,
}

/// What `bench train` found. Seconds are those of a step.
#[derive(Clone, Debug, Serialize)]
pub struct BenchReport {
    /// The preset.
    pub preset: String,
    /// The network.
    pub arch: Arch,
    /// Images a step.
    pub batch: usize,
    /// Parts a batch is computed in.
    pub accumulate: usize,
    /// For example `CPU`.
    pub device: String,
    /// For example `f32`.
    pub precision: &'static str,
    /// Compute threads.
    pub threads: usize,
    /// Which operations.
    pub ops: OpsKind,
    /// Images in the sources; `None` for random ones.
    pub images: Option<usize>,
    /// Steps before the clock started.
    pub warmup: usize,
    /// Steps timed.
    pub steps: usize,
    /// Batch by median.
    pub images_per_s: f64,
    /// Of whole steps.
    pub seconds: Seconds,
    /// Medians of the parts.
    pub split: Split,
    /// Share of the time spent waiting for images.
    pub data_wait: f64,
    /// Most memory of the process so far, in MB of 2²⁰ bytes; `None` where the system does not tell.
    pub peak_memory_mb: Option<f64>,
    /// Most memory in use on the GPU after a step, whoever uses it; `None` on the CPU.
    pub device_memory_mb: Option<f64>,
    /// What a step costs.
    pub multiply_adds: StepCost,
    /// 10¹² operations a second: two for each multiply-add, by median.
    pub tflops: f64,
    /// The same of one large product on this device in this precision.
    pub product_tflops: f64,
    /// `tflops / product_tflops`.
    pub share_of_product: f64,
    /// Loss of the first step, warm-up included.
    pub first_loss: f64,
    /// Loss of the last step.
    pub last_loss: f64,
}

/// Times of the steps.
#[derive(Clone, Debug, Serialize)]
pub struct Seconds {
    /// Half of the steps took longer.
    pub median: f64,
    /// The fastest.
    pub min: f64,
    /// The slowest.
    pub max: f64,
    /// All of them, in order.
    pub all: Vec<f64>,
}

/// Median seconds of the parts of a step. Whole steps are timed without stopping in between; forward and backward pass
/// are those of a few more, in which the device is waited for after each.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Split {
    /// Waiting for decoded and augmented images.
    pub data_wait: f64,
    /// Making tensors of them.
    pub upload: f64,
    /// Both networks and the losses.
    pub forward: f64,
    /// Gradients.
    pub backward: f64,
    /// The rest: norms of the gradients, centers, optimizer, momentum teacher.
    pub update: f64,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    /// The images.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A step that could not be applied, whose time means nothing.
    #[error("step {step}: {} is {}", fault.term, fault.value)]
    NotFinite {
        /// The step, from 0.
        step: usize,
        /// What was not finite.
        fault: NonFinite,
    },
    /// The tensor library refused, perhaps for want of memory.
    #[error("the step cannot be computed")]
    Tensor(#[from] candle_core::Error),
}

impl BenchError {
    /// What to try.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Data(error) => error.hint(),
            Self::Device(error) => error.hint(),
            Self::NotFinite { .. } => None,
            Self::Tensor(_) => Some("if memory ran out, a smaller `--batch`".into()),
        }
    }
}

/// Times the steps; `progress(done, all)` is called after each.
///
/// # Errors
/// [`BenchError`].
pub fn run(
    settings: &BenchSettings,
    mut progress: impl FnMut(usize, usize),
) -> Result<BenchReport, BenchError> {
    let BenchSettings { config, compute, .. } = settings;
    let device = &compute.device;
    let multiply_adds = StepCost::of(config)?;
    let (mut source, images) = Source::open(config, compute)?;
    let mut trainer = Trainer::new(config, Trainer::fresh_student(config, device)?, device)?;
    let plan = BatchPlan {
        accumulate: config.optim.accumulate,
        augment: config.augment.clone(),
        drop_path_applications: trainer.student.backbone.drop_path_applications(),
        seed: config.seed,
        dtype: compute.dtype,
    };
    let all = settings.warmup + settings.steps;
    let schedules = Schedules::new(config, all * config.optim.total_batch(1), 1);
    let mut memory = Memory::new(device);
    let (mut times, mut losses) = (Vec::with_capacity(all), Vec::with_capacity(all));
    for step in 0..all {
        let schedule = Schedule { train_last_layer: true, ..schedules.at(step as u64) };
        let begin = Instant::now();
        let batch = source.next()?;
        let waited = begin.elapsed().as_secs_f64();
        let crops = plan.micro_batches(&batch, device)?;
        let upload = begin.elapsed().as_secs_f64() - waited;
        let report =
            trainer.step(&crops, &schedule)?.map_err(|fault| BenchError::NotFinite { step, fault })?;
        device.synchronize()?;
        times.push(StepTime { total: begin.elapsed().as_secs_f64(), waited, upload });
        memory.observe();
        losses.push(report.loss);
        progress(step + 1, all);
    }
    let batch = source.next()?;
    let crops = plan.micro_batches(&batch, device)?;
    let passes = (0..SPLIT_STEPS.min(settings.steps)).map(|_| passes(&trainer, &crops, compute));
    let passes = passes.collect::<candle_core::Result<Vec<_>>>()?;
    // their memory belongs to the product now
    drop((trainer, source, crops));
    let timed = &times[settings.warmup..];
    let median = |of: &dyn Fn(&StepTime) -> f64| middle(timed.iter().map(of).collect());
    let seconds = Seconds::of(timed);
    let product_tflops = product::tflops(device, compute.dtype)?;
    let (waited, upload) = (median(&|time| time.waited), median(&|time| time.upload));
    let (forward, backward): (Vec<_>, Vec<_>) = passes.into_iter().unzip();
    let (forward, backward) = (middle(forward), middle(backward));
    let rest = seconds.median - waited - upload - forward - backward;
    let tflops = 2.0 * multiply_adds.total as f64 / seconds.median / 1e12;
    Ok(BenchReport {
        preset: settings.preset.clone(),
        arch: config.model.arch,
        batch: config.optim.batch,
        accumulate: config.optim.accumulate,
        device: compute.device_name(),
        precision: compute.dtype.as_str(),
        threads: settings.threads,
        ops: config.ops,
        images,
        warmup: settings.warmup,
        steps: settings.steps,
        images_per_s: config.optim.batch as f64 / seconds.median,
        split: Split { data_wait: waited, upload, forward, backward, update: rest.max(0.0) },
        data_wait: timed.iter().map(|time| time.waited).sum::<f64>() / seconds.all.iter().sum::<f64>(),
        peak_memory_mb: memory::peak_resident_mb(),
        device_memory_mb: memory.device_mb(),
        multiply_adds,
        tflops,
        product_tflops,
        share_of_product: tflops / product_tflops,
        first_loss: losses.first().copied().unwrap_or(f64::NAN),
        last_loss: losses.last().copied().unwrap_or(f64::NAN),
        seconds,
    })
}

struct StepTime {
    total: f64,
    waited: f64,
    upload: f64,
}

/// Seconds of the forward and of the backward passes of one step, to their very end on the device.
fn passes(trainer: &Trainer, crops: &[Crops], compute: &Compute) -> candle_core::Result<(f64, f64)> {
    let (mut forward, mut backward) = (0.0, 0.0);
    for crops in crops {
        let begin = Instant::now();
        let losses = trainer.losses(crops, TEACHER_TEMP)?;
        compute.device.synchronize()?;
        forward += begin.elapsed().as_secs_f64();
        let begin = Instant::now();
        trainer.gradients(&losses.total)?;
        compute.device.synchronize()?;
        backward += begin.elapsed().as_secs_f64();
    }
    Ok((forward, backward))
}

/// Any: it is a factor.
const TEACHER_TEMP: f64 = 0.04;

impl Seconds {
    fn of(times: &[StepTime]) -> Self {
        let all: Vec<f64> = times.iter().map(|time| time.total).collect();
        let extreme = |start: f64, choose: fn(f64, f64) -> f64| all.iter().copied().fold(start, choose);
        Self {
            median: middle(all.clone()),
            min: extreme(f64::INFINITY, f64::min),
            max: extreme(0.0, f64::max),
            all,
        }
    }
}

/// The middle value; of an even number of them, the mean of the two in the middle.
fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => values[half],
        _ => (values[half - 1] + values[half]) / 2.0,
    }
}

/// Where the batches come from.
enum Source {
    /// One batch of noise, again and again.
    Noise(Arc<Batch>),
    /// Loaded while the step before computes.
    Images(Box<Loader>),
}

impl Source {
    /// The source and the number of its images.
    fn open(config: &TrainConfig, compute: &Compute) -> Result<(Self, Option<usize>), BenchError> {
        compute.check_augment(config.augment.device)?;
        if config.data.images.is_empty() {
            return Ok((Self::Noise(Arc::new(noise(config))), None));
        }
        let index = Arc::new(ImageIndex::build(&config.data, None)?);
        let images = index.len();
        let settings = LoaderSettings {
            index,
            augment: config.augment.clone(),
            seed: config.seed,
            batch: config.optim.batch,
            part: Part::WHOLE,
            workers: config.data.workers,
            prefetch: config.data.prefetch,
            cursor: 0,
            max_bad: config.data.max_bad,
            max_megapixels: config.data.max_megapixels,
            quarantine: None,
            known_bad: Vec::new(),
        };
        let loader = match compute.uploader(config.augment.device)? {
            Some(uploader) => Loader::uploading(settings, uploader)?,
            None => Loader::start(settings)?,
        };
        Ok((Self::Images(Box::new(loader)), Some(images)))
    }

    /// The next batch; waits for it if need be.
    fn next(&mut self) -> Result<Arc<Batch>, DataError> {
        match self {
            Self::Noise(batch) => Ok(Arc::clone(batch)),
            Self::Images(loader) => loader.next().map(Arc::new),
        }
    }
}

/// A batch of crops whose values are uniform between −2 and 2, about the spread of normalized photos.
fn noise(config: &TrainConfig) -> Batch {
    let batch = config.optim.batch;
    let mut stream = Stream::new(config.seed, Purpose::Augment, &[]);
    let mut values = |crops: usize, side: usize| {
        (0..crops * batch * 3 * side * side).map(|_| stream.range(-2.0, 2.0) as f32).collect()
    };
    Batch {
        start: 0,
        epoch: 0,
        images: (0..batch as u64).collect(),
        views: Views::Crops {
            global: values(GLOBAL_CROPS, config.augment.global_size),
            local: values(config.augment.local_crops, config.augment.local_size),
        },
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(middle(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(middle(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(middle(Vec::new()).is_nan());
    }

    #[test]
    fn one_large_product_is_measured_in_every_precision_of_the_cpu() {
        let tflops = product::tflops(&candle_core::Device::Cpu, DType::F32).unwrap();
        assert!(tflops > 0.0 && tflops.is_finite());
    }
}
