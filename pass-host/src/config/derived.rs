//! Values computed from the configuration, never written back into it.

use super::{
    Arch, AugmentConfig, AugmentDevice, CheckpointConfig, ConfigError, DataConfig, GuardConfig, ImageMethod,
    LogConfig, ModelConfig, OptimConfig, ProbeConfig, TrainConfig, layers::display_value,
};
use crate::data::order::Order;
use crate::objective::method;

impl Arch {
    /// `(width, depth, heads)` of a named architecture; `None` for [`Arch::Custom`].
    pub fn dims(self) -> Option<(usize, usize, usize)> {
        match self {
            Arch::VitTiny => Some((192, 12, 3)),
            Arch::VitSmall => Some((384, 12, 6)),
            Arch::VitBase => Some((768, 12, 12)),
            Arch::Custom => None,
        }
    }
}

impl ModelConfig {
    /// `(D, depth, H)`: embedding width, blocks, attention heads.
    pub fn dims(&self) -> (usize, usize, usize) {
        self.arch.dims().unwrap_or((self.dim, self.depth, self.heads))
    }
}

impl OptimConfig {
    /// Images in one micro-batch: `batch / accumulate`.
    pub fn micro_batch(&self) -> usize {
        self.batch / self.accumulate.max(1)
    }

    /// Images of one step over all ranks.
    pub fn total_batch(&self, ranks: usize) -> usize {
        self.batch * ranks
    }

    /// The peak learning rate by the linear rule: `lr_per_256 · total batch / 256`.
    pub fn peak_lr(&self, ranks: usize) -> f64 {
        self.lr_per_256 * self.total_batch(ranks) as f64 / 256.0
    }
}

/// The losses of networks that tell nothing apart, nats.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ChanceLosses {
    /// Of the image-level method: ln K for DINO; NaN if not known.
    pub image: f64,
    /// Of the patch objective, ln K.
    pub patch: f64,
    /// Whether the former is ln K.
    pub image_is_ln_k: bool,
}

impl TrainConfig {
    /// Whether any loss compares distributions over prototypes, which have temperatures, centers and last layers.
    pub fn compares_distributions(&self) -> bool {
        self.patch.enabled || self.image.method == ImageMethod::Dino
    }

    /// The losses of networks that tell nothing apart, with so many images a step over all ranks (NaN = not known).
    pub fn chance_losses(&self, batch: f64) -> ChanceLosses {
        ChanceLosses {
            image: method::of_config(self).chance_loss(batch),
            patch: (self.head.patch_prototypes as f64).ln(),
            image_is_ln_k: self.image.method == ImageMethod::Dino,
        }
    }

    /// `(D, depth, H)`: embedding width, blocks, attention heads.
    pub fn dims(&self) -> (usize, usize, usize) {
        self.model.dims()
    }

    /// Patches along one side of a square crop of `size` pixels.
    pub fn grid(&self, size: usize) -> usize {
        size / self.model.patch_size.max(1)
    }

    /// Images in one micro-batch.
    pub fn micro_batch(&self) -> usize {
        self.optim.micro_batch()
    }

    /// The peak learning rate for the real batch.
    pub fn peak_lr(&self, ranks: usize) -> f64 {
        self.optim.peak_lr(ranks)
    }

    /// Which images make which batch, of all ranks, out of `images`.
    pub fn order(&self, images: usize, ranks: usize) -> Order {
        Order { seed: self.seed, images: images as u64, batch: self.optim.total_batch(ranks).max(1) as u64 }
    }

    /// Steps in one pass over `images` images; the incomplete last batch is dropped, so 0 means too few images.
    pub fn steps_per_epoch(&self, images: usize, ranks: usize) -> usize {
        images / self.optim.total_batch(ranks).max(1)
    }

    /// Optimizer steps of the whole run over `images` images.
    pub fn total_steps(&self, images: usize, ranks: usize) -> usize {
        match self.optim.steps {
            0 => self.optim.epochs * self.steps_per_epoch(images, ranks),
            steps => steps,
        }
    }

    /// The length of the run in passes over the images, for schedules given in epochs.
    pub fn total_epochs(&self, images: usize, ranks: usize) -> f64 {
        self.total_steps(images, ranks) as f64 / self.steps_per_epoch(images, ranks).max(1) as f64
    }

    /// Steps between checkpoints: `checkpoint.every_steps`, or one epoch.
    pub fn checkpoint_interval(&self, images: usize, ranks: usize) -> usize {
        match self.checkpoint.every_steps {
            0 => self.steps_per_epoch(images, ranks).max(1),
            steps => steps,
        }
    }

    /// Checks that `images` images are enough for one batch.
    ///
    /// # Errors
    /// [`ConfigError::TooFewImages`] if they are not.
    pub fn check_images(&self, images: usize, ranks: usize) -> Result<(), ConfigError> {
        let batch = self.optim.total_batch(ranks);
        match images < batch {
            true => Err(ConfigError::TooFewImages { images, batch, ranks }),
            false => Ok(()),
        }
    }

    /// Checks what an image-level method asks of the batch of all ranks: batch normalization has nothing to normalize with
    /// one image, and queues are replaced in whole batches.
    ///
    /// # Errors
    /// [`ConfigError::BatchOfOne`] and [`ConfigError::Queue`].
    pub fn check_batch(&self, ranks: usize) -> Result<(), ConfigError> {
        let (method, batch) = (self.image.method, self.optim.total_batch(ranks));
        if method != ImageMethod::Dino && batch < 2 {
            return Err(ConfigError::BatchOfOne { method: method.name() });
        }
        let queue = self.image.queue;
        match method == ImageMethod::Moby && !queue.is_multiple_of(batch.max(1)) {
            true => Err(ConfigError::Queue { queue, batch, ranks }),
            false => Ok(()),
        }
    }

