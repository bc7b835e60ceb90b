//! Crops through student and teacher to the two losses: the body of a training step.

use candle_core::{Result, Tensor};

use super::center::Centers;
use super::loss::{class_pairs, patch_pairs};
use super::matching::{self, Matching};
use crate::config::{Aggregation, MatchingSource, PatchCrops, TrainConfig};
use crate::model::Network;
use crate::model::head::ProjectionHead;
use crate::model::vit::CropPatches;
use crate::ops::{Ops, Positives, Statistics, Targets};

/// Crops of one size, `[crops · B, 3, side, side]`, crop-major (all images of the first crop come first).
pub struct CropGroup {
    /// The images, normalized.
    pub images: Tensor,
    /// Crops of each image.
    pub crops: usize,
    /// Uniform draws for the student's stochastic depth, `[applications][crops · B]`; `None` = off.
    pub drop_path: Option<Vec<Vec<f64>>>,
}

/// A micro-batch: the global crops, then the local crops if there are any.
pub struct Crops {
    /// Images B.
    pub batch: usize,
    /// Two global crops an image.
    pub global: CropGroup,
    /// Local crops.
    pub local: Option<CropGroup>,
}

/// The numbers of the objective, taken from the configuration once.
#[derive(Clone, Debug)]
pub struct Objective {
    /// Student temperature τ_s.
    pub student_temp: f64,
    /// Weight λ of the patch loss.
    pub patch_weight: f64,
    /// How positives are chosen.
    pub matching: Matching,
    /// Whose features choose them.
    pub matching_source: MatchingSource,
    /// How positives become one target.
    pub aggregation: Aggregation,
    /// Which crops carry a patch loss.
    pub patch_crops: PatchCrops,
}

impl Objective {
    /// The objective a configuration asks for.
    pub fn from_config(config: &TrainConfig) -> Self {
        Self {
            student_temp: config.image.student_temp,
            patch_weight: config.patch.weight,
            matching: Matching::from_config(&config.patch),
            matching_source: config.patch.matching,
            aggregation: config.patch.aggregation,
            patch_crops: config.patch.crops,
        }
    }
}

/// Losses of a micro-batch, still on the graph, and what the rest of the step needs.
pub struct Losses {
    /// `image + λ · patch`, a scalar to differentiate.
    pub total: Tensor,
    /// Class loss.
    pub image: Tensor,
    /// Patch loss, unweighted.
    pub patch: Option<Tensor>,
    /// Means of the teacher's outputs, for the centers.
    pub teacher_mean: Centers,
    /// Entropy and divergence of the class distributions.
    pub image_stats: Statistics,
    /// The same for the patch distributions.
    pub patch_stats: Option<Statistics>,
    /// What the log derives more figures from.
    pub monitor: Monitor,
}

/// Teacher outputs of the global crops, kept for the figures of the log.
pub struct Monitor {
    /// Last-block features, `[2B, N, D]`.
    pub features: Tensor,
    /// The positives chosen on them and the patch logits, `[2B · N, K]`.
    pub patch: Option<(Positives, Tensor)>,
}

/// Outputs of one network for one group of crops, before the projection heads.
struct Tokens {
    class: Tensor,           // [crops·B, D]
    patches: Option<Tensor>, // [crops·B·N, D]
}

