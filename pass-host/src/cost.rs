//! What a training step costs: the multiply-adds of its products, counted part by part.
//!
//! Counted is what the mathematics needs when what is the same is computed once (SEMANTICS §12): keys and values of a
//! patch serve the class token and every positive set it is in, and in the first class-attention block all queries of the
//! aggregates are one. Sums, norms, softmax, losses and the optimizer are not products and not counted; neither is
//! anything computed again to save memory.
//!
//! With `N` patches a crop, width `D`, `L` blocks, `k` positives, heads `D → h → h → b → K`:
//!
//! | part | a crop |
//! |---|---|
//! | patch embedding | `N · 3p² · D` |
//! | backbone layers | `N · L · 12D²` (queries, keys, values 3, projection 1, MLP 8) |
//! | backbone attention | `N · L · 2ND` (scores and weighted sum) |
//! | class attention | in each of 2 blocks `N · (2D² + 2D)` (keys, values, attention) and `12D²` for the token itself |
//! | class head | `Dh + h² + hb + bK`; the layers of the projector for a contrastive method, global crops alone |
//! | predictor, student only | its layers, for a contrastive method, global crops alone |
//! | aggregation, teacher only | a patch, in each of 2 blocks, `9D² + 2(k+1)D`, and `3D²` in the second |
//! | patch head | `N · (Dh + h² + hb + bK)` |
//! | matching, teacher only | `D` for each pair of neighbors |
//!
//! Contrastive methods are counted without the similarities to keys, and with the class attention of local crops, which only
//! their teacher forms.
//!
//! A backward pass costs twice the forward pass, once for the inputs and once for the weights; images need no gradient, so
//! the patch embedding has the second alone.

use candle_core::Result;
use serde::Serialize;

use crate::config::{Aggregation, PatchCrops, TrainConfig};
use crate::model::{Architecture, CLASS_ATTENTION_BLOCKS};
use crate::objective::matching::{Matching, neighborhoods};
use crate::objective::method;

/// Multiply-adds of one part of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct PartCost {
    /// What is computed.
    pub part: &'static str,
    /// The student's forward pass.
    pub forward: u64,
    /// The student's backward pass.
    pub backward: u64,
    /// The teacher's forward pass.
    pub teacher: u64,
}

/// Multiply-adds of one step over a whole batch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StepCost {
    /// Sum of all parts.
    pub total: u64,
    /// Each part, in the order of the computation.
    pub parts: Vec<PartCost>,
}

impl StepCost {
    /// The cost of a step with this configuration.
    ///
    /// # Errors
    /// A grid or window that no training could use either.
    pub fn of(config: &TrainConfig) -> Result<Self> {
        let sizes = Architecture::from_config(config);
        let [d, depth] = [sizes.dim, sizes.depth].map(|n| n as u64);
        let head = |prototypes: usize| {
            let [hidden, bottleneck, prototypes] =
                [sizes.head_hidden, sizes.head_bottleneck, prototypes].map(|n| n as u64);
            d * hidden + hidden * hidden + hidden * bottleneck + bottleneck * prototypes
        };
        let method = method::of_config(config);
        let [both_heads, student_head] = method.cost(sizes.dim);
        let blocks = CLASS_ATTENTION_BLOCKS as u64;
        let k = config.patch.k as u64;
        let mut sums = [0; PARTS.len()];
        let groups =
            [(2, config.augment.global_size), (config.augment.local_crops, config.augment.local_size)];
        for (group, (crops, size)) in groups.into_iter().enumerate() {
            let side = size / sizes.patch_size;
            let n = (side * side) as u64;
            let wants_patches = group == 0 || config.patch.crops == PatchCrops::All;
            let prototypes = sizes.patch_prototypes.filter(|_| wants_patches);
            let attends = prototypes.is_some() && config.patch.aggregation == Aggregation::ClassAttention;
            let a_crop = [
                n * 3 * (sizes.patch_size as u64).pow(2) * d,
                n * depth * 12 * d * d,
                n * depth * 2 * n * d,
                blocks * (n * (2 * d * d + 2 * d) + 12 * d * d),
                if group == 0 || method.uses_local_crops() { both_heads } else { 0 },
                if group == 0 || method.uses_local_crops() { student_head } else { 0 },
                if attends {
                    n * (blocks * (9 * d * d + 2 * (k + 1) * d) + (blocks - 1) * 3 * d * d)
                } else {
                    0
                },
                prototypes.map_or(0, |prototypes| n * head(prototypes)),
                if prototypes.is_some() { pairs(config, side)? * d } else { 0 },
            ];
            for (sum, one) in sums.iter_mut().zip(a_crop) {
                *sum += (crops * config.optim.batch) as u64 * one;
            }
        }
        let mut parts: Vec<PartCost> = PARTS.iter().zip(sums).map(|(part, sum)| part.cost(sum)).collect();
        parts.retain(|part| part.part != PREDICTOR || part.forward > 0);
        if sizes.freeze_patch_embed {
            parts[0].backward = 0;
        }
        let total = parts.iter().map(|part| part.forward + part.backward + part.teacher).sum();
        Ok(Self { total, parts })
    }
}

