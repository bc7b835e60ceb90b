//! Soft labels of a whole frame on all cores. The rule and its arithmetic are `pass_core::propagation`; here it is
//! compiled for the widest vector instructions and cut into rows of patches. A row needs the similarities of its windows
//! only, so memory grows with the window and the threads, never with the square of the patches, and the bits depend
//! neither on the processor nor on the threads.

use pass_core::propagation::Clip;
use rayon::prelude::*;

use crate::ops::lanes::widest;

/// Labels `[N, C]` of the target frame of `clip`.
///
/// # Errors
/// [`pass_core::Error::LengthMismatch`] if `out` is not of that length, or without a target.
pub fn propagate(clip: &Clip<'_>, out: &mut [f32]) -> pass_core::Result<()> {
    let shape = clip.shape();
    let expected = shape.frame_labels_len();
    if out.len() != expected {
        let actual = out.len();
        return Err(pass_core::Error::LengthMismatch { what: "soft labels", expected, actual });
    }
    let width = shape.grid().width();
    let row = |scratch: &mut Vec<f32>, (row, out): (usize, &mut [f32])| {
        widest!(clip.propagate_into(row * width..(row + 1) * width, scratch, out))
    };
    out.par_chunks_mut(width * shape.classes())
        .enumerate()
        .map_init(|| vec![0.0; shape.scratch_len()], row)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use pass_core::propagation::{ClipShape, Propagation};
    use pass_core::shape::{PatchGrid, Tokens};
    use proptest::prelude::*;

    use crate::random::{Purpose, Stream};

    fn numbers(seed: u64, count: usize) -> Vec<f32> {
        let mut stream = Stream::new(seed, Purpose::Subset, &[]);
        (0..count).map(|_| stream.uniform() as f32 - 0.5).collect()
    }

    /// A clip of `frames` random frames: the last one's labels, whole and by the scalar twin.
    fn twins(rule: Propagation, grid: (usize, usize), dim: usize, frames: u64) -> [Vec<f32>; 2] {
        let (grid, classes) = (PatchGrid::new(grid.0, grid.1).unwrap(), 3);
        let n = grid.n_patches();
        let shape = ClipShape::new(rule, grid, dim, classes).unwrap();
        let (mut features, mut labels) = (vec![0.0; shape.features_len()], vec![0.0; shape.labels_len()]);
        let tokens = numbers(0, n * dim);
        let mask: Vec<f32> = (0..n).flat_map(|i| (0..3).map(move |c| f32::from(u8::from(i % 3 == c)))).collect();
        let mut clip =
            Clip::new(shape, &mut features, &mut labels, Tokens::new(&tokens, n, dim).unwrap(), &mask).unwrap();
        let mut out = [vec![f32::NAN; n * classes], vec![f32::NAN; n * classes]];
        for frame in 1..frames {
            let tokens = numbers(frame, n * dim);
            clip.set_target(Tokens::new(&tokens, n, dim).unwrap()).unwrap();
            let [fast, slow] = &mut out;
            propagate(&clip, fast).unwrap();
            clip.propagate_into(0..n, &mut vec![f32::NAN; shape.scratch_len()], slow).unwrap();
            clip.keep_target(&out[1]).unwrap();
        }
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn all_cores_agree_with_the_scalar_twin(
            height in 1_usize..9,
            width in 1_usize..23,
            dim in 1_usize..40,
            radius in 0_usize..6,
            top_k in 1_usize..40,
            previous_frames in 0_usize..4,
        ) {
            let rule = Propagation { previous_frames, radius, top_k, temperature: 0.1 };
            let [fast, slow] = twins(rule, (height, width), dim, 5);
            prop_assert_eq!(fast, slow);
        }
    }

    #[test]
    fn no_window_and_more_votes_than_patches_work() {
        let rule = Propagation { radius: 0, top_k: usize::MAX, ..Propagation::DAVIS };
        let [fast, slow] = twins(rule, (3, 5), 8, 4);
        assert_eq!(fast, slow);
        assert!(fast.chunks(3).all(|labels| (labels.iter().sum::<f32>() - 1.0).abs() < 1e-5));
    }
}