    /// This configuration with everything at its default that may change between two parts of one run: where the
    /// images lie (their content is hashed by the data manifest), loading, where crops are made, checkpoints, logging, probes and the guard.
    fn resumable(&self) -> Self {
        Self {
            data: DataConfig {
                limit: self.data.limit,
                max_megapixels: self.data.max_megapixels,
                ..DataConfig::default()
            },
            augment: AugmentConfig { device: AugmentDevice::default(), ..self.augment.clone() },
            checkpoint: CheckpointConfig::default(),
            log: LogConfig::default(),
            probe: ProbeConfig::default(),
            guard: GuardConfig::default(),
            optim: OptimConfig { batch: 1, accumulate: 1, ..self.optim.clone() },
            recompute: false,
            ..self.clone()
        }
    }

    /// Hash (xxh3, 16 hex digits) of everything that a resumed run must share with the run it continues.
    pub fn config_hash(&self) -> String {
        format!("{:016x}", xxhash_rust::xxh3::xxh3_64(self.resumable().canonical().as_bytes()))
    }

    /// The keys in which `self` differs from the `stored` configuration of a run in a way that forbids continuing
    /// it: `(key, stored value, value now)`. Empty exactly if the [`config_hash`](Self::config_hash)es agree.
    pub fn resume_differences(&self, stored: &Self) -> Vec<(String, String, String)> {
        let (now, then) = (self.resumable(), stored.resumable());
        let (now, then) = (now.to_table(), then.to_table());
        super::keys::all_keys()
            .filter_map(|key| {
                let (a, b) = (display_value(&then, &key), display_value(&now, &key));
                (a != b).then_some((key, a, b))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::presets;

    #[test]
    fn paper_values_follow_the_linear_rule() {
        let config = TrainConfig::default();
        assert_eq!(config.dims(), (384, 12, 6));
        assert_eq!(config.grid(224), 14);
        assert!((config.peak_lr(1) - 0.002).abs() < 1e-15);
        assert_eq!(config.steps_per_epoch(1_281_167, 1), 1251);
        assert_eq!(config.total_steps(1_281_167, 1), 250_200);
        assert_eq!(config.checkpoint_interval(1_281_167, 1), 1251);
    }

    #[test]
    fn steps_win_over_epochs() {
        let mut config = TrainConfig::default();
        config.optim.steps = 7;
        config.optim.batch = 10;
        assert_eq!(config.total_steps(25, 1), 7);
        assert_eq!(config.total_epochs(25, 1), 3.5);
        assert!(config.check_images(10, 1).is_ok());
        assert!(config.check_images(9, 1).is_err());
    }

    #[test]
    fn ranks_multiply_the_batch() {
        let mut config = TrainConfig::default();
        (config.optim.batch, config.optim.epochs) = (128, 200);
        assert_eq!(config.optim.total_batch(8), 1024);
        assert_eq!(config.peak_lr(8), TrainConfig::default().peak_lr(1));
        assert_eq!(config.total_steps(1_281_167, 8), 250_200);
        assert!(config.check_images(1024, 8).is_ok());
        let error = config.check_images(1000, 8).unwrap_err();
        assert!(error.to_string().contains("one batch of 1024 (8 ranks of 128)"), "{error}");
        assert!(error.hint().unwrap().contains("--batch 125"));
    }

    #[test]
    fn batches_must_suit_the_method() {
        let mut config = TrainConfig::default();
        (config.optim.batch, config.image.queue) = (1, 100);
        assert!(config.check_batch(1).is_ok(), "DINO takes any batch");
        config.image.method = ImageMethod::MocoV3;
        let error = config.check_batch(1).unwrap_err();
        assert!(error.to_string().contains("`moco_v3`") && error.hint().is_some(), "{error}");
        assert!(config.check_batch(3).is_ok(), "three ranks have three images");
        config.image.method = ImageMethod::Moby;
        config.optim.batch = 8;
        let error = config.check_batch(3).unwrap_err();
        assert!(error.to_string().contains("multiple of 24 (3 ranks of 8), found 100"), "{error}");
        assert!(error.hint().unwrap().contains("image.queue=120"), "{:?}", error.hint());
        config.image.queue = 96;
        assert!(config.check_batch(3).is_ok());
    }

    #[test]
    fn the_hash_ignores_what_may_change_on_resume() {
        let base = presets::find("demo").unwrap().config();
        let mut moved = base.clone();
        moved.data.images = vec!["elsewhere".into()];
        moved.data.workers = 7;
        moved.data.prefetch = 9;
        moved.augment.device = AugmentDevice::Gpu;
        moved.log.every_steps = 1;
        moved.checkpoint.every_steps = 3;
        moved.probe.every_steps = 5;
        (moved.optim.batch, moved.optim.accumulate) = (12, 2);
        moved.guard.on_collapse = crate::config::OnCollapse::Warn;
        assert_eq!(base.config_hash(), moved.config_hash());
        assert!(moved.resume_differences(&base).is_empty());

        let mut changed = base.clone();
        changed.optim.momentum = 0.9;
        changed.seed = 5;
        assert_ne!(base.config_hash(), changed.config_hash());
        let keys: Vec<_> = changed.resume_differences(&base).into_iter().map(|d| d.0).collect();
        assert_eq!(keys, ["seed", "optim.momentum"]);
    }
}
