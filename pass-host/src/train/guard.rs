//! Notices collapse: what is seen, for how long, what it means and what to try.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Distance from the loss of a blind guess (ln K) below which a loss counts as stuck there.
const FLAT_LOSS: f64 = 1e-3;
/// Share of ln K: a teacher entropy above `1 - UNIFORM` of it is uniform, below `UNIFORM` of it is a single prototype.
const UNIFORM: f64 = 1e-3;
/// Features whose standard deviation is below this share of 1/√D are (nearly) all the same.
pub(crate) const DEAD_SPREAD: f64 = 0.1;

/// Which of the two objectives a sign was seen in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Term {
    /// The class token.
    Image,
    /// The patches.
    Patch,
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Image => "class",
            Self::Patch => "patch",
        })
    }
}

/// One sign of collapse.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sign {
    /// The loss sits at that of a blind guess (ln K).
    FlatLoss(Term),
    /// The teacher's distribution is uniform.
    UniformTeacher(Term),
    /// The teacher puts everything on one prototype.
    OneHotTeacher(Term),
    /// All patch features are (nearly) equal.
    EqualFeatures,
}

impl fmt::Display for Sign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FlatLoss(term) => {
                write!(f, "the {term} loss is stuck at ln K: the student predicts nothing")
            }
            Self::UniformTeacher(term) => {
                write!(f, "the teacher's {term} outputs are uniform: there is nothing to predict")
            }
            Self::OneHotTeacher(term) => {
                write!(f, "the teacher's {term} outputs are one single prototype for everything")
            }
            Self::EqualFeatures => f.write_str("all patches of all images have the same features"),
        }
    }
}

impl Sign {
    /// What to try against it.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::FlatLoss(_) => {
                "lower `image.teacher_temp_end` (0.04 is safest) or `optim.lr_per_256`, use fewer prototypes \
                 (`head.class_prototypes`, `head.patch_prototypes`) for a small data set, or a longer warm-up"
            }
            Self::UniformTeacher(_) => {
                "lower `image.teacher_temp_start` and `image.teacher_temp_end`, or lower `image.center_momentum`"
            }
            Self::OneHotTeacher(_) => {
                "raise `image.teacher_temp_start`, lower `image.center_momentum` so that the centers follow faster, \
                 or raise `optim.batch`"
            }
            Self::EqualFeatures => {
                "lower `optim.lr_per_256`, raise `optim.momentum` (0.9995 for batches below 256) or `optim.batch`"
            }
        }
    }
}

/// The figures that are watched; all natural logarithms.
#[derive(Clone, Copy, Debug)]
pub struct Vitals {
    /// Class loss, teacher entropy and the loss of a blind guess.
    pub image: TermVitals,
    /// The same of the patch objective.
    pub patch: Option<TermVitals>,
    /// Standard deviation of the normalized patch features.
    pub feature_std: f64,
    /// Width D of the features.
    pub dim: usize,
}

/// Figures of one objective.
#[derive(Clone, Copy, Debug)]
pub struct TermVitals {
    /// Loss.
    pub loss: f64,
    /// Mean entropy of the teacher's distributions; NaN where there are none.
    pub teacher_entropy: f64,
    /// Loss of networks that tell nothing apart: ln K over K prototypes.
    pub chance: f64,
}

/// A sign that lasted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Alarm {
    /// What was seen.
    pub sign: Sign,
    /// Step at which it was first seen without interruption.
    pub since: u64,
}

/// Signs seen at the last look and since when.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CollapseGuard {
    patience: u64,
    seen: Vec<(Sign, u64)>,
}

impl CollapseGuard {
    /// Raises an alarm when a sign lasts `patience` steps.
    pub fn new(patience: usize) -> Self {
        Self { patience: patience as u64, seen: Vec::new() }
    }

    /// Looks at the figures of `step`; tells the sign that has lasted longest, once it has lasted long enough.
    pub fn observe(&mut self, step: u64, vitals: &Vitals) -> Option<Alarm> {
        let since =
            |sign: &Sign| self.seen.iter().find(|(seen, _)| seen == sign).map_or(step, |(_, since)| *since);
        self.seen = signs(vitals).into_iter().map(|sign| (sign, since(&sign))).collect();
        let &(sign, since) = self.seen.iter().min_by_key(|(_, since)| *since)?;
        (step - since >= self.patience).then_some(Alarm { sign, since })
    }
}

/// The signs that the figures show.
pub(crate) fn signs(vitals: &Vitals) -> Vec<Sign> {
    let mut signs = Vec::new();
    let terms = [(Term::Image, Some(vitals.image)), (Term::Patch, vitals.patch)];
    for (term, figures) in
        terms.into_iter().filter_map(|(term, figures)| figures.map(|figures| (term, figures)))
    {
        if (figures.loss - figures.chance).abs() < FLAT_LOSS {
            signs.push(Sign::FlatLoss(term));
        }
        if figures.teacher_entropy > (1.0 - UNIFORM) * figures.chance {
            signs.push(Sign::UniformTeacher(term));
        }
        if figures.teacher_entropy < UNIFORM * figures.chance {
            signs.push(Sign::OneHotTeacher(term));
        }
    }
    if vitals.feature_std < DEAD_SPREAD / (vitals.dim as f64).sqrt() {
        signs.push(Sign::EqualFeatures);
    }
    signs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn healthy() -> Vitals {
        let term = TermVitals { loss: 6.0, teacher_entropy: 4.0, chance: 8.3 };
        Vitals { image: term, patch: Some(term), feature_std: 0.05, dim: 192 }
    }

    #[test]
    fn healthy_runs_raise_nothing() {
        let mut guard = CollapseGuard::new(2);
        for step in 0..50 {
            assert_eq!(guard.observe(step, &healthy()), None);
        }
    }

    #[test]
    fn each_sign_is_recognized_after_the_patience() {
        let cases = [
            (
                Sign::FlatLoss(Term::Image),
                Vitals { image: TermVitals { loss: 8.3005, ..healthy().image }, ..healthy() },
            ),
            (
                Sign::UniformTeacher(Term::Patch),
                Vitals {
                    patch: Some(TermVitals { teacher_entropy: 8.2999, ..healthy().image }),
                    ..healthy()
                },
            ),
            (
                Sign::OneHotTeacher(Term::Image),
                Vitals { image: TermVitals { teacher_entropy: 1e-4, ..healthy().image }, ..healthy() },
            ),
            (Sign::EqualFeatures, Vitals { feature_std: 0.1 / 192f64.sqrt() * 0.99, ..healthy() }),
        ];
        for (sign, vitals) in cases {
            let mut guard = CollapseGuard::new(200);
            assert_eq!(guard.observe(10, &vitals), None, "{sign}");
            assert_eq!(guard.observe(209, &vitals), None, "{sign}");
            assert_eq!(guard.observe(210, &vitals), Some(Alarm { sign, since: 10 }), "{sign}");
        }
    }

    #[test]
    fn an_interruption_starts_the_count_again() {
        let sick = Vitals { feature_std: 0.0, ..healthy() };
        let mut guard = CollapseGuard::new(10);
        guard.observe(0, &sick);
        guard.observe(5, &healthy());
        assert_eq!(guard.observe(11, &sick), None);
        assert_eq!(guard.observe(21, &sick), Some(Alarm { sign: Sign::EqualFeatures, since: 11 }));
    }
}
