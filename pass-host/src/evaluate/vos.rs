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
//! | `overlay` | frames with their masks painted over them |
//! | `score`, `report` | masks -> J and F, by frame and object; their means |

mod davis;
mod error;
mod follow;
mod masks;
mod overlay;
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
pub use masks::{LabelImage, VOID, color};
pub use prepare::{Preparation, Prepared};
pub use propagate::Propagation;
pub use report::{ObjectScore, SequenceScore, VosReport};
pub use score::{FrameScore, score_frame};

use crate::checkpoint::{CheckpointError, write_atomically};
use crate::model::encoder::{Encoder, EncoderOptions};
use overlay::Film;

/// What is evaluated on what.
#[derive(Clone, Debug)]
pub struct VosSettings {
    /// Root of the data set.
    pub data: PathBuf,
    /// Which of its sequences.
    pub selection: Selection,
    /// Who made, or makes, the masks.
    pub judged: Judged,
    /// Where pictures go, `FOLDER/SEQUENCE.png` and `.gif`.
    pub overlay: Option<PathBuf>,
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
    let VosSettings { data, selection, judged, overlay } = settings;
    let with_images = matches!(judged, Judged::Weights(_)) || overlay.is_some();
    let sequences = sequences(data, selection, with_images)?;
    let frames = |sequence: &Sequence| match judged {
        Judged::Weights(_) => sequence.frames.len(),
        Judged::Predictions(_) => scored_frames(sequence.frames.len()).len(),
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
            if let Some(overlay) = overlay {
                let overlay = output_folder(overlay, data)?;
                for sequence in &sequences {
                    film_predictions(sequence, &folder.join(&sequence.name), &overlay, &scores)?;
                }
            }
            Ok(VosReport::new(format!("masks in {}", folder.display()), scores))
        }
        Judged::Weights(propagation) => {
            let encoder = Encoder::open(&propagation.weights, &propagation.options, &propagation.device)?;
            let start = Instant::now();
            let scores = propagate_and_score(&sequences, settings, &encoder, propagation, step)?;
            let mut report =
                VosReport::new(format!("{}: {}", propagation.weights, encoder.description()), scores);
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

/// Pictures of ready masks behind the given first one; the last frame, which is not scored, may have none.
fn film_predictions(
    sequence: &Sequence,
    folder: &Path,
    overlay: &Path,
    scores: &Scores,
) -> Result<(), VosError> {
    let mut film = Film::start(overlay, &sequence.name, sequence.frames.len())?;
    for (index, frame) in sequence.frames.iter().enumerate() {
        let ready = folder.join(format!("{}.png", frame.name));
        let path = if index == 0 { &frame.annotation } else { &ready };
        let image = follow::read_frame(frame)?;
        let size = (image.height as usize, image.width as usize);
        let mask = match path.is_file() {
            true => LabelImage::read(path)?,
            false => LabelImage { size, labels: vec![0; size.0 * size.1] },
        };
        if size != mask.size {
            let (path, other) = (path.clone(), frame.image.clone());
            return Err(VosError::Size { path, size: mask.size, other, other_size: size });
        }
        film.add(index, &image, &mask)?;
    }
    film.finish(scores[&sequence.name].line())
}

fn propagate_and_score(
    sequences: &[Sequence],
    settings: &VosSettings,
    encoder: &Encoder,
    propagation: &PropagationSettings,
    step: impl Fn(&str) + Sync,
) -> Result<Scores, VosError> {
    let (mean, std) = match propagation.std_typo {
        true => (MEAN, STD_OF_VIDEO_EVALUATION),
        false => encoder.normalization(),
    };
    let preparation = Preparation { short_side: propagation.short_side, stride: encoder.stride(), mean, std };
    let follower = Follower { encoder, rule: propagation.rule, preparation };
    let mut scores = Scores::new();
    for Sequence { name, frames } in sequences {
        let out = match &propagation.out {
            Some(out) => Some(output_folder(&out.join(name), &settings.data)?),
            None => None,
        };
        let mut film = match &settings.overlay {
            Some(folder) => Some(Film::start(&output_folder(folder, &settings.data)?, name, frames.len())?),
            None => None,
        };
        let scored = scored_frames(frames.len());
        let (mut found, mut objects) = (Vec::new(), 0);
        follower.follow(frames, |Segmented { index, image, mask }| {
            let frame = &frames[index];
            if let Some(out) = &out {
                let path = out.join(format!("{}.png", frame.name));
                let bytes =
                    mask.encode().map_err(|source| VosError::EncodeMask { path: path.clone(), source })?;
                write_atomically(&path, &bytes)?;
            }
            if index == 0 {
                objects = mask.largest();
            }
            if scored.contains(&index) {
                found.push(score_frame(frame, &mask, &frame.image, objects)?);
            }
            if let Some(film) = &mut film {
                film.add(index, &image, &mask)?;
            }
            step(name);
            Ok(())
        })?;
        let score = score::summarize(&found, objects)?;
        if let Some(film) = film {
            film.finish(score.line())?;
        }
        scores.insert(name.clone(), score);
    }
    Ok(scores)
}

/// Makes a folder for output that must not be one of the data set's own.
fn output_folder(folder: &Path, data: &Path) -> Result<PathBuf, VosError> {
    let inside = |kind: &str| match (folder.canonicalize(), data.join(kind).canonicalize()) {
        (Ok(folder), Ok(own)) => folder.starts_with(own),
        _ => false,
    };
    fs::create_dir_all(folder).map_err(|source| CheckpointError::Io {
        action: "create",
        path: folder.to_owned(),
        source,
    })?;
    match inside("Annotations") || inside("JPEGImages") {
        true => Err(VosError::Overwrites { path: folder.to_owned() }),
        false => Ok(folder.to_owned()),
    }
}
