//! One optimizer step: forward, centers, backward, clipping, AdamW, momentum teacher (SEMANTICS §5).

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{Device, Result, Tensor};

use crate::config::TrainConfig;
use crate::distributed::reducer::{BUCKET_BYTES, handed_over};
use crate::distributed::{Buckets, Ranks, Reducer};
use crate::model::parameters::{Parameter, Parameters, Role};
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
    architecture: Architecture,
    objective: Objective,
    center_momentum: f64,
    ops: Ops,
    ranks: Ranks,
    buckets: Arc<Buckets>,
}

/// What a step did, over all ranks.
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
    /// Teacher outputs of the last micro-batch of this rank.
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
            architecture: architecture.clone(),
            objective: Objective::from_config(config),
            center_momentum: config.image.center_momentum,
            ops,
            ranks: Ranks::single(),
            buckets: Arc::default(),
        })
    }

    /// The same trainer as one of several, which all hold the same weights and step together.
    pub fn among(self, ranks: &Ranks) -> Self {
        Self { ranks: ranks.clone(), ..self }
    }

    /// Fresh student weights of a configuration.
    pub fn fresh_student(config: &TrainConfig, device: &Device) -> Result<Parameters> {
        Parameters::init(&Architecture::from_config(config), Role::Student, config.seed, device)
    }

    /// Losses of one micro-batch, on the graph.
    pub fn losses(&self, crops: &Crops, teacher_temp: f64) -> Result<Losses> {
        self.losses_of(&self.student, crops, teacher_temp)
    }

    fn losses_of(&self, student: &Network, crops: &Crops, teacher_temp: f64) -> Result<Losses> {
        self.objective.losses(student, &self.teacher, &self.centers, crops, teacher_temp, self.ops)
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

    /// The student whose gradients go to `reducer`.
    fn handing_over(&self, reducer: &Arc<Reducer>) -> Result<Network> {
        let wrap = |(name, parameter): (&str, &Parameter)| {
            let tensor = match parameter.trainable {
                true => handed_over(name, &parameter.tensor, reducer)?,
                false => parameter.tensor.clone(),
            };
            Ok((name.to_owned(), tensor))
        };
        let parameters = self.student.parameters.iter().map(wrap).collect::<Result<_>>()?;
        Network::new(&self.architecture, parameters, self.ops)
    }

    /// The trained tensors of `student` in the order in which the backward pass of `loss` completes their gradients; it is
    /// the same in every step.
    fn buckets(&self, loss: &Tensor, student: &Network, bytes: usize) -> Result<Buckets> {
        let trained = self.student.parameters.iter().filter(|(_, parameter)| parameter.trainable);
        let mut names = HashMap::new();
        for (name, parameter) in trained {
            names.insert(student.parameters.get(name)?.id(), (name, parameter.tensor.shape()));
        }
        let nodes = loss.sorted_nodes().into_iter();
        let order: Vec<_> = nodes.filter_map(|node| names.remove(&node.id())).collect();
        if let Some((name, _)) = names.values().next() {
            candle_core::bail!("no gradient reached `{name}`");
        }
        Ok(Buckets::new(order.into_iter().map(|(name, shape)| (name.to_owned(), shape.clone())), bytes))
    }

    /// One step over the micro-batches of a batch, of all ranks together. Anything not finite is found before anything
    /// changes, on every rank alike.
    pub fn step(
        &mut self,
        micro_batches: &[Crops],
        schedule: &Schedule,
    ) -> Result<std::result::Result<StepReport, NonFinite>> {
        let share = 1.0 / (micro_batches.len() * self.ranks.size()) as f64;
        let mut report: Option<StepReport> = None;
        let mut gradients: Option<Gradients> = None;
        let mut teacher_means = Vec::with_capacity(micro_batches.len());
        for (index, crops) in micro_batches.iter().enumerate() {
            let sends = self.ranks.several() && index + 1 == micro_batches.len();
            let reducer = sends.then(|| Arc::new(Reducer::new(&self.ranks, gradients.take())));
            let sending = reducer.as_ref().map(|reducer| self.handing_over(reducer)).transpose()?;
            let student = sending.as_ref().unwrap_or(&self.student);
            let losses = self.losses_of(student, crops, schedule.teacher_temp)?;
            let part = read(&losses)?;
            let scaled = if share == 1.0 { losses.total } else { (losses.total * share)? };
            gradients = Some(match (reducer, gradients.take()) {
                (Some(reducer), _) => {
                    if self.buckets.is_empty() {
                        self.buckets = Arc::new(self.buckets(&scaled, student, BUCKET_BYTES)?);
                    }
                    reducer.arrange(&self.buckets);
                    scaled.backward()?;
                    reducer.finish()?
                }
                (None, None) => self.gradients(&scaled)?,
                (None, Some(sum)) => add(sum, &self.gradients(&scaled)?)?,
            });
            teacher_means.push(losses.teacher_mean);
            report = Some(merge(report, part, losses.monitor, losses.image_stats, losses.patch_stats, share));
        }
        let (Some(report), Some(gradients)) = (report, gradients) else {
            candle_core::bail!("a step without micro-batches");
        };
        let mut report = over_all(report, &self.ranks)?;
        if let Some(fault) = not_finite(&report) {
            return Ok(Err(fault));
        }
        let norms = self.optimizer.norms(&gradients)?;
        if let Some((name, norm)) = norms.iter().find(|(_, norm)| !norm.is_finite()) {
            return Ok(Err(NonFinite { term: format!("gradient of {name}"), value: *norm }));
        }
        report.grad_norm = norms.values().map(|norm| norm * norm).sum::<f64>().sqrt();
        let teacher_mean = mean_over_all(Centers::mean(&teacher_means)?, &self.ranks)?;
        self.centers = self.centers.updated(&teacher_mean, self.center_momentum)?;
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

fn read(losses: &Losses) -> Result<Part> {
    let value = |tensor: &Tensor| Ok::<_, candle_core::Error>(f64::from(tensor.to_scalar::<f32>()?));
    let loss_patch = losses.patch.as_ref().map(value).transpose()?;
    Ok(Part { loss: value(&losses.total)?, loss_image: value(&losses.image)?, loss_patch })
}

/// The loss that is not finite, if there is one.
fn not_finite(report: &StepReport) -> Option<NonFinite> {
    let terms = [("class loss", Some(report.loss_image)), ("patch loss", report.loss_patch)];
    let (term, value) = terms
        .into_iter()
        .filter_map(|(term, loss)| Some((term, loss?)))
        .find(|(_, loss)| !loss.is_finite())?;
    Some(NonFinite { term: term.into(), value })
}

/// The figures of this rank's shares added up over all ranks.
fn over_all(mut report: StepReport, ranks: &Ranks) -> Result<StepReport> {
    let StepReport { image_stats: image, patch_stats, loss_patch, .. } = report;
    let patch = patch_stats.unwrap_or_default();
    let own = [
        report.loss,
        report.loss_image,
        loss_patch.unwrap_or_default(),
        image.teacher_entropy,
        image.kl,
        patch.teacher_entropy,
        patch.kl,
    ];
    let [loss, loss_image, patch_loss, image_entropy, image_kl, patch_entropy, patch_kl] = ranks.sum(own)?;
    report.loss = loss;
    report.loss_image = loss_image;
    report.loss_patch = loss_patch.map(|_| patch_loss);
    report.image_stats = Stats { teacher_entropy: image_entropy, kl: image_kl };
    report.patch_stats = patch_stats.map(|_| Stats { teacher_entropy: patch_entropy, kl: patch_kl });
    Ok(report)
}

fn mean_over_all(mean: Centers, ranks: &Ranks) -> Result<Centers> {
    let patch = mean.patch.map(|patch| ranks.mean(patch)).transpose()?;
    Ok(Centers { class: ranks.mean(mean.class)?, patch })
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

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use candle_core::{CpuStorage, CustomOp1, Layout, Shape};

    use super::*;
    use crate::config::Arch;
    use crate::distributed::{DistributedError, Engine, Pending};
    use crate::objective::forward::CropGroup;

    /// Counts the gradients that are complete.
    struct Count(Arc<AtomicUsize>);

    impl CustomOp1 for Count {
        fn name(&self) -> &'static str {
            "count"
        }

        fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
            Ok((storage.clone(), layout.shape().clone()))
        }

        fn bwd(&self, _: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(Some(gradient.clone()))
        }
    }

    /// Notes how many gradients were complete whenever one is sent.
    struct Spy {
        complete: Arc<AtomicUsize>,
        sent_at: Arc<Mutex<Vec<usize>>>,
    }

    impl Engine for Spy {
        fn name(&self) -> &'static str {
            "spy"
        }

        fn rank(&self) -> usize {
            0
        }

        fn size(&self) -> usize {
            2
        }

        fn local_rank(&self) -> usize {
            0
        }

        fn start_sum(&self, tensor: Tensor) -> std::result::Result<Pending, DistributedError> {
            self.sent_at.lock().unwrap().push(self.complete.load(Ordering::Relaxed));
            Ok(Box::new(move || Ok(tensor)))
        }

        fn sum(&self, _: &mut [f64]) -> std::result::Result<(), DistributedError> {
            Ok(())
        }

        fn broadcast(&self, _: usize, _: &mut Vec<u8>) -> std::result::Result<(), DistributedError> {
            Ok(())
        }

        fn barrier(&self) -> std::result::Result<(), DistributedError> {
            Ok(())
        }

        fn abort(&self, code: i32) -> ! {
            panic!("{code}")
        }
    }

    #[test]
    fn gradients_leave_while_the_backward_pass_goes_on() {
        let mut config = TrainConfig::default();
        (config.model.arch, config.model.dim, config.model.depth, config.model.heads) =
            (Arch::Custom, 16, 6, 2);
        (config.model.patch_size, config.augment.global_size, config.augment.local_size) = (8, 32, 16);
        (config.head.hidden, config.head.bottleneck) = (16, 8);
        (config.head.class_prototypes, config.head.patch_prototypes) = (16, 16);
        let group = |side: usize| CropGroup {
            images: Tensor::randn(0f32, 1.0, (4, 3, side, side), &Device::Cpu).unwrap(),
            crops: 2,
            drop_path: None,
        };
        let crops = Crops { batch: 2, global: group(32), local: Some(group(16)) };

        let (complete, sent_at) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(Vec::new())));
        let ranks = Ranks::over(Spy { complete: Arc::clone(&complete), sent_at: Arc::clone(&sent_at) });
        let student = Trainer::fresh_student(&config, &Device::Cpu).unwrap();
        let trainer = Trainer::new(&config, student, &Device::Cpu).unwrap().among(&ranks);
        let reducer = Arc::new(Reducer::new(&ranks, None));
        let parameters = trainer.student.parameters.iter().map(|(name, parameter)| {
            let tensor = match parameter.trainable {
                true => handed_over(name, &parameter.tensor, &reducer).unwrap(),
                false => parameter.tensor.clone(),
            };
            (name.to_owned(), tensor.apply_op1(Count(Arc::clone(&complete))).unwrap())
        });
        let student = Network::new(&trainer.architecture, parameters.collect(), trainer.ops).unwrap();
        let loss = trainer.losses_of(&student, &crops, 0.05).unwrap().total;
        let buckets = Arc::new(trainer.buckets(&loss, &student, 0).unwrap());
        reducer.arrange(&buckets);
        loss.backward().unwrap();
        assert_eq!(reducer.finish().unwrap().len(), buckets.len());

        let sent_at = sent_at.lock().unwrap();
        let behind =
            |share: f64| sent_at[(share * buckets.len() as f64) as usize] as f64 / buckets.len() as f64;
        for share in [0.25, 0.5, 0.75] {
            assert!(
                behind(share) < share + 0.15,
                "{share} of the gradients left when {} were complete",
                behind(share)
            );
        }
    }
}
