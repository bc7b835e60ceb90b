//! The run: data in, checkpoints and metrics out; the loop reads like the paper's pseudo-code.
//!
//! | file | job |
//! |---|---|
//! | [`schedule`] | learning rate, decay, momentum, temperature as functions of the step |
//! | [`batch`] | a loaded batch as tensors |
//! | [`trainer`] | one optimizer step |
//! | [`probe`] | how good the features are, on a labelled folder |
//! | [`vitals`], [`guard`] | figures of health, and the alarm when they go wrong |
//! | [`state`] | what a checkpoint says, and the trainer it restores |
//! | [`start`] | where a run begins: fresh, from weights, or from a checkpoint |
//! | [`error`] | what stops a run |

pub mod batch;
pub mod error;
pub mod guard;
pub mod probe;
pub mod schedule;
pub mod start;
pub mod state;
pub mod trainer;
pub mod vitals;

use std::error::Error;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use candle_core::Device;

use crate::checkpoint::{self, CHECKPOINTS, Checkpoint};
use crate::config::run::{Ending, Outcome, RunSettings};
use crate::config::{OnCollapse, TrainConfig};
use crate::data::index::ImageIndex;
use crate::data::loader::{Batch, Loader, LoaderSettings};
use crate::metrics::{Metrics, MetricsLog, Progress};
use crate::model::Architecture;
use crate::ops::Ops;
use crate::report::{self, ReportSettings};
use batch::BatchPlan;
pub use error::TrainError;
use guard::{CollapseGuard, TermVitals, Vitals};
use probe::{Probe, ProbeScore};
use schedule::Schedules;
use start::Start;
use state::{PARTS, RunState};
use trainer::{NonFinite, Schedule, StepReport, Trainer};

/// The resolved configuration of a run.
pub const CONFIG: &str = "config.toml";
/// Bad images and why.
pub const QUARANTINE: &str = "quarantine.tsv";
/// Steps that were not applied because something was not finite.
pub const NON_FINITE: &str = "non-finite.tsv";

/// Trains until all steps are done, the person interrupts, or the guard stops.
pub fn run(settings: &RunSettings) -> Result<Outcome, TrainError> {
    let started = Instant::now();
    let config = &settings.config;
    let cache = (!settings.dry_run).then(|| settings.out.join("index.bin"));
    let new = !settings.out.exists();
    let index = Arc::new(ImageIndex::build(&config.data, cache.as_deref())?);
    let checked = config.check_images(index.len()).map_err(TrainError::from);
    let probe = match checked.and_then(|()| Ok(Probe::open(config)?)) {
        Ok(probe) => probe,
        Err(error) => {
            if new {
                // the cached index is all there is; a run that cannot start leaves nothing behind
                std::fs::remove_dir_all(&settings.out).ok();
            }
            return Err(error);
        }
    };
    let progress_plan = plan(settings, &index);
    if settings.dry_run {
        return Ok(progress_plan);
    }
    let _lock = checkpoint::lock_run(&settings.out)?;
    let start = match Start::checkpoint(settings)? {
        Some(checkpoint) => Start::resumed(settings, &index, &checkpoint)?,
        None => Start::fresh(settings)?,
    };
    if start.checkpoint.is_none() {
        checkpoint::write_atomically(&settings.out.join(CONFIG), settings.config_toml().as_bytes())?;
    }
    let checkpoints = settings.out.join(CHECKPOINTS);
    checkpoint::prepare(&checkpoints)?;
    let mut run = Run::new(settings, index, start, checkpoints, probe)?;
    let result = run.train();
    if result.is_ok() && config.log.report_every_steps > 0 {
        run.report();
    }
    run.progress.finish();
    let (ending, message) = result?;
    let last = run.last.unwrap_or_default();
    let logged = |value: f64| run.last.is_some().then_some(value).filter(|value| value.is_finite());
    Ok(Outcome {
        ending,
        checkpoint: run.newest,
        step: run.step,
        loss: logged(last.loss),
        loss_image: logged(last.loss_image),
        loss_patch: logged(last.loss_patch),
        seconds: started.elapsed().as_secs_f64(),
        message,
        ..progress_plan
    })
}

