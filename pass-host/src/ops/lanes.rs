//! Elementary functions and reductions over `f32` slices, written so that the compiler vectorizes them.
//!
//! The functions are inlined into the expression given to [`widest!`], which compiles it for each set of vector
//! instructions and picks the widest that the processor has. Reductions keep [`LANES`] partial sums whatever the
//! processor, so only fused multiply-adds could make two kinds of processor differ.

/// Partial sums of a reduction.
pub(super) const LANES: usize = 32;

/// Evaluates an expression compiled for the widest vector instructions of this processor.
///
/// Everything between the entry point for a set of instructions and the arithmetic must be inlined; what is not stays a
/// function for the baseline processor, where each `mul_add` is a call. Hence `#[inline(always)]` on the closure here,
/// [`Kernel`] below, and the same on the functions that the expression uses.
macro_rules! widest {
    ($kernel:expr) => {
        pulp::Arch::new().dispatch(crate::ops::lanes::Kernel(
            #[inline(always)]
            || $kernel,
        ))
    };
}
pub(crate) use widest;

/// Passes a closure through `pulp` as `FnMut`: calling it as `FnOnce`, as `pulp` does with plain closures, goes through
/// a shim that does not inherit `#[inline(always)]`.
pub(crate) struct Kernel<F>(pub(crate) F);

impl<R, F: FnMut() -> R> pulp::WithSimd for Kernel<F> {
    type Output = R;

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(mut self, _simd: S) -> R {
        (self.0)()
    }
}

/// Below this, `exp` would not be a normal number.
const EXP_LOW: f32 = -86.6;
/// Above this, `exp` would overflow.
const EXP_HIGH: f32 = 88.5;
/// Adding 1.5 · 2^23 leaves the nearest integer in the low bits of the mantissa.
const ROUND: f32 = 12_582_912.0;
/// ln 2 in two parts; the first has trailing zeros, so that its product with a small integer is exact.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;
/// `(e^r − 1 − r) / r²` for `|r| ≤ ln 2 / 2`, relative error of `e^r` 3e-9 (minimax fit).
const EXP: [f32; 5] = [0.499_999_94, 0.166_665_2, 0.041_668_393, 0.008_368_781, 0.001_381_446_7];

/// `e^x` within 2 ulp for `x` in `[-86.6, 88.5]`, the value at the nearer bound outside; NaN stays NaN.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // comparisons rather than `clamp`/`max`: they keep NaN
    let x = if x < EXP_LOW { EXP_LOW } else { x };
    let x = if x > EXP_HIGH { EXP_HIGH } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN_2_LOW, n.mul_add(-LN_2_HIGH, x));
    let p = EXP[4].mul_add(r, EXP[3]).mul_add(r, EXP[2]).mul_add(r, EXP[1]).mul_add(r, EXP[0]);
    let y = (r * r).mul_add(p, r) + 1.0;
    // times 2^n: n is added to the exponent
    f32::from_bits(y.to_bits().wrapping_add(shifted.to_bits() << 23))
}

/// Slope of the substitution `t = 1 / (1 + s·|x|)` under the polynomial of [`normal`].
const TAIL_SLOPE: f32 = 0.231_641_9;
/// `Φ(−|x|) / (e^{−x²/2} · t)` as a polynomial in `t`, relative error 7e-8 (minimax fit).
const TAIL: [f32; 8] = [
    0.092_549_12,
    0.090_050_05,
    0.104_758_01,
    0.007_110_383_4,
    0.236_677_58,
    -0.213_437_81,
    0.254_233_8,
    -0.071_941_13,
];

/// `(Φ(x), e^{−x²/2})`: the normal distribution function (absolute error about 1e-7) and its unscaled density.
#[inline(always)]
pub(super) fn normal(x: f32) -> (f32, f32) {
    let density = exp(-0.5 * x * x);
    let t = 1.0 / TAIL_SLOPE.mul_add(x.abs(), 1.0);
    let mut p = TAIL[7];
    for i in (0..7).rev() {
        p = p.mul_add(t, TAIL[i]);
    }
    let tail = density * t * p;
    (if x > 0.0 { 1.0 - tail } else { tail }, density)
}

/// Folds a vector in half: `N` must be twice `H`. Fixed sizes let the compiler keep it all in registers.
#[inline(always)]
pub(super) fn halve<const N: usize, const H: usize>(
    wide: [f32; N],
    fold: impl Fn(f32, f32) -> f32,
) -> [f32; H] {
    std::array::from_fn(
        #[inline(always)]
        |i| fold(wide[i], wide[i + H]),
    )
}

/// Folds all lanes, always in the same order.
#[inline(always)]
fn fold_lanes(lanes: [f32; LANES], fold: impl Fn(f32, f32) -> f32 + Copy) -> f32 {
    let lanes: [f32; 16] = halve(lanes, fold);
    let lanes: [f32; 8] = halve(lanes, fold);
    let lanes: [f32; 4] = halve(lanes, fold);
    let lanes: [f32; 2] = halve(lanes, fold);
    fold(lanes[0], lanes[1])
}

