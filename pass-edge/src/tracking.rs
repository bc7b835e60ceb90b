//! Labels of a video on the device: [`Clip`] of `pass-core` with the vector instructions of a kernel and the caller's
//! threads. The same bits from every kernel and any number of threads.

use core::ops::Range;

use pass_core::propagation::{Clip, ClipShape};

use crate::error::{Error, Result, prefix_mut};
use crate::kernels::{Arithmetic, Job, Kernel, Work};
use crate::parallel::{Pool, for_parts, used_threads};
use pass_core::rows::rows_of_mut;

/// Values of working memory that [`propagate`] needs with the threads of `pool`.
pub fn propagate_scratch_len(shape: &ClipShape, pool: &dyn Pool) -> usize {
    shape.scratch_len().saturating_mul(used_threads(pool))
}

/// Soft labels of the whole target frame of `clip`.
///
/// - `scratch`: at least [`propagate_scratch_len`] values.
/// - `out`: `[N, C]`.
///
/// # Errors
/// [`Error::LengthMismatch`] if a buffer does not fit; [`Error::Core`] if the clip has no target.
pub fn propagate(
    clip: &Clip<'_>,
    kernel: Kernel,
    pool: &dyn Pool,
    scratch: &mut [f32],
    out: &mut [f32],
) -> Result<()> {
    let (expected, actual) = (clip.shape().frame_labels_len(), out.len());
    if expected != actual {
        return Err(Error::LengthMismatch { what: "soft labels", expected, actual });
    }
    let scratch = prefix_mut("tracking scratch", propagate_scratch_len(clip.shape(), pool), scratch)?;
    kernel.dispatch(Propagate { clip, pool, scratch, out })
}

/// The arguments of [`propagate`], waiting for a kernel.
struct Propagate<'a, 'c> {
    clip: &'a Clip<'c>,
    pool: &'a dyn Pool,
    scratch: &'a mut [f32],
    out: &'a mut [f32],
}

impl Job for Propagate<'_, '_> {
    type Output = Result<()>;

    fn run<K: Arithmetic>(self, kernel: K) -> Result<()> {
        let Self { clip, pool, scratch, out } = self;
        let shape = clip.shape();
        let n = shape.grid().n_patches();
        let share = n.div_ceil(used_threads(pool));
        let parts = rows_of_mut(out, share.saturating_mul(shape.classes()))
            .zip(rows_of_mut(scratch, shape.scratch_len()))
            .enumerate()
            .map(|(index, (out, scratch))| Part {
                clip,
                patches: index * share..n.min((index + 1) * share),
                scratch,
                out,
            });
        for_parts(pool, parts, |part| kernel.vectorize(part).map_err(Error::Core))
    }
}

/// The patches of one thread.
struct Part<'a, 'c> {
    clip: &'a Clip<'c>,
    patches: Range<usize>,
    scratch: &'a mut [f32],
    out: &'a mut [f32],
}

impl Work for Part<'_, '_> {
    type Output = pass_core::Result<()>;

    #[inline(always)]
    fn run(self) -> pass_core::Result<()> {
        self.clip.propagate_into(self.patches, self.scratch, self.out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::generated_pixel;
    use crate::parallel::Serial;
    use pass_core::propagation::Propagation;
    use pass_core::shape::{PatchGrid, Tokens};
    use std::vec;
    use std::vec::Vec;

    fn features(seed: u64, count: usize) -> Vec<f32> {
        (0..count as u64).map(|index| f32::from(generated_pixel(seed, index)) - 127.5).collect()
    }

    #[test]
    fn every_kernel_and_number_of_threads_gives_the_same_bits() {
        let (grid, dim, classes) = (PatchGrid::new(7, 21).unwrap(), 40, 3);
        let rule = Propagation { previous_frames: 1, radius: 4, ..Propagation::DAVIS };
        let shape = ClipShape::new(rule, grid, dim, classes).unwrap();
        let n = grid.n_patches();
        let (mut memory, mut labels) = (vec![0.0; shape.features_len()], vec![0.0; shape.labels_len()]);
        let first = features(1, n * dim);
        let first_labels: Vec<f32> =
            features(2, n * classes).iter().map(|x| f32::from(u8::from(*x > 0.0))).collect();
        let first = Tokens::new(&first, n, dim).unwrap();
        let mut clip = Clip::new(shape, &mut memory, &mut labels, first, &first_labels).unwrap();
        let second = features(3, n * dim);
        clip.set_target(Tokens::new(&second, n, dim).unwrap()).unwrap();

        let run = |kernel, pool: &dyn Pool| {
            let mut scratch = vec![f32::NAN; propagate_scratch_len(&shape, pool)];
            let mut out = vec![f32::NAN; n * classes];
            propagate(&clip, kernel, pool, &mut scratch, &mut out).unwrap();
            out.iter().map(|value| value.to_bits()).collect::<Vec<_>>()
        };
        let expected = run(Kernel::Scalar, &Serial);
        for kernel in Kernel::available() {
            assert!(run(kernel, &Serial) == expected, "{}", kernel.name());
            #[cfg(feature = "std")]
            for threads in [2, 3, 16] {
                let found = run(kernel, &crate::parallel::ScopedThreads(threads));
                assert!(found == expected, "{} on {threads} threads", kernel.name());
            }
        }
        let mut out = vec![0.0; n * classes];
        let (kernel, needed) = (Kernel::Scalar, propagate_scratch_len(&shape, &Serial));
        assert!(propagate(&clip, kernel, &Serial, &mut vec![0.0; needed - 1], &mut out).is_err());
        assert!(propagate(&clip, kernel, &Serial, &mut vec![0.0; needed], &mut out[1..]).is_err());
    }
}
