//! Linear classification of frozen features: how well a straight cut separates the classes.
//!
//! Features are computed once; classifiers for a whole grid of learning rates are then trained together. The rate is
//! chosen on images held out of the training split, never on the split that is judged; classifiers trained again on all
//! training images give the result.

pub mod softmax_regression;

use std::f64::consts::PI;

use ndarray::{Array1, Array2, Axis};
use serde::Serialize;

use super::EvaluateError;
use super::class_folders::ClassFolders;
use super::image_features::{Extraction, ImageFeatures, ImageToken, Views};
use crate::model::encoder::Encoder;
use crate::random::{Purpose, Stream, shuffled};
use softmax_regression::{Classifiers, Sgd};

/// The learning rates for a batch of 256 that are tried: DINOv2's grid, and three higher ones for small data sets.
pub const USUAL_RATES: [f64; 16] =
    [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0];
/// Momentum of the descent.
const MOMENTUM: f32 = 0.9;
/// Share of the images of a class that is held out to choose the learning rate; at least one.
const HELD_OUT: f64 = 0.1;
/// How many of the best classes count for `top5`.
const TOP: usize = 5;

/// How the classifiers are trained.
#[derive(Clone, Debug)]
pub struct LinearSettings {
    /// Learning rates for a batch of 256; the real ones are `rate · batch / 256`, falling to 0 along a half cosine.
    pub rates: Vec<f64>,
    /// Passes over all views of the training images.
    pub epochs: usize,
    /// Views a step.
    pub batch: usize,
    /// Subtract the mean of each feature and divide by its standard deviation (over the training views).
    pub standardize: bool,
    /// What is shown of a training image.
    pub views: Views,
    /// Seed of weights, order and held-out images.
    pub seed: u64,
}

/// How one learning rate did.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct RateScore {
    /// Learning rate for a batch of 256.
    pub lr: f64,
    /// Share of the held-out training images that were classified right: what the rate is chosen by.
    pub held_out_top1: f64,
    /// Mean cross-entropy over the last pass, nats; nothing if it diverged.
    pub train_loss: Option<f64>,
    /// Share of the judged images whose class came first.
    pub top1: f64,
    /// Share whose class was among the first five.
    pub top5: f64,
}

/// The result of `eval linear`.
#[derive(Clone, Debug, Serialize)]
pub struct LinearReport {
    /// The network.
    pub weights: String,
    /// Which vector stands for an image.
    pub tokens: ImageToken,
    /// Side of the view in pixels.
    pub size: usize,
    /// Classes.
    pub classes: usize,
    /// Training images.
    pub train_images: usize,
    /// Views of a training image.
    pub views: usize,
    /// Judged images.
    pub val_images: usize,
    /// The rate chosen on the held-out images, and its scores.
    pub linear: RateScore,
    /// Whether it is the lowest or highest that was tried: a better one may lie beyond.
    pub at_the_edge: bool,
    /// Every rate.
    pub rates: Vec<RateScore>,
    /// Images left out, with the reason.
    pub bad: Vec<(String, String)>,
}

/// Computes the features of both splits, trains and judges; `progress(done, all)` counts images.
///
/// # Errors
/// As [`Extraction::run`]; a class with a single image; every rate diverged.
pub fn run(
    encoder: &Encoder,
    sets: &ClassFolders,
    extraction: &Extraction,
    settings: &LinearSettings,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<LinearReport, EvaluateError> {
    let all = sets.train.len() + sets.val.len();
    let mut done = 0;
    let mut count = |images| {
        done += images;
        progress(done, all);
    };
    let train = extraction.run(encoder, &sets.train, &sets.classes, settings.views, &mut count)?;
    let val = extraction.run(encoder, &sets.val, &sets.classes, Views::Center, &mut count)?;
    let rates = scores(&train, &val, &sets.classes, settings)?;
    let best = choose(&rates).ok_or(EvaluateError::Diverged)?;
    let linear = rates[best];
    let beyond = |better: fn(f64, f64) -> bool| rates.iter().all(|other| !better(other.lr, linear.lr));
    Ok(LinearReport {
        weights: encoder.description().to_owned(),
        tokens: extraction.token,
        size: extraction.size,
        classes: sets.classes.len(),
        train_images: train.labels.len() / train.views,
        views: train.views,
        val_images: val.labels.len(),
        linear,
        at_the_edge: rates.len() > 1 && (beyond(|a, b| a > b) || beyond(|a, b| a < b)),
        rates,
        bad: train.bad.into_iter().chain(val.bad).collect(),
    })
}

/// The rate with the best held-out share; of equal ones the one with the lowest loss.
fn choose(rates: &[RateScore]) -> Option<usize> {
    let key = |score: &RateScore| Some((score.held_out_top1, -score.train_loss?));
    (0..rates.len())
        .filter_map(|i| Some((key(&rates[i])?, i)))
        .max_by(|(a, _), (b, _)| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)))
        .map(|(_, i)| i)
}

