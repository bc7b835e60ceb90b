//! Projectors and predictors: linear layers with batch normalization in between (MoCo-v3, MoBY).

use candle_core::{DType, Result, Tensor};

use super::parameters::{Init, Parameters, Specification, default_linear};
use crate::distributed::{Ranks, collective};
use crate::ops::Ops;

/// ε of the batch normalization.
pub const BATCH_NORM_EPS: f64 = 1e-5;

/// What follows a linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norm {
    /// Nothing.
    None,
    /// Batch normalization with a learned scale and shift, then the ReLU.
    Rectified,
    /// Batch normalization alone, nothing learned.
    Plain,
}

/// A linear layer and what follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Widths before and after.
    pub widths: [usize; 2],
    /// Whether the linear layer has a bias.
    pub bias: bool,
    /// What follows.
    pub norm: Norm,
}

impl Layer {
    /// Places it takes in the numbering of names: linear layer, batch normalization, ReLU.
    fn places(&self) -> usize {
        match self.norm {
            Norm::None => 1,
            Norm::Plain => 2,
            Norm::Rectified => 3,
        }
    }
}

/// The head called `{name}.…`, whose layers are numbered one after the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MlpHead {
    /// The beginning of the names of its tensors.
    pub name: &'static str,
    /// From tokens to outputs.
    pub layers: Vec<Layer>,
    /// Whether the teacher has none.
    pub student_only: bool,
}

/// Rows that are normalized together: those of one view, of all ranks.
#[derive(Clone, Copy, Debug)]
pub struct Views<'a> {
    /// Views in the rows, one after the other.
    pub count: usize,
    /// Those that train together.
    pub ranks: &'a Ranks,
}

impl MlpHead {
    /// Names, shapes and first values of its tensors.
    pub fn specification(&self) -> Vec<Specification> {
        let mut list = Vec::new();
        for (index, Layer { widths: [inputs, outputs], bias, norm }) in self.numbered() {
            let mut push = |place: usize, part: &str, shape: &[usize], init| {
                let learned = Specification::learned(format!("{}.{place}.{part}", self.name), shape, init);
                list.push(Specification { student_only: self.student_only, ..learned });
            };
            push(index, "weight", &[outputs, inputs], default_linear(inputs));
            if bias {
                push(index, "bias", &[outputs], default_linear(inputs));
            }
            if norm == Norm::Rectified {
                push(index + 1, "weight", &[outputs], Init::Ones);
                push(index + 1, "bias", &[outputs], Init::Zeros);
            }
        }
        list
    }

    /// Tokens `[V·B, D]` to outputs `[V·B, C]`, in `f32` at least.
    ///
    /// # Errors
    /// If tensors are missing or do not fit, or the ranks are lost.
    pub fn forward(
        &self,
        parameters: &Parameters,
        tokens: &Tensor,
        views: Views<'_>,
        ops: Ops,
    ) -> Result<Tensor> {
        let mut x = tokens.clone();
        for (index, layer) in self.numbered() {
            let parameter =
                |place: usize, part: &str| parameters.get(&format!("{}.{place}.{part}", self.name));
            let bias = layer.bias.then(|| parameter(index, "bias")).transpose()?;
            x = ops.linear(&x.to_dtype(tokens.dtype())?, &parameter(index, "weight")?, bias.as_ref())?;
            if x.dtype() == DType::BF16 {
                x = x.to_dtype(DType::F32)?;
            }
            if layer.norm != Norm::None {
                x = standardize(&x, BATCH_NORM_EPS, views)?;
            }
            if layer.norm == Norm::Rectified {
                let (scale, shift) = (parameter(index + 1, "weight")?, parameter(index + 1, "bias")?);
                x = rectified(&x.broadcast_mul(&scale)?.broadcast_add(&shift)?)?;
            }
        }
        Ok(x)
    }

    /// Its layers, each with the number of its linear layer.
    fn numbered(&self) -> impl Iterator<Item = (usize, Layer)> {
        self.layers.iter().scan(0, |place, layer| {
            let index = *place;
            *place += layer.places();
            Some((index, *layer))
        })
    }

    /// Multiply-adds of one row.
    pub fn cost(&self) -> u64 {
        self.layers.iter().map(|layer| (layer.widths[0] * layer.widths[1]) as u64).sum()
    }
}

/// ReLU as a product, which keeps what is not a number.
fn rectified(x: &Tensor) -> Result<Tensor> {
    let positive = x.detach().gt(0.0)?.to_dtype(x.dtype())?;
    x * positive
}

