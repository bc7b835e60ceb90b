//! Scene parsing by retrieval: the labels of the nearest patches of labelled images, without any training
//! (open-hummingbird's protocol).
//!
//! | file | job |
//! |---|---|
//! | [`bank`] | features of labelled patches, a balanced choice of them |
//! | [`read_out`](mod@read_out) | cross-attention over the nearest, labels for pixels |
//!
//! Deviations from the reference: no augmented copies of the training images; pixels without label are left out instead
//! of counting as class 0; masks keep their own size, and the prediction is enlarged to it; the nearest neighbors are
//! exact.

pub mod bank;
pub mod read_out;

use candle_core::Tensor;
use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;
use serde::Serialize;

use super::EvaluateError;
use super::image_features::normalize_rows;
use super::segment::dataset::{Dataset, Picture, Sample};
use super::segment::metrics::{Confusion, Scores};
use crate::data::augment::Augmenter;
use crate::model::encoder::Encoder;
use crate::ops::IGNORED;
use bank::{Bank, choose, patch_shares, uniform};
use read_out::{enlarge, read_out};

/// How scenes are parsed.
#[derive(Clone, Copy, Debug)]
pub struct RetrievalSettings {
    /// Height and width of the view; nothing = those of the image, rounded to whole patches.
    pub size: Option<(usize, usize)>,
    /// Most patches in the bank, shared evenly by the training images; 0 = all.
    pub memory: usize,
    /// Neighbors of a patch.
    pub k: usize,
    /// Temperature of the cross-attention.
    pub temperature: f64,
    /// Seed of the choice of patches.
    pub seed: u64,
    /// Images computed together.
    pub batch: usize,
}

impl Default for RetrievalSettings {
    fn default() -> Self {
        Self { size: None, memory: 1_024_000, k: 30, temperature: 0.02, seed: 0, batch: 8 }
    }
}

/// The result of `eval retrieval`.
#[derive(Clone, Debug, Serialize)]
pub struct RetrievalReport {
    /// The network.
    pub weights: String,
    /// Neighbors of a patch.
    pub k: usize,
    /// Temperature of the cross-attention.
    pub temperature: f64,
    /// Patches in the bank.
    pub memory: usize,
    /// Labelled patches of the training images.
    pub train_patches: usize,
    /// Training images.
    pub train_images: usize,
    /// Judged images.
    pub val_images: usize,
    /// How well they were parsed.
    #[serde(flatten)]
    pub scores: Scores,
}

/// A picture as the network sees it, and its labels.
#[derive(Clone, Debug)]
pub struct Scene {
    /// Normalized pixels, `[3, height, width]`.
    view: Vec<f32>,
    /// Height and width of the view.
    size: (usize, usize),
    labels: Vec<u8>,
    /// Height and width of the labels.
    label_size: (usize, usize),
    name: String,
}

impl Scene {
    /// Decodes a picture and resizes it, without keeping its proportions, to `size` (height and width), or to whole
    /// patches of `stride` pixels.
    ///
    /// # Errors
    /// As [`Dataset::load`].
    pub fn load(
        data: &Dataset,
        sample: &Sample,
        size: Option<(usize, usize)>,
        stride: usize,
        (mean, std): ([f32; 3], [f32; 3]),
    ) -> Result<Self, EvaluateError> {
        let Picture { image, labels } = data.load(sample)?;
        let whole = |pixels: u32| (pixels as usize + stride / 2) / stride * stride;
        let (height, width) =
            size.unwrap_or((whole(image.height).max(stride), whole(image.width).max(stride)));
        let view = Augmenter::default().resize_whole(&image, width, height, mean, std);
        let label_size = (image.height as usize, image.width as usize);
        let name = sample.image.display().to_string();
        Ok(Self { view, size: (height, width), labels, label_size, name })
    }

    /// Whether any pixel counts.
    pub fn is_labelled(&self) -> bool {
        self.labels.iter().any(|&label| label != IGNORED)
    }
}

/// Fills the bank with the training images and parses the others; `progress(done, all)` counts images.
///
/// # Errors
/// [`EvaluateError`] for pictures that cannot be used, sizes that patches do not divide, and features that are not finite.
pub fn run(
    encoder: &Encoder,
    data: &Dataset,
    settings: &RetrievalSettings,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<RetrievalReport, EvaluateError> {
    check_size(encoder, settings.size)?;
    let all = data.train.len() + data.val.len();
    let mut parser = Parser::new(encoder, data, *settings);
    let (stride, normalization) = (encoder.stride(), encoder.normalization());
    let load = |chunk: &[Sample]| -> Result<Vec<Scene>, EvaluateError> {
        let load = |sample| Scene::load(data, sample, settings.size, stride, normalization);
        chunk.par_iter().map(load).collect()
    };
    let mut done = 0;
    for chunk in data.train.chunks(settings.batch.max(1)) {
        parser.learn(&load(chunk)?)?;
        done += chunk.len();
        progress(done, all);
    }
    for chunk in data.val.chunks(settings.batch.max(1)) {
        parser.judge(&load(chunk)?)?;
        done += chunk.len();
        progress(done, all);
    }
    parser.report()
}

/// Checks that patches divide the view.
///
/// # Errors
/// [`EvaluateError::Size`] if they do not.
pub fn check_size(encoder: &Encoder, size: Option<(usize, usize)>) -> Result<(), EvaluateError> {
    let stride = encoder.stride();
    let (height, width) = size.unwrap_or((stride, stride));
    match [height, width].into_iter().find(|&side| side == 0 || !side.is_multiple_of(stride)) {
        Some(found) => Err(EvaluateError::Size { stride, found }),
        None => Ok(()),
    }
}

/// Scenes of one size and their features.
struct Part<'s> {
    scenes: &'s [Scene],
    /// `[scenes · N, D]`, L2-normalized.
    rows: Array2<f32>,
    /// Rows and columns of the patches of a scene.
    grid: (usize, usize),
}

