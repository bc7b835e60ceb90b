//! What every target does with a file that was accepted: read all of it, run it, hold it to its promises.

use pass_edge::image::{Image, PixelOrder};
use pass_edge::kernels::Kernel;
use pass_edge::model::Model;
use pass_edge::scratch::{ScratchBuffer, ScratchLen};
use pass_edge::{Error, features, self_test};

/// The kept model of the smallest architecture that has every optional tensor.
pub const SMALLEST: &[u8] = include_bytes!("../../fixtures/edge/smallest.pass");

/// Work, about one multiplication each, above which a model is read but not run.
const MOST_WORK: usize = 100_000;

/// Calls every accessor; runs the model with every kernel if it is small.
///
/// # Panics
/// If something that was validated turns out not to hold.
pub fn read_and_run(model: &Model<'_>) {
    let architecture = *model.architecture();
    architecture.validate().expect("validated");
    assert!(model.name().len() <= 64);
    assert!(model.normalization().std.iter().all(|std| *std > 0.0));
    assert!(model.contract().mean_cosine.is_finite() && model.mode().weight_limit() > 0);
    assert_eq!(model.block_cosines().len(), architecture.depth as usize);
    assert!(model.block_cosines().all(f32::is_finite));
    assert_eq!(model.self_test_feature().len(), architecture.dim());
    if let Some((mean, basis)) = model.pca() {
        assert_eq!(mean.len(), architecture.dim());
        assert_eq!(basis.len(), architecture.pca_components as usize * architecture.dim());
    }
    assert_eq!(model.output_len(), architecture.tokens() * architecture.dim());

    let weights = architecture.dim() * (4 * architecture.dim() + 2 * architecture.hidden as usize);
    let work = architecture.tokens()
        * (architecture.depth as usize * (weights + architecture.tokens() * architecture.dim())
            + architecture.patch_inputs() * architecture.dim());
    if work > MOST_WORK {
        return;
    }
    let (height, width) = architecture.image_size();
    let pixels: Vec<u8> = (0..3 * height * width).map(|index| (index * 37 % 256) as u8).collect();
    let image = Image::new(&pixels, (height, width), 3 * width, PixelOrder::Rgb).expect("of the right size");
    let mut scratch = ScratchBuffer::new(ScratchLen::of(&architecture));
    let mut reference = vec![0.0; model.output_len()];
    features(model, &image, Kernel::Scalar, &mut scratch.scratch(), &mut reference).expect("everything fits");
    for kernel in Kernel::available() {
        let mut out = vec![0.0; model.output_len()];
        features(model, &image, kernel, &mut scratch.scratch(), &mut out).expect("everything fits");
        if reference.iter().all(|value| value.is_finite()) {
            assert!(self_test::digest(&out) == self_test::digest(&reference), "{} differs", kernel.name());
        }
        match self_test::verify(model, kernel, &mut scratch.scratch(), &mut out) {
            Ok(()) | Err(Error::SelfTest { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
}
