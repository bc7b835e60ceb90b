//! What an image-level method is: the loss on the class tokens of an image's crops, the heads it needs and what it carries
//! from step to step. A method is one file with one type behind [`ImageMethod`].

use std::collections::BTreeMap;

use candle_core::{Device, Result, Tensor};

use super::dino::Dino;
use super::moby::Moby;
use super::moco_v3::MocoV3;
use crate::config::{self, TrainConfig};
use crate::distributed::Ranks;
use crate::model::Network;
use crate::model::parameters::Specification;
use crate::ops::{Ops, Statistics};

/// What is carried from step to step, by name: centers, queues. It is in every checkpoint.
pub type State = BTreeMap<String, Tensor>;

/// Class tokens of both networks, `[crops · B, D]`, crop-major, global crops first.
#[derive(Clone, Copy, Debug)]
pub struct ClassTokens<'a> {
    /// Of the student, on the graph. Those of local crops are there for methods that use them.
    pub student: &'a Tensor,
    /// Of the teacher, likewise.
    pub teacher: &'a Tensor,
    /// Images B.
    pub batch: usize,
    /// Global crops of an image.
    pub global_crops: usize,
    /// Local crops of an image.
    pub local_crops: usize,
}

/// What a loss is computed with.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// Learns; its parameters have the method's heads.
    pub student: &'a Network,
    /// Follows; its parameters have the heads that are not the student's alone.
    pub teacher: &'a Network,
    /// What is carried, as it was after the step before.
    pub state: &'a State,
    /// Temperature of the teacher.
    pub teacher_temp: f64,
    /// How operations are computed.
    pub ops: Ops,
    /// Those that share the batch.
    pub ranks: &'a Ranks,
}

/// The loss of a micro-batch.
pub struct ImageLoss {
    /// A scalar, on the graph.
    pub loss: Tensor,
    /// Figures for the log.
    pub figures: Figures,
    /// What [`ImageMethod::updated`] makes the next state of.
    pub seen: State,
}

/// What the log tells of a loss beside its value.
pub enum Figures {
    /// Of the compared distributions: entropy of the teacher's, divergence.
    Distributions(Statistics),
    /// Share of the queries whose own key is the nearest, a scalar.
    Accuracy(Tensor),
}

/// When the teacher follows the student: `teacher ← m·teacher + (1 − m)·student`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Momentum {
    /// After the update of a step, with the momentum of this step.
    AfterUpdate,
    /// Before the keys of a step are computed, with the momentum of this step. Nothing happens between an update and the
    /// next step's keys, so it is done right after the update, in the same pass over the parameters; before the first
    /// step the teacher is the student. A step that is not applied thus changes nothing.
    BeforeKeys,
}

/// An image-level method.
pub trait ImageMethod: Send + Sync {
    /// The tensors of its heads over class tokens of width `dim`.
    fn heads(&self, dim: usize) -> Vec<Specification>;

    /// Whether its loss uses the class tokens of local crops.
    fn uses_local_crops(&self) -> bool;

    /// When the teacher follows.
    fn momentum(&self) -> Momentum;

    /// The state before the first step.
    ///
    /// # Errors
    /// If memory runs out.
    fn initial_state(&self, device: &Device) -> Result<State>;

    /// The loss of a micro-batch; gradients flow into the student only.
    ///
    /// # Errors
    /// If tensors do not fit, or the ranks are lost.
    fn loss(&self, tokens: &ClassTokens<'_>, context: &Context<'_>) -> Result<ImageLoss>;

    /// The state after a step that was applied, from what its micro-batches have [seen](ImageLoss::seen).
    ///
    /// # Errors
    /// If tensors do not fit, or the ranks are lost.
    fn updated(&self, state: &State, seen: &[&State], ranks: &Ranks) -> Result<State>;

    /// The loss of networks that tell nothing apart, for a batch of so many images over all ranks; NaN if it depends on a
    /// batch that is NaN.
    fn chance_loss(&self, batch: f64) -> f64;

    /// Multiply-adds of its heads for one crop: those that both networks have, those of the student alone.
    fn cost(&self, dim: usize) -> [u64; 2];
}

/// The method a configuration asks for.
pub fn of_config(config: &TrainConfig) -> Box<dyn ImageMethod> {
    match config.image.method {
        config::ImageMethod::Dino => Box::new(Dino::from_config(config)),
        config::ImageMethod::MocoV3 => Box::new(MocoV3::from_config(config)),
        config::ImageMethod::Moby => Box::new(Moby::from_config(config)),
    }
}

/// The entry `name` of a state.
///
/// # Errors
/// If it is not there.
pub fn entry<'a>(state: &'a State, name: &str) -> Result<&'a Tensor> {
    match state.get(name) {
        Some(tensor) => Ok(tensor),
        None => candle_core::bail!("state of the objective: `{name}` is missing"),
    }
}
