//! How well masks of a video agree with the truth: region similarity `J` and contour accuracy `F` of DAVIS 2017, as the
//! package `davis2017-evaluation` computes them for the semi-supervised task.
//!
//! An object is measured in every frame but the first and the last ([`scored_frames`]), its frames are summarized
//! ([`Statistics`]), and a data set's figures are the means over its objects. `J&F` is the mean of the two means.

use core::ops::Range;

use crate::error::{Error, Result, check_length, check_scratch};

/// The frames of a sequence that are measured: all but the first, whose mask is given, and the last.
pub const fn scored_frames(frames: usize) -> Range<usize> {
    1..if frames > 2 { frames - 1 } else { 1 }
}

/// Region similarity `J` of one object in one frame: intersection over union of the pixels labeled `object`; 1 if there are
/// none in either mask. `truth` and `prediction` are label images of equal size.
///
/// # Errors
/// [`Error::LengthMismatch`] if the masks differ in size.
pub fn region_similarity(truth: &[u8], prediction: &[u8], object: u8) -> Result<f64> {
    check_length("predicted mask", truth.len(), prediction.len())?;
    let (mut both, mut either) = (0_usize, 0_usize);
    for (&truth, &prediction) in truth.iter().zip(prediction) {
        let (truth, prediction) = (truth == object, prediction == object);
        both += usize::from(truth && prediction);
        either += usize::from(truth || prediction);
    }
    Ok(if either == 0 { 1.0 } else { both as f64 / either as f64 })
}

/// Contours count as matched within this share of the image diagonal: 0.008 = 1/125.
const DIAGONAL_SHARE: u64 = 125;

/// How many pixels a contour may be off: `⌈0.008·√(height² + width²)⌉`.
pub const fn contour_tolerance((height, width): (usize, usize)) -> usize {
    let (height, width) = (height as u64, width as u64);
    let diagonal = height.saturating_mul(height).saturating_add(width.saturating_mul(width));
    let squared = diagonal.div_ceil(DIAGONAL_SHARE * DIAGONAL_SHARE);
    let root = squared.isqrt();
    (if root * root < squared { root + 1 } else { root }) as usize
}

const TRUTH: u8 = 1;
const PREDICTION: u8 = 2;

/// Contour accuracy `F` of one object in one frame: the harmonic mean of precision and recall of its contour.
///
/// A pixel belongs to the contour if its right, lower or lower right neighbor is on the other side of it. A contour pixel
/// is matched if the other contour passes within a disk of [`contour_tolerance`] around it. 1 if neither mask has a
/// contour, 0 if one has.
///
/// - `truth`, `prediction`: label images `[height, width]` of `size`.
/// - `scratch`: at least `height·width` bytes.
///
/// # Errors
/// [`Error::LengthMismatch`] if a buffer is not of that size.
pub fn contour_accuracy(
    truth: &[u8],
    prediction: &[u8],
    size: (usize, usize),
    object: u8,
    scratch: &mut [u8],
) -> Result<f64> {
    let pixels = size.0.saturating_mul(size.1);
    check_length("mask", pixels, truth.len())?;
    check_length("predicted mask", pixels, prediction.len())?;
    check_scratch("contour scratch", pixels, scratch.len())?;
    let contours = &mut scratch[..pixels];
    contours.fill(0);
    mark_contour(truth, size, object, TRUTH, contours);
    mark_contour(prediction, size, object, PREDICTION, contours);
    let radius = contour_tolerance(size);
    let (truth, recalled) = count_matched(contours, size, TRUTH, PREDICTION, radius);
    let (predicted, precise) = count_matched(contours, size, PREDICTION, TRUTH, radius);
    Ok(match (truth, predicted) {
        (0, 0) => 1.0,
        (0, _) | (_, 0) => 0.0,
        _ => {
            let precision = precise as f64 / predicted as f64;
            let recall = recalled as f64 / truth as f64;
            if precision + recall == 0.0 { 0.0 } else { 2.0 * precision * recall / (precision + recall) }
        }
    })
}

/// Sets `mark` where the contour of `object` runs.
fn mark_contour(mask: &[u8], (height, width): (usize, usize), object: u8, mark: u8, contours: &mut [u8]) {
    for y in 0..height {
        for x in 0..width {
            let inside = |y: usize, x: usize| mask[y * width + x] == object;
            let here = inside(y, x);
            // past the border everything looks like the pixel itself: the frame is no contour
            let differs =
                |dy: usize, dx: usize| y + dy < height && x + dx < width && inside(y + dy, x + dx) != here;
            if differs(0, 1) || differs(1, 0) || differs(1, 1) {
                contours[y * width + x] |= mark;
            }
        }
    }
}

