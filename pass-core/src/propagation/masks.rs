//! Masks to labels and back: from the size of a frame to its patches, and from soft labels of patches to a mask.

use crate::error::{Error, Result, check_length, check_scratch};
use crate::rows::rows_of_mut;
use crate::shape::{PatchGrid, copy, part, row, take};

/// Coordinates `0..to` of an axis resized by nearest neighbor from `from`, as Pillow computes them:
/// `floor((x + ½)·from/to)`, with the position summed up in double precision.
fn nearest_places(from: usize, to: usize) -> impl Iterator<Item = usize> + Clone {
    let step = from as f64 / to as f64;
    let mut position = 0.5 * step;
    (0..to).map(move |_| {
        let place = (position as usize).min(from.saturating_sub(1));
        position += step;
        place
    })
}

fn check_size(what: &'static str, (height, width): (usize, usize)) -> Result<usize> {
    PatchGrid::new(height, width).map(PatchGrid::n_patches).map_err(|error| match error {
        Error::OutOfRange { min, max, actual, .. } => Error::OutOfRange { what, min, max, actual },
        other => other,
    })
}

/// Resizes a mask by nearest neighbor, with Pillow's coordinates. `mask` is `[height, width]` of `size`, `out` of
/// `out_size`.
///
/// # Errors
/// [`Error::OutOfRange`] for an empty size; [`Error::LengthMismatch`] if a buffer is not of its size.
pub fn resize_nearest_into(
    mask: &[u8],
    size: (usize, usize),
    out_size: (usize, usize),
    out: &mut [u8],
) -> Result<()> {
    check_length("mask", check_size("mask size", size)?, mask.len())?;
    check_length("resized mask", check_size("resized mask size", out_size)?, out.len())?;
    for (row, out) in nearest_places(size.0, out_size.0).zip(rows_of_mut(out, out_size.1)) {
        let line = part(mask, row * size.1, size.1);
        for (column, out) in nearest_places(size.1, out_size.1).zip(out) {
            *out = line.get(column).copied().unwrap_or_default();
        }
    }
    Ok(())
}

/// The labels of a mask at patch resolution: `mask` `[N]` to `out` `[N, classes]`, 1 at the class of the patch.
///
/// The reference has as many classes as the largest index in the *resized* mask says; a class that no patch is labeled
/// with never wins, so `classes` may count objects too small for the grid.
///
/// # Errors
/// [`Error::LengthMismatch`] if `out` is not of that shape; [`Error::OutOfRange`] for a label without a class.
pub fn one_hot_into(mask: &[u8], classes: usize, out: &mut [f32]) -> Result<()> {
    check_length("labels", mask.len().saturating_mul(classes), out.len())?;
    if let Some(&label) = mask.iter().find(|&&label| usize::from(label) >= classes) {
        let max = classes.saturating_sub(1);
        return Err(Error::OutOfRange { what: "label", min: 0, max, actual: label.into() });
    }
    out.fill(0.0);
    for (label, out) in mask.iter().zip(rows_of_mut(out, classes)) {
        if let Some(out) = out.get_mut(usize::from(*label)) {
            *out = 1.0;
        }
    }
    Ok(())
}

/// Values of scratch memory [`segment_into`] needs.
pub const fn segment_scratch_len(grid: PatchGrid, classes: usize) -> usize {
    grid.width().saturating_add(2).saturating_mul(classes)
}

