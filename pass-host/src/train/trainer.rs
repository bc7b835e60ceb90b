//! One optimizer step: forward, centers, backward, clipping, AdamW, momentum teacher (SEMANTICS §5).

use std::collections::HashMap;

use candle_core::{Device, Result, Tensor};

use crate::config::TrainConfig;
use crate::model::parameters::{Parameters, Role};
use crate::model::{Architecture, Network};
use crate::objective::center::Centers;
use crate::objective::forward::{Crops, Losses, Monitor, Objective};
use crate::ops::{Ops, Stats};
use crate::optimizer::{Gradients, Optimizer, StepSize};

/// What the schedules say about one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Learning rate.
    pub lr: f64,
    /// Weight decay of the decayed group.
    pub weight_decay: f64,
    /// Momentum of the teacher.
    pub momentum: f64,
    /// Temperature of the teacher.
    pub teacher_temp: f64,
    /// Whether the last layers of the heads are learned yet.
    pub train_last_layer: bool,
}

/// Student, teacher, centers and optimizer: everything a step changes.
pub struct Trainer {
    /// Learns by gradient.
    pub student: Network,
    /// Follows the student by momentum.
    pub teacher: Network,
    /// Centers of the teacher's outputs.
    pub centers: Centers,
    /// AdamW with its moments.
    pub optimizer: Optimizer,
    objective: Objective,
    center_momentum: f64,
    ops: Ops,
}

/// What a step did.
pub struct StepReport {
    /// Total loss.
    pub loss: f64,
    /// Class loss.
    pub loss_image: f64,
    /// Patch loss, unweighted.
    pub loss_patch: Option<f64>,
    /// L2 norm of all gradients together, before clipping.
    pub grad_norm: f64,
    /// Entropy and divergence of the class distributions.
    pub image_stats: Stats,
    /// The same for the patch distributions.
    pub patch_stats: Option<Stats>,
    /// Teacher outputs of the last micro-batch.
    pub monitor: Monitor,
}

/// A step that was not applied: weights, moments, centers and teacher are as before.
#[derive(Clone, Debug, PartialEq)]
pub struct NonFinite {
    /// What was not finite, for example `patch loss` or `gradient of backbone.pos_embed`.
    pub term: String,
    /// Its value.
    pub value: f64,
}

impl Trainer {
    /// A new run: fresh student (or `init`), the teacher its copy.
    pub fn new(config: &TrainConfig, student: Parameters, device: &Device) -> Result<Self> {
        let teacher = student.to_teacher()?;
        let architecture = Architecture::from_config(config);
        let centers = Centers::new(&architecture, device)?;
        let optimizer = Optimizer::new(&config.optim, &student, Ops::from(config.ops))?;
        Self::assemble(config, &architecture, student, teacher, centers, optimizer)
    }

    /// A run from its saved parts.
    pub fn assemble(
        config: &TrainConfig,
        architecture: &Architecture,
        student: Parameters,
        teacher: Parameters,
        centers: Centers,
        optimizer: Optimizer,
    ) -> Result<Self> {
        let ops = Ops::from(config.ops);
        let mut student = Network::new(architecture, student, ops)?;
        student.backbone = student.backbone.recomputing(config.recompute);
        Ok(Self {
            student,
            teacher: Network::new(architecture, teacher, ops)?,
            centers,
            optimizer,
            objective: Objective::from_config(config),
            center_momentum: config.image.center_momentum,
            ops,
        })
    }

    /// Fresh student weights of a configuration.
    pub fn fresh_student(config: &TrainConfig, device: &Device) -> Result<Parameters> {
        Parameters::init(&Architecture::from_config(config), Role::Student, config.seed, device)
    }

    /// Losses of one micro-batch, on the graph.
    pub fn losses(&self, crops: &Crops, teacher_temp: f64) -> Result<Losses> {
        self.objective.losses(&self.student, &self.teacher, &self.centers, crops, teacher_temp, self.ops)
    }

    /// Gradients of a scalar with respect to every trained tensor.
    pub fn gradients(&self, loss: &Tensor) -> Result<Gradients> {
        let sink = self.student.parameters.sink();
        sink.clear();
        let mut store = loss.backward()?;
        let mut gradients = HashMap::new();
        for (name, parameter) in self.student.parameters.iter().filter(|(_, parameter)| parameter.trainable) {
            let gradient = match (sink.take(&parameter.tensor), store.remove(&parameter.tensor)) {
                (Some(one), Some(other)) => (one + other)?,
                (Some(gradient), None) | (None, Some(gradient)) => gradient,
                (None, None) => candle_core::bail!("no gradient reached `{name}`"),
            };
            gradients.insert(name.to_string(), gradient);
        }
        Ok(gradients)
    }

