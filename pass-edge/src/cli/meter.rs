//! Frames a second and milliseconds a frame.

use std::time::{Duration, Instant};

use super::output;

/// How often a line is shown.
const PERIOD: Duration = Duration::from_secs(1);
/// Bits of the mantissa that tell bins of the histogram apart: 64 bins an octave, at most 1.6 % wide. Bits, not logarithms:
/// those would load the library of mathematics, 0.3 MiB of memory for nothing else.
const MANTISSA_BITS: u32 = 6;
/// Lower end of the histogram, in milliseconds.
const LEAST_MS: f64 = 0.001;
/// Enough bins for an hour: 32 octaves.
const BINS: usize = 32 << MANTISSA_BITS;
/// Bits of the mantissa below those.
const REST: u32 = f64::MANTISSA_DIGITS - 1 - MANTISSA_BITS;

/// Measures from [`Meter::begin`] to [`Meter::end`]; shows nothing unless it is on.
pub(super) struct Meter {
    on: bool,
    begun: Instant,
    start: Instant,
    period_start: Instant,
    period: Histogram,
    all: Histogram,
}

impl Meter {
    pub(super) fn new(on: bool) -> Self {
        let now = Instant::now();
        let (period, all) = (Histogram::default(), Histogram::default());
        Self { on, begun: now, start: now, period_start: now, period, all }
    }

    /// An image or frame is there.
    pub(super) fn begin(&mut self) {
        self.begun = Instant::now();
    }

    /// Its features are written.
    pub(super) fn end(&mut self) {
        if !self.on {
            return;
        }
        let now = Instant::now();
        let ms = now.duration_since(self.begun).as_secs_f64() * 1e3;
        self.period.add(ms);
        self.all.add(ms);
        let elapsed = now.duration_since(self.period_start);
        if elapsed >= PERIOD {
            output::note(&self.period.line(elapsed));
            self.period = Histogram::default();
            self.period_start = now;
        }
    }

    /// Shows the whole.
    pub(super) fn finish(&self) {
        if self.on {
            output::note(&format!("all: {}", self.all.line(self.start.elapsed())));
        }
    }
}

/// Durations in bins of about equal ratio: bounded memory for any number of them.
#[derive(Default)]
struct Histogram {
    /// Empty before the first.
    bins: Vec<u64>,
    count: u64,
    sum_ms: f64,
}

impl Histogram {
    fn add(&mut self, ms: f64) {
        let bin = ((ms / LEAST_MS).max(1.0).to_bits() - 1_f64.to_bits()) >> REST;
        self.bins.resize(BINS, 0);
        self.bins[(bin as usize).min(BINS - 1)] += 1;
        self.count += 1;
        self.sum_ms += ms;
    }

    /// The duration that `share` of all stay below, to 1 %.
    fn quantile(&self, share: f64) -> f64 {
        let rank = (share * self.count as f64).ceil() as u64;
        let mut seen = 0;
        let bin = self.bins.iter().position(|count| {
            seen += count;
            seen >= rank
        });
        let middle = ((bin.unwrap_or(0) as u64) << REST) + (1 << (REST - 1));
        LEAST_MS * f64::from_bits(1_f64.to_bits() + middle)
    }

    fn line(&self, elapsed: Duration) -> String {
        format!(
            "{} frames, {:.1} frames/s, mean {:.2} ms, p95 {:.2} ms",
            self.count,
            self.count as f64 / elapsed.as_secs_f64(),
            self.sum_ms / self.count.max(1) as f64,
            self.quantile(0.95)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_within_a_bin() {
        let mut histogram = Histogram::default();
        (1..=1000).for_each(|ms| histogram.add(f64::from(ms)));
        assert!((histogram.quantile(0.95) / 950.0 - 1.0).abs() < 0.01);
        assert!((histogram.quantile(0.5) / 500.0 - 1.0).abs() < 0.01);
        let line = histogram.line(Duration::from_secs(500));
        assert!(line.starts_with("1000 frames, 2.0 frames/s, mean 500.50 ms, p95 9"), "{line}");
        histogram.add(0.0);
        histogram.add(f64::MAX);
        assert!(histogram.quantile(1.0).is_finite());
    }
}
