//! Threads, lent by the caller. Work is cut by tiles of tokens, so results do not depend on their number.

use crate::error::{Error, Result};

/// Threads that [`crate::features_with_pool`] can use, at most.
pub const MOST_THREADS: usize = 16;

/// Whatever can run several closures at once: a thread pool, an operating system's tasks, a loop.
pub trait Pool {
    /// Closures worth handing in together.
    fn threads(&self) -> usize;

    /// Runs every closure once, on any threads, and returns when all have returned.
    fn run(&self, parts: &mut [&mut (dyn FnMut() + Send)]);
}

/// The calling thread.
#[derive(Clone, Copy, Debug, Default)]
pub struct Serial;

impl Pool for Serial {
    fn threads(&self) -> usize {
        1
    }

    fn run(&self, parts: &mut [&mut (dyn FnMut() + Send)]) {
        for part in parts {
            part();
        }
    }
}

/// This many threads, started anew for every step: the plainest pool, which costs some 10 µs a thread and step.
/// A program that computes more than one image keeps its threads: [`Threads`], or a pool of its own.
#[cfg(feature = "std")]
#[derive(Clone, Copy, Debug)]
pub struct ScopedThreads(pub usize);

#[cfg(feature = "std")]
impl Pool for ScopedThreads {
    fn threads(&self) -> usize {
        self.0
    }

    fn run(&self, parts: &mut [&mut (dyn FnMut() + Send)]) {
        let Some((first, others)) = parts.split_first_mut() else { return };
        std::thread::scope(|scope| {
            for part in others {
                scope.spawn(part);
            }
            first();
        });
    }
}

/// Threads that are kept: they look for work for a moment before they sleep, so that a step costs a few µs.
#[cfg(feature = "threads")]
#[derive(Debug)]
pub struct Threads(Option<rayon::ThreadPool>);

#[cfg(feature = "threads")]
impl Threads {
    /// Starts `threads` threads, between 1 and [`MOST_THREADS`]; for 1 none, it is the calling one.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for another number, [`Error::Threads`] if the system gives none.
    pub fn new(threads: usize) -> Result<Self> {
        crate::error::check_range("threads", 1, MOST_THREADS, threads)?;
        if threads == 1 {
            return Ok(Self(None));
        }
        let builder = rayon::ThreadPoolBuilder::new().num_threads(threads);
        let pool = builder.thread_name(|index| std::format!("pass-edge-{index}")).build();
        pool.map(|pool| Self(Some(pool))).map_err(|_| Error::Threads)
    }

    /// Runs `work` on one of the threads, from where it reaches the others without waking them first: compute whole images
    /// inside.
    pub fn install<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match &self.0 {
            Some(pool) => pool.install(work),
            None => work(),
        }
    }
}

#[cfg(feature = "threads")]
impl Pool for Threads {
    fn threads(&self) -> usize {
        self.0.as_ref().map_or(1, rayon::ThreadPool::current_num_threads)
    }

    fn run(&self, parts: &mut [&mut (dyn FnMut() + Send)]) {
        use rayon::prelude::*;
        match &self.0 {
            Some(pool) => pool.install(|| parts.par_iter_mut().with_max_len(1).for_each(|part| part())),
            None => Serial.run(parts),
        }
    }
}

/// Threads of a pool that are used.
pub(crate) fn used_threads(pool: &dyn Pool) -> usize {
    pool.threads().clamp(1, MOST_THREADS)
}

/// `work` on up to [`MOST_THREADS`] parts.
///
/// # Errors
/// The first error in the order of the parts; [`Error::LengthMismatch`] if the pool left a part out.
pub(crate) fn for_parts<P: Send>(
    pool: &dyn Pool,
    mut parts: impl Iterator<Item = P>,
    work: impl Fn(P) -> Result<()> + Sync,
) -> Result<()> {
    let mut slots: [(Option<P>, Result<()>); MOST_THREADS] = core::array::from_fn(|_| (parts.next(), Ok(())));
    let count = slots.iter().filter(|slot| slot.0.is_some()).count();
    let work = &work;
    let mut closures = slots.each_mut().map(|slot| {
        move || {
            if let Some(part) = slot.0.take() {
                slot.1 = work(part);
            }
        }
    });
    let mut borrowed = closures.each_mut().map(|closure| closure as &mut (dyn FnMut() + Send));
    pool.run(borrowed.get_mut(..count).unwrap_or_default());
    let left = slots.iter().filter(|slot| slot.0.is_some()).count();
    if left > 0 {
        return Err(Error::LengthMismatch {
            what: "parts run by the pool",
            expected: count,
            actual: count - left,
        });
    }
    slots.into_iter().try_for_each(|slot| slot.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Forgets the last part.
    struct Lazy;

    impl Pool for Lazy {
        fn threads(&self) -> usize {
            2
        }

        fn run(&self, parts: &mut [&mut (dyn FnMut() + Send)]) {
            if let Some((_, parts)) = parts.split_last_mut() {
                Serial.run(parts);
            }
        }
    }

    #[test]
    fn every_part_is_worked_on_once() {
        let mut numbers = [0; 5];
        let add = |part: &mut i32| {
            *part += 1;
            Ok(())
        };
        for_parts(&Serial, numbers.iter_mut(), add).unwrap();
        #[cfg(feature = "std")]
        for_parts(&ScopedThreads(3), numbers.iter_mut(), add).unwrap();
        #[cfg(feature = "threads")]
        for_parts(&Threads::new(3).unwrap(), numbers.iter_mut(), add).unwrap();
        let times = 1 + i32::from(cfg!(feature = "std")) + i32::from(cfg!(feature = "threads"));
        assert_eq!(numbers, [times; 5]);
    }

    #[test]
    fn a_part_left_out_and_a_part_that_fails_are_errors() {
        let error = for_parts(&Lazy, [1, 2, 3].into_iter(), |_| Ok(())).unwrap_err();
        assert_eq!(
            std::string::ToString::to_string(&error),
            "parts run by the pool: expected 3 elements, found 2"
        );
        let fail = |part| if part == 2 { Err(Error::Header) } else { Ok(()) };
        assert_eq!(for_parts(&Serial, [1, 2, 3].into_iter(), fail), Err(Error::Header));
    }
}
