//! The only home of elementary functions: `core` has none, and the board must run the same code as the workstation.
//!
//! | function | largest error found over a dense sweep |
//! |---|---|
//! | [`sqrt`] | correctly rounded up to 1 in 10⁷ arguments, never more than 1 ulp |
//! | [`exp`], [`ln`] | 1 ulp (subnormal results of `exp`: 2 ulp) |
//! | [`erf`] | 2 ulp |
//! | [`normal_cdf`] | 6 ulp above −12 |
//! | [`cos_pi`] | 2 ulp of `f64` |
//!
//! Polynomials were fitted at Chebyshev nodes for smallest relative error over the stated range.

/// Partial sums of a dot product: enough to hide the latency of an addition and to fill the widest vector registers.
const LANES: usize = 16;

/// `Σ aᵢ·bᵢ` in a fixed order of operations, over the shorter of the two.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let (a_blocks, a_tail) = a.as_chunks::<LANES>();
    let (b_blocks, b_tail) = b.as_chunks::<LANES>();
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        for lane in 0..LANES {
            lanes[lane] += a[lane] * b[lane];
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0] + a_tail.iter().zip(b_tail).map(|(a, b)| a * b).sum::<f32>()
}

/// `y += scale · x`.
pub fn add_scaled(y: &mut [f32], scale: f32, x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += scale * x;
    }
}

/// Euclidean norm. Overflows to infinity where the sum of squares does.
pub fn norm(x: &[f32]) -> f32 {
    sqrt(dot(x, x))
}

/// Square root; NaN below zero.
pub fn sqrt(x: f32) -> f32 {
    if x < 0.0 || x.is_nan() {
        return f32::NAN;
    }
    if x == 0.0 || x.is_infinite() {
        return x;
    }
    // Newton's iteration on 1/sqrt(x): no division, and 3 % → 2e-3 → 5e-6 → 3e-11 → rounding of f64.
    let x = f64::from(x);
    let mut y = f64::from_bits(0x5fe6_eb50_c7b5_37a9 - (x.to_bits() >> 1));
    for _ in 0..4 {
        y *= 1.5 - 0.5 * x * y * y;
    }
    (x * y) as f32
}

/// Adding and subtracting this rounds an `f32` below 2²² to the nearest whole number.
const ROUND: f32 = 12_582_912.0;

/// `ln 2` in two parts: the first is 355/512, whose trailing bits are zero, so its product with a small whole number is exact.
const LN_2_HIGH: f32 = 355.0 / 512.0;
const LN_2_LOW: f32 = -2.121_944_4e-4;

