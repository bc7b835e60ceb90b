//! MoCo-v3 (Chen, Xie and He, 2021): the prediction of one view is to be nearest to the momentum key of the other view
//! among the keys of all images of the batch.
//!
//! `L = 2τ·CE(q₁·k₂/τ) + 2τ·CE(q₂·k₁/τ)` with `q = predictor(projector(student))`, `k = projector(teacher)`, both of length
//! one. Negatives are the other images of the batch, of all ranks; nothing is carried from step to step.

use candle_core::{Device, Result, Tensor};

use super::contrast::{cross_entropy, own_columns, symmetric, unit};
use super::method::{ClassTokens, Context, Figures, ImageLoss, ImageMethod, Momentum, State};
use crate::config::TrainConfig;
use crate::distributed::{Ranks, collective};
use crate::model::mlp_head::{Layer, MlpHead, Norm, Views};
use crate::model::parameters::Specification;

/// MoCo-v3.
#[derive(Clone, Debug)]
pub struct MocoV3 {
    hidden: usize,
    out: usize,
    temperature: f64,
}

impl MocoV3 {
    /// As configured.
    pub fn from_config(config: &TrainConfig) -> Self {
        let image = &config.image;
        Self { hidden: image.hidden, out: image.out, temperature: image.temperature }
    }

    /// Linear–BN–ReLU twice, then linear–BN; no biases, and nothing learned in the last BN.
    fn projector(&self, dim: usize) -> MlpHead {
        self.head("projector", &[dim, self.hidden, self.hidden, self.out], false)
    }

    /// Linear–BN–ReLU, then linear–BN, likewise.
    fn predictor(&self) -> MlpHead {
        self.head("predictor", &[self.out, self.hidden, self.out], true)
    }

    fn head(&self, name: &'static str, widths: &[usize], student_only: bool) -> MlpHead {
        let last = widths.len() - 2;
        let layer = |(index, widths): (usize, &[usize])| Layer {
            widths: [widths[0], widths[1]],
            bias: false,
            norm: if index == last { Norm::Plain } else { Norm::Rectified },
        };
        MlpHead { name, layers: widths.windows(2).enumerate().map(layer).collect(), student_only }
    }
}

impl ImageMethod for MocoV3 {
    fn heads(&self, dim: usize) -> Vec<Specification> {
        [self.projector(dim).specification(), self.predictor().specification()].concat()
    }

    fn uses_local_crops(&self) -> bool {
        false
    }

    fn momentum(&self) -> Momentum {
        Momentum::BeforeKeys
    }

    fn initial_state(&self, _device: &Device) -> Result<State> {
        Ok(State::new())
    }

    fn loss(&self, tokens: &ClassTokens<'_>, context: &Context<'_>) -> Result<ImageLoss> {
        let Context { student, teacher, ops, ranks, .. } = *context;
        let ClassTokens { batch, global_crops, .. } = *tokens;
        let views = Views { count: global_crops, ranks };
        let global = |rows: &Tensor| rows.narrow(0, 0, global_crops * batch);
        let projector = self.projector(tokens.student.dim(1)?);
        let projected = projector.forward(&student.parameters, &global(tokens.student)?, views, ops)?;
        let queries = unit(&self.predictor().forward(&student.parameters, &projected, views, ops)?, ops)?;
        let keys = unit(&projector.forward(&teacher.parameters, &global(tokens.teacher)?, views, ops)?, ops)?;
        let own = own_columns(batch, ranks.rank());
        let direction = |query: usize, key: usize| {
            let keys = collective::gather_rows(ranks, &keys.narrow(0, key * batch, batch)?)?;
            let queries = queries.narrow(0, query * batch, batch)?;
            cross_entropy(&(ops.linear(&queries, &keys, None)? / self.temperature)?, &own)
        };
        let both = symmetric([direction(0, 1)?, direction(1, 0)?])?;
        Ok(ImageLoss {
            loss: (both.loss * (2.0 * self.temperature))?,
            figures: Figures::Accuracy(both.accuracy),
            seen: State::new(),
        })
    }

    fn updated(&self, _state: &State, _seen: &[&State], _ranks: &Ranks) -> Result<State> {
        Ok(State::new())
    }

    fn chance_loss(&self, batch: f64) -> f64 {
        2.0 * 2.0 * self.temperature * batch.ln()
    }

    fn cost(&self, dim: usize) -> [u64; 2] {
        [self.projector(dim).cost(), self.predictor().cost()]
    }
}