/// The mask that soft labels say: upsampled bilinearly by `scale` (the patch size), each class stretched to `[0, 1]` over
/// the whole upsampled frame, the largest class taken, the result resized to `out_size` by nearest neighbor.
///
/// - `labels`: `[N, C]`, at most 256 classes.
/// - `scratch`: at least [`segment_scratch_len`] values.
/// - `out`: `[out_size.0, out_size.1]`; of equal classes the lowest.
///
/// As in the reference, a class that is nowhere positive is not stretched, and one that is constant and positive (where
/// stretching divides zero by zero, and not a number counts as largest) wins everywhere. Nothing of the upsampled size is
/// ever stored.
///
/// # Errors
/// [`Error::OutOfRange`] if `scale`, `C` or `out_size` is 0 or too large; [`Error::LengthMismatch`] if a buffer does not
/// fit.
pub fn segment_into(
    labels: &[f32],
    grid: PatchGrid,
    classes: usize,
    scale: usize,
    out_size: (usize, usize),
    scratch: &mut [f32],
    out: &mut [u8],
) -> Result<()> {
    if classes == 0 || classes > 256 {
        return Err(Error::OutOfRange { what: "classes", min: 1, max: 256, actual: classes });
    }
    let upsampled = (grid.height().saturating_mul(scale), grid.width().saturating_mul(scale));
    check_size("upsampled size", upsampled)?;
    check_length("soft labels", grid.n_patches().saturating_mul(classes), labels.len())?;
    check_length("mask", check_size("mask size", out_size)?, out.len())?;
    check_scratch("mask scratch", segment_scratch_len(grid, classes), scratch.len())?;
    let mut rest = scratch;
    let (least, most) = (take(&mut rest, classes), take(&mut rest, classes));
    let line = take(&mut rest, grid.width() * classes);

    least.fill(f32::INFINITY);
    most.fill(f32::NEG_INFINITY);
    for row in 0..upsampled.0 {
        interpolate_row(labels, grid, classes, Between::new(row, scale, grid.height()), line);
        for column in 0..upsampled.1 {
            let between = Between::new(column, scale, grid.width());
            for ((value, least), most) in between.values(line, classes).zip(&mut *least).zip(&mut *most) {
                *least = least.min(value);
                *most = most.max(value);
            }
        }
    }
    // from here on `most` holds the range of a class, 0 for one that is left alone
    for (least, most) in least.iter_mut().zip(most.iter_mut()) {
        if *most > 0.0 {
            *most -= *least;
            if *most == 0.0 {
                *least = f32::NEG_INFINITY;
                *most = 1.0;
            }
        } else {
            (*least, *most) = (0.0, 1.0);
        }
    }

    let (mut last, mut last_line): (_, &[u8]) = (usize::MAX, &[]);
    let lines = rows_of_mut(out, out_size.1);
    for (row, out) in nearest_places(upsampled.0, out_size.0).zip(lines) {
        if row == last {
            copy(last_line, out);
            continue;
        }
        interpolate_row(labels, grid, classes, Between::new(row, scale, grid.height()), line);
        let columns = nearest_places(upsampled.1, out_size.1);
        for (column, out) in columns.zip(&mut *out) {
            let between = Between::new(column, scale, grid.width());
            let mut best = f32::NEG_INFINITY;
            *out = 0;
            let values = between.values(line, classes).zip(&*least).zip(&*most);
            for (class, ((value, least), most)) in values.enumerate() {
                let value = (value - least) / most;
                if value > best {
                    (*out, best) = (class as u8, value);
                }
            }
        }
        (last, last_line) = (row, out);
    }
    Ok(())
}

/// A place of the upsampled axis between two patches.
#[derive(Clone, Copy)]
struct Between {
    low: usize,
    high: usize,
    weight: f32,
}

impl Between {
    /// Center of pixel `index`, in patches (`align_corners = false`): `(index + ½)/scale − ½`, not below 0.
    fn new(index: usize, scale: usize, side: usize) -> Self {
        let position = ((index as f32 + 0.5) / scale as f32 - 0.5).max(0.0);
        let end = side.saturating_sub(1);
        let low = (position as usize).min(end);
        Self { low, high: (low + 1).min(end), weight: position - low as f32 }
    }

    /// Labels of all classes between the two patches of `line`, `[width, C]`.
    fn values(self, line: &[f32], classes: usize) -> impl Iterator<Item = f32> {
        let [low, high] = [self.low, self.high].map(|patch| row(line, patch, classes));
        low.iter().zip(high).map(move |(low, high)| (1.0 - self.weight) * low + self.weight * high)
    }
}

