//! Pictures on their way to the network: decoded ahead by other threads, and features kept for the next time.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use super::dataset::{Dataset, Picture, Sample};
use super::error::SegmentError;
use super::head_linear::Statistics;
use super::model::{Features, SegmentModel};
use super::view::{self, Normalization, View};
use crate::config::segment::SegmentConfig;
use crate::ops::PixelLabels;

/// Batches that are ready before they are needed.
const AHEAD: usize = 2;

/// Loads batches on another thread, each in parallel, and hands them over in order, until `each` breaks.
///
/// # Errors
/// The first error of `load` or `each`.
pub fn prefetched<K: Send + Sync + Copy, T: Send>(
    batches: impl Iterator<Item = Vec<K>> + Send,
    load: impl Fn(K) -> Result<T, SegmentError> + Sync,
    mut each: impl FnMut(Vec<T>) -> Result<ControlFlow<()>, SegmentError>,
) -> Result<(), SegmentError> {
    let load = &load;
    std::thread::scope(|scope| {
        let (sender, receiver) = sync_channel(AHEAD);
        scope.spawn(move || {
            for batch in batches {
                let loaded: Result<Vec<T>, SegmentError> = batch.into_par_iter().map(load).collect();
                let failed = loaded.is_err();
                // nobody receives any more: the other side is done
                if sender.send(loaded).is_err() || failed {
                    return;
                }
            }
        });
        for loaded in receiver {
            if each(loaded?)?.is_break() {
                break;
            }
        }
        Ok(())
    })
}

/// Shows whole pictures to the network in order: `each(index, picture, view, features of this picture)`.
///
/// # Errors
/// The first error of a picture, the network or `each`.
pub fn whole_pictures(
    model: &SegmentModel,
    dataset: &Dataset,
    samples: &[&Sample],
    config: &SegmentConfig,
    mut each: impl FnMut(usize, &Picture, &View, &Features) -> Result<(), SegmentError>,
) -> Result<(), SegmentError> {
    let normalization = model.encoder.normalization();
    let together = if model.device().is_cpu() { 1 } else { 8 };
    let indices: Vec<usize> = (0..samples.len()).collect();
    let batches = indices.chunks(together.max(rayon::current_num_threads().min(8))).map(<[usize]>::to_vec);
    let load = |index: usize| {
        let picture = dataset.load(samples[index])?;
        let view = view::whole(&picture, config, normalization);
        Ok((index, picture, view))
    };
    prefetched(batches, load, |loaded| {
        for group in loaded.chunk_by(|a, b| (a.2.width, a.2.height) == (b.2.width, b.2.height)) {
            for group in group.chunks(together) {
                let views: Vec<&View> = group.iter().map(|(_, _, view)| view).collect();
                let features = model.features(&model.images(&views)?, None)?;
                for (place, (index, picture, view)) in group.iter().enumerate() {
                    let maps = features.maps.iter().map(|map| map.narrow(0, place, 1));
                    let own = Features { maps: maps.collect::<candle_core::Result<_>>()? };
                    each(*index, picture, view, &own)?;
                }
            }
        }
        Ok(ControlFlow::Continue(()))
    })
}

/// A whole training picture as a linear head on a frozen backbone needs it.
struct Entry {
    /// `[1, h, w, D]`, `f16`, in main memory.
    features: Tensor,
    target: PixelLabels,
}

impl Entry {
    fn new(
        model: &SegmentModel,
        picture: &Picture,
        view: &View,
        features: &Features,
    ) -> Result<Self, SegmentError> {
        let map = &features.maps[0];
        let (_, rows, columns, _) = map.dims4()?;
        let target = model.targets(
            (rows, columns),
            (view.height, view.width),
            (picture.image.height as usize, picture.image.width as usize),
            Arc::from(view.labels.as_slice()),
        );
        Ok(Self { features: map.to_device(&Device::Cpu)?.to_dtype(DType::F16)?.copy()?, target })
    }

