//! The first three principal components of the patch features of several images, as red, green and blue.
//!
//! All images of a page share one basis, so equal colors mean equal features. With a foreground, the first component
//! splits all patches in two (Otsu's threshold); the side that is rarer along the edges of the images is the foreground,
//! and the components are computed again from its patches alone.

use candle_core::{DType, Device};
use ndarray::{Array2, ArrayView2, Axis};

use super::canvas::{Canvas, mixed};
use super::colors::{NIGHT, Rgb};
use super::field::{Enlarge, enlarge};
use super::sheet::{Panel, Row, Sheet};
use super::view::{Layout, Photo, View};
use super::{Model, PictureError, common_patch};
use crate::pca::PrincipalComponents;

/// Components: red, green, blue.
const CHANNELS: usize = 3;
/// Shares of the values of a component that become 0 and 1.
const ENDS: [f64; 2] = [0.01, 0.99];
/// Bins of the histogram whose split is searched.
const BINS: usize = 256;
/// Fewer patches than this make no foreground.
const LEAST_FOREGROUND: usize = 8;

/// Which patches are colored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Foreground {
    /// The side of the first component that is rarer along the edges of the images.
    #[default]
    Inside,
    /// The other side.
    Outside,
    /// All.
    All,
}

/// What to draw.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Which patches are colored.
    pub foreground: Foreground,
    /// Sizes.
    pub layout: Layout,
    /// How patches become pixels.
    pub enlarge: Enlarge,
}

/// Patch features of one image.
#[derive(Clone, Debug)]
pub struct Features {
    /// `[N, D]`.
    pub values: Array2<f32>,
    /// Rows and columns.
    pub grid: (usize, usize),
}

/// Colors of the patches of one image.
#[derive(Clone, Debug, PartialEq)]
pub struct Colored {
    /// `[N, 3]` in `[0, 1]`.
    pub colors: Array2<f32>,
    /// Which patches are colored, `[N]`.
    pub shown: Vec<bool>,
}

/// Rows are images; columns the image and then each of the weights, each with a basis of its own.
///
/// # Errors
/// [`PictureError`].
pub fn figure(models: &[Model], photos: &[Photo], request: &Request) -> Result<Sheet, PictureError> {
    let patch = common_patch(models);
    let views = photos
        .iter()
        .map(|photo| View::new(photo, request.layout, patch, models))
        .collect::<Result<Vec<_>, _>>()?;
    let image = |view: &View<'_>| Row {
        label: view.file_name(),
        panels: vec![Panel { picture: view.drawn(), caption: String::new() }],
    };
    let mut rows: Vec<Row> = views.iter().map(image).collect();
    for model in models {
        let features = views.iter().map(|view| features(model, view)).collect::<Result<Vec<_>, _>>()?;
        for ((view, row), (found, colored)) in
            views.iter().zip(&mut rows).zip(features.iter().zip(colors(&features, request.foreground)))
        {
            let picture = painted(&colored, found.grid, view.panel(), request.enlarge);
            row.panels.push(Panel { picture, caption: String::new() });
        }
    }
    let names = models.iter().map(|model| model.label.clone());
    let note = match request.foreground {
        Foreground::All => {
            "The first three principal components of the patch features as red, green and blue; all images of a column \
             share one basis."
        }
        _ => {
            "The first three principal components of the features of foreground patches as red, green and blue; all images of a \
             column share one basis. The foreground is one side of the first component (Otsu's threshold)."
        }
    };
    Ok(Sheet {
        title: "Principal components of the patch features".into(),
        columns: [String::from("image")].into_iter().chain(names).collect(),
        rows,
        scale: None,
        note: note.into(),
    })
}

fn features(model: &Model, view: &View<'_>) -> Result<Features, PictureError> {
    let found = model.encoder.patch_features(&view.tensor(model)?)?;
    let (_, patches, dim) = found.features.dims3()?;
    let values =
        found.features.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    if values.iter().any(|value| !value.is_finite()) {
        let (label, name) = (model.label.clone(), view.name().to_owned());
        return Err(PictureError::NotFinite { label, what: "features", name });
    }
    let values = Array2::from_shape_vec((patches, dim), values).map_err(candle_core::Error::wrap)?;
    Ok(Features { values, grid: found.grid })
}

