//! Cross-entropy between the teacher's centered, sharpened distribution and the student's (DINO eq. 3, PASS eq. 5).
//!
//! `H(t, s) = −Σ softmax((t − c)/τₜ)·log softmax(s/τₛ)` for one row of `P` prototypes. The class-token loss pairs every
//! global crop of the teacher with every *other* crop of the student; the patch loss pairs each crop with itself, patch
//! by patch. Both compare with the center from before the step's update.
//!
//! Crops are passed as a list of slices, globals first; a crop holds `[R, P]` logits: `R = B` for class tokens and
//! `R = B·N` for patches, where `N` may differ from crop to crop.

use crate::error::{Error, Result, check_length, check_positive, check_scratch};
use crate::math::exp;
use crate::softmax::{centered_softmax_into, log_sum_exp};

/// Temperatures of the two distributions; unitless, positive.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Temperatures {
    /// `τₛ`, 0.1 in the paper.
    pub student: f32,
    /// `τₜ`, which follows [`TeacherTemperature`](crate::schedule::TeacherTemperature).
    pub teacher: f32,
}

/// Class-token loss: the mean over teacher crops `q` and student crops `v ≠ q` of the batch-mean cross-entropy.
///
/// - `teacher`: the global crops, each `[B, P]`; `student`: all crops in the same order, each `[B, P]`.
/// - `center`: `[P]`; `scratch`: at least `2·P` values.
///
/// # Errors
/// [`Error::LengthMismatch`] if crops, center or scratch do not fit; [`Error::OutOfRange`] if there are no pairs;
/// [`Error::NotPositive`] for a temperature.
pub fn class_loss(
    teacher: &[&[f32]],
    student: &[&[f32]],
    center: &[f32],
    temperatures: Temperatures,
    scratch: &mut [f32],
) -> Result<f32> {
    class_pairs(teacher, student, center, temperatures, scratch, &mut NoGradient)
}

/// As [`class_loss`], and adds `weight · ∂loss/∂student` to `gradient`, which has the shapes of `student`.
///
/// # Errors
/// As [`class_loss`], also for the shapes of `gradient`.
pub fn class_loss_with_gradient(
    teacher: &[&[f32]],
    student: &[&[f32]],
    center: &[f32],
    temperatures: Temperatures,
    weight: f32,
    gradient: &mut [&mut [f32]],
    scratch: &mut [f32],
) -> Result<f32> {
    check_gradient(student, gradient)?;
    class_pairs(teacher, student, center, temperatures, scratch, &mut Weighted { weight, gradient })
}

/// Patch loss: the mean over crops of the mean over their rows; teacher and student see the same crop and patch.
///
/// - `teacher`, `student`: the same crops, each `[B·N, P]`; a local crop weighs as much as a global one.
/// - `center`: `[P]`; `scratch`: at least `2·P` values.
///
/// # Errors
/// As [`class_loss`].
pub fn patch_loss(
    teacher: &[&[f32]],
    student: &[&[f32]],
    center: &[f32],
    temperatures: Temperatures,
    scratch: &mut [f32],
) -> Result<f32> {
    patch_pairs(teacher, student, center, temperatures, scratch, &mut NoGradient)
}

/// As [`patch_loss`], and adds `weight · ∂loss/∂student` to `gradient`, which has the shapes of `student`.
///
/// # Errors
/// As [`patch_loss`], also for the shapes of `gradient`.
pub fn patch_loss_with_gradient(
    teacher: &[&[f32]],
    student: &[&[f32]],
    center: &[f32],
    temperatures: Temperatures,
    weight: f32,
    gradient: &mut [&mut [f32]],
    scratch: &mut [f32],
) -> Result<f32> {
    check_gradient(student, gradient)?;
    patch_pairs(teacher, student, center, temperatures, scratch, &mut Weighted { weight, gradient })
}

/// The objective: `class + λ·patch`, `λ = 0.1` in the paper.
pub fn total_loss(class: f32, patch: f32, patch_weight: f32) -> f32 {
    class + patch_weight * patch
}

/// Values of scratch memory the losses need for `prototypes` outputs.
pub const fn loss_scratch_len(prototypes: usize) -> usize {
    prototypes.saturating_mul(2)
}

/// Where the gradient of a row goes, if anywhere.
trait Sink {
    /// Receives `∂H/∂s` of row `row` of crop `crop`, to be scaled by `share`.
    fn add(
        &mut self,
        crop: usize,
        row: usize,
        share: f32,
        slope: impl Iterator<Item = f32>,
        prototypes: usize,
    );
}

struct NoGradient;