    fn bytes(&self) -> usize {
        self.features.elem_count() * DType::F16.size_in_bytes() + self.target.labels.len()
    }
}

/// Features of the training pictures, computed once as far as memory allows.
pub struct FeatureCache {
    entries: Vec<Option<Entry>>,
    normalization: Normalization,
}

impl FeatureCache {
    /// Computes the features of all training pictures; `shown(done)` after each. Half precision is enough: a feature
    /// is rounded by less than a thousandth of itself.
    ///
    /// # Errors
    /// [`SegmentError`] of the first picture that cannot be used.
    pub fn fill(
        model: &SegmentModel,
        dataset: &Dataset,
        config: &SegmentConfig,
        statistics: &mut Statistics,
        mut shown: impl FnMut(usize),
    ) -> Result<Self, SegmentError> {
        let limit = config.cache_gib * f64::from(1u32 << 30);
        let mut bytes = 0;
        let mut entries: Vec<Option<Entry>> = Vec::with_capacity(dataset.train.len());
        let samples: Vec<&Sample> = dataset.train.iter().collect();
        whole_pictures(model, dataset, &samples, config, |index, picture, view, features| {
            let entry = Entry::new(model, picture, view, features)?;
            statistics.add(&entry.features.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?);
            bytes += entry.bytes();
            entries.push((bytes as f64 <= limit).then_some(entry));
            shown(index + 1);
            Ok(())
        })?;
        Ok(Self { entries, normalization: model.encoder.normalization() })
    }

    /// Pictures that are kept.
    pub fn kept(&self) -> usize {
        self.entries.iter().flatten().count()
    }

    /// Features and labels of a training picture.
    ///
    /// # Errors
    /// As [`FeatureCache::fill`].
    pub fn get(
        &self,
        model: &SegmentModel,
        dataset: &Dataset,
        config: &SegmentConfig,
        index: usize,
    ) -> Result<(Features, PixelLabels), SegmentError> {
        let computed;
        let entry = match &self.entries[index] {
            Some(entry) => entry,
            None => {
                let picture = dataset.load(&dataset.train[index])?;
                let view = view::whole(&picture, config, self.normalization);
                let features = model.features(&model.images(&[&view])?, None)?;
                computed = Entry::new(model, &picture, &view, &features)?;
                &computed
            }
        };
        let map = entry.features.to_device(model.device())?.to_dtype(DType::F32)?;
        Ok((Features { maps: vec![map] }, entry.target.clone()))
    }
}

/// `count` samples spread evenly over all.
pub fn spread(samples: &[Sample], count: usize) -> Vec<&Sample> {
    let count = count.min(samples.len());
    (0..count).map(|place| &samples[place * samples.len() / count]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_arrive_in_order_and_stop_when_told() {
        let mut seen = Vec::new();
        prefetched(
            (0..9).map(|i| vec![2 * i, 2 * i + 1]),
            |i: i32| Ok(i * i),
            |batch| {
                seen.extend(batch);
                Ok(if seen.len() >= 6 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
            },
        )
        .unwrap();
        assert_eq!(seen, [0, 1, 4, 9, 16, 25]);
    }

    #[test]
    fn the_first_error_ends_it() {
        let load = |i: i32| match i {
            3 => Err(SegmentError::NoImages { path: "three".into() }),
            i => Ok(i),
        };
        let mut seen = 0;
        let result = prefetched((0..9).map(|i| vec![i]), load, |_| {
            seen += 1;
            Ok(ControlFlow::Continue(()))
        });
        assert!(result.unwrap_err().to_string().contains("three"));
        assert_eq!(seen, 3);
        let result = prefetched((0..9).map(|i| vec![i]), Ok, |_: Vec<i32>| {
            Err(SegmentError::NoImages { path: "here".into() })
        });
        assert!(result.unwrap_err().to_string().contains("here"));
    }
}
