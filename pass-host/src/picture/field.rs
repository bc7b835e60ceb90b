//! One number a patch, enlarged to pixels.

/// How numbers of patches become pixels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Enlarge {
    /// Cubic interpolation through the centers of the patches.
    #[default]
    Smooth,
    /// Every patch a square.
    Nearest,
}

/// Weights of the four neighbors of a point `t` in `[0, 1)` behind the second (Catmull-Rom).
fn cubic(t: f32) -> [f32; 4] {
    let (square, cube) = (t * t, t * t * t);
    [
        -0.5 * t + square - 0.5 * cube,
        1.0 - 2.5 * square + 1.5 * cube,
        0.5 * t + 2.0 * square - 1.5 * cube,
        -0.5 * square + 0.5 * cube,
    ]
}

/// For every pixel of a side, the four patches around it and their weights.
fn taps(patches: usize, pixels: usize) -> Vec<([usize; 4], [f32; 4])> {
    let tap = |pixel: usize| {
        let place = (pixel as f32 + 0.5) * patches as f32 / pixels as f32 - 0.5;
        let first = place.floor();
        let at = |offset: f32| (first + offset).clamp(0.0, patches as f32 - 1.0) as usize;
        ([at(-1.0), at(0.0), at(1.0), at(2.0)], cubic(place - first))
    };
    (0..pixels).map(tap).collect()
}

/// Values `[rows, columns]` as `[height, width]`.
///
/// # Panics
/// When `values` has another length.
pub fn enlarge(
    values: &[f32],
    (rows, columns): (usize, usize),
    (height, width): (usize, usize),
    how: Enlarge,
) -> Vec<f32> {
    assert_eq!(values.len(), rows * columns, "one value a patch");
    if how == Enlarge::Nearest {
        let value =
            |pixel: usize| values[pixel / width * rows / height * columns + pixel % width * columns / width];
        return (0..height * width).map(value).collect();
    }
    let across = taps(columns, width);
    let mut wide = Vec::with_capacity(rows * width);
    for row in values.chunks_exact(columns) {
        wide.extend(across.iter().map(|(at, weight)| (0..4).map(|i| row[at[i]] * weight[i]).sum::<f32>()));
    }
    let mut out = Vec::with_capacity(height * width);
    for (at, weight) in taps(rows, height) {
        out.extend((0..width).map(|x| (0..4).map(|i| wide[at[i] * width + x] * weight[i]).sum::<f32>()));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_repeats_and_smooth_passes_through_the_centers() {
        let values = [1.0, 5.0, -2.0, 0.5, 3.0, 9.0];
        let nearest = enlarge(&values, (2, 3), (4, 9), Enlarge::Nearest);
        assert_eq!(nearest[..9], [1.0, 1.0, 1.0, 5.0, 5.0, 5.0, -2.0, -2.0, -2.0]);
        assert_eq!(nearest[27], 0.5);
        // odd factors have a pixel at every center
        let smooth = enlarge(&values, (2, 3), (6, 9), Enlarge::Smooth);
        for (patch, value) in values.iter().enumerate() {
            let pixel = (patch / 3 * 3 + 1) * 9 + patch % 3 * 3 + 1;
            assert!((smooth[pixel] - value).abs() < 1e-5);
        }
        let flat = enlarge(&[2.0; 6], (2, 3), (7, 5), Enlarge::Smooth);
        assert!(flat.iter().all(|value| (value - 2.0).abs() < 1e-5));
    }

    #[test]
    fn smooth_keeps_straight_lines() {
        let ramp: Vec<f32> = (0..8).map(|i| i as f32).collect();
        let out = enlarge(&ramp, (1, 8), (1, 32), Enlarge::Smooth);
        for pixel in 8..24 {
            assert!((out[pixel] - ((pixel as f32 + 0.5) / 4.0 - 0.5)).abs() < 1e-4);
        }
    }
}