/// `(x − mean) / √(variance + ε)` of every channel of `x` `[V·B, C]`; mean and (biased) variance are those of one view's
/// rows of all ranks.
///
/// # Errors
/// If the views do not divide the rows, or the ranks are lost.
pub fn standardize(x: &Tensor, eps: f64, views: Views<'_>) -> Result<Tensor> {
    let (rows, channels) = x.dims2()?;
    let batch = rows / views.count;
    let by_view = x.reshape((views.count, batch, channels))?;
    let share = 1.0 / (batch * views.ranks.size()) as f64;
    let mean_of_rows = |values: &Tensor| collective::sum(views.ranks, &values.sum_keepdim(1)?)? * share; // [V, 1, C]
    let centered = by_view.broadcast_sub(&mean_of_rows(&by_view)?)?;
    let variance = mean_of_rows(&centered.sqr()?)?;
    centered.broadcast_div(&(variance + eps)?.sqrt()?)?.reshape((rows, channels))
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::distributed::threads::on_ranks;
    use crate::random::{Purpose, Stream};

    fn random(seed: u64, shape: &[usize]) -> Tensor {
        let mut stream = Stream::new(seed, Purpose::Init, &[]);
        let values: Vec<f64> = (0..shape.iter().product()).map(|_| stream.normal()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    fn head() -> MlpHead {
        let layer = |widths, bias, norm| Layer { widths, bias, norm };
        let layers = vec![
            layer([3, 5], false, Norm::Rectified),
            layer([5, 4], true, Norm::Rectified),
            layer([4, 2], false, Norm::Plain),
        ];
        MlpHead { name: "projector", layers, student_only: false }
    }

    #[test]
    fn names_are_numbered_as_in_a_sequence() {
        let names: Vec<String> = head().specification().into_iter().map(|spec| spec.name).collect();
        let expected =
            ["0.weight", "1.weight", "1.bias", "3.weight", "3.bias", "4.weight", "4.bias", "6.weight"];
        assert_eq!(names, expected.map(|name| format!("projector.{name}")));
    }

    #[test]
    fn channels_of_every_view_have_mean_zero_and_variance_one() {
        let x = (random(1, &[6, 2]) * 3.0).unwrap();
        let y = standardize(&x, 0.0, Views { count: 2, ranks: &Ranks::single() }).unwrap();
        for view in 0..2 {
            let rows = y.narrow(0, 3 * view, 3).unwrap();
            for (mean, square) in rows
                .mean(0)
                .unwrap()
                .to_vec1::<f64>()
                .unwrap()
                .iter()
                .zip(rows.sqr().unwrap().mean(0).unwrap().to_vec1::<f64>().unwrap())
            {
                assert!(mean.abs() < 1e-12 && (square - 1.0).abs() < 1e-12, "{mean} {square}");
            }
        }
    }

    #[test]
    fn gradients_agree_with_finite_differences() {
        let shapes: Vec<Vec<usize>> = head().specification().into_iter().map(|spec| spec.shape).collect();
        let mut values: Vec<Tensor> =
            shapes.iter().enumerate().map(|(i, shape)| random(10 + i as u64, shape)).collect();
        values.push(random(5, &[8, 3]));
        let weights = random(6, &[8, 2]);
        let loss = |values: &[Tensor]| {
            let names = head().specification().into_iter().map(|spec| spec.name);
            let parameters: Parameters = names.zip(values.iter().cloned()).collect();
            let views = Views { count: 2, ranks: &Ranks::single() };
            let y = head().forward(&parameters, values.last().unwrap(), views, Ops::fused()).unwrap();
            (y * &weights).unwrap().sum_all().unwrap()
        };
        let vars: Vec<Var> = values.iter().map(|value| Var::from_tensor(value).unwrap()).collect();
        let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        let store = loss(&tensors).backward().unwrap();
        let step = 1e-5;
        for (place, value) in values.iter().enumerate() {
            let analytic = store.get(&vars[place]).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
            let flat = value.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            for index in 0..flat.len() {
                let at = |shift: f64| {
                    let mut flat = flat.clone();
                    flat[index] += shift;
                    let mut values = values.clone();
                    values[place] = Tensor::from_vec(flat, value.shape(), &Device::Cpu).unwrap();
                    loss(&values).to_scalar::<f64>().unwrap()
                };
                let difference = (at(step) - at(-step)) / (2.0 * step);
                let error = (difference - analytic[index]).abs();
                assert!(
                    error < 1e-6 * (1.0 + difference.abs()),
                    "{place}[{index}]: {difference} {analytic:?}"
                );
            }
        }
    }

    #[test]
    fn two_ranks_are_one_with_all_rows() {
        // two views of four images: ranks have images 0, 1 and 2, 3
        let (x, weights) = (random(1, &[8, 3]), random(2, &[8, 3]));
        let (x, weights) = (x.to_dtype(DType::F32).unwrap(), weights.to_dtype(DType::F32).unwrap());
        let rows_of = |all: &Tensor, rank: usize| {
            let part = |view: usize| all.narrow(0, 4 * view + 2 * rank, 2).unwrap();
            Tensor::cat(&[part(0), part(1)], 0).unwrap()
        };
        let run = |x: &Tensor, weights: &Tensor, ranks: &Ranks| {
            let x = Var::from_tensor(x).unwrap();
            let y = standardize(x.as_tensor(), 1e-5, Views { count: 2, ranks }).unwrap();
            let store = (&y * weights).unwrap().sum_all().unwrap().backward().unwrap();
            (y.detach(), store.get(&x).unwrap().clone())
        };
        let (whole, whole_gradient) = run(&x, &weights, &Ranks::single());
        let parts = on_ranks(2, |ranks| {
            let rank = ranks.rank();
            run(&rows_of(&x, rank), &rows_of(&weights, rank), &ranks)
        });
        for (rank, (y, gradient)) in parts.iter().enumerate() {
            for (own, all) in [(y, &whole), (gradient, &whole_gradient)] {
                let expected = rows_of(all, rank).flatten_all().unwrap().to_vec1::<f32>().unwrap();
                for (a, b) in own.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().zip(expected) {
                    assert!((a - b).abs() < 1e-5, "{a} {b}");
                }
            }
        }
    }
}
