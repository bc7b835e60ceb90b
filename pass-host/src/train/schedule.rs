//! The schedules of a run as one function of the step.

use pass_core::schedule::{Cosine, TeacherTemperature, WarmupCosine};

use super::trainer::Schedule;
use crate::config::TrainConfig;

/// Learning rate, weight decay, teacher momentum and temperature over the whole run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedules {
    lr: WarmupCosine,
    weight_decay: Cosine,
    momentum: Cosine,
    teacher_temp: TeacherTemperature,
    steps_per_epoch: u64,
    freeze_last_layer_steps: u64,
}

impl Schedules {
    /// Schedules of a run over `images` images by `ranks` ranks.
    pub fn new(config: &TrainConfig, images: usize, ranks: usize) -> Self {
        let steps_per_epoch = config.steps_per_epoch(images, ranks) as u64;
        let total_steps = config.total_steps(images, ranks) as u64;
        let optim = &config.optim;
        let in_steps = |epochs: f64| (epochs * steps_per_epoch as f64).round() as u64;
        Self {
            lr: WarmupCosine {
                peak: config.peak_lr(ranks),
                end: optim.min_lr,
                warmup_steps: in_steps(optim.warmup_epochs).min(total_steps),
                total_steps,
            },
            weight_decay: Cosine { start: optim.weight_decay, end: optim.weight_decay_end, total_steps },
            momentum: Cosine { start: optim.momentum, end: 1.0, total_steps },
            teacher_temp: TeacherTemperature {
                start: config.image.teacher_temp_start,
                end: config.image.teacher_temp_end,
                warmup_epochs: config.image.teacher_temp_warmup_epochs.round() as u64,
            },
            steps_per_epoch,
            freeze_last_layer_steps: in_steps(optim.freeze_last_layer_epochs),
        }
    }

    /// What the schedules say about `step`, counted from 0.
    pub fn at(&self, step: u64) -> Schedule {
        Schedule {
            lr: self.lr.at(step),
            weight_decay: self.weight_decay.at(step),
            momentum: self.momentum.at(step),
            next_momentum: self.momentum.at(step + 1),
            teacher_temp: self.teacher_temp.at(step / self.steps_per_epoch.max(1)),
            train_last_layer: step >= self.freeze_last_layer_steps,
        }
    }
}
