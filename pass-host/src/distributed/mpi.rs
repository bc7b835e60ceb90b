//! Ranks over MPI, any implementation, any launcher.
//!
//! The thread that owns MPI asks for progress and sleeps in between: an MPI call that waits would hold a core which the
//! others compute with.

use std::thread;
use std::time::Duration;

use candle_core::{CpuStorage, Device, Storage, Tensor};
use mpi::Threading;
use mpi::collective::SystemOperation;
use mpi::environment::Universe;
use mpi::request::{Request, Scope};
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives, Equivalence, Root};

use super::launch::Launch;
use super::worker::Worker;
use super::{DistributedError, Engine, Pending};

/// Values of one MPI call: its counts are 31 bits.
const MOST_VALUES: usize = 1 << 28;
/// Questions for progress before the thread sleeps in between, and how long: small messages are faster than a sleep.
const EAGER: usize = 64;
const NAP: Duration = Duration::from_micros(50);

/// The engine.
pub(super) struct Mpi {
    rank: usize,
    size: usize,
    local_rank: usize,
    worker: Worker<Universe>,
}

impl Mpi {
    /// Starts MPI and checks that it sees the ranks that the launcher started.
    pub(super) fn start(launch: &Launch) -> Result<Self, DistributedError> {
        let (worker, (rank, size, local_rank)) = Worker::start(|| {
            let Some((universe, _)) = mpi::initialize_with_threading(Threading::Funneled) else {
                return Err(DistributedError::Mpi { reason: "it was started before in this process".into() });
            };
            let world = universe.world();
            let here = world.split_shared(world.rank());
            let place = (world.rank() as usize, world.size() as usize, here.rank() as usize);
            drop(here);
            Ok((universe, place))
        })?;
        if size != launch.size {
            let (expected, variables) = (launch.size, launch.variables);
            return Err(DistributedError::OtherMpi { expected, variables, found: size });
        }
        Ok(Self { rank, size, local_rank, worker })
    }
}

/// Waits for a request without holding a core.
fn complete<'a, D: ?Sized, S: Scope<'a>>(mut request: Request<'a, D, S>) {
    let mut questions = 0;
    while let Err(unfinished) = request.test() {
        request = unfinished;
        questions += 1;
        match questions < EAGER {
            true => thread::yield_now(),
            false => thread::sleep(NAP),
        }
    }
}

fn sum<T: Equivalence + Copy + Default>(world: &SimpleCommunicator, own: &[T]) -> Vec<T> {
    let mut total = vec![T::default(); own.len()];
    for (own, total) in own.chunks(MOST_VALUES).zip(total.chunks_mut(MOST_VALUES)) {
        mpi::request::scope(|scope| {
            complete(world.immediate_all_reduce_into(scope, own, total, SystemOperation::sum()));
        });
    }
    total
}

fn broadcast(world: &SimpleCommunicator, root: usize, mut bytes: Vec<u8>) -> Vec<u8> {
    let root = world.process_at_rank(root as i32);
    let mut length = [bytes.len() as u64];
    mpi::request::scope(|scope| complete(root.immediate_broadcast_into(scope, &mut length)));
    bytes.resize(length[0] as usize, 0);
    for part in bytes.chunks_mut(MOST_VALUES) {
        mpi::request::scope(|scope| complete(root.immediate_broadcast_into(scope, part)));
    }
    bytes
}

/// The sum of an `f32` tensor over all ranks, on the device it came from.
fn sum_tensor(world: &SimpleCommunicator, tensor: &Tensor) -> candle_core::Result<Tensor> {
    let on_cpu = tensor.to_device(&Device::Cpu)?.contiguous()?;
    let total = {
        let (storage, layout) = on_cpu.storage_and_layout();
        let (Storage::Cpu(CpuStorage::F32(values)), Some((start, end))) =
            (&*storage, layout.contiguous_offsets())
        else {
            candle_core::bail!("ranks add up f32 tensors, found {}", tensor.dtype().as_str());
        };
        sum(world, &values[start..end])
    };
    Tensor::from_vec(total, tensor.shape(), &Device::Cpu)?.to_device(tensor.device())
}

impl Engine for Mpi {
    fn name(&self) -> &'static str {
        "MPI"
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
        let result = self.worker.submit(move |mpi| sum_tensor(&mpi.world(), &tensor))?;
        Ok(Box::new(move || Ok(result.recv().map_err(|_| DistributedError::Lost)??)))
    }

    fn sum(&self, values: &mut [f64]) -> Result<(), DistributedError> {
        let own = values.to_vec();
        values.copy_from_slice(&self.worker.wait(move |mpi| sum(&mpi.world(), &own))?);
        Ok(())
    }

    fn broadcast(&self, root: usize, bytes: &mut Vec<u8>) -> Result<(), DistributedError> {
        let own = std::mem::take(bytes);
        *bytes = self.worker.wait(move |mpi| broadcast(&mpi.world(), root, own))?;
        Ok(())
    }

    fn barrier(&self) -> Result<(), DistributedError> {
        self.worker.wait(|mpi| complete(mpi.world().immediate_barrier()))
    }

    fn abort(&self, code: i32) -> ! {
        self.worker.wait::<()>(move |mpi| mpi.world().abort(code)).ok();
        std::process::exit(code)
    }
}

impl Drop for Mpi {
    /// A rank that panics ends the job instead of waiting for the others.
    fn drop(&mut self) {
        if thread::panicking() {
            self.abort(PANICKED);
        }
    }
}

/// What Rust programs exit with after a panic.
const PANICKED: i32 = 101;
