//! One optimizer step: forward, centers, backward, clipping, AdamW, momentum teacher (SEMANTICS §5).

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Result, Tensor};

use crate::config::TrainConfig;
use crate::model::parameters::{Parameters, Role};
use crate::model::{Architecture, Network};
use crate::objective::center::Centers;
use crate::objective::forward::{Crops, Losses, Monitor, Objective};
use crate::ops::{Ops, Statistics, Stats};
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
        Ok(Self {
            student: Network::new(architecture, student, ops)?,
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
        let store = loss.backward()?;
        let mut gradients = HashMap::new();
        for (name, parameter) in self.student.parameters.iter().filter(|(_, parameter)| parameter.trainable) {
            let Some(gradient) = store.get(&parameter.tensor) else {
                candle_core::bail!("no gradient reached `{name}`");
            };
            gradients.insert(name.to_string(), gradient.clone());
        }
        Ok(gradients)
    }

    /// One step over the micro-batches of a batch. Anything not finite is found before anything changes.
    ///
    /// Losses, statistics and gradient norms stay where they are computed and are read together, once, before the
    /// update: a device works through the whole step without being waited for in between.
    pub fn step(
        &mut self,
        micro_batches: &[Crops],
        schedule: &Schedule,
    ) -> Result<std::result::Result<StepReport, NonFinite>> {
        let share = 1.0 / micro_batches.len() as f64;
        let mut gradients: Option<Gradients> = None;
        let mut teacher_means = Vec::with_capacity(micro_batches.len());
        let (mut scalars, mut monitor) = (Vec::with_capacity(micro_batches.len() + 1), None);
        for crops in micro_batches {
            let losses = self.losses(crops, schedule.teacher_temp)?;
            scalars.push(losses.scalars()?);
            let scaled = if micro_batches.len() == 1 { losses.total } else { (losses.total * share)? };
            let part_gradients = self.gradients(&scaled)?;
            gradients = Some(match gradients {
                None => part_gradients,
                Some(sum) => add(sum, &part_gradients)?,
            });
            teacher_means.push(losses.teacher_mean);
            monitor = Some(losses.monitor);
        }
        let (Some(monitor), Some(gradients)) = (monitor, gradients) else {
            candle_core::bail!("a step without micro-batches");
        };
        let (names, norms) = self.optimizer.norms_on_device(&gradients)?;
        scalars.push(norms);
        // the one place where the host waits
        let numbers = Tensor::cat(&scalars, 0)?.to_vec1::<f64>()?;
        let (losses, norms) = numbers.split_at(numbers.len() - names.len());
        let mut report = StepReport::new(monitor);
        for numbers in losses.chunks_exact(losses.len() / micro_batches.len()) {
            if let Err(fault) = report.add(numbers, share) {
                return Ok(Err(fault));
            }
        }
        let norms: BTreeMap<String, f64> = names.into_iter().zip(norms.iter().copied()).collect();
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

impl StepReport {
    fn new(monitor: Monitor) -> Self {
        Self {
            loss: 0.0,
            loss_image: 0.0,
            loss_patch: None,
            grad_norm: 0.0,
            image_stats: Stats::default(),
            patch_stats: None,
            monitor,
        }
    }

    /// Adds the share of a micro-batch with these [`Losses::scalars`].
    fn add(&mut self, scalars: &[f64], share: f64) -> std::result::Result<(), NonFinite> {
        let (&[loss, image, image_entropy, image_kl], patch) =
            scalars.split_first_chunk().unwrap_or((&[f64::NAN; 4], &[]));
        let terms = [("class loss", Some(&image)), ("patch loss", patch.first())];
        for (term, value) in terms {
            if let Some(&value) = value.filter(|value| !value.is_finite()) {
                return Err(NonFinite { term: term.into(), value });
            }
        }
        let plus = |sum: Stats, entropy: f64, kl: f64| Stats {
            teacher_entropy: sum.teacher_entropy + entropy * share,
            kl: sum.kl + kl * share,
        };
        self.loss += loss * share;
        self.loss_image += image * share;
        self.image_stats = plus(self.image_stats, image_entropy, image_kl);
        if let &[patch, entropy, kl] = patch {
            self.loss_patch = Some(self.loss_patch.unwrap_or_default() + patch * share);
            self.patch_stats = Some(plus(self.patch_stats.unwrap_or_default(), entropy, kl));
        }
        Ok(())
    }
}

impl Losses {
    /// Total, class loss, its entropy and divergence, and with a patch objective patch loss, its entropy and divergence:
    /// `[4]` or `[7]` in `f64`, where they were computed.
    fn scalars(&self) -> Result<Tensor> {
        let device = self.total.device();
        let loss = |loss: &Tensor| loss.detach().to_dtype(DType::F64)?.reshape(1);
        let stats = |stats: &Statistics| stats.on_device().to_device(device);
        let mut scalars = vec![loss(&self.total)?, loss(&self.image)?, stats(&self.image_stats)?];
        if let (Some(patch), Some(patch_stats)) = (&self.patch, &self.patch_stats) {
            scalars.extend([loss(patch)?, stats(patch_stats)?]);
        }
        Tensor::cat(&scalars, 0)
    }
}

fn add(mut sum: Gradients, more: &Gradients) -> Result<Gradients> {
    for (name, gradient) in more {
        if let Some(total) = sum.get_mut(name) {
            *total = (&*total + gradient)?;
        }
    }
    Ok(sum)
}
