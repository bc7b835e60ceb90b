//! A projection head and its cross-entropy as one operation: the logits become their own gradient, so a matrix of
//! rows by prototypes exists once, and no gradient passes through candle's store between the layers.

use super::Ops;
use super::access::{output, tensor, values, with_values};
use super::buffer::zeros;
use super::cross_entropy::{self, PairWeights, Statistics};
use super::dense::{Weight, column_sums, gelu, gelu_backward, gelu_into, repeated};
use super::gradient_sink::GradientSink;
use super::normalize::{l2_gradient, l2_rows, weight_gradient, weight_rows};
use super::product::Before;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use std::sync::{Mutex, PoisonError};

/// The tensors of a projection head: three linear layers with GELU in between, L2 normalization, prototypes.
#[derive(Clone, Debug)]
pub struct HeadWeights {
    /// Weight and bias of each layer.
    pub layers: [[Tensor; 2]; 3],
    /// Lengths of the prototypes, `[K, 1]`.
    pub magnitude: Tensor,
    /// Directions of the prototypes, `[K, bottleneck]`.
    pub direction: Tensor,
    /// ε of the L2 normalization.
    pub eps: f64,
}

impl HeadWeights {
    fn tensors(&self) -> [&Tensor; 8] {
        let [[w1, b1], [w2, b2], [w3, b3]] = &self.layers;
        [w1, b1, w2, b2, w3, b3, &self.magnitude, &self.direction]
    }

    /// Output of the three layers, `[.., bottleneck]`, by single operations.
    pub fn bottleneck(&self, ops: Ops, tokens: &Tensor) -> Result<Tensor> {
        let [first, second, third] = &self.layers;
        let hidden = ops.linear_gelu(tokens, &first[0], &first[1])?;
        let hidden = ops.linear_gelu(&hidden, &second[0], &second[1])?;
        ops.linear(&hidden, &third[0], Some(&third[1]))
    }

    /// Unit vectors to logits `[.., K]`, by single operations.
    pub fn logits(&self, ops: Ops, unit: &Tensor) -> Result<Tensor> {
        let weight = ops.weight_norm(&self.direction, &self.magnitude)?; // [K, bottleneck]
        ops.linear(unit, &weight, None)
    }
}

/// What the logits of a student are compared with.
#[derive(Clone, Copy, Debug)]
pub struct Targets<'a> {
    /// Logits of the teacher, `[T, K]`.
    pub teacher: &'a Tensor,
    /// Their center, `[K]`.
    pub center: &'a Tensor,
    /// Temperatures of student and teacher.
    pub temperatures: [f64; 2],
    /// Rows `(student, teacher)`.
    pub pairs: &'a [(u32, u32)],
    /// Weights of the pairs.
    pub weights: PairWeights<'a>,
}

pub(super) fn check(tokens: &Tensor, head: &HeadWeights, targets: &Targets<'_>) -> Result<()> {
    let (rows, mut width) = tokens.dims2()?;
    for (index, [weight, bias]) in head.layers.iter().enumerate() {
        let (outputs, inputs) = weight.dims2()?;
        if inputs != width || bias.dims() != [outputs] || rows * inputs * outputs == 0 {
            bail!(
                "projection head: layer {index} of {width} inputs, found {:?} and {:?} for {rows} rows",
                weight.shape(),
                bias.shape()
            )
        }
        width = outputs;
    }
    let (prototypes, bottleneck) = head.direction.dims2()?;
    if bottleneck != width || head.magnitude.dims() != [prototypes, 1] {
        bail!(
            "projection head: {width} outputs need directions [K, {width}] and magnitudes [K, 1], found {:?} and {:?}",
            head.direction.shape(),
            head.magnitude.shape()
        )
    }
    cross_entropy::check(
        [rows, prototypes],
        targets.teacher,
        targets.center,
        targets.temperatures,
        targets.pairs,
        targets.weights,
    )
}

