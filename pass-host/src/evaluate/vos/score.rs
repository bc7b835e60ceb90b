//! Masks against the truth: region similarity J and contour accuracy F of every object in every frame but the first and
//! the last, as `davis2017-evaluation` measures them in its semi-supervised task.

use std::path::Path;

use pass_core::segmentation_metrics::{Statistics, contour_accuracy, region_similarity, scored_frames};
use rayon::prelude::*;

use super::davis::{Frame, Sequence};
use super::error::VosError;
use super::masks::{LabelImage, VOID};
use super::report::{ObjectScore, SequenceScore};

/// J and F of every object, from object 1 on.
pub type FrameScore = Vec<(f64, f64)>;

/// Scores one mask. Pixels that are void in the truth belong to no object in either mask.
///
/// # Errors
/// [`VosError::Size`] and [`VosError::UnknownLabel`], naming `path` (where the prediction is from) or the truth.
pub fn score_frame(
    frame: &Frame,
    prediction: &LabelImage,
    path: &Path,
    objects: u8,
) -> Result<FrameScore, VosError> {
    let mut truth = LabelImage::read(&frame.annotation)?;
    if prediction.size != truth.size {
        return Err(VosError::Size {
            path: path.to_owned(),
            size: prediction.size,
            other: frame.annotation.clone(),
            other_size: truth.size,
        });
    }
    let known = |path: &Path, label: u8| match label > objects {
        true => Err(VosError::UnknownLabel { path: path.to_owned(), label, objects }),
        false => Ok(()),
    };
    known(&frame.annotation, truth.largest())?;
    known(path, prediction.labels.iter().copied().max().unwrap_or(0))?;
    let mut predicted = prediction.labels.clone();
    for (truth, predicted) in truth.labels.iter_mut().zip(&mut predicted) {
        if *truth == VOID {
            (*truth, *predicted) = (0, 0);
        }
    }
    (1..=objects)
        .into_par_iter()
        .map(|object| {
            let j = region_similarity(&truth.labels, &predicted, object)?;
            let mut scratch = vec![0; predicted.len()];
            let f = contour_accuracy(&truth.labels, &predicted, truth.size, object, &mut scratch)?;
            Ok((j, f))
        })
        .collect()
}

/// Objects of a sequence: the largest label of its first mask.
///
/// # Errors
/// [`VosError::NoObject`], and [`VosError::Mask`] if the mask cannot be read.
pub(super) fn count_objects(first: &LabelImage, path: &Path) -> Result<u8, VosError> {
    match first.largest() {
        0 => Err(VosError::NoObject { path: path.to_owned() }),
        objects => Ok(objects),
    }
}

/// Summarizes the scored frames of a sequence, in order.
///
/// # Errors
/// [`VosError::Rule`] if there is no frame.
pub(super) fn summarize(frames: &[FrameScore], objects: u8) -> Result<SequenceScore, VosError> {
    let object = |object: u8| -> Result<(u8, ObjectScore), VosError> {
        let place = usize::from(object) - 1;
        let (j, f): (Vec<f64>, Vec<f64>) = frames.iter().map(|scores| scores[place]).unzip();
        Ok((object, ObjectScore::new(Statistics::of(&j)?, Statistics::of(&f)?)))
    };
    let objects = (1..=objects).map(object).collect::<Result<_, _>>()?;
    Ok(SequenceScore::new(frames.len(), objects))
}

/// Scores ready masks `folder/FRAME.png` of a sequence; `done` is called after every frame.
///
/// # Errors
/// [`VosError`] for the first mask that is missing or does not fit.
pub(super) fn score_folder(
    sequence: &Sequence,
    folder: &Path,
    done: impl Fn() + Sync,
) -> Result<SequenceScore, VosError> {
    let scored = &sequence.frames[scored_frames(sequence.frames.len())];
    let of = |frame: &Frame| folder.join(format!("{}.png", frame.name));
    let missing: Vec<_> = scored.iter().filter(|frame| !of(frame).is_file()).collect();
    if let Some(first) = missing.first() {
        return Err(VosError::Incomplete {
            folder: folder.to_owned(),
            missing: missing.len(),
            scored: scored.len(),
            first: format!("{}.png", first.name),
        });
    }
    let first = &sequence.frames[0].annotation;
    let objects = count_objects(&LabelImage::read(first)?, first)?;
    let scores = scored
        .par_iter()
        .map(|frame| {
            let path = of(frame);
            let scores = score_frame(frame, &LabelImage::read(&path)?, &path, objects)?;
            done();
            Ok(scores)
        })
        .collect::<Result<Vec<_>, VosError>>()?;
    summarize(&scores, objects)
}
