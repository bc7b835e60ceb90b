//! Tensors as addresses, kernel launches and matrix products.
//!
//! A CUDA tensor runs on its device; a CPU tensor in the emulator, if that was compiled in. All work of a device goes
//! through one stream, in order, which is why addresses of tensors may be given to launches that finish later.
#![cfg_attr(
    any(feature = "cuda", feature = "_emulator"),
    expect(unsafe_code, reason = "kernels and cuBLAS take raw addresses; sizes are proved from tensors")
)]
#![cfg_attr(
    not(any(feature = "cuda", feature = "_emulator")),
    expect(dead_code, reason = "launches are described the same, but nothing reads them")
)]

use candle_core::op::BackpropOp;
use candle_core::{DType, Device, Error, Result, Shape, Storage, Tensor, bail};

/// True if kernels can run on this device.
pub(crate) fn runs_on(device: &Device) -> bool {
    match device {
        Device::Cuda(_) => cfg!(feature = "cuda"),
        Device::Cpu => cfg!(feature = "_emulator"),
        Device::Metal(_) => false,
    }
}

/// Address of the first value of a contiguous tensor.
pub(super) fn address(tensor: &Tensor) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let Some((start, _)) = layout.contiguous_offsets() else {
        bail!("a kernel needs contiguous tensors, found strides {:?}", layout.stride())
    };
    Ok(base(&storage)? + (start * storage.dtype().size_in_bytes()) as u64)
}

/// Address of the first value of a storage.
fn base(storage: &Storage) -> Result<u64> {
    use candle_core::CpuStorage;
    match storage {
        Storage::Cpu(CpuStorage::F32(values)) => Ok(values.as_ptr() as u64),
        Storage::Cpu(CpuStorage::BF16(values)) => Ok(values.as_ptr() as u64),
        Storage::Cpu(CpuStorage::U32(values)) => Ok(values.as_ptr() as u64),
        Storage::Cpu(CpuStorage::I64(values)) => Ok(values.as_ptr() as u64),
        Storage::Cpu(CpuStorage::F64(values)) => Ok(values.as_ptr() as u64),
        #[cfg(feature = "cuda")]
        Storage::Cuda(storage) => device::base(storage),
        other => bail!("no kernel takes tensors of {:?} on {:?}", other.dtype(), other.device().location()),
    }
}

/// Memory for a result, not yet written.
pub(super) struct Output {
    storage: Storage,
    address: u64,
}

impl Output {
    /// `len` values of `dtype` on the device of `like`.
    pub(super) fn new(len: usize, dtype: DType, like: &Tensor) -> Result<Self> {
        let storage = match like.device() {
            Device::Cpu => Storage::Cpu(emulator::memory(len, dtype)?),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Storage::Cuda(device::memory(device, len, dtype)?),
            other => bail!("no kernel runs on {:?}", other.location()),
        };
        let address = base(&storage)?;
        Ok(Self { storage, address })
    }

    /// As many values of the same type as `like` has.
    pub(super) fn like(like: &Tensor) -> Result<Self> {
        Self::new(like.elem_count(), like.dtype(), like)
    }

    /// Address of value `at`.
    pub(super) fn at(&self, at: usize) -> u64 {
        self.address + (at * self.storage.dtype().size_in_bytes()) as u64
    }

    /// Type of the values.
    pub(super) fn dtype(&self) -> DType {
        self.storage.dtype()
    }

    /// The memory itself, for a node of the graph.
    pub(super) fn into_storage(self) -> Result<Storage> {
        emulator::check(&self.storage)?;
        Ok(self.storage)
    }

    /// The values as a constant.
    pub(super) fn tensor(self, shape: impl Into<Shape>) -> Result<Tensor> {
        Ok(Tensor::from_storage(self.into_storage()?, shape, BackpropOp::none(), false))
    }
}

/// What a kernel is given.
#[derive(Clone, Copy, Debug)]
enum Argument {
    Address(u64),
    Word(u64),
    Int(i32),
    Float(f32),
    Double(f64),
}

/// A launch under construction; what goes wrong on the way is told by [`Launch::run`].
pub(super) struct Launch {
    device: Device,
    module: String,
    kernel: &'static str,
    grid: [u32; 3],
    block: [u32; 3],
    shared: usize,
    arguments: Vec<Argument>,
    problem: Option<Error>,
}

/// Threads of a block unless said otherwise.
const BLOCK: u32 = 256;
/// Threads of a warp.
const WARP: usize = 32;