/// What a run over these images would be.
fn plan(settings: &RunSettings, index: &ImageIndex) -> Outcome {
    Outcome {
        ending: Ending::DryRun,
        run: settings.out.clone(),
        checkpoint: None,
        step: 0,
        total_steps: settings.config.total_steps(index.len()) as u64,
        images: index.len(),
        loss: None,
        loss_image: None,
        loss_patch: None,
        seconds: 0.0,
        message: None,
    }
}

/// Time and images since the last line of the log.
struct Window {
    since: Instant,
    images: u64,
    waited: f64,
}

struct Run<'a> {
    settings: &'a RunSettings,
    config: &'a TrainConfig,
    index: Arc<ImageIndex>,
    checkpoints: PathBuf,
    schedules: Schedules,
    batch_plan: BatchPlan,
    trainer: Trainer,
    loader: Loader,
    log: MetricsLog,
    progress: Progress,
    guard: CollapseGuard,
    probe: Option<Probe>,
    window: Window,
    /// Steps done or skipped.
    step: u64,
    total: u64,
    per_epoch: u64,
    /// Non-finite steps in a row.
    skipped: usize,
    rollbacks: usize,
    newest: Option<PathBuf>,
    last: Option<Metrics>,
    warned: bool,
}

impl<'a> Run<'a> {
    fn new(
        settings: &'a RunSettings,
        index: Arc<ImageIndex>,
        start: Start,
        checkpoints: PathBuf,
        probe: Option<Probe>,
    ) -> Result<Self, TrainError> {
        let config = &settings.config;
        let per_epoch = config.steps_per_epoch(index.len()) as u64;
        let total = config.total_steps(index.len()) as u64;
        let step = start.step;
        let trainer = start.trainer;
        let resumed = start.checkpoint.is_some().then_some(step);
        let log = MetricsLog::open(&settings.out, resumed, config.log.tensorboard)?;
        let progress = Progress::new(total, step, config.head.class_prototypes, config.head.patch_prototypes);
        let bad = probe.iter().flat_map(Probe::bad);
        let left_out = bad.map(|(name, reason)| format!("warning: the probe leaves out `{name}`: {reason}"));
        for line in start.remarks.iter().cloned().chain(left_out) {
            progress.say(&line);
        }
        let batch_plan = BatchPlan {
            accumulate: config.optim.accumulate,
            augment: config.augment.clone(),
            drop_path_applications: trainer.student.backbone.drop_path_applications(),
            seed: config.seed,
            dtype: settings.compute.dtype,
        };
        Ok(Self {
            settings,
            config,
            loader: loader(settings, &index, step)?,
            index,
            checkpoints,
            schedules: Schedules::new(config, per_epoch, total),
            batch_plan,
            trainer,
            log,
            progress,
            guard: start.guard.unwrap_or_else(|| CollapseGuard::new(config.guard.collapse_steps)),
            probe,
            window: Window { since: Instant::now(), images: 0, waited: 0.0 },
            step,
            total,
            per_epoch,
            skipped: start.skipped,
            rollbacks: 0,
            newest: start.checkpoint,
            last: None,
            warned: false,
        })
    }

    fn train(&mut self) -> Result<(Ending, Option<String>), TrainError> {
        while self.step < self.total {
            if self.settings.interrupted.load(Ordering::Relaxed) > 0 {
                self.save()?;
                return Ok((Ending::Interrupted, None));
            }
            let batch = self.loader.next()?;
            let crops = self.batch_plan.micro_batches(&batch, &self.settings.compute.device)?;
            let schedule = self.schedules.at(self.step);
            let outcome = self.trainer.step(&crops, &schedule)?;
            self.step += 1;
            self.window.images += batch.images.len() as u64;
            self.progress.step(self.step);
            match outcome {
                Ok(report) => {
                    self.skipped = 0;
                    if let Some(message) = self.after_step(&report, &schedule)? {
                        self.save()?;
                        return Ok((Ending::Guard, Some(message)));
                    }
                }
                Err(fault) => {
                    if let Some(message) = self.after_fault(&fault, &schedule, &batch)? {
                        return Ok((Ending::Guard, Some(message)));
                    }
                }
            }
            let interval = self.config.checkpoint_interval(self.index.len()) as u64;
            if self.step.is_multiple_of(interval) && self.step < self.total {
                self.save()?;
            }
            let reports = self.config.log.report_every_steps as u64;
            if reports > 0 && self.step.is_multiple_of(reports) && self.step < self.total {
                self.report();
            }
        }
        if self.newest.as_deref().is_none_or(|path| !path.ends_with(checkpoint::folder_name(self.step))) {
            self.save()?;
        }
        Ok((Ending::Done, None))
    }

