//! Rows and tiles of a buffer. Unlike `chunks`, which panics at a width of 0, these cannot panic: no check is left of what only
//! a validation far from here makes needless.

/// The rows of `width` numbers, the last one shorter if the buffer ends in it; none if `width` is 0.
#[inline(always)]
pub fn rows_of<T>(rest: &[T], width: usize) -> Rows<'_, T> {
    Rows { rest, width }
}

/// The same, to be written.
#[inline(always)]
pub fn rows_of_mut<T>(rest: &mut [T], width: usize) -> RowsMut<'_, T> {
    RowsMut { rest, width }
}

/// Of [`rows_of`].
#[derive(Clone, Debug)]
pub struct Rows<'a, T> {
    rest: &'a [T],
    width: usize,
}

impl<'a, T> Iterator for Rows<'a, T> {
    type Item = &'a [T];

    #[inline(always)]
    fn next(&mut self) -> Option<&'a [T]> {
        let (row, rest) = self.rest.split_at_checked(self.width.min(self.rest.len()))?;
        self.rest = rest;
        (!row.is_empty()).then_some(row)
    }
}

/// Of [`rows_of_mut`].
#[derive(Debug)]
pub struct RowsMut<'a, T> {
    rest: &'a mut [T],
    width: usize,
}

impl<'a, T> Iterator for RowsMut<'a, T> {
    type Item = &'a mut [T];

    #[inline(always)]
    fn next(&mut self) -> Option<&'a mut [T]> {
        let rest = core::mem::take(&mut self.rest);
        let len = self.width.min(rest.len());
        let (row, rest) = rest.split_at_mut_checked(len)?;
        self.rest = rest;
        (!row.is_empty()).then_some(row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[test]
    fn rows_are_those_of_chunks_and_no_width_has_no_rows() {
        let mut buffer: [u8; 7] = core::array::from_fn(|index| index as u8);
        for width in 1..9 {
            let expected: Vec<_> = buffer.chunks(width).map(<[u8]>::to_vec).collect();
            assert_eq!(rows_of(&buffer, width).collect::<Vec<_>>(), expected);
            assert_eq!(rows_of_mut(&mut buffer, width).collect::<Vec<_>>(), expected);
        }
        assert_eq!((rows_of(&buffer, 0).count(), rows_of_mut(&mut buffer, 0).count()), (0, 0));
    }
}