impl Launch {
    /// `kernel` of `module` for activations of `dtype`, on the device of `like`.
    pub(super) fn new(module: &str, kernel: &'static str, dtype: DType, like: &Tensor) -> Self {
        Self {
            device: like.device().clone(),
            module: format!("{module}_{}", if dtype == DType::BF16 { "bf16" } else { "f32" }),
            kernel,
            grid: [1; 3],
            block: [BLOCK, 1, 1],
            shared: 0,
            arguments: Vec::with_capacity(16),
            problem: None,
        }
    }

    fn size(&mut self, number: usize) -> u32 {
        u32::try_from(number).unwrap_or_else(|error| {
            self.problem.get_or_insert(Error::wrap(error));
            0
        })
    }

    /// One thread for each of `count` items.
    pub(super) fn threads(self, count: usize) -> Self {
        self.blocks(count.div_ceil(BLOCK as usize), BLOCK)
    }

    /// One warp for each of `count` items, with `shared` bytes of memory each.
    pub(super) fn warps(self, count: usize, shared: usize) -> Self {
        let warps = BLOCK as usize / WARP;
        self.blocks(count.div_ceil(warps), BLOCK).shared(warps * shared)
    }

    /// `count` blocks of `threads` threads.
    pub(super) fn blocks(mut self, count: usize, threads: u32) -> Self {
        self.grid = [self.size(count), 1, 1];
        self.block = [threads, 1, 1];
        self
    }

    /// Blocks of 32 columns by 8 rows of threads, for `columns` columns and `parts` parts of rows.
    pub(super) fn tiles(mut self, columns: usize, parts: usize) -> Self {
        self.grid = [self.size(columns.div_ceil(WARP)), self.size(parts), 1];
        self.block = [WARP as u32, 8, 1];
        self
    }

    /// Bytes of shared memory of a block.
    pub(super) fn shared(mut self, bytes: usize) -> Self {
        self.shared = bytes;
        self
    }

    /// A contiguous tensor.
    pub(super) fn tensor(mut self, tensor: &Tensor) -> Self {
        match address(tensor) {
            Ok(address) => self.arguments.push(Argument::Address(address)),
            Err(error) => self.problem = self.problem.or(Some(error)),
        }
        self
    }

    /// A result, or memory that an earlier launch has written.
    pub(super) fn output(mut self, output: &Output) -> Self {
        self.arguments.push(Argument::Address(output.address));
        self
    }

    /// No tensor.
    pub(super) fn null(mut self) -> Self {
        self.arguments.push(Argument::Address(0));
        self
    }

    /// A size as `int`.
    pub(super) fn int(mut self, number: usize) -> Self {
        match i32::try_from(number) {
            Ok(number) => self.arguments.push(Argument::Int(number)),
            Err(error) => self.problem = self.problem.or(Some(Error::wrap(error))),
        }
        self
    }

    /// A size in 64 bits.
    pub(super) fn word(mut self, number: usize) -> Self {
        self.arguments.push(Argument::Word(number as u64));
        self
    }

    /// A number.
    pub(super) fn float(mut self, number: f32) -> Self {
        self.arguments.push(Argument::Float(number));
        self
    }

    /// A number in double precision.
    pub(super) fn double(mut self, number: f64) -> Self {
        self.arguments.push(Argument::Double(number));
        self
    }

    /// Queues the launch; nothing to do if the grid is empty.
    pub(super) fn run(self) -> Result<()> {
        if let Some(problem) = self.problem {
            return Err(problem.context(format!("kernel {}", self.kernel)));
        }
        if self.shared > MOST_SHARED {
            bail!("kernel {}: {} bytes of shared memory", self.kernel, self.shared)
        }
        if self.grid.contains(&0) {
            return Ok(());
        }
        match &self.device {
            Device::Cpu => emulator::launch(&self),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => device::launch(device, &self),
            other => bail!("no kernel runs on {:?}", other.location()),
        }
    }
}

/// Bytes of shared memory that a launch may ask for: what every device gives a block, less what reductions take.
pub(super) const MOST_SHARED: usize = 47 << 10;

/// How many neighboring values one access can carry, and whether all of these addresses and lengths allow it.
pub(super) fn packed(dtype: DType, multiples: &[usize], addresses: &[u64]) -> (usize, usize) {
    let values = 16 / dtype.size_in_bytes();
    let fits = multiples.iter().all(|multiple| multiple % values == 0)
        && addresses.iter().all(|address| address % 16 == 0);
    if fits { (values, 1) } else { (1, 0) }
}

