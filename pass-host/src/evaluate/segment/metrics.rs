//! mIoU, mean and overall accuracy as mmsegmentation computes them: one confusion over the whole set.

use serde::Serialize;

use crate::ops::IGNORED;

/// Counts of pixels by label and prediction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Confusion {
    classes: usize,
    /// `[label, prediction]`.
    counts: Vec<u64>,
}

/// How well one class is found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ClassScore {
    /// Its name.
    pub name: String,
    /// Intersection over union; nothing where the class is neither labelled nor predicted anywhere.
    #[serde(rename = "IoU")]
    pub iou: Option<f64>,
    /// Share of its labelled pixels that were found; nothing where it is not labelled anywhere.
    #[serde(rename = "Acc")]
    pub accuracy: Option<f64>,
    /// Labelled pixels.
    pub pixels: u64,
}

/// How well a set of pictures was segmented, all as shares of 1.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Scores {
    /// Mean intersection over union of the classes that have one.
    #[serde(rename = "mIoU")]
    pub mean_iou: Option<f64>,
    /// Share of all labelled pixels that were classified right.
    #[serde(rename = "aAcc")]
    pub accuracy: Option<f64>,
    /// Mean accuracy of the classes that have one.
    #[serde(rename = "mAcc")]
    pub mean_accuracy: Option<f64>,
    /// Class by class.
    pub classes: Vec<ClassScore>,
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

    /// Adds the counts of other pictures.
    pub fn merge(&mut self, other: &Self) {
        assert_eq!(self.classes, other.classes, "the same classes");
        self.counts.iter_mut().zip(&other.counts).for_each(|(count, other)| *count += other);
    }

    /// The scores; `names` are those of the classes.
    pub fn scores(&self, names: &[String]) -> Scores {
        let n = self.classes;
        let share = |part: u64, whole: u64| (whole > 0).then(|| part as f64 / whole as f64);
        let classes: Vec<ClassScore> = (0..n)
            .map(|class| {
                let found = self.counts[class * n + class];
                let labelled: u64 = self.counts[class * n..][..n].iter().sum();
                let predicted: u64 = (0..n).map(|label| self.counts[label * n + class]).sum();
                ClassScore {
                    name: names.get(class).cloned().unwrap_or_else(|| class.to_string()),
                    iou: share(found, labelled + predicted - found),
                    accuracy: share(found, labelled),
                    pixels: labelled,
                }
            })
            .collect();
        let diagonal = (0..n).map(|class| self.counts[class * n + class]).sum();
        Scores {
            mean_iou: mean(classes.iter().filter_map(|class| class.iou)),
            accuracy: share(diagonal, self.counts.iter().sum()),
            mean_accuracy: mean(classes.iter().filter_map(|class| class.accuracy)),
            classes,
        }
    }
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (mut sum, mut count) = (0.0, 0u32);
    for value in values {
        sum += value;
        count += 1;
    }
    (count > 0).then(|| sum / f64::from(count))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Purpose, Stream};

    fn names(classes: usize) -> Vec<String> {
        (0..classes).map(|class| format!("class {class}")).collect()
    }

    /// The definition, set by set, without a confusion.
    fn by_definition(labels: &[u8], predictions: &[u8], classes: usize) -> Scores {
        let counted: Vec<(u8, u8)> =
            labels.iter().zip(predictions).filter(|(l, _)| **l != IGNORED).map(|(l, p)| (*l, *p)).collect();
        let count = |condition: &dyn Fn(u8, u8) -> bool| {
            counted.iter().filter(|(label, prediction)| condition(*label, *prediction)).count() as u64
        };
        let ratio = |a: u64, b: u64| if b == 0 { None } else { Some(a as f64 / b as f64) };
        let scores: Vec<ClassScore> = (0..classes as u8)
            .map(|class| {
                let both = count(&|l, p| l == class && p == class);
                let either = count(&|l, p| l == class || p == class);
                let labelled = count(&|l, _| l == class);
                ClassScore {
                    name: format!("class {class}"),
                    iou: ratio(both, either),
                    accuracy: ratio(both, labelled),
                    pixels: labelled,
                }
            })
            .collect();
        let average = |values: Vec<f64>| match values.len() {
            0 => None,
            n => Some(values.iter().sum::<f64>() / n as f64),
        };
        Scores {
            mean_iou: average(scores.iter().filter_map(|s| s.iou).collect()),
            accuracy: ratio(count(&|l, p| l == p), counted.len() as u64),
            mean_accuracy: average(scores.iter().filter_map(|s| s.accuracy).collect()),
            classes: scores,
        }
    }

    #[test]
    fn scores_are_those_of_the_definition() {
        let mut stream = Stream::new(4, Purpose::Subset, &[]);
        // (classes, labels in use, predictions in use): some are absent from labels, predictions or both
        for (classes, labelled, predicted) in [(1, 1, 1), (3, 3, 3), (7, 4, 7), (7, 7, 2), (7, 3, 5)] {
            for ignored in [0.0, 0.3, 1.0] {
                let mut confusion = Confusion::new(classes);
                let (mut labels, mut predictions) = (Vec::new(), Vec::new());
                for _ in 0..3 {
                    let size = 1 + stream.below(400) as usize;
                    let mut label = || match stream.chance(ignored) {
                        true => IGNORED,
                        false => stream.below(labelled) as u8,
                    };
                    let picture: Vec<u8> = (0..size).map(|_| label()).collect();
                    let prediction: Vec<u8> = (0..size).map(|_| stream.below(predicted) as u8).collect();
                    let mut one = Confusion::new(classes);
                    one.add(&picture, &prediction);
                    confusion.merge(&one);
                    labels.extend(picture);
                    predictions.extend(prediction);
                }
                let expected = by_definition(&labels, &predictions, classes);
                assert_eq!(confusion.scores(&names(classes)), expected, "{classes} {labelled} {predicted}");
            }
        }
    }

    #[test]
    fn scores_are_those_of_numpy() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/segment/metrics.safetensors");
        let fixture = candle_core::safetensors::load(path, &candle_core::Device::Cpu).unwrap();
        let values = |name: &str| -> Vec<f64> { fixture[name].flatten_all().unwrap().to_vec1().unwrap() };
        let bytes = |name: &str| -> Vec<u8> { values(name).into_iter().map(|value| value as u8).collect() };
        let mut confusion = Confusion::new(6);
        confusion.add(&bytes("in.labels"), &bytes("in.predictions"));
        let scores = confusion.scores(&names(6));
        let close = |found: Option<f64>, expected: f64| match found {
            Some(found) => (found - expected).abs() < 1e-12,
            None => expected.is_nan(),
        };
        for (class, (iou, accuracy)) in
            scores.classes.iter().zip(values("out.iou").into_iter().zip(values("out.acc")))
        {
            assert!(close(class.iou, iou) && close(class.accuracy, accuracy), "{class:?}: {iou}, {accuracy}");
        }
        assert_eq!((scores.classes[4].iou, scores.classes[4].accuracy), (Some(0.0), None));
        assert_eq!(scores.classes[5].iou, None);
        assert!(close(scores.mean_iou, values("out.mIoU")[0]));
        assert!(close(scores.mean_accuracy, values("out.mAcc")[0]));
        assert!(close(scores.accuracy, values("out.aAcc")[0]));
    }

    #[test]
    fn absent_classes_stay_out_of_the_mean() {
        let mut confusion = Confusion::new(4);
        // class 2 is predicted but not labelled, class 3 neither
        confusion.add(&[0, 0, 1, 1, IGNORED, IGNORED], &[0, 2, 1, 1, 3, 0]);
        let scores = confusion.scores(&names(4));
        assert_eq!(
            scores.classes.iter().map(|c| c.iou).collect::<Vec<_>>(),
            [Some(0.5), Some(1.0), Some(0.0), None]
        );
        assert_eq!(
            scores.classes.iter().map(|c| c.accuracy).collect::<Vec<_>>(),
            [Some(0.5), Some(1.0), None, None]
        );
        assert_eq!(
            (scores.mean_iou, scores.accuracy, scores.mean_accuracy),
            (Some(0.5), Some(0.75), Some(0.75))
        );
        let nothing = Confusion::new(2).scores(&names(2));
        assert_eq!((nothing.mean_iou, nothing.accuracy, nothing.mean_accuracy), (None, None, None));
    }
}