/// The bank and the confusion as they grow.
pub struct Parser<'a> {
    encoder: &'a Encoder,
    data: &'a Dataset,
    settings: RetrievalSettings,
    bank: Bank,
    confusion: Confusion,
    learned: usize,
    judged: usize,
    train_patches: usize,
}

impl<'a> Parser<'a> {
    /// An empty bank for the training images of `data`.
    pub fn new(encoder: &'a Encoder, data: &'a Dataset, settings: RetrievalSettings) -> Self {
        let classes = data.classes.len();
        Self {
            encoder,
            data,
            settings,
            bank: Bank::new(encoder.dim(), classes),
            confusion: Confusion::new(classes),
            learned: 0,
            judged: 0,
            train_patches: 0,
        }
    }

    /// Adds patches of the next training images.
    ///
    /// # Errors
    /// As [`run`].
    pub fn learn(&mut self, scenes: &[Scene]) -> Result<(), EvaluateError> {
        let classes = self.data.classes.len();
        for Part { scenes, rows: features, grid } in self.features(scenes)? {
            let patches = grid.0 * grid.1;
            for (scene, features) in scenes.iter().zip(features.axis_chunks_iter(ndarray::Axis(0), patches)) {
                let shares = patch_shares(&scene.labels, scene.label_size, grid, classes);
                let uniform = uniform(self.settings.seed, self.learned as u64, patches);
                let kept = choose(shares.view(), self.quota(self.learned), &uniform);
                self.train_patches += shares.rows().into_iter().filter(|row| row.sum() > 0.0).count();
                for patch in kept {
                    self.bank.push(slice(features, patch), slice(shares.view(), patch));
                }
                self.learned += 1;
            }
        }
        Ok(())
    }

    /// Parses images and compares with their labels.
    ///
    /// # Errors
    /// As [`run`]; [`EvaluateError::Unlabelled`] if nothing was learned.
    pub fn judge(&mut self, scenes: &[Scene]) -> Result<(), EvaluateError> {
        if self.bank.is_empty() {
            return Err(EvaluateError::Unlabelled { path: self.data.path.clone() });
        }
        for Part { scenes, rows: features, grid } in self.features(scenes)? {
            let soft = read_out(&self.bank, features.view(), self.settings.k, self.settings.temperature);
            for (scene, soft) in scenes.iter().zip(soft.axis_chunks_iter(ndarray::Axis(0), grid.0 * grid.1)) {
                self.confusion.add(&scene.labels, &enlarge(soft, grid, scene.label_size));
                self.judged += 1;
            }
        }
        Ok(())
    }

    /// How well the images were parsed.
    ///
    /// # Errors
    /// [`EvaluateError::Unlabelled`] if none of them has a labelled pixel.
    pub fn report(self) -> Result<RetrievalReport, EvaluateError> {
        let scores = self.confusion.scores(&self.data.classes.names);
        if scores.mean_iou.is_none() {
            return Err(EvaluateError::Unlabelled { path: self.data.path.clone() });
        }
        Ok(RetrievalReport {
            weights: self.encoder.description().to_owned(),
            k: self.settings.k,
            temperature: self.settings.temperature,
            memory: self.bank.len(),
            train_patches: self.train_patches,
            train_images: self.learned,
            val_images: self.judged,
            scores,
        })
    }

    /// Most patches that training image `image` may add.
    fn quota(&self, image: usize) -> usize {
        let images = self.data.train.len().max(1);
        match self.settings.memory {
            0 => usize::MAX,
            memory => memory / images + usize::from(image < memory % images),
        }
    }

    /// Features of the scenes, those of neighbors of one size together.
    fn features<'s>(&self, scenes: &'s [Scene]) -> Result<Vec<Part<'s>>, EvaluateError> {
        let mut parts = Vec::new();
        for scenes in scenes.chunk_by(|a, b| a.size == b.size) {
            let (height, width) = scenes[0].size;
            let pixels: Vec<f32> = scenes.iter().flat_map(|scene| scene.view.iter().copied()).collect();
            let images = Tensor::from_vec(pixels, (scenes.len(), 3, height, width), self.encoder.device())?;
            let patches = self.encoder.patch_features(&images)?;
            let (count, dim) = (patches.grid.0 * patches.grid.1, self.encoder.dim());
            let values = patches.features.flatten_all()?.to_vec1::<f32>()?;
            if let Some(bad) = values.iter().position(|value| !value.is_finite()) {
                return Err(EvaluateError::NotFinite { image: scenes[bad / (count * dim)].name.clone() });
            }
            let mut rows = Array2::from_shape_vec((scenes.len() * count, dim), values)
                .map_err(|_| candle_core::Error::Msg("features of another size than the network's".into()))?;
            normalize_rows(&mut rows);
            parts.push(Part { scenes, rows, grid: patches.grid });
        }
        Ok(parts)
    }
}

/// A row of an array in standard layout.
fn slice(rows: ArrayView2<'_, f32>, row: usize) -> &[f32] {
    let width = rows.ncols();
    &rows.to_slice().expect("rows follow each other")[row * width..][..width]
}