/// Labels of one upsampled row, at the columns of the patches.
fn interpolate_row(labels: &[f32], grid: PatchGrid, classes: usize, between: Between, out: &mut [f32]) {
    let [low, high] = [between.low, between.high].map(|line| row(labels, line, grid.width() * classes));
    for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
        *out = (1.0 - between.weight) * low + between.weight * high;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec;
    use std::vec::Vec;

    fn segment(
        labels: &[f32],
        grid: (usize, usize),
        classes: usize,
        scale: usize,
        size: (usize, usize),
    ) -> Vec<u8> {
        let grid = PatchGrid::new(grid.0, grid.1).unwrap();
        let mut scratch = vec![f32::NAN; segment_scratch_len(grid, classes)];
        let mut out = vec![9; size.0 * size.1];
        segment_into(labels, grid, classes, scale, size, &mut scratch, &mut out).unwrap();
        out
    }

    #[test]
    fn nearest_neighbors_are_taken_at_pixel_centers() {
        let mut out = [0; 3];
        resize_nearest_into(&[0, 1, 2, 3, 4, 5, 6, 7], (1, 8), (1, 3), &mut out).unwrap();
        assert_eq!(out, [1, 4, 6]);
        let mut out = [0; 8];
        resize_nearest_into(&[7, 8], (2, 1), (4, 2), &mut out).unwrap();
        assert_eq!(out, [7, 7, 7, 7, 8, 8, 8, 8]);
        assert!(resize_nearest_into(&[7, 8], (2, 1), (4, 3), &mut out).is_err());
        assert!(resize_nearest_into(&[7], (2, 1), (4, 2), &mut out).is_err());
        assert!(resize_nearest_into(&[], (0, 1), (4, 2), &mut out).is_err());
        assert!(resize_nearest_into(&[7], (1, 1), (0, 2), &mut []).is_err());
    }

    #[test]
    fn labels_are_one_hot() {
        let mut out = [9.0; 6];
        one_hot_into(&[2, 0], 3, &mut out).unwrap();
        assert_eq!(out, [0.0, 0.0, 1.0, 1.0, 0.0, 0.0]);
        assert_eq!(
            one_hot_into(&[3, 0], 3, &mut out),
            Err(Error::OutOfRange { what: "label", min: 0, max: 2, actual: 3 })
        );
        assert!(one_hot_into(&[0], 3, &mut out).is_err());
        assert!(one_hot_into(&[], 0, &mut []).is_ok());
        assert!(one_hot_into(&[0], 0, &mut []).is_err());
    }

    #[test]
    fn classes_are_stretched_before_they_are_compared() {
        // class 1 never passes 0.3, but stretched it is 1 on the right, where class 0 is 0
        assert_eq!(segment(&[1.0, 0.0, 0.7, 0.3], (1, 2), 2, 1, (1, 4)), [0, 0, 1, 1]);
        // a class nowhere positive stays 0 and loses; the constant positive one wins everywhere
        assert_eq!(segment(&[1.0, 0.0, 1.0, 0.0], (1, 2), 2, 1, (1, 2)), [0, 0]);
        assert_eq!(segment(&[0.0, 0.5, 0.9, 0.5], (1, 2), 2, 1, (1, 2)), [1, 1]);
        assert_eq!(segment(&[f32::NAN, 0.5, 0.9, 0.2], (1, 2), 2, 1, (1, 2)).len(), 2);
    }

    #[test]
    fn impossible_sizes_are_refused() {
        let grid = PatchGrid::new(1, 2).unwrap();
        let run = |labels: usize, classes, scale, size, scratch: usize, out: usize| {
            let labels = vec![0.0; labels];
            segment_into(&labels, grid, classes, scale, size, &mut vec![0.0; scratch], &mut vec![0; out])
        };
        assert!(run(4, 2, 4, (3, 3), 8, 9).is_ok());
        for (labels, classes, scale, size, scratch, out) in [
            (4, 0, 4, (3, 3), 8, 9),
            (514, 257, 4, (3, 3), 9999, 9),
            (4, 2, 0, (3, 3), 8, 9),
            (4, 2, usize::MAX, (3, 3), 8, 9),
            (3, 2, 4, (3, 3), 8, 9),
            (4, 2, 4, (3, 0), 8, 0),
            (4, 2, 4, (3, 3), 7, 9),
            (4, 2, 4, (3, 3), 8, 8),
        ] {
            assert!(run(labels, classes, scale, size, scratch, out).is_err());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 64 }))]
        #[test]
        fn masks_agree_with_an_upsampled_double_precision_twin(
            (height, width, classes, scale) in (1_usize..5, 1_usize..5, 1_usize..4, 1_usize..9),
            size in (1_usize..40, 1_usize..40),
            numbers in prop::collection::vec(0.0_f32..1.0, 4 * 4 * 3),
        ) {
            let labels = &numbers[..height * width * classes];
            let places = |side: usize| -> Vec<(usize, usize, f64)> {
                (0..side * scale)
                    .map(|index| {
                        let position = ((index as f64 + 0.5) / scale as f64 - 0.5).max(0.0);
                        (position as usize, (position as usize + 1).min(side - 1), position.fract())
                    })
                    .collect()
            };
            let at = |y: usize, x: usize, class: usize| f64::from(labels[(y * width + x) * classes + class]);
            let planes: Vec<Vec<f64>> = (0..classes)
                .map(|class| {
                    let mut plane = vec![];
                    for &(y0, y1, v) in &places(height) {
                        for &(x0, x1, u) in &places(width) {
                            let line = |y: usize| at(y, x0, class) * (1.0 - u) + at(y, x1, class) * u;
                            plane.push(line(y0) * (1.0 - v) + line(y1) * v);
                        }
                    }
                    let least = plane.iter().copied().fold(f64::INFINITY, f64::min);
                    let most = plane.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    plane.iter().map(|value| (value - least) / (most - least)).collect()
                })
                .collect();
            let found = segment(labels, (height, width), classes, scale, size);
            // a single patch is constant: rounding decides what it is stretched to
            for (index, &found) in found.iter().enumerate().filter(|_| height * width > 1) {
                // twice the place of the pixel's center, times the size of the mask
                let (y, x) = ((index / size.1 * 2 + 1) * height * scale, (index % size.1 * 2 + 1) * width * scale);
                if y % (2 * size.0) == 0 || x % (2 * size.1) == 0 {
                    continue; // on the edge of two pixels: rounding decides, as in Pillow
                }
                let (y, x) = (y / (2 * size.0), x / (2 * size.1));
                let value = |class: usize| planes[class][y * width * scale + x];
                let best = (0..classes).map(value).fold(f64::NEG_INFINITY, f64::max);
                prop_assert!(value(usize::from(found)) >= best - 1e-4, "pixel {} is {}", index, found);
            }
        }
    }
}
