//! AdamW with two parameter groups, clipping of every tensor by its own norm (or of all by theirs together), and the momentum
//! teacher (SEMANTICS §5).

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Result, Tensor};

use crate::config::{ClipBy, OptimConfig};
use crate::model::parameters::Parameters;
use crate::ops::{AdamWStep, Learned, Ops, Update, clip_scale};

/// Gradients of the trained tensors by name.
pub type Gradients = HashMap<String, Tensor>;

/// What the schedules say about one update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepSize {
    /// Learning rate.
    pub lr: f64,
    /// Weight decay of the decayed group.
    pub weight_decay: f64,
    /// Momentum of the teacher.
    pub momentum: f64,
    /// Whether tensors called `…last_layer…` are updated.
    pub train_last_layer: bool,
}

/// First and second moments of one tensor and its own step counter.
#[derive(Clone, Debug)]
struct Moments {
    first: Tensor,
    second: Tensor,
    steps: u64,
}

/// AdamW over the trained tensors of a student.
pub struct Optimizer {
    betas: [f64; 2],
    eps: f64,
    clip: f64,
    clip_by: ClipBy,
    ops: Ops,
    moments: BTreeMap<String, Moments>,
}

/// Whether weight decay leaves a tensor alone: biases and everything with one axis (norms). Position embeddings, the
/// class token and the last layers are decayed, as in the reference.
pub fn is_undecayed(name: &str, rank: usize) -> bool {
    name.ends_with(".bias") || rank == 1
}

/// L2 norm of all gradients together.
pub fn global_norm(norms: &BTreeMap<String, f64>) -> f64 {
    norms.values().map(|norm| norm * norm).sum::<f64>().sqrt()
}

impl Optimizer {
    /// Zero moments for every trained tensor.
    pub fn new(config: &OptimConfig, student: &Parameters, ops: Ops) -> Result<Self> {
        let zero = |tensor: &Tensor| Tensor::zeros(tensor.shape(), DType::F32, tensor.device());
        let moments = student.iter().filter(|(_, parameter)| parameter.trainable).map(|(name, parameter)| {
            let (first, second) = (zero(&parameter.tensor)?, zero(&parameter.tensor)?);
            Ok((name.to_string(), Moments { first, second, steps: 0 }))
        });
        let moments = moments.collect::<Result<_>>()?;
        let OptimConfig { betas, eps, clip, clip_by, .. } = *config;
        Ok(Self { betas, eps, clip, clip_by, ops, moments })
    }

    /// L2 norm of every gradient, not finite if any of its values is not.
    pub fn norms(&self, gradients: &Gradients) -> Result<BTreeMap<String, f64>> {
        let (names, norms) = self.norms_on_device(gradients)?;
        Ok(names.into_iter().zip(norms.to_vec1()?).collect())
    }

    /// Names of all gradients, sorted, and their norms, `[count]` in `f64`, where they are: nothing waits.
    pub fn norms_on_device(&self, gradients: &Gradients) -> Result<(Vec<String>, Tensor)> {
        let mut sorted: Vec<(&String, &Tensor)> = gradients.iter().collect();
        sorted.sort_unstable_by_key(|(name, _)| *name);
        let (names, tensors): (Vec<_>, Vec<_>) = sorted.into_iter().unzip();
        Ok((names.into_iter().cloned().collect(), self.ops.grad_norms(&tensors)?))
    }

    /// What gradients of this norm (each tensor's own, or that of all together) are multiplied with:
    /// `min(1, clip / (norm + 1e-6))`.
    pub fn clip_coefficient(&self, norm: f64) -> f64 {
        clip_scale(norm, self.clip)
    }

