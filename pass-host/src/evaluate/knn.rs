//! Weighted k-nearest-neighbor classification as DINO does it: no training, one number that tells how good features are.
//!
//! Each of the `k` training images that are most similar to an image (cosine of L2-normalized features) votes for its
//! class with weight `exp(similarity / T)`; classes are ranked by the sum of their votes.

use ndarray::Array2;
use serde::{Serialize, Serializer};

use super::EvaluateError;
use super::class_folders::ClassFolders;
use super::image_features::{Extraction, ImageToken, Views, normalize_rows};
use super::neighbors::{Neighbor, nearest};
use crate::model::encoder::Encoder;

/// The usual numbers of neighbors.
pub const USUAL_K: [usize; 4] = [10, 20, 100, 200];
/// The usual temperature.
pub const USUAL_TEMPERATURE: f64 = 0.07;
/// How many of the best classes count for `top5`.
const TOP: usize = 5;

/// Shares of the images whose class was ranked first, and among the first five.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct KnnScore {
    /// Neighbors asked for.
    #[serde(skip)]
    pub k: usize,
    /// Neighbors that voted: at most the training images.
    #[serde(rename = "k")]
    pub used: usize,
    /// Share ranked first, in `[0, 1]`.
    pub top1: f64,
    /// Share ranked among the first five.
    pub top5: f64,
}

/// The result of `eval knn`.
#[derive(Clone, Debug, Serialize)]
pub struct KnnReport {
    /// The network.
    pub weights: String,
    /// Which vector stands for an image.
    pub tokens: ImageToken,
    /// Side of the view in pixels.
    pub size: usize,
    /// Temperature T.
    pub temperature: f64,
    /// Classes.
    pub classes: usize,
    /// Training images.
    pub train_images: usize,
    /// Judged images.
    pub val_images: usize,
    /// By number of neighbors.
    #[serde(serialize_with = "by_k")]
    pub knn: Vec<KnnScore>,
    /// Images left out, with the reason.
    pub bad: Vec<(String, String)>,
}

fn by_k<S: Serializer>(scores: &[KnnScore], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(scores.iter().map(|score| (score.k.to_string(), score)))
}