pub(super) fn composition(
    ops: Ops,
    tokens: &Tensor,
    head: &HeadWeights,
    targets: &Targets<'_>,
) -> Result<(Tensor, Statistics)> {
    let unit = ops.l2_normalize(&head.bottleneck(ops, tokens)?, head.eps)?;
    let [student_temp, teacher_temp] = targets.temperatures;
    ops.cross_entropy_with_stats(
        &head.logits(ops, &unit)?,
        targets.teacher,
        targets.center,
        student_temp,
        teacher_temp,
        targets.pairs,
        targets.weights,
    )
}

/// The values of [`HeadWeights`].
struct Head<'a> {
    layers: [(Weight<'a>, &'a [f32]); 3],
    magnitude: &'a [f32],
    direction: &'a [f32],
    eps: f32,
}

impl<'a> Head<'a> {
    fn new([w1, b1, w2, b2, w3, b3, magnitude, direction]: [&'a [f32]; 8], eps: f64) -> Self {
        let layer = |weight: &'a [f32], bias: &'a [f32]| {
            (Weight::new(weight, bias.len(), weight.len() / bias.len()), bias)
        };
        Self { layers: [layer(w1, b1), layer(w2, b2), layer(w3, b3)], magnitude, direction, eps: eps as f32 }
    }

    fn bottleneck(&self) -> usize {
        self.layers[2].0.outputs()
    }

    fn prototypes(&self) -> usize {
        self.magnitude.len()
    }

    /// The normalized prototypes, `[K, bottleneck]`.
    fn prototype_rows(&self) -> Vec<f32> {
        weight_rows(self.direction, self.magnitude, self.bottleneck())
    }

    /// The inputs of both GELUs and the output of the third layer.
    fn layers(&self, tokens: &[f32], rows: usize, keep: bool) -> [Vec<f32>; 3] {
        let [first, second, third] = &self.layers;
        let linear = |layer: &(Weight<'a>, &'a [f32]), x: &[f32]| {
            let mut y = repeated(layer.1, rows);
            layer.0.apply(x, Before::Kept, &mut y);
            y
        };
        let next = |layer, u: &mut Vec<f32>, width: usize| {
            if keep {
                let mut activated = zeros(u.len());
                gelu_into(u, width, None, &mut activated);
                return linear(layer, &activated);
            }
            let mut activated = std::mem::take(u);
            gelu(&mut activated, width, None);
            linear(layer, &activated)
        };
        let mut u1 = linear(first, tokens);
        let mut u2 = next(second, &mut u1, first.0.outputs());
        let z = next(third, &mut u2, second.0.outputs());
        [u1, u2, z]
    }

    /// Gradients of the tokens and of the tensors in the order of [`HeadWeights::tensors`]; `scale` multiplies all.
    fn backward(&self, tokens: &[f32], saved: Saved, scale: f32) -> (Vec<f32>, [Vec<f32>; 8]) {
        let Saved { layers: [mut u1, mut u2, z], d_logits } = saved;
        let [first, second, third] = &self.layers;
        let (bottleneck, prototypes) = (self.bottleneck(), self.prototypes());
        let unit = l2_rows(&z, bottleneck, self.eps);
        let weight = self.prototype_rows();
        let last = Weight::new(&weight, prototypes, bottleneck);
        let mut d_unit = zeros(z.len());
        last.input_gradient(scale, &d_logits, &mut d_unit);
        let d_weight = last.gradient(scale, &d_logits, &unit);
        drop(d_logits);
        let (d_direction, d_magnitude) =
            weight_gradient(self.direction, self.magnitude, &d_weight, bottleneck);
        drop(d_weight);
        let d = l2_gradient(&z, &d_unit, bottleneck, self.eps);

        let mut d2 = zeros(u2.len());
        third.0.input_gradient(1.0, &d, &mut d2);
        gelu_backward(&mut u2, &mut d2, second.0.outputs(), None);
        let third = [third.0.gradient(1.0, &d, &u2), column_sums(&d, bottleneck, None)];
        drop(u2);
        let mut d1 = zeros(u1.len());
        second.0.input_gradient(1.0, &d2, &mut d1);
        gelu_backward(&mut u1, &mut d1, first.0.outputs(), None);
        let second = [second.0.gradient(1.0, &d2, &u1), column_sums(&d2, second.0.outputs(), None)];
        drop((u1, d2));
        let mut d_tokens = zeros(tokens.len());
        first.0.input_gradient(1.0, &d1, &mut d_tokens);
        let first = [first.0.gradient(1.0, &d1, tokens), column_sums(&d1, first.0.outputs(), None)];
        let ([w1, b1], [w2, b2], [w3, b3]) = (first, second, third);
        (d_tokens, [w1, b1, w2, b2, w3, b3, d_magnitude, d_direction])
    }
}

/// What the backward pass needs.
struct Saved {
    /// Inputs of both GELUs, `[R, hidden]`, and the output of the third layer, `[R, bottleneck]`.
    layers: [Vec<f32>; 3],
    /// Gradient of the logits, `[R, K]`.
    d_logits: Vec<f32>,
}

pub(super) fn fused(
    tokens: &Tensor,
    head: &HeadWeights,
    targets: &Targets<'_>,
    sink: &GradientSink,
) -> Result<(Tensor, Statistics)> {
    let tokens = tokens.contiguous()?;
    let tracked = tokens.track_op();
    let (teacher, center) = (targets.teacher.contiguous()?, targets.center.contiguous()?);
    let ((loss, stats), saved) = with_values([&tokens, &teacher, &center], |[x, teacher, center]| {
        with_values(head.tensors(), |tensors| {
            let head = Head::new(tensors, head.eps);
            let rows = tokens.dim(0)?;
            let layers = head.layers(x, rows, tracked);
            let unit = l2_rows(&layers[2], head.bottleneck(), head.eps);
            let weight = head.prototype_rows();
            let mut logits = zeros(rows * head.prototypes());
            Weight::new(&weight, head.prototypes(), head.bottleneck()).apply(
                &unit,
                Before::Ignored,
                &mut logits,
            );
            let found = cross_entropy::in_place(
                &mut logits,
                head.prototypes(),
                teacher,
                center,
                targets.temperatures,
                targets.pairs,
                targets.weights,
            );
            Ok((found, tracked.then_some(Saved { layers, d_logits: logits })))
        })
    })?;
    let operation = ProjectionLoss { head: head.clone(), sink: sink.clone(), loss, saved: Mutex::new(saved) };
    Ok((tokens.apply_op1(operation)?, Statistics::on_host(stats)?))
}

/// The loss, already known, with what its backward pass needs.
struct ProjectionLoss {
    head: HeadWeights,
    sink: GradientSink,
    loss: f32,
    saved: Mutex<Option<Saved>>,
}

impl CustomOp1 for ProjectionLoss {
    fn name(&self) -> &'static str {
        "projection_loss"
    }