/// A batch of row-major matrices.
#[derive(Clone, Copy, Debug)]
pub(super) struct Matrices {
    /// First value of the first one.
    pub(super) address: u64,
    /// `f32` or `bf16`.
    pub(super) dtype: DType,
    /// Values from one row to the next.
    pub(super) row: usize,
    /// Values from one matrix to the next.
    pub(super) stride: usize,
    /// Whether it takes part transposed.
    pub(super) transposed: bool,
}

impl Matrices {
    /// One matrix with rows of `row` values.
    pub(super) fn one(address: u64, dtype: DType, row: usize) -> Self {
        Self { address, dtype, row, stride: 0, transposed: false }
    }

    /// The transposed matrices.
    pub(super) fn t(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }
}

/// `out = scale · a · b` for `batch` matrices, `a: [m, k]`, `b: [k, n]`; sums in `f32`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) batch: usize,
    pub(super) scale: f32,
    pub(super) a: Matrices,
    pub(super) b: Matrices,
    pub(super) out: Matrices,
}

impl Product {
    /// Queues the product on the device of `like`.
    pub(super) fn run(self, like: &Tensor) -> Result<()> {
        match like.device() {
            Device::Cpu => emulator::multiply(&self),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => device::multiply(device, &self),
            other => bail!("no product runs on {:?}", other.location()),
        }
    }
}

#[cfg(feature = "cuda")]
pub(crate) use device::open;

/// Opens a CUDA device.
#[cfg(not(feature = "cuda"))]
pub(crate) fn open(index: usize) -> Result<Device> {
    Device::new_cuda(index)
}

/// The CUDA device.
#[cfg(feature = "cuda")]
mod device {
    use super::{Argument, Launch, Matrices, Product};
    use candle_core::backend::BackendDevice;
    use candle_core::cuda_backend::cudarc::cublas::{result as cublas, sys as blas};
    use candle_core::cuda_backend::cudarc::driver::{DevicePtr, LaunchConfig, PushKernelArg, sys};
    use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
    use candle_core::{CudaDevice, CudaStorage, DType, Device, Error, Result, Shape, bail};
    use std::ffi::c_void;

    /// The text of every module.
    const MODULES: &[(&str, &str)] = &include!(concat!(env!("OUT_DIR"), "/ptx.rs"));

    /// Opens a device for work in one stream: without events around every allocation, and with a memory pool that keeps
    /// what it has instead of giving it back at every synchronization.
    pub(crate) fn open(index: usize) -> Result<Device> {
        let device = Device::new_cuda_with_stream(index)?;
        let Device::Cuda(cuda) = &device else { return Ok(device) };
        // SAFETY: this program computes in the one stream made above. The only other stream is that of `upload`, which
        // orders itself after and before it with events of its own.
        unsafe { cuda.disable_event_tracking() };
        let (mut pool, mut keep) = (std::ptr::null_mut(), u64::MAX);
        let kept = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: `pool` and `keep` live through both calls; the attribute is a 64-bit number. A device without pools
        // answers with an error, which changes nothing.
        unsafe {
            if sys::cuDeviceGetDefaultMemPool(&mut pool, cuda.cuda_stream().context().cu_device())
                == sys::CUresult::CUDA_SUCCESS
            {
                let _ =
                    sys::cuMemPoolSetAttribute(pool, kept, std::ptr::from_mut(&mut keep).cast::<c_void>());
            }
        }
        Ok(device)
    }

    pub(super) fn base(storage: &CudaStorage) -> Result<u64> {
        let stream = storage.device.cuda_stream();
        Ok(match &storage.slice {
            CudaStorageSlice::F32(values) => values.device_ptr(&stream).0,
            CudaStorageSlice::BF16(values) => values.device_ptr(&stream).0,
            CudaStorageSlice::U32(values) => values.device_ptr(&stream).0,
            CudaStorageSlice::I64(values) => values.device_ptr(&stream).0,
            CudaStorageSlice::F64(values) => values.device_ptr(&stream).0,
            _ => bail!("no kernel takes this type of values"),
        })
    }

    pub(super) fn memory(device: &CudaDevice, len: usize, dtype: DType) -> Result<CudaStorage> {
        // SAFETY: every kernel of this module writes its whole result before anything reads it.
        unsafe { device.alloc_uninit(&Shape::from(len.max(1)), dtype) }
    }

