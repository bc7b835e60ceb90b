//! What contrastive methods share: every query has one key among many.

use candle_core::{D, DType, Device, Result, Tensor};

use crate::ops::Ops;

/// ε of the L2 normalization of queries and keys.
const NORMALIZE_EPS: f64 = 1e-12;

/// Rows of length one, `[R, C]`.
pub fn unit(rows: &Tensor, ops: Ops) -> Result<Tensor> {
    ops.l2_normalize(rows, NORMALIZE_EPS)
}

/// Mean cross-entropy of queries over `logits` `[R, M]` (similarities over the temperature), row `r`'s own key being
/// column `own[r]`; and the share of the rows whose own key is the nearest, without a gradient.
pub fn cross_entropy(logits: &Tensor, own: &[u32]) -> Result<(Tensor, Tensor)> {
    let own = Tensor::new(own, logits.device())?.unsqueeze(1)?;
    let largest = logits.detach().max_keepdim(D::Minus1)?;
    let shifted = logits.broadcast_sub(&largest)?;
    let own = shifted.gather(&own, 1)?;
    let loss = (shifted.exp()?.sum_keepdim(D::Minus1)?.log()? - &own)?.mean_all()?;
    let nearest = own.detach().ge(&own.zeros_like()?)?.to_dtype(DType::F32)?.mean_all()?;
    Ok((loss, nearest))
}

/// Both directions of a pair of views.
pub struct Symmetric {
    /// Sum of the two losses.
    pub loss: Tensor,
    /// Mean of the two shares.
    pub accuracy: Tensor,
}

/// Adds up the two directions, each `(loss, accuracy)`.
pub fn symmetric([one, other]: [(Tensor, Tensor); 2]) -> Result<Symmetric> {
    Ok(Symmetric { loss: (one.0 + other.0)?, accuracy: ((one.1 + other.1)? / 2.0)? })
}

/// Column of the own key of each of `batch` queries of rank `rank`, among the keys of all ranks.
pub fn own_columns(batch: usize, rank: usize) -> Vec<u32> {
    (0..batch).map(|image| (rank * batch + image) as u32).collect()
}

/// Random rows of length one, `[rows, columns]`.
pub fn random_units(
    mut normal: impl FnMut() -> f64,
    rows: usize,
    columns: usize,
    device: &Device,
) -> Result<Tensor> {
    let mut values = Vec::with_capacity(rows * columns);
    for _ in 0..rows {
        let row: Vec<f64> = (0..columns).map(|_| normal()).collect();
        let length = row.iter().map(|value| value * value).sum::<f64>().sqrt().max(NORMALIZE_EPS);
        values.extend(row.iter().map(|value| (value / length) as f32));
    }
    Tensor::from_vec(values, (rows, columns), device)
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;

    #[test]
    fn loss_accuracy_and_gradient_are_those_of_a_hand() {
        let logits = Var::new(&[[1.0f64, 3.0, 2.0], [0.5, 0.5, -1.0]], &Device::Cpu).unwrap();
        let (loss, accuracy) = cross_entropy(logits.as_tensor(), &[2, 0]).unwrap();
        let partition = |row: [f64; 3]| row.iter().map(|x| x.exp()).sum::<f64>();
        let (first, second) = (partition([1.0, 3.0, 2.0]), partition([0.5, 0.5, -1.0]));
        let expected = (first.ln() - 2.0 + second.ln() - 0.5) / 2.0;
        assert!((loss.to_scalar::<f64>().unwrap() - expected).abs() < 1e-12);
        // a tie counts as nearest
        assert_eq!(accuracy.to_scalar::<f32>().unwrap(), 0.5);
        let store = loss.backward().unwrap();
        let gradient = store.get(&logits).unwrap().to_vec2::<f64>().unwrap();
        assert!((gradient[0][1] - 3f64.exp() / first / 2.0).abs() < 1e-12);
        assert!((gradient[1][0] - (0.5f64.exp() / second - 1.0) / 2.0).abs() < 1e-12);
    }
}
