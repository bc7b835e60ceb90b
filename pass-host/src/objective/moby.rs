//! MoBY (Xie et al., 2021): the prediction of one view is to be nearest to the momentum key of the other view among the
//! keys of earlier steps, kept in one queue a view.
//!
//! `L = CE([q₁·k₂, q₁·queue₂]/τ) + CE([q₂·k₁, q₂·queue₁]/τ)` with `q = predictor(projector(student))`,
//! `k = projector(teacher)`, both of length one. The keys of all ranks enter the queues after the step, in place of the
//! oldest.

use candle_core::{D, DType, Device, Result, Tensor};

use super::contrast::{cross_entropy, random_units, symmetric, unit};
use super::method::{ClassTokens, Context, Figures, ImageLoss, ImageMethod, Momentum, State, entry};
use crate::config::TrainConfig;
use crate::distributed::{Ranks, collective};
use crate::model::mlp_head::{Layer, MlpHead, Norm, Views};
use crate::model::parameters::Specification;
use crate::random::{Purpose, Stream};

/// Queues of the two views in the state, each `[queue, out]` in `f32`, rows of length one.
pub const QUEUES: [&str; 2] = ["queue_1", "queue_2"];
/// The row of both queues that is replaced next, `[1]` in `i64`.
pub const POINTER: &str = "queue_pointer";
/// Keys of the two views, as a step has seen them.
const KEYS: [&str; 2] = ["keys_1", "keys_2"];

/// MoBY.
#[derive(Clone, Debug)]
pub struct Moby {
    hidden: usize,
    out: usize,
    temperature: f64,
    queue: usize,
    seed: u64,
}

impl Moby {
    /// As configured.
    pub fn from_config(config: &TrainConfig) -> Self {
        let image = &config.image;
        Self {
            hidden: image.hidden,
            out: image.out,
            temperature: image.temperature,
            queue: image.queue,
            seed: config.seed,
        }
    }

    /// Linear–BN–ReLU–linear, with biases.
    fn head(&self, name: &'static str, inputs: usize, student_only: bool) -> MlpHead {
        let layer = |widths, norm| Layer { widths, bias: true, norm };
        let layers =
            vec![layer([inputs, self.hidden], Norm::Rectified), layer([self.hidden, self.out], Norm::None)];
        MlpHead { name, layers, student_only }
    }

    fn projector(&self, dim: usize) -> MlpHead {
        self.head("projector", dim, false)
    }

    fn predictor(&self) -> MlpHead {
        self.head("predictor", self.out, true)
    }
}

impl ImageMethod for Moby {
    fn heads(&self, dim: usize) -> Vec<Specification> {
        [self.projector(dim).specification(), self.predictor().specification()].concat()
    }

    fn uses_local_crops(&self) -> bool {
        false
    }

    fn momentum(&self) -> Momentum {
        Momentum::BeforeKeys
    }

    fn initial_state(&self, device: &Device) -> Result<State> {
        let mut state = State::from([(POINTER.into(), Tensor::new(&[0i64], &Device::Cpu)?)]);
        for name in QUEUES {
            let key = xxhash_rust::xxh3::xxh3_64(name.as_bytes());
            let mut stream = Stream::new(self.seed, Purpose::Init, &[key]);
            state.insert(name.into(), random_units(|| stream.normal(), self.queue, self.out, device)?);
        }
        Ok(state)
    }

