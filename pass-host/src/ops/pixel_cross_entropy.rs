//! Cross-entropy of every pixel of a label picture against a coarse map of logits.
//!
//! The logits are interpolated row by row and never exist at the size of the picture: at 512x512 pixels and 150
//! classes that would be 157 MB an image.

use super::access::{output, tensor, values};
use super::buffer::build;
use super::lanes::{add_multiple, exp, halve, widest};
use super::taps::{self, Taps};
use candle_core::{CpuStorage, CustomOp1, D, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;
use std::sync::{Arc, OnceLock};

/// The label of a pixel that does not count.
pub const IGNORED: u8 = 255;

/// Labels of a batch of pictures and how the map of logits is brought to their size.
#[derive(Clone, Debug)]
pub struct PixelLabels {
    /// `[B, H, W]`, each below the number of classes or [`IGNORED`].
    pub labels: Arc<[u8]>,
    /// From the height of the map to H.
    pub rows: Arc<Taps>,
    /// From the width of the map to W.
    pub columns: Arc<Taps>,
}

pub(super) fn check(logits: &Tensor, target: &PixelLabels) -> Result<()> {
    taps::check(logits, &target.rows, &target.columns)?;
    let (batch, _, _, classes) = logits.dims4()?;
    let pixels = batch * target.rows.outputs() * target.columns.outputs();
    if target.labels.len() != pixels {
        bail!("pixel_cross_entropy: expected {pixels} labels, found {}", target.labels.len())
    }
    match target.labels.iter().find(|&&label| label != IGNORED && usize::from(label) >= classes) {
        Some(label) => bail!("pixel_cross_entropy: label {label} outside {classes} classes"),
        None => Ok(()),
    }
}

pub(super) fn composition(logits: &Tensor, target: &PixelLabels, scale: f64) -> Result<Tensor> {
    let full = taps::composition(logits, &target.rows, &target.columns)?;
    let (batch, height, width, _) = full.dims4()?;
    let shifted = full.broadcast_sub(&full.detach().max_keepdim(D::Minus1)?)?;
    let normalizer = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    let shape = (batch, height, width, 1);
    let counted = |label: &u8| *label != IGNORED;
    let index: Vec<u32> = target.labels.iter().map(|l| if counted(l) { u32::from(*l) } else { 0 }).collect();
    let weight: Vec<f32> = target.labels.iter().map(|l| if counted(l) { 1.0 } else { 0.0 }).collect();
    let index = Tensor::from_vec(index, shape, logits.device())?;
    let weight = Tensor::from_vec(weight, shape, logits.device())?.to_dtype(logits.dtype())?;
    let losses = (normalizer - shifted.gather(&index, D::Minus1)?)?;
    losses.mul(&weight)?.sum_all()? * scale
}

pub(super) fn fused(logits: &Tensor, target: &PixelLabels, scale: f64) -> Result<Tensor> {
    let tracked = logits.track_op();
    let operation =
        PixelCrossEntropy { target: target.clone(), scale: scale as f32, tracked, gradient: OnceLock::new() };
    logits.contiguous()?.apply_op1(operation)
}

struct PixelCrossEntropy {
    target: PixelLabels,
    scale: f32,
    /// Whether a backward pass may follow.
    tracked: bool,
    /// Gradient of the logits for a loss of weight 1, found along with the loss.
    gradient: OnceLock<Vec<f32>>,
}

/// Classes handled together; maps are filled up to a multiple of it.
const LANES: usize = 16;
/// Pixels whose sums, each from 1 to 256, are multiplied before one logarithm is taken: up to 2^512 is no infinity.
const LOGARITHM: usize = 64;
/// The logit of a class that is not there: interpolated it stays far below all others.
const NO_CLASS: f32 = -1e30;

/// A map `[h, w, C]` with every pixel filled up to whole lanes.
struct Filled {
    width: usize,
    classes: usize,
    /// Lanes of a pixel.
    lanes: usize,
    pixels: Vec<[f32; LANES]>,
}

impl Filled {
    fn new(map: &[f32], classes: usize, width: usize) -> Self {
        let lanes = classes.div_ceil(LANES);
        let mut pixels = vec![[NO_CLASS; LANES]; map.len() / classes * lanes];
        for (logits, pixel) in map.chunks_exact(classes).zip(pixels.chunks_exact_mut(lanes)) {
            pixel.as_flattened_mut()[..classes].copy_from_slice(logits);
        }
        Self { width, classes, lanes, pixels }
    }

    /// The row `y` of the picture before it is resampled along the row.
    fn blended(&self, y: usize, rows: &Taps) -> Vec<[f32; LANES]> {
        let length = self.width * self.lanes;
        let mut blended = vec![[0f32; LANES]; length];
        for &(source, weight) in rows.of(y) {
            let row = self.pixels[source * length..][..length].as_flattened();
            widest!(add_multiple(blended.as_flattened_mut(), weight, row));
        }
        blended
    }

    /// Sum of the losses of a row and, for a gradient, that of its blended logits `[w, C]`.
    fn row(
        &self,
        y: usize,
        (rows, columns): (&Taps, &Taps),
        labels: &[u8],
        mut gradient: Option<(f32, &mut [f32])>,
    ) -> f64 {
        let blended = self.blended(y, rows);
        let mut back = vec![[0f32; LANES]; if gradient.is_some() { blended.len() } else { 0 }];
        let scale = gradient.as_ref().map_or(0.0, |(scale, _)| *scale);
        let mut scores = vec![[0f32; LANES]; self.lanes];
        let lanes = self.lanes;
        let loss = widest!({
            let scores = &mut scores[..lanes];
            let (mut loss, mut product, mut multiplied) = (0f64, 1f64, 0);
            for (x, &label) in labels.iter().enumerate() {
                if label == IGNORED {
                    continue;
                }
                interpolate(scores, &blended, columns.of(x));
                let largest = largest_of(scores);
                let own = scores.as_flattened()[usize::from(label)];
                let sum = exponentials(scores, largest);
                loss += f64::from(largest - own);
                product *= f64::from(sum);
                multiplied += 1;
                if multiplied == LOGARITHM {
                    loss += product.ln();
                    (product, multiplied) = (1.0, 0);
                }
                if !back.is_empty() {
                    let factor = scale / sum;
                    for value in scores.as_flattened_mut() {
                        *value *= factor;
                    }
                    scores.as_flattened_mut()[usize::from(label)] -= scale;
                    for &(source, weight) in columns.of(x) {
                        let back = &mut back[source * lanes..][..lanes];
                        add_multiple(back.as_flattened_mut(), weight, scores.as_flattened());
                    }
                }
            }
            loss + product.ln()
        });
        if let Some((_, out)) = &mut gradient {
            for (out, back) in out.chunks_exact_mut(self.classes).zip(back.chunks_exact(lanes)) {
                out.copy_from_slice(&back.as_flattened()[..self.classes]);
            }
        }
        loss
    }
}

/// Interpolated logits of one pixel.
#[inline(always)]
fn interpolate(scores: &mut [[f32; LANES]], blended: &[[f32; LANES]], taps: &[(usize, f32)]) {
    let lanes = scores.len();
    scores.fill([0.0; LANES]);
    for &(source, weight) in taps {
        let from = blended[source * lanes..][..lanes].as_flattened();
        add_multiple(scores.as_flattened_mut(), weight, from);
    }
}

/// All lanes as one, halved again and again.
#[inline(always)]
fn folded(lanes: [f32; LANES], fold: impl Fn(f32, f32) -> f32 + Copy) -> f32 {
    let lanes: [f32; 8] = halve(lanes, fold);
    let lanes: [f32; 4] = halve(lanes, fold);
    let lanes: [f32; 2] = halve(lanes, fold);
    fold(lanes[0], lanes[1])
}

/// The largest value; NaN are passed over.
#[inline(always)]
fn largest_of(scores: &[[f32; LANES]]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in scores {
        for i in 0..LANES {
            if chunk[i] > lanes[i] {
                lanes[i] = chunk[i];
            }
        }
    }
    folded(
        lanes,
        #[inline(always)]
        |a, b| if b > a { b } else { a },
    )
}

/// Replaces scores by `exp(score − largest)`; their sum.
#[inline(always)]
fn exponentials(scores: &mut [[f32; LANES]], largest: f32) -> f32 {
    let mut lanes = [0f32; LANES];
    for chunk in scores {
        for i in 0..LANES {
            chunk[i] = exp(chunk[i] - largest);
            lanes[i] += chunk[i];
        }
    }
    folded(
        lanes,
        #[inline(always)]
        |a, b| a + b,
    )
}

impl CustomOp1 for PixelCrossEntropy {
    fn name(&self) -> &'static str {
        "pixel_cross_entropy"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, height, width, classes) = layout.shape().dims4()?;
        let logits = values(logits, layout)?;
        let (rows, columns) = (&*self.target.rows, &*self.target.columns);
        let (out_height, out_width) = (rows.outputs(), columns.outputs());
        let back = rows.transposed();
        let mut total = 0f64;
        let mut gradient = Vec::with_capacity(if self.tracked { logits.len() } else { 0 });
        let maps = logits.chunks_exact(height * width * classes);
        for (map, labels) in maps.zip(self.target.labels.chunks_exact(out_height * out_width)) {
            let map_rows = Filled::new(map, classes, width);
            let labels_of = |y: usize| &labels[y * out_width..][..out_width];
            if !self.tracked {
                let row = |y: usize| map_rows.row(y, (rows, columns), labels_of(y), None);
                let losses: Vec<f64> = (0..out_height).into_par_iter().map(row).collect();
                total += losses.iter().sum::<f64>();
                continue;
            }
            let (blended, losses) = build(out_height * width * classes, width * classes, |y, out| {
                map_rows.row(y, (rows, columns), labels_of(y), Some((self.scale, out)))
            });
            total += losses.iter().sum::<f64>();
            let (map_gradient, _) = build(map.len(), width * classes, |y, out| {
                for &(source, weight) in back.of(y) {
                    let row = &blended[source * width * classes..][..width * classes];
                    widest!(add_multiple(out, weight, row));
                }
            });
            gradient.extend(map_gradient);
        }
        // an operation object lives for one call, so the cell is empty; a second value would be the same
        self.gradient.get_or_init(|| gradient);
        output(vec![(total * f64::from(self.scale)) as f32], ())
    }

    fn bwd(&self, logits: &Tensor, _result: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        match self.gradient.get() {
            Some(own) if own.len() == logits.elem_count() => {
                let own = tensor(own.clone(), logits.shape())?;
                Ok(Some(own.affine(f64::from(gradient.to_dtype(DType::F32)?.to_scalar::<f32>()?), 0.0)?))
            }
            _ => bail!("pixel_cross_entropy: backward without a tracked forward pass"),
        }
    }
}

