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
#[cfg(test)]
mod tests;
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
use crate::config::derived::ChanceLosses;
use crate::config::run::{Ending, Outcome, RunSettings};
use crate::config::{OnCollapse, TrainConfig};
use crate::data::index::ImageIndex;
use crate::data::loader::{Batch, Loader, LoaderSettings, Part};
use crate::data::order::Order;
use crate::distributed::Ranks;
use crate::metrics::{Metrics, MetricsLog, Progress};
use crate::model::Architecture;
use crate::objective::forward::PATCH_CENTER;
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

/// Trains until all steps are done, the person interrupts, or the guard stops. Of several ranks every one calls it.
pub fn run(settings: &RunSettings) -> Result<Outcome, TrainError> {
    let started = Instant::now();
    let (config, ranks) = (&settings.config, &settings.ranks);
    let cache = (!settings.dry_run).then(|| settings.out.join("index.bin"));
    let new = ranks.is_first() && !settings.out.exists();
    let index =
        ranks.decide(|| ImageIndex::build(&config.data, cache.as_deref()).map_err(TrainError::from))?;
    let index = Arc::new(index);
    let checked = config.check_images(index.len(), ranks.size());
    let checked = checked.and_then(|()| config.check_batch(ranks.size())).map_err(TrainError::from);
    let probe = match ranks.first(|| checked.and_then(|()| Ok(Probe::open(config)?))) {
        Ok(probe) => probe.flatten(),
        Err(error) => {
            if new {
                // the cached index is all there is; a run that cannot start leaves nothing behind
                std::fs::remove_dir_all(&settings.out).ok();
            }
            return Err(error);
        }
    };
    if settings.dry_run {
        return Ok(plan(settings, &index));
    }
    let mut lock = None;
    let start = Start::on_all_ranks(settings, || {
        lock = Some(checkpoint::lock_run(&settings.out)?);
        let start = match Start::checkpoint(settings)? {
            Some(checkpoint) => Start::resumed(settings, &index, &checkpoint)?,
            None => Start::fresh(settings)?,
        };
        if start.place.checkpoint.is_none() {
            checkpoint::write_atomically(&settings.out.join(CONFIG), settings.config_toml().as_bytes())?;
        }
        checkpoint::prepare(&settings.out.join(CHECKPOINTS))?;
        Ok(start)
    })?;
    let mut run = Run::new(settings, index, start, probe)?;
    let result = run.train();
    if result.is_ok() && config.log.report_every_steps > 0 {
        run.report();
    }
    run.progress.finish();
    let (ending, message) = result?;
    ranks.barrier()?;
    let last = run.last.unwrap_or_default();
    let logged = |value: f64| run.last.is_some().then_some(value).filter(|value| value.is_finite());
    Ok(Outcome {
        ending,
        checkpoint: run.newest,
        step: run.step,
        total_steps: run.total,
        loss: logged(last.loss),
        loss_image: logged(last.loss_image),
        loss_patch: logged(last.loss_patch),
        seconds: started.elapsed().as_secs_f64(),
        message,
        ..plan(settings, &run.index)
    })
}

