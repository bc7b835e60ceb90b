//! AdamW over the head and, if it learns, the backbone (SEMANTICS §7).

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor};

use crate::config::segment::SegmentConfig;
use crate::model::parameters::Parameters;
use crate::ops::{AdamWStep, Ops};

/// First and second moments of one tensor and its own step counter.
struct Moments {
    first: Tensor,
    second: Tensor,
    steps: u64,
}

/// AdamW; tensors that never got a gradient are left alone.
pub struct Optimizer {
    weight_decay: f64,
    betas: [f64; 2],
    eps: f64,
    ops: Ops,
    moments: BTreeMap<String, Moments>,
}

/// Whether weight decay leaves a tensor alone. The published configuration names position embeddings, the class token
/// and `norm`; the norms of its backbone and head have other names, so they are decayed.
fn is_undecayed(name: &str) -> bool {
    ["pos_embed", "cls_token", "prefix_tokens"].iter().any(|key| name.contains(key))
}

impl Optimizer {
    /// No moments yet.
    pub fn new(config: &SegmentConfig, ops: Ops) -> Self {
        Self {
            weight_decay: config.weight_decay,
            betas: config.betas,
            eps: config.eps,
            ops,
            moments: BTreeMap::new(),
        }
    }

    /// One update, in place, of every variable with a gradient.
    ///
    /// # Errors
    /// If a gradient has another shape.
    pub fn step(&mut self, parameters: &[&Parameters], store: &mut GradStore, lr: f64) -> Result<()> {
        let all = parameters.iter().flat_map(|own| own.iter().map(move |(name, tensor)| (own, name, tensor)));
        for (own, name, parameter) in all.filter(|(.., parameter)| parameter.trainable) {
            let Some(gradient) = own.take_gradient(parameter, store)? else { continue };
            if !self.moments.contains_key(name) {
                let zero = || Tensor::zeros(parameter.tensor.shape(), DType::F32, parameter.tensor.device());
                let fresh = Moments { first: zero()?, second: zero()?, steps: 0 };
                self.moments.insert(name.to_owned(), fresh);
            }
            let Some(moments) = self.moments.get_mut(name) else { continue };
            moments.steps += 1;
            let update = AdamWStep {
                lr,
                weight_decay: if is_undecayed(name) { 0.0 } else { self.weight_decay },
                betas: self.betas,
                eps: self.eps,
                step: moments.steps,
                gradient_scale: 1.0,
                momentum: 0.0,
            };
            let (first, second) = (&moments.first, &moments.second);
            self.ops.adamw_ema_step(&parameter.tensor, &gradient, first, second, None, &update)?;
        }
        Ok(())
    }

    /// Moments `exp_avg.NAME`, `exp_avg_sq.NAME` and counters `step.NAME`, for a checkpoint.
    ///
    /// # Errors
    /// If a counter cannot become a tensor.
    pub fn to_tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let mut tensors = Vec::with_capacity(3 * self.moments.len());
        for (name, moments) in &self.moments {
            tensors.push((format!("exp_avg.{name}"), moments.first.clone()));
            tensors.push((format!("exp_avg_sq.{name}"), moments.second.clone()));
            tensors.push((format!("step.{name}"), Tensor::new(&[moments.steps as i64], &Device::Cpu)?));
        }
        Ok(tensors)
    }

    /// Takes over the tensors of a checkpoint of the same parameters.
    ///
    /// # Errors
    /// If a tensor is missing, left over, or of another shape.
    pub fn restore(
        &mut self,
        parameters: &[&Parameters],
        mut tensors: BTreeMap<String, Tensor>,
    ) -> Result<()> {
        self.moments.clear();
        for (name, parameter) in parameters.iter().flat_map(|parameters| parameters.iter()) {
            let Some(first) = tensors.remove(&format!("exp_avg.{name}")) else { continue };
            let (Some(second), Some(steps)) =
                (tensors.remove(&format!("exp_avg_sq.{name}")), tensors.remove(&format!("step.{name}")))
            else {
                candle_core::bail!("optimizer state of `{name}` is not whole");
            };
            let (shape, device) = (parameter.tensor.dims(), parameter.tensor.device());
            if first.dims() != shape || second.dims() != shape {
                candle_core::bail!(
                    "optimizer state of `{name}`: expected {shape:?}, found {:?}",
                    first.dims()
                );
            }
            let steps = steps.flatten_all()?.to_vec1::<i64>()?.first().copied().unwrap_or(0) as u64;
            let on_device = |tensor: Tensor| tensor.to_device(device)?.contiguous();
            let moments = Moments { first: on_device(first)?, second: on_device(second)?, steps };
            self.moments.insert(name.to_owned(), moments);
        }
        match tensors.keys().next() {
            Some(name) => candle_core::bail!("optimizer state: `{name}` belongs to no parameter"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::is_undecayed;

    #[test]
    fn only_positions_and_prefix_tokens_escape_decay() {
        assert!(is_undecayed("backbone.pos_embed") && is_undecayed("backbone.prefix_tokens"));
        for name in ["backbone.blocks.0.norm1.weight", "decode_head.scale_heads.0.0.bn.bias", "neck.bias"] {
            assert!(!is_undecayed(name), "{name}");
        }
    }
}