/// Scores for each learning rate.
///
/// # Errors
/// [`EvaluateError::TooFewToHoldOut`].
pub fn scores(
    train: &ImageFeatures,
    val: &ImageFeatures,
    classes: &[String],
    settings: &LinearSettings,
) -> Result<Vec<RateScore>, EvaluateError> {
    let (kept, held_out) = hold_out(train, classes, settings.seed)?;
    let rows = |images: &[usize]| -> Vec<usize> {
        images.iter().flat_map(|image| image * train.views..(image + 1) * train.views).collect()
    };
    let centers: Vec<usize> = held_out.iter().map(|image| image * train.views).collect();
    let all: Vec<usize> = (0..train.labels.len()).collect();
    let held_out = fit(train, &rows(&kept), train, &centers, classes.len(), settings);
    let judged: Vec<usize> = (0..val.labels.len()).collect();
    let finals = fit(train, &all, val, &judged, classes.len(), settings);
    let scores = settings.rates.iter().zip(held_out.ranks.iter().zip(&finals.ranks)).zip(finals.losses);
    Ok(scores
        .map(|((&lr, (held_out, ranks)), loss)| RateScore {
            lr,
            held_out_top1: share(held_out, 1),
            train_loss: Some(loss).filter(|loss| loss.is_finite()),
            top1: share(ranks, 1),
            top5: share(ranks, TOP),
        })
        .collect())
}

fn share(ranks: &[usize], places: usize) -> f64 {
    ranks.iter().filter(|&&rank| rank < places).count() as f64 / ranks.len().max(1) as f64
}

/// Images to learn from and images to choose the rate with, drawn per class.
fn hold_out(
    features: &ImageFeatures,
    classes: &[String],
    seed: u64,
) -> Result<(Vec<usize>, Vec<usize>), EvaluateError> {
    let (mut kept, mut held_out) = (Vec::new(), Vec::new());
    for (class, name) in classes.iter().enumerate() {
        let mut images: Vec<usize> = (0..features.labels.len() / features.views)
            .filter(|image| features.labels[image * features.views] == class)
            .collect();
        if images.len() < 2 {
            return Err(EvaluateError::TooFewToHoldOut { class: name.clone(), found: images.len() });
        }
        let mut stream = Stream::new(seed, Purpose::Subset, &[class as u64]);
        let count = ((images.len() as f64 * HELD_OUT).round() as usize).max(1);
        for _ in 0..count {
            held_out.push(images.swap_remove(stream.below(images.len() as u64) as usize));
        }
        kept.extend(images);
    }
    kept.sort_unstable();
    held_out.sort_unstable();
    Ok((kept, held_out))
}

/// What trained classifiers did.
struct Fit {
    /// Mean loss over the last pass, for each rate.
    losses: Vec<f64>,
    /// Rank of the class of each judged row, for each rate.
    ranks: Vec<Vec<usize>>,
}

/// Trains on some rows and ranks the classes of others.
fn fit(
    train: &ImageFeatures,
    rows: &[usize],
    val: &ImageFeatures,
    judged: &[usize],
    classes: usize,
    settings: &LinearSettings,
) -> Fit {
    let mut features = train.rows.select(Axis(0), rows);
    let mut judged_features = val.rows.select(Axis(0), judged);
    if settings.standardize {
        let (mean, inverse) = moments(&features);
        for rows in [&mut features, &mut judged_features] {
            *rows -= &mean;
            *rows *= &inverse;
        }
    }
    let labels: Vec<usize> = rows.iter().map(|&row| train.labels[row]).collect();
    let mut classifiers = Classifiers::new(settings.rates.len(), classes, features.ncols(), settings.seed);
    let mut sgd = Sgd::new(&classifiers, MOMENTUM);
    let batches = rows.len().div_ceil(settings.batch);
    let steps = batches * settings.epochs;
    let mut losses = vec![0.0; settings.rates.len()];
    for epoch in 0..settings.epochs {
        losses.fill(0.0);
        let order: Vec<usize> = (0..rows.len() as u64)
            .map(|place| shuffled(settings.seed, epoch as u64, place, rows.len() as u64) as usize)
            .collect();
        for (batch, chosen) in order.chunks(settings.batch).enumerate() {
            let step = epoch * batches + batch;
            let scale = 0.5 * (1.0 + (PI * step as f64 / steps as f64).cos()) * settings.batch as f64 / 256.0;
            let rates: Vec<f64> = settings.rates.iter().map(|rate| rate * scale).collect();
            let batch_labels: Vec<usize> = chosen.iter().map(|&row| labels[row]).collect();
            let batch_features = features.select(Axis(0), chosen);
            let (loss, gradient) = classifiers.loss_and_gradient(batch_features.view(), &batch_labels);
            let share = chosen.len() as f64 / rows.len() as f64;
            losses.iter_mut().zip(loss).for_each(|(sum, loss)| *sum += share * loss);
            sgd.step(&mut classifiers, &gradient, &rates);
        }
    }
    let judged_labels: Vec<usize> = judged.iter().map(|&row| val.labels[row]).collect();
    Fit { losses, ranks: classifiers.ranks(judged_features.view(), &judged_labels) }
}

