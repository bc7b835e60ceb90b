//! One worker thread: takes an image, decodes it, writes its crops into the batch.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, PoisonError};

use super::{Assembly, Parts, Shared, Views, lock};
use crate::config::AugmentDevice;
use crate::data::augment::{Augmenter, CropPlan, DeviceCrops, GLOBAL_CROPS, Planes, normalize_into, plans};
use crate::data::decode::{Encoded, Rgb8Image};
use crate::data::error::DataError;

/// Bad images in a row after which no replacement is looked for.
const MAX_REPLACEMENTS: u64 = 1000;

/// Reductions to choose from, strongest first.
const REDUCTIONS: [u32; 3] = [8, 4, 2];

pub(super) struct Worker<'a> {
    shared: &'a Shared,
    augmenter: Augmenter,
    crops: Vec<Planes>,
    /// The same for a device, if there is one.
    for_device: Option<DeviceCrops>,
}

/// What a worker found for one place of a batch.
struct Outcome {
    image: u64,
    bad: Vec<(u64, String)>,
    found: bool,
}

impl<'a> Worker<'a> {
    pub(super) fn new(shared: &'a Shared) -> Self {
        Self { shared, augmenter: Augmenter::default(), crops: Vec::new(), for_device: None }
    }

    /// Works until the loader stops.
    pub(super) fn run(mut self) {
        while let Some((assembly, place)) = self.take() {
            let image = self.shared.image_at(assembly.start, place);
            let outcome = catch_unwind(AssertUnwindSafe(|| self.fill(assembly.start, image)));
            let complete = {
                let mut parts = lock(&assembly.parts);
                match outcome {
                    Ok(outcome) => self.store(&mut parts, place, outcome),
                    Err(panic) => {
                        let message = panic_message(&*panic);
                        let name = self.shared.settings.index.name(image as usize);
                        parts.fail(place, DataError::Worker { name, message });
                    }
                }
                parts.remaining -= 1;
                parts.remaining == 0
            };
            if complete {
                // with the state locked, the consumer is either before its check or waiting
                drop(lock(&self.shared.state));
                self.shared.completed.notify_all();
            }
        }
    }

