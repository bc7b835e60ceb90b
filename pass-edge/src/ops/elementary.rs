//! Elementary functions without branches, so that 16 of them are computed at once: vector twins of `pass_core::math`.
//!
//! | function | largest error found over a dense sweep |
//! |---|---|
//! | [`exp_nonpositive`] | relative 2.5e-7 above −87 |
//! | [`gelu`] | absolute 6e-5: a two-hundredth of an int8 step of the hidden layer, which it feeds |

/// Numbers handled together; partial sums of a row.
pub(crate) const LANES: usize = 16;

/// Adding and subtracting this rounds an `f32` below 2²² to the nearest whole number, ties to even.
pub(crate) const ROUND: f32 = 12_582_912.0;

const LN_2_HIGH: f32 = 355.0 / 512.0;
const LN_2_LOW: f32 = -2.121_944_4e-4;

/// `exp(x)` for `x <= 0`; below −87 (and for NaN) the value at −87.
#[inline(always)]
pub(crate) fn exp_nonpositive(x: f32) -> f32 {
    let x = if x > -87.0 { x } else { -87.0 };
    let shifted = x * core::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    // exp(r) = 1 + r + r²·q(r) for |r| <= ln(2)/2
    let q = 0.001_392_628_4 + r * 0.000_198_828_1;
    let q = 0.008_333_321 + r * q;
    let q = 0.041_666_552 + r * q;
    let q = 0.166_666_67 + r * q;
    let q = 0.5 + r * q;
    let value = 1.0 + (r + r * r * q);
    // the low bits of the shifted number are the whole number n
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    value * f32::from_bits(exponent)
}

/// GELU, exact form `x·Φ(x)`. Φ is 1/2 plus an odd polynomial: a minimax fit of `x·Φ(x)` on ±4.25 that meets 0 and 1 at its
/// ends; what GELU is off beyond them is at most 4.5e-5.
#[inline(always)]
pub(crate) fn gelu(x: f32) -> f32 {
    let z = if x < 4.25 { x } else { 4.25 };
    let z = if z > -4.25 { z } else { -4.25 };
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
            let x = -86.9 * i as f32 / steps as f32;
            let exact = f64::from(x).exp();
            assert!((f64::from(exp_nonpositive(x)) / exact - 1.0).abs() < 2.5e-7, "exp({x})");
            let x = 24.0 * (i as f32 / steps as f32 - 0.5);
            let difference = f64::from(gelu(x)) - f64::from(pass_core::math::gelu(x));
            assert!(difference.abs() < 6e-5, "gelu({x}): {difference:e}");
        }
    }

    #[test]
    fn no_number_is_too_small_or_no_number() {
        for x in [-1e30, f32::NEG_INFINITY, f32::NAN] {
            assert_eq!(exp_nonpositive(x), exp_nonpositive(-87.0));
        }
        assert_eq!(exp_nonpositive(0.0), 1.0);
        assert_eq!(
            (gelu(0.0), (gelu(150.0) - 150.0).abs() < 6e-5, gelu(-150.0).abs() < 6e-5),
            (0.0, true, true)
        );
    }
}
