//! Cross-entropy between centered, sharpened teacher distributions and student distributions over many prototypes.
//!
//! The student's gradient is formed while its row is in the cache, and kept; of the teacher's probabilities only one
//! row per thread exists.

use super::access::{output, stored, tensor, wide};
use super::buffer::build;
use super::lanes::{LANES, dot, exp, max, sum, widest};
use candle_core::{CpuStorage, CustomOp1, D, DType, Device, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

/// Weights of the pairs of a cross-entropy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PairWeights<'a> {
    /// Every pair has this weight.
    Same(f32),
    /// One weight per pair.
    Each(&'a [f32]),
}

impl From<f32> for PairWeights<'_> {
    fn from(weight: f32) -> Self {
        Self::Same(weight)
    }
}

impl<'a> From<&'a [f32]> for PairWeights<'a> {
    fn from(weights: &'a [f32]) -> Self {
        Self::Each(weights)
    }
}

impl PairWeights<'_> {
    pub(super) fn of(self, pair: usize) -> f32 {
        match self {
            Self::Same(weight) => weight,
            Self::Each(weights) => weights[pair],
        }
    }
}

/// Means over all pairs, in nats; 0 without pairs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    /// Entropy of the teacher's distribution; near 0 or ln K when training collapses.
    pub teacher_entropy: f64,
    /// KL(teacher ‖ student).
    pub kl: f64,
}

/// [`Stats`] where the logits are: reading them waits for the device.
#[derive(Clone, Debug)]
pub struct Statistics(Tensor);

impl From<Tensor> for Statistics {
    /// - `means`: `[2]`, entropy and divergence in `f64`.
    fn from(means: Tensor) -> Self {
        Self(means)
    }
}

impl Statistics {
    pub(super) fn on_host(stats: Stats) -> Result<Self> {
        Ok(Self(Tensor::new(&[stats.teacher_entropy, stats.kl], &Device::Cpu)?))
    }

    /// The numbers on the device, `[2]`, entropy and divergence in `f64`: for reading several at once.
    pub fn on_device(&self) -> &Tensor {
        &self.0
    }

    /// The numbers.
    ///
    /// # Errors
    /// If the device cannot be read.
    pub fn read(&self) -> Result<Stats> {
        match self.0.to_vec1::<f64>()?[..] {
            [teacher_entropy, kl] => Ok(Stats { teacher_entropy, kl }),
            ref other => bail!("statistics are two numbers, found {}", other.len()),
        }
    }
}

pub(super) fn check(
    [rows, prototypes]: [usize; 2],
    teacher: &Tensor,
    center: &Tensor,
    [student_temp, teacher_temp]: [f64; 2],
    pairs: &[(u32, u32)],
    weights: PairWeights<'_>,
) -> Result<()> {
    let (teacher_rows, teacher_prototypes) = teacher.dims2()?;
    if prototypes == 0 || teacher_prototypes != prototypes || center.dims() != [prototypes] {
        bail!(
            "cross_entropy: {prototypes} prototypes need teacher [T, {prototypes}] and center [{prototypes}], found {:?}, {:?}",
            teacher.shape(),
            center.shape()
        )
    }
    if let Some(&(s, t)) = pairs.iter().find(|&&(s, t)| s as usize >= rows || t as usize >= teacher_rows) {
        bail!("cross_entropy: pair ({s}, {t}) of {rows} student and {teacher_rows} teacher rows")
    }
    if let PairWeights::Each(weights) = weights
        && weights.len() != pairs.len()
    {
        bail!("cross_entropy: {} weights for {} pairs", weights.len(), pairs.len())
    }
    if !(student_temp > 0.0 && teacher_temp > 0.0) {
        bail!("cross_entropy: temperatures must be positive, found {student_temp} and {teacher_temp}")
    }
    Ok(())
}

/// `log_softmax` over the last dimension.
fn log_softmax(x: &Tensor) -> Result<Tensor> {
    let shifted = x.broadcast_sub(&x.detach().max_keepdim(D::Minus1)?)?;
    shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)
}

