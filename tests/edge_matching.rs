//! The device's features under the mathematics of core: int8 patches find the neighbors that float patches find.

#[path = "../pass-edge/tests/device/float_vit.rs"]
mod float_vit;
#[path = "../pass-edge/tests/device/random_vit.rs"]
mod random_vit;

use pass_core::matching;
use pass_core::neighborhood::{Border, Neighborhood, Window};
use pass_core::shape::{PatchGrid, Tokens};
use pass_edge::features;
use pass_edge::format::Architecture;
use pass_edge::image::{Image, PixelOrder};
use pass_edge::kernels::Kernel;
use pass_edge::model::Model;
use pass_edge::scratch::ScratchBuffer;
use pass_edge::scratch_len;
use random_vit::{FloatVit, photo};

const ARCHITECTURE: Architecture = Architecture { depth: 4, ..Architecture::vit_tiny(8, (12, 12)) };

/// The best of the 8 neighbors of each patch.
fn best_neighbors(tokens: &[f32]) -> Vec<usize> {
    let (rows, columns) = (ARCHITECTURE.grid.0 as usize, ARCHITECTURE.grid.1 as usize);
    let grid = PatchGrid::new(rows, columns).unwrap();
    let neighborhood = Neighborhood::new(grid, Window::Side(3), Border::Wrap).unwrap();
    let patches = rows * columns;
    let mut scratch = vec![0.0; patches * ARCHITECTURE.dim()];
    let mut best = vec![0; patches];
    let tokens = Tokens::new(tokens, patches, ARCHITECTURE.dim()).unwrap();
    matching::match_into(tokens, &neighborhood, 1, &mut scratch, &mut best).unwrap();
    best.into_iter().map(|index| index as usize).collect()
}

#[test]
fn quantized_patches_match_the_neighbors_of_float_patches() {
    let (mut same, mut all) = (0, 0);
    for seed in 0..3 {
        let float = FloatVit::random(ARCHITECTURE, seed);
        let rgb = photo(&ARCHITECTURE, seed);
        let file = float.quantized();
        let model = Model::from_bytes(&file).unwrap();
        let size = ARCHITECTURE.image_size();
        let image = Image::new(&rgb, size, 3 * size.1, PixelOrder::Rgb).unwrap();
        let mut scratch = ScratchBuffer::new(scratch_len(&model));
        let mut out = vec![0.0; model.output_len()];
        features(&model, &image, Kernel::best(), &mut scratch.scratch(), &mut out).unwrap();
        let (exact, quantized) = (best_neighbors(&float.forward(&rgb)), best_neighbors(&out));
        same += exact.iter().zip(&quantized).filter(|(a, b)| a == b).count();
        all += exact.len();
    }
    assert!(same * 100 >= all * 90, "{same} of {all} best neighbors are the same");
}