    fn loss(&self, tokens: &ClassTokens<'_>, context: &Context<'_>) -> Result<ImageLoss> {
        let Context { student, teacher, state, ops, ranks, .. } = *context;
        let ClassTokens { batch, global_crops, .. } = *tokens;
        let views = Views { count: global_crops, ranks };
        let global = |rows: &Tensor| rows.narrow(0, 0, global_crops * batch);
        let projector = self.projector(tokens.student.dim(1)?);
        let projected = projector.forward(&student.parameters, &global(tokens.student)?, views, ops)?;
        let queries = unit(&self.predictor().forward(&student.parameters, &projected, views, ops)?, ops)?;
        let keys = unit(&projector.forward(&teacher.parameters, &global(tokens.teacher)?, views, ops)?, ops)?;
        let of_view = |rows: &Tensor, view: usize| rows.narrow(0, view * batch, batch);
        let direction = |query: usize, key: usize| {
            let (queries, keys) = (of_view(&queries, query)?, of_view(&keys, key)?);
            let positive = (&queries * keys)?.sum_keepdim(D::Minus1)?;
            let negative = ops.linear(&queries, entry(state, QUEUES[key])?, None)?;
            cross_entropy(&(Tensor::cat(&[positive, negative], 1)? / self.temperature)?, &vec![0; batch])
        };
        let both = symmetric([direction(0, 1)?, direction(1, 0)?])?;
        let mut seen = State::new();
        for (view, name) in KEYS.into_iter().enumerate() {
            seen.insert(name.into(), collective::gather_rows(ranks, &of_view(&keys, view)?)?);
        }
        Ok(ImageLoss { loss: both.loss, figures: Figures::Accuracy(both.accuracy), seen })
    }

    fn updated(&self, state: &State, seen: &[&State], _ranks: &Ranks) -> Result<State> {
        let mut state = state.clone();
        let pointer = entry(&state, POINTER)?.to_dtype(DType::I64)?.to_vec1::<i64>()?;
        let mut start = pointer.first().map_or(0, |&row| row.max(0) as usize) % self.queue;
        for seen in seen {
            let mut count = 0;
            for (queue, keys) in QUEUES.into_iter().zip(KEYS) {
                let keys = entry(seen, keys)?;
                count = keys.dim(0)?;
                let replaced = replaced(entry(&state, queue)?, keys, start)?;
                state.insert(queue.into(), replaced);
            }
            start = (start + count) % self.queue;
        }
        state.insert(POINTER.into(), Tensor::new(&[start as i64], &Device::Cpu)?);
        Ok(state)
    }

    fn chance_loss(&self, _batch: f64) -> f64 {
        2.0 * ((1 + self.queue) as f64).ln()
    }

    fn cost(&self, dim: usize) -> [u64; 2] {
        [self.projector(dim).cost(), self.predictor().cost()]
    }
}

/// `queue` with `keys` in the place of the rows from `start` on; after the last row comes the first.
fn replaced(queue: &Tensor, keys: &Tensor, start: usize) -> Result<Tensor> {
    let (rows, count) = (queue.dim(0)?, keys.dim(0)?);
    if count > rows {
        candle_core::bail!("a queue of {rows} has no place for the {count} keys of a step");
    }
    let to_end = count.min(rows - start);
    let around = count - to_end;
    let parts = [
        keys.narrow(0, to_end, around)?,
        queue.narrow(0, around, start - around)?,
        keys.narrow(0, 0, to_end)?,
        queue.narrow(0, start + to_end, rows - start - to_end)?,
    ];
    let parts: Vec<Tensor> = parts.into_iter().filter(|part| part.elem_count() > 0).collect();
    Tensor::cat(&parts, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(values: &[f32]) -> Tensor {
        Tensor::from_slice(values, (values.len(), 1), &Device::Cpu).unwrap()
    }

    fn after(queue: &[f32], keys: &[f32], start: usize) -> Vec<f32> {
        let replaced = replaced(&column(queue), &column(keys), start).unwrap();
        replaced.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn keys_take_the_place_of_the_oldest() {
        let queue = [0.0, 1.0, 2.0, 3.0, 4.0];
        assert_eq!(after(&queue, &[7.0, 8.0], 0), [7.0, 8.0, 2.0, 3.0, 4.0]);
        assert_eq!(after(&queue, &[7.0, 8.0], 3), [0.0, 1.0, 2.0, 7.0, 8.0]);
        // resumed with another batch
        assert_eq!(after(&queue, &[7.0, 8.0, 9.0], 3), [9.0, 1.0, 2.0, 7.0, 8.0]);
        assert_eq!(after(&queue, &queue, 2), [3.0, 4.0, 0.0, 1.0, 2.0]);
        let error = replaced(&column(&queue), &column(&[0.0; 6]), 0).unwrap_err();
        assert!(error.to_string().contains("no place for the 6 keys"), "{error}");
    }
}