/// What a run over these images would be.
fn plan(settings: &RunSettings, index: &ImageIndex) -> Outcome {
    Outcome {
        ending: Ending::DryRun,
        run: settings.out.clone(),
        checkpoint: None,
        step: 0,
        total_steps: settings.config.total_steps(index.len(), settings.ranks.size()) as u64,
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
    ranks: &'a Ranks,
    index: Arc<ImageIndex>,
    order: Order,
    checkpoints: PathBuf,
    schedules: Schedules,
    batch_plan: BatchPlan,
    trainer: Trainer,
    loader: Loader,
    /// Of the first rank.
    log: Option<MetricsLog>,
    progress: Progress,
    guard: CollapseGuard,
    chance: ChanceLosses,
    probe: Option<Probe>,
    window: Window,
    /// Steps done or skipped.
    step: u64,
    /// Images of the endless sequence that are used.
    cursor: u64,
    total: u64,
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
        probe: Option<Probe>,
    ) -> Result<Self, TrainError> {
        let (config, ranks) = (&settings.config, &settings.ranks);
        let order = config.order(index.len(), ranks.size());
        let Start { trainer, place, remarks } = start;
        let total = match config.optim.steps {
            0 => place.step + order.steps_left(place.cursor, config.optim.epochs as u64),
            steps => steps as u64,
        };
        let log = || {
            let resumed = place.checkpoint.is_some().then_some(place.step);
            MetricsLog::open(&settings.out, resumed, config.log.tensorboard)
        };
        let log = ranks.is_first().then(log).transpose()?;
        let chance = config.chance_losses(order.batch as f64);
        let progress = Progress::new(total, place.step, chance);
        let progress = if ranks.is_first() { progress } else { progress.silent() };
        let bad = probe.iter().flat_map(Probe::bad);
        let left_out = bad.map(|(name, reason)| format!("warning: the probe leaves out `{name}`: {reason}"));
        for line in remarks.into_iter().chain(left_out) {
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
            ranks,
            loader: loader(settings, &index, place.cursor)?,
            schedules: Schedules::new(config, index.len(), ranks.size()),
            index,
            order,
            checkpoints: settings.out.join(CHECKPOINTS),
            batch_plan,
            trainer,
            log,
            progress,
            guard: place.guard.unwrap_or_else(|| CollapseGuard::new(config.guard.collapse_steps)),
            chance,
            probe,
            window: Window { since: Instant::now(), images: 0, waited: 0.0 },
            step: place.step,
            cursor: place.cursor,
            total,
            skipped: place.skipped,
            rollbacks: 0,
            newest: place.checkpoint,
            last: None,
            warned: false,
        })
    }

    /// Where the schedules stand: a run of so many steps counts them, a run of so many epochs the images.
    fn schedule_step(&self) -> u64 {
        if self.config.optim.steps > 0 { self.step } else { self.order.steps(self.cursor) }
    }

    /// Passes over the images done, with fraction.
    fn epoch(&self) -> f64 {
        self.order.steps(self.cursor) as f64 / self.order.steps_per_epoch() as f64
    }

    /// The next batch of this rank. Every rank learns which images the others found bad.
    fn next_batch(&mut self) -> Result<Batch, TrainError> {
        let batch = self.loader.next()?;
        let found = self.loader.take_found();
        if self.ranks.any(!found.is_empty())? {
            for (image, reason) in self.ranks.exchange(&found)?.into_iter().flatten() {
                self.loader.learn_bad(image, &reason)?;
            }
            self.ranks.agree(self.loader.check_share_of_bad(batch.start).map_err(TrainError::from))?;
        }
        Ok(batch)
    }

    fn train(&mut self) -> Result<(Ending, Option<String>), TrainError> {
        while self.step < self.total {
            if self.ranks.any(self.settings.interrupted.load(Ordering::Relaxed) > 0)? {
                self.save()?;
                return Ok((Ending::Interrupted, None));
            }
            let batch = self.next_batch()?;
            let crops = self.batch_plan.micro_batches(&batch, &self.settings.compute.device)?;
            let schedule = self.schedules.at(self.schedule_step());
            let outcome = self.trainer.step(&crops, &schedule)?;
            self.step += 1;
            self.cursor = batch.start + self.order.batch;
            self.window.images += self.order.batch;
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
            let interval = self.config.checkpoint_interval(self.index.len(), self.ranks.size()) as u64;
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
        let probes = self.config.probe.every_steps as u64;
        let probed = probes > 0 && self.step.is_multiple_of(probes);
        if !probed && self.step != 1 && !self.step.is_multiple_of(every) && self.step != self.total {
            return Ok(None);
        }
        let moments = vitals::feature_moments(&report.monitor.features, Ops::from(self.config.ops))?;
        let feature_std = vitals::feature_std(&self.ranks.mean(moments)?)?;
        let agreement = vitals::positives_agreement(&report.monitor, self.trainer.state.get(PATCH_CENTER))?;
        let agreement = agreement.map(|pairs| self.ranks.sum(pairs)).transpose()?;
        let absent = |value: Option<f64>| value.unwrap_or(f64::NAN);
        let seconds = self.window.since.elapsed().as_secs_f64().max(1e-9);
        let waited = self.loader.data_wait().total;
        // the others wait for the rank that waits longest
        let waits = self.ranks.gather((waited - self.window.waited) / seconds)?;
        let data_wait = waits.into_iter().fold(0.0, f64::max).min(1.0);
        // behind the clock: a probe is no training time
        let score = match self.probe.as_ref().filter(|_| probed) {
            Some(probe) => probe.run(&self.trainer.teacher, &self.settings.compute.device)?,
            None => ProbeScore::default(),
        };
        let metrics = Metrics {
            step: self.step,
            epoch: self.epoch(),
            loss: report.loss,
            loss_image: report.loss_image,
            loss_patch: absent(report.loss_patch),
            lr: schedule.lr,
            weight_decay: schedule.weight_decay,
            momentum: schedule.momentum,
            teacher_temp: absent(self.config.compares_distributions().then_some(schedule.teacher_temp)),
            grad_norm: report.grad_norm,
            teacher_entropy_image: absent(report.image_stats.map(|stats| stats.teacher_entropy)),
            teacher_entropy_patch: absent(report.patch_stats.map(|stats| stats.teacher_entropy)),
            kl_image: absent(report.image_stats.map(|stats| stats.kl)),
            kl_patch: absent(report.patch_stats.map(|stats| stats.kl)),
            feature_std,
            positives_agreement: absent(agreement.map(|[same, all]| same / all.max(1.0))),
            images_per_s: self.window.images as f64 / seconds,
            data_wait,
            contrast_accuracy: report.contrast_accuracy,
            knn_top1: score.knn_top1,
            retrieval_miou: score.retrieval_miou,
        };
        self.window = Window { since: Instant::now(), images: 0, waited };
        if let Some(log) = &mut self.log {
            log.write(&metrics)?;
        }
        self.progress.log(&metrics);
        self.last = Some(metrics);
        Ok(self.collapse(&metrics))
    }

    fn collapse(&mut self, metrics: &Metrics) -> Option<String> {
        let term = |loss, teacher_entropy, chance| TermVitals { loss, teacher_entropy, chance };
        let ChanceLosses { image, patch, .. } = self.chance;
        let vitals = Vitals {
            image: term(metrics.loss_image, metrics.teacher_entropy_image, image),
            patch: self
                .config
                .patch
                .enabled
                .then(|| term(metrics.loss_patch, metrics.teacher_entropy_patch, patch)),
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
        let images = self.ranks.exchange(&batch.images)?.into_iter().flatten();
        let images: Vec<String> = images.map(|image| self.index.name(image as usize)).collect();
        let lr = schedule.lr;
        let line = format!("{}\t{}\t{}\t{lr}\t{}\n", self.step, fault.term, fault.value, images.join("\t"));
        if self.ranks.is_first() {
            append(&self.settings.out.join(NON_FINITE), &line)?;
        }
        self.skipped += 1;
        let what = format!("step {}: {} is {} (learning rate {lr:.3e})", self.step, fault.term, fault.value);
        if self.skipped <= self.config.guard.max_skipped {
            self.progress.say(&format!("warning: {what}; the step is skipped"));
            return Ok(None);
        }
        self.rollbacks += 1;
        let reopened = match self.rollbacks <= self.config.guard.max_rollbacks {
            true => self.reopen()?,
            false => None,
        };
        let Some(start) = reopened else {
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
            self.skipped, start.place.step
        ));
        self.roll_back(start)?;
        Ok(None)
    }

    /// The last checkpoint, if there is one.
    fn reopen(&self) -> Result<Option<Start>, TrainError> {
        let open = || {
            Ok::<_, TrainError>(
                checkpoint::open_latest(&self.checkpoints)?.map(|found| found.path().to_owned()),
            )
        };
        let Some(path) = self.ranks.decide(open)? else { return Ok(None) };
        let resume = || Start::resumed(self.settings, &self.index, &Checkpoint::open(&path)?);
        Start::on_all_ranks(self.settings, resume).map(Some)
    }

    fn roll_back(&mut self, start: Start) -> Result<(), TrainError> {
        let Start { trainer, place, .. } = start;
        self.trainer = trainer;
        (self.step, self.cursor) = (place.step, place.cursor);
        if let Some(guard) = place.guard {
            self.guard = guard;
        }
        self.skipped = 0;
        if let Some(log) = &mut self.log {
            log.rewind(place.step)?;
        }
        self.loader = loader(self.settings, &self.index, place.cursor)?;
        self.window = Window { since: Instant::now(), images: 0, waited: 0.0 };
        Ok(())
    }

    /// Renews the page of the run. Its failure is none of the run; its time does not count as training.
    fn report(&mut self) {
        if !self.ranks.is_first() {
            return;
        }
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

    /// Writes a checkpoint, on the first rank, once all ranks agree on what it would hold.
    fn save(&mut self) -> Result<(), TrainError> {
        self.check_ranks()?;
        self.newest = Some(self.checkpoints.join(checkpoint::folder_name(self.step)));
        let Some(log) = &mut self.log else { return Ok(()) };
        log.sync()?;
        let state = RunState {
            step: self.step,
            epoch: self.epoch(),
            cursor: self.cursor,
            batch: self.order.batch,
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
        checkpoint::save(&self.checkpoints, self.step, &parts, &state, keep.keep, keep.keep_every)?;
        Ok(())
    }

    /// Ranks that hold other weights than the first would go on with nonsense.
    fn check_ranks(&self) -> Result<(), TrainError> {
        if !self.ranks.several() {
            return Ok(());
        }
        let checksums = self.ranks.exchange(&self.trainer.checksum()?)?;
        let ranks: Vec<usize> =
            (0..checksums.len()).filter(|&rank| checksums[rank] != checksums[0]).collect();
        match ranks.is_empty() {
            true => Ok(()),
            false => Err(TrainError::RanksDiffer { step: self.step, ranks }),
        }
    }
}

/// The loader of this rank from `cursor` on; all ranks begin with the bad images that the first knows of.
fn loader(settings: &RunSettings, index: &Arc<ImageIndex>, cursor: u64) -> Result<Loader, TrainError> {
    let (config, ranks) = (&settings.config, &settings.ranks);
    let start = |known_bad| {
        let loading = LoaderSettings {
            index: Arc::clone(index),
            augment: config.augment.clone(),
            seed: config.seed,
            batch: config.optim.batch,
            part: Part { rank: ranks.rank(), ranks: ranks.size() },
            workers: match config.data.workers {
                // the other ranks of this machine have loaders as well
                0 if ranks.several() => settings.threads,
                workers => workers,
            },
            prefetch: config.data.prefetch,
            cursor,
            max_bad: config.data.max_bad,
            max_megapixels: config.data.max_megapixels,
            quarantine: ranks.is_first().then(|| settings.out.join(QUARANTINE)),
            known_bad,
        };
        Ok::<_, TrainError>(match settings.compute.uploader(config.augment.device)? {
            Some(uploader) => Loader::uploading(loading, uploader)?,
            None => Loader::start(loading)?,
        })
    };
    let first = ranks.first(|| start(Vec::new()))?;
    let known = first.as_ref().map(|loader| {
        loader.quarantine().images().map(|(image, reason)| (image, reason.to_owned())).collect::<Vec<_>>()
    });
    let known = ranks.share(known)?;
    match first {
        Some(loader) => Ok(loader),
        None => start(known),
    }
}

fn append(path: &Path, line: &str) -> Result<(), TrainError> {
    let write = || OpenOptions::new().create(true).append(true).open(path)?.write_all(line.as_bytes());
    write().map_err(|source| TrainError::Io { path: path.into(), source })
}
