//! Which patch is asked about.

use std::str::FromStr;

use super::PictureError;
use super::view::View;

/// A patch, named by its place.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Query {
    /// On the grid of the first weights, from 0.
    Patch {
        /// Row.
        row: usize,
        /// Column.
        column: usize,
    },
    /// The patch that holds a pixel of the upright image.
    Pixel {
        /// Column.
        x: u32,
        /// Row.
        y: u32,
    },
    /// The patch at a share of height and width of the view, each in `[0, 1)`.
    Share {
        /// From above.
        down: f64,
        /// From the left.
        across: f64,
    },
}

/// What is asked when nothing is: the center, and a place on either side of it.
pub const DEFAULT: [Query; 3] = [
    Query::Share { down: 0.5, across: 0.5 },
    Query::Share { down: 0.25, across: 0.25 },
    Query::Share { down: 0.75, across: 0.72 },
];

impl Query {
    /// `ROW,COLUMN`.
    ///
    /// # Errors
    /// A sentence for the command line.
    pub fn patch(text: &str) -> Result<Self, String> {
        let [row, column] = pair(text, "ROW,COLUMN")?;
        Ok(Self::Patch { row, column })
    }

    /// `X,Y`.
    ///
    /// # Errors
    /// A sentence for the command line.
    pub fn pixel(text: &str) -> Result<Self, String> {
        let [x, y] = pair(text, "X,Y")?;
        Ok(Self::Pixel { x, y })
    }

    /// Its place in a view as shares of height and width; `grid` is that of the first weights.
    ///
    /// # Errors
    /// [`PictureError::QueryPatch`], [`PictureError::QueryPixel`].
    pub fn place(&self, view: &View<'_>, grid: (usize, usize)) -> Result<Place, PictureError> {
        let name = || view.name().to_owned();
        match *self {
            Self::Share { down, across } => Ok(Place { down, across }),
            Self::Patch { row, column } => {
                let (rows, columns) = grid;
                if row >= rows || column >= columns {
                    return Err(PictureError::QueryPatch { name: name(), row, column, rows, columns });
                }
                let share = |index: usize, of: usize| (index as f64 + 0.5) / of as f64;
                Ok(Place { down: share(row, rows), across: share(column, columns) })
            }
            Self::Pixel { x, y } => {
                let region = view.region();
                let (right, bottom) = (region.left + region.width - 1, region.top + region.height - 1);
                if !(region.left..=right).contains(&x) || !(region.top..=bottom).contains(&y) {
                    let (left, top) = (region.left, region.top);
                    return Err(PictureError::QueryPixel { name: name(), x, y, left, right, top, bottom });
                }
                let share =
                    |pixel: u32, first: u32, of: u32| (f64::from(pixel - first) + 0.5) / f64::from(of);
                Ok(Place {
                    down: share(y, region.top, region.height),
                    across: share(x, region.left, region.width),
                })
            }
        }
    }
}

/// A point of a view, as shares of its height and width.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Place {
    down: f64,
    across: f64,
}

impl Place {
    /// The patch of a grid that holds the point.
    pub fn patch(&self, (rows, columns): (usize, usize)) -> usize {
        let index = |share: f64, of: usize| ((share * of as f64) as usize).min(of - 1);
        index(self.down, rows) * columns + index(self.across, columns)
    }
}

fn pair<T: FromStr>(text: &str, form: &str) -> Result<[T; 2], String> {
    let both = text.split_once(',').and_then(|(a, b)| a.trim().parse().ok().zip(b.trim().parse().ok()));
    both.map(|(a, b)| [a, b]).ok_or_else(|| format!("expected {form}, two whole numbers, 0 or more"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::picture::view::{ViewSize, tests::photo};

    #[test]
    fn patches_and_pixels_find_their_cell() {
        let photo = photo(400, 200);
        let view = View::new(&photo, ViewSize::Sides { height: 96, width: 96 }.into(), 16, &[]).unwrap();
        let grid = (6, 6);
        let at = |query: Query| query.place(&view, grid).map(|place| place.patch(grid));
        assert_eq!(at(Query::patch("2, 5").unwrap()).unwrap(), 17);
        // the middle 200 of 400 columns are shown
        assert_eq!(at(Query::pixel("100,0").unwrap()).unwrap(), 0);
        assert_eq!(at(Query::pixel("299,199").unwrap()).unwrap(), 35);
        assert_eq!(at(DEFAULT[0]).unwrap(), 21);
        // a finer grid keeps the point
        assert_eq!(Query::patch("2,5").unwrap().place(&view, grid).unwrap().patch((12, 12)), 5 * 12 + 11);
    }

    #[test]
    fn places_outside_are_refused() {
        let photo = photo(400, 200);
        let view = View::new(&photo, ViewSize::Short(96).into(), 96, &[]).unwrap();
        let error = Query::Patch { row: 6, column: 0 }.place(&view, (6, 12)).unwrap_err();
        let text =
            "query patch (6, 0) of image `folder/gradient.png`: expected a row below 6 and a column below 12";
        assert_eq!(error.to_string(), text);
        let view = View::new(&photo, ViewSize::Sides { height: 96, width: 96 }.into(), 16, &[]).unwrap();
        let error = Query::Pixel { x: 99, y: 0 }.place(&view, (6, 6)).unwrap_err();
        assert!(error.to_string().contains("expected x from 100 to 299 and y from 0 to 199"), "{error}");
        assert!(
            Query::patch("3").is_err() && Query::pixel("-1,2").is_err() && Query::patch("1,2,3").is_err()
        );
    }
}
