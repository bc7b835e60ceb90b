//! Sums over all ranks that a loss depends on.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, Result, Shape, Storage, Tensor};

use super::Ranks;

/// An `f32` tensor added up over all ranks, as a step of the graph.
///
/// What is differentiated is the sum of the losses of all ranks, and each of them depends on the sum: the gradient is the
/// sum of the gradients of all ranks. All ranks differentiate the same graph, so they meet in the backward pass as well.
///
/// # Errors
/// If the ranks are lost.
pub fn sum(ranks: &Ranks, tensor: &Tensor) -> Result<Tensor> {
    if !ranks.several() {
        return Ok(tensor.clone());
    }
    let tensor = tensor.contiguous()?;
    let total = over_ranks(ranks, &tensor.detach())?;
    tensor.apply_op1(Summed { ranks: ranks.clone(), total })
}

/// The rows of all ranks, `[ranks · R, C]`, rank after rank, without a gradient. Every rank has as many.
///
/// # Errors
/// If the ranks are lost.
pub fn gather_rows(ranks: &Ranks, rows: &Tensor) -> Result<Tensor> {
    let rows = rows.detach();
    if !ranks.several() {
        return Ok(rows);
    }
    let count = rows.dim(0)?;
    let own = rows.pad_with_zeros(0, count * ranks.rank(), count * (ranks.size() - 1 - ranks.rank()))?;
    over_ranks(ranks, &own.contiguous()?)
}

fn over_ranks(ranks: &Ranks, tensor: &Tensor) -> Result<Tensor> {
    let pending = ranks.start_sum(tensor.clone()).map_err(candle_core::Error::wrap)?;
    pending().map_err(candle_core::Error::wrap)
}

/// Gives the sum that was formed before.
struct Summed {
    ranks: Ranks,
    total: Tensor,
}

impl Summed {
    fn unfit(&self) -> candle_core::Error {
        candle_core::Error::Msg(format!("the sum over {} is on another device", self.ranks))
    }
}

impl CustomOp1 for Summed {
    fn name(&self) -> &'static str {
        "sum over all ranks"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let (storage, layout) = self.total.storage_and_layout();
        match &*storage {
            Storage::Cpu(total) => Ok((total.try_clone(layout)?, layout.shape().clone())),
            _ => Err(self.unfit()),
        }
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        let (storage, layout) = self.total.storage_and_layout();
        match &*storage {
            Storage::Cuda(total) => Ok((total.try_clone(layout)?, layout.shape().clone())),
            _ => Err(self.unfit()),
        }
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(over_ranks(&self.ranks, &gradient.contiguous()?)?))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::super::threads::on_ranks;
    use super::*;

    #[test]
    fn the_gradient_of_a_sum_comes_from_every_rank() {
        let results = on_ranks(3, |ranks| {
            let rank = ranks.rank() as f32;
            let x = Var::new(&[rank + 1.0, 10.0 * (rank + 1.0)], &Device::Cpu).unwrap();
            let total = sum(&ranks, x.as_tensor()).unwrap();
            // each rank weighs the sum otherwise: 1, 2, 3
            let loss = (total.sqr().unwrap() * f64::from(rank + 1.0)).unwrap().sum_all().unwrap();
            let gradient = loss.backward().unwrap().get(&x).unwrap().to_vec1::<f32>().unwrap();
            (total.to_vec1::<f32>().unwrap(), gradient)
        });
        for (total, gradient) in results {
            assert_eq!(total, [6.0, 60.0]);
            // Σ ranks (1 + 2 + 3) · 2 · total
            assert_eq!(gradient, [72.0, 720.0]);
        }
    }

    #[test]
    fn rows_come_rank_after_rank() {
        let results = on_ranks(3, |ranks| {
            let rank = ranks.rank() as f32;
            let rows = Tensor::new(&[[rank, 0.5], [rank, 1.5]], &Device::Cpu).unwrap();
            gather_rows(&ranks, &rows).unwrap().to_vec2::<f32>().unwrap()
        });
        for rows in results {
            assert_eq!(
                rows,
                [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]
                    .map(|r| r)
                    .iter()
                    .enumerate()
                    .map(|(i, &r)| vec![r, if i % 2 == 0 { 0.5 } else { 1.5 }])
                    .collect::<Vec<_>>()
            );
        }
    }
}
