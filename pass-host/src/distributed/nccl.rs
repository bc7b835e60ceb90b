//! Ranks over NCCL: one GPU a rank.
//!
//! Sums run on a stream of their own beside the computation. A sum waits for what was computed when it was asked for, and
//! whoever waits for it makes the computation wait, not the CPU.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream, DriverError};
use candle_core::cuda_backend::cudarc::nccl::{Comm, Id, ReduceOp, result::NcclError};
use candle_core::{CpuStorage, CudaDevice, CudaStorage, CustomOp1, Layout, Shape, Tensor};

use super::launch::Launch;
use super::rendezvous::{ID_BYTES, address, meet};
use super::worker::Worker;
use super::{DistributedError, Engine, Pending};

/// The engine.
pub(super) struct Nccl {
    rank: usize,
    size: usize,
    local_rank: usize,
    computation: Arc<CudaStream>,
    worker: Worker<Comm>,
    /// Ends the other ranks if this one fails.
    #[cfg(feature = "mpi")]
    mpi: Option<super::mpi::Mpi>,
}

fn refused(error: NcclError) -> DistributedError {
    DistributedError::Nccl { reason: format!("{error:?}") }
}

fn driver(error: DriverError) -> DistributedError {
    DistributedError::Nccl { reason: error.to_string() }
}

/// The name of the job that rank 0 makes, as bytes.
fn new_id() -> Result<[u8; ID_BYTES], DistributedError> {
    Ok(Id::new().map_err(refused)?.internal().map(|byte| byte as u8))
}

impl Nccl {
    /// Joins the job; the ranks learn its name over MPI if an MPI launcher started them and MPI is built in, else at
    /// `MASTER_ADDR`.
    pub(super) fn start(launch: &Launch, gpu: CudaDevice) -> Result<Self, DistributedError> {
        #[cfg(feature = "mpi")]
        let mpi = launch.by_mpi.then(|| super::mpi::Mpi::start(launch)).transpose()?;
        #[cfg(feature = "mpi")]
        let by_mpi = mpi.as_ref().map(|mpi| {
            let mut bytes = if launch.rank == 0 { new_id()?.to_vec() } else { Vec::new() };
            mpi.broadcast(0, &mut bytes)?;
            let other = |bytes: Vec<u8>| DistributedError::Nccl {
                reason: format!("a job's name of {} bytes", bytes.len()),
            };
            bytes.try_into().map_err(other)
        });
        #[cfg(not(feature = "mpi"))]
        let by_mpi: Option<Result<[u8; ID_BYTES], DistributedError>> = None;
        let id = match by_mpi {
            Some(id) => id?,
            None => {
                let own = if launch.rank == 0 { Some(new_id()?) } else { None };
                meet(launch, address(launch, |name| std::env::var(name).ok())?, own)?
            }
        };
        let (rank, size) = (launch.rank, launch.size);
        let computation = gpu.cuda_stream();
        let context = Arc::clone(computation.context());
        let (worker, ()) = Worker::start(move || {
            let stream = context.new_stream().map_err(driver)?;
            let id = Id::uninit(id.map(|byte| byte as _));
            Ok((Comm::from_rank(stream, rank, size, id).map_err(refused)?, ()))
        })?;
        Ok(Self {
            rank,
            size,
            local_rank: launch.local_rank,
            computation,
            worker,
            #[cfg(feature = "mpi")]
            mpi,
        })
    }
}

/// The sum over all ranks as an operation on a tensor; nothing is differentiated through it.
struct AllReduce<'a>(&'a Comm);

impl CustomOp1 for AllReduce<'_> {
    fn name(&self) -> &'static str {
        "sum over all ranks"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        candle_core::bail!("NCCL adds up tensors of GPUs")
    }

    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("ranks add up contiguous tensors");
        };
        let own = storage.as_cuda_slice::<f32>()?.slice(start..end);
        let mut sum = self.0.stream().alloc_zeros::<f32>(end - start).map_err(driver)?;
        self.0.all_reduce(&own, &mut sum, &ReduceOp::Sum).map_err(refused)?;
        Ok((f32::wrap_cuda_slice(sum, storage.device().clone()), layout.shape().clone()))
    }
}

#[expect(clippy::disallowed_methods, reason = "a sum of gradients is not differentiated again")]
fn sum_tensor(
    comm: &Comm,
    tensor: &Tensor,
    computed: &CudaEvent,
) -> Result<(Tensor, CudaEvent), DistributedError> {
    comm.stream().wait(computed).map_err(driver)?;
    let sum = tensor.apply_op1_no_bwd(&AllReduce(comm))?;
    Ok((sum, comm.stream().record_event(None).map_err(driver)?))
}

impl Engine for Nccl {
    fn name(&self) -> &'static str {
        "NCCL"
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn local_rank(&self) -> usize {
        self.local_rank
    }

    fn start_sum(&self, tensor: Tensor) -> Result<Pending, DistributedError> {
        let tensor = tensor.contiguous()?;
        let computed = self.computation.record_event(None).map_err(driver)?;
        let own = tensor.clone();
        let result = self.worker.submit(move |comm| sum_tensor(comm, &own, &computed))?;
        let computation = Arc::clone(&self.computation);
        Ok(Box::new(move || {
            let (sum, added) = result.recv().map_err(|_| DistributedError::Lost)??;
            computation.wait(&added).map_err(driver)?;
            // its memory was read until now
            drop(tensor);
            Ok(sum)
        }))
    }

    fn sum(&self, values: &mut [f64]) -> Result<(), DistributedError> {
        let own = values.to_vec();
        let sum = self.worker.wait(move |comm| {
            let stream = comm.stream();
            let mut sum = stream.clone_htod(&own).map_err(driver)?;
            comm.all_reduce_in_place(&mut sum, &ReduceOp::Sum).map_err(refused)?;
            stream.clone_dtoh(&sum).map_err(driver)
        })??;
        values.copy_from_slice(&sum);
        Ok(())
    }

    fn broadcast(&self, root: usize, bytes: &mut Vec<u8>) -> Result<(), DistributedError> {
        let mut own = std::mem::take(bytes);
        let mut length = [if root == self.rank { own.len() as f64 } else { 0.0 }];
        self.sum(&mut length)?;
        own.resize(length[0] as usize, 0);
        if own.is_empty() {
            return Ok(());
        }
        *bytes = self.worker.wait(move |comm| {
            let stream = comm.stream();
            let mut sent = stream.clone_htod(&own).map_err(driver)?;
            comm.broadcast_in_place(&mut sent, root as i32).map_err(refused)?;
            stream.clone_dtoh(&sent).map_err(driver)
        })??;
        Ok(())
    }

    fn barrier(&self) -> Result<(), DistributedError> {
        self.sum(&mut [0.0])
    }

    fn abort(&self, code: i32) -> ! {
        #[cfg(feature = "mpi")]
        if let Some(mpi) = &self.mpi {
            mpi.abort(code);
        }
        std::process::exit(code)
    }
}