/// Mean and inverse standard deviation of each column; 0 for a column that is constant.
fn moments(rows: &Array2<f32>) -> (Array1<f32>, Array1<f32>) {
    let count = rows.nrows() as f64;
    let mut mean = vec![0.0; rows.ncols()];
    let mut square = vec![0.0; rows.ncols()];
    for row in rows.rows() {
        mean.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x) / count);
    }
    for row in rows.rows() {
        square.iter_mut().zip(row).zip(&mean).for_each(|((sum, &x), mean)| {
            let difference = f64::from(x) - mean;
            *sum += difference * difference / count;
        });
    }
    let inverse = |variance: &f64| if *variance > 1e-12 { (1.0 / variance.sqrt()) as f32 } else { 0.0 };
    (mean.iter().map(|&mean| mean as f32).collect(), square.iter().map(inverse).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Classes as clouds around corners; feature 2 is constant.
    fn clouds(seed: u64, images: usize, views: usize, classes: usize, noise: f64) -> ImageFeatures {
        let mut stream = Stream::new(seed, Purpose::Init, &[]);
        let labels: Vec<usize> = (0..images * views).map(|row| row / views % classes).collect();
        let rows = Array2::from_shape_fn((images * views, 6), |(row, i)| match i {
            2 => 5.0,
            _ => {
                let corner = if (labels[row] * 7 + 3) >> i & 1 == 1 { 1.0 } else { -1.0 };
                (corner + noise * stream.normal()) as f32
            }
        });
        ImageFeatures { rows, labels, views, bad: Vec::new() }
    }

    fn settings(rates: &[f64]) -> LinearSettings {
        LinearSettings {
            rates: rates.to_vec(),
            epochs: 60,
            batch: 16,
            standardize: false,
            views: Views::Center,
            seed: 3,
        }
    }

    fn names(classes: usize) -> Vec<String> {
        (0..classes).map(|class| class.to_string()).collect()
    }

    #[test]
    fn separable_classes_are_separated_and_the_rate_is_chosen_on_held_out_images() {
        let (train, val) = (clouds(1, 60, 2, 3, 0.2), clouds(2, 30, 1, 3, 0.2));
        for standardize in [false, true] {
            let settings = LinearSettings { standardize, ..settings(&[1e-9, 1.0, 1e300]) };
            let rates = scores(&train, &val, &names(3), &settings).unwrap();
            let best = choose(&rates).unwrap();
            assert_eq!((best, rates[best].top1, rates[best].held_out_top1), (1, 1.0, 1.0), "{rates:?}");
            assert!(rates[0].train_loss.unwrap() > rates[1].train_loss.unwrap());
            assert_eq!(rates[0].top5, 1.0, "three classes");
        }
    }

    #[test]
    fn results_depend_on_the_seed_only() {
        let (train, val) = (clouds(1, 40, 1, 4, 1.5), clouds(2, 40, 1, 4, 1.5));
        let run = |seed, threads| {
            let settings = LinearSettings { seed, ..settings(&[0.1, 0.5]) };
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| scores(&train, &val, &names(4), &settings).unwrap())
        };
        assert_eq!(run(1, 1), run(1, 3));
        assert_ne!(run(1, 1), run(2, 1));
    }

    #[test]
    fn held_out_images_are_of_every_class_and_all_their_views_are_held_out() {
        let train = clouds(1, 44, 3, 4, 1.0);
        let (kept, held_out) = hold_out(&train, &names(4), 5).unwrap();
        assert_eq!((kept.len(), held_out.len()), (40, 4));
        let mut all = [kept, held_out.clone()].concat();
        all.sort_unstable();
        assert_eq!(all, (0..44).collect::<Vec<_>>());
        let mut of: Vec<usize> = held_out.iter().map(|image| train.labels[image * 3]).collect();
        of.sort_unstable();
        assert_eq!(of, [0, 1, 2, 3]);
        let single = clouds(1, 4, 1, 4, 1.0);
        assert!(matches!(
            hold_out(&single, &names(4), 0),
            Err(EvaluateError::TooFewToHoldOut { found: 1, .. })
        ));
    }

    #[test]
    fn columns_are_standardized() {
        let rows = ndarray::arr2(&[[1.0, 7.0], [3.0, 7.0]]);
        let (mean, inverse) = moments(&rows);
        assert_eq!((mean, inverse), (ndarray::arr1(&[2.0, 7.0]), ndarray::arr1(&[1.0, 0.0])));
    }
}