pub(super) fn composition(
    student: &Tensor,
    teacher: &Tensor,
    center: &Tensor,
    [student_temp, teacher_temp]: [f64; 2],
    pairs: &[(u32, u32)],
    weights: PairWeights<'_>,
) -> Result<(Tensor, Statistics)> {
    let (student, teacher) = (&wide(student)?, &wide(teacher)?);
    if pairs.is_empty() {
        return Ok(((student.sum_all()? * 0.0)?, Statistics::on_host(Stats::default())?));
    }
    let device = student.device();
    let rows = |column: Vec<u32>| Tensor::from_vec(column, pairs.len(), device);
    let student_rows = rows(pairs.iter().map(|pair| pair.0).collect())?;
    let teacher_rows = rows(pairs.iter().map(|pair| pair.1).collect())?;
    let log_q = log_softmax(&(student / student_temp)?)?.contiguous()?.index_select(&student_rows, 0)?;
    let sharpened = (teacher.detach().broadcast_sub(&center.detach())? / teacher_temp)?;
    let log_p = log_softmax(&sharpened)?.contiguous()?.index_select(&teacher_rows, 0)?;
    let p = log_p.exp()?;
    let entropies = p.mul(&log_p)?.sum(1)?.neg()?;
    let losses = p.mul(&log_q)?.sum(1)?.neg()?;
    let each: Vec<f32> = (0..pairs.len()).map(|pair| weights.of(pair)).collect();
    let each = Tensor::from_vec(each, pairs.len(), device)?.to_dtype(student.dtype())?;
    let mean = |t: &Tensor| t.detach().to_dtype(DType::F64)?.mean_all();
    let teacher_entropy = mean(&entropies)?;
    let kl = (mean(&losses)? - &teacher_entropy)?;
    let statistics = Statistics(Tensor::stack(&[teacher_entropy, kl], 0)?);
    Ok((losses.mul(&each)?.sum_all()?, statistics))
}

/// The pairs of one student row after the other.
pub(super) struct Grouped {
    /// Teacher row and weight.
    pub(super) entries: Vec<(usize, f32)>,
    /// Where the entries of each student row start; one more at the end.
    pub(super) starts: Vec<usize>,
}

impl Grouped {
    pub(super) fn new(rows: usize, pairs: &[(u32, u32)], weights: PairWeights<'_>) -> Self {
        let mut starts = vec![0; rows + 1];
        for &(student, _) in pairs {
            starts[student as usize + 1] += 1;
        }
        for row in 0..rows {
            starts[row + 1] += starts[row];
        }
        let mut next = starts.clone();
        let mut entries = vec![(0, 0.0); pairs.len()];
        for (pair, &(student, teacher)) in pairs.iter().enumerate() {
            entries[next[student as usize]] = (teacher as usize, weights.of(pair));
            next[student as usize] += 1;
        }
        Self { entries, starts }
    }

    fn of(&self, row: usize) -> &[(usize, f32)] {
        &self.entries[self.starts[row]..self.starts[row + 1]]
    }
}

/// Sums over the pairs of one student row.
#[derive(Clone, Copy, Default)]
struct Sums {
    loss: f64,
    entropy: f64,
    kl: f64,
}

/// The constants of all rows.
struct Kernel<'a> {
    center: &'a [f32],
    student_scale: f32,
    teacher_scale: f32,
}