impl Sink for NoGradient {
    fn add(&mut self, _: usize, _: usize, _: f32, _: impl Iterator<Item = f32>, _: usize) {}
}

struct Weighted<'a, 'b> {
    weight: f32,
    gradient: &'a mut [&'b mut [f32]],
}

impl Sink for Weighted<'_, '_> {
    fn add(
        &mut self,
        crop: usize,
        row: usize,
        share: f32,
        slope: impl Iterator<Item = f32>,
        prototypes: usize,
    ) {
        let scale = self.weight * share;
        let target = &mut self.gradient[crop][row * prototypes..(row + 1) * prototypes];
        for (target, slope) in target.iter_mut().zip(slope) {
            *target += scale * slope;
        }
    }
}

fn class_pairs(
    teacher: &[&[f32]],
    student: &[&[f32]],
    center: &[f32],
    temperatures: Temperatures,
    scratch: &mut [f32],
    sink: &mut impl Sink,
) -> Result<f32> {
    let prototypes = check_door(teacher, center, temperatures, scratch)?;
    let (Some(first), Some(pairs)) =
        (teacher.first(), (teacher.len() * student.len()).checked_sub(teacher.len()))
    else {
        return Err(Error::OutOfRange {
            what: "teacher crops",
            min: 1,
            max: usize::MAX,
            actual: teacher.len(),
        });
    };
    if student.len() < teacher.len().max(2) {
        let min = teacher.len().max(2);
        return Err(Error::OutOfRange { what: "student crops", min, max: usize::MAX, actual: student.len() });
    }
    for crop in teacher {
        check_length("class logits of a teacher crop", first.len(), crop.len())?;
    }
    for crop in student {
        check_length("class logits of a student crop", first.len(), crop.len())?;
    }

    let rows = first.len() / prototypes;
    let share = 1.0 / (rows as f32 * pairs as f32);
    let (target, student_row) = scratch[..2 * prototypes].split_at_mut(prototypes);
    let mut sum = 0.0_f64;
    for (query, teacher) in teacher.iter().enumerate() {
        for (row, logits) in teacher.chunks_exact(prototypes).enumerate() {
            centered_softmax_into(logits, center, temperatures.teacher, target)?;
            for (view, student) in student.iter().enumerate().filter(|&(view, _)| view != query) {
                let logits = &student[row * prototypes..(row + 1) * prototypes];
                sum += f64::from(cross_entropy(target, logits, temperatures.student, student_row));
                sink.add(view, row, share, slope(target, student_row, temperatures.student), prototypes);
            }
        }
    }
    Ok((sum / (rows as f64 * pairs as f64)) as f32)
}

fn patch_pairs(
    teacher: &[&[f32]],
    student: &[&[f32]],
    center: &[f32],
    temperatures: Temperatures,
    scratch: &mut [f32],
    sink: &mut impl Sink,
) -> Result<f32> {
    let prototypes = check_door(teacher, center, temperatures, scratch)?;
    check_length("student crops", teacher.len(), student.len())?;
    for (teacher, student) in teacher.iter().zip(student) {
        check_length("patch logits of a student crop", teacher.len(), student.len())?;
    }

    let crops = teacher.len();
    let (target, student_row) = scratch[..2 * prototypes].split_at_mut(prototypes);
    let mut sum = 0.0_f64;
    for (crop, (teacher, student)) in teacher.iter().zip(student).enumerate() {
        let rows = teacher.len() / prototypes;
        let share = 1.0 / (rows as f32 * crops as f32);
        let mut crop_sum = 0.0_f64;
        for (row, (logits, student)) in
            teacher.chunks_exact(prototypes).zip(student.chunks_exact(prototypes)).enumerate()
        {
            centered_softmax_into(logits, center, temperatures.teacher, target)?;
            crop_sum += f64::from(cross_entropy(target, student, temperatures.student, student_row));
            sink.add(crop, row, share, slope(target, student_row, temperatures.student), prototypes);
        }
        sum += crop_sum / rows as f64;
    }
    Ok((sum / crops as f64) as f32)
}

/// `H(t, s)` of one row; leaves `s/τₛ − log Σ exp(s/τₛ)`, the student's log-probabilities, in `log_student`.
fn cross_entropy(target: &[f32], student: &[f32], temperature: f32, log_student: &mut [f32]) -> f32 {
    let inverse = 1.0 / temperature;
    for (scaled, logit) in log_student.iter_mut().zip(student) {
        *scaled = logit * inverse;
    }
    let normalizer = log_sum_exp(log_student);
    log_student.iter_mut().for_each(|value| *value -= normalizer);
    // 0·(−inf) would be NaN: a prototype the teacher rules out adds nothing.
    -target.iter().zip(log_student.iter()).filter(|&(&t, _)| t != 0.0).map(|(t, log)| t * log).sum::<f32>()
}

