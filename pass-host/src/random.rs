//! Randomness as a pure function of (seed, epoch, image, crop, purpose): no generator state exists, so nothing of it
//! can be lost by a kill or depend on the number of workers.

/// What a stream of random numbers is for; different purposes never share numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Purpose {
    /// Order of the images within an epoch.
    Shuffle = 1,
    /// Geometry and color of a crop.
    Augment = 2,
    /// Stochastic depth of the student.
    DropPath = 3,
    /// Initial weights.
    Init = 4,
    /// Which images a calibration or probe uses.
    Subset = 5,
}

/// A stream of numbers, keyed once and then counted (SplitMix64 over a mixed key).
#[derive(Clone, Debug)]
pub struct Stream {
    state: u64,
}

/// SplitMix64's finalizer: a bijection of 64 bits with full avalanche.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The odd increment of SplitMix64 (2^64 / golden ratio).
const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

impl Stream {
    /// The stream of `purpose` for the given coordinates, for example `[epoch, image, crop]`.
    pub fn new(seed: u64, purpose: Purpose, coordinates: &[u64]) -> Self {
        let mut state = mix(seed.wrapping_add(STEP).wrapping_mul(purpose as u64 * 2 + 1));
        for &coordinate in coordinates {
            state = mix(state.wrapping_add(STEP) ^ mix(coordinate.wrapping_add(STEP)));
        }
        Self { state }
    }

    /// 64 uniform bits.
    pub fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(STEP);
        mix(self.state)
    }

    /// Uniform in `[0, 1)`, 53 bits.
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform in `[low, high)`.
    pub fn range(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.uniform()
    }

    /// Uniform integer in `0..n` (`n > 0`), without modulo bias beyond 2^-64.
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.bits()) * u128::from(n)) >> 64) as u64
    }

    /// True with probability `p`.
    pub fn chance(&mut self, p: f64) -> bool {
        self.uniform() < p
    }

    /// Standard normal (Box–Muller, the cosine branch).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }
}

/// The image at `position` of epoch `epoch`, as a permutation of `0..len` that needs no memory: a 4-round Feistel
/// network over the next even power of two, walked until it lands inside (cycle walking).
pub fn shuffled(seed: u64, epoch: u64, position: u64, len: u64) -> u64 {
    debug_assert!(position < len);
    let half = (64 - (len.max(2) - 1).leading_zeros()).div_ceil(2);
    let mask = (1u64 << half) - 1;
    let key = Stream::new(seed, Purpose::Shuffle, &[epoch]).state;
    let mut value = position;
    loop {
        let (mut left, mut right) = (value >> half, value & mask);
        for round in 0..4u64 {
            let f = mix(right ^ key.wrapping_add(round.wrapping_mul(STEP))) & mask;
            (left, right) = (right, left ^ f);
        }
        value = (left << half) | right;
        if value < len {
            return value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shuffle_is_a_permutation() {
        for len in [1u64, 2, 3, 7, 64, 65, 1000] {
            let mut seen = vec![false; len as usize];
            for position in 0..len {
                let image = shuffled(3, 1, position, len) as usize;
                assert!(!seen[image], "image {image} twice of {len}");
                seen[image] = true;
            }
        }
    }

    #[test]
    fn epochs_and_seeds_have_different_orders() {
        let order = |seed, epoch| (0..100).map(|p| shuffled(seed, epoch, p, 100)).collect::<Vec<_>>();
        assert_ne!(order(0, 0), order(0, 1));
        assert_ne!(order(0, 0), order(1, 0));
        assert_eq!(order(5, 2), order(5, 2));
    }

    #[test]
    fn streams_are_independent_and_uniform() {
        let mut stream = Stream::new(0, Purpose::Augment, &[0, 1, 2]);
        let mean = (0..100_000).map(|_| stream.uniform()).sum::<f64>() / 1e5;
        assert!((mean - 0.5).abs() < 0.005, "mean {mean}");
        let (mut sum, mut squares) = (0.0, 0.0);
        for _ in 0..100_000 {
            let x = stream.normal();
            sum += x;
            squares += x * x;
        }
        assert!((sum / 1e5).abs() < 0.02 && (squares / 1e5 - 1.0).abs() < 0.03);
        let first = |purpose, coordinates: &[u64]| Stream::new(0, purpose, coordinates).bits();
        assert_ne!(first(Purpose::Augment, &[0, 1]), first(Purpose::Augment, &[1, 0]));
        assert_ne!(first(Purpose::Augment, &[0]), first(Purpose::DropPath, &[0]));
    }
}
