//! How good the teacher's features are, measured while it trains: a cheap evaluation on a small labelled folder.
//!
//! The result is a pure function of the teacher's weights and the folder: images, their order and the choice of patches
//! never change, so a resumed run logs the same numbers.

use std::path::Path;

use candle_core::Device;
use ndarray::Array2;
use rayon::prelude::*;

use crate::config::{ProbeKind, TrainConfig};
use crate::data::augment::Planes;
use crate::evaluate::EvaluateError;
use crate::evaluate::class_folders::{ClassFolders, Labelled};
use crate::evaluate::image_features::{
    ImageToken, Views, check_classes, load, normalize_rows, show, vectors,
};
use crate::evaluate::knn::{self, USUAL_TEMPERATURE};
use crate::evaluate::retrieval::{Parser, RetrievalSettings, Scene};
use crate::evaluate::segment::dataset::{Dataset, DatasetOptions, Sample};
use crate::model::encoder::Encoder;
use crate::model::{Architecture, Network};

/// Images computed together.
const BATCH: usize = 16;
/// Most patches in the memory of `retrieval`.
const MEMORY: usize = 20_000;

/// A labelled folder, decoded and ready.
#[derive(Debug)]
pub struct Probe {
    every: u64,
    architecture: Architecture,
    normalization: ([f32; 3], [f32; 3]),
    task: Task,
    bad: Vec<(String, String)>,
}

#[derive(Debug)]
enum Task {
    Knn { classes: usize, k: usize, train: Split, val: Split },
    Retrieval { data: Dataset, settings: RetrievalSettings, train: Vec<Scene>, val: Vec<Scene> },
}

/// Center views and their classes.
#[derive(Debug)]
struct Split {
    views: Vec<Planes>,
    labels: Vec<usize>,
}

/// What a probe found.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ProbeScore {
    /// Share of the images classified right.
    pub knn_top1: Option<f64>,
    /// Mean intersection over union.
    pub retrieval_miou: Option<f64>,
}

impl Probe {
    /// Reads and decodes the folder of `config.probe`; nothing if no probe is wanted.
    ///
    /// # Errors
    /// [`EvaluateError`] for a folder that is not as its kind of probe needs it.
    pub fn open(config: &TrainConfig) -> Result<Option<Self>, EvaluateError> {
        let probe = &config.probe;
        if probe.every_steps == 0 {
            return Ok(None);
        }
        let (folder, size) = (Path::new(&probe.data), config.augment.global_size);
        let normalization = (config.augment.mean, config.augment.std);
        let mut bad = Vec::new();
        let task = match probe.kind {
            ProbeKind::Knn => {
                let sets = ClassFolders::open(folder)?.limited(probe.images);
                let train = Split::load(&sets.train, &sets.classes, size, &mut bad)?;
                let val = Split::load(&sets.val, &sets.classes, size, &mut bad)?;
                Task::Knn { classes: sets.classes.len(), k: probe.k, train, val }
            }
            ProbeKind::Retrieval => {
                let data = Dataset::open(folder, &DatasetOptions::default())?.limited(probe.images);
                let load = |samples: &[Sample]| -> Result<Vec<Scene>, EvaluateError> {
                    let stride = config.model.patch_size;
                    let load = |sample| Scene::load(&data, sample, Some((size, size)), stride, normalization);
                    samples.par_iter().map(load).collect()
                };
                let (train, val) = (load(&data.train)?, load(&data.val)?);
                if ![&train, &val].iter().all(|scenes| scenes.iter().any(Scene::is_labelled)) {
                    return Err(EvaluateError::Unlabelled { path: data.path });
                }
                let settings = RetrievalSettings { memory: MEMORY, ..RetrievalSettings::default() };
                Task::Retrieval { data, settings, train, val }
            }
        };
        let architecture = Architecture::from_config(config);
        Ok(Some(Self { every: probe.every_steps as u64, architecture, normalization, task, bad }))
    }

    /// Whether step `step` is followed by a probe.
    pub fn is_due(&self, step: u64) -> bool {
        step.is_multiple_of(self.every)
    }

    /// Images left out, with the reason.
    pub fn bad(&self) -> &[(String, String)] {
        &self.bad
    }

    /// Probes a network.
    ///
    /// # Errors
    /// If the network cannot compute, or its features are not finite (`retrieval`).
    pub fn run(&self, network: &Network, device: &Device) -> Result<ProbeScore, EvaluateError> {
        let encoder =
            Encoder::of_network(&network.parameters, &self.architecture, self.normalization, device)?;
        match &self.task {
            Task::Knn { classes, k, train, val } => {
                let (bank, queries) = (train.features(&encoder)?, val.features(&encoder)?);
                let scores = knn::scores(
                    &bank,
                    &train.labels,
                    &queries,
                    &val.labels,
                    *classes,
                    &[*k],
                    USUAL_TEMPERATURE,
                );
                Ok(ProbeScore { knn_top1: scores.first().map(|score| score.top1), ..ProbeScore::default() })
            }
            Task::Retrieval { data, settings, train, val } => {
                let mut parser = Parser::new(&encoder, data, *settings);
                train.chunks(BATCH).try_for_each(|scenes| parser.learn(scenes))?;
                val.chunks(BATCH).try_for_each(|scenes| parser.judge(scenes))?;
                Ok(ProbeScore { retrieval_miou: parser.report()?.scores.mean_iou, ..ProbeScore::default() })
            }
        }
    }
}

impl Split {
    fn load(
        images: &[Labelled],
        classes: &[String],
        size: usize,
        bad: &mut Vec<(String, String)>,
    ) -> Result<Self, EvaluateError> {
        let shown: Vec<Result<Vec<Planes>, String>> =
            images.par_iter().map(|image| Ok(show(&load(image)?, size, Views::Center, 0))).collect();
        let (mut views, mut labels, mut left_out) = (Vec::new(), Vec::new(), Vec::new());
        for (image, shown) in images.iter().zip(shown) {
            match shown {
                Ok(view) => {
                    views.extend(view);
                    labels.push(image.class);
                }
                Err(reason) => left_out.push((image, reason)),
            }
        }
        check_classes(images, classes, &labels, &left_out)?;
        bad.extend(left_out.into_iter().map(|(image, reason)| (image.path.display().to_string(), reason)));
        Ok(Self { views, labels })
    }

    /// L2-normalized class features, `[images, D]`.
    fn features(&self, encoder: &Encoder) -> candle_core::Result<Array2<f32>> {
        let mut rows = Array2::zeros((self.views.len(), encoder.dim()));
        for (batch, views) in self.views.chunks(BATCH).enumerate() {
            let vectors = vectors(encoder, views, encoder.normalization(), ImageToken::Class)?;
            for (i, vector) in vectors.iter().enumerate() {
                rows.row_mut(batch * BATCH + i).iter_mut().zip(vector).for_each(|(out, &value)| *out = value);
            }
        }
        normalize_rows(&mut rows);
        Ok(rows)
    }
}
