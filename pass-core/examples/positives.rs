//! The positives of four patches: the most similar neighbor of each.

use pass_core::matching::match_into;
use pass_core::neighborhood::{Border, Neighborhood, Window};
use pass_core::shape::{PatchGrid, Tokens};

fn main() -> pass_core::Result<()> {
    let features = [1.0, 0.0, 0.9, 0.1, 0.0, 1.0, 0.1, 0.9]; // 2×2 patches, D = 2
    let neighborhood = Neighborhood::new(PatchGrid::new(2, 2)?, Window::Side(3), Border::Wrap)?;
    let (mut scratch, mut positives) = ([0.0; 16], [0; 4]);
    match_into(Tokens::new(&features, 4, 2)?, &neighborhood, 1, &mut scratch, &mut positives)?;
    assert_eq!(positives, [1, 0, 3, 2]);
    Ok(())
}
