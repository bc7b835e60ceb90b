//! Milliseconds an image: both modes, each kernel of this processor, one thread and two; random weights.

#[path = "../tests/device/random_vit.rs"]
mod random_vit;

use divan::Bencher;
use pass_edge::features_with_pool;
use pass_edge::format::{Architecture, Mode};
use pass_edge::image::{Image, PixelOrder};
use pass_edge::kernels::Kernel;
use pass_edge::model::Model;
use pass_edge::parallel::Threads;
use pass_edge::scratch::{ScratchBuffer, ScratchLen};
use random_vit::{FloatVit, photo};

fn main() {
    divan::main();
}

/// Kernel, mode, threads.
#[derive(Clone, Copy)]
struct Case(Kernel, Mode, usize);

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {}", self.0.name(), self.1.name(), self.2)
    }
}

fn cases() -> impl Iterator<Item = Case> {
    Kernel::available().flat_map(|kernel| {
        let of = move |mode| [1, 2].map(|threads| Case(kernel, mode, threads));
        [Mode::Exact, Mode::Fast].into_iter().flat_map(of)
    })
}

fn run(bencher: Bencher<'_, '_>, architecture: Architecture, Case(kernel, mode, threads): Case) {
    let float = FloatVit::random(architecture, 1);
    let file = FloatVit { mode, ..float }.quantized();
    let rgb = photo(&architecture, 1);
    let model = Model::from_bytes(&file).expect("a valid model");
    let (height, width) = architecture.image_size();
    let image = Image::new(&rgb, (height, width), 3 * width, PixelOrder::Rgb).expect("a whole image");
    let pool = Threads::new(threads).expect("threads");
    let mut scratch = ScratchBuffer::new(ScratchLen::with_threads(&architecture, threads));
    let mut out = vec![0.0; model.output_len()];
    bencher.bench_local(|| {
        let mut scratch = scratch.scratch();
        pool.install(|| features_with_pool(&model, &image, kernel, &pool, &mut scratch, &mut out))
    });
}

#[divan::bench(args = cases(), sample_count = 10, sample_size = 1)]
fn vit_tiny_16(bencher: Bencher<'_, '_>, case: Case) {
    run(bencher, Architecture::vit_tiny(16, (14, 14)), case);
}

#[divan::bench(args = cases(), sample_count = 5, sample_size = 1)]
fn vit_small_16(bencher: Bencher<'_, '_>, case: Case) {
    run(bencher, Architecture::vit_small(16, (14, 14)), case);
}
