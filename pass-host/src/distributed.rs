//! Several processes that train one network, each with its part of every batch.
//!
//! A process of such a job is a *rank*. What ranks say to each other goes through [`Engine`], a few operations that all
//! ranks call in the same order; [`Ranks`] is the handle the trainer holds. MPI and NCCL are the engines; a process on
//! its own has one that does nothing.
//!
//! | module | job |
//! |---|---|
//! | [`launch`] | which rank this is, as launchers write it into the environment |
//! | `single` | a process on its own |
//! | `mpi` | any MPI, behind the feature `mpi` |
//! | `nccl`, `rendezvous` | one GPU a rank, behind the feature `nccl` |
//! | `worker` | the thread that owns either library |
//! | [`collective`] | sums over all ranks that a loss depends on |
//! | [`reducer`] | gradients added up over all ranks while the backward pass goes on |
//! | [`error`] | why ranks cannot work together |

pub mod collective;
pub mod error;
pub mod launch;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "nccl")]
mod nccl;
pub mod reducer;
#[cfg(any(feature = "nccl", test))]
mod rendezvous;
mod single;
#[cfg(test)]
pub(crate) mod threads;
#[cfg(any(feature = "mpi", feature = "nccl", test))]
mod worker;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::Tensor;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::device::DeviceChoice;
pub use error::DistributedError;
use launch::Launch;
pub use reducer::{Buckets, Reducer};

/// The engines of this program, as `doctor` shows them.
pub const ENGINES: &[(&str, bool)] = &[("mpi", cfg!(feature = "mpi")), ("nccl", cfg!(feature = "nccl"))];

/// A tensor under way: waits for it.
pub type Pending = Box<dyn FnOnce() -> Result<Tensor, DistributedError> + Send>;

/// What ranks can do together. Every rank calls the same operations in the same order; each result has the same bits on
/// every rank.
pub trait Engine: Send + Sync {
    /// For messages.
    fn name(&self) -> &'static str;

    /// Number of this process.
    fn rank(&self) -> usize;

    /// Number of processes.
    fn size(&self) -> usize;

    /// Number of this process on its machine.
    fn local_rank(&self) -> usize;

    /// Starts to add up an `f32` tensor over all ranks and returns at once.
    ///
    /// # Errors
    /// If the engine has ended.
    fn start_sum(&self, tensor: Tensor) -> Result<Pending, DistributedError>;

    /// Adds numbers up over all ranks.
    ///
    /// # Errors
    /// If the engine has ended.
    fn sum(&self, values: &mut [f64]) -> Result<(), DistributedError>;

    /// Gives every rank the bytes of rank `root`.
    ///
    /// # Errors
    /// If the engine has ended.
    fn broadcast(&self, root: usize, bytes: &mut Vec<u8>) -> Result<(), DistributedError>;

    /// Returns when all ranks have called it.
    ///
    /// # Errors
    /// If the engine has ended.
    fn barrier(&self) -> Result<(), DistributedError>;

    /// Ends this process and, where the engine can, all others, with an exit code.
    fn abort(&self, code: i32) -> !;
}

/// This process among all ranks of the job.
#[derive(Clone)]
pub struct Ranks {
    engine: Arc<dyn Engine>,
    /// Whether the error on its way is known to all ranks, so that they end in order.
    fail_together: Arc<AtomicBool>,
}

/// The GPU of this rank, if `device` asks for one or finds one.
#[cfg(feature = "nccl")]
fn gpu_of(
    launch: &Launch,
    device: DeviceChoice,
) -> Result<Option<candle_core::CudaDevice>, DistributedError> {
    use crate::device::{Precision, choose};
    let chosen = choose(device.of_rank(launch.local_rank), Precision::F32)
        .map_err(|error| DistributedError::Nccl { reason: error.to_string() })?;
    Ok(match chosen.device {
        candle_core::Device::Cuda(gpu) => Some(gpu),
        _ => None,
    })
}

