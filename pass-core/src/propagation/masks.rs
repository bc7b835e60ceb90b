//! Masks to labels and back: from the size of a frame to its patches, and from soft labels of patches to a mask.

use core::ops::Range;

use crate::error::{Error, Result, check_length, check_scratch};
use crate::shape::PatchGrid;

/// Coordinates `0..to` of an axis resized by nearest neighbor from `from`, as Pillow computes them:
/// `floor((x + ½)·from/to)`, with the position summed up in double precision.
fn nearest_places(from: usize, to: usize) -> impl Iterator<Item = usize> + Clone {
    let step = from as f64 / to as f64;
    let mut position = 0.5 * step;
    (0..to).map(move |_| {
        let place = (position as usize).min(from - 1);
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
    for (row, out) in nearest_places(size.0, out_size.0).zip(out.chunks_exact_mut(out_size.1)) {
        for (column, out) in nearest_places(size.1, out_size.1).zip(out) {
            *out = mask[row * size.1 + column];
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
    for (label, out) in mask.iter().zip(out.chunks_exact_mut(classes.max(1))) {
        out[usize::from(*label)] = 1.0;
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
    let (bounds, line) = scratch.split_at_mut(2 * classes);
    let (least, most) = bounds.split_at_mut(classes);
    let line = &mut line[..grid.width() * classes];

    least.fill(f32::INFINITY);
    most.fill(f32::NEG_INFINITY);
    for row in 0..upsampled.0 {
        interpolate_row(labels, grid, classes, Between::new(row, scale, grid.height()), line);
        for column in 0..upsampled.1 {
            let between = Between::new(column, scale, grid.width());
            for class in 0..classes {
                let value = between.value(line, class, classes);
                least[class] = least[class].min(value);
                most[class] = most[class].max(value);
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

    let mut last = (usize::MAX, 0..0);
    for (place, row) in nearest_places(upsampled.0, out_size.0).enumerate() {
        let here = place * out_size.1..(place + 1) * out_size.1;
        if row == last.0 {
            out.copy_within(last.1.clone(), here.start);
            continue;
        }
        interpolate_row(labels, grid, classes, Between::new(row, scale, grid.height()), line);
        let columns = nearest_places(upsampled.1, out_size.1);
        for (column, out) in columns.zip(&mut out[Range::clone(&here)]) {
            let between = Between::new(column, scale, grid.width());
            let mut best = f32::NEG_INFINITY;
            *out = 0;
            for class in 0..classes {
                let value = (between.value(line, class, classes) - least[class]) / most[class];
                if value > best {
                    (*out, best) = (class as u8, value);
                }
            }
        }
        last = (row, here);
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
        let low = (position as usize).min(side - 1);
        Self { low, high: (low + 1).min(side - 1), weight: position - low as f32 }
    }

    fn value(self, line: &[f32], class: usize, classes: usize) -> f32 {
        let (low, high) = (line[self.low * classes + class], line[self.high * classes + class]);
        (1.0 - self.weight) * low + self.weight * high
    }
}

/// Labels of one upsampled row, at the columns of the patches.
fn interpolate_row(labels: &[f32], grid: PatchGrid, classes: usize, between: Between, out: &mut [f32]) {
    let row = |row: usize| &labels[row * grid.width() * classes..][..grid.width() * classes];
    for ((out, low), high) in out.iter_mut().zip(row(between.low)).zip(row(between.high)) {
        *out = (1.0 - between.weight) * low + between.weight * high;
    }
}