/// Exponential function.
pub fn exp(x: f32) -> f32 {
    if x.is_nan() {
        return x;
    }
    // Beyond these the result is infinite, or rounds to zero.
    let x = x.clamp(-104.0, 89.0);
    let n = (x * core::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    // exp(r) = 1 + r + r²·q(r) for |r| <= ln(2)/2
    const C: [f32; 6] = [0.5, 0.166_666_67, 0.041_666_552, 0.008_333_321, 0.001_392_628_4, 0.000_198_828_1];
    let q = polynomial(&C, r);
    let value = 1.0 + (r + r * r * q);
    // Two factors, since 2^n alone may be subnormal or infinite where the product is neither.
    let n = n as i32;
    let half = n / 2;
    value * power_of_two(half) * power_of_two(n - half)
}

/// `2^n` for `n` in `-126..=127`.
fn power_of_two(n: i32) -> f32 {
    f32::from_bits(((n + 127) as u32) << 23)
}

/// Natural logarithm; NaN below zero, `-inf` at zero.
pub fn ln(x: f32) -> f32 {
    if x < 0.0 || x.is_nan() {
        return f32::NAN;
    }
    if x == 0.0 {
        return f32::NEG_INFINITY;
    }
    if x.is_infinite() {
        return x;
    }
    let (x, subnormal) = if x < f32::MIN_POSITIVE { (x * 8_388_608.0, 23) } else { (x, 0) };
    // x = m · 2^n with m in [sqrt(1/2), sqrt(2))
    const SQRT_HALF_BITS: u32 = 0x3f35_04f3;
    let offset = x.to_bits().wrapping_sub(SQRT_HALF_BITS);
    let n = (offset as i32) >> 23;
    let m = f32::from_bits((offset & 0x007f_ffff) + SQRT_HALF_BITS);
    // ln(1+f) = f − f²/2 + s·(f²/2 + R), s = f/(2+f), R = 2·atanh(s)/s − 2: the leading term carries no rounding error.
    let f = m - 1.0;
    let s = f / (2.0 + f);
    let u = s * s;
    let r = u * (0.666_666_6 + u * (0.400_003_85 + u * (0.285_350_5 + u * 0.236_163_59)));
    let half_square = 0.5 * f * f;
    let n = (n - subnormal) as f32;
    n * LN_2_HIGH - ((half_square - (s * (half_square + r) + n * LN_2_LOW)) - f)
}

/// Error function.
pub fn erf(x: f32) -> f32 {
    let magnitude = x.abs();
    if magnitude <= 1.0 {
        return x + x * erf_over_x_minus_one(x * x);
    }
    let value = 1.0 - 2.0 * upper_tail(magnitude * core::f32::consts::SQRT_2);
    if x.is_nan() {
        x
    } else if x < 0.0 {
        -value
    } else {
        value
    }
}

/// `Φ(x)`, the cumulative distribution of the standard normal: `(1 + erf(x/√2)) / 2` without cancellation below zero.
pub fn normal_cdf(x: f32) -> f32 {
    if x >= -0.75 { 0.5 + 0.5 * erf(x * core::f32::consts::FRAC_1_SQRT_2) } else { upper_tail(-x) }
}

/// `erf(x)/x − 1` as a polynomial in `u = x²`, `u <= 1`.
fn erf_over_x_minus_one(u: f32) -> f32 {
    const C: [f32; 8] = [
        0.128_379_17,
        -0.376_126_38,
        0.112_837_82,
        -0.026_865_43,
        0.005_221_031_6,
        -0.000_848_408_03,
        0.000_112_659_59,
        -0.000_009_667_045,
    ];
    polynomial(&C, u)
}

/// `1 − Φ(x)` for `x >= 0.71`: `exp(−x²/2)·t·P(t)/2` with `t = 1/(1 + x/√8)`.
fn upper_tail(x: f32) -> f32 {
    const C: [f32; 10] = [
        0.282_086_97,
        0.282_309_95,
        0.244_314_63,
        0.192_695_42,
        0.019_071_171,
        0.152_330_92,
        -0.274_061_2,
        0.066_717_83,
        0.064_056_21,
        -0.029_547_991,
    ];
    if x > 14.5 {
        return 0.0;
    }
    let t = 1.0 / (1.0 + x * (0.5 * core::f32::consts::FRAC_1_SQRT_2));
    // x²/2 rounds by up to x²/2²⁵, which exp would multiply: square a shortened x exactly and correct.
    let short = f32::from_bits(x.to_bits() & 0xffff_f000);
    0.5 * exp(-0.5 * short * short) * exp(0.5 * (short - x) * (short + x)) * t * polynomial(&C, t)
}

fn polynomial(coefficients: &[f32], x: f32) -> f32 {
    coefficients.iter().rev().fold(0.0, |sum, &c| sum * x + c)
}

/// GELU, exact form: `x·Φ(x)`.
pub fn gelu(x: f32) -> f32 {
    // −inf·0 has no value; the limit has.
    if x == f32::NEG_INFINITY { 0.0 } else { x * normal_cdf(x) }
}

/// Derivative of [`gelu`]: `Φ(x) + x·φ(x)`.
pub fn gelu_derivative(x: f32) -> f32 {
    const FRAC_1_SQRT_TAU: f32 = 0.398_942_3;
    // Beyond this the density underflows, and its product with an infinite x has no value.
    let density = if x.abs() > 14.0 { 0.0 } else { x * FRAC_1_SQRT_TAU * exp(-0.5 * x * x) };
    normal_cdf(x) + density
}

/// `cos(π·x)` in double precision, for the schedules.
pub fn cos_pi(x: f64) -> f64 {
    if !x.is_finite() {
        return f64::NAN;
    }
    let x = (if x < 0.0 { -x } else { x }) % 2.0;
    let x = if x > 1.0 { 2.0 - x } else { x };
    if x > 0.5 { -cos_pi_first_quarter(1.0 - x) } else { cos_pi_first_quarter(x) }
}

/// `x` in `[0, 1/2]`.
fn cos_pi_first_quarter(x: f64) -> f64 {
    use core::f64::consts::PI;
    if x <= 0.25 {
        // cos y = Σ (−1)ᵏ y²ᵏ/(2k)!
        alternating_series((PI * x) * (PI * x), 0.0)
    } else {
        let y = PI * (0.5 - x);
        y * alternating_series(y * y, 1.0)
    }
}

/// `Σₖ (−1)ᵏ uᵏ·s!/(2k+s)!`: cosine for `s = 0`, `sin(y)/y` for `s = 1`; 10 terms reach 1e-19 for `u <= (π/4)²`.
fn alternating_series(u: f64, s: f64) -> f64 {
    let mut value = 1.0;
    for k in (1..10).rev() {
        let k = f64::from(k);
        value = 1.0 - value * u / ((2.0 * k + s) * (2.0 * k - 1.0 + s));
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Distance in units of the last place of the correctly rounded value.
    fn ulps(actual: f32, exact: f64) -> f64 {
        let rounded = exact as f32;
        if actual == rounded {
            return 0.0;
        }
        let ulp = f64::from(f32::from_bits(rounded.abs().to_bits() + 1)) - f64::from(rounded.abs());
        (f64::from(actual) - exact).abs() / ulp
    }

    fn worst(from: f32, to: f32, function: fn(f32) -> f32, exact: impl Fn(f64) -> f64) -> f64 {
        let steps = if cfg!(miri) { 200 } else { 400_000 };
        (0..=steps)
            .map(|i| from + (to - from) * (i as f32 / steps as f32))
            .map(|x| ulps(function(x), exact(f64::from(x))))
            .fold(0.0, f64::max)
    }

    /// Error function in double precision: the Maclaurin series, and a continued fraction in the tail.
    fn erf_f64(x: f64) -> f64 {
        if x.abs() < 3.0 {
            let (mut term, mut sum, mut n) = (x, x, 0.0);
            while term.abs() > 1e-18 {
                n += 1.0;
                term *= -x * x / n;
                sum += term / (2.0 * n + 1.0);
            }
            return sum * core::f64::consts::FRAC_2_SQRT_PI;
        }
        x.signum() * (1.0 - erfc_f64(x.abs()))
    }

    fn erfc_f64(x: f64) -> f64 {
        if x < 3.0 {
            return 1.0 - erf_f64(x);
        }
        let fraction = (1..=60).rev().fold(x, |tail, k| x + f64::from(k) / 2.0 / tail);
        (-x * x).exp() / fraction / core::f64::consts::PI.sqrt()
    }

    #[test]
    fn elementary_functions_keep_their_stated_accuracy() {
        assert!(worst(0.0, 100.0, sqrt, f64::sqrt) <= 0.501);
        assert!(worst(1e-38, 1e-30, sqrt, f64::sqrt) <= 0.501);
        assert!(worst(-87.0, 88.5, exp, f64::exp) <= 1.0);
        assert!(worst(-1.0, 1.0, exp, f64::exp) <= 1.0);
        assert!(worst(-103.0, -87.0, exp, f64::exp) <= 2.0);
        assert!(worst(1e-3, 4.0, ln, f64::ln) <= 1.0);
        assert!(worst(0.9, 1.1, ln, f64::ln) <= 1.0);
        assert!(worst(1e-38, 1e38, ln, f64::ln) <= 1.0);
        assert!(worst(-6.0, 6.0, erf, erf_f64) <= 2.0);
        let normal = |x: f64| {
            if x < -0.5 { 0.5 * erfc_f64(-x / 2f64.sqrt()) } else { 0.5 * (1.0 + erf_f64(x / 2f64.sqrt())) }
        };
        assert!(worst(-12.0, 6.0, normal_cdf, normal) <= 6.0);
    }

    #[test]
    fn special_values_have_their_limits() {
        assert_eq!((exp(f32::INFINITY), exp(f32::NEG_INFINITY), exp(0.0)), (f32::INFINITY, 0.0, 1.0));
        assert_eq!((ln(0.0), ln(f32::INFINITY), ln(1.0)), (f32::NEG_INFINITY, f32::INFINITY, 0.0));
        assert_eq!((sqrt(0.0), sqrt(f32::INFINITY), sqrt(4.0)), (0.0, f32::INFINITY, 2.0));
        assert_eq!((erf(f32::INFINITY), erf(f32::NEG_INFINITY), erf(0.0)), (1.0, -1.0, 0.0));
        assert_eq!((gelu(f32::INFINITY), gelu(f32::NEG_INFINITY), gelu(0.0)), (f32::INFINITY, 0.0, 0.0));
        assert_eq!((gelu_derivative(f32::INFINITY), gelu_derivative(f32::NEG_INFINITY)), (1.0, 0.0));
        for function in [exp, ln, sqrt, erf, normal_cdf, gelu, gelu_derivative] {
            assert!(function(f32::NAN).is_nan());
        }
        assert!(ln(-1.0).is_nan() && sqrt(-1.0).is_nan());
        let smallest = f32::from_bits(1);
        assert!(ulps(ln(smallest), f64::from(smallest).ln()) <= 1.0);
        assert!(ulps(sqrt(smallest), f64::from(smallest).sqrt()) <= 0.501);
    }

    #[test]
    fn gelu_derivative_is_the_slope_of_gelu() {
        for i in -80..80 {
            let x = f64::from(i) / 16.0;
            let exact = |x: f64| 0.5 * x * (1.0 + erf_f64(x / 2f64.sqrt()));
            let slope = (exact(x + 1e-5) - exact(x - 1e-5)) / 2e-5;
            assert!((f64::from(gelu_derivative(x as f32)) - slope).abs() < 1e-6, "at {x}");
        }
    }

    #[test]
    fn cosine_agrees_with_the_standard_library() {
        for i in -3000..3000 {
            let x = f64::from(i) / 1024.0;
            assert!((cos_pi(x) - (core::f64::consts::PI * x).cos()).abs() < 2e-15, "at {x}");
        }
        assert_eq!((cos_pi(0.0), cos_pi(0.5), cos_pi(1.0)), (1.0, 0.0, -1.0));
    }

    #[test]
    fn dot_products_of_every_length_agree_with_double_precision() {
        for n in 0..70 {
            let a: std::vec::Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin()).collect();
            let b: std::vec::Vec<f32> = (0..n).map(|i| (i as f32 * 1.3).cos()).collect();
            let exact: f64 = a.iter().zip(&b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            assert!((f64::from(dot(&a, &b)) - exact).abs() < 1e-5);
        }
    }
}