/// Pairs of neighbors on a square grid.
fn pairs(config: &TrainConfig, side: usize) -> Result<u64> {
    let neighbors = neighborhoods((side, side), &Matching::from_config(&config.patch))?;
    Ok(neighbors.iter().map(Vec::len).sum::<usize>() as u64 / 2)
}

/// Who computes a part, and how often.
struct Part {
    name: &'static str,
    /// Forward passes of the student: 0 or 1.
    forward: u64,
    /// Products of a backward pass for each of a forward pass.
    backward: u64,
    /// Forward passes of the teacher: 0 or 1.
    teacher: u64,
}

impl Part {
    fn cost(&self, sum: u64) -> PartCost {
        let [forward, backward, teacher] = [self.forward, self.backward, self.teacher].map(|n| n * sum);
        PartCost { part: self.name, forward, backward, teacher }
    }
}

const fn learned(name: &'static str) -> Part {
    Part { name, forward: 1, backward: 2, teacher: 1 }
}

const fn teacher_only(name: &'static str) -> Part {
    Part { name, forward: 0, backward: 0, teacher: 1 }
}

/// The part that only some methods have.
const PREDICTOR: &str = "predictor";

const PARTS: [Part; 9] = [
    Part { name: "patch embedding", forward: 1, backward: 1, teacher: 1 },
    learned("backbone layers"),
    learned("backbone attention"),
    learned("class attention"),
    learned("class head"),
    Part { name: PREDICTOR, forward: 1, backward: 2, teacher: 0 },
    teacher_only("aggregation"),
    learned("patch head"),
    teacher_only("matching"),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Arch;

    /// Width 2, one block, patches of 4: two global crops of 2 x 2 patches, one local crop of one patch.
    fn tiny() -> TrainConfig {
        let mut config = TrainConfig::default();
        config.model.arch = Arch::Custom;
        (config.model.dim, config.model.depth, config.model.heads) = (2, 1, 1);
        config.model.patch_size = 4;
        (config.augment.global_size, config.augment.local_size, config.augment.local_crops) = (8, 4, 1);
        (config.head.hidden, config.head.bottleneck) = (3, 2);
        (config.head.class_prototypes, config.head.patch_prototypes) = (5, 4);
        config.optim.batch = 1;
        config
    }

    #[test]
    fn the_count_is_that_of_a_hand() {
        // patches: 4 + 4 + 1 = 9
        let by_hand = [
            // 9 patches · 3·4·4 values · 2; the images need no gradient
            ("patch embedding", 864, 864, 864),
            // 9 · 12·2²
            ("backbone layers", 432, 864, 432),
            // each of 8 patches meets 4, the last one itself: 8·(2·4·2) + 2·1·2
            ("backbone attention", 132, 264, 132),
            // 2 blocks: a global crop 4·(2·2² + 2·2) + 12·2² = 96, the local one 12 + 48 = 60
            ("class attention", 504, 1008, 504),
            // 2·3 + 3·3 + 3·2 + 2·5 = 31, three crops
            ("class head", 93, 186, 93),
            // a patch: 2·(9·2² + 2·5·2) + 3·2² = 124
            ("aggregation", 0, 0, 1116),
            // 6 + 9 + 6 + 2·4 = 29
            ("patch head", 261, 522, 261),
            // 2 x 2 patches, each the neighbor of each: 6 pairs · 2 values, twice; one patch has no neighbor
            ("matching", 0, 0, 24),
        ];
        let cost = StepCost::of(&tiny()).unwrap();
        let found: Vec<_> = cost.parts.iter().map(|p| (p.part, p.forward, p.backward, p.teacher)).collect();
        assert_eq!(found, by_hand);
        assert_eq!(cost.total, 2286 + 3708 + 3426);
    }

    #[test]
    fn cost_is_proportional_to_the_batch_and_follows_the_switches() {
        let base = tiny();
        let total = |change: &dyn Fn(&mut TrainConfig)| {
            let mut config = base.clone();
            change(&mut config);
            StepCost::of(&config).unwrap().total
        };
        assert_eq!(total(&|config| config.optim.batch = 7), 7 * 9420);
        assert_eq!(total(&|config| config.patch.enabled = false), 9420 - 1116 - 4 * 261 - 24);
        assert_eq!(total(&|config| config.patch.aggregation = Aggregation::Mean), 9420 - 1116);
        // the local crop's patch: 124 to aggregate, 29 for each of four passes through the head
        assert_eq!(total(&|config| config.patch.crops = PatchCrops::Global), 9420 - 124 - 4 * 29);
    }

    #[test]
    fn the_published_step_is_the_sum_known_from_its_formulas() {
        let mut config = TrainConfig::default();
        config.model.arch = Arch::VitTiny;
        config.head.class_prototypes = 4096;
        config.optim.batch = 4;
        let total = StepCost::of(&config).unwrap().total;
        assert_eq!((total as f64 / 1e8).round(), 948.0, "{total}");
    }
}
