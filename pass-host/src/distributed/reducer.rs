//! Gradients added up over all ranks while the backward pass goes on.
//!
//! Gradients travel in buckets, in the order in which the backward pass completes them, which is observed once. A bucket
//! leaves when its last gradient is there and all buckets before it have left, so that every rank sends the same buckets
//! in the same order.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::{Pending, Ranks};
use crate::optimizer::Gradients;

/// Bytes of a bucket: large enough for the full speed of a network, small enough that the last one, which nothing
/// overlaps, is soon done.
pub const BUCKET_BYTES: usize = 8 << 20;

/// Which gradients travel together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Buckets {
    /// Name and shape of every gradient, in the order in which they will be complete.
    gradients: Vec<(String, Shape)>,
    /// The gradients of each bucket, one range after the other.
    ranges: Vec<std::ops::Range<usize>>,
}

impl Buckets {
    /// Buckets of about `bytes` bytes over gradients in the order in which they will be complete.
    pub fn new(gradients: impl IntoIterator<Item = (String, Shape)>, bytes: usize) -> Self {
        let gradients: Vec<_> = gradients.into_iter().collect();
        let mut ranges: Vec<std::ops::Range<usize>> = Vec::new();
        let mut filled = usize::MAX;
        for (index, (_, shape)) in gradients.iter().enumerate() {
            let size = 4 * shape.elem_count();
            match ranges.last_mut() {
                Some(range) if filled.saturating_add(size) <= bytes => {
                    range.end = index + 1;
                    filled += size;
                }
                _ => {
                    ranges.push(index..index + 1);
                    filled = size;
                }
            }
        }
        Self { gradients, ranges }
    }

    fn index(&self, name: &str) -> Option<usize> {
        self.gradients.iter().position(|(own, _)| own == name)
    }

    /// Number of buckets.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }
}

/// The gradients of one backward pass.
pub struct Reducer {
    ranks: Ranks,
    buckets: Arc<Buckets>,
    state: Mutex<State>,
}

struct State {
    /// Sums of the micro-batches before.
    earlier: Option<Gradients>,
    ready: Vec<Option<Tensor>>,
    /// Buckets under way.
    sent: Vec<Pending>,
}

impl Reducer {
    /// For one backward pass; `earlier` gradients, of micro-batches that were not sent, are added to its own.
    pub fn new(ranks: &Ranks, buckets: &Arc<Buckets>, earlier: Option<Gradients>) -> Self {
        let ready = vec![None; buckets.gradients.len()];
        let state = State { earlier, ready, sent: Vec::new() };
        Self { ranks: ranks.clone(), buckets: Arc::clone(buckets), state: state.into() }
    }