impl fmt::Debug for Ranks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of {} ({})", self.rank(), self.size(), self.engine.name())
    }
}

impl fmt::Display for Ranks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ranks ({})", self.size(), self.engine.name())
    }
}

impl Ranks {
    /// A process on its own.
    pub fn single() -> Self {
        Self::over(single::Single)
    }

    /// The handle over an engine.
    pub(crate) fn over(engine: impl Engine + 'static) -> Self {
        Self { engine: Arc::new(engine), fail_together: Arc::default() }
    }

    /// Joins the other ranks of this job, if a launcher started several: with NCCL where it is built in and `device` asks
    /// for a GPU that is there, else with MPI.
    ///
    /// # Errors
    /// [`DistributedError`]; above all [`DistributedError::NoEngine`], because ranks that do not know of each other would
    /// all write the same run.
    pub fn join(device: DeviceChoice) -> Result<Self, DistributedError> {
        match Launch::from_environment()? {
            None => Ok(Self::single()),
            Some(launch) => Self::start(&launch, device),
        }
    }

    fn start(launch: &Launch, device: DeviceChoice) -> Result<Self, DistributedError> {
        #[cfg(feature = "nccl")]
        if let Some(gpu) = gpu_of(launch, device)? {
            return Ok(Self::over(nccl::Nccl::start(launch, gpu)?));
        }
        #[cfg(feature = "mpi")]
        if launch.by_mpi {
            return Ok(Self::over(mpi::Mpi::start(launch)?));
        }
        let reason = match (cfg!(feature = "mpi"), cfg!(feature = "nccl"), device) {
            (true, _, _) => "MPI needs an MPI launcher, `mpirun` or `srun`",
            (false, true, _) => "NCCL needs a GPU for every rank, and `mpi` is not built in",
            (false, false, DeviceChoice::Cpu) => "it was built without the feature `mpi`",
            (false, false, _) => "it was built without the feature `mpi` (or `nccl`, for GPUs)",
        };
        let Launch { rank, size, variables, .. } = *launch;
        Err(DistributedError::NoEngine { rank, size, variables, reason })
    }

    /// Number of this process.
    pub fn rank(&self) -> usize {
        self.engine.rank()
    }

    /// Number of processes.
    pub fn size(&self) -> usize {
        self.engine.size()
    }

    /// Number of this process on its machine.
    pub fn local_rank(&self) -> usize {
        self.engine.local_rank()
    }

    /// Whether there are others.
    pub fn several(&self) -> bool {
        self.size() > 1
    }

    /// Whether this is rank 0, which alone writes files and speaks to the person.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Starts to add up an `f32` tensor over all ranks.
    ///
    /// # Errors
    /// If the engine has ended.
    pub fn start_sum(&self, tensor: Tensor) -> Result<Pending, DistributedError> {
        self.engine.start_sum(tensor)
    }

    /// The mean of an `f32` tensor over all ranks.
    ///
    /// # Errors
    /// If the engine has ended.
    pub fn mean(&self, tensor: Tensor) -> Result<Tensor, DistributedError> {
        match self.several() {
            true => Ok((self.start_sum(tensor)?()? / self.size() as f64)?),
            false => Ok(tensor),
        }
    }

    /// Numbers added up over all ranks.
    ///
    /// # Errors
    /// If the engine has ended.
    pub fn sum<const N: usize>(&self, mut values: [f64; N]) -> Result<[f64; N], DistributedError> {
        self.engine.sum(&mut values)?;
        Ok(values)
    }

    /// Whether it is so on any rank.
    ///
    /// # Errors
    /// If the engine has ended.
    pub fn any(&self, here: bool) -> Result<bool, DistributedError> {
        let [count] = self.sum([f64::from(u8::from(here))])?;
        Ok(count > 0.0)
    }