/// Computes the features of both splits and classifies; `progress(done, all)` counts images.
///
/// # Errors
/// As [`Extraction::run`].
pub fn run(
    encoder: &Encoder,
    sets: &ClassFolders,
    extraction: &Extraction,
    ks: &[usize],
    temperature: f64,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<KnnReport, EvaluateError> {
    let all = sets.train.len() + sets.val.len();
    let mut done = 0;
    let mut count = |images| {
        done += images;
        progress(done, all);
    };
    let mut features = |images| extraction.run(encoder, images, &sets.classes, Views::Center, &mut count);
    let (mut train, mut val) = (features(&sets.train)?, features(&sets.val)?);
    normalize_rows(&mut train.rows);
    normalize_rows(&mut val.rows);
    let classes = sets.classes.len();
    let knn = scores(&train.rows, &train.labels, &val.rows, &val.labels, classes, ks, temperature);
    train.bad.append(&mut val.bad);
    Ok(KnnReport {
        weights: encoder.description().to_owned(),
        tokens: extraction.token,
        size: extraction.size,
        temperature,
        classes,
        train_images: train.labels.len(),
        val_images: val.labels.len(),
        knn,
        bad: train.bad,
    })
}

/// Scores for each of `ks`.
///
/// - `train`: `[M, D]`, `val`: `[Q, D]`, rows L2-normalized; their labels are below `classes`.
///
/// Deviation: where the reference leaves the order of equal similarities and equal votes open, the lower training index
/// and the lower class come first.
///
/// # Panics
/// If the shapes do not fit.
pub fn scores(
    train: &Array2<f32>,
    train_labels: &[usize],
    val: &Array2<f32>,
    val_labels: &[usize],
    classes: usize,
    ks: &[usize],
    temperature: f64,
) -> Vec<KnnScore> {
    assert_eq!((train.nrows(), val.nrows()), (train_labels.len(), val_labels.len()), "a label each row");
    let most = ks.iter().copied().max().unwrap_or(0);
    let neighbors = nearest(train.view(), val.view(), most);
    let score = |&k: &usize| {
        let ranks = label_ranks(&neighbors, k, train_labels, val_labels, classes, temperature);
        let share =
            |places| ranks.iter().filter(|&&rank| rank < places).count() as f64 / ranks.len().max(1) as f64;
        KnnScore { k, used: k.min(train_labels.len()), top1: share(1), top5: share(TOP.min(k)) }
    };
    ks.iter().map(score).collect()
}

/// For each judged image, how many classes got more of the votes of its first `k` neighbors than its own class did.
pub fn label_ranks(
    neighbors: &[Vec<Neighbor>],
    k: usize,
    train_labels: &[usize],
    val_labels: &[usize],
    classes: usize,
    temperature: f64,
) -> Vec<usize> {
    let rank_of = |(neighbors, &label): (&Vec<Neighbor>, &usize)| {
        let voters = &neighbors[..k.min(neighbors.len())];
        rank(&votes(voters, train_labels, classes, temperature), label)
    };
    neighbors.iter().zip(val_labels).map(rank_of).collect()
}

/// The votes for each class, all divided by that of the nearest neighbor: no temperature overflows.
fn votes(neighbors: &[Neighbor], labels: &[usize], classes: usize, temperature: f64) -> Vec<f64> {
    let mut votes = vec![0.0; classes];
    let nearest = neighbors.first().map_or(0.0, |first| f64::from(first.similarity));
    for neighbor in neighbors {
        votes[labels[neighbor.row]] += ((f64::from(neighbor.similarity) - nearest) / temperature).exp();
    }
    votes
}

/// How many classes come before `label`; equal votes are ordered by class.
fn rank(votes: &[f64], label: usize) -> usize {
    let before =
        |(class, &vote): (usize, &f64)| vote > votes[label] || (vote == votes[label] && class < label);
    votes.iter().enumerate().filter(|&entry| before(entry)).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::arr2;

    #[test]
    fn near_votes_outweigh_many_far_ones() {
        // one neighbor at 1.0 against two at 0.9: e^(0.1 / 0.07) = 4.2 > 2; at T = 1 the two win
        let train = arr2(&[[1.0, 0.0], [0.9, 0.435_889_9], [0.9, -0.435_889_9]]);
        let val = arr2(&[[1.0, 0.0]]);
        let top1 = |temperature| scores(&train, &[1, 0, 0], &val, &[1], 2, &[3], temperature)[0].top1;
        assert_eq!((top1(0.07), top1(1.0)), (1.0, 0.0));
    }

    #[test]
    fn more_neighbors_than_images_are_all_images() {
        let train = arr2(&[[1.0, 0.0], [0.0, 1.0]]);
        let found = scores(&train, &[0, 1], &train, &[0, 1], 2, &[1, 200], 0.07);
        assert_eq!((found[0].used, found[1].used, found[1].k), (1, 2, 200));
        assert_eq!((found[1].top1, found[1].top5), (1.0, 1.0));
        assert_eq!(found[0].top5, 1.0, "of one neighbor only the first class counts");
    }

    #[test]
    fn equal_votes_go_to_the_lower_class() {
        assert_eq!(rank(&[2.0, 2.0, 3.0], 1), 2);
        assert_eq!(rank(&[2.0, 2.0, 3.0], 0), 1);
        assert_eq!(rank(&[0.0, 0.0], 1), 1);
    }

    #[test]
    fn the_report_is_keyed_by_k() {
        let report = KnnReport {
            weights: String::new(),
            tokens: ImageToken::Class,
            size: 224,
            temperature: 0.07,
            classes: 2,
            train_images: 3,
            val_images: 4,
            knn: vec![KnnScore { k: 10, used: 3, top1: 0.5, top5: 1.0 }],
            bad: Vec::new(),
        };
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["knn"], serde_json::json!({"10": {"k": 3, "top1": 0.5, "top5": 1.0}}));
    }
}
