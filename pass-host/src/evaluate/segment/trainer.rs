//! The loop: batches of crops, or of kept features, until all steps are done or somebody interrupts.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use candle_core::Tensor;

use super::dataset::{Dataset, Sample};
use super::error::SegmentError;
use super::head_linear::Statistics;
use super::model::SegmentModel;
use super::optimizer::Optimizer;
use super::pictures::{FeatureCache, prefetched, spread, whole_pictures};
use super::state::{self, SegmentState};
use super::view::{self, View};
use super::{Event, SegmentSettings};
use crate::config::segment::{HeadKind, SegmentConfig};
use crate::random::shuffled;

/// Pictures whose features standardize a linear head, where not all are computed anyway.
const STANDARDIZING: usize = 128;

/// What is trained, and with what.
pub(super) struct Trainer<'a> {
    pub(super) settings: &'a SegmentSettings,
    pub(super) dataset: &'a Dataset,
    pub(super) model: SegmentModel,
    pub(super) optimizer: Optimizer,
    pub(super) state: SegmentState,
}

impl Trainer<'_> {
    fn config(&self) -> &SegmentConfig {
        &self.settings.config
    }

    /// Trains to the end, or until an interruption, and leaves a checkpoint.
    pub(super) fn run(&mut self, tell: &mut dyn FnMut(Event)) -> Result<(), SegmentError> {
        if self.is_done() {
            return Ok(());
        }
        let fresh = self.state.iteration == 0;
        if self.config().caches_features() {
            let cache = self.fill_cache(fresh, tell)?;
            let mut interrupted = false;
            while !self.is_done() && !interrupted {
                let batch = batch(self.config(), self.dataset.train.len(), self.state.iteration);
                let loss = self.cached_loss(&cache, &batch)?;
                interrupted = self.finish_step(&loss, tell)?.is_break();
            }
        } else {
            if fresh && self.config().head == HeadKind::Linear {
                self.standardize(tell)?;
            }
            self.train_on_crops(tell)?;
        }
        state::save(&self.settings.out, &self.state, &self.model, &self.optimizer)
    }

    /// True after the last step.
    pub(super) fn is_done(&self) -> bool {
        self.state.iteration >= self.config().iterations
    }

    fn train_on_crops(&mut self, tell: &mut dyn FnMut(Event)) -> Result<(), SegmentError> {
        let (dataset, config) = (self.dataset, &self.settings.config);
        let normalization = self.model.encoder.normalization();
        let batches = (self.state.iteration..config.iterations)
            .map(|iteration| batch(config, dataset.train.len(), iteration));
        let load = |(epoch, index): (u64, usize)| {
            let picture = dataset.load(&dataset.train[index])?;
            Ok(view::crop(&picture, config, normalization, epoch, index as u64))
        };
        prefetched(batches, load, |views: Vec<View>| {
            let loss = self.crop_loss(&views)?;
            self.finish_step(&loss, tell)
        })
    }

    /// Mean loss over all pixels of the crops. As in mmsegmentation, pixels that do not count add nothing, but are
    /// counted in the mean.
    fn crop_loss(&mut self, views: &[View]) -> Result<Tensor, SegmentError> {
        let images = self.model.images(&views.iter().collect::<Vec<_>>())?;
        let features = self.model.features(&images, Some(self.state.iteration))?;
        let logits = self.model.train_logits(&features, self.state.iteration)?;
        let (_, rows, columns, _) = logits.dims4()?;
        let size = (views[0].height, views[0].width);
        let labels: Arc<[u8]> = views.iter().flat_map(|view| view.labels.iter().copied()).collect();
        let scale = 1.0 / labels.len() as f64;
        let target = self.model.targets((rows, columns), size, size, labels);
        Ok(self.model.loss(&logits, &target, scale)?)
    }

    /// The same for whole pictures, which may differ in size.
    fn cached_loss(&mut self, cache: &FeatureCache, batch: &[(u64, usize)]) -> Result<Tensor, SegmentError> {
        let mut pictures = Vec::with_capacity(batch.len());
        for &(_, index) in batch {
            pictures.push(cache.get(&self.model, self.dataset, &self.settings.config, index)?);
        }
        let pixels: usize = pictures.iter().map(|(_, target)| target.labels.len()).sum();
        let mut losses = Vec::with_capacity(pictures.len());
        for (features, target) in &pictures {
            let logits = self.model.train_logits(features, self.state.iteration)?;
            losses.push(self.model.loss(&logits, target, 1.0 / pixels as f64)?);
        }
        Ok(Tensor::stack(&losses, 0)?.sum_all()?)
    }

    /// Backward pass and update; breaks if somebody interrupted.
    fn finish_step(
        &mut self,
        loss: &Tensor,
        tell: &mut dyn FnMut(Event),
    ) -> Result<ControlFlow<()>, SegmentError> {
        let lr = self.config().lr_at(self.state.iteration);
        let value = f64::from(loss.to_scalar::<f32>()?);
        if !value.is_finite() {
            return Err(SegmentError::NotFinite { iteration: self.state.iteration + 1, loss: value, lr });
        }
        let mut store = loss.backward()?;
        self.optimizer.step(&self.model.learned(), &mut store, lr)?;
        self.state.iteration += 1;
        let (iteration, total) = (self.state.iteration, self.config().iterations);
        tell(Event::Step { iteration, total, loss: value, lr });
        if iteration.is_multiple_of(self.config().checkpoint_every) && !self.is_done() {
            state::save(&self.settings.out, &self.state, &self.model, &self.optimizer)?;
        }
        match self.settings.interrupted.load(Ordering::SeqCst) {
            0 => Ok(ControlFlow::Continue(())),
            _ => Ok(ControlFlow::Break(())),
        }
    }

    fn fill_cache(&mut self, fresh: bool, tell: &mut dyn FnMut(Event)) -> Result<FeatureCache, SegmentError> {
        let total = self.dataset.train.len();
        let mut statistics = Statistics::new(self.model.encoder.dim());
        let cache = FeatureCache::fill(&self.model, self.dataset, self.config(), &mut statistics, |done| {
            tell(Event::Features { done, total });
        })?;
        if cache.kept() < total {
            tell(Event::Note(format!(
                "the features of {} of {total} pictures fit into `--cache {}` GiB; the others are computed again and again",
                cache.kept(),
                self.config().cache_gib
            )));
        }
        if fresh {
            self.model.standardize(&statistics)?;
        }
        Ok(cache)
    }

    fn standardize(&mut self, tell: &mut dyn FnMut(Event)) -> Result<(), SegmentError> {
        let samples: Vec<&Sample> = spread(&self.dataset.train, STANDARDIZING);
        let total = samples.len();
        let mut statistics = Statistics::new(self.model.encoder.dim());
        whole_pictures(
            &self.model,
            self.dataset,
            &samples,
            &self.settings.config,
            |index, _, _, features| {
                statistics.add(&features.maps[0].detach().flatten_all()?.to_vec1::<f32>()?);
                tell(Event::Features { done: index + 1, total });
                Ok(())
            },
        )?;
        Ok(self.model.standardize(&statistics)?)
    }
}

/// Epoch and picture of everything in the batch of a step: shuffled epochs without a gap between them.
fn batch(config: &SegmentConfig, pictures: usize, iteration: u64) -> Vec<(u64, usize)> {
    let pictures = pictures as u64;
    (0..config.batch as u64)
        .map(|place| {
            let position = iteration * config.batch as u64 + place;
            let (epoch, place) = (position / pictures, position % pictures);
            (epoch, shuffled(config.seed, epoch, place, pictures) as usize)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::segment::SegmentPreset;

    #[test]
    fn every_picture_comes_once_an_epoch() {
        let config =
            SegmentConfig { batch: 4, ..SegmentConfig::preset(HeadKind::Linear, SegmentPreset::Small) };
        let order: Vec<(u64, usize)> = (0..7).flat_map(|iteration| batch(&config, 7, iteration)).collect();
        for epoch in 0..4 {
            let mut seen: Vec<usize> =
                order.iter().filter(|(e, _)| *e == epoch).map(|(_, picture)| *picture).collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..7).collect::<Vec<_>>());
        }
    }
}
