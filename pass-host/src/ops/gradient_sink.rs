//! Gradients of parameters that reach no candle store: operations over many parameters leave them here.
//!
//! candle knows operations of at most three tensors, and its store fills a tensor with zeros and adds to a second one
//! at every edge. An operation over a whole network part therefore has one input on the graph and hands the gradients
//! of its parameters over here, each complete as soon as its layer is done.

use candle_core::{Result, Tensor, TensorId};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Where the gradients of a network's parameters are collected; clones share one collection.
#[derive(Clone, Debug, Default)]
pub struct GradientSink(Arc<Mutex<HashMap<TensorId, Tensor>>>);

impl GradientSink {
    fn gradients(&self) -> MutexGuard<'_, HashMap<TensorId, Tensor>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands over a gradient of `parameter`, which is added to what is there; ignored unless it is a variable.
    ///
    /// - `values`: as many as the parameter holds.
    ///
    /// # Errors
    /// If their number is another one.
    pub(super) fn add(&self, parameter: &Tensor, values: Vec<f32>) -> Result<()> {
        if !parameter.is_variable() {
            return Ok(());
        }
        self.add_tensor(parameter, Tensor::from_vec(values, parameter.shape(), parameter.device())?)
    }

    /// The same for a tensor.
    pub(super) fn add_tensor(&self, parameter: &Tensor, gradient: Tensor) -> Result<()> {
        let mut gradients = self.gradients();
        let sum = match gradients.remove(&parameter.id()) {
            Some(before) => (before + gradient)?,
            None => gradient,
        };
        gradients.insert(parameter.id(), sum);
        Ok(())
    }

    /// Takes the gradient of `parameter` out, if one was handed over.
    pub fn take(&self, parameter: &Tensor) -> Option<Tensor> {
        self.gradients().remove(&parameter.id())
    }

    /// Forgets everything, for example what a failed backward pass left behind.
    pub fn clear(&self) {
        self.gradients().clear();
    }
}