/// The class with the largest interpolated logit of every pixel, `[H, W]`; the lowest of equals.
///
/// - `map`: `[h, w, C]` of one picture.
pub(super) fn largest(map: &[f32], classes: usize, rows: &Taps, columns: &Taps) -> Vec<u8> {
    let width = columns.outputs();
    let map = Filled::new(map, classes, columns.inputs());
    let mut classes_found = vec![0u8; rows.outputs() * width];
    classes_found.par_chunks_mut(width).enumerate().for_each(|(y, found)| {
        let blended = map.blended(y, rows);
        let mut scores = vec![[0f32; LANES]; map.lanes];
        widest!({
            for (x, found) in found.iter_mut().enumerate() {
                interpolate(&mut scores, &blended, columns.of(x));
                let largest = largest_of(&scores);
                let class = scores.as_flattened().iter().position(|score| *score == largest);
                *found = class.unwrap_or(0) as u8;
            }
        });
    });
    classes_found
}

#[cfg(test)]
mod tests {
    use super::super::{Ops, testing::*};
    use super::{IGNORED, PixelLabels, Taps, largest, taps};
    use crate::random::{Purpose, Stream};
    use candle_core::D;
    use std::sync::Arc;

    fn target(
        seed: u64,
        batch: usize,
        map: (usize, usize),
        size: (usize, usize),
        classes: u64,
    ) -> PixelLabels {
        let mut stream = Stream::new(seed, Purpose::Subset, &[]);
        let label = |stream: &mut Stream| match stream.below(classes + 1) {
            label if label == classes => IGNORED,
            label => label as u8,
        };
        PixelLabels {
            labels: (0..batch * size.0 * size.1).map(|_| label(&mut stream)).collect(),
            rows: Arc::new(Taps::bilinear(map.0, size.0)),
            columns: Arc::new(Taps::bilinear(map.1, size.1)),
        }
    }