/// Colors of the patches of all `images`, in one basis.
pub fn colors(images: &[Features], foreground: Foreground) -> Vec<Colored> {
    let views: Vec<ArrayView2<'_, f32>> = images.iter().map(|image| image.values.view()).collect();
    let all = PrincipalComponents::of(&views, CHANNELS);
    let shown = match foreground {
        Foreground::All => None,
        _ => {
            let first: Vec<Vec<f32>> =
                views.iter().map(|view| all.project(*view).column(0).to_vec()).collect();
            foreground_of(&first, images, foreground == Foreground::Outside)
        }
    };
    let shown: Vec<Vec<bool>> =
        shown.unwrap_or_else(|| images.iter().map(|image| vec![true; image.values.nrows()]).collect());
    let chosen: Vec<Array2<f32>> = views
        .iter()
        .zip(&shown)
        .map(|(view, shown)| {
            let patches: Vec<usize> = (0..shown.len()).filter(|patch| shown[*patch]).collect();
            view.select(Axis(0), &patches)
        })
        .collect();
    let chosen: Vec<_> = chosen.iter().map(|image| image.view()).collect();
    let basis = PrincipalComponents::of(&chosen, CHANNELS);
    let mut projected: Vec<Array2<f32>> = views.iter().map(|view| basis.project(*view)).collect();
    for channel in 0..CHANNELS {
        let values = projected.iter().zip(&shown).flat_map(|(image, shown)| {
            image.column(channel).into_iter().zip(shown).filter(|(_, shown)| **shown).map(|(value, _)| *value)
        });
        let [low, high] = ends(values.collect());
        let width = if high > low { high - low } else { 1.0 };
        for image in &mut projected {
            image
                .column_mut(channel)
                .mapv_inplace(|value| if high > low { ((value - low) / width).clamp(0.0, 1.0) } else { 0.5 });
        }
    }
    projected.into_iter().zip(shown).map(|(colors, shown)| Colored { colors, shown }).collect()
}

/// The values below and above which lie the outer percents.
fn ends(mut values: Vec<f32>) -> [f32; 2] {
    values.sort_by(f32::total_cmp);
    let Some(last) = values.len().checked_sub(1) else { return [0.0, 0.0] };
    ENDS.map(|share| values[(share * last as f64).round() as usize])
}

/// Which patches lie on the side of Otsu's threshold that is rarer along the edges; `None` if that side is too small.
fn foreground_of(first: &[Vec<f32>], images: &[Features], other_side: bool) -> Option<Vec<Vec<bool>>> {
    let threshold = otsu(&first.concat())?;
    let (mut edge, mut edge_high, mut all, mut all_high) = (0.0, 0.0, 0.0, 0.0);
    for (values, image) in first.iter().zip(images) {
        let (rows, columns) = image.grid;
        for (patch, value) in values.iter().enumerate() {
            let (row, column) = (patch / columns, patch % columns);
            let high = if *value > threshold { 1.0 } else { 0.0 };
            (all, all_high) = (all + 1.0, all_high + high);
            if row == 0 || column == 0 || row + 1 == rows || column + 1 == columns {
                (edge, edge_high) = (edge + 1.0, edge_high + high);
            }
        }
    }
    let high_is_outside = edge_high * all > all_high * edge;
    let wanted = high_is_outside == other_side;
    let shown: Vec<Vec<bool>> = first
        .iter()
        .map(|values| values.iter().map(|value| (*value > threshold) == wanted).collect())
        .collect();
    let count = shown.iter().flatten().filter(|shown| **shown).count();
    (count >= LEAST_FOREGROUND).then_some(shown)
}

/// The threshold that splits the values into the two groups with the largest variance between them (Otsu 1979); values
/// above it are the upper group. `None` if all are equal.
pub fn otsu(values: &[f32]) -> Option<f32> {
    let low = values.iter().copied().fold(f32::INFINITY, f32::min);
    let high = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if high <= low || !(high - low).is_finite() {
        return None;
    }
    let width = (high - low) / BINS as f32;
    let mut histogram = [(0.0_f64, 0.0_f64); BINS];
    for value in values {
        let bin = (((value - low) / width) as usize).min(BINS - 1);
        histogram[bin].0 += 1.0;
        histogram[bin].1 += f64::from(*value);
    }
    let (all, sum) = histogram.iter().fold((0.0, 0.0), |(n, s), (count, total)| (n + count, s + total));
    let (mut below, mut below_sum) = (0.0, 0.0);
    let mut best = (f64::NEG_INFINITY, 0, 0);
    for (bin, (count, total)) in histogram.iter().enumerate().take(BINS - 1) {
        (below, below_sum) = (below + count, below_sum + total);
        let gap = below_sum / below - (sum - below_sum) / (all - below);
        let between = below * (all - below) * gap * gap;
        if between > best.0 {
            best = (between, bin, bin);
        } else if between == best.0 {
            // empty bins between the groups: the middle of them
            best.2 = bin;
        }
    }
    Some(low + width * ((best.1 + best.2) as f32 / 2.0 + 1.0))
}

