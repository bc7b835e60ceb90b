//! How close two sets of patch features are: what a file promises.

use ndarray::{Array2, ArrayView2, Axis};
use serde::Serialize;

use crate::ops::product::{Before, Threads, multiply};

/// Agreement of patch tokens over several images.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Fidelity {
    /// Images compared.
    pub images: usize,
    /// Mean cosine of patch tokens.
    pub mean: f64,
    /// Its first percentile.
    pub first_percentile: f64,
    /// Share of patches whose most similar other patch of the image (cosine) is the same.
    pub nearest_patch: f64,
}

/// Collects images.
#[derive(Clone, Debug, Default)]
pub struct Comparison {
    cosines: Vec<f64>,
    images: usize,
    same_nearest: usize,
}

impl Comparison {
    /// Adds the patch tokens of one image, `[N, D]` each.
    pub fn add(&mut self, exact: ArrayView2<'_, f32>, other: ArrayView2<'_, f32>) {
        self.images += 1;
        self.cosines.extend(cosines(exact, other));
        let pairs = nearest(exact).into_iter().zip(nearest(other));
        self.same_nearest += pairs.filter(|(a, b)| a == b).count();
    }

    /// The figures; `None` without patches.
    pub fn fidelity(mut self) -> Option<Fidelity> {
        let count = self.cosines.len();
        self.cosines.sort_by(f64::total_cmp);
        Some(Fidelity {
            images: self.images,
            mean: mean(&self.cosines)?,
            first_percentile: percentile(&self.cosines, 0.01)?,
            nearest_patch: self.same_nearest as f64 / count as f64,
        })
    }
}

/// Mean; `None` of nothing.
pub(super) fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// Linear interpolation between the two sorted values around `share`.
fn percentile(sorted: &[f64], share: f64) -> Option<f64> {
    let place = share * (sorted.len().checked_sub(1)?) as f64;
    let (low, high) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    Some(low + (high - low) * place.fract())
}

/// Cosine of each row.
pub(super) fn cosines(a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>) -> Vec<f64> {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let rows = a.rows().into_iter().zip(b.rows());
    rows.map(|(a, b)| {
        let (a, b) = (a.to_vec(), b.to_vec());
        let norms = (dot(&a, &a) * dot(&b, &b)).sqrt();
        if norms > 0.0 { dot(&a, &b) / norms } else { f64::from(u8::from(a == b)) }
    })
    .collect()
}

/// The most similar other row of each row.
fn nearest(x: ArrayView2<'_, f32>) -> Vec<usize> {
    let mut unit = x.to_owned();
    for mut row in unit.axis_iter_mut(Axis(0)) {
        let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt();
        row /= norm.max(f32::MIN_POSITIVE);
    }
    let mut similarity = Array2::zeros((x.nrows(), x.nrows()));
    multiply(similarity.view_mut(), Before::Ignored, 1.0, unit.view(), unit.t(), Threads::All);
    let rows = similarity.rows().into_iter().enumerate();
    rows.map(|(own, row)| {
        let others = row.iter().enumerate().filter(|(other, _)| *other != own);
        others.fold((own, f32::MIN), |best, (other, s)| if *s > best.1 { (other, *s) } else { best }).0
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn figures_are_those_of_a_hand_made_case() {
        let exact = array![[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]];
        let other = array![[1.0, 0.0], [1.0, 0.1], [1.0, 0.05]];
        let mut comparison = Comparison::default();
        comparison.add(exact.view(), other.view());
        let fidelity = comparison.fidelity().expect("three patches");
        let last = 0.05 / (1.0_f64 + 0.0025).sqrt();
        assert!((fidelity.mean - (2.0 + last) / 3.0).abs() < 1e-6);
        assert!((fidelity.first_percentile - (last + (1.0 - last) * 0.02)).abs() < 1e-6);
        // row 0 was nearest to row 1 and is now to row 2; row 1 was nearest to row 0 and now is to row 2; row 2 keeps row 1
        assert!((fidelity.nearest_patch - 1.0 / 3.0).abs() < 1e-12);
        assert!(Comparison::default().fidelity().is_none());
    }
}
