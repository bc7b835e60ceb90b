//! Softmax and log-softmax with a temperature, rows of `P` logits.

use crate::error::{Result, check_length, check_positive};
use crate::math::{exp, ln};

/// `softmax(x / τ)` of one row.
///
/// # Errors
/// [`Error::LengthMismatch`](crate::Error::LengthMismatch) if `out` is not as long as `logits`;
/// [`Error::NotPositive`](crate::Error::NotPositive) if the temperature is not positive and finite.
pub fn softmax_into(logits: &[f32], temperature: f32, out: &mut [f32]) -> Result<()> {
    check_length("softmax output", logits.len(), out.len())?;
    check_positive("temperature", temperature)?;
    let inverse = 1.0 / temperature;
    for (out, logit) in out.iter_mut().zip(logits) {
        *out = logit * inverse;
    }
    softmax_mut(out);
    Ok(())
}

/// `softmax((x − c) / τ)` of one row: the sharpened and centered teacher distribution (DINO, eq. 1 and centering).
///
/// # Errors
/// As [`softmax_into`], also if `center` is not as long as `logits`.
pub fn centered_softmax_into(
    logits: &[f32],
    center: &[f32],
    temperature: f32,
    out: &mut [f32],
) -> Result<()> {
    check_length("center", logits.len(), center.len())?;
    check_length("softmax output", logits.len(), out.len())?;
    check_positive("temperature", temperature)?;
    let inverse = 1.0 / temperature;
    for ((out, logit), center) in out.iter_mut().zip(logits).zip(center) {
        *out = (logit - center) * inverse;
    }
    softmax_mut(out);
    Ok(())
}

/// `log softmax(x / τ)` of one row.
///
/// # Errors
/// As [`softmax_into`].
pub fn log_softmax_into(logits: &[f32], temperature: f32, out: &mut [f32]) -> Result<()> {
    check_length("log-softmax output", logits.len(), out.len())?;
    check_positive("temperature", temperature)?;
    let inverse = 1.0 / temperature;
    for (out, logit) in out.iter_mut().zip(logits) {
        *out = logit * inverse;
    }
    let normalizer = log_sum_exp(out);
    out.iter_mut().for_each(|value| *value -= normalizer);
    Ok(())
}

/// `softmax(x)` in place.
pub fn softmax_mut(x: &mut [f32]) {
    let shift = finite_maximum(x);
    let mut sum = 0.0;
    for value in x.iter_mut() {
        *value = exp(*value - shift);
        sum += *value;
    }
    let inverse = 1.0 / sum;
    x.iter_mut().for_each(|value| *value *= inverse);
}

/// `ln Σ exp(xᵢ)`, shifted by the maximum so that it cannot overflow.
pub fn log_sum_exp(x: &[f32]) -> f32 {
    let shift = finite_maximum(x);
    shift + ln(x.iter().map(|value| exp(value - shift)).sum())
}

/// The largest value, or 0 where it would turn differences into NaN.
fn finite_maximum(x: &[f32]) -> f32 {
    let maximum = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if maximum.is_finite() { maximum } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec;
    use std::vec::Vec;

    fn log_twin(logits: &[f32], center: f32, temperature: f32) -> Vec<f64> {
        let scaled = |&x: &f32| (f64::from(x) - f64::from(center)) / f64::from(temperature);
        let shift = logits.iter().map(scaled).fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = logits.iter().map(|x| (scaled(x) - shift).exp()).sum();
        logits.iter().map(|x| scaled(x) - shift - sum.ln()).collect()
    }

    proptest! {
        #[test]
        fn rows_sum_to_one_and_agree_with_double_precision(
            logits in proptest::collection::vec(-30.0_f32..30.0, 1..200),
            center in -2.0_f32..2.0,
            temperature in 0.02_f32..2.0,
        ) {
            // a scaled logit reaches 64/τ, and its own rounding is what limits the result
            let tolerance = f64::from(2e-6 + 64.0 / temperature * 2.0 * f32::EPSILON);
            let mut out = vec![0.0; logits.len()];
            centered_softmax_into(&logits, &vec![center; logits.len()], temperature, &mut out).unwrap();
            prop_assert!((out.iter().sum::<f32>() - 1.0).abs() < 1e-5);
            for (found, exact) in out.iter().zip(log_twin(&logits, center, temperature)) {
                prop_assert!((f64::from(*found) - exact.exp()).abs() < tolerance);
            }
            log_softmax_into(&logits, temperature, &mut out).unwrap();
            for (found, exact) in out.iter().zip(log_twin(&logits, 0.0, temperature)) {
                prop_assert!((f64::from(*found) - exact).abs() < tolerance);
            }
        }
    }

    #[test]
    fn extreme_logits_stay_finite() {
        let mut out = [0.0; 3];
        softmax_into(&[1e30, 0.0, -1e30], 0.04, &mut out).unwrap();
        assert_eq!(out, [1.0, 0.0, 0.0]);
        softmax_into(&[0.0, 0.0, f32::NEG_INFINITY], 1.0, &mut out).unwrap();
        assert_eq!(out, [0.5, 0.5, 0.0]);
        assert!(softmax_into(&[0.0; 3], 0.0, &mut out).is_err());
        assert!(softmax_into(&[0.0; 2], 1.0, &mut out).is_err());
        assert!(centered_softmax_into(&[0.0; 3], &[0.0; 2], 1.0, &mut out).is_err());
        softmax_into(&[], 1.0, &mut []).unwrap();
    }
}
