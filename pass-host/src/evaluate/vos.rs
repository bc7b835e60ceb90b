//! Video object segmentation without training, as DINO and PASS are measured on DAVIS 2017: the mask of the first frame
//! travels along similar patches, masks are scored against the truth.
//!
//! | file | job |
//! |---|---|
//! | `davis` | the layout of the data set |
//! | `masks` | PNG files with a palette |
//! | `prepare` | a frame -> the network's input |
//! | `propagate` | soft labels of a frame on all cores |
//! | `follow` | a sequence -> masks |
//! | `score`, `report` | masks -> J and F, by frame and object; their means |

mod davis;
mod error;
mod follow;
mod masks;
mod prepare;
mod propagate;
mod report;
mod score;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use candle_core::Device;
use pass_core::frame::{MEAN, STD_OF_VIDEO_EVALUATION};
use pass_core::propagation::Propagation as Rule;
use pass_core::segmentation_metrics::scored_frames;

pub use davis::{Frame, Selection, Sequence, sequences};
pub use error::VosError;
pub use follow::{Follower, Segmented};
pub use masks::{LabelImage, MaskError, VOID, color};
pub use prepare::{Preparation, Prepared};
pub use propagate::Propagation;
pub use report::{ObjectScore, SequenceScore, VosReport};
pub use score::{FrameScore, score_frame};

use crate::checkpoint::{CheckpointError, write_atomically};
use crate::model::encoder::{Encoder, EncoderOptions};

/// What is evaluated on what.
#[derive(Clone, Debug)]
pub struct VosSettings {
    /// Root of the data set.
    pub data: PathBuf,
    /// Which of its sequences.
    pub selection: Selection,
    /// Who made, or makes, the masks.
    pub judged: Judged,
}

/// Who made, or makes, the masks.
#[derive(Clone, Debug)]
pub enum Judged {
    /// Ready masks `FOLDER/SEQUENCE/FRAME.png`.
    Predictions(PathBuf),
    /// Propagation with the features of a network.
    Weights(PropagationSettings),
}

/// Propagation with the features of a network.
#[derive(Clone, Debug)]
pub struct PropagationSettings {
    /// As [`Encoder::open`] takes them.
    pub weights: String,
    /// How they are opened.
    pub options: EncoderOptions,
    /// Where to compute.
    pub device: Device,
    /// How labels travel.
    pub rule: Rule,
    /// Pixels of the short side of a prepared frame.
    pub short_side: usize,
    /// Normalize with the published script's numbers, standard deviation .228 of red included.
    pub std_typo: bool,
    /// Where masks go, `FOLDER/SEQUENCE/FRAME.png`.
    pub out: Option<PathBuf>,
}

/// How far the evaluation is.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// The sequence at hand.
    pub sequence: &'a str,
    /// Frames done, of all sequences.
    pub done: usize,
    /// Frames of all sequences.
    pub all: usize,
}

/// Evaluates; `progress` is called after every frame, from any thread.
///
/// # Errors
/// [`VosError`] for the first file that cannot be used. All sequences are looked for before the first is computed.
pub fn run(settings: &VosSettings, progress: impl Fn(Progress<'_>) + Sync) -> Result<VosReport, VosError> {
    let VosSettings { data, selection, judged } = settings;
    let with_images = matches!(judged, Judged::Weights(_));
    let sequences = sequences(data, selection, with_images)?;
    let frames = |sequence: &Sequence| match with_images {
        true => sequence.frames.len(),
        false => scored_frames(sequence.frames.len()).len(),
    };
    let all = sequences.iter().map(frames).sum();
    let done = AtomicUsize::new(0);
    let step = |sequence: &str| {
        let done = done.fetch_add(1, Ordering::Relaxed) + 1;
        progress(Progress { sequence, done, all });
    };
    match judged {
        Judged::Predictions(folder) => {
            let scores = score_predictions(&sequences, folder, step)?;
            Ok(VosReport::new(format!("masks in {}", folder.display()), scores))
        }
        Judged::Weights(settings) => {
            let encoder = Encoder::open(&settings.weights, &settings.options, &settings.device)?;
            let start = Instant::now();
            let scores = propagate_and_score(&sequences, data, &encoder, settings, step)?;
            let mut report = VosReport::new(format!("{}: {}", settings.weights, encoder.description()), scores);
            report.frames_per_s = Some(all as f64 / start.elapsed().as_secs_f64());
            Ok(report)
        }
    }
}

type Scores = BTreeMap<String, SequenceScore>;

fn score_predictions(
    sequences: &[Sequence],
    folder: &Path,
    step: impl Fn(&str) + Sync,
) -> Result<Scores, VosError> {
    if !folder.is_dir() {
        return Err(VosError::Layout { path: folder.to_owned(), expected: "a folder of masks by sequence" });
    }
    let score = |sequence: &Sequence| {
        let found = score::score_folder(sequence, &folder.join(&sequence.name), || step(&sequence.name))?;
        Ok((sequence.name.clone(), found))
    };
    sequences.iter().map(score).collect()
}

fn propagate_and_score(
    sequences: &[Sequence],
    data: &Path,
    encoder: &Encoder,
    settings: &PropagationSettings,
    step: impl Fn(&str) + Sync,
) -> Result<Scores, VosError> {
    let (mean, std) = match settings.std_typo {
        true => (MEAN, STD_OF_VIDEO_EVALUATION),
        false => encoder.normalization(),
    };
    let preparation = Preparation { short_side: settings.short_side, stride: encoder.stride(), mean, std };
    let follower = Follower { encoder, rule: settings.rule, preparation };
    let mut scores = Scores::new();
    for sequence in sequences {
        let out = match &settings.out {
            Some(out) => Some(output_folder(&out.join(&sequence.name), data)?),
            None => None,
        };
        let scored = scored_frames(sequence.frames.len());
        let (mut found, mut objects) = (Vec::new(), 0);
        follower.follow(sequence, |Segmented { index, image: _, mask }| {
            let frame = &sequence.frames[index];
            if let Some(out) = &out {
                let path = out.join(format!("{}.png", frame.name));
                let bytes = mask.encode().map_err(|source| VosError::Mask { path: path.clone(), source })?;
                write_atomically(&path, &bytes)?;
            }
            if index == 0 {
                objects = mask.largest();
            }
            if scored.contains(&index) {
                found.push(score_frame(frame, &mask, &frame.image, objects)?);
            }
            step(&sequence.name);
            Ok(())
        })?;
        scores.insert(sequence.name.clone(), score::summarize(&found, objects)?);
    }
    Ok(scores)
}

/// Makes a folder for output that must not be one of the data set's own.
fn output_folder(folder: &Path, data: &Path) -> Result<PathBuf, VosError> {
    let inside = |kind: &str| match (folder.canonicalize(), data.join(kind).canonicalize()) {
        (Ok(folder), Ok(own)) => folder.starts_with(own),
        _ => false,
    };
    fs::create_dir_all(folder)
        .map_err(|source| CheckpointError::Io { action: "create", path: folder.to_owned(), source })?;
    match inside("Annotations") || inside("JPEGImages") {
        true => Err(VosError::Overwrites { path: folder.to_owned() }),
        false => Ok(folder.to_owned()),
    }
}
