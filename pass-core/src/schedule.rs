//! Schedules as pure functions of the step, in double precision: nothing is tabulated, so a run of any length, or a
//! resumed one, sees the same numbers.
//!
//! They reproduce the reference to the last bit but one, with its two quirks: the first warm-up step has a rate of
//! exactly 0 and the peak appears twice (end of warm-up, start of the cosine), which never quite reaches its end value.

use crate::math::cos_pi;

/// Linear warm-up from 0 to `peak`, then half a cosine to `end`: the learning rate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WarmupCosine {
    /// Value at the end of the warm-up.
    pub peak: f64,
    /// Value the cosine approaches.
    pub end: f64,
    /// Steps of the warm-up; 0 starts at the peak.
    pub warmup_steps: u64,
    /// All steps, warm-up included.
    pub total_steps: u64,
}

impl WarmupCosine {
    /// The value at `step`, counted from 0; `end` from `total_steps` on.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return linear(0.0, self.peak, self.warmup_steps, step);
        }
        if step >= self.total_steps {
            return self.end;
        }
        let progress = (step - self.warmup_steps) as f64 / (self.total_steps - self.warmup_steps) as f64;
        self.end + 0.5 * (self.peak - self.end) * (1.0 + cos_pi(progress))
    }
}

/// Half a cosine from `start` to `end`: weight decay and the momentum of the teacher.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cosine {
    /// Value at step 0.
    pub start: f64,
    /// Value the cosine approaches.
    pub end: f64,
    /// All steps.
    pub total_steps: u64,
}

impl Cosine {
    /// The value at `step`, counted from 0; `end` from `total_steps` on.
    pub fn at(&self, step: u64) -> f64 {
        let Self { start, end, total_steps } = *self;
        WarmupCosine { peak: start, end, warmup_steps: 0, total_steps }.at(step)
    }
}

/// Temperature of the teacher: linear over the first epochs, then constant. Indexed by epoch, not by step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TeacherTemperature {
    /// Value in epoch 0, unless there is no warm-up.
    pub start: f64,
    /// Value from the last warm-up epoch on.
    pub end: f64,
    /// Epochs of the warm-up.
    pub warmup_epochs: u64,
}

impl TeacherTemperature {
    /// The value in `epoch`, counted from 0.
    pub fn at(&self, epoch: u64) -> f64 {
        if epoch < self.warmup_epochs {
            linear(self.start, self.end, self.warmup_epochs, epoch)
        } else {
            self.end
        }
    }
}

/// Peak learning rate by the linear rule: `rate` is stated for a total batch of 256.
pub fn scaled_rate(rate: f64, total_batch: u64) -> f64 {
    rate * total_batch as f64 / 256.0
}

/// Point `index` of `count` evenly spaced ones that include both ends; a single point is the start.
fn linear(start: f64, end: f64, count: u64, index: u64) -> f64 {
    if count <= 1 {
        return start;
    }
    if index == count - 1 {
        return end;
    }
    start + index as f64 * ((end - start) / (count - 1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn warm_up_starts_at_zero_and_the_peak_appears_twice() {
        let rate = WarmupCosine { peak: 2.0, end: 0.0, warmup_steps: 5, total_steps: 9 };
        assert_eq!([0, 1, 2, 3, 4, 5].map(|step| rate.at(step)), [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]);
        assert_eq!(rate.at(7), 1.0);
        assert!(rate.at(8) > 0.0);
        assert_eq!((rate.at(9), rate.at(u64::MAX)), (0.0, 0.0));
    }

    #[test]
    fn degenerate_lengths_have_values() {
        let rate =
            |warmup_steps, total_steps| WarmupCosine { peak: 1.0, end: 0.5, warmup_steps, total_steps };
        assert_eq!(rate(0, 0).at(0), 0.5);
        assert_eq!(rate(1, 1).at(0), 0.0);
        assert_eq!(rate(0, 1).at(0), 1.0);
        assert_eq!(rate(10, 5).at(7), linear(0.0, 1.0, 10, 7));
        assert_eq!(TeacherTemperature { start: 0.04, end: 0.07, warmup_epochs: 1 }.at(0), 0.04);
        assert_eq!(TeacherTemperature { start: 0.04, end: 0.07, warmup_epochs: 0 }.at(0), 0.07);
    }

    #[test]
    fn the_linear_rule_is_stated_per_256() {
        assert_eq!(scaled_rate(0.0005, 1024), 0.002);
    }

    proptest! {
        #[test]
        fn the_cosine_falls_monotonically_between_its_ends(total_steps in 1_u64..5000, start in 0.1_f64..1.0) {
            let cosine = Cosine { start, end: 0.05, total_steps };
            prop_assert!((cosine.at(0) - start).abs() < 1e-15);
            for step in 1..=total_steps {
                prop_assert!(cosine.at(step) <= cosine.at(step - 1) + 1e-15);
            }
        }
    }
}
