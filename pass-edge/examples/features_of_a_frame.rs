//! Features of a camera frame by a model in flash.

use pass_edge::format::Architecture;
use pass_edge::image::{Image, PixelOrder};
use pass_edge::scratch::{Scratch, ScratchLen};
use pass_edge::{features, kernels::Kernel, model::Model};

const VIT: Architecture = Architecture::vit_tiny(16, (4, 6)); // 64×96 pixels
const LEN: ScratchLen = ScratchLen::of(&VIT);

/// Patch features of an RGB frame by a model in flash, in memory whose size the compiler knows.
fn look(flash: &[u8], frame: &[u8], out: &mut [f32; VIT.patches() * VIT.dim()]) -> pass_edge::Result<()> {
    let model = Model::from_bytes(flash)?;
    let (mut floats, mut words, mut bytes) = ([0.0; LEN.floats], [0; LEN.words], [0; LEN.bytes]);
    let mut scratch = Scratch::new(LEN, &mut floats, &mut words, &mut bytes)?;
    let image = Image::new(frame, VIT.image_size(), 3 * VIT.image_size().1, PixelOrder::Rgb)?;
    features(&model, &image, Kernel::best(), &mut scratch, out)
}

fn main() {
    let mut out = [0.0; VIT.patches() * VIT.dim()];
    let error = look(b"no model", &[0; 3 * 64 * 96], &mut out).unwrap_err();
    assert_eq!(error, pass_edge::Error::NotAModel);
}
