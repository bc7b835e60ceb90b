//! Strict loading: every tensor finds its place and every place its tensor.

use std::collections::BTreeMap;
use std::fmt;

use candle_core::{Tensor, Var};

use super::CheckpointError;

/// Mismatches spelled out; the rest is counted.
const SHOWN: usize = 5;

/// How many tensors were loaded; prints as "N of N tensors".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// Tensors copied.
    pub loaded: usize,
    /// Tensors the model has.
    pub wanted: usize,
}

impl fmt::Display for Loaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} tensors", self.loaded, self.wanted)
    }
}

/// Copies `tensors` into the variables of the same names, converting device and type. Nothing is copied unless names and
/// shapes agree one to one. `what` says which weights these are, for messages.
///
/// # Errors
/// [`CheckpointError::Misfit`] naming what is missing, extra or of another shape; [`CheckpointError::Set`].
pub fn load_into(
    what: &str,
    vars: &BTreeMap<String, Var>,
    tensors: &BTreeMap<String, Tensor>,
) -> Result<Loaded, CheckpointError> {
    let mut mismatches = Vec::new();
    for (name, var) in vars {
        match tensors.get(name) {
            None => mismatches.push(format!("tensor `{name}`: expected {:?}, found none", var.dims())),
            Some(tensor) if tensor.dims() != var.dims() => mismatches.push(format!(
                "tensor `{name}`: expected {:?}, found {:?}",
                var.dims(),
                tensor.dims()
            )),
            Some(_) => {}
        }
    }
    for (name, tensor) in tensors {
        if !vars.contains_key(name) {
            mismatches.push(format!("tensor `{name}`: expected none, found {:?}", tensor.dims()));
        }
    }
    if !mismatches.is_empty() {
        let more = mismatches.len().saturating_sub(SHOWN);
        mismatches.truncate(SHOWN);
        if more > 0 {
            mismatches.push(format!("and {more} more"));
        }
        return Err(CheckpointError::Misfit { what: what.to_owned(), mismatches });
    }
    for (name, var) in vars {
        tensors[name]
            .to_device(var.device())
            .and_then(|t| t.to_dtype(var.dtype()))
            .and_then(|t| var.set(&t))
            .map_err(|source| CheckpointError::Set { name: name.clone(), source })?;
    }
    Ok(Loaded { loaded: vars.len(), wanted: vars.len() })
}
