//! Mean intersection over union: one confusion over the whole set, absent classes left out of the mean.

use serde::Serialize;

use super::masks::IGNORED;

/// Counts of pixels by label and prediction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Confusion {
    classes: usize,
    /// `[label, prediction]`.
    counts: Vec<u64>,
}

/// How well a set of pictures was parsed, all as shares of 1.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Scores {
    /// Mean intersection over union of the classes that have one.
    #[serde(rename = "mIoU")]
    pub mean_iou: Option<f64>,
    /// Share of all labelled pixels that were classified right.
    #[serde(rename = "aAcc")]
    pub accuracy: Option<f64>,
    /// Name and intersection over union of each class; nothing where it is neither labelled nor predicted anywhere.
    #[serde(rename = "IoU")]
    pub iou: Vec<(String, Option<f64>)>,
}

impl Confusion {
    /// No pixels yet.
    pub fn new(classes: usize) -> Self {
        Self { classes, counts: vec![0; classes * classes] }
    }

    /// Counts the pixels of one picture. Pixels labelled [`IGNORED`] count nowhere, whatever is predicted.
    ///
    /// # Panics
    /// If the pictures differ in size or a class is out of range.
    pub fn add(&mut self, labels: &[u8], predictions: &[u8]) {
        assert_eq!(labels.len(), predictions.len(), "label and prediction of every pixel");
        for (&label, &prediction) in labels.iter().zip(predictions) {
            if label != IGNORED {
                assert!(usize::from(label) < self.classes && usize::from(prediction) < self.classes);
                self.counts[usize::from(label) * self.classes + usize::from(prediction)] += 1;
            }
        }
    }

    /// The scores; `names` are those of the classes.
    pub fn scores(&self, names: &[String]) -> Scores {
        let n = self.classes;
        let share = |part: u64, whole: u64| (whole > 0).then(|| part as f64 / whole as f64);
        let iou = |class: usize| {
            let both = self.counts[class * n + class];
            let labelled: u64 = self.counts[class * n..][..n].iter().sum();
            let predicted: u64 = (0..n).map(|label| self.counts[label * n + class]).sum();
            share(both, labelled + predicted - both)
        };
        let iou: Vec<_> = names.iter().take(n).enumerate().map(|(i, name)| (name.clone(), iou(i))).collect();
        let present: Vec<f64> = iou.iter().filter_map(|(_, iou)| *iou).collect();
        Scores {
            mean_iou: (!present.is_empty()).then(|| present.iter().sum::<f64>() / present.len() as f64),
            accuracy: share(
                (0..n).map(|class| self.counts[class * n + class]).sum(),
                self.counts.iter().sum(),
            ),
            iou,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absent_classes_and_ignored_pixels_do_not_count() {
        let names = ["a", "b", "c", "d"].map(str::to_owned);
        let mut confusion = Confusion::new(4);
        assert_eq!(confusion.scores(&names).mean_iou, None);
        confusion.add(&[0, 0, 0, 1], &[0, 0, 1, 1]);
        confusion.add(&[IGNORED, 1, 2], &[3, 1, 0]);
        let scores = confusion.scores(&names);
        // a: 2 of 4, b: 2 of 3, c: labelled once and never found, d: predicted only where nothing counts
        assert_eq!(
            scores.iou.iter().map(|(_, iou)| *iou).collect::<Vec<_>>(),
            [Some(0.5), Some(2.0 / 3.0), Some(0.0), None]
        );
        assert!((scores.mean_iou.unwrap() - (0.5 + 2.0 / 3.0) / 3.0).abs() < 1e-12);
        assert_eq!(scores.accuracy, Some(4.0 / 6.0));
    }
}
