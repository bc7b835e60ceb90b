//! Ranks as threads of one process, for tests of everything above the engines.

use std::sync::{Arc, Barrier, Mutex};

use candle_core::{Device, Tensor};

use super::{DistributedError, Engine, Pending, Ranks};

/// What the threads share: one place for bytes and numbers a rank.
struct Table {
    barrier: Barrier,
    numbers: Mutex<Vec<Vec<f64>>>,
    bytes: Mutex<Vec<u8>>,
}

struct Threads {
    rank: usize,
    size: usize,
    table: Arc<Table>,
}

/// Runs `work` as so many ranks and returns what each returned.
pub(crate) fn on_ranks<T: Send>(size: usize, work: impl Fn(Ranks) -> T + Sync) -> Vec<T> {
    let table = Arc::new(Table {
        barrier: Barrier::new(size),
        numbers: Mutex::new(vec![Vec::new(); size]),
        bytes: Mutex::default(),
    });
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..size)
            .map(|rank| {
                let engine = Threads { rank, size, table: Arc::clone(&table) };
                let work = &work;
                scope.spawn(move || work(Ranks::over(engine)))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("no rank panics")).collect()
    })
}

impl Engine for Threads {
    fn name(&self) -> &'static str {
        "threads"
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn local_rank(&self) -> usize {
        self.rank
    }

    fn start_sum(&self, tensor: Tensor) -> Result<Pending, DistributedError> {
        let mut values: Vec<f64> =
            tensor.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f64::from).collect();
        self.sum(&mut values)?;
        let sum: Vec<f32> = values.into_iter().map(|value| value as f32).collect();
        let sum = Tensor::from_vec(sum, tensor.shape(), &Device::Cpu)?;
        Ok(Box::new(move || Ok(sum)))
    }

    fn sum(&self, values: &mut [f64]) -> Result<(), DistributedError> {
        self.table.numbers.lock().unwrap()[self.rank] = values.to_vec();
        self.table.barrier.wait();
        let all = self.table.numbers.lock().unwrap().clone();
        assert!(all.iter().all(|part| part.len() == values.len()), "ranks add up different things");
        for (index, value) in values.iter_mut().enumerate() {
            *value = all.iter().map(|part| part[index]).sum();
        }
        self.table.barrier.wait();
        Ok(())
    }

    fn broadcast(&self, root: usize, bytes: &mut Vec<u8>) -> Result<(), DistributedError> {
        if root == self.rank {
            *self.table.bytes.lock().unwrap() = bytes.clone();
        }
        self.table.barrier.wait();
        *bytes = self.table.bytes.lock().unwrap().clone();
        self.table.barrier.wait();
        Ok(())
    }

    fn barrier(&self) -> Result<(), DistributedError> {
        self.table.barrier.wait();
        Ok(())
    }

    fn abort(&self, code: i32) -> ! {
        panic!("rank {} aborts with {code}", self.rank)
    }
}
