//! Tensors as `f32` slices: reading them, writing them in place, and making them from vectors.

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Result, Shape, Storage, Tensor, bail};
use std::cell::RefCell;

/// True where the fused kernels apply: every tensor holds `f32` on the CPU.
pub(super) fn on_cpu_f32(tensors: &[&Tensor]) -> bool {
    tensors.iter().all(|tensor| tensor.device().is_cpu() && tensor.dtype() == DType::F32)
}

/// A half-precision tensor in `f32`, for what is computed in `f32` always; others as they are.
pub(super) fn wide(tensor: &Tensor) -> Result<Tensor> {
    match tensor.dtype() {
        DType::BF16 | DType::F16 => tensor.to_dtype(DType::F32),
        _ => Ok(tensor.clone()),
    }
}

/// The values of a contiguous CPU storage.
pub(super) fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("a fused operation needs contiguous tensors, found strides {:?}", layout.stride()),
    }
}

/// The values of a contiguous CPU tensor, from its [`Tensor::storage_and_layout`].
pub(super) fn stored<'a>(storage: &'a Storage, layout: &Layout) -> Result<&'a [f32]> {
    match storage {
        Storage::Cpu(storage) => values(storage, layout),
        _ => bail!("a fused CPU operation found a tensor on another device"),
    }
}

/// Calls `task` with the values of contiguous CPU tensors.
pub(super) fn with_values<const N: usize, R>(
    tensors: [&Tensor; N],
    task: impl FnOnce([&[f32]; N]) -> Result<R>,
) -> Result<R> {
    let guards = tensors.map(Tensor::storage_and_layout);
    let mut slices = [&[][..]; N];
    for (slice, (storage, layout)) in slices.iter_mut().zip(&guards) {
        *slice = stored(storage, layout)?;
    }
    task(slices)
}

/// A CPU tensor that takes over the vector.
pub(super) fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(values, shape.into(), &Device::Cpu)
}

/// The same as the result of a custom operation.
pub(super) fn output(values: Vec<f32>, shape: impl Into<Shape>) -> Result<(CpuStorage, Shape)> {
    Ok((CpuStorage::F32(values), shape.into()))
}

/// An in-place operation made of a closure over the values.
struct InPlace<F>(RefCell<F>);

impl<F: FnMut(&mut [f32]) -> Result<()>> InplaceOp1 for InPlace<F> {
    fn name(&self) -> &'static str {
        "in-place"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let CpuStorage::F32(values) = storage else { bail!("in-place operations need f32 tensors") };
        match layout.contiguous_offsets() {
            Some((start, end)) => (self.0.borrow_mut())(&mut values[start..end]),
            None => bail!("in-place operations need contiguous tensors"),
        }
    }
}

/// Calls `change` on the values of a contiguous CPU `f32` tensor. Calls may nest over tensors with storages of their
/// own (nesting over two views of one storage would wait for itself).
pub(super) fn in_place(tensor: &Tensor, change: impl FnMut(&mut [f32]) -> Result<()>) -> Result<()> {
    tensor.inplace_op1(&InPlace(RefCell::new(change)))
}
