//! Bilinear resampling of feature maps as a sparse linear map along each of the two axes.
//!
//! Such maps can be chained before anything is computed ([`Taps::then`]): resizing up and down again, or up to the
//! network's input and then to the picture, costs as much as one resize.

use super::access::{output, stored, tensor, values};
use super::buffer::build;
use super::lanes::{add_multiple, widest};
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor, bail};
use std::sync::Arc;

/// A linear map of one axis with few inputs for each output.
#[derive(Clone, Debug, PartialEq)]
pub struct Taps {
    inputs: usize,
    /// Where the entries of each output end.
    ends: Vec<usize>,
    /// Input and weight.
    entries: Vec<(usize, f32)>,
}

impl Taps {
    /// Bilinear interpolation without antialiasing: half-pixel centers, clamped borders (PyTorch's `interpolate` with
    /// `mode="bilinear", align_corners=False`).
    ///
    /// # Panics
    /// If one of the sizes is 0.
    pub fn bilinear(from: usize, to: usize) -> Self {
        assert!(from > 0 && to > 0, "an axis of a picture is not empty");
        let scale = from as f64 / to as f64;
        Self::from_rows(
            from,
            (0..to).map(|target| {
                let source = ((target as f64 + 0.5) * scale - 0.5).max(0.0);
                let first = (source.floor() as usize).min(from - 1);
                let share = source - first as f64;
                vec![(first, 1.0 - share), ((first + 1).min(from - 1), share)]
            }),
        )
    }

    fn from_rows(inputs: usize, rows: impl Iterator<Item = Vec<(usize, f64)>>) -> Self {
        let mut taps = Self { inputs, ends: Vec::new(), entries: Vec::new() };
        for mut row in rows {
            row.sort_unstable_by_key(|entry| entry.0);
            let mut merged: Vec<(usize, f64)> = Vec::with_capacity(row.len());
            for (input, weight) in row {
                match merged.last_mut() {
                    Some(last) if last.0 == input => last.1 += weight,
                    _ => merged.push((input, weight)),
                }
            }
            let present = merged.into_iter().filter(|entry| entry.1 != 0.0);
            taps.entries.extend(present.map(|(input, weight)| (input, weight as f32)));
            taps.ends.push(taps.entries.len());
        }
        taps
    }

    /// Length of the axis before.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Length of the axis after.
    pub fn outputs(&self) -> usize {
        self.ends.len()
    }

    /// Inputs and weights of one output.
    #[inline(always)]
    pub fn of(&self, output: usize) -> &[(usize, f32)] {
        let start = if output == 0 { 0 } else { self.ends[output - 1] };
        &self.entries[start..self.ends[output]]
    }

    /// This map, then `next`.
    ///
    /// # Panics
    /// If `next` does not start where this map ends.
    pub fn then(&self, next: &Self) -> Self {
        assert_eq!(self.outputs(), next.inputs, "chained maps");
        Self::from_rows(
            self.inputs,
            (0..next.outputs()).map(|output| {
                let through = next.of(output).iter();
                through
                    .flat_map(|&(middle, outer)| {
                        self.of(middle).iter().map(move |&(i, w)| (i, f64::from(outer) * f64::from(w)))
                    })
                    .collect()
            }),
        )
    }

    /// Only the first `outputs` outputs.
    pub fn first(mut self, outputs: usize) -> Self {
        self.ends.truncate(outputs);
        self.entries.truncate(self.ends.last().copied().unwrap_or(0));
        self
    }

    /// The transposed map, which carries gradients back.
    pub fn transposed(&self) -> Self {
        let mut rows = vec![Vec::new(); self.inputs];
        for output in 0..self.outputs() {
            for &(input, weight) in self.of(output) {
                rows[input].push((output, f64::from(weight)));
            }
        }
        Self::from_rows(self.outputs(), rows.into_iter())
    }

    /// The map as a matrix `[outputs, inputs]`.
    ///
    /// # Errors
    /// If the device has no room for it.
    pub fn dense(&self, dtype: DType, device: &Device) -> Result<Tensor> {
        let mut matrix = vec![0f32; self.outputs() * self.inputs];
        for output in 0..self.outputs() {
            for &(input, weight) in self.of(output) {
                matrix[output * self.inputs + input] = weight;
            }
        }
        Tensor::from_vec(matrix, (self.outputs(), self.inputs), device)?.to_dtype(dtype)
    }
}

pub(super) fn check(x: &Tensor, rows: &Taps, columns: &Taps) -> Result<()> {
    let (_, height, width, channels) = x.dims4()?;
    if (height, width) != (rows.inputs, columns.inputs) || channels == 0 {
        bail!("resample: expected a map of {}x{}, found {:?}", rows.inputs, columns.inputs, x.shape())
    }
    Ok(())
}