    /// Logs if it is time to; tells why to stop if the features have collapsed.
    fn after_step(&mut self, report: &StepReport, schedule: &Schedule) -> Result<Option<String>, TrainError> {
        let every = self.config.log.every_steps.max(1) as u64;
        let probe = self.probe.as_ref().filter(|probe| probe.is_due(self.step));
        if probe.is_none() && self.step != 1 && !self.step.is_multiple_of(every) && self.step != self.total {
            return Ok(None);
        }
        let ops = Ops::from(self.config.ops);
        let feature_std = vitals::feature_std(&report.monitor.features, ops)?;
        let agreement = vitals::positives_agreement(&report.monitor, &self.trainer.centers)?;
        let absent = |value: Option<f64>| value.unwrap_or(f64::NAN);
        let seconds = self.window.since.elapsed().as_secs_f64().max(1e-9);
        let waited = self.loader.data_wait().total;
        // behind the clock: a probe is no training time
        let score = match probe {
            Some(probe) => probe.run(&self.trainer.teacher, &self.settings.compute.device)?,
            None => ProbeScore::default(),
        };
        let metrics = Metrics {
            step: self.step,
            epoch: self.step as f64 / self.per_epoch as f64,
            loss: report.loss,
            loss_image: report.loss_image,
            loss_patch: absent(report.loss_patch),
            lr: schedule.lr,
            weight_decay: schedule.weight_decay,
            momentum: schedule.momentum,
            teacher_temp: schedule.teacher_temp,
            grad_norm: report.grad_norm,
            teacher_entropy_image: report.image_stats.teacher_entropy,
            teacher_entropy_patch: absent(report.patch_stats.map(|stats| stats.teacher_entropy)),
            kl_image: report.image_stats.kl,
            kl_patch: absent(report.patch_stats.map(|stats| stats.kl)),
            feature_std,
            positives_agreement: absent(agreement),
            images_per_s: self.window.images as f64 / seconds,
            data_wait: ((waited - self.window.waited) / seconds).clamp(0.0, 1.0),
            knn_top1: score.knn_top1,
            retrieval_miou: score.retrieval_miou,
        };
        self.window = Window { since: Instant::now(), images: 0, waited };
        self.log.write(&metrics)?;
        self.progress.log(&metrics);
        self.last = Some(metrics);
        Ok(self.collapse(&metrics))
    }

    fn collapse(&mut self, metrics: &Metrics) -> Option<String> {
        let term = |loss, teacher_entropy, prototypes: usize| TermVitals {
            loss,
            teacher_entropy,
            ln_k: (prototypes as f64).ln(),
        };
        let head = &self.config.head;
        let vitals = Vitals {
            image: term(metrics.loss_image, metrics.teacher_entropy_image, head.class_prototypes),
            patch: self
                .config
                .patch
                .enabled
                .then(|| term(metrics.loss_patch, metrics.teacher_entropy_patch, head.patch_prototypes)),
            feature_std: metrics.feature_std,
            dim: Architecture::from_config(self.config).dim,
        };
        let alarm = self.guard.observe(self.step, &vitals)?;
        let message = format!(
            "collapse: since step {} {} (checked at every log step); try: {}",
            alarm.since,
            alarm.sign,
            alarm.sign.advice()
        );
        match self.config.guard.on_collapse {
            OnCollapse::Stop => Some(message),
            OnCollapse::Warn => {
                if !std::mem::replace(&mut self.warned, true) {
                    self.progress.say(&format!("warning: {message}"));
                }
                None
            }
        }
    }

