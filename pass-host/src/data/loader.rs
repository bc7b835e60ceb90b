//! Worker threads that turn the image list into batches of crops.
//!
//! A batch is a pure function of (image list, configuration, seed, its place in the sequence): which images it holds
//! follows from [`Order`], their crops from [`plan`](super::augment::plan), and a bad image is replaced by the next good
//! one of the list. Workers, their speed and where the loader started change nothing. Of several ranks each loads its
//! consecutive [`Part`] of every batch, so that together they see what one would.
//!
//! A worker takes one image at a time and writes its crops to their places in the batch; at most `prefetch` batches
//! are under way or waiting.
//!
//! Where a device takes the crops ([`Loader::uploading`]), one more thread sends complete batches there, in order, while the
//! one before is computed on; the device makes the crops, or normalizes those that the workers made.

mod upload;
mod work;

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use super::augment::{DeviceCrops, GLOBAL_CROPS};
use super::error::DataError;
use super::index::ImageIndex;
use super::order::Order;
use super::quarantine::Quarantine;
use crate::config::{AugmentConfig, AugmentDevice};
use crate::ops::{Upload, Uploader};
use upload::Sending;
use work::Worker;

/// What a loader needs to know.
#[derive(Clone, Debug)]
pub struct LoaderSettings {
    /// The images.
    pub index: Arc<ImageIndex>,
    /// The crops.
    pub augment: AugmentConfig,
    /// Seed of order and crops.
    pub seed: u64,
    /// Images a batch of this rank.
    pub batch: usize,
    /// Which part of every batch this rank loads.
    pub part: Part,
    /// Threads; 0 = as many as cores.
    pub workers: usize,
    /// Batches kept ready or under way, at least 1.
    pub prefetch: usize,
    /// Images of the sequence that are used already; the first batch comes at or after this place.
    pub cursor: u64,
    /// Share of bad images above which the run stops.
    pub max_bad: f64,
    /// Images with more pixels than this are bad (millions of pixels).
    pub max_megapixels: f64,
    /// `quarantine.tsv`, if bad images shall be written down.
    pub quarantine: Option<PathBuf>,
    /// Images known to be bad, with the reason, beside those of `quarantine`.
    pub known_bad: Vec<(u64, String)>,
}

/// One of several ranks that share every batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its number.
    pub rank: usize,
    /// How many there are.
    pub ranks: usize,
}

impl Part {
    /// All of every batch.
    pub const WHOLE: Self = Self { rank: 0, ranks: 1 };
}

/// The crops of `B` images.
#[derive(Debug)]
pub struct Batch {
    /// Where the batch of all ranks begins in the endless sequence of images.
    pub start: u64,
    /// Pass over the images it belongs to.
    pub epoch: u64,
    /// The images, after replacement of bad ones, `[B]`.
    pub images: Vec<u64>,
    /// The crops.
    pub views: Views,
}

/// The crops of a batch.
#[derive(Debug)]
pub enum Views {
    /// Made and normalized.
    Crops {
        /// Global crops, `[2 * B, 3, G, G]`: first crop 0 of all images, then crop 1.
        global: Vec<f32>,
        /// Local crops, `[L * B, 3, S, S]`, crop by crop as well.
        local: Vec<f32>,
    },
    /// On a device, which makes or normalizes them.
    Uploaded(Upload),
}

/// Seconds that [`Loader::next`] had to wait.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DataWait {
    /// In the last call.
    pub last: f64,
    /// In all calls.
    pub total: f64,
}

/// Delivers batches in order; its threads end when it is dropped.
#[derive(Debug)]
pub struct Loader {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// The thread that sends batches to a device.
    sending: Option<Sending>,
    quarantine: Quarantine,
    /// Bad images found since the last [`Loader::take_found`].
    found: Vec<(u64, String)>,
    wait: DataWait,
}

#[derive(Debug)]
struct Shared {
    settings: LoaderSettings,
    /// Whether batches go to a device.
    uploads: bool,
    order: Order,
    state: Mutex<State>,
    /// A batch is complete, or a worker has ended.
    completed: Condvar,
    /// A batch was taken, or the loader is being dropped.
    taken: Condvar,
}

#[derive(Debug)]
struct State {
    /// The next image to work on: where its batch starts, and its place in this rank's part.
    next: (u64, usize),
    /// Batches under way or waiting, oldest first.
    open: VecDeque<Arc<Assembly>>,
    /// Bad images known so far, in the order of discovery or from the quarantine file: they need not be tried again.
    known_bad: BTreeMap<u64, String>,
    stop: bool,
}

/// A batch under way.
#[derive(Debug)]
struct Assembly {
    start: u64,
    parts: Mutex<Parts>,
}