/// The rest of a slice after its whole chunks, filled up. (Adding the rest to single lanes instead would make the
/// compiler keep the lanes in memory, one by one.)
#[inline(always)]
fn filled_up(rest: &[f32], with: f32) -> [f32; LANES] {
    let mut chunk = [with; LANES];
    chunk[..rest.len()].copy_from_slice(rest);
    chunk
}

/// Sum of the values.
#[inline(always)]
pub(super) fn sum(values: &[f32]) -> f32 {
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] += chunk[i];
        }
    }
    if !rest.is_empty() {
        let chunk = filled_up(rest, 0.0);
        for i in 0..LANES {
            lanes[i] += chunk[i];
        }
    }
    fold_lanes(
        lanes,
        #[inline(always)]
        |a, b| a + b,
    )
}

/// Sum of the products of `a` and `b`, which are equally long.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a_chunks, a_rest), (b_chunks, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut lanes = [0.0f32; LANES];
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for i in 0..LANES {
            lanes[i] = a[i].mul_add(b[i], lanes[i]);
        }
    }
    if !a_rest.is_empty() {
        let (a, b) = (filled_up(a_rest, 0.0), filled_up(b_rest, 0.0));
        for i in 0..LANES {
            lanes[i] = a[i].mul_add(b[i], lanes[i]);
        }
    }
    fold_lanes(
        lanes,
        #[inline(always)]
        |a, b| a + b,
    )
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// Largest value, `-∞` of none; NaN are passed over (their `exp` brings them back).
#[inline(always)]
pub(super) fn max(values: &[f32]) -> f32 {
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = larger(lanes[i], chunk[i]);
        }
    }
    if !rest.is_empty() {
        let chunk = filled_up(rest, f32::NEG_INFINITY);
        for i in 0..LANES {
            lanes[i] = larger(lanes[i], chunk[i]);
        }
    }
    fold_lanes(lanes, larger)
}

/// `to[i] += factor · from[i]`.
#[inline(always)]
pub(super) fn add_multiple(to: &mut [f32], factor: f32, from: &[f32]) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to = factor.mul_add(from, *to);
    }
}

/// Turns scores into probabilities: softmax over the whole slice.
#[inline(always)]
pub(super) fn softmax(scores: &mut [f32]) {
    let largest = max(scores);
    for score in scores.iter_mut() {
        *score = exp(*score - largest);
    }
    let inverse = 1.0 / sum(scores);
    for score in scores.iter_mut() {
        *score *= inverse;
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::numbers;
    use super::*;

    #[test]
    fn exp_is_exact_to_two_ulp() {
        let mut worst = 0.0f64;
        for i in 0..=200_000 {
            let x = -86.0 + 174.0 * (i as f32) / 200_000.0;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(widest!(exp(x))) - exact).abs() / exact);
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "relative error {worst:e}");
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(f32::NEG_INFINITY) < 1e-37 && exp(1e30) > 1e38);
    }

    #[test]
    fn normal_distribution_is_exact_to_f32() {
        // values of Φ to 12 digits
        for (x, phi) in [
            (0.0, 0.5),
            (0.1, 0.539_827_837_277),
            (0.5, 0.691_462_461_274),
            (1.0, 0.841_344_746_069),
            (-1.0, 0.158_655_253_931),
            (-2.0, 0.022_750_131_948),
            (-3.0, 0.001_349_898_032),
            (-5.0, 2.866_515_719e-7),
            (4.0, 0.999_968_328_758),
        ] {
            let found = f64::from(normal(x).0);
            assert!(
                (found - phi).abs() < 1.2e-7 && (found - phi).abs() < 2e-6 * phi,
                "Φ({x}) = {found}, not {phi}"
            );
        }
        assert_eq!(normal(50.0).0, 1.0);
        assert!(normal(-50.0).0 < 1e-37);
        assert!(normal(f32::NAN).0.is_nan());
    }

    #[test]
    fn reductions_match_plain_loops_at_every_tail() {
        for len in [0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 196, 1000] {
            let (a, b) = (numbers(1, len), numbers(2, len));
            let exact: f64 = a.iter().map(|&v| f64::from(v)).sum();
            assert!((f64::from(widest!(sum(&a))) - exact).abs() < 1e-4, "sum of {len}");
            let exact: f64 = a.iter().zip(&b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
            assert!((f64::from(widest!(dot(&a, &b))) - exact).abs() < 1e-4, "dot of {len}");
            assert_eq!(widest!(max(&a)), a.iter().copied().fold(f32::NEG_INFINITY, f32::max), "max of {len}");
            let mut p = a.clone();
            widest!(softmax(&mut p));
            if len > 0 {
                assert!((p.iter().sum::<f32>() - 1.0).abs() < 1e-5, "softmax of {len}");
            }
        }
    }

    #[test]
    fn softmax_shows_nan_and_survives_extreme_scores() {
        let mut scores = [1.0, f32::NAN, 2.0];
        softmax(&mut scores);
        assert!(scores[0].is_nan() && scores[1].is_nan());
        let mut scores = [1e30, -1e30, 1e30];
        softmax(&mut scores);
        assert_eq!([scores[0], scores[2]], [0.5, 0.5]);
        assert!(scores[1] < 1e-37);
    }
}