/// Pixels marked `mark`, and those of them that have one marked `other` within `radius`.
fn count_matched(
    contours: &[u8],
    (height, width): (usize, usize),
    mark: u8,
    other: u8,
    radius: usize,
) -> (usize, usize) {
    let (mut count, mut matched) = (0, 0);
    let squared = radius.saturating_mul(radius);
    for y in 0..height {
        for x in 0..width {
            if contours[y * width + x] & mark == 0 {
                continue;
            }
            count += 1;
            let found = (y.saturating_sub(radius)..height.min(y.saturating_add(radius + 1))).any(|row| {
                let reach = (squared - row.abs_diff(y) * row.abs_diff(y)).isqrt();
                let columns = x.saturating_sub(reach)..width.min(x.saturating_add(reach + 1));
                contours[row * width..][columns].iter().any(|pixel| pixel & other != 0)
            });
            matched += usize::from(found);
        }
    }
    (count, matched)
}

/// A measure over the frames of an object.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Statistics {
    /// Mean over the frames.
    pub mean: f64,
    /// Share of frames above 0.5.
    pub recall: f64,
    /// How much is lost over time: mean of the first quarter of the frames minus mean of the last.
    pub decay: f64,
}

impl Statistics {
    /// Summarizes the frames of an object, in order.
    ///
    /// Neighboring quarters share a frame, as in the reference. It counts frames in 8 bits when it cuts the quarters, so
    /// its decay is arbitrary past 256 frames; here it is not.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] if there is no frame.
    pub fn of(per_frame: &[f64]) -> Result<Self> {
        if per_frame.is_empty() {
            return Err(Error::OutOfRange { what: "scored frames", min: 1, max: usize::MAX, actual: 0 });
        }
        let last = per_frame.len() - 1;
        // ⌊i·last/4 + ½⌋
        let cut = |quarter: usize| (quarter * last + 2) / 4;
        Ok(Self {
            mean: mean(per_frame),
            recall: per_frame.iter().filter(|&&value| value > 0.5).count() as f64 / per_frame.len() as f64,
            decay: mean(&per_frame[..=cut(1)]) - mean(&per_frame[cut(3)..]),
        })
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec;
    use std::vec::Vec;

    #[test]
    fn first_and_last_frame_are_not_scored() {
        assert_eq!(scored_frames(5), 1..4);
        for frames in 0..3 {
            assert!(scored_frames(frames).is_empty());
        }
    }

    #[test]
    fn the_tolerance_is_rounded_up() {
        let cases =
            [((480, 854), 8), ((60, 90), 1), ((300, 400), 4), ((301, 400), 5), ((0, 0), 0), ((1, 0), 1)];
        for (size, expected) in cases {
            assert_eq!(contour_tolerance(size), expected, "{size:?}");
        }
    }

    #[test]
    fn empty_masks_agree_and_a_missing_object_scores_nothing() {
        let (empty, full) = ([0; 12], [0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0]);
        let f = |truth: &[u8], prediction: &[u8]| {
            contour_accuracy(truth, prediction, (3, 4), 1, &mut [9; 12]).unwrap()
        };
        assert_eq!((region_similarity(&empty, &empty, 1), f(&empty, &empty)), (Ok(1.0), 1.0));
        assert_eq!((region_similarity(&full, &full, 1), f(&full, &full)), (Ok(1.0), 1.0));
        for (truth, prediction) in [(&empty, &full), (&full, &empty)] {
            assert_eq!((region_similarity(truth, prediction, 1), f(truth, prediction)), (Ok(0.0), 0.0));
        }
        // a mask that fills the frame has no contour
        assert_eq!(f(&[1; 12], &[1; 12]), 1.0);
        assert_eq!(f(&[1; 12], &full), 0.0);
    }

    #[test]
    fn statistics_share_the_frames_between_quarters() {
        let values = [1.0, 0.8, 0.6, 0.4, 0.2];
        let statistics = Statistics::of(&values).unwrap();
        let expected = [0.6, 0.6, 0.9 - 0.3];
        let found = [statistics.mean, statistics.recall, statistics.decay];
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{found:?}");
        assert_eq!(Statistics::of(&[0.5]).unwrap(), Statistics { mean: 0.5, recall: 0.0, decay: 0.0 });
        assert!(Statistics::of(&[]).is_err());
    }

    #[test]
    fn masks_of_other_sizes_are_refused() {
        assert!(region_similarity(&[0; 4], &[0; 5], 1).is_err());
        let f = |truth: usize, prediction: usize, size, scratch: usize| {
            contour_accuracy(&vec![0; truth], &vec![0; prediction], size, 1, &mut vec![0; scratch])
        };
        assert!(f(6, 6, (2, 3), 6).is_ok());
        for (truth, prediction, size, scratch) in [
            (5, 6, (2, 3), 6),
            (6, 5, (2, 3), 6),
            (6, 6, (2, 4), 6),
            (6, 6, (2, 3), 5),
            (6, 6, (usize::MAX, 9), 6),
        ] {
            assert!(f(truth, prediction, size, scratch).is_err());
        }
        assert_eq!(f(0, 0, (0, 3), 0), Ok(1.0));
    }

    /// The reference's way: shifted copies, exclusive or, dilation with a disk.
    fn contour_by_definition(mask: &[bool], height: usize, width: usize) -> Vec<bool> {
        let at = |y: usize, x: usize| y < height && x < width && mask[y * width + x];
        let mut contour = vec![false; height * width];
        for y in 0..height {
            for x in 0..width {
                let (here, right, below, corner) = (at(y, x), at(y, x + 1), at(y + 1, x), at(y + 1, x + 1));
                contour[y * width + x] = match (y + 1 == height, x + 1 == width) {
                    (true, true) => false,
                    (true, false) => here ^ right,
                    (false, true) => here ^ below,
                    (false, false) => (here ^ right) | (here ^ below) | (here ^ corner),
                };
            }
        }
        contour
    }

    fn dilated(contour: &[bool], height: usize, width: usize, radius: i64) -> Vec<bool> {
        let mut out = vec![false; height * width];
        for (index, _) in contour.iter().enumerate().filter(|(_, set)| **set) {
            let (y, x) = ((index / width) as i64, (index % width) as i64);
            for dy in -radius..=radius {
                for dx in -radius..=radius {
                    let (y, x) = (y + dy, x + dx);
                    let inside = (0..height as i64).contains(&y) && (0..width as i64).contains(&x);
                    if inside && dy * dy + dx * dx <= radius * radius {
                        out[y as usize * width + x as usize] = true;
                    }
                }
            }
        }
        out
    }

    proptest! {
        #[test]
        fn contour_accuracy_agrees_with_dilated_contours(
            height in 1_usize..40,
            width in 1_usize..400,
            squares in prop::collection::vec((0_usize..40, 0_usize..400, 1_usize..30), 0..4),
            others in prop::collection::vec((0_usize..40, 0_usize..400, 1_usize..30), 0..4),
        ) {
            let draw = |squares: &[(usize, usize, usize)]| {
                let mut mask = vec![0_u8; height * width];
                for &(top, left, side) in squares {
                    for y in top..(top + side).min(height) {
                        for x in left..(left + side).min(width) {
                            mask[y * width + x] = 3;
                        }
                    }
                }
                mask
            };
            let (truth, prediction) = (draw(&squares), draw(&others));
            let contours = [&truth, &prediction].map(|mask| {
                let mask: Vec<bool> = mask.iter().map(|&label| label == 3).collect();
                contour_by_definition(&mask, height, width)
            });
            let radius = (0.008 * ((height * height + width * width) as f64).sqrt()).ceil() as i64;
            let wide = [&contours[0], &contours[1]].map(|contour| dilated(contour, height, width, radius));
            let count = |a: &[bool], b: &[bool]| a.iter().zip(b).filter(|(a, b)| **a && **b).count() as f64;
            let [n_truth, n_found] = [0, 1].map(|i| count(&contours[i], &contours[i]));
            let (precision, recall) = match (n_found == 0.0, n_truth == 0.0) {
                (true, true) => (1.0, 1.0),
                (true, false) => (1.0, 0.0),
                (false, true) => (0.0, 1.0),
                (false, false) => {
                    (count(&contours[1], &wide[0]) / n_found, count(&contours[0], &wide[1]) / n_truth)
                }
            };
            let expected =
                if precision + recall == 0.0 { 0.0 } else { 2.0 * precision * recall / (precision + recall) };
            let found =
                contour_accuracy(&truth, &prediction, (height, width), 3, &mut vec![0; height * width]).unwrap();
            prop_assert!((found - expected).abs() < 1e-12, "expected {}, found {}", expected, found);
        }
    }
}
