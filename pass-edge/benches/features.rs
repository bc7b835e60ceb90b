//! Milliseconds an image, one thread, random weights, each kernel of this processor.

#[path = "../tests/device/random_vit.rs"]
mod random_vit;

use divan::Bencher;
use pass_edge::features;
use pass_edge::format::Architecture;
use pass_edge::image::{Image, PixelOrder};
use pass_edge::kernels::Kernel;
use pass_edge::model::Model;
use pass_edge::scratch::ScratchBuffer;
use pass_edge::scratch_len;
use random_vit::{FloatVit, photo};

fn main() {
    divan::main();
}

fn kernels() -> impl Iterator<Item = &'static str> {
    Kernel::available().map(Kernel::name)
}

fn run(bencher: Bencher<'_, '_>, architecture: Architecture, kernel: &str) {
    let file = FloatVit::random(architecture, 1).quantized();
    let rgb = photo(&architecture, 1);
    let model = Model::from_bytes(&file).expect("a valid model");
    let kernel =
        Kernel::available().find(|available| available.name() == kernel).expect("an available kernel");
    let (height, width) = architecture.image_size();
    let image = Image::new(&rgb, (height, width), 3 * width, PixelOrder::Rgb).expect("a whole image");
    let mut scratch = ScratchBuffer::new(scratch_len(&model));
    let mut out = vec![0.0; model.output_len()];
    bencher.bench_local(|| features(&model, &image, kernel, &mut scratch.scratch(), &mut out));
}

#[divan::bench(args = kernels(), sample_count = 10, sample_size = 1)]
fn vit_tiny_16(bencher: Bencher<'_, '_>, kernel: &str) {
    run(bencher, Architecture::vit_tiny(16, (14, 14)), kernel);
}

#[divan::bench(args = kernels(), sample_count = 5, sample_size = 1)]
fn vit_small_16(bencher: Bencher<'_, '_>, kernel: &str) {
    run(bencher, Architecture::vit_small(16, (14, 14)), kernel);
}