impl Kernel<'_> {
    /// Losses of one student row against its teachers. `gradient` (if wanted) becomes the gradient of the row;
    /// `scratch` has room for one teacher row.
    #[inline(always)]
    fn row<'t>(
        &self,
        student: &[f32],
        teachers: impl Iterator<Item = (&'t [f32], f32)> + Clone,
        gradient: Option<&mut [f32]>,
        scratch: &mut [f32],
    ) -> Sums {
        let (largest, scale) = (max(student), self.student_scale);
        let weight: f32 = teachers.clone().map(|(_, weight)| weight).sum();
        let mut gradient = gradient;
        let exponentials = gradient.as_deref_mut().unwrap_or(scratch);
        for (e, &s) in exponentials.iter_mut().zip(student) {
            *e = exp((s - largest) * scale);
        }
        let total = sum(exponentials);
        let log_normalizer = f64::from(total).ln() + f64::from(largest) * f64::from(scale);
        let mut share = weight * scale / total;
        let mut sums = Sums::default();
        for (teacher, weight) in teachers {
            let (probability_scale, entropy) = self.teacher(teacher, scratch);
            let expected = f64::from(dot(scratch, student)) * f64::from(probability_scale) * f64::from(scale);
            let loss = log_normalizer - expected;
            sums.loss += f64::from(weight) * loss;
            sums.entropy += entropy;
            sums.kl += loss - entropy;
            if let Some(gradient) = &mut gradient {
                // gradient = Σ w (q − p) / τ, where q is the same for all teachers
                let factor = weight * scale * probability_scale;
                for (g, &e) in gradient.iter_mut().zip(scratch.iter()) {
                    *g = share.mul_add(*g, -(factor * e));
                }
                share = 1.0;
            }
        }
        sums
    }

    /// Fills `out` with the unnormalized probabilities of a teacher row; returns what normalizes them and the entropy.
    #[inline(always)]
    fn teacher(&self, teacher: &[f32], out: &mut [f32]) -> (f32, f64) {
        for ((out, &t), &c) in out.iter_mut().zip(teacher).zip(self.center) {
            *out = (t - c) * self.teacher_scale;
        }
        let largest = max(out);
        let (mut totals, mut moments) = ([0.0f32; LANES], [0.0f32; LANES]);
        let (chunks, rest) = out.as_chunks_mut::<LANES>();
        for chunk in chunks {
            for i in 0..LANES {
                let u = chunk[i] - largest;
                let e = exp(u);
                chunk[i] = e;
                totals[i] += e;
                moments[i] = e.mul_add(u, moments[i]);
            }
        }
        let (mut total, mut moment) = (sum(&totals), sum(&moments));
        for out in rest {
            let u = *out - largest;
            *out = exp(u);
            total += *out;
            moment = out.mul_add(u, moment);
        }
        // H = ln Z − Σ p u
        (1.0 / total, f64::from(total).ln() - f64::from(moment) / f64::from(total))
    }
}

/// The loss of a matrix of student logits, which becomes its gradient.
pub(super) fn in_place(
    students: &mut [f32],
    prototypes: usize,
    teachers: &[f32],
    center: &[f32],
    [student_temp, teacher_temp]: [f64; 2],
    pairs: &[(u32, u32)],
    weights: PairWeights<'_>,
) -> (f32, Stats) {
    let grouped = Grouped::new(students.len() / prototypes, pairs, weights);
    let kernel = Kernel {
        center,
        student_scale: (1.0 / student_temp) as f32,
        teacher_scale: (1.0 / teacher_temp) as f32,
    };
    let sums: Vec<Sums> = students
        .par_chunks_mut(prototypes)
        .enumerate()
        .map_init(
            || (vec![0.0f32; prototypes], vec![0.0f32; prototypes]),
            |(student, scratch), (row, gradient)| {
                let entries = grouped.of(row);
                if entries.is_empty() {
                    gradient.fill(0.0);
                    return Sums::default();
                }
                student.copy_from_slice(gradient);
                let teachers =
                    entries.iter().map(|&(t, weight)| (&teachers[t * prototypes..][..prototypes], weight));
                widest!(kernel.row(student, teachers.clone(), Some(&mut *gradient), scratch))
            },
        )
        .collect();
    summarized(&sums, pairs.len())
}

/// Loss and statistics of all rows.
fn summarized(sums: &[Sums], pairs: usize) -> (f32, Stats) {
    let count = pairs.max(1) as f64;
    let stats = Stats {
        teacher_entropy: sums.iter().map(|s| s.entropy).sum::<f64>() / count,
        kl: sums.iter().map(|s| s.kl).sum::<f64>() / count,
    };
    (sums.iter().map(|s| s.loss).sum::<f64>() as f32, stats)
}

