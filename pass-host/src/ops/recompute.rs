//! Blocks by single operations, of which only the inputs are kept: the backward pass runs each block forward again.

use super::Ops;
use super::gradient_sink::GradientSink;
use super::transformer::{BlockWeights, Plan, composition};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, Result, Shape, Storage, Tensor, Var, bail};

pub(super) fn transformer(
    ops: Ops,
    x: &Tensor,
    blocks: &[BlockWeights],
    plan: &Plan,
    sink: &GradientSink,
) -> Result<Tensor> {
    let mut x = x.clone();
    for (weights, scales) in blocks.iter().zip(&plan.scales) {
        let plan = Plan { scales: vec![scales.clone()], ..plan.clone() };
        let out = composition(ops, &x.detach(), &[weights.detached()], &plan)?;
        x = x.apply_op1(Block { ops, weights: weights.clone(), plan, sink: sink.clone(), out })?;
    }
    Ok(x)
}

/// One block whose output is already known.
struct Block {
    ops: Ops,
    weights: BlockWeights,
    plan: Plan,
    sink: GradientSink,
    out: Tensor,
}

impl CustomOp1 for Block {
    fn name(&self) -> &'static str {
        "recomputed block"
    }

    fn cpu_fwd(&self, _x: &CpuStorage, _layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (storage, layout) = self.out.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => Ok((storage.try_clone(layout)?, self.out.shape().clone())),
            _ => bail!("recomputed block: input and output on different devices"),
        }
    }

    fn cuda_fwd(&self, _x: &CudaStorage, _layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let (storage, layout) = self.out.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) => Ok((storage.try_clone(layout)?, self.out.shape().clone())),
            _ => bail!("recomputed block: input and output on different devices"),
        }
    }

    fn bwd(&self, x: &Tensor, _result: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let x = Var::from_tensor(&x.detach())?;
        let out = composition(self.ops, x.as_tensor(), std::slice::from_ref(&self.weights), &self.plan)?;
        let mut store = out.mul(gradient)?.sum_all()?.backward()?;
        for parameter in self.weights.tensors().into_iter().filter(|parameter| parameter.is_variable()) {
            if let Some(gradient) = store.remove(parameter) {
                self.sink.add_tensor(parameter, gradient)?;
            }
        }
        Ok(store.remove(&x))
    }
}
