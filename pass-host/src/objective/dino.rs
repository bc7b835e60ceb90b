//! DINO: cross-entropy between centered, sharpened distributions over prototypes, of every teacher global crop and every
//! other student crop (SEMANTICS §4).

use candle_core::{DType, Device, Result, Tensor};

use super::center;
use super::loss::class_pairs;
use super::method::{ClassTokens, Context, Figures, ImageLoss, ImageMethod, Momentum, State, entry};
use crate::config::TrainConfig;
use crate::distributed::Ranks;
use crate::model::head::ProjectionHead;
use crate::model::parameters::{Specification, projection_head};
use crate::ops::{Ops, Targets};

/// The beginning of the names of its head's tensors.
pub const HEAD: &str = "c_head";
/// The center of the class logits in the state.
pub const CENTER: &str = "class";

/// DINO.
#[derive(Clone, Debug)]
pub struct Dino {
    /// Hidden width, bottleneck and prototypes K of the head.
    sizes: [usize; 3],
    norm_last_layer: bool,
    student_temp: f64,
    center_momentum: f64,
}

impl Dino {
    /// As configured.
    pub fn from_config(config: &TrainConfig) -> Self {
        let head = &config.head;
        Self {
            sizes: [head.hidden, head.bottleneck, head.class_prototypes],
            norm_last_layer: head.norm_last_layer,
            student_temp: config.image.student_temp,
            center_momentum: config.image.center_momentum,
        }
    }
}

impl ImageMethod for Dino {
    fn heads(&self, dim: usize) -> Vec<Specification> {
        let [hidden, bottleneck, prototypes] = self.sizes;
        projection_head(HEAD, [dim, hidden, bottleneck, prototypes], self.norm_last_layer)
    }

    fn uses_local_crops(&self) -> bool {
        true
    }

    fn momentum(&self) -> Momentum {
        Momentum::AfterUpdate
    }

    fn initial_state(&self, device: &Device) -> Result<State> {
        let [.., prototypes] = self.sizes;
        Ok(State::from([(CENTER.into(), Tensor::zeros(prototypes, DType::F32, device)?)]))
    }

    fn loss(&self, tokens: &ClassTokens<'_>, context: &Context<'_>) -> Result<ImageLoss> {
        let Context { student, teacher, state, teacher_temp, ops, .. } = *context;
        let student = ProjectionHead::new(&student.parameters, HEAD, ops)?;
        let teacher = ProjectionHead::new(&teacher.parameters, HEAD, ops)?;
        let ClassTokens { batch, global_crops, local_crops, .. } = *tokens;
        let (targets, mean) = class_targets(&teacher, tokens.teacher, batch * global_crops, ops)?;
        let (pairs, weight) = class_pairs(batch, global_crops, local_crops);
        let (loss, statistics) = student.loss(
            tokens.student,
            &Targets {
                teacher: &targets,
                center: entry(state, CENTER)?,
                temperatures: [self.student_temp, teacher_temp],
                pairs: &pairs,
                weights: weight.into(),
            },
        )?;
        let seen = State::from([(CENTER.into(), mean)]);
        Ok(ImageLoss { loss, figures: Figures::Distributions(statistics), seen })
    }

    fn updated(&self, state: &State, seen: &[&State], ranks: &Ranks) -> Result<State> {
        let center = center::after_step(state, seen, CENTER, self.center_momentum, ranks)?;
        Ok(State::from([(CENTER.into(), center)]))
    }

    fn chance_loss(&self, _batch: f64) -> f64 {
        let [.., prototypes] = self.sizes;
        (prototypes as f64).ln()
    }

    fn cost(&self, dim: usize) -> [u64; 2] {
        let [hidden, bottleneck, prototypes] = self.sizes;
        let both = dim * hidden + hidden * hidden + hidden * bottleneck + bottleneck * prototypes;
        [both as u64, 0]
    }
}

/// Class logits of the teacher's first `targets` rows, and the mean of the logits of all rows: those of the local crops
/// are wanted for the center alone, and logits are linear in the unit vectors (SEMANTICS §12).
fn class_targets(
    head: &ProjectionHead,
    tokens: &Tensor,
    targets: usize,
    ops: Ops,
) -> Result<(Tensor, Tensor)> {
    let unit = head.unit(tokens)?;
    let mean = head.unit_logits(&ops.mean_rows(&unit)?.unsqueeze(0)?)?;
    Ok((head.unit_logits(&unit.narrow(0, 0, targets)?)?, mean.squeeze(0)?))
}