#[derive(Debug)]
struct Parts {
    batch: Batch,
    /// What a device makes the crops of, by place in the batch.
    for_device: Vec<DeviceCrops>,
    remaining: usize,
    /// Bad images met, by place in the batch.
    bad: Vec<(usize, u64, String)>,
    /// The error of the lowest place.
    error: Option<(usize, DataError)>,
}

/// A panic of another thread leaves the data as good as it was: every change is made in one piece.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Loader {
    /// Starts the workers.
    ///
    /// # Errors
    /// [`DataError`] when the images cannot fill a batch, a setting makes no sense, or the quarantine list cannot be
    /// opened.
    pub fn start(settings: LoaderSettings) -> Result<Self, DataError> {
        Self::begin(settings, None)
    }

    /// Starts the workers and a thread that sends batches to a device ahead of time.
    ///
    /// # Errors
    /// As [`Loader::start`].
    pub fn uploading(settings: LoaderSettings, uploader: Uploader) -> Result<Self, DataError> {
        Self::begin(settings, Some(uploader))
    }

    fn begin(mut settings: LoaderSettings, uploader: Option<Uploader>) -> Result<Self, DataError> {
        let setting = |field, expected, found: String| Err(DataError::Setting { field, expected, found });
        if settings.batch == 0 {
            return setting("batch", "at least 1", "0".to_owned());
        }
        if !(0.0..=1.0).contains(&settings.max_bad) {
            return setting("data.max_bad", "a share between 0 and 1", settings.max_bad.to_string());
        }
        if settings.augment.global_size == 0 || settings.augment.local_size == 0 {
            return setting("augment.global_size, augment.local_size", "at least 1", "0".to_owned());
        }
        if uploader.is_none() && settings.augment.device == AugmentDevice::Gpu {
            let found = "gpu, without a device".to_owned();
            return setting("augment.device", "cpu where no device takes the batches", found);
        }
        let Part { rank, ranks } = settings.part;
        if rank >= ranks {
            return setting("rank", "below the number of ranks", format!("{rank} of {ranks}"));
        }
        let (images, batch) = (settings.index.len(), settings.batch.saturating_mul(ranks));
        if images < batch {
            return Err(DataError::TooFewImages { images, batch });
        }
        let order = Order { seed: settings.seed, images: images as u64, batch: batch as u64 };
        settings.prefetch = settings.prefetch.max(1);
        if settings.workers == 0 {
            settings.workers = std::thread::available_parallelism().map_or(1, usize::from);
        }
        let mut quarantine = Quarantine::open(settings.quarantine.as_deref(), &settings.index)?;
        for (image, reason) in &settings.known_bad {
            quarantine.add(*image, &settings.index.name(*image as usize), reason)?;
        }
        let known_bad = quarantine.images().map(|(image, reason)| (image, reason.to_owned())).collect();
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                next: (order.start(settings.cursor), 0),
                open: VecDeque::new(),
                known_bad,
                stop: false,
            }),
            order,
            uploads: uploader.is_some(),
            settings,
            completed: Condvar::new(),
            taken: Condvar::new(),
        });
        let workers = (0..shared.settings.workers)
            .map(|_| {
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || Worker::new(&shared).run())
            })
            .collect();
        let sending = uploader.map(|uploader| Sending::start(&shared, uploader));
        Ok(Self { shared, workers, sending, quarantine, found: Vec::new(), wait: DataWait::default() })
    }

    /// The next batch, in order; waits for it if need be.
    ///
    /// # Errors
    /// [`DataError::TooManyBad`] when the share of bad images is past the limit, [`DataError::Write`] when the
    /// quarantine list cannot be written, [`DataError::Worker`] on a defect of the program.
    #[expect(
        clippy::should_implement_trait,
        reason = "an iterator of results that never ends would invite misuse"
    )]
    pub fn next(&mut self) -> Result<Batch, DataError> {
        let start = Instant::now();
        let mut parts = match &self.sending {
            Some(sending) => sending.next()?,
            // it stops no sooner than it is dropped
            None => self.shared.wait_for_oldest().ok_or(DataError::Ended)?,
        };
        self.wait.last = start.elapsed().as_secs_f64();
        self.wait.total += self.wait.last;
        parts.bad.sort_unstable_by_key(|&(place, image, _)| (place, image));
        for (_, image, reason) in parts.bad.drain(..) {
            if !self.quarantine.holds(image) {
                self.quarantine.add(image, &self.shared.settings.index.name(image as usize), &reason)?;
                self.found.push((image, reason));
            }
        }
        if self.shared.settings.part.ranks == 1 {
            self.check_share_of_bad(parts.batch.start)?;
        }
        match parts.error {
            Some((_, error)) => Err(error),
            None => Ok(parts.batch),
        }
    }

    /// How long [`Loader::next`] had to wait for data.
    pub fn data_wait(&self) -> DataWait {
        self.wait
    }

    /// The bad images so far.
    pub fn quarantine(&self) -> &Quarantine {
        &self.quarantine
    }

    /// The bad images that this loader has found since the last call, for the other ranks.
    pub fn take_found(&mut self) -> Vec<(u64, String)> {
        std::mem::take(&mut self.found)
    }

    /// A bad image that another rank has found.
    ///
    /// # Errors
    /// [`DataError::Write`] when the quarantine list cannot be written.
    pub fn learn_bad(&mut self, image: u64, reason: &str) -> Result<(), DataError> {
        lock(&self.shared.state).known_bad.entry(image).or_insert_with(|| reason.to_owned());
        self.quarantine.add(image, &self.shared.settings.index.name(image as usize), reason)
    }

    /// Stops when more images are bad than the limit allows in the whole list, or so many of those seen so far that
    /// chance does not explain it (four standard deviations): a hopeless run ends early, a lucky streak goes on.
    ///
    /// Part of [`Loader::next`]; of several ranks, each calls it once it knows what the others found up to the batch that
    /// begins at `start`.
    ///
    /// # Errors
    /// [`DataError::TooManyBad`].
    pub fn check_share_of_bad(&self, start: u64) -> Result<(), DataError> {
        let settings = &self.shared.settings;
        let all = settings.index.len();
        let seen = (start + self.shared.order.batch).min(all as u64) as usize;
        let bad = self.quarantine.len();
        if !is_past_limit(bad, seen, all, settings.max_bad) {
            return Ok(());
        }
        let mut files = String::new();
        for (image, reason) in self.quarantine.images().take(LISTED_BAD) {
            files += &format!("\n  {}: {reason}", settings.index.name(image as usize));
        }
        if bad > LISTED_BAD {
            files += &format!("\n  and {} more", bad - LISTED_BAD);
        }
        Err(DataError::TooManyBad { bad, seen: seen.max(bad), max_bad: settings.max_bad, files })
    }
}

