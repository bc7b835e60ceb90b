//! Centered, sharpened cross-entropy over many prototypes.
//!
//! Neither probabilities nor the gradient are kept: the backward pass forms the gradient from the logits and two numbers
//! a row, and reads its factor on the device.

use super::super::cross_entropy::{Grouped, PairWeights, Statistics};
use super::engine::{Launch, Output};
use super::graph::of_one;
use candle_core::{DType, Device, DeviceLocation, Result, Tensor};
use std::sync::Mutex;
use xxhash_rust::xxh3::Xxh3;

/// Threads of a block, which serves one row.
const THREADS: u32 = 256;

pub(in super::super) fn cross_entropy(
    student: &Tensor,
    teacher: &Tensor,
    center: &Tensor,
    [student_temp, teacher_temp]: [f64; 2],
    pairs: &[(u32, u32)],
    weights: PairWeights<'_>,
) -> Result<(Tensor, Statistics)> {
    let (rows, prototypes) = student.dims2()?;
    let teachers = teacher.dim(0)?;
    let call = Call {
        student: student.contiguous()?,
        teacher: teacher.detach().contiguous()?,
        center: center.detach().contiguous()?,
        pairs: Pairs::on(student.device(), rows, pairs, weights)?,
        scales: [(1.0 / student_temp) as f32, (1.0 / teacher_temp) as f32],
        rows,
        prototypes,
    };
    let teacher_statistics = Output::new(3 * teachers, DType::F32, student)?;
    Launch::new("cross_entropy", "teacher_rows", teacher.dtype(), student)
        .blocks(teachers, THREADS)
        .tensor(&call.teacher)
        .tensor(&call.center)
        .output(&teacher_statistics)
        .int(prototypes)
        .float(call.scales[1])
        .run()?;
    let teacher_statistics = teacher_statistics.tensor((teachers, 3))?;
    let (statistics, sums) =
        (Output::new(2 * rows, DType::F32, student)?, Output::new(3 * rows, DType::F64, student)?);
    call.launch("student_rows", &teacher_statistics)
        .output(&statistics)
        .output(&sums)
        .int(prototypes)
        .float(call.scales[0])
        .float(call.scales[1])
        .run()?;
    let (loss, means) = (Output::new(1, DType::F32, student)?, Output::new(2, DType::F64, student)?);
    Launch::new("cross_entropy", "totals", DType::F32, student)
        .blocks(1, THREADS)
        .output(&sums)
        .output(&loss)
        .output(&means)
        .int(rows)
        .double(pairs.len().max(1) as f64)
        .run()?;
    let statistics = statistics.tensor((rows, 2))?;
    let student = call.student.clone();
    let loss = of_one("cross_entropy", &student, loss, (), move |upstream| {
        let gradient = Output::like(&call.student)?;
        call.launch("student_rows_backward", &teacher_statistics)
            .tensor(&statistics)
            .tensor(upstream)
            .output(&gradient)
            .int(call.prototypes)
            .float(call.scales[0])
            .float(call.scales[1])
            .run()?;
        Ok([Some(gradient.tensor(call.student.shape())?)])
    })?;
    Ok((loss, Statistics::from(means.tensor(2)?)))
}

/// What the launches of a call are given.
struct Call {
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    pairs: Pairs,
    /// Inverse temperatures of student and teacher.
    scales: [f32; 2],
    rows: usize,
    prototypes: usize,
}

impl Call {
    fn launch(&self, kernel: &'static str, teacher_statistics: &Tensor) -> Launch {
        Launch::new("cross_entropy", kernel, self.student.dtype(), &self.student)
            .blocks(self.rows, THREADS)
            .tensor(&self.student)
            .tensor(&self.teacher)
            .tensor(&self.center)
            .tensor(teacher_statistics)
            .tensor(&self.pairs.starts)
            .tensor(&self.pairs.entries)
            .tensor(&self.pairs.weights)
    }
}

/// The pairs of every student row on a device.
#[derive(Clone)]
struct Pairs {
    starts: Tensor,
    entries: Tensor,
    weights: Tensor,
}

/// Most sets of pairs kept on devices: a run uses two, one for each loss.
const KEPT: usize = 4;
type Key = (u128, DeviceLocation);
static PAIRS: Mutex<Vec<(Key, Pairs)>> = Mutex::new(Vec::new());

impl Pairs {
    /// The pairs on a device. They are the same step after step, so they are kept there: copying a megabyte anew would
    /// wait for the device.
    fn on(device: &Device, rows: usize, pairs: &[(u32, u32)], weights: PairWeights<'_>) -> Result<Self> {
        let mut hash = Xxh3::new();
        hash.update(&rows.to_le_bytes());
        for (pair, &(student, teacher)) in pairs.iter().enumerate() {
            let weight = weights.of(pair).to_bits();
            hash.update(
                &(u128::from(student) << 64 | u128::from(teacher) << 32 | u128::from(weight)).to_le_bytes(),
            );
        }
        let key = (hash.digest128(), device.location());
        let mut kept = PAIRS.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some((_, pairs)) =
            kept.iter().find(|(known, pairs)| *known == key && pairs.starts.device().same_device(device))
        {
            return Ok(pairs.clone());
        }
        let grouped = Grouped::new(rows, pairs, weights);
        let starts: Vec<u32> = grouped.starts.iter().map(|&start| start as u32).collect();
        // one entry that no row reads keeps the tensors from being empty
        let entries = grouped.entries.iter().copied().chain([(0, 0.0)]);
        let (entries, weights): (Vec<u32>, Vec<f32>) =
            entries.map(|(row, weight)| (row as u32, weight)).unzip();
        let count = entries.len();
        let pairs = Self {
            starts: Tensor::from_vec(starts, rows + 1, device)?,
            entries: Tensor::from_vec(entries, count, device)?,
            weights: Tensor::from_vec(weights, count, device)?,
        };
        if kept.len() == KEPT {
            kept.remove(0);
        }
        kept.push((key, pairs.clone()));
        Ok(pairs)
    }
}
