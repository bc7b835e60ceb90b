//! Which patches are candidates for a patch: a window around it, with borders that wrap or clip.
//!
//! A window is the product of a span of rows and a span of columns, so nothing is ever listed twice, the order is
//! ascending by construction, and the slot of a candidate is found by arithmetic instead of a search.

use core::ops::Range;

use crate::error::{Error, Result};
use crate::shape::PatchGrid;

/// How far candidates may lie from their patch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Window {
    /// A square of this odd side, centered on the patch; the paper uses 3.
    Side(usize),
    /// Every other patch of the grid (the ablation without neighborhood).
    All,
}

/// What happens to a window at the border of the grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Border {
    /// Rows and columns wrap around, as in the released code. On a grid smaller than the window no patch is listed
    /// twice, and never the patch itself.
    Wrap,
    /// Candidates outside the grid are dropped: a patch at the border has fewer of them.
    Clip,
}

/// The candidates of every patch of a grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Neighborhood {
    grid: PatchGrid,
    /// Patches on each side of the center; `None`: the whole grid.
    reach: Option<usize>,
    border: Border,
}

impl Neighborhood {
    /// The neighborhood of every patch of `grid`.
    ///
    /// # Errors
    /// [`Error::EvenWindow`] if the window side is even.
    pub const fn new(grid: PatchGrid, window: Window, border: Border) -> Result<Self> {
        let reach = match window {
            Window::All => None,
            Window::Side(side) if side % 2 == 0 => return Err(Error::EvenWindow { side }),
            Window::Side(side) => Some(side / 2),
        };
        Ok(Self { grid, reach, border })
    }

    /// The grid.
    pub const fn grid(&self) -> PatchGrid {
        self.grid
    }

    /// The largest number of candidates any patch has: the width of a row of similarities.
    pub const fn max_candidates(&self) -> usize {
        self.longest_span(self.grid.height()) * self.longest_span(self.grid.width()) - 1
    }

    const fn longest_span(&self, side: usize) -> usize {
        match self.reach {
            Some(reach) if reach < side / 2 => 2 * reach + 1,
            _ => side,
        }
    }

    /// The candidates of `patch`: flat indices, ascending, without the patch itself; empty past the end of the grid.
    pub fn candidates(&self, patch: usize) -> impl Iterator<Item = usize> + Clone + use<> {
        let width = self.grid.width();
        let (rows, columns) = self.spans(patch);
        rows.iter()
            .flat_map(move |row| columns.iter().map(move |column| row * width + column))
            .filter(move |&candidate| candidate != patch)
    }

    /// The candidates of `patch` as a bounded list.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] if a patch can have more than `MAX` candidates, or `patch` lies past the end of the grid.
    pub fn list<const MAX: usize>(&self, patch: usize) -> Result<heapless::Vec<u32, MAX>> {
        if self.max_candidates() > MAX {
            let actual = self.max_candidates();
            return Err(Error::OutOfRange { what: "candidates of a patch", min: 0, max: MAX, actual });
        }
        if patch >= self.grid.n_patches() {
            let max = self.grid.n_patches() - 1;
            return Err(Error::OutOfRange { what: "patch", min: 0, max, actual: patch });
        }
        let mut list = heapless::Vec::new();
        for candidate in self.candidates(patch) {
            // full is what the first check rules out
            let _ = list.push(candidate as u32);
        }
        Ok(list)
    }

    /// The position of `candidate` among [`Neighborhood::candidates`] of `patch`, if it is one.
    pub fn slot(&self, patch: usize, candidate: usize) -> Option<usize> {
        if candidate == patch || candidate >= self.grid.n_patches() {
            return None;
        }
        let (rows, columns) = self.spans(patch);
        let (row, column) = self.grid.position(candidate);
        let slot = rows.rank(row)? * columns.len() + columns.rank(column)?;
        // The patch itself is not listed, so everything after it moves up by one.
        Some(slot - usize::from(candidate > patch))
    }

    fn spans(&self, patch: usize) -> (Span, Span) {
        if patch >= self.grid.n_patches() {
            return (Span::EMPTY, Span::EMPTY);
        }
        let (row, column) = self.grid.position(patch);
        (self.span(row, self.grid.height()), self.span(column, self.grid.width()))
    }

    /// The coordinates within reach of `center` on an axis of `side` patches.
    fn span(&self, center: usize, side: usize) -> Span {
        let Some(reach) = self.reach.filter(|&reach| reach < side) else {
            return Span::new(0..0, 0..side);
        };
        match self.border {
            Border::Clip => Span::new(0..0, center.saturating_sub(reach)..side.min(center + reach + 1)),
            Border::Wrap if 2 * reach + 1 >= side => Span::new(0..0, 0..side),
            Border::Wrap if center < reach => Span::new(0..center + reach + 1, side + center - reach..side),
            Border::Wrap if center + reach >= side => {
                Span::new(0..center + reach + 1 - side, center - reach..side)
            }
            Border::Wrap => Span::new(0..0, center - reach..center + reach + 1),
        }
    }
}

/// Coordinates on one axis: two ascending ranges, the first before the second. A wrapped window is split in two.
#[derive(Clone, Copy, Debug)]
struct Span {
    low: (usize, usize),
    high: (usize, usize),
}

