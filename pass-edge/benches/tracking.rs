//! Labels of one 480p frame from 8 context frames, with every kernel: `cargo bench -p pass-edge --features std --bench
//! tracking`. That all kernels agree is a test of `pass_edge::tracking`.

use divan::{Bencher, black_box};
use pass_edge::core::propagation::{Clip, ClipShape, Propagation};
use pass_edge::core::shape::{PatchGrid, Tokens};
use pass_edge::kernels::Kernel;
use pass_edge::parallel::{ScopedThreads, Serial};
use pass_edge::tracking::{propagate, propagate_scratch_len};

fn main() {
    divan::main();
}

/// Width of ViT-S.
const DIM: usize = 384;
/// Background and two objects.
const CLASSES: usize = 3;

/// Numbers in [-1, 1) that no two patches share.
fn features(patches: usize, frame: usize) -> Vec<f32> {
    let number = |index: usize| (index * 2_654_435_761 + frame * 40_503) % 65_536;
    (0..patches * DIM).map(|index| number(index) as f32 / 32_768.0 - 1.0).collect()
}

fn kernels() -> impl Iterator<Item = &'static str> {
    Kernel::available().map(Kernel::name)
}

/// `grid` = (rows, columns) of patches.
fn bench(bencher: Bencher<'_, '_>, kernel: &str, grid: (usize, usize), threads: usize) {
    let kernel = Kernel::available().find(|found| found.name() == kernel).expect("a kernel of this machine");
    let grid = PatchGrid::new(grid.0, grid.1).expect("a grid");
    let n = grid.n_patches();
    let shape = ClipShape::new(Propagation::DAVIS, grid, DIM, CLASSES).expect("sizes");
    let (mut memory, mut labels) = (vec![0.0; shape.features_len()], vec![0.0; shape.labels_len()]);
    let soft: Vec<f32> =
        (0..n * CLASSES).map(|i| f32::from(u8::from(i % CLASSES == i / 50 % CLASSES))).collect();
    let frame = features(n, 0);
    let tokens = Tokens::new(&frame, n, DIM).expect("features");
    let mut clip = Clip::new(shape, &mut memory, &mut labels, tokens, &soft).expect("a clip");
    for number in 1..=Propagation::DAVIS.previous_frames + 1 {
        let frame = features(n, number);
        clip.set_target(Tokens::new(&frame, n, DIM).expect("features")).expect("a target");
        if number <= Propagation::DAVIS.previous_frames {
            clip.keep_target(&soft).expect("labels");
        }
    }
    let pool = ScopedThreads(threads);
    let mut scratch = vec![0.0; propagate_scratch_len(&shape, &pool)];
    let mut out = vec![0.0; n * CLASSES];
    bencher.bench_local(|| {
        let result = if threads == 1 {
            propagate(&clip, kernel, &Serial, &mut scratch, &mut out)
        } else {
            propagate(&clip, kernel, &pool, &mut scratch, &mut out)
        };
        result.expect("labels");
        black_box(out[0])
    });
}

#[divan::bench(args = kernels(), sample_count = 10, sample_size = 1)]
fn patches_of_16_pixels(bencher: Bencher<'_, '_>, kernel: &str) {
    bench(bencher, kernel, (30, 52), 1);
}

#[divan::bench(args = kernels(), sample_count = 10, sample_size = 1)]
fn patches_of_16_pixels_on_2_threads(bencher: Bencher<'_, '_>, kernel: &str) {
    bench(bencher, kernel, (30, 52), 2);
}

#[divan::bench(args = kernels(), sample_count = 3, sample_size = 1)]
fn patches_of_8_pixels(bencher: Bencher<'_, '_>, kernel: &str) {
    bench(bencher, kernel, (60, 104), 1);
}
