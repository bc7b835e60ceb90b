//! Every hyper-parameter of `eval segment`: its starting points and their meaning.

use serde::{Deserialize, Serialize};

/// What turns features into classes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum HeadKind {
    /// One linear layer on the features of the last block.
    Linear,
    /// Semantic FPN on four blocks (SEMANTICS §7).
    Fpn,
}

/// A named starting point; `fpn` has two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum SegmentPreset {
    /// The published recipe: crops of 512, 40 000 iterations of 16.
    Paper,
    /// Crops of 224, 600 iterations of 4: minutes to an hour on a CPU.
    Small,
}

/// All of a segmentation run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SegmentConfig {
    /// The head.
    pub head: HeadKind,
    /// Whether the backbone learns too.
    pub fine_tune: bool,
    /// Optimizer steps.
    pub iterations: u64,
    /// Pictures a step.
    pub batch: usize,
    /// Learning rate after warm-up; falls linearly to 0 (polynomial of power 1).
    pub lr: f64,
    /// Steps of linear warm-up.
    pub warmup: u64,
    /// Share of the learning rate at the first step.
    pub warmup_ratio: f64,
    /// Weight decay of everything but position embeddings.
    pub weight_decay: f64,
    /// AdamW's β₁ and β₂.
    pub betas: [f64; 2],
    /// AdamW's ε.
    pub eps: f64,
    /// Side of a training crop in pixels.
    pub crop: usize,
    /// Shorter side of a whole picture in pixels, the longer at most four times that; 0 = the picture's own size.
    pub size: usize,
    /// Range of the random scale, relative to `size`.
    pub scale: [f64; 2],
    /// A crop in which one class covers more than this share is drawn again, ten times at most.
    pub cat_max_ratio: f64,
    /// Probability of mirroring.
    pub flip: f64,
    /// Whether brightness, contrast, saturation and hue change.
    pub photometric: bool,
    /// Stochastic depth of the last block while the backbone learns below an FPN.
    pub drop_path: f64,
    /// Probability that a channel is dropped before the last layer of the FPN head.
    pub dropout: f64,
    /// Channels of the feature pyramid.
    pub neck_channels: usize,
    /// Channels of the FPN head.
    pub head_channels: usize,
    /// Seed of everything random.
    pub seed: u64,
    /// Memory for the features of whole pictures, in GiB; what does not fit is computed again.
    pub cache_gib: f64,
    /// Steps from one checkpoint to the next.
    pub checkpoint_every: u64,
}

impl SegmentConfig {
    /// The starting point of a head; the linear head has one preset.
    pub fn preset(head: HeadKind, preset: SegmentPreset) -> Self {
        let paper = Self {
            head,
            fine_tune: true,
            iterations: 40_000,
            batch: 16,
            lr: 6e-5,
            warmup: 1500,
            warmup_ratio: 1e-6,
            weight_decay: 0.01,
            betas: [0.9, 0.999],
            eps: 1e-8,
            crop: 512,
            size: 512,
            scale: [0.5, 2.0],
            cat_max_ratio: 0.75,
            flip: 0.5,
            photometric: true,
            drop_path: 0.1,
            dropout: 0.1,
            neck_channels: 256,
            head_channels: 128,
            seed: 0,
            cache_gib: 4.0,
            checkpoint_every: 2000,
        };
        match (head, preset) {
            (HeadKind::Linear, _) => Self {
                fine_tune: false,
                iterations: 1000,
                lr: 1e-2,
                warmup: 50,
                size: 0,
                checkpoint_every: 500,
                ..paper
            },
            (HeadKind::Fpn, SegmentPreset::Paper) => paper,
            (HeadKind::Fpn, SegmentPreset::Small) => Self {
                iterations: 600,
                batch: 4,
                lr: 3e-4,
                warmup: 60,
                crop: 224,
                size: 288,
                checkpoint_every: 200,
                ..paper
            },
        }
    }

    /// Whether features of whole pictures are computed once and used again: nothing changes them.
    pub fn caches_features(&self) -> bool {
        self.head == HeadKind::Linear && !self.fine_tune
    }

    /// Learning rate of step `step`, counted from 0: `lr · (1 − step / iterations)`, during warm-up reduced as mmcv
    /// does, by `1 − (1 − step / warmup) · (1 − ratio)`.
    pub fn lr_at(&self, step: u64) -> f64 {
        let regular = self.lr * (1.0 - step as f64 / self.iterations as f64).max(0.0);
        if step >= self.warmup {
            return regular;
        }
        regular * (1.0 - (1.0 - step as f64 / self.warmup as f64) * (1.0 - self.warmup_ratio))
    }

    /// The first field that makes no sense: its flag, what it may be, what it is.
    pub fn invalid(&self) -> Option<(&'static str, &'static str, String)> {
        let ranges = [
            ("--iterations", "1 or more", self.iterations as f64, self.iterations > 0),
            ("--batch", "1 or more", self.batch as f64, self.batch > 0),
            ("--lr", "a positive number", self.lr, self.lr > 0.0 && self.lr.is_finite()),
            ("--crop", "16 to 4096 pixels", self.crop as f64, (16..=4096).contains(&self.crop)),
            (
                "--size",
                "0 (as it is) or 16 to 4096 pixels",
                self.size as f64,
                self.size == 0 || (16..=4096).contains(&self.size),
            ),
            ("--cache", "0 or more GiB", self.cache_gib, self.cache_gib >= 0.0),
        ];
        let bad = ranges.into_iter().find(|(.., valid)| !valid);
        bad.map(|(flag, expected, found, _)| (flag, expected, found.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_learning_rate_warms_up_and_falls_to_zero() {
        let config = SegmentConfig::preset(HeadKind::Fpn, SegmentPreset::Paper);
        assert!((config.lr_at(0) - 6e-5 * 1e-6).abs() < 1e-15);
        let half = 6e-5 * (1.0 - 750.0 / 40_000.0) * (1.0 - 0.5 * (1.0 - 1e-6));
        assert!((config.lr_at(750) - half).abs() < 1e-12);
        assert!((config.lr_at(1500) - 6e-5 * (1.0 - 1500.0 / 40_000.0)).abs() < 1e-15);
        assert!((config.lr_at(39_999) - 6e-5 / 40_000.0).abs() < 1e-15);
    }

    #[test]
    fn only_the_frozen_linear_head_caches() {
        let caches = |head, fine_tune| {
            SegmentConfig { fine_tune, ..SegmentConfig::preset(head, SegmentPreset::Small) }.caches_features()
        };
        assert!(caches(HeadKind::Linear, false));
        assert!(!caches(HeadKind::Linear, true) && !caches(HeadKind::Fpn, false));
    }

    #[test]
    fn presets_are_valid_and_nonsense_is_named() {
        for head in [HeadKind::Linear, HeadKind::Fpn] {
            for preset in [SegmentPreset::Paper, SegmentPreset::Small] {
                let config = SegmentConfig::preset(head, preset);
                assert_eq!(config.invalid(), None);
                let (flag, ..) = SegmentConfig { batch: 0, ..config.clone() }.invalid().unwrap();
                assert_eq!(flag, "--batch");
                let (flag, ..) = SegmentConfig { lr: f64::NAN, ..config }.invalid().unwrap();
                assert_eq!(flag, "--lr");
            }
        }
    }
}
