//! Turns an image upright.

use image::metadata::Orientation;

use super::Rgb8Image;

/// Whether width and height change places.
pub(super) fn swaps_sides(orientation: Orientation) -> bool {
    matches!(
        orientation,
        Orientation::Rotate90
            | Orientation::Rotate270
            | Orientation::Rotate90FlipH
            | Orientation::Rotate270FlipH
    )
}

/// Applies the orientation.
pub(super) fn upright(image: Rgb8Image, orientation: Orientation) -> Rgb8Image {
    if orientation == Orientation::NoTransforms {
        return image;
    }
    let (width, height) = (image.width as usize, image.height as usize);
    let pixels = image.data.as_chunks::<3>().0;
    let (right, bottom) = (width.saturating_sub(1), height.saturating_sub(1));
    // the stored pixel shown at (row, column) of the upright image
    let source = |row: usize, column: usize| match orientation {
        Orientation::NoTransforms => (row, column),
        Orientation::FlipHorizontal => (row, right - column),
        Orientation::Rotate180 => (bottom - row, right - column),
        Orientation::FlipVertical => (bottom - row, column),
        Orientation::Rotate90FlipH => (column, row),
        Orientation::Rotate90 => (bottom - column, row),
        Orientation::Rotate270FlipH => (bottom - column, right - row),
        Orientation::Rotate270 => (column, right - row),
    };
    let (new_width, new_height) = if swaps_sides(orientation) { (height, width) } else { (width, height) };
    let mut data = Vec::with_capacity(image.data.len());
    for row in 0..new_height {
        for column in 0..new_width {
            let (row, column) = source(row, column);
            data.extend_from_slice(&pixels[row * width + column]);
        }
    }
    Rgb8Image { width: new_width as u32, height: new_height as u32, data }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_exif_value_shows_the_first_stored_pixel_where_the_standard_says() {
        // TIFF 6.0, tag 274: where row 0 and column 0 of the stored image are seen
        let stored = Rgb8Image { width: 3, height: 2, data: (0..18).collect() };
        let corners = [(0, 0), (0, 2), (1, 2), (1, 0), (0, 0), (0, 1), (2, 1), (2, 0)];
        for (exif, (row, column)) in (1u8..=8).zip(corners) {
            let orientation = Orientation::from_exif(exif).expect("1 to 8 are defined");
            let image = upright(stored.clone(), orientation);
            let width = image.width as usize;
            assert_eq!((image.width, image.height), if exif < 5 { (3, 2) } else { (2, 3) });
            let at = |row: usize, column: usize| image.data[(row * width + column) * 3];
            assert_eq!(at(row, column), 0, "orientation {exif}: stored corner");
            let mut all: Vec<_> = image.data.clone();
            all.sort_unstable();
            assert_eq!(all, stored.data, "orientation {exif}: every pixel once");
        }
    }
}
