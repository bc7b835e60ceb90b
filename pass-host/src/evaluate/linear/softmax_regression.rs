//! Many softmax regressions on the same features at once: they differ in nothing but the learning rate, so that one
//! product serves them all.

use ndarray::{Array1, Array2, ArrayView2, Zip};
use rayon::prelude::*;

use crate::ops::product::{Before, Threads, multiply};
use crate::random::{Purpose, Stream};

/// Standard deviation of the first weights.
const WEIGHT_STD: f64 = 0.01;

/// Linear classifiers, one after the other in the rows of one matrix.
#[derive(Clone, Debug)]
pub struct Classifiers {
    classes: usize,
    /// `[L · C, D]`.
    pub weights: Array2<f32>,
    /// `[L · C]`.
    pub bias: Array1<f32>,
}

/// The gradient of the mean loss of each classifier for its own weights.
#[derive(Clone, Debug)]
pub struct Gradient {
    /// `[L · C, D]`.
    pub weights: Array2<f32>,
    /// `[L · C]`.
    pub bias: Array1<f32>,
}

impl Classifiers {
    /// `count` equal classifiers: normal weights with standard deviation 0.01, no bias.
    pub fn new(count: usize, classes: usize, dim: usize, seed: u64) -> Self {
        let mut stream = Stream::new(seed, Purpose::Init, &[]);
        let one = Array2::from_shape_simple_fn((classes, dim), || (WEIGHT_STD * stream.normal()) as f32);
        let weights = Array2::from_shape_fn((count * classes, dim), |(row, i)| one[[row % classes, i]]);
        Self { classes, weights, bias: Array1::zeros(count * classes) }
    }

    /// Number of classifiers L.
    pub fn count(&self) -> usize {
        self.weights.nrows() / self.classes
    }

    /// Logits `[B, L · C]` of features `[B, D]`.
    pub fn logits(&self, features: ArrayView2<'_, f32>) -> Array2<f32> {
        let mut logits = Array2::zeros((features.nrows(), self.weights.nrows()));
        multiply(logits.view_mut(), Before::Ignored, 1.0, features, self.weights.t(), Threads::All);
        logits += &self.bias;
        logits
    }

    /// The mean cross-entropy of each classifier, and its gradient.
    ///
    /// - `features`: `[B, D]`; `labels`: `[B]`, below the number of classes.
    pub fn loss_and_gradient(&self, features: ArrayView2<'_, f32>, labels: &[usize]) -> (Vec<f64>, Gradient) {
        let mut logits = self.logits(features);
        let (classes, share) = (self.classes, 1.0 / labels.len() as f32);
        let rows: Vec<_> = logits.rows_mut().into_iter().zip(labels).collect();
        // what is left in `logits` is the gradient of the mean loss for them: (softmax - one-hot) / B
        let losses: Vec<Vec<f64>> = rows
            .into_par_iter()
            .map(|(mut row, &label)| {
                let row = row.as_slice_mut().unwrap_or(&mut []);
                row.chunks_exact_mut(classes).map(|logits| soften(logits, label, share)).collect()
            })
            .collect();
        let mut mean = vec![0.0; self.count()];
        for row in &losses {
            mean.iter_mut().zip(row).for_each(|(sum, loss)| *sum += loss / labels.len() as f64);
        }
        let mut weights = Array2::zeros(self.weights.dim());
        multiply(weights.view_mut(), Before::Ignored, 1.0, logits.t(), features, Threads::All);
        let bias = logits.sum_axis(ndarray::Axis(0));
        (mean, Gradient { weights, bias })
    }

    /// For each classifier, how many classes it puts before the label of each row, equal logits ordered by class. A row
    /// with a logit that is not finite is as wrong as can be.
    pub fn ranks(&self, features: ArrayView2<'_, f32>, labels: &[usize]) -> Vec<Vec<usize>> {
        let logits = self.logits(features);
        let rank = |logits: &[f32], label: usize| {
            if logits.iter().any(|logit| !logit.is_finite()) {
                return self.classes;
            }
            let before = |&(class, &logit): &(usize, &f32)| {
                logit > logits[label] || (logit == logits[label] && class < label)
            };
            logits.iter().enumerate().filter(before).count()
        };
        (0..self.count())
            .map(|classifier| {
                let part = classifier * self.classes..(classifier + 1) * self.classes;
                let rows = logits.rows().into_iter().zip(labels);
                rows.map(|(row, &label)| rank(&row.as_slice().unwrap_or(&[])[part.clone()], label)).collect()
            })
            .collect()
    }
}

/// Logits become `(softmax - one-hot) · share`; the cross-entropy is returned.
fn soften(logits: &mut [f32], label: usize, share: f32) -> f64 {
    let highest = logits.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    let own = logits[label];
    let mut whole = 0.0;
    for logit in logits.iter_mut() {
        *logit = (*logit - highest).exp();
        whole += *logit;
    }
    logits.iter_mut().for_each(|value| *value *= share / whole);
    logits[label] -= share;
    f64::from(whole.ln() + highest - own)
}

/// Stochastic gradient descent with momentum: `v = m·v + g`, `w = w - lr·v`, a learning rate each classifier.
#[derive(Clone, Debug)]
pub struct Sgd {
    momentum: f32,
    velocity: Gradient,
}

impl Sgd {
    /// At rest.
    pub fn new(classifiers: &Classifiers, momentum: f32) -> Self {
        let velocity = Gradient {
            weights: Array2::zeros(classifiers.weights.dim()),
            bias: Array1::zeros(classifiers.bias.dim()),
        };
        Self { momentum, velocity }
    }

