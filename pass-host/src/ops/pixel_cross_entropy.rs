//! Cross-entropy of every pixel of a label picture against a coarse map of logits.
//!
//! The logits are interpolated row by row and never exist at the size of the picture: at 512x512 pixels and 150
//! classes that would be 157 MB an image.

use super::access::{output, tensor, values};
use super::buffer::build;
use super::lanes::{add_multiple, exp, widest};
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

/// One row of the picture: blended logits and scores by class, then by column.
struct Row {
    classes: usize,
    /// `[C, w]`.
    blended: Vec<f32>,
    /// `[C, W]`: scores, then their gradient.
    scores: Vec<f32>,
    /// `[W]`.
    largest: Vec<f32>,
    /// `[W]`.
    sums: Vec<f32>,
}

impl Row {
    /// Scores of row `y` of a map `[h, w, C]`.
    fn new(map: &[f32], classes: usize, y: usize, rows: &Taps, columns: &Taps) -> Self {
        let (width, out_width) = (columns.inputs(), columns.outputs());
        let mut blended = vec![0f32; classes * width];
        for &(source, weight) in rows.of(y) {
            let row = &map[source * width * classes..][..width * classes];
            for (x, logits) in row.chunks_exact(classes).enumerate() {
                for (class, &logit) in logits.iter().enumerate() {
                    blended[class * width + x] += weight * logit;
                }
            }
        }
        let mut scores = vec![0f32; classes * out_width];
        let mut largest = vec![f32::NEG_INFINITY; out_width];
        for (scores, blended) in scores.chunks_exact_mut(out_width).zip(blended.chunks_exact(width)) {
            for (x, (score, largest)) in scores.iter_mut().zip(&mut largest).enumerate() {
                *score = columns.of(x).iter().map(|&(source, weight)| weight * blended[source]).sum();
                if *score > *largest {
                    *largest = *score;
                }
            }
        }
        Self { classes, blended, scores, largest, sums: vec![0.0; out_width] }
    }

    /// Sum of the losses; the scores become `exp(score − largest)`.
    fn loss(&mut self, labels: &[u8]) -> f64 {
        let width = labels.len();
        let mut loss = 0.0;
        for (x, &label) in labels.iter().enumerate() {
            if label != IGNORED {
                loss += f64::from(self.largest[x] - self.scores[usize::from(label) * width + x]);
            }
        }
        for scores in self.scores.chunks_exact_mut(width) {
            let (largest, sums) = (&self.largest[..width], &mut self.sums[..width]);
            widest!({
                for i in 0..width {
                    scores[i] = exp(scores[i] - largest[i]);
                    sums[i] += scores[i];
                }
            });
        }
        let counted = labels.iter().zip(&self.sums).filter(|(label, _)| **label != IGNORED);
        loss + counted.map(|(_, sum)| f64::from(*sum).ln()).sum::<f64>()
    }

    /// After [`Row::loss`]: the gradient with respect to the blended logits, `[w, C]`.
    fn gradient(mut self, labels: &[u8], columns: &Taps, scale: f32, out: &mut [f32]) {
        let width = labels.len();
        let factors: Vec<f32> = labels
            .iter()
            .zip(&self.sums)
            .map(|(label, sum)| if *label == IGNORED { 0.0 } else { scale / sum })
            .collect();
        for scores in self.scores.chunks_exact_mut(width) {
            scores.iter_mut().zip(&factors).for_each(|(score, factor)| *score *= factor);
        }
        for (x, &label) in labels.iter().enumerate() {
            if label != IGNORED {
                self.scores[usize::from(label) * width + x] -= scale;
            }
        }
        self.blended.fill(0.0);
        let in_width = columns.inputs();
        for (scores, blended) in self.scores.chunks_exact(width).zip(self.blended.chunks_exact_mut(in_width)) {
            for (x, gradient) in scores.iter().enumerate() {
                for &(source, weight) in columns.of(x) {
                    blended[source] += weight * gradient;
                }
            }
        }
        for (x, out) in out.chunks_exact_mut(self.classes).enumerate() {
            for (class, out) in out.iter_mut().enumerate() {
                *out = self.blended[class * in_width + x];
            }
        }
    }
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
            let labels_of = |y: usize| &labels[y * out_width..][..out_width];
            let row = |y: usize| {
                let mut row = Row::new(map, classes, y, rows, columns);
                let loss = row.loss(labels_of(y));
                (row, loss)
            };
            if !self.tracked {
                let losses: Vec<f64> = (0..out_height).into_par_iter().map(|y| row(y).1).collect();
                total += losses.iter().sum::<f64>();
                continue;
            }
            let (blended, losses) = build(out_height * width * classes, width * classes, |y, out| {
                let (row, loss) = row(y);
                row.gradient(labels_of(y), columns, self.scale, out);
                loss
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
    let mut classes_found = vec![0u8; rows.outputs() * width];
    classes_found.par_chunks_mut(width).enumerate().for_each(|(y, found)| {
        let row = Row::new(map, classes, y, rows, columns);
        // from the last class to the first, so that the lowest of equals is written last
        for (class, scores) in row.scores.chunks_exact(width).enumerate().rev() {
            for x in 0..width {
                if scores[x] == row.largest[x] {
                    found[x] = class as u8;
                }
            }
        }
    });
    classes_found
}

#[cfg(test)]
mod tests {
    use super::super::{Ops, testing::*};
    use super::{IGNORED, PixelLabels, Taps, largest, taps};
    use candle_core::D;
    use std::sync::Arc;
    use crate::random::{Purpose, Stream};

    fn target(seed: u64, batch: usize, map: (usize, usize), size: (usize, usize), classes: u64) -> PixelLabels {
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
