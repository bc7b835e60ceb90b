//! Named starting points. Everything in a preset can be overridden.

use super::{
    Aggregation, AllPatches, Arch, AugmentConfig, CheckpointConfig, ClipBy, HeadConfig, ImageMethod,
    ImageObjective, LogConfig, ModelConfig, OptimConfig, PatchObjective, Positions, TrainConfig, WeightInit,
    Window,
};

/// A named configuration.
#[derive(Clone, Copy, Debug)]
pub struct Preset {
    /// The name given to `--preset`.
    pub name: &'static str,
    /// What it is, in one line.
    pub about: &'static str,
    build: fn() -> TrainConfig,
}

impl Preset {
    /// The configuration.
    pub fn config(&self) -> TrainConfig {
        (self.build)()
    }
}

/// The preset used when images are given but no preset.
pub const DEFAULT: &str = "paper-vit-s16";

/// The preset used when no images are given: the bundled photos.
pub const DEMO: &str = "demo";

/// Every preset.
pub const PRESETS: [Preset; 15] = [
    Preset {
        name: DEFAULT,
        about: "the paper on ImageNet: ViT-S/16, batch 1024, 200 epochs, K 65536/4096, 2 local crops",
        build: TrainConfig::default,
    },
    Preset {
        name: "paper-vit-ti16-coco",
        about: "the paper's ablations on COCO: ViT-Ti/16, batch 256, 200 epochs, K 4096/4096",
        build: paper_vit_ti16_coco,
    },
    Preset {
        name: "release-vit-s16",
        about: "the released weights: ViT-S/16, 8 local crops, constant teacher temperature, 300 epochs",
        build: release_vit_s16,
    },
    Preset {
        name: "moco-v3-vit-s16",
        about: "MoCo-v3: ViT-S/16 with 12 heads, frozen patch embedding, batch 4096, 300 epochs",
        build: moco_v3_vit_s16,
    },
    Preset {
        name: "moco-v3-pass-vit-s16",
        about: "the same with the patch objective of PASS and 2 local crops",
        build: || with_pass(moco_v3_vit_s16()),
    },
    Preset {
        name: "moby-vit-s16",
        about: "MoBY: ViT-S/16, two queues of 4096 keys, batch 512, 300 epochs",
        build: moby_vit_s16,
    },
    Preset {
        name: "moby-pass-vit-s16",
        about: "the same with the patch objective of PASS and 2 local crops",
        build: || with_pass(moby_vit_s16()),
    },
    Preset {
        name: DEMO,
        about: "a small network on small crops: about two minutes on two CPU cores with the bundled photos",
        build: demo,
    },
    Preset {
        name: "ablation-no-neighbor",
        about: "Table 3, without Neighbor: positives are sought among all patches of the crop",
        build: || ablation(|patch| patch.window = Window::All(AllPatches::All)),
    },
    Preset {
        name: "ablation-no-matching",
        about: "Table 3, without Matching: all 8 neighbors are positives (as ablation-k8)",
        build: || ablation(|patch| patch.k = 8),
    },
    Preset {
        name: "ablation-no-aggregation",
        about: "Table 3, without Aggregation: the plain mean of the positives is the target",
        build: || ablation(|patch| patch.aggregation = Aggregation::Mean),
    },
    Preset {
        name: "ablation-k1",
        about: "Table 3, one positive a patch",
        build: || ablation(|patch| patch.k = 1),
    },
    Preset {
        name: "ablation-k2",
        about: "Table 3, two positives a patch",
        build: || ablation(|patch| patch.k = 2),
    },
    Preset {
        name: "ablation-k4",
        about: "Table 3, four positives a patch: the method itself (as paper-vit-ti16-coco)",
        build: || ablation(|patch| patch.k = 4),
    },
    Preset {
        name: "ablation-k8",
        about: "Table 3, all 8 neighbors as positives",
        build: || ablation(|patch| patch.k = 8),
    },
];

/// The preset called `name`.
pub fn find(name: &str) -> Option<&'static Preset> {
    PRESETS.iter().find(|preset| preset.name == name)
}

fn paper_vit_ti16_coco() -> TrainConfig {
    let base = TrainConfig::default();
    TrainConfig {
        model: ModelConfig { arch: Arch::VitTiny, dim: 192, depth: 12, heads: 3, ..base.model },
        head: HeadConfig { class_prototypes: 4096, patch_prototypes: 4096, ..base.head },
        optim: OptimConfig { batch: 256, ..base.optim },
        ..base
    }
}

/// A row of the paper's Table 3: its ablations on COCO with another patch objective.
fn ablation(change: fn(&mut PatchObjective)) -> TrainConfig {
    let mut config = paper_vit_ti16_coco();
    change(&mut config.patch);
    config
}

