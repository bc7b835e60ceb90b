//! Running center of the teacher's outputs: `c ← m·c + (1 − m)·mean` (DINO, eq. 4).
//!
//! The mean is formed in two steps so that a trainer can sum over its ranks in between.
//! The class center takes the class logits of all crops, local ones included, and the patch center all patch logits.

use crate::error::{Error, Result, check_length};
use crate::math::add_scaled;

/// Adds the rows of `logits` (`[R, P]`) to `sum` (`[P]`) and returns `R`.
///
/// # Errors
/// [`Error::OutOfRange`] if `sum` is empty; [`Error::NotDivisible`] if `logits` is no whole number of rows.
pub fn add_rows(sum: &mut [f32], logits: &[f32]) -> Result<usize> {
    let prototypes = sum.len();
    if prototypes == 0 {
        return Err(Error::OutOfRange { what: "prototypes", min: 1, max: usize::MAX, actual: 0 });
    }
    if !logits.len().is_multiple_of(prototypes) {
        return Err(Error::NotDivisible { what: "logits", actual: logits.len(), divisor: prototypes });
    }
    for row in logits.chunks_exact(prototypes) {
        add_scaled(sum, 1.0, row);
    }
    Ok(logits.len() / prototypes)
}

/// Moves `center` (`[P]`) toward the mean of `rows` rows whose sum is `sum` (`[P]`).
///
/// The loss of a step uses the center from before this update.
///
/// # Errors
/// [`Error::LengthMismatch`] if the two differ in length; [`Error::OutOfRange`] if `rows` is 0.
pub fn update_mut(center: &mut [f32], sum: &[f32], rows: usize, momentum: f32) -> Result<()> {
    check_length("sum of teacher outputs", center.len(), sum.len())?;
    if rows == 0 {
        return Err(Error::OutOfRange {
            what: "rows of teacher outputs",
            min: 1,
            max: usize::MAX,
            actual: 0,
        });
    }
    let rows = rows as f32;
    for (center, sum) in center.iter_mut().zip(sum) {
        *center = momentum * *center + (1.0 - momentum) * (sum / rows);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_center_moves_by_one_minus_momentum_of_the_way() {
        let mut sum = [0.0; 2];
        assert_eq!(add_rows(&mut sum, &[1.0, 2.0, 3.0, 6.0]), Ok(2));
        let mut center = [0.0, 10.0];
        update_mut(&mut center, &sum, 2, 0.75).unwrap();
        assert_eq!(center, [0.5, 8.5]);
    }

    #[test]
    fn wrong_sizes_are_refused() {
        assert!(add_rows(&mut [0.0; 2], &[1.0; 3]).is_err());
        assert!(add_rows(&mut [], &[1.0; 3]).is_err());
        assert!(update_mut(&mut [0.0; 2], &[0.0; 3], 1, 0.9).is_err());
        assert!(update_mut(&mut [0.0; 2], &[0.0; 2], 0, 0.9).is_err());
    }
}