    fn cpu_fwd(&self, tokens: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        values(tokens, layout)?;
        output(vec![self.loss], ())
    }

    fn bwd(&self, tokens: &Tensor, _result: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let Some(saved) = self.saved.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            bail!("projection_loss: a second backward pass, or one without a tracked forward pass")
        };
        let scale = gradient.to_scalar::<f32>()?;
        let (d_tokens, gradients) = with_values([tokens], |[x]| {
            with_values(self.head.tensors(), |tensors| {
                Ok(Head::new(tensors, self.head.eps).backward(x, saved, scale))
            })
        })?;
        for (parameter, gradient) in self.head.tensors().into_iter().zip(gradients) {
            self.sink.add(parameter, gradient)?;
        }
        Ok(Some(tensor(d_tokens, tokens.shape())?))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use candle_core::{DType, Var};

    const ROWS: usize = 11;
    const DIM: usize = 12;
    const PROTOTYPES: usize = 37;
    const PAIRS: [(u32, u32); 6] = [(0, 1), (2, 0), (0, 0), (3, 2), (10, 2), (0, 1)];

    fn head(dtype: DType) -> HeadWeights {
        let variable = |seed: u64, shape: &[usize]| {
            let values = (random(seed, shape) * 0.5).unwrap().to_dtype(dtype).unwrap();
            Var::from_tensor(&values).unwrap().as_tensor().clone()
        };
        let layer = |seed: u64, outputs: usize, inputs: usize| {
            [variable(seed, &[outputs, inputs]), variable(seed + 1, &[outputs])]
        };
        HeadWeights {
            layers: [layer(10, 40, DIM), layer(20, 33, 40), layer(30, 9, 33)],
            magnitude: variable(40, &[PROTOTYPES, 1]),
            direction: variable(41, &[PROTOTYPES, 9]),
            eps: 1e-12,
        }
    }

