//! Running centers of the teacher's outputs (SEMANTICS §4): `c ← m·c + (1 − m)·mean`, after the loss was formed.

use candle_core::{DType, Device, Result, Tensor};

use crate::model::Architecture;

/// Both centers.
#[derive(Clone, Debug)]
pub struct Centers {
    /// Center of the class logits, `[K]`.
    pub class: Tensor,
    /// Center of the patch logits, `[K]`.
    pub patch: Option<Tensor>,
}

impl Centers {
    /// Zero centers.
    pub fn new(architecture: &Architecture, device: &Device) -> Result<Self> {
        let zeros = |prototypes| Tensor::zeros(prototypes, DType::F32, device);
        Ok(Self {
            class: zeros(architecture.class_prototypes)?,
            patch: architecture.patch_prototypes.map(zeros).transpose()?,
        })
    }

    /// The centers after a step whose teacher outputs had these means.
    pub fn updated(&self, mean: &Self, momentum: f64) -> Result<Self> {
        let update = |old: &Tensor, new: &Tensor| (old * momentum)? + (new * (1.0 - momentum))?;
        let patch = match (&self.patch, &mean.patch) {
            (Some(old), Some(new)) => Some(update(old, new)?),
            (old, _) => old.clone(),
        };
        Ok(Self { class: update(&self.class, &mean.class)?, patch })
    }

    /// The mean of several micro-batches of equal size.
    pub fn mean(parts: &[Self]) -> Result<Self> {
        let average = |tensors: Vec<&Tensor>| Tensor::stack(&tensors, 0)?.mean(0);
        let patches: Option<Vec<_>> = parts.iter().map(|part| part.patch.as_ref()).collect();
        Ok(Self {
            class: average(parts.iter().map(|part| &part.class).collect())?,
            patch: patches.map(average).transpose()?,
        })
    }
}
