//! Gradients of parameters that reach no candle store: operations over many parameters leave them here.
//!
//! candle knows operations of at most three tensors, and its store fills a tensor with zeros and adds to a second one
//! at every edge. An operation over a whole network part therefore has one input on the graph and hands the gradients
//! of its parameters over here, each complete as soon as its layer is done.

use candle_core::{Result, Tensor, TensorId};
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Where the gradients of a network's parameters go; clones share one place.
#[derive(Clone)]
pub struct GradientSink(Arc<Place>);

enum Place {
    Kept(Mutex<HashMap<TensorId, Tensor>>),
    HandedOn(Box<Receive>),
}

type Receive = dyn Fn(&Tensor, &Tensor) -> Result<()> + Send + Sync;

impl Default for GradientSink {
    /// Keeps gradients until they are taken.
    fn default() -> Self {
        Self(Arc::new(Place::Kept(Mutex::default())))
    }
}

impl fmt::Debug for GradientSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.0 {
            Place::Kept(_) => write!(f, "GradientSink({} kept)", self.kept().map_or(0, |kept| kept.len())),
            Place::HandedOn(_) => write!(f, "GradientSink(handed on)"),
        }
    }
}

impl GradientSink {
    /// A sink that keeps nothing: `receive(parameter, gradient)` is called as soon as a gradient is complete.
    pub fn handing_on(receive: impl Fn(&Tensor, &Tensor) -> Result<()> + Send + Sync + 'static) -> Self {
        Self(Arc::new(Place::HandedOn(Box::new(receive))))
    }

    fn kept(&self) -> Option<MutexGuard<'_, HashMap<TensorId, Tensor>>> {
        match &*self.0 {
            Place::Kept(gradients) => Some(gradients.lock().unwrap_or_else(PoisonError::into_inner)),
            Place::HandedOn(_) => None,
        }
    }

    /// Hands over a gradient of `parameter`, which is added to what is there; ignored unless the parameter wants one: it is
    /// a variable or made of one.
    ///
    /// - `values`: as many as the parameter holds.
    ///
    /// # Errors
    /// If their number is another one, or the receiver refuses it.
    pub(super) fn add(&self, parameter: &Tensor, values: Vec<f32>) -> Result<()> {
        if !parameter.track_op() {
            return Ok(());
        }
        self.add_tensor(parameter, Tensor::from_vec(values, parameter.shape(), parameter.device())?)
    }

    /// The same for a tensor.
    pub(super) fn add_tensor(&self, parameter: &Tensor, gradient: Tensor) -> Result<()> {
        if let Place::HandedOn(receive) = &*self.0 {
            return receive(parameter, &gradient);
        }
        if let Some(mut gradients) = self.kept() {
            let sum = match gradients.remove(&parameter.id()) {
                Some(before) => (before + gradient)?,
                None => gradient,
            };
            gradients.insert(parameter.id(), sum);
        }
        Ok(())
    }

    /// Takes the gradient of `parameter` out, if one was handed over and kept.
    pub fn take(&self, parameter: &Tensor) -> Option<Tensor> {
        self.kept()?.remove(&parameter.id())
    }

    /// Forgets everything, for example what a failed backward pass left behind.
    pub fn clear(&self) {
        if let Some(mut gradients) = self.kept() {
            gradients.clear();
        }
    }
}