    #[test]
    fn fused_agrees_with_composition_and_finite_differences() {
        for (map, size, classes) in [((1, 1), (1, 1), 1), ((3, 2), (7, 9), 4), ((4, 5), (3, 35), 12)] {
            let target = target(7, 2, map, size, classes);
            let shape = [2, map.0, map.1, classes as usize];
            check(&|ops, t| ops.pixel_cross_entropy(&t[0], &target, 0.25), &[&shape]);
        }
    }

    #[test]
    fn ignored_pixels_give_no_loss_and_no_gradient() {
        let mut target = target(1, 1, (2, 2), (4, 4), 3);
        target.labels = vec![IGNORED; 16].into();
        let logits = candle_core::Var::from_tensor(&random(5, &[1, 2, 2, 3])).unwrap();
        let loss = Ops::fused().pixel_cross_entropy(logits.as_tensor(), &target, 1.0).unwrap();
        assert_eq!(loss.to_scalar::<f32>().unwrap(), 0.0);
        let gradient = loss.backward().unwrap().get(&logits).map(flat).unwrap();
        assert!(gradient.iter().all(|&g| g == 0.0));
    }

    #[test]
    fn a_label_outside_the_classes_is_refused() {
        let target = target(1, 1, (2, 2), (4, 4), 9);
        let error = Ops::fused().pixel_cross_entropy(&random(5, &[1, 2, 2, 3]), &target, 1.0).unwrap_err();
        assert!(error.to_string().contains("outside 3 classes"), "{error}");
    }

    #[test]
    fn the_largest_class_is_that_of_the_interpolated_logits() {
        let target = target(1, 1, (3, 4), (10, 7), 2);
        let map = random(8, &[1, 3, 4, 5]);
        let full = taps::composition(&map, &target.rows, &target.columns).unwrap();
        let expected: Vec<u32> = full.argmax(D::Minus1).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let flat_map: Vec<f32> = map.flatten_all().unwrap().to_vec1().unwrap();
        let found = largest(&flat_map, 5, &target.rows, &target.columns);
        assert_eq!(found.iter().map(|&c| u32::from(c)).collect::<Vec<_>>(), expected);
        assert_eq!(largest(&[1.0, 1.0, 0.0], 3, &Taps::bilinear(1, 1), &Taps::bilinear(1, 1)), [0]);
    }
}