/// `∂H/∂s = (softmax(s/τₛ) − t) / τₛ` of one row.
fn slope(target: &[f32], log_student: &[f32], temperature: f32) -> impl Iterator<Item = f32> {
    let inverse = 1.0 / temperature;
    target.iter().zip(log_student).map(move |(t, &log)| (exp(log) - t) * inverse)
}

/// Checks what both losses share and returns the number of prototypes.
fn check_door(
    teacher: &[&[f32]],
    center: &[f32],
    temperatures: Temperatures,
    scratch: &[f32],
) -> Result<usize> {
    let prototypes = center.len();
    if prototypes == 0 {
        return Err(Error::OutOfRange { what: "prototypes", min: 1, max: usize::MAX, actual: 0 });
    }
    check_positive("student temperature", temperatures.student)?;
    check_positive("teacher temperature", temperatures.teacher)?;
    check_scratch("loss scratch", loss_scratch_len(prototypes), scratch.len())?;
    if teacher.is_empty() {
        return Err(Error::OutOfRange { what: "teacher crops", min: 1, max: usize::MAX, actual: 0 });
    }
    for crop in teacher {
        if crop.is_empty() || !crop.len().is_multiple_of(prototypes) {
            return Err(Error::NotDivisible {
                what: "teacher logits",
                actual: crop.len(),
                divisor: prototypes,
            });
        }
    }
    Ok(prototypes)
}