pub(super) fn fused(
    student: &Tensor,
    teacher: &Tensor,
    center: &Tensor,
    [student_temp, teacher_temp]: [f64; 2],
    pairs: &[(u32, u32)],
    weights: PairWeights<'_>,
) -> Result<(Tensor, Statistics)> {
    let (rows, prototypes) = student.dims2()?;
    let grouped = Grouped::new(rows, pairs, weights);
    let (student, teacher, center) = (student.contiguous()?, teacher.contiguous()?, center.contiguous()?);
    let (gradient, sums) = {
        let ((s_storage, s_layout), (t_storage, t_layout), (c_storage, c_layout)) =
            (student.storage_and_layout(), teacher.storage_and_layout(), center.storage_and_layout());
        let students = stored(&s_storage, s_layout)?;
        let teachers = stored(&t_storage, t_layout)?;
        let kernel = Kernel {
            center: stored(&c_storage, c_layout)?,
            student_scale: (1.0 / student_temp) as f32,
            teacher_scale: (1.0 / teacher_temp) as f32,
        };
        let row = |row: usize, mut gradient: Option<&mut [f32]>| {
            let entries = grouped.of(row);
            if entries.is_empty() {
                return Sums::default();
            }
            let mut scratch = vec![0.0f32; prototypes];
            let student = &students[row * prototypes..][..prototypes];
            let teachers =
                entries.iter().map(|&(t, weight)| (&teachers[t * prototypes..][..prototypes], weight));
            widest!(kernel.row(student, teachers.clone(), gradient.as_deref_mut(), &mut scratch))
        };
        if student.track_op() {
            let (gradient, sums) = build(rows * prototypes, prototypes, |r, gradient| row(r, Some(gradient)));
            (Some(tensor(gradient, (rows, prototypes))?), sums)
        } else {
            (None, (0..rows).into_par_iter().map(|r| row(r, None)).collect())
        }
    };
    let (loss, stats) = summarized(&sums, pairs.len());
    Ok((student.apply_op1(CrossEntropy { loss, gradient })?, Statistics::on_host(stats)?))
}

/// The loss, already known, with its gradient.
struct CrossEntropy {
    loss: f32,
    gradient: Option<Tensor>,
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn cpu_fwd(&self, _student: &CpuStorage, _layout: &Layout) -> Result<(CpuStorage, Shape)> {
        output(vec![self.loss], ())
    }

    fn bwd(&self, _student: &Tensor, _result: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let Some(known) = &self.gradient else { return Ok(None) };
        let factor = gradient.to_scalar::<f32>()?;
        if factor == 1.0 {
            return Ok(Some(known.clone()));
        }
        let (storage, layout) = known.storage_and_layout();
        let (values, part) = (stored(&storage, layout)?, known.dim(1)?);
        let (scaled, _) = build(values.len(), part, |row, scaled| {
            let values = &values[row * part..][..scaled.len()];
            widest!({
                for (scaled, &value) in scaled.iter_mut().zip(values) {
                    *scaled = factor * value;
                }
            });
        });
        Ok(Some(tensor(scaled, known.shape())?))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Ops, testing::*};
    use super::PairWeights;
    use candle_core::{DType, Device, Tensor, Var};

    const PAIRS: [(u32, u32); 6] = [(0, 1), (2, 0), (0, 0), (3, 2), (2, 2), (0, 1)];

    #[test]
    fn fused_agrees_with_composition_and_finite_differences() {
        for prototypes in [1, 2, 31, 32, 33, 200] {
            let (teacher, center) = (random(7, &[3, prototypes]), random(8, &[prototypes]));
            let weights = [0.5f32, 1.0, -0.25, 2.0, 0.0, 0.125];
            for each in [PairWeights::Same(0.3), PairWeights::Each(&weights)] {
                check(
                    &|ops, t| {
                        let to = |x: &Tensor| x.to_dtype(t[0].dtype())?.to_device(t[0].device());
                        // a factor after the loss: the kept gradient is scaled
                        ops.cross_entropy(&t[0], &to(&teacher)?, &to(&center)?, 0.5, 0.25, &PAIRS, each)?
                            * 0.7
                    },
                    &[&[5, prototypes]],
                );
            }
        }
    }

