//! AdamW with a clipping scale and the exponential moving average of the teacher, in one pass over memory.

use super::access::{in_place, stored};
use super::lanes::widest;
use candle_core::{DType, Result, Tensor, bail};
use rayon::prelude::*;

/// What one optimizer step of one parameter needs to know.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// Learning rate.
    pub lr: f64,
    /// Decoupled weight decay (0 for biases and 1-D parameters).
    pub weight_decay: f64,
    /// β₁ and β₂.
    pub betas: [f64; 2],
    /// ε, added to the root of the corrected second moment.
    pub eps: f64,
    /// Which update of **this parameter** it is, from 1 (steps without a gradient do not count).
    pub step: u64,
    /// Factor of the gradient, see [`clip_scale`].
    pub gradient_scale: f64,
    /// Momentum of the teacher.
    pub momentum: f64,
}

/// Factor that keeps the norm of one parameter's gradient below `clip`: `min(1, clip / (norm + 1e-6))`; 1 if `clip`
/// is 0 (SEMANTICS §5: per tensor, not global).
pub fn clip_scale(norm: f64, clip: f64) -> f64 {
    if clip > 0.0 { (clip / (norm + 1e-6)).min(1.0) } else { 1.0 }
}

/// One parameter of [`super::Ops::update`].
#[derive(Clone, Copy, Debug)]
pub struct Update<'a> {
    /// The parameter.
    pub student: &'a Tensor,
    /// What it learns from; without it only the teacher moves.
    pub learned: Option<Learned<'a>>,
    /// Its moving average.
    pub teacher: Option<&'a Tensor>,
    /// Numbers of this step.
    pub step: AdamWStep,
}

/// Gradient and moments of a parameter.
#[derive(Clone, Copy, Debug)]
pub struct Learned<'a> {
    /// Of the loss.
    pub gradient: &'a Tensor,
    /// First moment.
    pub first: &'a Tensor,
    /// Second moment.
    pub second: &'a Tensor,
}

impl AdamWStep {
    /// Step size and the root of the second correction.
    fn corrections(&self) -> (f64, f64) {
        let power = |beta: f64| beta.powf(self.step as f64);
        (self.lr / (1.0 - power(self.betas[0])), (1.0 - power(self.betas[1])).sqrt())
    }
}

pub(super) fn check(student: &Tensor, others: &[&Tensor]) -> Result<()> {
    match others.iter().find(|other| other.dims() != student.dims()) {
        Some(other) => {
            bail!("optimizer: parameter {:?}, found {:?} beside it", student.shape(), other.shape())
        }
        None => Ok(()),
    }
}

/// Values of one task: the five streams of a part fit the second-level cache.
const PART: usize = 1 << 14;

/// The parts of optional values: `None` for every part if there are none.
fn parts(values: Option<&mut [f32]>, count: usize) -> Vec<Option<&mut [f32]>> {
    match values {
        Some(values) => values.chunks_mut(PART).map(Some).collect(),
        None => (0..count).map(|_| None).collect(),
    }
}

/// One part of [`fused`], in the order of operations of PyTorch's AdamW.
pub(super) struct Kernel {
    pub(super) decay: f32,
    pub(super) gradient_scale: f32,
    pub(super) first_share: f32,
    pub(super) beta2: f32,
    pub(super) second_share: f32,
    pub(super) step_size: f32,
    pub(super) root_correction: f32,
    pub(super) eps: f32,
    pub(super) momentum: f32,
    pub(super) student_share: f32,
}

impl Kernel {
    pub(super) fn new(step: &AdamWStep) -> Self {
        let (step_size, root_correction) = step.corrections();
        Self {
            decay: (1.0 - step.lr * step.weight_decay) as f32,
            gradient_scale: step.gradient_scale as f32,
            first_share: (1.0 - step.betas[0]) as f32,
            beta2: step.betas[1] as f32,
            second_share: (1.0 - step.betas[1]) as f32,
            step_size: step_size as f32,
            root_correction: root_correction as f32,
            eps: step.eps as f32,
            momentum: step.momentum as f32,
            student_share: (1.0 - step.momentum) as f32,
        }
    }