    pub(super) fn launch(device: &CudaDevice, launch: &Launch) -> Result<()> {
        let Some((_, text)) = MODULES.iter().find(|(name, _)| *name == launch.module) else {
            bail!("there is no module {}", launch.module)
        };
        let function = device.get_or_load_custom_func(launch.kernel, &launch.module, text)?;
        let mut builder = function.builder();
        for argument in &launch.arguments {
            match argument {
                Argument::Address(value) | Argument::Word(value) => builder.arg(value),
                Argument::Int(value) => builder.arg(value),
                Argument::Float(value) => builder.arg(value),
                Argument::Double(value) => builder.arg(value),
            };
        }
        let size = |[x, y, z]: [u32; 3]| (x, y, z);
        let config = LaunchConfig {
            grid_dim: size(launch.grid),
            block_dim: size(launch.block),
            shared_mem_bytes: launch.shared as u32,
        };
        // SAFETY: the emulator runs the same launches in the tests and checks that kernels stay inside their results;
        // tensors outlive the launch call, and memory is freed in stream order after it.
        unsafe { builder.launch(config) }.map(|_| ()).w()
    }

    fn kind(dtype: DType) -> blas::cudaDataType {
        if dtype == DType::BF16 { blas::cudaDataType::CUDA_R_16BF } else { blas::cudaDataType::CUDA_R_32F }
    }

    fn operation(matrices: &Matrices) -> blas::cublasOperation_t {
        if matrices.transposed {
            blas::cublasOperation_t::CUBLAS_OP_T
        } else {
            blas::cublasOperation_t::CUBLAS_OP_N
        }
    }

    pub(super) fn multiply(device: &CudaDevice, product: &Product) -> Result<()> {
        let (scale, zero) = (product.scale, 0.0f32);
        let int = |number: usize| i32::try_from(number).map_err(Error::wrap);
        let constant = |number: &f32| std::ptr::from_ref(number).cast::<c_void>();
        // cuBLAS counts columns first: the transposed result is the product of the transposed factors in turn
        let Product { m, n, k, batch, a, b, out, .. } = *product;
        // SAFETY: sizes and strides describe matrices inside live tensors; the emulator multiplies by the same
        // description in the tests. The constants are read before the call returns.
        unsafe {
            cublas::gemm_strided_batched_ex(
                *device.cublas_handle().handle(),
                operation(&b),
                operation(&a),
                int(n)?,
                int(m)?,
                int(k)?,
                constant(&scale),
                b.address as *const c_void,
                kind(b.dtype),
                int(b.row)?,
                b.stride as i64,
                a.address as *const c_void,
                kind(a.dtype),
                int(a.row)?,
                a.stride as i64,
                constant(&zero),
                out.address as *mut c_void,
                kind(out.dtype),
                int(out.row)?,
                out.stride as i64,
                int(batch)?,
                blas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                blas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
            )
        }
        .map_err(Error::wrap)
    }
}

/// The emulator of the tests: kernels compiled as C++, on memory of the processor.
#[cfg(feature = "_emulator")]
mod emulator {
    use super::{Argument, Launch, Matrices, Product};
    use candle_core::{CpuStorage, DType, Error, Result, Storage, bail};
    use half::bf16;
    use rayon::prelude::*;
    use std::ffi::{CStr, CString, c_char, c_void};

    #[link(name = "pass_emulator", kind = "static")]
    unsafe extern "C" {
        fn pass_emulate(
            module: *const c_char,
            name: *const c_char,
            grid: *const u32,
            block: *const u32,
            shared: u32,
            arguments: *mut *mut c_void,
        ) -> *const c_char;
    }

    /// Values behind every result that nothing may touch.
    const GUARD: usize = 64;

    /// Memory that holds no number until it is written, with a guard behind it.
    pub(super) fn memory(len: usize, dtype: DType) -> Result<CpuStorage> {
        fn filled<T: Copy>(len: usize, with: T) -> Vec<T> {
            let mut values = vec![with; len + GUARD];
            values.truncate(len);
            values
        }
        Ok(match dtype {
            DType::F32 => CpuStorage::F32(filled(len, f32::from_bits(u32::MAX))),
            DType::BF16 => CpuStorage::BF16(filled(len, bf16::from_bits(u16::MAX))),
            DType::U32 => CpuStorage::U32(filled(len, u32::MAX)),
            DType::F64 => CpuStorage::F64(filled(len, f64::from_bits(u64::MAX))),
            other => bail!("no kernel writes {other:?}"),
        })
    }

    /// Fails if a kernel has written behind this memory.
    pub(super) fn check(storage: &Storage) -> Result<()> {
        fn intact<T>(values: &[T], capacity: usize) -> bool {
            let bytes = if capacity >= values.len() + GUARD { GUARD * size_of::<T>() } else { 0 };
            // SAFETY: `memory` wrote the guard, which lies between the length and the capacity of the vector.
            let guard = unsafe { std::slice::from_raw_parts(values.as_ptr_range().end.cast::<u8>(), bytes) };
            guard.iter().all(|&byte| byte == u8::MAX)
        }
        let whole = match storage {
            Storage::Cpu(CpuStorage::F32(values)) => intact(values, values.capacity()),
            Storage::Cpu(CpuStorage::BF16(values)) => intact(values, values.capacity()),
            Storage::Cpu(CpuStorage::U32(values)) => intact(values, values.capacity()),
            Storage::Cpu(CpuStorage::F64(values)) => intact(values, values.capacity()),
            _ => true,
        };
        if !whole {
            bail!("a kernel wrote behind its result")
        }
        Ok(())
    }