pub(super) fn composition(x: &Tensor, rows: &Taps, columns: &Taps) -> Result<Tensor> {
    let (batch, height, width, channels) = x.dims4()?;
    let row_matrix = rows.dense(x.dtype(), x.device())?;
    let column_matrix = columns.dense(x.dtype(), x.device())?;
    let x = row_matrix.broadcast_matmul(&x.reshape((batch, height, width * channels))?)?;
    let x = x.reshape((batch * rows.outputs(), width, channels))?;
    column_matrix.broadcast_matmul(&x)?.reshape((batch, rows.outputs(), columns.outputs(), channels))
}

pub(super) fn fused(x: &Tensor, rows: &Taps, columns: &Taps) -> Result<Tensor> {
    let operation = Resample { rows: Arc::new(rows.clone()), columns: Arc::new(columns.clone()) };
    x.contiguous()?.apply_op1(operation)
}

struct Resample {
    rows: Arc<Taps>,
    columns: Arc<Taps>,
}

/// Every output row on its own: blended from input rows, then resampled along the row.
fn resample(x: &[f32], batch: usize, channels: usize, rows: &Taps, columns: &Taps) -> Vec<f32> {
    let (width, out_width) = (columns.inputs, columns.outputs());
    let image = rows.inputs * width * channels;
    build(batch * rows.outputs() * out_width * channels, out_width * channels, |part, out| {
        let (image_index, row) = (part / rows.outputs(), part % rows.outputs());
        let x = &x[image_index * image..][..image];
        let mut blended = vec![0f32; width * channels];
        for &(source, weight) in rows.of(row) {
            widest!(add_multiple(&mut blended, weight, &x[source * width * channels..][..width * channels]));
        }
        widest!({
            for (column, out) in out.chunks_exact_mut(channels).enumerate() {
                for &(source, weight) in columns.of(column) {
                    add_multiple(out, weight, &blended[source * channels..][..channels]);
                }
            }
        });
    })
    .0
}

impl CustomOp1 for Resample {
    fn name(&self) -> &'static str {
        "resample"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (batch, _, _, channels) = layout.shape().dims4()?;
        let resampled = resample(values(x, layout)?, batch, channels, &self.rows, &self.columns);
        output(resampled, (batch, self.rows.outputs(), self.columns.outputs(), channels))
    }

    fn bwd(&self, x: &Tensor, _result: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let (batch, _, _, channels) = x.dims4()?;
        let gradient = gradient.contiguous()?;
        let (storage, layout) = gradient.storage_and_layout();
        let (rows, columns) = (self.rows.transposed(), self.columns.transposed());
        let dx = resample(stored(&storage, layout)?, batch, channels, &rows, &columns);
        Ok(Some(tensor(dx, x.shape())?))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Ops, testing::*};
    use super::Taps;

    #[test]
    fn fused_agrees_with_composition_and_finite_differences() {
        for ((height, width), (to_height, to_width), channels) in
            [((1, 1), (1, 1), 1), ((3, 2), (6, 4), 5), ((4, 5), (3, 2), 2), ((2, 3), (5, 1), 33)]
        {
            let (rows, columns) = (Taps::bilinear(height, to_height), Taps::bilinear(width, to_width));
            check(&|ops, t| ops.resample(&t[0], &rows, &columns), &[&[2, height, width, channels]]);
        }
    }

    #[test]
    fn interpolation_has_half_pixel_centers_and_clamped_borders() {
        let taps = Taps::bilinear(2, 4);
        assert_eq!(taps.of(0), [(0, 1.0)]);
        assert_eq!(taps.of(1), [(0, 0.75), (1, 0.25)]);
        assert_eq!(taps.of(2), [(0, 0.25), (1, 0.75)]);
        assert_eq!(taps.of(3), [(1, 1.0)]);
        assert_eq!(Taps::bilinear(5, 5).entries.len(), 5);
    }

    #[test]
    fn chained_maps_equal_one_after_the_other() {
        let x = random(3, &[1, 7, 5, 3]);
        let ops = Ops::fused();
        let ([up, down], [wide, narrow]) = (
            [Taps::bilinear(7, 14), Taps::bilinear(14, 6)],
            [Taps::bilinear(5, 11).first(9), Taps::bilinear(9, 4)],
        );
        let two = ops.resample(&ops.resample(&x, &up, &wide).unwrap(), &down, &narrow).unwrap();
        let one = ops.resample(&x, &up.then(&down), &wide.then(&narrow)).unwrap();
        assert_close("chained", &flat(&one), &flat(&two), 1e-6);
    }

    #[test]
    fn another_size_is_refused() {
        let x = random(1, &[1, 3, 4, 2]);
        let taps = Taps::bilinear(4, 8);
        assert!(Ops::fused().resample(&x, &taps, &taps).unwrap_err().to_string().contains("4x4"));
    }
}