    /// The next place to fill, once the batch may be started; `None` when the loader stops.
    fn take(&self) -> Option<(Arc<Assembly>, usize)> {
        let settings = &self.shared.settings;
        let mut state = lock(&self.shared.state);
        loop {
            if state.stop {
                return None;
            }
            let (start, place) = state.next;
            if place == 0 && state.open.len() < settings.prefetch {
                let parts = self.shared.new_parts(start);
                state.open.push_back(Arc::new(Assembly { start, parts: parts.into() }));
            } else if place == 0 {
                state = self.shared.taken.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let batch = state.open.back().map(Arc::clone)?;
            state.next = match place + 1 == settings.batch {
                true => (self.shared.order.start(self.shared.order.after(start)), 0),
                false => (start, place + 1),
            };
            return Some((batch, place));
        }
    }

    /// Fills `self.crops` or `self.for_device` from the image, or the next good one after it in the list.
    fn fill(&mut self, start: u64, image: u64) -> Outcome {
        let settings = &self.shared.settings;
        let count = settings.index.len() as u64;
        let epoch = self.shared.order.epoch(start);
        let mut outcome = Outcome { image, bad: Vec::new(), found: false };
        for step in 0..count.min(MAX_REPLACEMENTS) {
            outcome.image = (image + step) % count;
            let known = lock(&self.shared.state).known_bad.get(&outcome.image).cloned();
            let reason = match known {
                Some(reason) => reason,
                None => match self.crop(epoch, outcome.image) {
                    Ok(()) => {
                        outcome.found = true;
                        return outcome;
                    }
                    Err(reason) => {
                        lock(&self.shared.state).known_bad.insert(outcome.image, reason.clone());
                        reason
                    }
                },
            };
            outcome.bad.push((outcome.image, reason));
        }
        outcome
    }

    /// Fills `self.crops` or `self.for_device` from one image, or says what is wrong with it.
    fn crop(&mut self, epoch: u64, image: u64) -> Result<(), String> {
        let settings = &self.shared.settings;
        let bytes = settings.index.read(image as usize).map_err(|error| error.to_string())?;
        let encoded = Encoded::open(&bytes, settings.max_megapixels).map_err(|error| error.to_string())?;
        let (width, height) = encoded.upright_size();
        let plans = plans(&settings.augment, settings.seed, epoch, image, width, height);
        let reduction = reduction(&encoded, &plans);
        let pixels = encoded.decode(reduction).map_err(|error| error.to_string())?;
        let on_device = self.shared.uploads && settings.augment.device == AugmentDevice::Gpu;
        if on_device && pixels.data.len() <= most_bytes(&plans) {
            self.for_device = Some(DeviceCrops::of_image(pixels, reduction, &plans));
            return Ok(());
        }
        self.apply(&pixels, reduction, &plans);
        self.for_device = self.shared.uploads.then(|| DeviceCrops::finished(&self.crops));
        Ok(())
    }

    fn apply(&mut self, pixels: &Rgb8Image, reduction: u32, plans: &[CropPlan]) {
        self.crops.resize_with(plans.len(), Planes::default);
        for (plan, crop) in plans.iter().zip(&mut self.crops) {
            self.augmenter.apply_into(pixels, reduction, plan, crop);
        }
    }

    /// Normalizes `self.crops` into their places of the batch, or hands over what is for the device.
    fn store(&mut self, parts: &mut Parts, place: usize, outcome: Outcome) {
        let settings = &self.shared.settings;
        parts.bad.extend(outcome.bad.into_iter().map(|(image, reason)| (place, image, reason)));
        if !outcome.found {
            let bad = parts.bad.len();
            let files =
                parts.bad.iter().take(super::LISTED_BAD).fold(String::new(), |files, (_, image, reason)| {
                    format!("{files}\n  {}: {reason}", settings.index.name(*image as usize))
                });
            parts.fail(place, DataError::TooManyBad { bad, seen: bad, max_bad: settings.max_bad, files });
            return;
        }
        let Parts { batch, for_device, .. } = parts;
        batch.images[place] = outcome.image;
        if let Some(crops) = self.for_device.take() {
            for_device[place] = crops;
            return;
        }
        let Views::Crops { global, local } = &mut batch.views else { return };
        let (mean, std) = (settings.augment.mean, settings.augment.std);
        for (number, crop) in self.crops.iter().enumerate() {
            let (target, number) = if number < GLOBAL_CROPS {
                (&mut *global, number)
            } else {
                (&mut *local, number - GLOBAL_CROPS)
            };
            let length = crop.data().len();
            let start = (number * settings.batch + place) * length;
            normalize_into(crop, mean, std, &mut target[start..start + length]);
        }
    }
}

impl Parts {
    /// Keeps the error of the lowest place, which does not depend on the order of the workers.
    fn fail(&mut self, place: usize, error: DataError) {
        if self.error.as_ref().is_none_or(|(first, _)| place < *first) {
            self.error = Some((place, error));
        }
    }
}

/// Bytes of pixels that a device may be given for an image: those of its finished crops as numbers. A larger image is cut up
/// here, so that the pixels of a batch take no more bytes than its crops do on the CPU.
fn most_bytes(plans: &[CropPlan]) -> usize {
    plans.iter().map(|plan| 3 * plan.size * plan.size * size_of::<f32>()).sum()
}

/// The strongest reduction at which every crop still has at least as many pixels as its target.
fn reduction(encoded: &Encoded<'_>, plans: &[CropPlan]) -> u32 {
    let fits = |reduction: u32| {
        plans.iter().all(|plan| {
            let side = plan.region.width.min(plan.region.height);
            (side / reduction) as usize >= plan.size
        })
    };
    REDUCTIONS.into_iter().find(|&r| fits(r) && encoded.can_reduce(r)).unwrap_or(1)
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "unknown".to_owned())
}