fn check_gradient(student: &[&[f32]], gradient: &[&mut [f32]]) -> Result<()> {
    check_length("gradient crops", student.len(), gradient.len())?;
    for (student, gradient) in student.iter().zip(gradient) {
        check_length("gradient of a crop", student.len(), gradient.len())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec;
    use std::vec::Vec;

    const T: Temperatures = Temperatures { student: 0.1, teacher: 0.04 };

    fn cross_entropy_f64(teacher: &[f32], student: &[f64], center: &[f32]) -> f64 {
        let log_softmax = |x: Vec<f64>| -> Vec<f64> {
            let shift = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum = x.iter().map(|x| (x - shift).exp()).sum::<f64>().ln();
            x.iter().map(|x| x - shift - sum).collect()
        };
        let teacher =
            teacher.iter().zip(center).map(|(&t, &c)| (f64::from(t) - f64::from(c)) / f64::from(T.teacher));
        let student = student.iter().map(|&s| s / f64::from(T.student));
        let pairs = log_softmax(teacher.collect()).into_iter().zip(log_softmax(student.collect()));
        -pairs.map(|(t, s)| t.exp() * s).sum::<f64>()
    }

    fn wide(x: &[f32]) -> Vec<f64> {
        x.iter().map(|&x| f64::from(x)).collect()
    }

    proptest! {
        #[test]
        fn losses_and_gradients_agree_with_double_precision(
            data in proptest::collection::vec(-1.0_f32..1.0, 64),
        ) {
            // two global crops and one local crop, B = 2, P = 4; the local crop has one patch, the others two
            let (p, center) = (4, &data[60..64]);
            let crop = |from: usize, rows: usize| &data[from..from + rows * p];
            let teacher = [crop(0, 2), crop(8, 2)];
            let student = [crop(16, 2), crop(24, 2), crop(32, 2)];
            let mut scratch = [0.0; 8];
            let mut gradient = [vec![0.0; 8], vec![0.0; 8], vec![0.0; 8]];
            let mut targets = gradient.each_mut().map(Vec::as_mut_slice);
            let found =
                class_loss_with_gradient(&teacher, &student, center, T, 1.0, &mut targets, &mut scratch).unwrap();
            prop_assert_eq!(found, class_loss(&teacher, &student, center, T, &mut scratch).unwrap());

            let exact = |student: &[Vec<f64>; 3]| -> f64 {
                let mut sum = 0.0;
                for query in 0..2 {
                    for view in (0..3).filter(|&view| view != query) {
                        for row in 0..2 {
                            let range = row * p..(row + 1) * p;
                            sum += cross_entropy_f64(
                                &teacher[query][range.clone()], &student[view][range], center) / 2.0;
                        }
                    }
                }
                sum / 4.0
            };
            let student64 = student.map(wide);
            prop_assert!((f64::from(found) - exact(&student64)).abs() < 2e-5);
            for view in 0..3 {
                for index in 0..8 {
                    let moved = |by: f64| {
                        let mut student = student64.clone();
                        student[view][index] += by;
                        exact(&student)
                    };
                    let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                    prop_assert!((f64::from(gradient[view][index]) - slope).abs() < 2e-5);
                }
            }
        }

        #[test]
        fn the_patch_loss_is_the_mean_of_crop_means(data in proptest::collection::vec(-1.0_f32..1.0, 64)) {
            let (p, center) = (4, &data[60..64]);
            let teacher = [&data[0..16], &data[16..24]];
            let student = [&data[24..40], &data[40..48]];
            let mut scratch = [0.0; 8];
            let mut gradient = [vec![0.0; 16], vec![0.0; 8]];
            let mut targets = gradient.each_mut().map(Vec::as_mut_slice);
            let found =
                patch_loss_with_gradient(&teacher, &student, center, T, 0.5, &mut targets, &mut scratch).unwrap();
            let exact = |student: &[Vec<f64>; 2]| -> f64 {
                let crop = |v: usize| {
                    let rows = teacher[v].len() / p;
                    (0..rows).map(|r| {
                        let range = r * p..(r + 1) * p;
                        cross_entropy_f64(&teacher[v][range.clone()], &student[v][range], center)
                    }).sum::<f64>() / rows as f64
                };
                (crop(0) + crop(1)) / 2.0
            };
            let student64 = student.map(wide);
            prop_assert!((f64::from(found) - exact(&student64)).abs() < 2e-5);
            for view in 0..2 {
                for index in 0..student[view].len() {
                    let moved = |by: f64| {
                        let mut student = student64.clone();
                        student[view][index] += by;
                        exact(&student)
                    };
                    let slope = 0.5 * (moved(1e-5) - moved(-1e-5)) / 2e-5;
                    prop_assert!((f64::from(gradient[view][index]) - slope).abs() < 2e-5);
                }
            }
        }

        #[test]
        fn the_order_of_the_batch_changes_nothing(data in proptest::collection::vec(-1.0_f32..1.0, 24)) {
            let swap = |x: &[f32]| [&x[4..8], &x[..4]].concat();
            let mut scratch = [0.0; 8];
            let mut loss = |teacher: &[f32], student: &[f32]| {
                patch_loss(&[teacher], &[student], &data[20..24], T, &mut scratch).unwrap()
            };
            let plain = loss(&data[..8], &data[8..16]);
            let swapped = loss(&swap(&data[..8]), &swap(&data[8..16]));
            prop_assert!((plain - swapped).abs() <= 1e-6 * plain.abs());
        }
    }

    #[test]
    fn equal_logits_cost_the_logarithm_of_the_prototypes() {
        let logits = [0.3_f32; 16];
        let loss = patch_loss(&[&logits], &[&logits], &[0.0; 8], T, &mut [0.0; 16]).unwrap();
        assert!((loss - 8_f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn extreme_logits_stay_finite() {
        let loss = patch_loss(&[&[1e6, -1e6]], &[&[-1e3, 1e3]], &[0.0; 2], T, &mut [0.0; 4]).unwrap();
        assert_eq!(loss, 20_000.0);
    }

    #[test]
    fn wrong_arguments_are_refused() {
        let crop: &[f32] = &[0.0; 4];
        let short: &[f32] = &[0.0; 3];
        let mut scratch = [0.0; 4];
        let mut class = |teacher: &[&[f32]], student: &[&[f32]], center: &[f32], t: Temperatures| {
            class_loss(teacher, student, center, t, &mut scratch)
        };
        assert!(class(&[crop], &[crop, crop], &[0.0; 2], T).is_ok());
        assert!(class(&[crop], &[crop], &[0.0; 2], T).is_err());
        assert!(class(&[crop], &[], &[0.0; 2], T).is_err());
        assert!(class(&[], &[crop, crop], &[0.0; 2], T).is_err());
        assert!(class(&[crop], &[crop, short], &[0.0; 2], T).is_err());
        assert!(class(&[crop], &[crop, crop], &[], T).is_err());
        assert!(class(&[crop], &[crop, crop], &[0.0; 3], T).is_err());
        assert!(class(&[crop], &[crop, crop], &[0.0; 2], Temperatures { teacher: 0.0, ..T }).is_err());
        assert!(patch_loss(&[crop], &[short], &[0.0; 2], T, &mut scratch).is_err());
        assert!(patch_loss(&[crop], &[crop], &[0.0; 2], T, &mut scratch[..3]).is_err());
        assert!(patch_loss(&[&[]], &[&[]], &[0.0; 2], T, &mut scratch).is_err());
        let mut gradient = [0.0; 3];
        let result =
            patch_loss_with_gradient(&[crop], &[crop], &[0.0; 2], T, 1.0, &mut [&mut gradient], &mut scratch);
        assert!(result.is_err());
    }
}