/// Bad images named in an error.
const LISTED_BAD: usize = 10;

fn is_past_limit(bad: usize, seen: usize, all: usize, max_bad: f64) -> bool {
    let expected = max_bad * seen as f64;
    bad > 0 && (bad as f64 > max_bad * all as f64 || bad as f64 > expected + 4.0 * expected.sqrt() + 1.0)
}

impl Drop for Loader {
    fn drop(&mut self) {
        lock(&self.shared.state).stop = true;
        self.shared.taken.notify_all();
        self.shared.completed.notify_all();
        drop(self.sending.take());
        for worker in self.workers.drain(..) {
            // a worker reports its panics itself
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// The image in a place of this rank's part of a batch, before replacement.
    fn image_at(&self, start: u64, place: usize) -> u64 {
        let LoaderSettings { batch, part, .. } = &self.settings;
        self.order.image(start + (part.rank * batch + place) as u64)
    }

    /// A batch of which nothing is done.
    fn new_parts(&self, start: u64) -> Parts {
        let LoaderSettings { batch, augment, .. } = &self.settings;
        let (values, places) = if self.uploads { (0, *batch) } else { (*batch, 0) };
        let values = |crops: usize, side: usize| vec![0.0; crops * values * 3 * side * side];
        let views = Views::Crops {
            global: values(GLOBAL_CROPS, augment.global_size),
            local: values(augment.local_crops, augment.local_size),
        };
        Parts {
            batch: Batch { start, epoch: self.order.epoch(start), images: vec![0; *batch], views },
            for_device: vec![DeviceCrops::default(); places],
            remaining: *batch,
            bad: Vec::new(),
            error: None,
        }
    }

    /// The oldest batch, once it is complete; `None` when the loader stops.
    fn wait_for_oldest(&self) -> Option<Parts> {
        let mut state = lock(&self.state);
        loop {
            if state.stop {
                return None;
            }
            let complete = state.open.front().is_some_and(|batch| lock(&batch.parts).remaining == 0);
            if complete && let Some(batch) = state.open.pop_front() {
                drop(state);
                self.taken.notify_all();
                return Some(std::mem::take(&mut *lock(&batch.parts)));
            }
            state = self.completed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Default for Parts {
    /// What is left of a batch that was taken.
    fn default() -> Self {
        let views = Views::Crops { global: Vec::new(), local: Vec::new() };
        let batch = Batch { start: 0, epoch: 0, images: Vec::new(), views };
        Self { batch, for_device: Vec::new(), remaining: 0, bad: Vec::new(), error: None }
    }
}

#[cfg(test)]
mod tests;