    #[inline(always)]
    fn update(&self, parameter: &mut f32, gradient: f32, first: &mut f32, second: &mut f32) {
        let g = gradient * self.gradient_scale;
        let p = *parameter * self.decay;
        *first += self.first_share * (g - *first);
        *second = *second * self.beta2 + self.second_share * g * g;
        let denominator = second.sqrt() / self.root_correction + self.eps;
        *parameter = p - self.step_size * (*first / denominator);
    }

    fn part(&self, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], mut teacher: Option<&mut [f32]>) {
        widest!({
            for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m.iter_mut()).zip(v.iter_mut()) {
                self.update(p, g, m, v);
            }
            if let Some(teacher) = &mut teacher {
                for (t, &p) in teacher.iter_mut().zip(p.iter()) {
                    *t = *t * self.momentum + self.student_share * p;
                }
            }
        });
    }
}

pub(super) fn fused(
    student: &Tensor,
    gradient: &Tensor,
    first: &Tensor,
    second: &Tensor,
    teacher: Option<&Tensor>,
    step: &AdamWStep,
) -> Result<()> {
    let gradient = gradient.contiguous()?;
    let (storage, layout) = gradient.storage_and_layout();
    let gradient = stored(&storage, layout)?;
    let kernel = Kernel::new(step);
    let run = |p: &mut [f32], m: &mut [f32], v: &mut [f32], teacher: Option<&mut [f32]>| {
        let count = p.len().div_ceil(PART);
        p.par_chunks_mut(PART)
            .zip(gradient.par_chunks(PART))
            .zip(m.par_chunks_mut(PART))
            .zip(v.par_chunks_mut(PART))
            .zip(parts(teacher, count))
            .for_each(|((((p, g), m), v), teacher)| kernel.part(p, g, m, v, teacher));
    };
    in_place(student, |p| {
        in_place(first, |m| {
            in_place(second, |v| match teacher {
                Some(teacher) => in_place(teacher, |t| {
                    run(p, m, v, Some(t));
                    Ok(())
                }),
                None => {
                    run(p, m, v, None);
                    Ok(())
                }
            })
        })
    })
}

pub(super) fn fused_ema(teacher: &Tensor, student: &Tensor, momentum: f64) -> Result<()> {
    let student = student.contiguous()?;
    let (storage, layout) = student.storage_and_layout();
    let student = stored(&storage, layout)?;
    let (momentum, share) = (momentum as f32, (1.0 - momentum) as f32);
    in_place(teacher, |teacher| {
        teacher.par_chunks_mut(PART).zip(student.par_chunks(PART)).for_each(|(teacher, student)| {
            widest!({
                for (t, &s) in teacher.iter_mut().zip(student) {
                    *t = *t * momentum + share * s;
                }
            });
        });
        Ok(())
    })
}

/// Overwrites `target` with `values` of the same shape.
fn overwrite(target: &Tensor, values: &Tensor) -> Result<()> {
    // slices need at least one dimension
    target.detach().flatten_all()?.slice_set(&values.flatten_all()?.contiguous()?, 0, 0)
}