    /// Tells it of complete gradients.
    pub fn receiver(self: &Arc<Self>) -> Arc<Receive> {
        let reducer = Arc::clone(self);
        Arc::new(move |name: &str, gradient: &Tensor| reducer.ready(name, gradient))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The gradient of the parameter called `name` is complete. Sends every bucket that can go.
    ///
    /// # Errors
    /// If there is no such parameter, it was complete before, has another shape, or cannot be sent.
    pub fn ready(&self, name: &str, gradient: &Tensor) -> Result<()> {
        let Some(index) = self.buckets.index(name) else {
            candle_core::bail!("the gradient of `{name}` is in no bucket");
        };
        let state = &mut *self.state();
        let shape = &self.buckets.gradients[index].1;
        if gradient.shape() != shape {
            candle_core::bail!("gradient of `{name}`: expected {shape:?}, found {:?}", gradient.shape());
        }
        let earlier = state.earlier.as_mut().and_then(|earlier| earlier.remove(name));
        let gradient = match earlier {
            Some(earlier) => (earlier + gradient)?,
            None => gradient.clone(),
        };
        if state.ready[index].replace(gradient).is_some() {
            candle_core::bail!("the gradient of `{name}` was complete before");
        }
        while let Some(range) = self.buckets.ranges.get(state.sent.len()) {
            let slots = &mut state.ready[range.clone()];
            if slots.iter().any(Option::is_none) {
                break;
            }
            let parts = slots.iter_mut().filter_map(Option::take).map(|part| part.flatten_all());
            let bucket = Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?;
            state.sent.push(self.ranks.start_sum(bucket)?);
        }
        Ok(())
    }

    /// Waits for the sums of all ranks.
    ///
    /// # Errors
    /// If a gradient never came, naming it, or the ranks are lost.
    pub fn finish(&self) -> Result<Gradients> {
        let buckets = &*self.buckets;
        let state = &mut *self.state();
        if let Some(range) = buckets.ranges.get(state.sent.len()) {
            let missing = range.clone().find(|&index| state.ready[index].is_none()).unwrap_or(range.start);
            candle_core::bail!("no gradient reached `{}`", buckets.gradients[missing].0);
        }
        let mut sums = Gradients::with_capacity(buckets.gradients.len());
        for (pending, range) in state.sent.drain(..).zip(&buckets.ranges) {
            let bucket = pending()?;
            let mut start = 0;
            for (name, shape) in &buckets.gradients[range.clone()] {
                let count = shape.elem_count();
                sums.insert(name.clone(), bucket.narrow(0, start, count)?.reshape(shape)?);
                start += count;
            }
        }
        Ok(sums)
    }
}

/// Who is told of a complete gradient and the name of its parameter.
pub type Receive = dyn Fn(&str, &Tensor) -> Result<()> + Send + Sync;

/// The identity, whose backward pass hands the gradient over: candle calls it when all uses of the parameter have added
/// their part.
struct HandOver {
    receive: Arc<Receive>,
    name: String,
}

/// The parameter called `name` as it is, whose gradient goes to `receive` instead of the store of the backward pass.
///
/// # Errors
/// If the parameter is a part of another tensor.
pub fn handed_over(name: &str, parameter: &Tensor, receive: &Arc<Receive>) -> Result<Tensor> {
    parameter.apply_op1(HandOver { receive: Arc::clone(receive), name: name.to_owned() })
}

fn whole(layout: &Layout) -> Result<Shape> {
    match layout.is_contiguous() && layout.start_offset() == 0 {
        true => Ok(layout.shape().clone()),
        false => candle_core::bail!("a parameter has a storage of its own"),
    }
}

impl CustomOp1 for HandOver {
    fn name(&self) -> &'static str {
        "hand over the gradient"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((storage.try_clone(layout)?, whole(layout)?))
    }

    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        Ok((storage.try_clone(layout)?, whole(layout)?))
    }

    fn bwd(&self, _arg: &Tensor, _res: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        (self.receive)(&self.name, gradient)?;
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::super::threads::on_ranks;
    use super::*;

    fn named(sizes: &[usize]) -> Vec<(String, Shape)> {
        sizes.iter().enumerate().map(|(i, &size)| (format!("p{i}"), Shape::from(size))).collect()
    }

    fn full(value: f32, count: usize) -> Tensor {
        Tensor::full(value, count, &Device::Cpu).unwrap()
    }

    #[test]
    fn buckets_are_filled_in_order_and_a_large_tensor_has_its_own() {
        let buckets = Buckets::new(named(&[2, 2, 2, 100, 1, 1]), 16);
        assert_eq!(buckets.ranges, [0..2, 2..3, 3..4, 4..6]);
        assert_eq!((buckets.index("p3"), buckets.index("p9"), buckets.len()), (Some(3), None, 4));
        assert!(Buckets::new([], 16).is_empty());
    }

    #[test]
    fn sums_do_not_depend_on_the_order_of_readiness() {
        let buckets = Arc::new(Buckets::new(named(&[3, 4, 5, 6]), 32));
        let results = on_ranks(3, |ranks| {
            let earlier = (0..4).map(|i| (format!("p{i}"), full(100.0, 3 + i))).collect();
            let reducer = Reducer::new(&ranks, &buckets, Some(earlier));
            let mut order = [0, 1, 2, 3];
            order.rotate_left(ranks.rank());
            for index in order {
                let value = (10 * index + ranks.rank()) as f32;
                reducer.ready(&format!("p{index}"), &full(value, 3 + index)).unwrap();
            }
            reducer.finish().unwrap()
        });
        for sums in results {
            for index in 0..4 {
                let values = sums[&format!("p{index}")].to_vec1::<f32>().unwrap();
                assert_eq!(values, vec![(300 + 30 * index + 3) as f32; 3 + index]);
            }
        }
    }

    #[test]
    fn faults_name_the_gradient() {
        let buckets = Arc::new(Buckets::new(named(&[2, 2, 2]), 8));
        let reducer = Reducer::new(&Ranks::single(), &buckets, None);
        let text = |error: candle_core::Error| error.to_string();
        reducer.ready("p2", &full(1.0, 2)).unwrap();
        assert!(text(reducer.ready("p2", &full(1.0, 2)).unwrap_err()).contains("`p2` was complete"));
        assert!(text(reducer.ready("p0", &full(1.0, 3)).unwrap_err()).contains("`p0`: expected"));
        assert!(text(reducer.ready("p3", &full(1.0, 2)).unwrap_err()).contains("`p3` is in no bucket"));
        reducer.ready("p0", &full(1.0, 2)).unwrap();
        assert!(text(reducer.finish().unwrap_err()).contains("no gradient reached `p1`"));
    }

    #[test]
    fn the_backward_pass_hands_over_complete_gradients() {
        let (a, b) =
            (Var::new(&[1f32, 2.0], &Device::Cpu).unwrap(), Var::new(&[3f32, 4.0], &Device::Cpu).unwrap());
        let buckets = Arc::new(Buckets::new([("b".into(), 2.into()), ("a".into(), 2.into())], 8));
        let reducer = Arc::new(Reducer::new(&Ranks::single(), &buckets, None));
        let receive = reducer.receiver();
        let parameter = |var: &Var, name| handed_over(name, var.as_tensor(), &receive).unwrap();
        let (x, y) = (parameter(&a, "a"), parameter(&b, "b"));
        // d/da (a·b + a²) = b + 2a; d/db = a; both uses of a before it is handed over
        let loss = ((&x * &y).unwrap() + x.sqr().unwrap()).unwrap().sum_all().unwrap();
        let store = loss.backward().unwrap();
        assert!(store.get(a.as_tensor()).is_none(), "the gradient is kept once");
        let sums = reducer.finish().unwrap();
        assert_eq!(sums["a"].to_vec1::<f32>().unwrap(), [5.0, 8.0]);
        assert_eq!(sums["b"].to_vec1::<f32>().unwrap(), [1.0, 2.0]);
    }
}
