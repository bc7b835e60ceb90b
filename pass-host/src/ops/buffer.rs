//! Output buffers, filled part by part in parallel without being cleared twice.
#![expect(
    unsafe_code,
    reason = "a vector's length is set after its parts were initialized by parallel tasks"
)]

use rayon::prelude::*;

/// A vector of `len` values, made by one task for every `part` values (the last may be shorter), and what the tasks
/// returned, in order. A task gets the number of its part and the part itself, holding zeros that were just written,
/// hence in this core's cache. Parts depend on the sizes only, never on the number of threads.
pub(super) fn build<R: Send>(
    len: usize,
    part: usize,
    task: impl Fn(usize, &mut [f32]) -> R + Sync + Send,
) -> (Vec<f32>, Vec<R>) {
    let mut values: Vec<f32> = Vec::with_capacity(len);
    let spare = &mut values.spare_capacity_mut()[..len];
    let returned = spare
        .par_chunks_mut(part.max(1))
        .enumerate()
        .map(|(index, uninitialized)| {
            for value in uninitialized.iter_mut() {
                value.write(0.0);
            }
            // SAFETY: every element was written by the loop above.
            let initialized = unsafe { uninitialized.assume_init_mut() };
            task(index, initialized)
        })
        .collect();
    // SAFETY: the parts cover the first `len` elements, all tasks have returned, so all of them are initialized.
    unsafe { values.set_len(len) };
    (values, returned)
}

/// Values of one task where a whole buffer is only cleared: large enough to hide the cost of a task.
const CLEARED: usize = 1 << 16;

/// `len` zeros, written in parallel.
pub(super) fn zeros(len: usize) -> Vec<f32> {
    build(len, CLEARED, |_, _| ()).0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_is_zero_first_and_results_are_in_order() {
        for (len, part) in [(0, 4), (1, 4), (7, 3), (1000, 64), (5, 0)] {
            let (values, order) = build(len, part, |index, part| {
                assert!(part.iter().all(|&v| v == 0.0));
                part.fill(index as f32);
                index
            });
            assert_eq!(values.len(), len);
            assert!(values.iter().enumerate().all(|(i, &v)| v == (i / part.max(1)) as f32));
            assert_eq!(order, (0..len.div_ceil(part.max(1))).collect::<Vec<_>>());
        }
        assert_eq!(zeros(3), [0.0; 3]);
    }
}