    /// One update of the student in place, then of the teacher: `teacher ← m·teacher + (1 − m)·student`.
    ///
    /// A frozen last layer is skipped entirely: no decay, and its step counter does not advance.
    pub fn step(
        &mut self,
        student: &Parameters,
        teacher: &Parameters,
        gradients: &Gradients,
        norms: &BTreeMap<String, f64>,
        size: &StepSize,
    ) -> Result<()> {
        let learns =
            |name: &str| norms.contains_key(name) && (size.train_last_layer || !name.contains("last_layer"));
        for (name, moments) in &mut self.moments {
            moments.steps += u64::from(learns(name) && gradients.contains_key(name));
        }
        // what no network ever changes keeps its bits; frozen magnitudes follow, as in the reference
        let follows = |name: &str, trainable| trainable || name.contains("last_layer");
        let teachers: Vec<Option<Tensor>> = student
            .iter()
            .map(|(name, parameter)| teacher.find(name).filter(|_| follows(name, parameter.trainable)))
            .collect();
        let scale = |name: &str| match (self.clip_by, norms.get(name)) {
            (_, None) => 1.0,
            (ClipBy::Tensor, Some(norm)) => clip_scale(*norm, self.clip),
            (ClipBy::Global, Some(_)) => clip_scale(global_norm(norms), self.clip),
        };
        let updates: Vec<Update<'_>> = student
            .iter()
            .zip(&teachers)
            .map(|((name, parameter), teacher)| {
                let moments = self.moments.get(name).filter(|_| learns(name));
                let learned = moments.zip(gradients.get(name));
                let decayed = !is_undecayed(name, parameter.tensor.rank());
                Update {
                    student: &parameter.tensor,
                    learned: learned.map(|(Moments { first, second, .. }, gradient)| Learned {
                        gradient,
                        first,
                        second,
                    }),
                    teacher: teacher.as_ref(),
                    step: AdamWStep {
                        lr: size.lr,
                        betas: self.betas,
                        eps: self.eps,
                        weight_decay: if decayed { size.weight_decay } else { 0.0 },
                        step: learned.map_or(1, |(moments, _)| moments.steps),
                        gradient_scale: scale(name),
                        momentum: size.momentum,
                    },
                }
            })
            .collect();
        self.ops.update(&updates)
    }

    /// Moments `exp_avg.NAME`, `exp_avg_sq.NAME` and counters `step.NAME`, for a checkpoint.
    pub fn to_tensors(&self) -> Vec<(String, Tensor)> {
        let mut tensors = Vec::with_capacity(3 * self.moments.len());
        for (name, moments) in &self.moments {
            tensors.push((format!("exp_avg.{name}"), moments.first.clone()));
            tensors.push((format!("exp_avg_sq.{name}"), moments.second.clone()));
            if let Ok(steps) = Tensor::new(&[moments.steps as i64], &Device::Cpu) {
                tensors.push((format!("step.{name}"), steps));
            }
        }
        tensors
    }

    /// Moments and counters from a checkpoint of the same student.
    ///
    /// # Errors
    /// If a tensor is missing, left over, or of another shape.
    pub fn restore(
        config: &OptimConfig,
        student: &Parameters,
        mut tensors: BTreeMap<String, Tensor>,
        ops: Ops,
        device: &Device,
    ) -> Result<Self> {
        let mut optimizer = Self::new(config, student, ops)?;
        for (name, moments) in &mut optimizer.moments {
            let mut take = |kind: &str| match tensors.remove(&format!("{kind}.{name}")) {
                Some(tensor) => Ok(tensor),
                None => candle_core::bail!("optimizer state: `{kind}.{name}` is missing"),
            };
            let (first, second, steps) = (take("exp_avg")?, take("exp_avg_sq")?, take("step")?);
            for (kind, stored) in [("exp_avg", &first), ("exp_avg_sq", &second)] {
                if stored.dims() != moments.first.dims() {
                    candle_core::bail!(
                        "optimizer state: `{kind}.{name}`: expected {:?}, found {:?}",
                        moments.first.dims(),
                        stored.dims()
                    );
                }
            }
            moments.first = first.to_device(device)?.contiguous()?;
            moments.second = second.to_device(device)?.contiguous()?;
            moments.steps =
                steps.to_dtype(DType::I64)?.flatten_all()?.to_vec1::<i64>()?.first().copied().unwrap_or(0)
                    as u64;
        }
        match tensors.keys().next() {
            Some(name) => candle_core::bail!("optimizer state: `{name}` belongs to no trained tensor"),
            None => Ok(optimizer),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_biases_and_vectors_escape_decay() {
        assert!(is_undecayed("backbone.blocks.0.norm1.weight", 1));
        assert!(is_undecayed("c_head.mlp.0.bias", 1));
        for (name, rank) in [
            ("backbone.pos_embed", 3),
            ("ca_head.cls_token", 3),
            ("p_head.last_layer.weight_v", 2),
            ("p_head.last_layer.weight_g", 2),
            ("backbone.patch_embed.proj.weight", 4),
        ] {
            assert!(!is_undecayed(name, rank), "{name}");
        }
    }
}
