//! An 8-bit RGB picture: the few things that are drawn on it, and its PNG.

use std::io::Cursor;

use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ExtendedColorType, ImageEncoder};

use super::colors::Rgb;
use crate::data::augment::Planes;

/// A rectangle in pixels; right and bottom are the first column and row that are no longer in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rect {
    /// First column.
    pub left: usize,
    /// First row.
    pub top: usize,
    /// Column after the last.
    pub right: usize,
    /// Row after the last.
    pub bottom: usize,
}

impl Rect {
    /// The rectangle of a size at a place.
    pub fn at(left: usize, top: usize, width: usize, height: usize) -> Self {
        Self { left, top, right: left + width, bottom: top + height }
    }

    /// Columns.
    pub fn width(&self) -> usize {
        self.right - self.left
    }

    /// Rows.
    pub fn height(&self) -> usize {
        self.bottom - self.top
    }

    /// The rectangle grown by `by` pixels on every side, not beyond column and row 0.
    pub fn grown(&self, by: usize) -> Self {
        Self {
            left: self.left.saturating_sub(by),
            top: self.top.saturating_sub(by),
            right: self.right + by,
            bottom: self.bottom + by,
        }
    }

    /// The rectangle shrunk by `by` pixels on every side, never inside out.
    pub fn shrunk(&self, by: usize) -> Self {
        let (across, down) = (by.min(self.width() / 2), by.min(self.height() / 2));
        Self {
            left: self.left + across,
            top: self.top + down,
            right: self.right - across,
            bottom: self.bottom - down,
        }
    }
}

/// Interleaved RGB, `[height, width, 3]`. Everything drawn beyond the edge is cut off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Canvas {
    width: usize,
    height: usize,
    pixels: Vec<u8>,
}

impl Canvas {
    /// A canvas of one color.
    pub fn new(width: usize, height: usize, color: Rgb) -> Self {
        Self { width, height, pixels: color.repeat(width * height) }
    }

    /// The picture in three planes.
    pub fn from_planes(planes: &Planes) -> Self {
        Self { width: planes.width(), height: planes.height(), pixels: planes.to_interleaved() }
    }

    /// Width in pixels.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Height in pixels.
    pub fn height(&self) -> usize {
        self.height
    }

    /// The whole canvas.
    pub fn bounds(&self) -> Rect {
        Rect::at(0, 0, self.width, self.height)
    }

    /// The color at `(column, row)`.
    ///
    /// # Panics
    /// Outside the canvas.
    pub fn get(&self, x: usize, y: usize) -> Rgb {
        assert!(
            x < self.width && y < self.height,
            "({x}, {y}) on a canvas of {}x{}",
            self.width,
            self.height
        );
        let at = (y * self.width + x) * 3;
        [self.pixels[at], self.pixels[at + 1], self.pixels[at + 2]]
    }

    /// Mixes `color` into one pixel: 0 leaves it, 1 replaces it.
    pub fn mix(&mut self, x: usize, y: usize, color: Rgb, opacity: f32) {
        if x < self.width && y < self.height {
            let at = (y * self.width + x) * 3;
            for (old, new) in self.pixels[at..at + 3].iter_mut().zip(color) {
                *old = mixed(*old, new, opacity);
            }
        }
    }

    /// Replaces every pixel of `area` by what `color(column, row, old)` says.
    pub fn map(&mut self, area: Rect, mut color: impl FnMut(usize, usize, Rgb) -> Rgb) {
        for y in area.top..area.bottom.min(self.height) {
            for x in area.left..area.right.min(self.width) {
                let at = (y * self.width + x) * 3;
                let old = [self.pixels[at], self.pixels[at + 1], self.pixels[at + 2]];
                self.pixels[at..at + 3].copy_from_slice(&color(x, y, old));
            }
        }
    }

    /// Fills a rectangle.
    pub fn fill(&mut self, area: Rect, color: Rgb) {
        self.map(area, |_, _, _| color);
    }

    /// The line of `thickness` pixels along the inner edge of a rectangle.
    pub fn frame(&mut self, area: Rect, thickness: usize, color: Rgb) {
        self.map(area, |x, y, old| {
            let across = x < area.left + thickness || x + thickness >= area.right;
            let down = y < area.top + thickness || y + thickness >= area.bottom;
            if across || down { color } else { old }
        });
    }

