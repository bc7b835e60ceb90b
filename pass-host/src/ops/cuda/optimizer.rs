//! Norms of all gradients and updates of all parameters in one launch each.

use super::super::access::in_place;
use super::super::adamw::{Kernel, Update};
use super::engine::{Launch, Output, address};
use candle_core::{DType, Result, Tensor, bail};

/// Values of one block, as in the kernels.
const PART: usize = 16384;
/// Threads of a block, a power of two.
const THREADS: u32 = 256;

/// Parts of all tensors: `[tensor, part]` for every block, and where the blocks of each tensor start.
fn parts(lengths: impl Iterator<Item = usize>) -> (Vec<u32>, Vec<u32>) {
    let (mut blocks, mut starts) = (Vec::new(), vec![0]);
    for (tensor, length) in lengths.enumerate() {
        blocks.extend((0..length.div_ceil(PART)).flat_map(|part| [tensor as u32, part as u32]));
        starts.push((blocks.len() / 2) as u32);
    }
    (blocks, starts)
}

/// Euclidean norms of `f32` gradients, `[count]` in `f64`; not finite where a value is not.
pub(in super::super) fn norms(gradients: &[&Tensor]) -> Result<Tensor> {
    let Some(&first) = gradients.first() else { bail!("norms of no gradients") };
    let gradients: Vec<Tensor> =
        gradients.iter().map(|gradient| gradient.contiguous()).collect::<Result<_>>()?;
    let (blocks, starts) = parts(gradients.iter().map(Tensor::elem_count));
    let mut table = Vec::with_capacity(2 * gradients.len());
    for gradient in &gradients {
        table.extend([address(gradient)? as i64, gradient.elem_count() as i64]);
    }
    let count = blocks.len() / 2;
    let table = upload(table, first)?;
    let (blocks, starts) = (upload(blocks, first)?, upload(starts, first)?);
    let (shares, norms) =
        (Output::new(count, DType::F64, first)?, Output::new(gradients.len(), DType::F64, first)?);
    Launch::new("optimizer", "squares", DType::F32, first)
        .blocks(count, THREADS)
        .tensor(&table)
        .tensor(&blocks)
        .output(&shares)
        .run()?;
    Launch::new("optimizer", "norms", DType::F32, first)
        .threads(gradients.len())
        .output(&shares)
        .tensor(&starts)
        .output(&norms)
        .int(gradients.len())
        .run()?;
    norms.tensor(gradients.len())
}

/// A table on the device of `like`; never empty.
fn upload<T: candle_core::WithDType>(mut values: Vec<T>, like: &Tensor) -> Result<Tensor> {
    if values.is_empty() {
        values.push(T::zero());
    }
    let count = values.len();
    Tensor::from_vec(values, count, like.device())
}

/// Words of a row of the table of updates: five addresses, the length, ten numbers.
const WORDS: usize = 11;

/// AdamW and moving averages of all updates.
pub(in super::super) fn update(updates: &[Update<'_>]) -> Result<()> {
    let Some(like) = updates.first().map(|update| update.student) else { return Ok(()) };
    let gradients: Vec<Option<Tensor>> = updates
        .iter()
        .map(|update| update.learned.as_ref().map(|learned| learned.gradient.contiguous()).transpose())
        .collect::<Result<_>>()?;
    // everything that is written
    let mut written = Vec::new();
    for update in updates {
        written.push(update.student);
        written.extend(update.learned.iter().flat_map(|learned| [learned.first, learned.second]));
        written.extend(update.teacher);
    }
    let (blocks, _) = parts(updates.iter().map(|update| update.student.elem_count()));
    let count = blocks.len() / 2;
    let blocks = upload(blocks, like)?;
    with_addresses(&written, &mut Vec::new(), &mut |addresses| {
        let mut addresses = addresses.iter().copied();
        let mut next = || addresses.next().unwrap_or_default();
        let mut table: Vec<i64> = Vec::with_capacity(WORDS * updates.len());
        for (update, gradient) in updates.iter().zip(&gradients) {
            let student = next();
            let [first, second] = if update.learned.is_some() { [next(), next()] } else { [0, 0] };
            let teacher = if update.teacher.is_some() { next() } else { 0 };
            let gradient = gradient.as_ref().map(address).transpose()?.unwrap_or_default();
            let length = update.student.elem_count() as u64;
            table.extend([student, gradient, first, second, teacher, length].map(|word| word as i64));
            let k = Kernel::new(&update.step);
            let numbers = [
                [k.decay, k.gradient_scale],
                [k.first_share, k.beta2],
                [k.second_share, k.step_size],
                [k.root_correction, k.eps],
                [k.momentum, k.student_share],
            ];
            // the lower number comes first in memory
            table.extend(
                numbers.map(|[low, high]| i64::from(low.to_bits()) | i64::from(high.to_bits()) << 32),
            );
        }
        let table = upload(table, like)?;
        Launch::new("optimizer", "adamw_ema", DType::F32, like)
            .blocks(count, THREADS)
            .tensor(&table)
            .tensor(&blocks)
            .run()
    })
}

/// Calls `then` with the addresses of tensors that may be written, each of which has a storage of its own.
fn with_addresses(
    tensors: &[&Tensor],
    found: &mut Vec<u64>,
    then: &mut dyn FnMut(&[u64]) -> Result<()>,
) -> Result<()> {
    match tensors.split_first() {
        None => then(found),
        Some((tensor, _)) if tensor.device().is_cuda() => {
            // memory of the device is nobody's borrow; the stream orders reads and writes
            found.push(address(tensor)?);
            with_addresses(&tensors[1..], found, then)
        }
        Some((tensor, others)) => in_place(tensor, |values| {
            found.push(values.as_mut_ptr() as u64);
            with_addresses(others, found, then)
        }),
    }
}
