//! Crops through student and teacher to the two losses: the body of a training step.

use candle_core::{DType, Device, Result, Tensor};

use super::center;
use super::loss::patch_pairs;
use super::matching::{self, Matching};
use super::method::{self, ClassTokens, Context, Figures, ImageMethod, Momentum, State, entry};
use crate::config::{Aggregation, MatchingSource, PatchCrops, TrainConfig};
use crate::distributed::Ranks;
use crate::model::Network;
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

/// The center of the patch logits in the state.
pub const PATCH_CENTER: &str = "patch";

/// The numbers of the objective, taken from the configuration once.
pub struct Objective {
    /// The image-level method.
    method: Box<dyn ImageMethod>,
    /// Outputs K of the patch head; `None` without the patch objective.
    patch_prototypes: Option<usize>,
    /// Momentum of the patch center.
    center_momentum: f64,
    /// Student temperature τ_s of the patch objective.
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
            method: method::of_config(config),
            patch_prototypes: config.patch.enabled.then_some(config.head.patch_prototypes),
            center_momentum: config.image.center_momentum,
            student_temp: config.image.student_temp,
            patch_weight: config.patch.weight,
            matching: Matching::from_config(&config.patch),
            matching_source: config.patch.matching,
            aggregation: config.patch.aggregation,
            patch_crops: config.patch.crops,
        }
    }

    /// When the teacher follows the student.
    pub fn momentum(&self) -> Momentum {
        self.method.momentum()
    }

    /// The state before the first step: that of the image-level method and the patch center.
    pub fn initial_state(&self, device: &Device) -> Result<State> {
        let mut state = self.method.initial_state(device)?;
        if let Some(prototypes) = self.patch_prototypes {
            state.insert(PATCH_CENTER.into(), Tensor::zeros(prototypes, DType::F32, device)?);
        }
        Ok(state)
    }

    /// The state after a step that was applied, from what its micro-batches have [seen](Losses::seen).
    pub fn updated(&self, state: &State, seen: &[&State], ranks: &Ranks) -> Result<State> {
        let mut after = self.method.updated(state, seen, ranks)?;
        if state.contains_key(PATCH_CENTER) {
            let center = center::after_step(state, seen, PATCH_CENTER, self.center_momentum, ranks)?;
            after.insert(PATCH_CENTER.into(), center);
        }
        Ok(after)
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
    /// What the next state is made of.
    pub seen: State,
    /// What the log tells of the class loss.
    pub image_figures: Figures,
    /// Entropy and divergence of the patch distributions.
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
    class: Option<Tensor>,   // [crops·B, D]
    patches: Option<Tensor>, // [crops·B·N, D]
}

impl Objective {
    /// Both losses of a micro-batch (SEMANTICS §4); gradients flow into the student only.
    pub fn losses(
        &self,
        student: &Network,
        teacher: &Network,
        state: &State,
        crops: &Crops,
        teacher_temp: f64,
        ops: Ops,
        ranks: &Ranks,
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
            let wants_class = index == 0 || self.method.uses_local_crops();
            student_tokens.push(student_side(student, student_features, [wants_class, wants_patches])?);
            teacher_tokens.push(self.teacher_side(teacher, teacher_features, positives.as_ref(), ops)?);
            if index == 0 {
                monitor_source = Some((teacher_features.clone(), positives));
            }
        }
        let student_tokens = concatenate(student_tokens)?;
        let teacher_tokens = concatenate(teacher_tokens)?;

        let (Some(student_class), Some(teacher_class)) = (&student_tokens.class, &teacher_tokens.class)
        else {
            candle_core::bail!("a batch without crops has no loss");
        };
        let class_tokens = ClassTokens {
            student: student_class,
            teacher: teacher_class,
            batch: crops.batch,
            global_crops: crops.global.crops,
            local_crops: crops.local.as_ref().map_or(0, |group| group.crops),
        };
        let context = Context { student, teacher, state, teacher_temp, ops, ranks };
        let image = self.method.loss(&class_tokens, &context)?;
        let mut seen = image.seen;

        let temperatures = [self.student_temp, teacher_temp];
        let (mut total, mut patch, mut patch_stats) = (image.loss.clone(), None, None);
        let mut patch_targets = None;
        if let (Some(student_head), Some(teacher_head), Some(learned), Some(target)) =
            (&student.patch_head, &teacher.patch_head, &student_tokens.patches, &teacher_tokens.patches)
        {
            let targets = teacher_head.forward(target)?; // [Σ crops·B·N, K]
            let (pairs, weights) = patch_pairs(crops.batch, &patch_groups);
            let (loss, stats) = student_head.loss(
                learned,
                &Targets {
                    teacher: &targets,
                    center: entry(state, PATCH_CENTER)?,
                    temperatures,
                    pairs: &pairs,
                    weights: weights.as_slice().into(),
                },
            )?;
            total = (total + (&loss * self.patch_weight)?)?;
            patch = Some(loss);
            patch_stats = Some(stats);
            seen.insert(PATCH_CENTER.into(), ops.mean_rows(&targets)?);
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
            image: image.loss,
            patch,
            seen,
            image_figures: image.figures,
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
        normalized(teacher, Some(&aggregated.class), patches.as_ref())
    }
}

/// Student: the class token over all patches; its patch tokens are the features themselves.
fn student_side(
    student: &Network,
    features: &Tensor,
    [wants_class, wants_patches]: [bool; 2],
) -> Result<Tokens> {
    let aggregated = wants_class.then(|| student.aggregation.forward(features, None)).transpose()?;
    let class = aggregated.as_ref().map(|aggregated| &aggregated.class);
    normalized(student, class, wants_patches.then_some(features))
}

fn normalized(network: &Network, class: Option<&Tensor>, patches: Option<&Tensor>) -> Result<Tokens> {
    let rows = |tokens: &Tensor| network.aggregation.normalize(tokens)?.flatten(0, 1);
    Ok(Tokens { class: class.map(rows).transpose()?, patches: patches.map(rows).transpose()? })
}

/// Rows of all groups, one after the other, so that each head runs once.
fn concatenate(groups: Vec<Tokens>) -> Result<Tokens> {
    let class: Vec<_> = groups.iter().filter_map(|group| group.class.as_ref()).collect();
    let patches: Vec<_> = groups.iter().filter_map(|group| group.patches.as_ref()).collect();
    let joined = |rows: Vec<&Tensor>| (!rows.is_empty()).then(|| Tensor::cat(&rows, 0)).transpose();
    Ok(Tokens { class: joined(class)?, patches: joined(patches)? })
}
