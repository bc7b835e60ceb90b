//! The test: whole pictures, one scale; every pixel of the original size gets a class.

use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use image::{ImageFormat, RgbImage};

use super::super::index_png::{self, IndexImage};
use super::dataset::{Dataset, Picture, Sample};
use super::error::SegmentError;
use super::metrics::{Confusion, Scores};
use super::model::SegmentModel;
use super::pictures::whole_pictures;
use crate::checkpoint::write_atomically;
use crate::config::segment::SegmentConfig;
use crate::ops::{IGNORED, largest_class};

/// Overlay pictures beside the predictions.
const OVERLAYS: usize = 8;
/// Share of the class color in an overlay.
const OPACITY: f32 = 0.55;

/// Judges the validation pictures; writes predictions to `predictions` if wanted; `shown(done)` after each.
///
/// # Errors
/// [`SegmentError`] of the first picture that cannot be used or written.
pub fn judge(
    model: &SegmentModel,
    dataset: &Dataset,
    config: &SegmentConfig,
    predictions: Option<&Path>,
    mut shown: impl FnMut(usize),
) -> Result<Scores, SegmentError> {
    if let Some(folder) = predictions {
        fs::create_dir_all(folder).map_err(|source| SegmentError::Write { path: folder.into(), source })?;
    }
    let classes = dataset.classes.len();
    let mut confusion = Confusion::new(classes);
    let samples: Vec<&Sample> = dataset.val.iter().collect();
    let every = samples.len().div_ceil(OVERLAYS).max(1);
    whole_pictures(model, dataset, &samples, config, |index, picture, view, features| {
        let logits = model.judge_logits(features)?.detach();
        let (_, height, width, _) = logits.dims4()?;
        let target = (picture.image.height as usize, picture.image.width as usize);
        let [rows, columns] = model.resampling((height, width), (view.height, view.width), target);
        let map: Vec<f32> = logits.flatten_all()?.to_vec1()?;
        let found = largest_class(&map, classes, &rows, &columns);
        confusion.add(&picture.labels, &found);
        if let Some(folder) = predictions {
            write_prediction(folder, dataset, samples[index], picture, &found)?;
            if index % every == 0 {
                write_overlay(folder, dataset, samples[index], picture, &found)?;
            }
        }
        shown(index + 1);
        Ok(())
    })?;
    Ok(confusion.scores(&dataset.classes.names))
}

/// An index PNG with the labels of the data set's own masks.
fn write_prediction(
    folder: &Path,
    dataset: &Dataset,
    sample: &Sample,
    picture: &Picture,
    found: &[u8],
) -> Result<(), SegmentError> {
    let path = folder.join(format!("{}.png", sample.name));
    let reserved = usize::from(dataset.stored_label(0));
    let mut palette = vec![[0u8; 3]; reserved];
    palette.extend(&dataset.classes.colors);
    palette.truncate(256);
    let image = IndexImage {
        width: picture.image.width,
        height: picture.image.height,
        indices: found.iter().map(|&class| dataset.stored_label(class)).collect(),
    };
    let failed = |error: png::EncodingError| SegmentError::Write { path: path.clone(), source: error.into() };
    Ok(write_atomically(&path, &index_png::encode(&image, &palette).map_err(failed)?)?)
}

/// Image, labels and prediction side by side.
fn write_overlay(
    folder: &Path,
    dataset: &Dataset,
    sample: &Sample,
    picture: &Picture,
    found: &[u8],
) -> Result<(), SegmentError> {
    let (width, height) = (picture.image.width as usize, picture.image.height as usize);
    let mut strip = Vec::with_capacity(9 * width * height);
    let row_of = |y: usize| y * width..(y + 1) * width;
    for y in 0..height {
        let pixels = picture.image.data[3 * y * width..3 * (y + 1) * width].as_chunks::<3>().0;
        strip.extend_from_slice(pixels.as_flattened());
        for classes in [&picture.labels[row_of(y)], &found[row_of(y)]] {
            for (pixel, &class) in pixels.iter().zip(classes) {
                strip.extend(blended(*pixel, class, &dataset.classes.colors));
            }
        }
    }
    let path = overlay_path(folder, &sample.name);
    let failed = |source| SegmentError::Write { path: path.clone(), source };
    let parent = path.parent().unwrap_or(folder);
    fs::create_dir_all(parent).map_err(failed)?;
    let image = RgbImage::from_raw(3 * width as u32, height as u32, strip)
        .ok_or_else(|| failed(std::io::Error::other("too large")))?;
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, ImageFormat::Png).map_err(|error| failed(std::io::Error::other(error)))?;
    Ok(write_atomically(&path, bytes.get_ref())?)
}

fn overlay_path(folder: &Path, name: &str) -> PathBuf {
    folder.join("overlays").join(format!("{name}.png"))
}

/// A pixel in the color of its class; one that does not count stays as it is, darker.
fn blended(pixel: [u8; 3], class: u8, colors: &[[u8; 3]]) -> [u8; 3] {
    let color = match class {
        IGNORED => [0; 3],
        class => colors.get(usize::from(class)).copied().unwrap_or_default(),
    };
    std::array::from_fn(|channel| {
        let (pixel, color) = (f32::from(pixel[channel]), f32::from(color[channel]));
        (pixel + OPACITY * (color - pixel)).round() as u8
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlays_mix_picture_and_class() {
        assert_eq!(blended([100, 200, 0], 1, &[[0; 3], [200, 200, 200]]), [155, 200, 110]);
        assert_eq!(blended([100, 200, 0], IGNORED, &[[255; 3]]), [45, 90, 0]);
    }
}
