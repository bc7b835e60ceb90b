//! Matches the patches of two small grids: one whose borders wrap around, one whose borders clip.
//!
//! The features turn once from the left edge to the right edge and differ from row to row, so a patch resembles its left
//! and right neighbors; for a patch at the edge one of the two lies across it, if the border lets it.
#![expect(clippy::print_stdout, reason = "an example talks to the reader")]

use std::f32::consts::TAU;

use pass_core::matching::{Matches, match_into, match_scratch_len};
use pass_core::neighborhood::{Border, Neighborhood, Window};
use pass_core::shape::{PatchGrid, Tokens};

const HEIGHT: usize = 3;
const WIDTH: usize = 6;
const DIM: usize = 2 + HEIGHT;
const K: usize = 2;

fn main() -> Result<(), pass_core::Error> {
    let mut features = Vec::new();
    for row in 0..HEIGHT {
        for column in 0..WIDTH {
            let angle = column as f32 / WIDTH as f32 * TAU;
            features.extend([angle.cos(), angle.sin()]);
            features.extend((0..HEIGHT).map(|other| if other == row { 2.0 } else { 0.0 }));
        }
    }
    for border in [Border::Wrap, Border::Clip] {
        let grid = PatchGrid::new(HEIGHT, WIDTH)?;
        let neighborhood = Neighborhood::new(grid, Window::Side(3), border)?;
        let mut scratch = vec![0.0; match_scratch_len(&neighborhood)];
        let mut indices = vec![0; grid.n_patches() * K];
        let tokens = Tokens::new(&features, grid.n_patches(), DIM)?;
        match_into(tokens, &neighborhood, K, &mut scratch, &mut indices)?;
        let matches = Matches::new(&indices, grid.n_patches(), K)?;
        for patch in [0, WIDTH - 1, WIDTH + 2] {
            let candidates = neighborhood.list::<8>(patch)?;
            println!(
                "{border:?}: patch {patch:2} of candidates {candidates:?} takes {:?}",
                matches.of(patch)
            );
        }
    }
    Ok(())
}
