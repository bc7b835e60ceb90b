//! What the numbers mean, in words. The signs of collapse are those of the guard ([`crate::train::guard`]).

use super::log::Log;
use crate::config::{ModelConfig, TrainConfig};
use crate::model::Architecture;
use crate::train::guard::{Sign, Term, TermVitals, Vitals, signs};

/// Share of the time spent waiting for data that is worth a word.
const SLOW_DATA: f64 = 0.2;
/// Share of ln K by which a loss must have left it.
const MOVED: f64 = 0.02;
/// Agreement of the positives above which the patch targets say nothing new.
const TRIVIAL: f64 = 0.98;

/// How serious a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// As it should be.
    Good,
    /// Worth knowing.
    Note,
    /// Look at it.
    Warning,
    /// The run does not learn.
    Bad,
}

impl Level {
    /// Its name on the page.
    pub fn name(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Bad => "bad",
        }
    }
}

/// One sentence about the run.
#[derive(Clone, Debug, PartialEq)]
pub struct Finding {
    /// How serious.
    pub level: Level,
    /// What is the case.
    pub text: String,
    /// What to try.
    pub advice: Option<String>,
}

/// The judgement of a run.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// The most serious of the findings.
    pub level: Level,
    /// In one sentence.
    pub headline: String,
    /// Why.
    pub findings: Vec<Finding>,
}

/// Counts from other files of the run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Facts {
    /// Lines of the list of bad images.
    pub bad_images: usize,
    /// Steps that were not applied.
    pub skipped: usize,
}

/// Step, epoch and network, in one line.
pub fn subtitle(log: &Log, config: Option<&TrainConfig>) -> String {
    let mut parts = Vec::new();
    if let Some(step) = log.steps().last() {
        let of = match config {
            Some(config) if config.optim.steps > 0 => format!(" of {}", config.optim.steps),
            _ => String::new(),
        };
        let epoch = log.last("epoch").map_or(String::new(), |epoch| format!(", epoch {epoch:.1}"));
        let epochs = match config {
            Some(config) if config.optim.steps == 0 => format!(" of {}", config.optim.epochs),
            _ => String::new(),
        };
        parts.push(format!("step {step}{of}{epoch}{epochs}"));
    }
    if let Some(config) = config {
        let Architecture { dim, depth, heads, patch_size, .. } = Architecture::from_config(config);
        let ModelConfig { arch, .. } = &config.model;
        let name = match arch {
            crate::config::Arch::VitTiny => "ViT-Ti",
            crate::config::Arch::VitSmall => "ViT-S",
            crate::config::Arch::VitBase => "ViT-B",
            crate::config::Arch::Custom => "ViT",
        };
        let method = if config.patch.enabled { "DINO + PASS" } else { "DINO" };
        parts.push(format!("{method}, {name}/{patch_size} ({dim} wide, {depth} deep, {heads} heads)"));
        parts.push(format!("crops of {} and {} px", config.augment.global_size, config.augment.local_size));
        parts.push(format!("batch {}", config.optim.batch));
    }
    parts.join(" · ")
}

/// Judges a run by its log.
pub fn judge(log: &Log, config: Option<&TrainConfig>, facts: Facts) -> Verdict {
    let mut findings = Vec::new();
    let mut headline = None;
    if log.is_empty() {
        headline = Some("Nothing has been logged yet");
        findings.push(note("There is no log step to judge."));
    } else if let Some(config) = config {
        let lasting = lasting_signs(log, config);
        let patience = config.guard.collapse_steps as u64;
        let last = log.steps().last().copied().unwrap_or(0);
        for (sign, since) in &lasting {
            let long = last - since >= patience;
            findings.push(Finding {
                level: if long { Level::Bad } else { Level::Warning },
                text: format!("Since step {since}, {sign}."),
                advice: Some(sign.advice().into()),
            });
        }
        findings.extend(losses(log, config, &lasting));
        findings.extend(spread(log, config, &lasting));
        findings.extend(agreement(log));
    } else {
        findings.push(note("Without its configuration the run cannot be judged: K and D are unknown."));
    }
    findings.extend(bookkeeping(log, facts));
    let level = findings.iter().map(|finding| finding.level).max().unwrap_or(Level::Note);
    let headline = headline.unwrap_or(match (level, config.is_some()) {
        (_, false) => "Not judged: there is no configuration",
        (Level::Bad, _) => "The features have collapsed",
        (Level::Warning, _) => "Look at this: something may be wrong",
        _ => "No sign of collapse: the features are alive",
    });
    Verdict { level, headline: headline.into(), findings }
}