fn release_vit_s16() -> TrainConfig {
    let base = TrainConfig::default();
    TrainConfig {
        augment: AugmentConfig { local_crops: 8, ..base.augment },
        image: ImageObjective {
            teacher_temp_start: 0.04,
            teacher_temp_end: 0.04,
            teacher_temp_warmup_epochs: 0.0,
            ..base.image
        },
        optim: OptimConfig { epochs: 300, min_lr: 1e-6, ..base.optim },
        ..base
    }
}

/// The recipe of the MoCo-v3 paper for ViT-S; the learning rate for 256 images is that of the published code.
fn moco_v3_vit_s16() -> TrainConfig {
    let base = TrainConfig::default();
    TrainConfig {
        augment: AugmentConfig { local_crops: 0, global_scale: [0.08, 1.0], ..base.augment },
        model: ModelConfig {
            arch: Arch::Custom,
            heads: 12,
            drop_path: 0.0,
            positions: Positions::SinCos,
            freeze_patch_embed: true,
            init: WeightInit::Xavier,
            ..base.model
        },
        image: ImageObjective { method: ImageMethod::MocoV3, ..base.image },
        patch: PatchObjective { enabled: false, ..base.patch },
        optim: OptimConfig {
            batch: 4096,
            epochs: 300,
            lr_per_256: 1.5e-4,
            min_lr: 0.0,
            warmup_epochs: 40.0,
            weight_decay: 0.1,
            weight_decay_end: 0.1,
            momentum: 0.99,
            clip: 0.0,
            ..base.optim
        },
        ..base
    }
}

/// The recipe of the MoBY paper for DeiT-S. Its learning rate of 0.001 is that of its batch, 512.
fn moby_vit_s16() -> TrainConfig {
    let base = TrainConfig::default();
    TrainConfig {
        augment: AugmentConfig { local_crops: 0, global_scale: [0.08, 1.0], ..base.augment },
        model: ModelConfig { drop_path: 0.2, ..base.model },
        image: ImageObjective { method: ImageMethod::Moby, ..base.image },
        patch: PatchObjective { enabled: false, ..base.patch },
        optim: OptimConfig {
            batch: 512,
            epochs: 300,
            lr_per_256: 5e-4,
            min_lr: 5e-6,
            warmup_epochs: 5.0,
            weight_decay: 0.05,
            weight_decay_end: 0.05,
            momentum: 0.99,
            clip: 5.0,
            clip_by: ClipBy::Global,
            ..base.optim
        },
        ..base
    }
}

/// A method with the patch objective on top; local crops serve that alone.
fn with_pass(method: TrainConfig) -> TrainConfig {
    let base = TrainConfig::default();
    TrainConfig {
        augment: AugmentConfig { local_crops: base.augment.local_crops, ..method.augment },
        patch: base.patch,
        ..method
    }
}

/// Few photos and few steps: milder crops, no stochastic depth and a slower center let the class token, too, learn
/// within two minutes.
fn demo() -> TrainConfig {
    let base = TrainConfig::default();
    TrainConfig {
        augment: AugmentConfig {
            global_size: 96,
            local_size: 48,
            global_scale: [0.6, 1.0],
            local_scale: [0.25, 0.6],
            jitter: 0.4,
            gray: 0.1,
            blur: [0.3, 0.1, 0.2],
            ..base.augment
        },
        model: ModelConfig { arch: Arch::Custom, dim: 128, depth: 6, heads: 4, drop_path: 0.0, ..base.model },
        head: HeadConfig { hidden: 512, class_prototypes: 512, patch_prototypes: 512, ..base.head },
        image: ImageObjective {
            teacher_temp_end: 0.04,
            teacher_temp_warmup_epochs: 0.0,
            center_momentum: 0.95,
            ..base.image
        },
        optim: OptimConfig {
            batch: 16,
            steps: 400,
            lr_per_256: 0.008,
            warmup_epochs: 1.0,
            weight_decay_end: 0.04,
            momentum: 0.99,
            ..base.optim
        },
        checkpoint: CheckpointConfig { every_steps: 100, ..base.checkpoint },
        log: LogConfig { every_steps: 5, ..base.log },
        ..base
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ablations_differ_in_the_patch_objective_alone() {
        let full = paper_vit_ti16_coco();
        let ablations: Vec<_> =
            PRESETS.iter().filter(|preset| preset.name.starts_with("ablation-")).collect();
        assert_eq!(ablations.len(), 7);
        for preset in ablations {
            let config = preset.config();
            let restored = TrainConfig { patch: full.patch.clone(), ..config.clone() };
            assert_eq!(restored, full, "{}", preset.name);
            let same = config.patch == full.patch;
            assert_eq!(same, preset.name == "ablation-k4", "{}", preset.name);
        }
    }
}
