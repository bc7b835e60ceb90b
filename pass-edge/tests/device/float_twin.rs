//! The int8 forward pass against the float one it stands for, and every kernel against every other.

use crate::random_vit::{FloatVit, photo};
use crate::{SMALL, SMALLEST};
use pass_edge::format::{Architecture, Mode};
use pass_edge::image::{Image, PixelOrder};
use pass_edge::kernels::Kernel;
use pass_edge::model::Model;
use pass_edge::parallel::ScopedThreads;
use pass_edge::scratch::{ScratchBuffer, ScratchLen};
use pass_edge::{features, features_with_pool, scratch_len};

fn compute(file: &[u8], rgb: &[u8], kernel: Kernel) -> Vec<f32> {
    let model = Model::from_bytes(file).unwrap();
    let size = model.architecture().image_size();
    let image = Image::new(rgb, size, 3 * size.1, PixelOrder::Rgb).unwrap();
    let mut scratch = ScratchBuffer::new(scratch_len(&model));
    let mut out = vec![f32::NAN; model.output_len()];
    features(&model, &image, kernel, &mut scratch.scratch(), &mut out).unwrap();
    out
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// Smallest and mean cosine over all tokens.
fn fidelity(float: &FloatVit, seed: u64) -> (f64, f64) {
    let architecture = float.architecture;
    let rgb = photo(&architecture, seed);
    let (exact, quantized) = (float.forward(&rgb), compute(&float.quantized(), &rgb, Kernel::best()));
    assert_eq!(exact.len(), quantized.len());
    let dim = architecture.dim();
    let cosines: Vec<f64> =
        exact.chunks_exact(dim).zip(quantized.chunks_exact(dim)).map(|(a, b)| cosine(a, b)).collect();
    let mean = cosines.iter().sum::<f64>() / cosines.len() as f64;
    (cosines.into_iter().fold(1.0, f64::min), mean)
}

/// More than 512 tokens: weighted values are summed in two parts.
const LARGE_GRID: Architecture = Architecture { grid: (23, 23), depth: 2, patch_size: 2, ..SMALL };
/// The released backbone, shortened.
const SHORT_TINY: Architecture = Architecture { depth: 3, ..Architecture::vit_tiny(16, (14, 14)) };

#[test]
fn features_are_those_of_the_float_model() {
    for architecture in [SMALL, LARGE_GRID, SHORT_TINY] {
        for seed in 0..3 {
            let float = FloatVit::random(architecture, seed);
            let (smallest, mean) = fidelity(&float, seed);
            assert!(
                smallest > 0.998 && mean > 0.999,
                "{architecture:?}: smallest {smallest:.5}, mean {mean:.5}"
            );
            let (smallest, mean) = fidelity(&FloatVit { mode: Mode::Fast, ..float }, seed);
            assert!(
                smallest > 0.996 && mean > 0.998,
                "{architecture:?}, fast: smallest {smallest:.5}, mean {mean:.5}"
            );
        }
    }
}

#[test]
fn every_kernel_gives_the_same_bits() {
    for (architecture, seed) in [(SMALLEST, 0), (SMALL, 1), (LARGE_GRID, 2), (SHORT_TINY, 3)] {
        let float = FloatVit::random(architecture, seed);
        let rgb = photo(&architecture, seed);
        for file in [float.quantized(), FloatVit { mode: Mode::Fast, ..float }.quantized()] {
            let bits =
                |kernel| compute(&file, &rgb, kernel).into_iter().map(f32::to_bits).collect::<Vec<_>>();
            let reference = bits(Kernel::Scalar);
            for kernel in Kernel::available() {
                assert!(
                    bits(kernel) == reference,
                    "{} differs from scalar on {architecture:?}",
                    kernel.name()
                );
            }
        }
    }
}

#[test]
fn the_number_of_threads_changes_nothing() {
    for (architecture, seed) in [(SMALLEST, 0), (SMALL, 1), (LARGE_GRID, 2)] {
        let file = FloatVit::random(architecture, seed).quantized();
        let rgb = photo(&architecture, seed);
        let reference = compute(&file, &rgb, Kernel::best());
        let model = Model::from_bytes(&file).unwrap();
        let size = architecture.image_size();
        let image = Image::new(&rgb, size, 3 * size.1, PixelOrder::Rgb).unwrap();
        for threads in [1, 2, 3, 7, 100] {
            let mut scratch = ScratchBuffer::new(ScratchLen::with_threads(&architecture, threads));
            let mut out = vec![f32::NAN; model.output_len()];
            let pool = ScopedThreads(threads);
            features_with_pool(&model, &image, Kernel::best(), &pool, &mut scratch.scratch(), &mut out)
                .unwrap();
            assert!(out == reference, "{threads} threads differ from one on {architecture:?}");
        }
    }
}

#[test]
fn the_order_of_bytes_in_a_frame_changes_nothing() {
    let file = FloatVit::random(SMALL, 4).quantized();
    let rgb = photo(&SMALL, 4);
    let (height, width) = SMALL.image_size();
    let reference = compute(&file, &rgb, Kernel::best());
    let stride = 3 * width + 5;
    let mut bgr = vec![0; height * stride];
    for (row, line) in rgb.chunks_exact(3 * width).enumerate() {
        for (pixel, place) in line.as_chunks::<3>().0.iter().zip(bgr[row * stride..].chunks_exact_mut(3)) {
            place.copy_from_slice(&[pixel[2], pixel[1], pixel[0]]);
        }
    }
    let model = Model::from_bytes(&file).unwrap();
    let image = Image::new(&bgr, (height, width), stride, PixelOrder::Bgr).unwrap();
    let mut scratch = ScratchBuffer::new(scratch_len(&model));
    let mut out = vec![0.0; model.output_len()];
    features(&model, &image, Kernel::best(), &mut scratch.scratch(), &mut out).unwrap();
    assert!(out == reference);
}