impl Span {
    const EMPTY: Self = Self { low: (0, 0), high: (0, 0) };

    fn new(low: Range<usize>, high: Range<usize>) -> Self {
        Self { low: (low.start, low.end), high: (high.start, high.end) }
    }

    fn iter(self) -> impl Iterator<Item = usize> + Clone {
        (self.low.0..self.low.1).chain(self.high.0..self.high.1)
    }

    fn len(self) -> usize {
        (self.low.1 - self.low.0) + (self.high.1 - self.high.0)
    }

    /// How many coordinates of the span come before `coordinate`, if it is one of them.
    fn rank(self, coordinate: usize) -> Option<usize> {
        if (self.low.0..self.low.1).contains(&coordinate) {
            Some(coordinate - self.low.0)
        } else if (self.high.0..self.high.1).contains(&coordinate) {
            Some(self.low.1 - self.low.0 + coordinate - self.high.0)
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use std::vec::Vec;

    fn neighborhood(height: usize, width: usize, window: Window, border: Border) -> Neighborhood {
        Neighborhood::new(PatchGrid::new(height, width).unwrap(), window, border).unwrap()
    }

    fn check(height: usize, width: usize, window: Window, border: Border, patch: usize, expected: &[usize]) {
        let found: Vec<_> = neighborhood(height, width, window, border).candidates(patch).collect();
        assert_eq!(found, expected, "{height}x{width} {window:?} {border:?} patch {patch}");
    }

    #[test]
    fn borders_wrap_or_clip() {
        use Border::{Clip, Wrap};
        let three = Window::Side(3);
        check(14, 14, three, Wrap, 0, &[1, 13, 14, 15, 27, 182, 183, 195]);
        check(14, 14, three, Clip, 0, &[1, 14, 15]);
        check(4, 5, three, Clip, 7, &[1, 2, 3, 6, 8, 11, 12, 13]);
        check(3, 3, three, Wrap, 4, &[0, 1, 2, 3, 5, 6, 7, 8]);
        check(2, 2, three, Wrap, 0, &[1, 2, 3]);
        check(1, 6, three, Wrap, 0, &[1, 5]);
        check(1, 2, three, Wrap, 0, &[1]);
        check(1, 1, three, Wrap, 0, &[]);
        check(1, 1, Window::All, Clip, 0, &[]);
        check(5, 5, Window::Side(1), Wrap, 12, &[]);
        check(2, 3, Window::All, Clip, 4, &[0, 1, 2, 3, 5]);
        check(2, 3, three, Wrap, 6, &[]);
    }

    #[test]
    fn even_windows_are_refused() {
        let grid = PatchGrid::new(3, 3).unwrap();
        for side in [0, 2, 6] {
            assert_eq!(
                Neighborhood::new(grid, Window::Side(side), Border::Wrap),
                Err(Error::EvenWindow { side })
            );
        }
        assert!(Neighborhood::new(grid, Window::Side(usize::MAX), Border::Clip).is_ok());
    }

    #[test]
    fn lists_are_bounded() {
        let place = neighborhood(4, 4, Window::Side(3), Border::Wrap);
        assert_eq!(place.list::<8>(5).unwrap().as_slice(), &[0, 1, 2, 4, 6, 8, 9, 10]);
        assert!(place.list::<7>(5).is_err());
        assert!(place.list::<8>(16).is_err());
    }

    fn any_neighborhood() -> impl Strategy<Value = (Neighborhood, usize, bool)> {
        let window =
            prop_oneof![(0_usize..5).prop_map(|reach| Window::Side(2 * reach + 1)), Just(Window::All)];
        (1_usize..8, 1_usize..8, window, any::<bool>()).prop_map(|(height, width, window, wrap)| {
            let border = if wrap { Border::Wrap } else { Border::Clip };
            let reach = if let Window::Side(side) = window { side / 2 } else { 99 };
            (neighborhood(height, width, window, border), reach, wrap)
        })
    }

    proptest! {
        #[test]
        fn candidates_are_the_patches_within_reach((place, reach, wrap) in any_neighborhood()) {
            let (height, width) = (place.grid().height(), place.grid().width());
            let mut longest = 0;
            for patch in 0..place.grid().n_patches() {
                let near = |a: usize, b: usize, side: usize| {
                    let apart = a.abs_diff(b);
                    (if wrap { apart.min(side - apart) } else { apart }) <= reach
                };
                let expected: BTreeSet<_> = (0..height * width)
                    .filter(|&other| {
                        other != patch
                            && near(other / width, patch / width, height)
                            && near(other % width, patch % width, width)
                    })
                    .collect();
                let found: Vec<_> = place.candidates(patch).collect();
                prop_assert!(found.iter().eq(expected.iter()), "ascending, without repetition");
                for other in 0..height * width {
                    prop_assert_eq!(place.slot(patch, other), found.iter().position(|&c| c == other));
                }
                longest = longest.max(found.len());
            }
            prop_assert_eq!(place.max_candidates(), longest);
        }

        #[test]
        fn being_a_candidate_is_mutual((place, _, _) in any_neighborhood()) {
            for patch in 0..place.grid().n_patches() {
                for other in place.candidates(patch) {
                    prop_assert!(place.slot(other, patch).is_some());
                }
            }
        }
    }
}