impl Objective {
    /// Both losses of a micro-batch (SEMANTICS §4); gradients flow into the student only.
    pub fn losses(
        &self,
        student: &Network,
        teacher: &Network,
        centers: &Centers,
        crops: &Crops,
        teacher_temp: f64,
        ops: Ops,
    ) -> Result<Losses> {
        let groups: Vec<&CropGroup> = std::iter::once(&crops.global).chain(crops.local.as_ref()).collect();
        let (mut student_tokens, mut teacher_tokens) = (Vec::new(), Vec::new());
        let mut patch_groups = Vec::new();
        let mut monitor_source = None;
        let mut patches = Vec::with_capacity(groups.len());
        for group in &groups {
            patches.push(student.backbone.patchify(&group.images)?);
        }
        let draws = groups.iter().map(|group| group.drop_path.as_deref());
        let crops_of = |draws: &mut dyn Iterator<Item = _>| -> Vec<_> {
            let with_draws = patches.iter().zip(draws);
            with_draws.map(|((patches, grid), draws)| CropPatches { patches, grid: *grid, draws }).collect()
        };
        // the teacher first: its passing buffers are gone before the student keeps its own
        let teacher_features = teacher.backbone.forward_crops(&crops_of(&mut std::iter::repeat(None)))?;
        let student_features = student.backbone.forward_crops(&crops_of(&mut draws.into_iter()))?;
        for (index, group) in groups.iter().enumerate() {
            let wants_patches =
                student.patch_head.is_some() && (index == 0 || self.patch_crops == PatchCrops::All);
            let grid = patches[index].1;
            let (student_features, teacher_features) = (&student_features[index], &teacher_features[index]);
            let positives = if wants_patches {
                patch_groups.push((group.crops, grid.0 * grid.1));
                let source = match self.matching_source {
                    MatchingSource::Teacher => teacher_features,
                    MatchingSource::Student => &student_features.detach(),
                };
                Some(matching::positives_where_computed(source, grid, &self.matching, ops)?)
            } else {
                None
            };
            student_tokens.push(student_side(student, student_features, wants_patches)?);
            teacher_tokens.push(self.teacher_side(teacher, teacher_features, positives.as_ref(), ops)?);
            if index == 0 {
                monitor_source = Some((teacher_features.clone(), positives));
            }
        }
        let student_tokens = concatenate(student_tokens)?;
        let teacher_tokens = concatenate(teacher_tokens)?;

        let global_rows = crops.batch * crops.global.crops;
        let (class_targets, class_mean) =
            class_targets(&teacher.class_head, &teacher_tokens.class, global_rows, ops)?;
        let local_crops = crops.local.as_ref().map_or(0, |group| group.crops);
        let (pairs, weight) = class_pairs(crops.batch, crops.global.crops, local_crops);
        let temperatures = [self.student_temp, teacher_temp];
        let (image, image_stats) = student.class_head.loss(
            &student_tokens.class,
            &Targets {
                teacher: &class_targets,
                center: &centers.class,
                temperatures,
                pairs: &pairs,
                weights: weight.into(),
            },
        )?;

        let (mut total, mut patch, mut patch_stats) = (image.clone(), None, None);
        let mut patch_mean = None;
        let mut patch_targets = None;
        if let (Some(student_head), Some(teacher_head), Some(center), Some(learned), Some(target)) = (
            &student.patch_head,
            &teacher.patch_head,
            &centers.patch,
            &student_tokens.patches,
            &teacher_tokens.patches,
        ) {
            let targets = teacher_head.forward(target)?; // [Σ crops·B·N, K]
            let (pairs, weights) = patch_pairs(crops.batch, &patch_groups);
            let (loss, stats) = student_head.loss(
                learned,
                &Targets {
                    teacher: &targets,
                    center,
                    temperatures,
                    pairs: &pairs,
                    weights: weights.as_slice().into(),
                },
            )?;
            total = (total + (&loss * self.patch_weight)?)?;
            patch = Some(loss);
            patch_stats = Some(stats);
            patch_mean = Some(ops.mean_rows(&targets)?);
            patch_targets = Some(targets);
        }
        let Some((features, positives)) = monitor_source else {
            candle_core::bail!("a batch without crops has no loss");
        };
        let patch_monitor = match (positives, patch_targets) {
            (Some(positives), Some(targets)) => {
                let (batch, patches, _) = features.dims3()?;
                Some((positives, targets.narrow(0, 0, batch * patches)?))
            }
            _ => None,
        };
        Ok(Losses {
            total,
            image,
            patch,
            teacher_mean: Centers { class: class_mean, patch: patch_mean },
            image_stats,
            patch_stats,
            monitor: Monitor { features, patch: patch_monitor },
        })
    }

    /// Teacher: the class token over all patches and one aggregate of the positives for every patch.
    fn teacher_side(
        &self,
        teacher: &Network,
        features: &Tensor,
        positives: Option<&Positives>,
        ops: Ops,
    ) -> Result<Tokens> {
        let by_attention = positives.filter(|_| self.aggregation == Aggregation::ClassAttention);
        let aggregated = teacher.aggregation.forward(features, by_attention)?;
        let patches = match (aggregated.patches, positives) {
            (Some(patches), _) => Some(patches),
            (None, Some(positives)) => Some(ops.gather_mean(features, positives)?),
            (None, None) => None,
        };
        normalized(teacher, &aggregated.class, patches.as_ref())
    }
}

/// Class logits of the teacher's first `targets` rows, and the mean of the logits of all rows: those of the local crops
/// are wanted for the center alone, and logits are linear in the unit vectors (SEMANTICS §12).
fn class_targets(
    head: &ProjectionHead,
    tokens: &Tensor,
    targets: usize,
    ops: Ops,
) -> Result<(Tensor, Tensor)> {
    let unit = head.unit(tokens)?;
    let mean = head.unit_logits(&ops.mean_rows(&unit)?.unsqueeze(0)?)?;
    Ok((head.unit_logits(&unit.narrow(0, 0, targets)?)?, mean.squeeze(0)?))
}

/// Student: the class token over all patches; its patch tokens are the features themselves.
fn student_side(student: &Network, features: &Tensor, wants_patches: bool) -> Result<Tokens> {
    let aggregated = student.aggregation.forward(features, None)?;
    normalized(student, &aggregated.class, wants_patches.then_some(features))
}

fn normalized(network: &Network, class: &Tensor, patches: Option<&Tensor>) -> Result<Tokens> {
    let rows = |tokens: &Tensor| network.aggregation.normalize(tokens)?.flatten(0, 1);
    Ok(Tokens { class: rows(class)?, patches: patches.map(rows).transpose()? })
}

/// Rows of all groups, one after the other, so that each head runs once.
fn concatenate(groups: Vec<Tokens>) -> Result<Tokens> {
    let class: Vec<_> = groups.iter().map(|group| &group.class).collect();
    let patches: Vec<_> = groups.iter().filter_map(|group| group.patches.as_ref()).collect();
    let patches = if patches.is_empty() { None } else { Some(Tensor::cat(&patches, 0)?) };
    Ok(Tokens { class: Tensor::cat(&class, 0)?, patches })
}