fn note(text: impl Into<String>) -> Finding {
    Finding { level: Level::Note, text: text.into(), advice: None }
}

fn good(text: impl Into<String>) -> Finding {
    Finding { level: Level::Good, text: text.into(), advice: None }
}

/// The figures of log step `index`; a figure that is missing is NaN and shows no sign.
fn vitals(log: &Log, config: &TrainConfig, index: usize) -> Vitals {
    let at = |key: &str| log.at(key, index).unwrap_or(f64::NAN);
    let term = |loss: &str, entropy: &str, chance: f64| TermVitals {
        loss: at(loss),
        teacher_entropy: at(entropy),
        chance,
    };
    let chance = config.chance_losses(f64::NAN);
    Vitals {
        image: term("loss_image", "teacher_entropy_image", chance.image),
        patch: config.patch.enabled.then(|| term("loss_patch", "teacher_entropy_patch", chance.patch)),
        feature_std: at("feature_std"),
        dim: Architecture::from_config(config).dim,
    }
}

/// The signs of the last log step and the step since which each has been there without a break.
fn lasting_signs(log: &Log, config: &TrainConfig) -> Vec<(Sign, u64)> {
    let mut seen: Vec<(Sign, u64)> = Vec::new();
    for (index, step) in log.steps().iter().enumerate() {
        let since =
            |sign: &Sign| seen.iter().find(|(seen, _)| seen == sign).map_or(*step, |(_, since)| *since);
        seen = signs(&vitals(log, config, index)).into_iter().map(|sign| (sign, since(&sign))).collect();
    }
    seen
}

/// Where each loss stands between its start, ln K and the teacher's entropy.
fn losses(log: &Log, config: &TrainConfig, lasting: &[(Sign, u64)]) -> Vec<Finding> {
    let chance = config.chance_losses(f64::NAN);
    let name = if chance.image_is_ln_k { "ln K" } else { "chance" };
    let terms = [
        (Term::Image, "loss_image", "teacher_entropy_image", (name, chance.image), true),
        (Term::Patch, "loss_patch", "teacher_entropy_patch", ("ln K", chance.patch), config.patch.enabled),
    ];
    let mut findings = Vec::new();
    for (term, loss, entropy, (name, chance), present) in terms {
        let flagged = lasting.iter().any(|(sign, _)| {
            [Sign::FlatLoss(term), Sign::UniformTeacher(term), Sign::OneHotTeacher(term)].contains(sign)
        });
        let (Some(first), Some(now), true, false) = (log.first(loss), log.last(loss), present, flagged)
        else {
            continue;
        };
        if chance.is_nan() {
            // it depends on the images of a step of all ranks, which the configuration does not tell
            let text = format!("The {term} loss is {now:.3} (at first {first:.3}).");
            findings.push(if now < first { good(text) } else { note(text) });
            continue;
        }
        let mut text = format!(
            "The {term} loss is {now:.3} (at first {first:.3}; {name} = {chance:.3} would be a blind guess)."
        );
        if let Some(entropy) = log.last(entropy) {
            text += &format!(
                " The teacher's entropy is {:.0} % of ln K: 0 % would be one prototype for everything, 100 % all prototypes alike.",
                100.0 * entropy / chance
            );
        }
        let moved = (now - chance).abs() > MOVED * chance;
        if moved {
            findings.push(good(text));
        } else {
            findings
                .push(note(text + &format!(" It has not left {name} yet; that is normal during warm-up.")));
        }
    }
    findings
}

fn spread(log: &Log, config: &TrainConfig, lasting: &[(Sign, u64)]) -> Option<Finding> {
    let std = log.last("feature_std")?;
    if lasting.iter().any(|(sign, _)| *sign == Sign::EqualFeatures) {
        return None;
    }
    let most = (Architecture::from_config(config).dim as f64).sqrt().recip();
    Some(good(format!(
        "The patch features spread to {:.0} % of the most there can be (0 % would be the same feature everywhere).",
        100.0 * std / most
    )))
}

fn agreement(log: &Log) -> Option<Finding> {
    let now = log.last("positives_agreement")?;
    let text = format!("{:.0} % of the positives have the prototype of their patch.", 100.0 * now);
    if now <= TRIVIAL {
        return Some(good(text));
    }
    Some(Finding {
        level: Level::Warning,
        text: text + " Targets that agree everywhere teach little.",
        advice: Some("raise `patch.window`, or lower `patch.weight`".into()),
    })
}