    /// Loss, statistics, gradient of the tokens, gradients of all parameters.
    fn pass(ops: Ops, dtype: DType) -> Vec<Vec<f64>> {
        let (head, sink) = (head(dtype), GradientSink::default());
        let of = |seed: u64, shape: &[usize]| random(seed, shape).to_dtype(dtype).unwrap();
        let (teacher, center) = (of(1, &[3, PROTOTYPES]), of(2, &[PROTOTYPES]));
        let tokens = Var::from_tensor(&of(3, &[ROWS, DIM])).unwrap();
        let weights = [0.5f32, 1.0, 0.25, 2.0, 0.0, 0.125];
        let targets = Targets {
            teacher: &teacher,
            center: &center,
            temperatures: [0.5, 0.25],
            pairs: &PAIRS,
            weights: PairWeights::Each(&weights),
        };
        let (loss, stats) = ops.projection_loss(&tokens, &head, &targets, &sink).unwrap();
        let store = (&loss * 0.7).unwrap().backward().unwrap();
        let stats = stats.read().unwrap();
        let mut found =
            vec![flat(&loss), vec![stats.kl, stats.teacher_entropy], flat(store.get(&tokens).unwrap())];
        for parameter in head.tensors() {
            let gradient = sink.take(parameter).or_else(|| store.get(parameter).cloned());
            found.push(flat(&gradient.expect("a gradient")));
        }
        found
    }

    #[test]
    fn fused_agrees_with_composition_on_any_threads() {
        let fused = with_threads(1, || pass(Ops::fused(), DType::F32));
        assert!(fused == with_threads(3, || pass(Ops::fused(), DType::F32)), "threads");
        for (i, (found, exact)) in fused.iter().zip(&pass(Ops::reference(), DType::F64)).enumerate() {
            let largest = exact.iter().fold(1.0f64, |a, b| a.max(b.abs()));
            let scaled = |values: &[f64]| values.iter().map(|v| v / largest).collect::<Vec<_>>();
            assert_close(&format!("tensor {i}"), &scaled(found), &scaled(exact), 1e-5);
        }
    }

    #[test]
    fn wrong_shapes_are_refused() {
        let (head, sink) = (head(DType::F32), GradientSink::default());
        let (teacher, center) = (random(1, &[3, PROTOTYPES]), random(2, &[PROTOTYPES]));
        let targets = Targets {
            teacher: &teacher,
            center: &center,
            temperatures: [0.5, 0.25],
            pairs: &PAIRS,
            weights: PairWeights::Same(1.0),
        };
        let refused = |tokens: &Tensor, head: &HeadWeights, targets: &Targets<'_>| {
            Ops::fused().projection_loss(tokens, head, targets, &sink).map(|_| ()).unwrap_err().to_string()
        };
        let tokens = random(3, &[ROWS, DIM]);
        assert!(refused(&random(3, &[ROWS, 5]), &head, &targets).contains("5 inputs"));
        assert!(refused(&random(3, &[2, DIM]), &head, &targets).contains("(2, 0)"));
        assert!(refused(&tokens, &head, &Targets { center: &teacher, ..targets }).contains("center"));
        let bare = HeadWeights { direction: random(1, &[PROTOTYPES, 8]), ..head.clone() };
        assert!(refused(&tokens, &bare, &targets).contains("[K, 9]"));
    }
}
