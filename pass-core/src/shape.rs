//! Checked views of row-major slices: a grid of patches, and the tokens on it.
//!
//! Lengths are checked at the door of every public function; behind it, `part` and `part_mut` cut buffers without any
//! check that could panic, so that nothing a device runs can.

use crate::error::{Error, Result, check_length};

/// Most patches of one grid: flat indices fit a `u32` with room for "no match", and sums of coordinates a 32-bit `usize`.
pub const MAX_PATCHES: usize = (u32::MAX / 4) as usize;

/// The patches of one crop: `height` rows of `width` patches, numbered row by row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PatchGrid {
    height: usize,
    width: usize,
}

impl PatchGrid {
    /// A grid of `height * width` patches.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] if a side is 0 or the grid holds more than [`MAX_PATCHES`] patches.
    pub const fn new(height: usize, width: usize) -> Result<Self> {
        if height == 0 {
            return Err(Error::OutOfRange { what: "grid height", min: 1, max: MAX_PATCHES, actual: 0 });
        }
        if width == 0 || width > MAX_PATCHES / height {
            return Err(Error::OutOfRange {
                what: "grid width",
                min: 1,
                max: MAX_PATCHES / height,
                actual: width,
            });
        }
        Ok(Self { height, width })
    }

    /// Rows of patches.
    pub const fn height(self) -> usize {
        self.height
    }

    /// Patches in a row.
    pub const fn width(self) -> usize {
        self.width
    }

    /// `N`, the number of patches.
    pub const fn n_patches(self) -> usize {
        self.height * self.width
    }

    /// `(row, column)` of a flat index.
    pub(crate) const fn position(self, patch: usize) -> (usize, usize) {
        let width = if self.width == 0 { 1 } else { self.width };
        (patch / width, patch % width)
    }
}

/// The tokens of one image, `[N, D]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tokens<'a> {
    data: &'a [f32],
    n: usize,
    dim: usize,
}

impl<'a> Tokens<'a> {
    /// Views `data` as `n` tokens of `dim` values.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] if `data` does not hold `n * dim` values; [`Error::OutOfRange`] if `dim` is 0.
    pub fn new(data: &'a [f32], n: usize, dim: usize) -> Result<Self> {
        if dim == 0 {
            return Err(Error::OutOfRange { what: "token dimension", min: 1, max: usize::MAX, actual: 0 });
        }
        check_length("tokens", n.saturating_mul(dim), data.len())?;
        Ok(Self { data, n, dim })
    }

    /// `N`, the number of tokens.
    pub const fn len(&self) -> usize {
        self.n
    }

    /// Whether there is no token.
    pub const fn is_empty(&self) -> bool {
        self.n == 0
    }

    /// `D`, the values of a token.
    pub const fn dim(&self) -> usize {
        self.dim
    }

    /// All values, row by row.
    pub const fn as_slice(&self) -> &'a [f32] {
        self.data
    }

    /// The tokens in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &'a [f32]> + Clone + use<'a> {
        self.data.chunks_exact(self.dim.max(1))
    }

    /// One token; `index` was checked by the caller.
    pub(crate) fn row(&self, index: usize) -> &'a [f32] {
        row(self.data, index, self.dim)
    }
}

/// The tokens of a batch of images, `[B, N, D]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenBatch<'a> {
    data: &'a [f32],
    n: usize,
    dim: usize,
}

impl<'a> TokenBatch<'a> {
    /// Views `data` as `batch` images of `n` tokens of `dim` values.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] if `data` does not hold `batch * n * dim` values; [`Error::OutOfRange`] if `n` or
    /// `dim` is 0.
    pub fn new(data: &'a [f32], batch: usize, n: usize, dim: usize) -> Result<Self> {
        for (what, size) in [("tokens of an image", n), ("token dimension", dim)] {
            if size == 0 {
                return Err(Error::OutOfRange { what, min: 1, max: usize::MAX, actual: 0 });
            }
        }
        check_length("tokens", batch.saturating_mul(n).saturating_mul(dim), data.len())?;
        Ok(Self { data, n, dim })
    }

    /// The images in order.
    pub fn images(&self) -> impl ExactSizeIterator<Item = Tokens<'a>> + use<'a> {
        let (n, dim) = (self.n, self.dim);
        self.data.chunks_exact((n * dim).max(1)).map(move |data| Tokens { data, n, dim })
    }
}