    #[test]
    fn statistics_agree_and_equal_rows_have_no_divergence() {
        let (student, teacher, center) = (random(1, &[5, 77]), random(2, &[3, 77]), random(3, &[77]));
        let of = |ops: Ops| ops.cross_entropy_with_stats(&student, &teacher, &center, 0.1, 0.07, &PAIRS, 1.0);
        let stats = |ops| of(ops).unwrap().1.read().unwrap();
        let (fused, plain) = (stats(Ops::fused()), stats(Ops::reference()));
        assert!((fused.teacher_entropy - plain.teacher_entropy).abs() < 1e-5, "{fused:?} {plain:?}");
        assert!((fused.kl - plain.kl).abs() < 1e-4 * plain.kl, "{fused:?} {plain:?}");

        let zero = center.zeros_like().unwrap();
        let (loss, stats) = Ops::fused()
            .cross_entropy_with_stats(&student, &student, &zero, 0.1, 0.1, &[(1, 1), (4, 4)], 0.5)
            .unwrap();
        let stats = stats.read().unwrap();
        assert!(stats.kl.abs() < 1e-5, "{stats:?}");
        assert!((f64::from(loss.to_scalar::<f32>().unwrap()) - stats.teacher_entropy).abs() < 1e-5);
    }

    #[test]
    fn uniform_logits_give_ln_k() {
        let x = Tensor::zeros((1, 4096), DType::F32, &Device::Cpu).unwrap();
        let center = Tensor::zeros(4096, DType::F32, &Device::Cpu).unwrap();
        let loss = Ops::fused().cross_entropy(&x, &x, &center, 0.1, 0.04, &[(0, 0)], 1.0).unwrap();
        assert!((loss.to_scalar::<f32>().unwrap() - 4096f32.ln()).abs() < 1e-5);
    }

    #[test]
    fn extreme_logits_stay_finite_and_nan_shows() {
        let student = Var::from_tensor(&(random(1, &[2, 50]) * 1e4).unwrap()).unwrap();
        let (teacher, center) = ((random(2, &[2, 50]) * 1e4).unwrap(), random(3, &[50]));
        let pairs = [(0, 0), (1, 1)];
        let loss = Ops::fused().cross_entropy(&student, &teacher, &center, 0.1, 0.04, &pairs, 1.0).unwrap();
        let gradients = loss.backward().unwrap();
        assert!(loss.to_scalar::<f32>().unwrap().is_finite());
        assert!(flat(gradients.get(&student).unwrap()).iter().all(|v| v.is_finite()));
        let broken = (teacher * f64::NAN).unwrap();
        let loss = Ops::fused().cross_entropy(&student, &broken, &center, 0.1, 0.04, &pairs, 1.0).unwrap();
        assert!(loss.to_scalar::<f32>().unwrap().is_nan());
    }

    #[test]
    fn wrong_arguments_are_refused() {
        let (student, teacher, center) = (random(1, &[2, 4]), random(2, &[3, 4]), random(3, &[4]));
        let try_with = |pairs: &[(u32, u32)], weights: PairWeights<'_>, temp: f64| {
            Ops::fused().cross_entropy(&student, &teacher, &center, temp, 0.04, pairs, weights).map(|_| ())
        };
        assert!(try_with(&[(2, 0)], PairWeights::Same(1.0), 0.1).unwrap_err().to_string().contains("(2, 0)"));
        assert!(try_with(&[(0, 3)], PairWeights::Same(1.0), 0.1).is_err());
        assert!(try_with(&[(0, 0)], PairWeights::Each(&[]), 0.1).is_err());
        assert!(try_with(&[(0, 0)], PairWeights::Same(1.0), 0.0).is_err());
        assert!(try_with(&[], PairWeights::Same(1.0), 0.1).is_ok());
    }
}