    /// A frame around a rectangle that shows on any ground: white between two dark lines, then `color` inside.
    pub fn marker(&mut self, area: Rect, color: Rgb) {
        self.frame(area.grown(2), 1, [0; 3]);
        self.frame(area.grown(1), 1, [255; 3]);
        self.frame(area, 2.min(area.width().min(area.height()) / 3).max(1), color);
    }

    /// Copies another canvas to a place.
    pub fn paste(&mut self, other: &Self, left: usize, top: usize) {
        for y in 0..other.height.min(self.height.saturating_sub(top)) {
            let columns = other.width.min(self.width.saturating_sub(left));
            let (from, to) = (y * other.width * 3, ((top + y) * self.width + left) * 3);
            self.pixels[to..to + columns * 3].copy_from_slice(&other.pixels[from..from + columns * 3]);
        }
    }

    /// The part inside a rectangle.
    ///
    /// # Panics
    /// When it reaches beyond the canvas.
    pub fn part(&self, area: Rect) -> Self {
        assert!(area.right <= self.width && area.bottom <= self.height, "{area:?} within the canvas");
        let rows = area.top..area.bottom;
        let row =
            |y: usize| &self.pixels[(y * self.width + area.left) * 3..(y * self.width + area.right) * 3];
        Self { width: area.width(), height: area.height(), pixels: rows.flat_map(row).copied().collect() }
    }

    /// The same picture in `width x height`, every pixel repeated or dropped.
    pub fn enlarged(&self, width: usize, height: usize) -> Self {
        let mut out = Self::new(width, height, [0; 3]);
        let all = out.bounds();
        out.map(all, |x, y, _| self.get(x * self.width / width, y * self.height / height));
        out
    }

    /// The bytes of a PNG file.
    pub fn to_png(&self) -> Result<Vec<u8>, image::ImageError> {
        let mut bytes = Cursor::new(Vec::new());
        PngEncoder::new_with_quality(&mut bytes, CompressionType::Default, FilterType::Adaptive)
            .write_image(&self.pixels, self.width as u32, self.height as u32, ExtendedColorType::Rgb8)?;
        Ok(bytes.into_inner())
    }
}

/// `old` on the way to `new`.
pub(super) fn mixed(old: u8, new: u8, opacity: f32) -> u8 {
    (f32::from(old) + (f32::from(new) - f32::from(old)) * opacity).round().clamp(0.0, 255.0) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_fill_and_paste_stay_inside() {
        let mut canvas = Canvas::new(6, 4, [0; 3]);
        canvas.frame(Rect::at(1, 1, 4, 3), 1, [9; 3]);
        assert_eq!((canvas.get(1, 1), canvas.get(4, 3), canvas.get(2, 2)), ([9; 3], [9; 3], [0; 3]));
        canvas.fill(Rect::at(5, 3, 40, 40), [7; 3]);
        canvas.paste(&Canvas::new(9, 9, [5; 3]), 4, 2);
        assert_eq!((canvas.get(5, 3), canvas.get(4, 2), canvas.get(3, 2)), ([5; 3], [5; 3], [0; 3]));
        canvas.paste(&Canvas::new(2, 2, [1; 3]), 6, 9);
        canvas.marker(Rect::at(0, 0, 1, 1), [1, 2, 3]);
        assert_eq!(canvas.get(0, 0), [1, 2, 3]);
    }

    #[test]
    fn a_png_holds_the_pixels() {
        let mut canvas = Canvas::new(5, 3, [1, 2, 3]);
        canvas.mix(4, 2, [201, 2, 3], 0.5);
        let image = crate::data::decode::decode_rgb(&canvas.to_png().unwrap(), 1.0).unwrap();
        assert_eq!((image.width, image.height, image.data.clone()), (5, 3, canvas.pixels.clone()));
        assert_eq!(canvas.get(4, 2), [101, 2, 3]);
    }

    #[test]
    fn parts_and_enlargements_take_the_right_pixels() {
        let mut canvas = Canvas::new(4, 2, [0; 3]);
        canvas.fill(Rect::at(2, 0, 2, 2), [8; 3]);
        let part = canvas.part(Rect::at(1, 0, 2, 2));
        assert_eq!((part.get(0, 1), part.get(1, 1)), ([0; 3], [8; 3]));
        let large = part.enlarged(6, 2);
        assert_eq!((large.get(2, 0), large.get(3, 0)), ([0; 3], [8; 3]));
    }
}
