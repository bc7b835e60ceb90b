//! Elementary functions without branches, so that 16 of them are computed at once: vector twins of `pass_core::math`.
//!
//! | function | largest error found over a dense sweep |
//! |---|---|
//! | [`exp2_nonpositive`] | relative 3e-6 above −126: a hundredth of a step of the 12-bit attention weights |
//! | [`gelu`] | absolute 6e-5: a two-hundredth of an int8 step of the hidden layer, which it feeds |

/// Numbers handled together; partial sums of a row.
pub(crate) const LANES: usize = 16;

/// Adding and subtracting this rounds an `f32` below 2²² to the nearest whole number, ties to even.
pub(crate) const ROUND: f32 = 12_582_912.0;

/// `2^x` for `x <= 0`; below −126 (and for NaN) the value at −126.
#[inline(always)]
pub(crate) fn exp2_nonpositive(x: f32) -> f32 {
    let x = greater(x, -126.0);
    let shifted = x + ROUND;
    let r = x - (shifted - ROUND);
    // minimax fit of 2^r for |r| <= 1/2 that is exact at 0
    let p = 0.055_906_426 + r * 0.009_582_853;
    let p = 0.240_240_99 + r * p;
    let p = 0.693_124_1 + r * p;
    let p = 1.0 + r * p;
    // the low bits of the shifted number are the whole number nearest to x: it is added to the exponent
    f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits().wrapping_sub(ROUND.to_bits()) << 23))
}

/// GELU, exact form `x·Φ(x)`. Φ is 1/2 plus an odd polynomial: a minimax fit of `x·Φ(x)` on ±4.25 that meets 0 and 1 at its
/// ends; what GELU is off beyond them is at most 4.5e-5.
#[inline(always)]
pub(crate) fn gelu(x: f32) -> f32 {
    let z = greater(if x < 4.25 { x } else { 4.25 }, -4.25);
    let u = z * z;
    let p = -6.331_515_3e-9 + u * 6.759_932e-11;
    let p = 2.607_910_7e-7 + u * p;
    let p = -6.296_445_5e-6 + u * p;
    let p = 0.000_100_870_646 + u * p;
    let p = -0.001_157_409_7 + u * p;
    let p = 0.009_995_894 + u * p;
    let p = -0.066_672_266 + u * p;
    let p = 0.399_113_87 + u * p;
    x * (0.5 + z * p)
}

/// `Σ f(x)` over rows of whole lanes: lane `i` sums every 16th number, then [`sum_lanes`].
#[inline(always)]
pub(crate) fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    for x in x.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            lanes[lane] += f(x[lane]);
        }
    }
    sum_lanes(lanes)
}

/// Halves are added until one number is left.
#[inline(always)]
pub(crate) fn sum_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// The largest `f(x)`, at least `least`, over rows of whole lanes. NaN is never the largest.
#[inline(always)]
pub(crate) fn largest(x: &[f32], least: f32, f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [least; LANES];
    for x in x.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            let value = f(x[lane]);
            lanes[lane] = greater(value, lanes[lane]);
        }
    }
    largest_lane(&lanes, least)
}

/// The larger number; `b` if `a` is NaN.
#[inline(always)]
pub(crate) fn greater(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// The largest lane, at least `least`.
#[inline(always)]
pub(crate) fn largest_lane(lanes: &[f32; LANES], least: f32) -> f32 {
    lanes.iter().fold(least, |largest, value| greater(*value, largest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elementary_functions_keep_their_stated_accuracy() {
        let steps = if cfg!(miri) { 200 } else { 200_000 };
        for i in 0..=steps {
            let x = -126.0 * i as f32 / steps as f32;
            let exact = f64::from(x).exp2();
            assert!((f64::from(exp2_nonpositive(x)) / exact - 1.0).abs() < 3e-6, "2^{x}");
            let x = 24.0 * (i as f32 / steps as f32 - 0.5);
            let difference = f64::from(gelu(x)) - f64::from(pass_core::math::gelu(x));
            assert!(difference.abs() < 6e-5, "gelu({x}): {difference:e}");
        }
    }

    #[test]
    fn no_number_is_too_small_or_no_number() {
        for x in [-1e30, f32::NEG_INFINITY, f32::NAN] {
            assert_eq!(exp2_nonpositive(x), exp2_nonpositive(-126.0));
        }
        assert_eq!((exp2_nonpositive(0.0), exp2_nonpositive(-3.0)), (1.0, 0.125));
        assert_eq!(
            (gelu(0.0), (gelu(150.0) - 150.0).abs() < 6e-5, gelu(-150.0).abs() < 6e-5),
            (0.0, true, true)
        );
    }
}