    /// A step that was not applied: goes on, rolls back, or tells why to stop.
    fn after_fault(
        &mut self,
        fault: &NonFinite,
        schedule: &Schedule,
        batch: &Batch,
    ) -> Result<Option<String>, TrainError> {
        let images: Vec<String> = batch.images.iter().map(|&image| self.index.name(image as usize)).collect();
        let lr = schedule.lr;
        let line = format!("{}\t{}\t{}\t{lr}\t{}\n", self.step, fault.term, fault.value, images.join("\t"));
        append(&self.settings.out.join(NON_FINITE), &line)?;
        self.skipped += 1;
        let what = format!("step {}: {} is {} (learning rate {lr:.3e})", self.step, fault.term, fault.value);
        if self.skipped <= self.config.guard.max_skipped {
            self.progress.say(&format!("warning: {what}; the step is skipped"));
            return Ok(None);
        }
        self.rollbacks += 1;
        let reopened = match self.rollbacks <= self.config.guard.max_rollbacks {
            true => checkpoint::open_latest(&self.checkpoints)?,
            false => None,
        };
        let Some(checkpoint) = reopened else {
            let first: Vec<&str> = images.iter().take(4).map(String::as_str).collect();
            return Ok(Some(format!(
                "{what}, {} times in a row; nothing was applied. The images of each such batch are in {} ({}, …). \
                 Try a lower `optim.lr_per_256`, a longer `optim.warmup_epochs`, or look at the images",
                self.skipped,
                self.settings.out.join(NON_FINITE).display(),
                first.join(", "),
            )));
        };
        self.progress.say(&format!(
            "warning: {what}, {} times in a row; going back to step {}",
            self.skipped,
            checkpoint.step()
        ));
        self.roll_back(&checkpoint)?;
        Ok(None)
    }

    fn roll_back(&mut self, checkpoint: &Checkpoint) -> Result<(), TrainError> {
        let state: RunState = checkpoint.state()?;
        self.trainer = Trainer::from_checkpoint(self.config, checkpoint, &self.settings.compute.device)?;
        self.step = state.step;
        self.guard = state.guard;
        self.skipped = 0;
        self.log.rewind(state.step)?;
        self.loader = loader(self.settings, &self.index, state.step)?;
        self.window = Window { since: Instant::now(), images: 0, waited: 0.0 };
        Ok(())
    }

    /// Renews the page of the run. Its failure is none of the run; its time does not count as training.
    fn report(&mut self) {
        let started = Instant::now();
        let settings = ReportSettings {
            run: self.settings.out.clone(),
            out: None,
            evaluations: None,
            images: Vec::new(),
            // the memory of a GPU belongs to the training
            device: Device::Cpu,
        };
        if let Err(error) = report::write(&settings) {
            let cause = error.source().map(|source| format!(": {source}")).unwrap_or_default();
            self.progress.say(&format!("warning: there is no new report: {error}{cause}"));
        }
        self.window.since += started.elapsed();
    }

    fn save(&mut self) -> Result<(), TrainError> {
        self.log.sync()?;
        let state = RunState {
            step: self.step,
            epoch: self.step as f64 / self.per_epoch as f64,
            cursor: self.step * self.config.optim.batch as u64,
            config: self.config.clone(),
            config_hash: self.config.config_hash(),
            data_hash: start::data_hash(&self.index),
            guard: self.guard.clone(),
            skipped: self.skipped,
        };
        let tensors = self.trainer.to_parts();
        let parts: Vec<(&str, &[_])> =
            PARTS.iter().zip(&tensors).map(|(name, part)| (*name, part.as_slice())).collect();
        let keep = &self.config.checkpoint;
        let folder =
            checkpoint::save(&self.checkpoints, self.step, &parts, &state, keep.keep, keep.keep_every)?;
        self.newest = Some(folder);
        Ok(())
    }
}

fn loader(settings: &RunSettings, index: &Arc<ImageIndex>, step: u64) -> Result<Loader, TrainError> {
    let config = &settings.config;
    Ok(Loader::start(LoaderSettings {
        index: Arc::clone(index),
        augment: config.augment.clone(),
        seed: config.seed,
        batch: config.optim.batch,
        workers: config.data.workers,
        prefetch: config.data.prefetch,
        first_batch: step,
        max_bad: config.data.max_bad,
        max_megapixels: config.data.max_megapixels,
        quarantine: Some(settings.out.join(QUARANTINE)),
    })?)
}

fn append(path: &Path, line: &str) -> Result<(), TrainError> {
    let write = || OpenOptions::new().create(true).append(true).open(path)?.write_all(line.as_bytes());
    write().map_err(|source| TrainError::Io { path: path.into(), source })
}
