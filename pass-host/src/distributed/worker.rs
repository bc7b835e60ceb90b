//! A thread that owns a communication library and does what it is told, one job after the other: sums travel while the
//! backward pass goes on, in the order in which they were given, and the library need not know more than one thread.

use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use super::DistributedError;

type Job<L> = Box<dyn FnOnce(&L) + Send>;

/// The thread, seen from the others.
pub(super) struct Worker<L> {
    /// `None` once the last job is given.
    jobs: Mutex<Option<Sender<Job<L>>>>,
    thread: Option<JoinHandle<()>>,
}

impl<L: 'static> Worker<L> {
    /// Opens the library on a thread of its own, which also closes it; `open` may tell something about it.
    pub(super) fn start<T: Send + 'static>(
        open: impl FnOnce() -> Result<(L, T), DistributedError> + Send + 'static,
    ) -> Result<(Self, T), DistributedError> {
        let (jobs, inbox) = channel::<Job<L>>();
        let (tell, told) = channel();
        let thread = thread::spawn(move || {
            let library = match open() {
                Ok((library, about)) => tell.send(Ok(about)).map(|()| library),
                Err(error) => return drop(tell.send(Err(error))),
            };
            if let Ok(library) = library {
                inbox.iter().for_each(|job| job(&library));
            }
        });
        let about = told.recv().map_err(|_| DistributedError::Lost)??;
        Ok((Self { jobs: Mutex::new(Some(jobs)), thread: Some(thread) }, about))
    }

    /// Gives the thread a job and returns at once; the result comes out of the receiver.
    pub(super) fn submit<T: Send + 'static>(
        &self,
        job: impl FnOnce(&L) -> T + Send + 'static,
    ) -> Result<Receiver<T>, DistributedError> {
        let (reply, result) = channel();
        let jobs = self.jobs.lock().map_err(|_| DistributedError::Lost)?;
        let sender = jobs.as_ref().ok_or(DistributedError::Lost)?;
        // nobody waits for the result of a step that was given up
        let job: Job<L> = Box::new(move |library| drop(reply.send(job(library))));
        sender.send(job).map_err(|_| DistributedError::Lost)?;
        Ok(result)
    }

    /// Gives the thread a job and waits for its result.
    pub(super) fn wait<T: Send + 'static>(
        &self,
        job: impl FnOnce(&L) -> T + Send + 'static,
    ) -> Result<T, DistributedError> {
        self.submit(job)?.recv().map_err(|_| DistributedError::Lost)
    }
}

impl<L> Drop for Worker<L> {
    fn drop(&mut self) {
        if let Ok(mut jobs) = self.jobs.lock() {
            jobs.take();
        }
        if let Some(thread) = self.thread.take() {
            // a panic of the thread has written its message
            thread.join().ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_are_done_in_order_by_the_thread_that_opened() {
        let (worker, opener) =
            Worker::start(|| Ok((Mutex::new(Vec::new()), thread::current().id()))).unwrap();
        let pending: Vec<_> = (0..5)
            .map(|number| worker.submit(move |log| log.lock().unwrap().push(number)).unwrap())
            .collect();
        let (log, thread) = worker.wait(|log| (log.lock().unwrap().clone(), thread::current().id())).unwrap();
        assert_eq!((log, thread), (vec![0, 1, 2, 3, 4], opener));
        assert!(pending.iter().all(|result| result.recv().is_ok()));
    }

    #[test]
    fn what_cannot_be_opened_says_why() {
        let refused = Worker::<()>::start::<()>(|| Err(DistributedError::Mpi { reason: "no".into() }));
        assert!(refused.err().unwrap().to_string().contains("no"));
        let (worker, ()) = Worker::start(|| Ok(((), ()))).unwrap();
        assert!(matches!(worker.wait(|()| panic!("on purpose")), Err::<(), _>(DistributedError::Lost)));
        assert!(matches!(worker.wait(|()| ()), Err(DistributedError::Lost)));
    }
}
