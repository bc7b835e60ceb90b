//! Results that are known already, as nodes of candle's graph with a backward pass of their own.

use super::engine::Output;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Storage, Tensor, bail,
};
use std::sync::Mutex;

/// Gradients of the inputs for a gradient of the result; `None` for those that nobody wants.
type Backward<const N: usize> = Box<dyn Fn(&Tensor) -> Result<[Option<Tensor>; N]> + Send + Sync>;

struct Known<const N: usize> {
    name: &'static str,
    result: Mutex<Option<(Storage, Shape)>>,
    backward: Backward<N>,
}

impl<const N: usize> Known<N> {
    fn new(
        name: &'static str,
        result: Output,
        shape: impl Into<Shape>,
        backward: impl Fn(&Tensor) -> Result<[Option<Tensor>; N]> + Send + Sync + 'static,
    ) -> Result<Self> {
        let result = Mutex::new(Some((result.into_storage()?, shape.into())));
        Ok(Self { name, result, backward: Box::new(backward) })
    }

    fn take(&self) -> Option<(Storage, Shape)> {
        self.result.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take()
    }

    fn on_cpu(&self) -> Result<(CpuStorage, Shape)> {
        match self.take() {
            Some((Storage::Cpu(storage), shape)) => Ok((storage, shape)),
            _ => bail!("{}: the result is not on the CPU", self.name),
        }
    }

    fn on_cuda(&self) -> Result<(CudaStorage, Shape)> {
        match self.take() {
            Some((Storage::Cuda(storage), shape)) => Ok((storage, shape)),
            _ => bail!("{}: the result is not on a CUDA device", self.name),
        }
    }
}

impl CustomOp1 for Known<1> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.on_cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.on_cuda()
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let [gradient] = (self.backward)(&gradient.contiguous()?)?;
        Ok(gradient)
    }
}

impl CustomOp2 for Known<2> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.on_cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.on_cuda()
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((self.backward)(&gradient.contiguous()?)?.into())
    }
}

impl CustomOp3 for Known<3> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.on_cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.on_cuda()
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        Ok((self.backward)(&gradient.contiguous()?)?.into())
    }
}

/// `result` as a function of `x`.
pub(super) fn of_one(
    name: &'static str,
    x: &Tensor,
    result: Output,
    shape: impl Into<Shape>,
    backward: impl Fn(&Tensor) -> Result<[Option<Tensor>; 1]> + Send + Sync + 'static,
) -> Result<Tensor> {
    x.apply_op1(Known::new(name, result, shape, backward)?)
}

/// `result` as a function of two tensors.
pub(super) fn of_two(
    name: &'static str,
    [a, b]: [&Tensor; 2],
    result: Output,
    shape: impl Into<Shape>,
    backward: impl Fn(&Tensor) -> Result<[Option<Tensor>; 2]> + Send + Sync + 'static,
) -> Result<Tensor> {
    a.apply_op2(b, Known::new(name, result, shape, backward)?)
}

/// `result` as a function of three tensors.
pub(super) fn of_three(
    name: &'static str,
    [a, b, c]: [&Tensor; 3],
    result: Output,
    shape: impl Into<Shape>,
    backward: impl Fn(&Tensor) -> Result<[Option<Tensor>; 3]> + Send + Sync + 'static,
) -> Result<Tensor> {
    a.apply_op3(b, c, Known::new(name, result, shape, backward)?)
}