    /// One step; `rates` has a learning rate for each classifier.
    pub fn step(&mut self, classifiers: &mut Classifiers, gradient: &Gradient, rates: &[f64]) {
        let (momentum, classes) = (self.momentum, classifiers.classes);
        let update = |weight: &mut f32, velocity: &mut f32, gradient: f32, rate: f32| {
            *velocity = momentum * *velocity + gradient;
            *weight -= rate * *velocity;
        };
        for (classifier, &rate) in rates.iter().enumerate() {
            let part = ndarray::s![classifier * classes..(classifier + 1) * classes, ..];
            Zip::from(classifiers.weights.slice_mut(part))
                .and(self.velocity.weights.slice_mut(part))
                .and(gradient.weights.slice(part))
                .for_each(|w, v, &g| update(w, v, g, rate as f32));
            for row in classifier * classes..(classifier + 1) * classes {
                update(
                    &mut classifiers.bias[row],
                    &mut self.velocity.bias[row],
                    gradient.bias[row],
                    rate as f32,
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(seed: u64, rows: usize, dim: usize) -> Array2<f32> {
        let mut stream = Stream::new(seed, Purpose::Init, &[]);
        Array2::from_shape_simple_fn((rows, dim), || stream.normal() as f32)
    }

    /// The mean cross-entropy in f64, straight from its definition.
    fn loss(weights: &Array2<f64>, bias: &[f64], features: &Array2<f32>, labels: &[usize]) -> f64 {
        let total: f64 = features
            .rows()
            .into_iter()
            .zip(labels)
            .map(|(x, &label)| {
                let logit = |class: usize| {
                    weights.row(class).iter().zip(x).map(|(w, &x)| w * f64::from(x)).sum::<f64>()
                        + bias[class]
                };
                (0..bias.len()).map(|class| logit(class).exp()).sum::<f64>().ln() - logit(label)
            })
            .sum();
        total / labels.len() as f64
    }

    #[test]
    fn gradients_are_finite_differences_of_the_loss() {
        let (classes, dim, count) = (4, 5, 3);
        let mut classifiers = Classifiers::new(count, classes, dim, 1);
        classifiers.weights = random(2, count * classes, dim);
        classifiers.bias = random(3, 1, count * classes).row(0).to_owned();
        let (features, labels) = (random(4, 7, dim), [0, 3, 1, 1, 2, 0, 3]);
        let (losses, gradient) = classifiers.loss_and_gradient(features.view(), &labels);
        for classifier in 0..count {
            let rows = classifier * classes..(classifier + 1) * classes;
            let weights = classifiers.weights.slice(ndarray::s![rows.clone(), ..]).mapv(f64::from);
            let bias: Vec<f64> =
                classifiers.bias.iter().skip(rows.start).take(classes).map(|&b| f64::from(b)).collect();
            assert!((losses[classifier] - loss(&weights, &bias, &features, &labels)).abs() < 1e-5);
            let step = 1e-5;
            for class in 0..classes {
                for i in 0..dim {
                    let at = |delta: f64| {
                        let mut moved = weights.clone();
                        moved[[class, i]] += delta;
                        loss(&moved, &bias, &features, &labels)
                    };
                    let expected = (at(step) - at(-step)) / (2.0 * step);
                    let found = f64::from(gradient.weights[[rows.start + class, i]]);
                    assert!((found - expected).abs() < 1e-5, "weight {class} {i}: {found} {expected}");
                }
                let at = |delta: f64| {
                    let mut moved = bias.clone();
                    moved[class] += delta;
                    loss(&weights, &moved, &features, &labels)
                };
                let expected = (at(step) - at(-step)) / (2.0 * step);
                assert!(
                    (f64::from(gradient.bias[rows.start + class]) - expected).abs() < 1e-5,
                    "bias {class}"
                );
            }
        }
    }

    #[test]
    fn huge_logits_stay_finite() {
        let mut logits = [1e30, -1e30, 0.0];
        let loss = soften(&mut logits, 0, 1.0);
        assert_eq!((loss, logits), (0.0, [0.0, 0.0, 0.0]));
    }

    #[test]
    fn momentum_and_rates_follow_the_definition() {
        let mut classifiers = Classifiers::new(2, 2, 1, 0);
        let first = classifiers.clone();
        let gradient = Gradient { weights: Array2::ones((4, 1)), bias: Array1::ones(4) };
        let mut sgd = Sgd::new(&classifiers, 0.5);
        sgd.step(&mut classifiers, &gradient, &[1.0, 0.1]);
        sgd.step(&mut classifiers, &gradient, &[1.0, 0.1]);
        // velocities 1 and 1.5
        for (row, moved) in [(0, 2.5), (1, 2.5), (2, 0.25), (3, 0.25)] {
            assert!((first.weights[[row, 0]] - classifiers.weights[[row, 0]] - moved).abs() < 1e-6);
            assert!((classifiers.bias[row] + moved).abs() < 1e-6);
        }
    }

    #[test]
    fn ranks_count_the_classes_before() {
        let mut classifiers = Classifiers::new(1, 3, 1, 0);
        classifiers.weights.fill(0.0);
        classifiers.bias = ndarray::arr1(&[1.0, 1.0, 2.0]);
        let features = ndarray::arr2(&[[0.0], [0.0], [f32::NAN]]);
        assert_eq!(classifiers.ranks(features.view(), &[0, 1, 2]), [[1, 2, 3]]);
    }
}