fn painted(colored: &Colored, grid: (usize, usize), (height, width): (usize, usize), how: Enlarge) -> Canvas {
    let channels: [Vec<f32>; CHANNELS] = std::array::from_fn(|channel| {
        enlarge(&colored.colors.column(channel).to_vec(), grid, (height, width), how)
    });
    let shown: Vec<f32> = colored.shown.iter().map(|shown| f32::from(u8::from(*shown))).collect();
    let shown = enlarge(&shown, grid, (height, width), how);
    let mut picture = Canvas::new(width, height, NIGHT);
    let all = picture.bounds();
    picture.map(all, |x, y, ground| {
        let at = y * width + x;
        let color: Rgb =
            std::array::from_fn(|channel| (channels[channel][at].clamp(0.0, 1.0) * 255.0).round() as u8);
        // a narrow smooth edge around the half
        let opacity = ((shown[at] - 0.5) * 4.0 + 0.5).clamp(0.0, 1.0);
        std::array::from_fn(|channel| mixed(ground[channel], color[channel], opacity))
    });
    picture
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pca::eigen;
    use crate::random::{Purpose, Stream};

    fn cloud(grid: (usize, usize), dim: usize, seed: u64) -> Features {
        let mut stream = Stream::new(seed, Purpose::Subset, &[]);
        let values = Array2::from_shape_fn((grid.0 * grid.1, dim), |(patch, d)| {
            let wave = ((patch * (d + 1)) as f64 * 0.37).sin() * (dim - d) as f64;
            (wave + stream.range(-0.3, 0.3)) as f32
        });
        Features { values, grid }
    }

    #[test]
    fn colors_are_the_joint_components_of_a_full_decomposition() {
        let images = [cloud((6, 7), 10, 1), cloud((5, 5), 10, 2)];
        let colored = colors(&images, Foreground::All);
        let all = ndarray::concatenate![Axis(0), images[0].values, images[1].values].mapv(f64::from);
        let centered = &all - &all.mean_axis(Axis(0)).unwrap();
        let (_, vectors) = eigen(&centered.t().dot(&centered));
        for channel in 0..3 {
            let direction = vectors.row(channel);
            let largest = direction.iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap();
            let scores: Vec<f32> =
                (centered.dot(&direction) * largest.signum()).iter().map(|x| *x as f32).collect();
            let mut sorted = scores.clone();
            sorted.sort_by(f32::total_cmp);
            let (low, high) = (sorted[1], sorted[65]); // 1 % and 99 % of 67 values
            let found = colored[0].colors.column(channel).to_vec();
            let found: Vec<f32> =
                found.into_iter().chain(colored[1].colors.column(channel).to_vec()).collect();
            for (found, score) in found.iter().zip(scores) {
                let expected = ((score - low) / (high - low)).clamp(0.0, 1.0);
                assert!((found - expected).abs() < 1e-4, "channel {channel}: {found}, expected {expected}");
            }
        }
    }

    #[test]
    fn otsu_splits_two_groups_and_refuses_one() {
        let mut values: Vec<f32> = (0..40).map(|i| (i % 5) as f32 * 0.1).collect();
        values.extend((0..10).map(|i| 5.0 + (i % 3) as f32 * 0.1));
        let threshold = otsu(&values).unwrap();
        assert!((0.45..4.95).contains(&threshold), "{threshold}");
        assert_eq!(otsu(&[2.0; 9]), None);
        assert_eq!(otsu(&[]), None);
    }

    #[test]
    fn the_foreground_is_the_side_away_from_the_edges() {
        // an object of 3 x 3 patches in the middle of 7 x 7, in both signs of the features
        for sign in [1.0, -1.0] {
            let object = |patch: usize| (2..5).contains(&(patch / 7)) && (2..5).contains(&(patch % 7));
            let values = Array2::from_shape_fn((49, 4), |(patch, d)| {
                let group = if object(patch) { 4.0 } else { -1.0 };
                sign * (group * [1.0, 0.5, 0.0, 0.0][d] + (patch * (d + 3) % 5) as f32 * 0.05)
            });
            let image = Features { values, grid: (7, 7) };
            let inside = &colors(std::slice::from_ref(&image), Foreground::Inside)[0];
            let outside = &colors(&[image], Foreground::Outside)[0];
            for patch in 0..49 {
                assert_eq!(inside.shown[patch], object(patch), "patch {patch}");
                assert_ne!(outside.shown[patch], object(patch));
            }
            let picture = painted(inside, (7, 7), (70, 70), Enlarge::Nearest);
            assert_eq!(picture.get(5, 5), NIGHT);
            let color = inside.colors.row(24).mapv(|x| (x * 255.0).round() as u8);
            assert_eq!(picture.get(35, 35).as_slice(), color.as_slice().unwrap());
        }
    }

    #[test]
    fn equal_features_are_gray() {
        let image = Features { values: Array2::from_elem((9, 3), 1.0), grid: (3, 3) };
        let colored = &colors(&[image], Foreground::Inside)[0];
        assert!(colored.shown.iter().all(|shown| *shown));
        assert!(colored.colors.iter().all(|color| *color == 0.5));
    }
}