#[cfg(feature = "ndarray")]
mod views {
    use super::{Error, Result, TokenBatch, Tokens};
    use ndarray::{ArrayView2, ArrayView3};

    impl<'a> TryFrom<ArrayView2<'a, f32>> for Tokens<'a> {
        type Error = Error;

        /// `[N, D]`, contiguous and row-major.
        fn try_from(view: ArrayView2<'a, f32>) -> Result<Self> {
            let (n, dim) = view.dim();
            let data = view.to_slice().ok_or(Error::NotContiguous { what: "tokens" })?;
            Self::new(data, n, dim)
        }
    }

    impl<'a> TryFrom<ArrayView3<'a, f32>> for TokenBatch<'a> {
        type Error = Error;

        /// `[B, N, D]`, contiguous and row-major.
        fn try_from(view: ArrayView3<'a, f32>) -> Result<Self> {
            let (batch, n, dim) = view.dim();
            let data = view.to_slice().ok_or(Error::NotContiguous { what: "tokens" })?;
            Self::new(data, batch, n, dim)
        }
    }
}

/// `len` values from `start` on; none where the buffer ends before, which the checks at the door rule out.
#[inline(always)]
pub(crate) fn part<T>(values: &[T], start: usize, len: usize) -> &[T] {
    values.get(start..).and_then(|rest| rest.get(..len)).unwrap_or_default()
}

/// The same, to write.
#[inline(always)]
pub(crate) fn part_mut<T>(values: &mut [T], start: usize, len: usize) -> &mut [T] {
    values.get_mut(start..).and_then(|rest| rest.get_mut(..len)).unwrap_or_default()
}

/// Takes the first `len` values off a buffer.
#[inline(always)]
pub(crate) fn take<'s, T>(buffer: &mut &'s mut [T], len: usize) -> &'s mut [T] {
    let (taken, rest) = core::mem::take(buffer).split_at_mut_checked(len).unwrap_or_default();
    *buffer = rest;
    taken
}

/// Copies as many values as both have.
#[inline(always)]
pub(crate) fn copy<T: Copy>(from: &[T], to: &mut [T]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = *from;
    }
}

/// Row `index` of a `[_, width]` slice.
pub(crate) fn row(data: &[f32], index: usize, width: usize) -> &[f32] {
    part(data, index * width, width)
}

/// Row `index` of a `[_, width]` slice, to write.
pub(crate) fn row_mut(data: &mut [f32], index: usize, width: usize) -> &mut [f32] {
    part_mut(data, index * width, width)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_and_overflowing_grids_are_refused() {
        assert!(PatchGrid::new(0, 3).is_err());
        assert!(PatchGrid::new(3, 0).is_err());
        assert!(PatchGrid::new(usize::MAX, usize::MAX).is_err());
        assert_eq!(PatchGrid::new(2, 3).map(PatchGrid::n_patches), Ok(6));
    }

    #[test]
    fn views_check_their_length_even_when_it_overflows() {
        let data = [0.0; 6];
        assert!(Tokens::new(&data, 2, 3).is_ok());
        assert_eq!(
            Tokens::new(&data, 2, 4),
            Err(Error::LengthMismatch { what: "tokens", expected: 8, actual: 6 })
        );
        assert!(Tokens::new(&data, usize::MAX, 2).is_err());
        assert!(Tokens::new(&[], 0, 0).is_err());
        assert!(TokenBatch::new(&data, usize::MAX, usize::MAX, 2).is_err());
        let batch = TokenBatch::new(&data, 3, 1, 2).unwrap();
        assert_eq!(batch.images().len(), 3);
    }

    #[cfg(feature = "ndarray")]
    #[test]
    fn array_views_must_be_row_major() {
        let array = ndarray::Array2::from_shape_fn((2, 3), |(row, column)| (row * 3 + column) as f32);
        let tokens = Tokens::try_from(array.view()).unwrap();
        assert_eq!((tokens.len(), tokens.dim(), tokens.row(1)), (2, 3, &[3.0, 4.0, 5.0][..]));
        assert_eq!(Tokens::try_from(array.t()), Err(Error::NotContiguous { what: "tokens" }));
        let array = ndarray::Array3::<f32>::zeros((2, 3, 4));
        assert_eq!(TokenBatch::try_from(array.view()).unwrap().images().len(), 2);
        assert!(TokenBatch::try_from(array.view().permuted_axes([0, 2, 1])).is_err());
    }
}