fn bookkeeping(log: &Log, facts: Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    if let Some(waits) = log.values("data_wait") {
        let waits: Vec<f64> = waits.iter().copied().flatten().collect();
        let mean = waits.iter().sum::<f64>() / waits.len().max(1) as f64;
        if mean > SLOW_DATA {
            findings.push(Finding {
                level: Level::Note,
                text: format!("Training waits for images {:.0} % of the time.", 100.0 * mean),
                advice: Some("raise `data.workers`, or store smaller images".into()),
            });
        }
    }
    if facts.skipped > 0 {
        findings.push(Finding {
            level: Level::Warning,
            text: format!(
                "{} steps were not applied because a loss or gradient was not finite.",
                facts.skipped
            ),
            advice: Some("lower `optim.lr_per_256`, or look at the images named in `non-finite.tsv`".into()),
        });
    }
    if facts.bad_images > 0 {
        findings.push(note(format!("{} images could not be used; they are listed below.", facts.bad_images)));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(lines: &[(u64, f64, f64, f64)]) -> Log {
        let line = |(step, loss, entropy, std): &(u64, f64, f64, f64)| {
            format!(
                "{{\"step\":{step},\"loss_image\":{loss},\"teacher_entropy_image\":{entropy},\"loss_patch\":null,\
                 \"feature_std\":{std}}}\n"
            )
        };
        Log::read(lines.iter().map(line).collect::<String>().as_bytes())
    }

    fn config() -> TrainConfig {
        TrainConfig::default()
    }

    #[test]
    fn a_healthy_run_is_called_healthy() {
        let log = log(&[(1, 11.09, 9.0, 0.05), (300, 7.0, 5.0, 0.05)]);
        let verdict = judge(&log, Some(&config()), Facts::default());
        assert_eq!(verdict.level, Level::Good, "{:?}", verdict.findings);
        assert!(verdict.headline.starts_with("No sign of collapse"));
        assert!(verdict.findings[0].text.contains("ln K = 11.090"), "{:?}", verdict.findings);
    }

    #[test]
    fn collapse_is_named_with_its_beginning_and_advice() {
        let ln_k = 65536_f64.ln();
        let cases = [
            ((ln_k, 5.0, 0.05), "the class loss is stuck at ln K"),
            ((7.0, ln_k, 0.05), "the teacher's class outputs are uniform"),
            ((7.0, 1e-4, 0.05), "one single prototype"),
            ((7.0, 5.0, 1e-5), "have the same features"),
        ];
        for ((loss, entropy, std), words) in cases {
            let log = log(&[(1, 9.0, 5.0, 0.05), (10, loss, entropy, std), (400, loss, entropy, std)]);
            let verdict = judge(&log, Some(&config()), Facts::default());
            assert_eq!(verdict.level, Level::Bad);
            assert_eq!(verdict.headline, "The features have collapsed");
            let first = &verdict.findings[0];
            assert!(first.text.starts_with("Since step 10, ") && first.text.contains(words), "{first:?}");
            assert!(first.advice.is_some());
            let short = super::tests::log(&[(1, 9.0, 5.0, 0.05), (10, loss, entropy, std)]);
            assert_eq!(judge(&short, Some(&config()), Facts::default()).level, Level::Warning);
        }
    }

    #[test]
    fn empty_and_unknown_runs_are_not_judged() {
        let verdict = judge(&Log::default(), Some(&config()), Facts { bad_images: 2, skipped: 1 });
        assert_eq!(
            (verdict.level, verdict.headline.as_str()),
            (Level::Warning, "Nothing has been logged yet")
        );
        let verdict = judge(&log(&[(1, 2.0, 1.0, 0.1)]), None, Facts::default());
        assert_eq!(verdict.headline, "Not judged: there is no configuration");
        assert_eq!(verdict.level, Level::Note);
    }

    #[test]
    fn waiting_and_agreement_are_noticed() {
        let text = b"{\"step\":5,\"data_wait\":0.5,\"positives_agreement\":0.995}\n";
        let verdict = judge(&Log::read(text), Some(&config()), Facts::default());
        let texts: Vec<&str> = verdict.findings.iter().map(|finding| finding.text.as_str()).collect();
        assert!(texts.iter().any(|text| text.contains("waits for images 50 %")), "{texts:?}");
        assert_eq!(verdict.level, Level::Warning, "positives that always agree");
    }
}