pub(super) fn composition(
    student: &Tensor,
    gradient: &Tensor,
    first: &Tensor,
    second: &Tensor,
    teacher: Option<&Tensor>,
    step: &AdamWStep,
) -> Result<()> {
    let (step_size, root_correction) = step.corrections();
    let (p, m, v) = (student.detach(), first.detach(), second.detach());
    let g = (gradient.detach().to_dtype(p.dtype())? * step.gradient_scale)?;
    let m = (&m + ((&g - &m)? * (1.0 - step.betas[0]))?)?;
    let v = ((v * step.betas[1])? + (g.sqr()? * (1.0 - step.betas[1]))?)?;
    let denominator = ((v.sqrt()? / root_correction)? + step.eps)?;
    let decayed = (p * (1.0 - step.lr * step.weight_decay))?;
    let p = (decayed - ((&m / denominator)? * step_size)?)?;
    overwrite(first, &m)?;
    overwrite(second, &v)?;
    overwrite(student, &p)?;
    match teacher {
        Some(teacher) => composition_ema(teacher, student, step.momentum),
        None => Ok(()),
    }
}

pub(super) fn composition_ema(teacher: &Tensor, student: &Tensor, momentum: f64) -> Result<()> {
    let average = ((teacher.detach() * momentum)? + (student.detach() * (1.0 - momentum))?)?;
    overwrite(teacher, &average)
}

/// Squares added in `f64` lanes, which neither overflow nor lose small gradients beside large ones.
pub(super) fn norm(gradient: &Tensor) -> Result<f64> {
    const LANES: usize = 16;
    let gradient = gradient.contiguous()?;
    let (storage, layout) = gradient.storage_and_layout();
    let squares: Vec<f64> = stored(&storage, layout)?
        .par_chunks(PART)
        .map(|part| {
            widest!({
                let (chunks, rest) = part.as_chunks::<LANES>();
                let mut lanes = [0.0f64; LANES];
                for chunk in chunks {
                    for i in 0..LANES {
                        let value = f64::from(chunk[i]);
                        lanes[i] = value.mul_add(value, lanes[i]);
                    }
                }
                for (lane, &value) in lanes.iter_mut().zip(rest) {
                    *lane += f64::from(value) * f64::from(value);
                }
                lanes.iter().sum::<f64>()
            })
        })
        .collect();
    Ok(squares.iter().sum::<f64>().sqrt())
}

/// The norm as a scalar in `f64`, where the gradient is.
pub(super) fn norm_composition(gradient: &Tensor) -> Result<Tensor> {
    gradient.detach().to_dtype(DType::F64)?.sqr()?.sum_all()?.sqrt()
}

#[cfg(test)]
mod tests {
    use super::super::{Ops, testing::*};
    use super::*;
    use candle_core::{Device, Var};

    const STEP: AdamWStep = AdamWStep {
        lr: 0.01,
        weight_decay: 0.1,
        betas: [0.9, 0.999],
        eps: 1e-8,
        step: 1,
        gradient_scale: 0.5,
        momentum: 0.9,
    };

    struct State {
        student: Var,
        first: Tensor,
        second: Tensor,
        teacher: Var,
    }

    impl State {
        fn new(shape: &[usize], dtype: DType) -> Self {
            let variable = |seed| Var::from_tensor(&random(seed, shape).to_dtype(dtype).unwrap()).unwrap();
            let zeros = || Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
            Self { student: variable(1), first: zeros(), second: zeros(), teacher: variable(2) }
        }

        fn steps(&self, ops: Ops, teacher: bool) -> [Vec<f64>; 4] {
            for step in 1..=3 {
                let gradient = random(10 + step, self.student.dims()).to_dtype(self.student.dtype()).unwrap();
                let teacher = teacher.then_some(self.teacher.as_tensor());
                ops.adamw_ema_step(
                    &self.student,
                    &gradient,
                    &self.first,
                    &self.second,
                    teacher,
                    &AdamWStep { step, ..STEP },
                )
                .unwrap();
            }
            [&*self.student, &self.first, &self.second, &*self.teacher].map(flat)
        }
    }

