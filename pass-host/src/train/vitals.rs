//! Figures that show whether the features stay alive: spread of the features, agreement of the positives.

use candle_core::{D, DType, Result, Tensor};

use crate::objective::forward::Monitor;
use crate::ops::Ops;

/// Mean and mean square of L2-normalized patch features `[.., D]`, per channel: `[2, D]`.
pub fn feature_moments(features: &Tensor, ops: Ops) -> Result<Tensor> {
    let rows = features.flatten_to(D::Minus2)?.to_dtype(DType::F32)?;
    let unit = ops.l2_normalize(&rows, 1e-12)?;
    Tensor::stack(&[ops.mean_rows(&unit)?, ops.mean_rows(&unit.sqr()?)?], 0)
}

/// Standard deviation of features from their [`feature_moments`], mean over channels.
///
/// Features spread evenly over the sphere give `1/√D`; identical features give 0.
pub fn feature_std(moments: &Tensor) -> Result<f64> {
    let (mean, mean_of_squares) = (moments.get(0)?, moments.get(1)?);
    let variance = (mean_of_squares - mean.sqr()?)?.relu()?;
    Ok(f64::from(variance.sqrt()?.mean_all()?.to_scalar::<f32>()?))
}

/// How many (patch, positive) pairs of the global crops the teacher assigns to the same prototype, and how many there are.
///
/// A patch's prototype is the largest of its logits less `center`. The share is about 1/K by chance; 1 means that every patch
/// has the prototype of its positives. `None` without a patch objective.
pub fn positives_agreement(monitor: &Monitor, center: Option<&Tensor>) -> Result<Option<[f64; 2]>> {
    let (Some((positives, logits)), Some(center)) = (&monitor.patch, center) else {
        return Ok(None);
    };
    let positives = positives.to_host()?;
    let logits = logits.to_dtype(center.dtype())?;
    let prototypes = logits.broadcast_sub(center)?.argmax(D::Minus1)?.to_vec1::<u32>()?;
    let (mut same, mut all) = (0u64, 0u64);
    for image in 0..positives.batch() {
        let base = image * positives.patches();
        for patch in 0..positives.patches() {
            for &positive in positives.of(image, patch) {
                same += u64::from(prototypes[base + patch] == prototypes[base + positive as usize]);
                all += 1;
            }
        }
    }
    Ok(Some([same as f64, all as f64]))
}
