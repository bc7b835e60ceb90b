//! Turns an image upright.

use image::metadata::Orientation;

use super::Picture;

/// Applies the orientation.
pub(super) fn upright(picture: Picture, orientation: Orientation) -> Picture {
    if orientation == Orientation::NoTransforms {
        return picture;
    }
    let (width, height) = (picture.width, picture.height);
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
    let swaps = matches!(
        orientation,
        Orientation::Rotate90
            | Orientation::Rotate270
            | Orientation::Rotate90FlipH
            | Orientation::Rotate270FlipH
    );
    let pixels = picture.rgb.as_chunks::<3>().0;
    let (new_width, new_height) = if swaps { (height, width) } else { (width, height) };
    let mut rgb = Vec::with_capacity(picture.rgb.len());
    for row in 0..new_height {
        for column in 0..new_width {
            let (row, column) = source(row, column);
            rgb.extend_from_slice(&pixels[row * width + column]);
        }
    }
    Picture { height: new_height, width: new_width, rgb }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_exif_value_shows_the_first_stored_pixel_where_the_standard_says() {
        // TIFF 6.0, tag 274: where row 0 and column 0 of the stored image are seen
        let stored = Picture { height: 2, width: 3, rgb: (0..18).collect() };
        let corners = [(0, 0), (0, 2), (1, 2), (1, 0), (0, 0), (0, 1), (2, 1), (2, 0)];
        for (exif, (row, column)) in (1_u8..=8).zip(corners) {
            let orientation = Orientation::from_exif(exif).expect("1 to 8 are defined");
            let shown = upright(stored.clone(), orientation);
            assert_eq!((shown.width, shown.height), if exif < 5 { (3, 2) } else { (2, 3) });
            assert_eq!(shown.rgb[3 * (row * shown.width + column)], 0, "orientation {exif}: stored corner");
            let mut all = shown.rgb;
            all.sort_unstable();
            assert_eq!(all, stored.rgb, "orientation {exif}: every pixel once");
        }
    }
}