    /// One step over the micro-batches of a batch. Anything not finite is found before anything changes.
    pub fn step(
        &mut self,
        micro_batches: &[Crops],
        schedule: &Schedule,
    ) -> Result<std::result::Result<StepReport, NonFinite>> {
        let share = 1.0 / micro_batches.len() as f64;
        let mut report: Option<StepReport> = None;
        let mut gradients: Option<Gradients> = None;
        let mut teacher_means = Vec::with_capacity(micro_batches.len());
        for crops in micro_batches {
            let losses = self.losses(crops, schedule.teacher_temp)?;
            let part = match read(&losses)? {
                Ok(part) => part,
                Err(fault) => return Ok(Err(fault)),
            };
            let scaled = if micro_batches.len() == 1 { losses.total } else { (losses.total * share)? };
            let part_gradients = self.gradients(&scaled)?;
            gradients = Some(match gradients {
                None => part_gradients,
                Some(sum) => add(sum, &part_gradients)?,
            });
            teacher_means.push(losses.teacher_mean);
            report = Some(merge(report, part, losses.monitor, losses.image_stats, losses.patch_stats, share));
        }
        let (Some(mut report), Some(gradients)) = (report, gradients) else {
            candle_core::bail!("a step without micro-batches");
        };
        let norms = self.optimizer.norms(&gradients)?;
        if let Some((name, norm)) = norms.iter().find(|(_, norm)| !norm.is_finite()) {
            return Ok(Err(NonFinite { term: format!("gradient of {name}"), value: *norm }));
        }
        report.grad_norm = norms.values().map(|norm| norm * norm).sum::<f64>().sqrt();
        self.centers = self.centers.updated(&Centers::mean(&teacher_means)?, self.center_momentum)?;
        let size = StepSize {
            lr: schedule.lr,
            weight_decay: schedule.weight_decay,
            momentum: schedule.momentum,
            train_last_layer: schedule.train_last_layer,
        };
        self.optimizer.step(&self.student.parameters, &self.teacher.parameters, &gradients, &norms, &size)?;
        Ok(Ok(report))
    }
}

struct Part {
    loss: f64,
    loss_image: f64,
    loss_patch: Option<f64>,
}

fn read(losses: &Losses) -> Result<std::result::Result<Part, NonFinite>> {
    let value = |tensor: &Tensor| Ok::<_, candle_core::Error>(f64::from(tensor.to_scalar::<f32>()?));
    let loss_image = value(&losses.image)?;
    let loss_patch = losses.patch.as_ref().map(value).transpose()?;
    let terms = [("class loss", Some(loss_image)), ("patch loss", loss_patch)];
    for (term, loss) in terms {
        if let Some(value) = loss.filter(|loss| !loss.is_finite()) {
            return Ok(Err(NonFinite { term: term.into(), value }));
        }
    }
    Ok(Ok(Part { loss: value(&losses.total)?, loss_image, loss_patch }))
}

fn add(mut sum: Gradients, more: &Gradients) -> Result<Gradients> {
    for (name, gradient) in more {
        if let Some(total) = sum.get_mut(name) {
            *total = (&*total + gradient)?;
        }
    }
    Ok(sum)
}

fn merge(
    report: Option<StepReport>,
    part: Part,
    monitor: Monitor,
    image_stats: Stats,
    patch_stats: Option<Stats>,
    share: f64,
) -> StepReport {
    let scale = |stats: Stats| Stats { teacher_entropy: stats.teacher_entropy * share, kl: stats.kl * share };
    let plus = |a: Stats, b: Stats| Stats {
        teacher_entropy: a.teacher_entropy + b.teacher_entropy,
        kl: a.kl + b.kl,
    };
    let part = StepReport {
        loss: part.loss * share,
        loss_image: part.loss_image * share,
        loss_patch: part.loss_patch.map(|loss| loss * share),
        grad_norm: 0.0,
        image_stats: scale(image_stats),
        patch_stats: patch_stats.map(scale),
        monitor,
    };
    match report {
        None => part,
        Some(sum) => StepReport {
            loss: sum.loss + part.loss,
            loss_image: sum.loss_image + part.loss_image,
            loss_patch: sum.loss_patch.zip(part.loss_patch).map(|(a, b)| a + b),
            image_stats: plus(sum.image_stats, part.image_stats),
            patch_stats: sum.patch_stats.zip(part.patch_stats).map(|(a, b)| plus(a, b)),
            ..part
        },
    }
}