    #[test]
    fn first_step_by_hand() {
        // first step: m̂ / √v̂ = sign(g), so p = p (1 − lr wd) − lr sign(g)
        let student = Var::new(&[2.0f32, -1.0], &Device::Cpu).unwrap();
        let teacher = Var::new(&[1.0f32, 1.0], &Device::Cpu).unwrap();
        let (first, second) = (student.zeros_like().unwrap(), student.zeros_like().unwrap());
        let gradient = Tensor::new(&[4.0f32, -8.0], &Device::Cpu).unwrap();
        Ops::fused().adamw_ema_step(&student, &gradient, &first, &second, Some(&teacher), &STEP).unwrap();
        assert_close("student", &flat(&student), &[2.0 * 0.999 - 0.01, -0.999 + 0.01], 1e-6);
        assert_close("first moment", &flat(&first), &[0.2, -0.4], 1e-6);
        assert_close("second moment", &flat(&second), &[0.004, 0.016], 1e-6);
        assert_close("teacher", &flat(&teacher), &[0.9 + 0.1988, 0.9 - 0.0989], 1e-6);
    }

    #[test]
    fn fused_agrees_with_composition_in_both_precisions_and_on_any_threads() {
        for shape in [&[1][..], &[31], &[5, 7], &[3, 16384], &[2, 3, 9001]] {
            for teacher in [true, false] {
                let run = |threads, ops, dtype| {
                    with_threads(threads, || State::new(shape, dtype).steps(ops, teacher))
                };
                let fused = run(1, Ops::fused(), DType::F32);
                assert!(fused == run(2, Ops::fused(), DType::F32), "depends on the number of threads");
                for dtype in [DType::F32, DType::F64] {
                    let plain = run(1, Ops::reference(), dtype);
                    for (i, name) in ["student", "first", "second", "teacher"].iter().enumerate() {
                        assert_close(name, &fused[i], &plain[i], 2e-6);
                    }
                }
            }
        }
    }

    #[test]
    fn teacher_moves_alone() {
        for ops in [Ops::fused(), Ops::reference()] {
            let teacher = Var::new(&[1.0f32, 2.0], &Device::Cpu).unwrap();
            let student = Tensor::new(&[3.0f32, 0.0], &Device::Cpu).unwrap();
            ops.ema_step(&teacher, &student, 0.75).unwrap();
            assert_close("teacher", &flat(&teacher), &[1.5, 1.5], 1e-7);
        }
    }

    #[test]
    fn norm_is_exact_and_shows_what_is_not_finite() {
        for len in [0, 1, 15, 16, 17, 16384, 40001] {
            let gradient = random(4, &[len]);
            let one = with_threads(1, || Ops::fused().grad_norm(&gradient).unwrap());
            assert_eq!(one, with_threads(2, || Ops::fused().grad_norm(&gradient).unwrap()));
            let plain = Ops::reference().grad_norm(&gradient).unwrap();
            assert!((one - plain).abs() <= 1e-12 * plain, "{len}: {one} {plain}");
        }
        let huge = Tensor::new(&[3e30f32, 4e30], &Device::Cpu).unwrap();
        assert!((Ops::fused().grad_norm(&huge).unwrap() / 5e30 - 1.0).abs() < 1e-6);
        for bad in [f32::NAN, f32::INFINITY] {
            let gradient = Tensor::new(&[1.0f32, bad], &Device::Cpu).unwrap();
            assert!(!Ops::fused().grad_norm(&gradient).unwrap().is_finite());
        }
    }

    #[test]
    fn clipping_scales_only_what_is_too_long() {
        assert_eq!(clip_scale(1.0, 3.0), 1.0);
        assert_eq!(clip_scale(1e9, 0.0), 1.0);
        assert!((clip_scale(6.0, 3.0) - 0.5).abs() < 1e-6);
    }

    #[test]
    fn other_shapes_are_refused() {
        let (a, b) = (random(1, &[2]), random(2, &[3]));
        assert!(Ops::fused().ema_step(&a, &b, 0.5).is_err());
        assert!(Ops::fused().adamw_ema_step(&a, &b, &a, &a, None, &STEP).is_err());
    }
}
