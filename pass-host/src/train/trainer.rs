//! One optimizer step: forward, centers, backward, clipping, AdamW, momentum teacher (SEMANTICS §5).

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Result, Shape, Tensor};

use crate::config::TrainConfig;
use crate::distributed::reducer::{BUCKET_BYTES, Receive, handed_over};
use crate::distributed::{Buckets, Ranks, Reducer};
use crate::model::parameters::{Parameter, Parameters, Role};
use crate::model::{Architecture, Network};
use crate::objective::forward::{Crops, Losses, Monitor, Objective};
use crate::objective::method::{Figures, Momentum, State};
use crate::ops::{GradientSink, Ops, Statistics, Stats};
use crate::optimizer::{Gradients, Optimizer, StepSize, global_norm};

/// What the schedules say about one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Learning rate.
    pub lr: f64,
    /// Weight decay of the decayed group.
    pub weight_decay: f64,
    /// Momentum of the teacher.
    pub momentum: f64,
    /// That of the next step, for methods whose teacher follows before the next step's keys.
    pub next_momentum: f64,
    /// Temperature of the teacher.
    pub teacher_temp: f64,
    /// Whether the last layers of the heads are learned yet.
    pub train_last_layer: bool,
}

/// Student, teacher, state of the objective and optimizer: everything a step changes.
pub struct Trainer {
    /// Learns by gradient.
    pub student: Network,
    /// Follows the student by momentum.
    pub teacher: Network,
    /// What the objective carries from step to step: centers, queues.
    pub state: State,
    /// AdamW with its moments.
    pub optimizer: Optimizer,
    architecture: Architecture,
    recompute: bool,
    objective: Objective,
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
    /// Entropy and divergence of the class distributions, for methods that have some.
    pub image_stats: Option<Stats>,
    /// Share of the queries whose own key is the nearest, for contrastive methods.
    pub contrast_accuracy: Option<f64>,
    /// Entropy and divergence of the patch distributions.
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
        let state = Objective::from_config(config).initial_state(device)?;
        let optimizer = Optimizer::new(&config.optim, &student, Ops::from(config.ops))?;
        Self::assemble(config, &architecture, student, teacher, state, optimizer)
    }

    /// A run from its saved parts.
    pub fn assemble(
        config: &TrainConfig,
        architecture: &Architecture,
        student: Parameters,
        teacher: Parameters,
        state: State,
        optimizer: Optimizer,
    ) -> Result<Self> {
        let ops = Ops::from(config.ops);
        let mut student = Network::new(architecture, student, ops)?;
        student.backbone = student.backbone.recomputing(config.recompute);
        Ok(Self {
            student,
            teacher: Network::new(architecture, teacher, ops)?,
            state,
            optimizer,
            architecture: architecture.clone(),
            recompute: config.recompute,
            objective: Objective::from_config(config),
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
        let (teacher, state) = (&self.teacher, &self.state);
        self.objective.losses(student, teacher, state, crops, teacher_temp, self.ops, &self.ranks)
    }

    /// Gradients of a scalar with respect to every trained tensor.
    pub fn gradients(&self, loss: &Tensor) -> Result<Gradients> {
        let parameters = &self.student.parameters;
        parameters.sink().clear();
        let mut store = loss.backward()?;
        let mut gradients = HashMap::new();
        for (name, parameter) in parameters.iter().filter(|(_, parameter)| parameter.trainable) {
            let Some(gradient) = parameters.take_gradient(parameter, &mut store)? else {
                candle_core::bail!("no gradient reached `{name}`");
            };
            gradients.insert(name.to_string(), gradient);
        }
        Ok(gradients)
    }

    /// The student whose gradients are told to `receive`, each once, as soon as it is complete.
    ///
    /// Operations that know one parameter each tell it by the backward pass, those over many by their sink.
    fn handing_over(&self, receive: &Arc<Receive>) -> Result<Network> {
        let mut names = HashMap::new();
        let wrap = |(name, parameter): (&str, &Parameter)| {
            let tensor = match parameter.trainable {
                true => {
                    let tensor = handed_over(name, &parameter.tensor, receive)?;
                    names.insert(tensor.id(), name.to_owned());
                    tensor
                }
                false => parameter.tensor.clone(),
            };
            Ok((name.to_owned(), tensor))
        };
        let parameters: Parameters = self.student.parameters.iter().map(wrap).collect::<Result<_>>()?;
        let receive = Arc::clone(receive);
        let sink = GradientSink::handing_on(move |parameter, gradient| match names.get(&parameter.id()) {
            Some(name) => receive(name, gradient),
            None => candle_core::bail!("a gradient of a tensor that is no parameter"),
        });
        let mut student = Network::new(&self.architecture, parameters.with_sink(sink), self.ops)?;
        student.backbone = student.backbone.recomputing(self.recompute);
        Ok(student)
    }

    /// Buckets in the order in which a backward pass completes the gradients, seen in one whose gradients are thrown away. It
    /// follows from the operations alone: the same in every step, on every rank, after every resume.
    fn observed_buckets(&self, crops: &Crops, teacher_temp: f64, bytes: usize) -> Result<Buckets> {
        let seen: Arc<Mutex<Vec<(String, Shape)>>> = Arc::default();
        let receive: Arc<Receive> = Arc::new({
            let seen = Arc::clone(&seen);
            move |name: &str, gradient: &Tensor| {
                let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                seen.push((name.to_owned(), gradient.shape().clone()));
                Ok(())
            }
        });
        let student = self.handing_over(&receive)?;
        self.losses_of(&student, crops, teacher_temp)?.total.backward()?;
        let seen = std::mem::take(&mut *seen.lock().unwrap_or_else(PoisonError::into_inner));
        let mut trained = self.student.parameters.iter().filter(|(_, parameter)| parameter.trainable);
        if let Some((name, _)) = trained.find(|(name, _)| seen.iter().all(|(seen, _)| seen != name)) {
            candle_core::bail!("no gradient reached `{name}`");
        }
        Ok(Buckets::new(seen, bytes))
    }

    /// One step over the micro-batches of a batch, of all ranks together. Anything not finite is found before anything
    /// changes, on every rank alike.
    ///
    /// Losses, statistics and gradient norms stay where they are computed and are read together, once, before the
    /// update: a device works through the whole step without being waited for in between.
    pub fn step(
        &mut self,
        micro_batches: &[Crops],
        schedule: &Schedule,
    ) -> Result<std::result::Result<StepReport, NonFinite>> {
        let share = 1.0 / (micro_batches.len() * self.ranks.size()) as f64;
        let mut gradients: Option<Gradients> = None;
        let mut seen = Vec::with_capacity(micro_batches.len());
        let (mut scalars, mut monitor) = (Vec::with_capacity(micro_batches.len() + 1), None);
        let mut contrasts = false;
        for (index, crops) in micro_batches.iter().enumerate() {
            let sends = self.ranks.several() && index + 1 == micro_batches.len();
            if sends && self.buckets.is_empty() {
                self.buckets = Arc::new(self.observed_buckets(crops, schedule.teacher_temp, BUCKET_BYTES)?);
            }
            let reducer = sends.then(|| Arc::new(Reducer::new(&self.ranks, &self.buckets, gradients.take())));
            let sending =
                reducer.as_ref().map(|reducer| self.handing_over(&reducer.receiver())).transpose()?;
            let student = sending.as_ref().unwrap_or(&self.student);
            let losses = self.losses_of(student, crops, schedule.teacher_temp)?;
            scalars.push(losses.scalars()?);
            contrasts = matches!(losses.image_figures, Figures::Accuracy(_));
            let scaled = if share == 1.0 { losses.total } else { (losses.total * share)? };
            gradients = Some(match (reducer, gradients.take()) {
                (Some(reducer), _) => {
                    scaled.backward()?;
                    reducer.finish()?
                }
                (None, None) => self.gradients(&scaled)?,
                (None, Some(sum)) => add(sum, &self.gradients(&scaled)?)?,
            });
            seen.push(losses.seen);
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
        let mut sums = [0.0; SCALARS];
        for numbers in losses.chunks_exact(losses.len() / micro_batches.len()) {
            sums.iter_mut().zip(numbers).for_each(|(sum, number)| *sum += number * share);
        }
        let with_patches = self.student.patch_head.is_some();
        let mut report = StepReport::new(self.ranks.sum(sums)?, contrasts, with_patches, monitor);
        if let Some(fault) = report.not_finite() {
            return Ok(Err(fault));
        }
        let norms: BTreeMap<String, f64> = names.into_iter().zip(norms.iter().copied()).collect();
        if let Some((name, norm)) = norms.iter().find(|(_, norm)| !norm.is_finite()) {
            return Ok(Err(NonFinite { term: format!("gradient of {name}"), value: *norm }));
        }
        report.grad_norm = global_norm(&norms);
        let seen: Vec<&State> = seen.iter().collect();
        self.state = self.objective.updated(&self.state, &seen, &self.ranks)?;
        let size = StepSize {
            lr: schedule.lr,
            weight_decay: schedule.weight_decay,
            momentum: match self.objective.momentum() {
                Momentum::AfterUpdate => schedule.momentum,
                Momentum::BeforeKeys => schedule.next_momentum,
            },
            train_last_layer: schedule.train_last_layer,
        };
        self.optimizer.step(&self.student.parameters, &self.teacher.parameters, &gradients, &norms, &size)?;
        Ok(Ok(report))
    }
}

/// Numbers that [`Losses::scalars`] tells with a patch objective.
const SCALARS: usize = 7;

impl StepReport {
    /// From the mean of [`Losses::scalars`] over all micro-batches.
    fn new(scalars: [f64; SCALARS], contrasts: bool, with_patches: bool, monitor: Monitor) -> Self {
        let [loss, loss_image, entropy_or_accuracy, kl, loss_patch, patch_entropy, patch_kl] = scalars;
        Self {
            loss,
            loss_image,
            loss_patch: with_patches.then_some(loss_patch),
            grad_norm: 0.0,
            image_stats: (!contrasts).then_some(Stats { teacher_entropy: entropy_or_accuracy, kl }),
            contrast_accuracy: contrasts.then_some(entropy_or_accuracy),
            patch_stats: with_patches.then_some(Stats { teacher_entropy: patch_entropy, kl: patch_kl }),
            monitor,
        }
    }

    /// The loss that is not finite, if there is one.
    fn not_finite(&self) -> Option<NonFinite> {
        let terms = [("class loss", Some(self.loss_image)), ("patch loss", self.loss_patch)];
        let (term, value) = terms
            .into_iter()
            .filter_map(|(term, loss)| Some((term, loss?)))
            .find(|(_, loss)| !loss.is_finite())?;
        Some(NonFinite { term: term.into(), value })
    }
}

impl Losses {
    /// Total, class loss, its entropy and divergence (or accuracy and 0), and with a patch objective patch loss, its entropy
    /// and divergence: `[4]` or `[7]` in `f64`, where they were computed.
    fn scalars(&self) -> Result<Tensor> {
        let device = self.total.device();
        let loss = |loss: &Tensor| loss.detach().to_dtype(DType::F64)?.reshape(1);
        let stats = |stats: &Statistics| stats.on_device().to_device(device);
        let figures = match &self.image_figures {
            Figures::Distributions(statistics) => stats(statistics)?,
            Figures::Accuracy(accuracy) => loss(accuracy)?.pad_with_zeros(0, 0, 1)?,
        };
        let mut scalars = vec![loss(&self.total)?, loss(&self.image)?, figures];
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::config::Arch;
    use crate::distributed::{DistributedError, Engine, Pending};
    use crate::objective::forward::CropGroup;

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
        let buckets = Arc::new(trainer.observed_buckets(&crops, 0.05, 0).unwrap());
        let reducer = Arc::new(Reducer::new(&ranks, &buckets, None));
        let receive: Arc<Receive> = Arc::new({
            let (complete, reducer) = (Arc::clone(&complete), Arc::clone(&reducer));
            move |name: &str, gradient: &Tensor| {
                complete.fetch_add(1, Ordering::Relaxed);
                reducer.ready(name, gradient)
            }
        });
        let student = trainer.handing_over(&receive).unwrap();
        trainer.losses_of(&student, &crops, 0.05).unwrap().total.backward().unwrap();
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
