//! Symmetric quantization with one scale a row: `x ≈ scale · q`.

use super::elementary::{ROUND, largest};
use crate::kernels::Work;

/// Largest magnitude of an int8 activation.
pub(crate) const LIMIT_I8: f32 = 127.0;
/// Largest magnitude of queries, keys, values and attention weights: with 512 channels or tokens, a sum of products
/// stays below 2³¹.
pub(crate) const LIMIT_I16: f32 = 2047.0;

/// The whole number nearest to `x`, ties to even, within `±limit`; NaN becomes `limit`.
#[inline(always)]
fn rounded(x: f32, limit: f32) -> i32 {
    let x = if x < limit { x } else { limit };
    let x = if x > -limit { x } else { -limit };
    (x + ROUND).to_bits().wrapping_sub(ROUND.to_bits()).cast_signed()
}

/// Factor that maps `±largest` to `±limit`; 0 for a row of zeros.
#[inline(always)]
fn factor(largest: f32, limit: f32) -> f32 {
    if largest > 0.0 { limit / largest } else { 0.0 }
}

/// Quantizes a row of whole lanes to ±127 and gives its scale.
pub(crate) struct QuantizeI8<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) out: &'a mut [i8],
}

impl Work for QuantizeI8<'_> {
    type Output = f32;

    #[inline(always)]
    fn run(self) -> f32 {
        let magnitude = largest(self.x, 0.0, f32::abs);
        let factor = factor(magnitude, LIMIT_I8);
        for (out, x) in self.out.iter_mut().zip(self.x) {
            *out = rounded(x * factor, LIMIT_I8) as i8;
        }
        magnitude / LIMIT_I8
    }
}

/// Quantizes a row of whole lanes to ±2047 and gives its scale.
#[inline(always)]
pub(crate) fn quantize_i16(x: &[f32], out: &mut [i16]) -> f32 {
    quantize_i16_within(x, largest(x, 0.0, f32::abs), out)
}

/// [`quantize_i16`] of a row whose largest magnitude is known.
#[inline(always)]
pub(crate) fn quantize_i16_within(x: &[f32], magnitude: f32, out: &mut [i16]) -> f32 {
    let factor = factor(magnitude, LIMIT_I16);
    for (out, x) in out.iter_mut().zip(x) {
        *out = rounded(x * factor, LIMIT_I16) as i16;
    }
    magnitude / LIMIT_I16
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_row_comes_back_within_half_a_step(x in prop::array::uniform32(-1e3_f32..1e3)) {
            let mut bytes = [0; 32];
            let scale = QuantizeI8 { x: &x, out: &mut bytes }.run();
            let mut words = [0; 32];
            let fine = quantize_i16(&x, &mut words);
            for lane in 0..32 {
                prop_assert!((x[lane] - scale * f32::from(bytes[lane])).abs() <= scale * 0.501);
                prop_assert!((x[lane] - fine * f32::from(words[lane])).abs() <= fine * 0.501);
            }
        }

        #[test]
        fn no_bits_leave_the_range(bits in prop::array::uniform16(any::<u32>())) {
            let mut bytes = [0; 16];
            QuantizeI8 { x: &bits.map(f32::from_bits), out: &mut bytes }.run();
            prop_assert!(bytes.iter().all(|q| *q > -128));
            let mut words = [0; 16];
            quantize_i16(&bits.map(f32::from_bits), &mut words);
            prop_assert!(words.iter().all(|q| q.abs() <= 2047));
        }
    }

    #[test]
    fn ties_go_to_even_and_zeros_stay() {
        let mut x = [0.0; 16];
        assert_eq!(
            ((QuantizeI8 { x: &x, out: &mut [1; 16] }.run()), quantize_i16(&x, &mut [1; 16])),
            (0.0, 0.0)
        );
        (x[0], x[1], x[2], x[3]) = (127.0, 0.5, 1.5, -2.5);
        let mut out = [0; 16];
        assert_eq!((QuantizeI8 { x: &x, out: &mut out }.run()), 1.0);
        assert_eq!(out[..4], [127, 0, 2, -2]);
    }
}
