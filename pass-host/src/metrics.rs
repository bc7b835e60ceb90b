//! What a run tells while it runs: `metrics.jsonl`, TensorBoard events, and the progress line.

mod jsonl;
mod progress;
mod tensorboard;

use std::path::{Path, PathBuf};

use serde::Serialize;

pub use progress::Progress;

/// The file of one JSON object per log step.
pub const METRICS: &str = "metrics.jsonl";

/// One log step. The field names are the keys of `metrics.jsonl`; a value that is not finite is written as `null`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Metrics {
    /// Optimizer steps done.
    pub step: u64,
    /// Passes over the images, with fraction.
    pub epoch: f64,
    /// `loss_image + patch.weight · loss_patch`.
    pub loss: f64,
    /// Class-token loss, nats.
    pub loss_image: f64,
    /// Patch loss, nats.
    pub loss_patch: f64,
    /// Learning rate of this step.
    pub lr: f64,
    /// Weight decay of this step.
    pub weight_decay: f64,
    /// Momentum of the teacher.
    pub momentum: f64,
    /// Temperature of the teacher; absent if neither DINO nor the patch objective uses it.
    pub teacher_temp: f64,
    /// Norm of the whole gradient before clipping.
    pub grad_norm: f64,
    /// Mean entropy of the teacher's class distributions, nats; absent for a contrastive method.
    pub teacher_entropy_image: f64,
    /// Mean entropy of the teacher's patch distributions, nats.
    pub teacher_entropy_patch: f64,
    /// KL divergence of teacher and student, class tokens, nats; absent for a contrastive method.
    pub kl_image: f64,
    /// KL divergence of teacher and student, patches, nats.
    pub kl_patch: f64,
    /// Standard deviation of the normalized features, mean over channels.
    pub feature_std: f64,
    /// Share of (patch, positive) pairs whose teacher prototypes are the same.
    pub positives_agreement: f64,
    /// Training speed since the last line.
    pub images_per_s: f64,
    /// Share of the time spent waiting for data, in `[0, 1]`.
    pub data_wait: f64,
    /// Share of the images whose own key is nearest to their query; a key only of contrastive methods.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub contrast_accuracy: Option<f64>,
    /// Share of the probe's images that their nearest neighbors classify right; a key only of the steps with such a probe.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub knn_top1: Option<f64>,
    /// Mean intersection over union of scenes parsed by the nearest patches; a key only of the steps with such a probe.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retrieval_miou: Option<f64>,
}

impl Metrics {
    /// The scalars as TensorBoard tags; what is absent is not finite.
    fn scalars(&self) -> [(&'static str, f64); 20] {
        [
            ("progress/epoch", self.epoch),
            ("loss/total", self.loss),
            ("loss/image", self.loss_image),
            ("loss/patch", self.loss_patch),
            ("schedule/lr", self.lr),
            ("schedule/weight_decay", self.weight_decay),
            ("schedule/momentum", self.momentum),
            ("schedule/teacher_temp", self.teacher_temp),
            ("health/grad_norm", self.grad_norm),
            ("health/teacher_entropy_image", self.teacher_entropy_image),
            ("health/teacher_entropy_patch", self.teacher_entropy_patch),
            ("health/kl_image", self.kl_image),
            ("health/kl_patch", self.kl_patch),
            ("health/feature_std", self.feature_std),
            ("health/positives_agreement", self.positives_agreement),
            ("health/contrast_accuracy", self.contrast_accuracy.unwrap_or(f64::NAN)),
            ("speed/images_per_s", self.images_per_s),
            ("speed/data_wait", self.data_wait),
            ("probe/knn_top1", self.knn_top1.unwrap_or(f64::NAN)),
            ("probe/retrieval_miou", self.retrieval_miou.unwrap_or(f64::NAN)),
        ]
    }
}

/// Why metrics could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MetricsError {
    /// The file system refused.
    #[error("cannot {action} `{}`", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
}

fn io(action: &'static str, path: &Path) -> impl Fn(std::io::Error) -> MetricsError {
    move |source| MetricsError::Io { action, path: path.to_owned(), source }
}

/// The logs of one run: `metrics.jsonl` and, if wanted, TensorBoard events, both in the run folder.
#[derive(Debug)]
pub struct MetricsLog {
    run: PathBuf,
    lines: jsonl::Lines,
    events: Option<tensorboard::Events>,
}

impl MetricsLog {
    /// Opens the logs. `resume` = the step of the checkpoint that is continued: lines after it are removed (atomically),
    /// and TensorBoard is told to forget what came after it. `None` starts empty.
    ///
    /// # Errors
    /// [`MetricsError::Io`].
    pub fn open(run: &Path, resume: Option<u64>, tensorboard: bool) -> Result<Self, MetricsError> {
        let lines = jsonl::Lines::open(&run.join(METRICS), resume)?;
        let events = if tensorboard { Some(tensorboard::Events::create(run, resume)?) } else { None };
        Ok(Self { run: run.to_owned(), lines, events })
    }

    /// Appends one log step; it is with the operating system when this returns.
    ///
    /// # Errors
    /// [`MetricsError::Io`].
    pub fn write(&mut self, metrics: &Metrics) -> Result<(), MetricsError> {
        self.lines.write(metrics)?;
        match &mut self.events {
            Some(events) => events.write(metrics.step, &metrics.scalars()),
            None => Ok(()),
        }
    }

    /// Makes everything written so far durable; call it before a checkpoint, so that no checkpoint is newer than its log.
    ///
    /// # Errors
    /// [`MetricsError::Io`].
    pub fn sync(&mut self) -> Result<(), MetricsError> {
        self.lines.sync()
    }

    /// Forgets everything after `step`: the run goes back to the checkpoint of that step.
    ///
    /// # Errors
    /// [`MetricsError::Io`].
    pub fn rewind(&mut self, step: u64) -> Result<(), MetricsError> {
        *self = Self::open(&self.run, Some(step), self.events.is_some())?;
        Ok(())
    }
}