    pub(super) fn launch(launch: &Launch) -> Result<()> {
        let name = |text: &str| CString::new(text).map_err(Error::wrap);
        let (module, kernel) = (name(&launch.module)?, name(launch.kernel)?);
        let mut pointers: Vec<*mut c_void> = launch
            .arguments
            .iter()
            .map(|argument| match argument {
                Argument::Address(value) | Argument::Word(value) => {
                    std::ptr::from_ref(value).cast_mut().cast()
                }
                Argument::Int(value) => std::ptr::from_ref(value).cast_mut().cast(),
                Argument::Float(value) => std::ptr::from_ref(value).cast_mut().cast(),
                Argument::Double(value) => std::ptr::from_ref(value).cast_mut().cast(),
            })
            .collect();
        // SAFETY: the arguments have the types of the kernel's parameters and outlive the call, which only reads them;
        // the answer is null or a constant text.
        let problem = unsafe {
            let problem = pass_emulate(
                module.as_ptr(),
                kernel.as_ptr(),
                launch.grid.as_ptr(),
                launch.block.as_ptr(),
                launch.shared as u32,
                pointers.as_mut_ptr(),
            );
            (!problem.is_null()).then(|| CStr::from_ptr(problem).to_string_lossy().into_owned())
        };
        match problem {
            Some(problem) => bail!("kernel {}::{}: {problem}", launch.module, launch.kernel),
            None => Ok(()),
        }
    }

    impl Matrices {
        /// A value of a matrix of the batch; `row` and `column` as it takes part.
        ///
        /// # Safety
        /// The value must exist.
        unsafe fn get(&self, matrix: usize, row: usize, column: usize) -> f32 {
            let (row, column) = if self.transposed { (column, row) } else { (row, column) };
            let at = matrix * self.stride + row * self.row + column;
            // SAFETY: promised by the caller.
            unsafe {
                match self.dtype {
                    DType::BF16 => (*(self.address as *const bf16).add(at)).to_f32(),
                    _ => *(self.address as *const f32).add(at),
                }
            }
        }
    }

    pub(super) fn multiply(product: &Product) -> Result<()> {
        let Product { m, n, k, batch, a, b, out, scale } = *product;
        // what cuBLAS would refuse
        for (matrices, columns) in
            [(a, if a.transposed { m } else { k }), (b, if b.transposed { k } else { n }), (out, n)]
        {
            if matrices.row < columns {
                bail!("rows of {columns} values are {} apart", matrices.row)
            }
        }
        (0..batch * m).into_par_iter().for_each(|place| {
            let (matrix, row) = (place / m, place % m);
            // SAFETY: the description of the product promises these values; every task writes a row of its own.
            unsafe {
                let left: Vec<f32> = (0..k).map(|i| a.get(matrix, row, i)).collect();
                for column in 0..n {
                    let sum: f64 =
                        (0..k).map(|i| f64::from(left[i]) * f64::from(b.get(matrix, i, column))).sum();
                    let (value, at) = (sum as f32 * scale, matrix * out.stride + row * out.row + column);
                    match out.dtype {
                        DType::BF16 => *(out.address as *mut bf16).add(at) = bf16::from_f32(value),
                        _ => *(out.address as *mut f32).add(at) = value,
                    }
                }
            }
        });
        Ok(())
    }
}

/// What stands in for the emulator where it was not compiled in.
#[cfg(not(feature = "_emulator"))]
mod emulator {
    use super::{Launch, Product};
    use candle_core::{CpuStorage, DType, Result, Storage, bail};

    pub(super) fn memory(_len: usize, _dtype: DType) -> Result<CpuStorage> {
        bail!("kernels run on a CUDA device")
    }

    pub(super) fn check(_storage: &Storage) -> Result<()> {
        Ok(())
    }

    pub(super) fn launch(launch: &Launch) -> Result<()> {
        bail!("kernel {}::{} runs on a CUDA device", launch.module, launch.kernel)
    }

    pub(super) fn multiply(_product: &Product) -> Result<()> {
        bail!("this product runs on a CUDA device")
    }
}