    /// The number of every rank, by rank.
    ///
    /// # Errors
    /// If the engine has ended.
    pub fn gather(&self, value: f64) -> Result<Vec<f64>, DistributedError> {
        let mut values = vec![0.0; self.size()];
        values[self.rank()] = value;
        self.engine.sum(&mut values)?;
        Ok(values)
    }

    /// What every rank has, by rank.
    ///
    /// # Errors
    /// If the engine has ended, or the ranks speak of different things.
    pub fn exchange<T: Serialize + DeserializeOwned>(&self, own: &T) -> Result<Vec<T>, DistributedError> {
        let own = postcard::to_stdvec(own)?;
        let of_rank = |root: usize| {
            let mut bytes = if root == self.rank() { own.clone() } else { Vec::new() };
            self.engine.broadcast(root, &mut bytes)?;
            Ok(postcard::from_bytes(&bytes)?)
        };
        (0..self.size()).map(of_rank).collect()
    }

    /// The bytes of rank 0, on every rank; the others give nothing.
    ///
    /// # Errors
    /// If the engine has ended.
    pub fn share_bytes(&self, own: Vec<u8>) -> Result<Vec<u8>, DistributedError> {
        let mut bytes = own;
        self.engine.broadcast(0, &mut bytes)?;
        Ok(bytes)
    }

    /// What rank 0 has, on every rank; the others have nothing.
    ///
    /// # Errors
    /// If the engine has ended, or the ranks speak of different things.
    pub fn share<T: Serialize + DeserializeOwned>(&self, own: Option<T>) -> Result<T, DistributedError> {
        let bytes = match &own {
            Some(value) if self.several() => postcard::to_stdvec(value)?,
            _ => Vec::new(),
        };
        let bytes = self.share_bytes(bytes)?;
        own.map_or_else(|| Ok(postcard::from_bytes(&bytes)?), Ok)
    }

    /// Does something on the first rank alone.
    ///
    /// # Errors
    /// That of `work` on the first rank and [`DistributedError::OtherRank`] on the others.
    pub fn first<T, E: From<DistributedError>>(
        &self,
        work: impl FnOnce() -> Result<T, E>,
    ) -> Result<Option<T>, E> {
        self.agree(if self.is_first() { work().map(Some) } else { Ok(None) })
    }

    /// What the first rank computes, on every rank.
    ///
    /// # Errors
    /// As [`Ranks::first`].
    pub fn decide<T, E>(&self, work: impl FnOnce() -> Result<T, E>) -> Result<T, E>
    where
        T: Serialize + DeserializeOwned,
        E: From<DistributedError>,
    {
        Ok(self.share(self.first(work)?)?)
    }

    /// The result of this rank, if all ranks have one.
    ///
    /// # Errors
    /// If any rank failed: on the first that did its own error, on the others [`DistributedError::OtherRank`].
    pub fn agree<T, E: From<DistributedError>>(&self, result: Result<T, E>) -> Result<T, E> {
        if !self.several() {
            return result;
        }
        let failed = self.gather(f64::from(u8::from(result.is_err())))?;
        let Some(first) = failed.iter().position(|&failed| failed > 0.0) else { return result };
        self.fail_together.store(true, Ordering::Relaxed);
        match result {
            Err(error) if first == self.rank() => Err(error),
            _ => Err(DistributedError::OtherRank { rank: first }.into()),
        }
    }

    /// Whether the error on its way is known to all ranks.
    pub fn fail_together(&self) -> bool {
        self.fail_together.load(Ordering::Relaxed)
    }

    /// Returns when all ranks have called it.
    ///
    /// # Errors
    /// If the engine has ended.
    pub fn barrier(&self) -> Result<(), DistributedError> {
        self.engine.barrier()
    }

    /// Ends this process and, where the engine can, all others: for an error that only this rank knows of.
    pub fn abort(&self, code: u8) -> ! {
        self.engine.abort(code.into())
    }
}
