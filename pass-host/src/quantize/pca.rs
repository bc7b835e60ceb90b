//! Principal components of patch features: a fixed basis for pictures of them on the device.

use ndarray::{Array1, Array2, Axis};

/// Passes of the power iteration: the components are for pictures.
const PASSES: usize = 200;

/// Mean `[D]` and the first `components` directions `[components, D]`, unit length, largest entry positive.
pub(super) fn principal_components(
    features: &[Array2<f32>],
    patches: usize,
    components: usize,
) -> (Array1<f32>, Array2<f32>) {
    let dim = features.first().map_or(0, Array2::ncols);
    let rows = || features.iter().flat_map(|image| image.axis_iter(Axis(0)).take(patches));
    let count = rows().count().max(1) as f64;
    let mut mean = Array1::<f64>::zeros(dim);
    for row in rows() {
        mean += &row.mapv(f64::from);
    }
    mean /= count;
    let mut covariance = Array2::<f64>::zeros((dim, dim));
    for image in features {
        let centered = image.slice(ndarray::s![..patches, ..]).mapv(f64::from) - &mean;
        covariance += &centered.t().dot(&centered);
    }
    covariance /= count;
    let mut basis = Array2::<f64>::zeros((components, dim));
    for component in 0..components {
        // a start that no direction is orthogonal to by symmetry
        let mut direction =
            Array1::from_shape_fn(dim, |i| 1.0 + ((i * 7919 + component) % 101) as f64 / 101.0);
        for _ in 0..PASSES {
            direction = covariance.dot(&direction);
            for earlier in basis.rows().into_iter().take(component) {
                let share = earlier.dot(&direction);
                direction.scaled_add(-share, &earlier);
            }
            let norm = direction.dot(&direction).sqrt();
            if norm > 0.0 {
                direction /= norm;
            }
        }
        let largest = direction.iter().fold(0.0_f64, |most, v| if v.abs() > most.abs() { *v } else { most });
        if largest < 0.0 {
            direction.mapv_inplace(|v| -v);
        }
        basis.row_mut(component).assign(&direction);
    }
    (mean.mapv(|v| v as f32), basis.mapv(|v| v as f32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_long_axis_of_a_cloud_comes_first() {
        let cloud = Array2::from_shape_fn((64, 3), |(row, column)| {
            let t = row as f32 / 64.0 - 0.5;
            [5.0 + 4.0 * t, 1.0 + (row % 7) as f32 * 0.1, -4.0 * t][column]
        });
        let (mean, basis) = principal_components(&[cloud], 64, 2);
        assert!((mean[1] - 1.298).abs() < 0.02, "{mean}");
        let half = 0.5_f32.sqrt();
        assert!((basis[(0, 0)].abs() - half).abs() < 0.01 && (basis[(0, 2)].abs() - half).abs() < 0.01);
        assert!((basis.row(0).dot(&basis.row(1))).abs() < 1e-5 && basis[(1, 1)] > 0.99);
    }
}
