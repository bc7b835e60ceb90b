//! Comparison with a stated tolerance, and the message when it fails.

use std::ops::Range;

use crate::golden::GoldenFile;

/// `abs(actual - expected) <= atol + rtol * abs(expected)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// Absolute part.
    pub atol: f64,
    /// Relative part.
    pub rtol: f64,
}

impl Tolerance {
    /// Equality.
    pub const EXACT: Self = Self { atol: 0.0, rtol: 0.0 };

    /// An absolute tolerance alone.
    pub const fn absolute(atol: f64) -> Self {
        Self { atol, rtol: 0.0 }
    }

    fn limit(self, expected: f64) -> f64 {
        self.atol + self.rtol * expected.abs()
    }
}

/// The outcome of comparing one tensor.
#[derive(Clone, Debug)]
#[must_use]
pub struct Comparison {
    /// File and tensor, for the message.
    pub label: String,
    /// Elements compared (excluded ones left out).
    pub compared: usize,
    /// Elements within the tolerance.
    pub within: usize,
    /// Largest absolute difference; infinite when a value is not finite where the other is.
    pub max_abs: f64,
    /// The element furthest past (or nearest to) its limit.
    pub worst: Option<Worst>,
    tolerance: Tolerance,
}

/// One element and what was expected of it.
#[derive(Clone, Copy, Debug)]
pub struct Worst {
    /// Flat, row-major index.
    pub index: usize,
    /// Value of the set.
    pub expected: f32,
    /// Value under test.
    pub actual: f32,
}

impl Comparison {
    /// Asserts that every element is within the tolerance.
    ///
    /// # Panics
    /// Naming tensor, worst index, expected, found and tolerance.
    pub fn assert_within(&self) {
        let Some(worst) = self.worst.filter(|_| self.within < self.compared) else { return };
        panic!(
            "{}: {} of {} values differ; worst at {}: expected {}, found {} (difference {:.3e}, atol {:.3e}, rtol {:.1e})",
            self.label,
            self.compared - self.within,
            self.compared,
            worst.index,
            worst.expected,
            worst.actual,
            difference(worst.expected, worst.actual),
            self.tolerance.atol,
            self.tolerance.rtol,
        );
    }
}

/// Compares element by element, leaving out the flat range `excluded`.
///
/// # Panics
/// When the lengths differ.
pub fn compare(
    label: &str,
    expected: &[f32],
    actual: &[f32],
    tolerance: Tolerance,
    excluded: Range<usize>,
) -> Comparison {
    assert_eq!(actual.len(), expected.len(), "{label}: number of elements (found, expected)");
    let mut result =
        Comparison { label: label.to_owned(), compared: 0, within: 0, max_abs: 0.0, worst: None, tolerance };
    let mut worst_excess = f64::NEG_INFINITY;
    for (index, (&expected, &actual)) in expected.iter().zip(actual).enumerate() {
        if excluded.contains(&index) {
            continue;
        }
        let apart = difference(expected, actual);
        let excess = apart - tolerance.limit(f64::from(expected));
        result.compared += 1;
        result.within += usize::from(excess <= 0.0);
        result.max_abs = result.max_abs.max(apart);
        if excess > worst_excess {
            worst_excess = excess;
            result.worst = Some(Worst { index, expected, actual });
        }
    }
    result
}

/// Compares rows of `row` elements as sets: both sides are sorted first, then compared exactly.
///
/// # Panics
/// When the lengths differ.
pub fn compare_sets(label: &str, expected: &[f32], actual: &[f32], row: usize) -> Comparison {
    let sorted = |values: &[f32]| {
        let mut values = values.to_vec();
        values.chunks_mut(row.max(1)).for_each(|row| row.sort_by(f32::total_cmp));
        values
    };
    compare(label, &sorted(expected), &sorted(actual), Tolerance::EXACT, 0..0)
}

fn difference(expected: f32, actual: f32) -> f64 {
    if expected == actual {
        return 0.0;
    }
    let apart = (f64::from(actual) - f64::from(expected)).abs();
    if apart.is_nan() { f64::INFINITY } else { apart }
}

/// The rule for weights after an optimizer step: nearly all elements of all tensors together within their own `atol`,
/// and every one within a hard limit.
#[derive(Debug)]
pub struct SteppedWeights<'a> {
    file: &'a GoldenFile<'a>,
    step: String,
    fraction: f64,
    hard_limit: f64,
    compared: usize,
    within: usize,
}

impl<'a> SteppedWeights<'a> {
    pub(crate) fn new(file: &'a GoldenFile<'a>, step: &str, fraction: f64, hard_limit: f64) -> Self {
        Self { file, step: step.to_owned(), fraction, hard_limit, compared: 0, within: 0 }
    }

    /// Adds one tensor.
    ///
    /// # Panics
    /// When an element is past the hard limit.
    pub fn add(&mut self, name: &str, actual: &[f32]) {
        self.file.check_with(name, actual, Tolerance::absolute(self.hard_limit));
        let comparison = self.file.compare(name, actual, self.file.spec(name).tolerance());
        self.compared += comparison.compared;
        self.within += comparison.within;
    }

    /// Asserts the fraction over everything added.
    ///
    /// # Panics
    /// When too many elements are past their own tolerance, or nothing was added.
    pub fn finish(self) {
        assert!(self.compared > 0, "{}: no tensor was added", self.step);
        let fraction = self.within as f64 / self.compared as f64;
        assert!(
            fraction >= self.fraction,
            "{}: {} of {} elements ({fraction:.5}) are within atol; at least {} expected",
            self.step,
            self.within,
            self.compared,
            self.fraction,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_past_the_tolerance_is_found_with_its_index() {
        let result = compare("t", &[1.0, 2.0, 3.0], &[1.0, 2.5, 3.0], Tolerance::absolute(0.1), 0..0);
        assert_eq!((result.compared, result.within), (3, 2));
        assert_eq!(result.worst.map(|worst| worst.index), Some(1));
    }

    #[test]
    fn excluded_elements_are_not_compared() {
        let result = compare("t", &[1.0, 2.0, 3.0], &[1.0, 9.0, 3.0], Tolerance::EXACT, 1..2);
        assert_eq!((result.compared, result.within), (2, 2));
    }

    #[test]
    fn not_a_number_never_passes() {
        let result = compare("t", &[1.0], &[f32::NAN], Tolerance::absolute(1e9), 0..0);
        assert_eq!(result.within, 0);
    }

    #[test]
    fn sets_ignore_the_order_inside_a_row_only() {
        assert_eq!(compare_sets("t", &[1.0, 2.0, 3.0, 4.0], &[2.0, 1.0, 4.0, 3.0], 2).within, 4);
        assert!(compare_sets("t", &[1.0, 2.0, 3.0, 4.0], &[3.0, 4.0, 1.0, 2.0], 2).within < 4);
    }
}
