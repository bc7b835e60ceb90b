//! An image at a size that patches divide: for the network and for the page.

use std::str::FromStr;

use candle_core::{Result, Tensor};

use super::canvas::{Canvas, Rect};
use super::{MOST_PATCHES, Model, PictureError};
use crate::data::augment::{CropBox, Planes, Resampler, normalize_into};
use crate::data::decode::Rgb8Image;

/// Shorter side of a panel on the page, pixels.
pub const PANEL: usize = 320;
/// Longest side of a view in shorter sides; what is more is cut off.
const MOST_ELONGATED: usize = 3;

/// A decoded image and what it is called.
#[derive(Clone, Debug)]
pub struct Photo {
    /// Path.
    pub name: String,
    /// Pixels.
    pub image: Rgb8Image,
}

/// How large the network gets an image to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ViewSize {
    /// The shorter side, keeping the proportions.
    Short(usize),
    /// Both sides; the image is cut to these proportions.
    Sides {
        /// Rows of pixels.
        height: usize,
        /// Columns of pixels.
        width: usize,
    },
}

/// Largest side of a view, pixels.
const MOST_PIXELS: usize = 8192;

impl FromStr for ViewSize {
    type Err = String;

    /// `224` or `480x854` (height x width).
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let side = |text: &str| text.trim().parse().ok().filter(|side| (1..=MOST_PIXELS).contains(side));
        let size = match text.split_once(['x', 'X', '×']) {
            Some((height, width)) => {
                side(height).zip(side(width)).map(|(height, width)| Self::Sides { height, width })
            }
            None => side(text).map(Self::Short),
        };
        size.ok_or_else(|| {
            format!("expected the shorter side (`224`) or height x width (`480x854`), from 1 to {MOST_PIXELS} pixels")
        })
    }
}

/// Sizes for the network and for the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// What the network sees.
    pub size: ViewSize,
    /// Shorter side of a panel on the page, about; the longer side is at most twice that.
    pub panel: usize,
}

impl From<ViewSize> for Layout {
    fn from(size: ViewSize) -> Self {
        Self { size, panel: PANEL }
    }
}

impl ViewSize {
    /// Height and width of a view of an image, both multiples of `patch` and at least that.
    fn of(self, image: &Rgb8Image, patch: usize) -> (usize, usize) {
        let (height, width) = match self {
            Self::Sides { height, width } => (height, width),
            Self::Short(short) => {
                let (height, width) = (image.height as usize, image.width as usize);
                let side = |side: usize| (side * short / height.min(width)).min(MOST_ELONGATED * short);
                (side(height), side(width))
            }
        };
        let multiple = |side: usize| (side / patch).max(1) * patch;
        (multiple(height), multiple(width))
    }
}

/// A part of an image, resized to sides that patches divide.
#[derive(Clone, Debug)]
pub struct View<'a> {
    photo: &'a Photo,
    region: CropBox,
    height: usize,
    width: usize,
    patch: usize,
    panel: usize,
}

impl<'a> View<'a> {
    /// The largest centered part with the proportions of the view. `patch` must divide both sides.
    ///
    /// # Errors
    /// [`PictureError::TooLarge`] for more patches than an attention matrix can hold, as the finest of `models` sees it.
    pub fn new(
        photo: &'a Photo,
        layout: Layout,
        patch: usize,
        models: &[Model],
    ) -> std::result::Result<Self, PictureError> {
        let view = Self::unchecked(photo, layout, patch);
        let finest = models.iter().map(|model| model.encoder.stride()).min().unwrap_or(patch);
        let patches = (view.height / finest) * (view.width / finest);
        if patches > MOST_PATCHES {
            let (height, width) = (view.height, view.width);
            return Err(PictureError::TooLarge { name: photo.name.clone(), height, width, patches });
        }
        Ok(view)
    }

    fn unchecked(photo: &'a Photo, layout: Layout, patch: usize) -> Self {
        let (height, width) = layout.size.of(&photo.image, patch);
        let (rows, columns) = (photo.image.height as usize, photo.image.width as usize);
        let (part_rows, part_columns) = if columns * height > rows * width {
            (rows, (rows * width + height / 2) / height)
        } else {
            ((columns * height + width / 2) / width, columns)
        };
        let (part_rows, part_columns) = (part_rows.clamp(1, rows), part_columns.clamp(1, columns));
        let region = CropBox {
            left: ((columns - part_columns) / 2) as u32,
            top: ((rows - part_rows) / 2) as u32,
            width: part_columns as u32,
            height: part_rows as u32,
        };
        Self { photo, region, height, width, patch, panel: layout.panel }
    }

    /// The end of its path: file and folder.
    pub fn file_name(&self) -> String {
        let parts: Vec<&str> =
            self.photo.name.rsplit(['/', '\\']).take(2).filter(|part| !part.is_empty()).collect();
        parts.into_iter().rev().collect::<Vec<_>>().join("/")
    }

    /// Path of the image.
    pub fn name(&self) -> &str {
        &self.photo.name
    }

    /// The part of the image that is seen, in its pixels.
    pub fn region(&self) -> CropBox {
        self.region
    }

    /// Height and width in pixels as the network sees it.
    pub fn size(&self) -> (usize, usize) {
        (self.height, self.width)
    }

    /// What the network gets, `[1, 3, H, W]`, normalized.
    ///
    /// # Errors
    /// The tensor library's.
    pub fn tensor(&self, model: &Model) -> Result<Tensor> {
        let planes = self.planes(self.height, self.width);
        let (mean, std) = model.encoder.normalization();
        let mut pixels = vec![0.0; 3 * self.height * self.width];
        normalize_into(&planes, mean, std, &mut pixels);
        Tensor::from_vec(pixels, (1, 3, self.height, self.width), model.encoder.device())
    }

    /// Height and width of its panel on the page: every patch of the common grid has the same whole number of pixels.
    pub fn panel(&self) -> (usize, usize) {
        let (short, long) = (self.height.min(self.width) as f64, self.height.max(self.width) as f64);
        let panel = self.panel as f64;
        let factor = (panel / short).min(2.0 * panel / long);
        let cell = ((factor * self.patch as f64).round() as usize).max(2);
        (self.height / self.patch * cell, self.width / self.patch * cell)
    }

    /// The part that is seen, on a panel.
    pub fn drawn(&self) -> Canvas {
        let (height, width) = self.panel();
        Canvas::from_planes(&self.planes(height, width))
    }

    /// One patch in `side x side` pixels.
    pub fn drawn_patch(&self, grid: (usize, usize), patch: usize, side: usize) -> Canvas {
        let CropBox { left, top, width, height } = self.region;
        let part = cell(grid, patch, (height as usize, width as usize));
        // of a tiny image a patch may have no pixel of its own
        let (x, y) = (part.left.min(width as usize - 1), part.top.min(height as usize - 1));
        let region = CropBox {
            left: left + x as u32,
            top: top + y as u32,
            width: part.width().max(1) as u32,
            height: part.height().max(1) as u32,
        };
        Canvas::from_planes(&resized(&self.photo.image, region, side, side))
    }

    fn planes(&self, height: usize, width: usize) -> Planes {
        resized(&self.photo.image, self.region, height, width)
    }
}

fn resized(image: &Rgb8Image, region: CropBox, height: usize, width: usize) -> Planes {
    let mut planes = Planes::default();
    Resampler::default().crop_resize(image, region, 1, width, height, &mut planes);
    planes
}

/// The pixels of a patch on a panel of `height x width`.
pub fn cell((rows, columns): (usize, usize), patch: usize, (height, width): (usize, usize)) -> Rect {
    let (row, column) = (patch / columns, patch % columns);
    Rect {
        left: column * width / columns,
        top: row * height / rows,
        right: (column + 1) * width / columns,
        bottom: (row + 1) * height / rows,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A photo of one color gradient.
    pub(crate) fn photo(width: u32, height: u32) -> Photo {
        let pixel = |i: u32| [(i % width * 255 / width) as u8, (i / width * 255 / height) as u8, 90];
        let data = (0..width * height).flat_map(pixel).collect();
        Photo { name: "folder/gradient.png".into(), image: Rgb8Image { width, height, data } }
    }

    #[test]
    fn sizes_are_read_and_refused() {
        assert_eq!("224".parse(), Ok(ViewSize::Short(224)));
        assert_eq!("480x854".parse(), Ok(ViewSize::Sides { height: 480, width: 854 }));
        for text in ["", "0", "x", "12x", "480x0", "-3", "99999", "4x4x4"] {
            assert!(text.parse::<ViewSize>().is_err(), "{text}");
        }
    }

    #[test]
    fn views_are_multiples_of_the_patch_and_inside_the_image() {
        let sides = ViewSize::Sides { height: 480, width: 854 };
        for (size, width, height, patch, expected) in [
            (ViewSize::Short(224), 400, 400, 16, (224, 224)),
            (ViewSize::Short(224), 640, 480, 16, (224, 288)),
            (ViewSize::Short(224), 480, 640, 14, (294, 224)),
            (ViewSize::Short(224), 1, 600, 16, (672, 224)),
            (ViewSize::Short(10), 50, 60, 16, (16, 16)),
            (sides, 1920, 1080, 16, (480, 848)),
            (sides, 100, 900, 8, (480, 848)),
            (sides, 854, 480, 112, (448, 784)),
        ] {
            let photo = photo(width, height);
            let view = View::unchecked(&photo, size.into(), patch);
            assert_eq!(view.size(), expected, "{size:?} of {width}x{height}");
            let region = view.region();
            assert!(region.left + region.width <= width && region.top + region.height <= height);
            let (rows, columns) = (f64::from(region.height), f64::from(region.width));
            let stretch = rows / columns * expected.1 as f64 / expected.0 as f64;
            assert!((stretch - 1.0).abs() < 0.02 || width == 1, "{stretch}");
            let panel = view.panel();
            assert_eq!(panel.0 % (expected.0 / patch), 0);
            assert_eq!((view.drawn().height(), view.drawn().width()), panel);
        }
    }

    #[test]
    fn cells_tile_the_panel() {
        let (grid, panel) = ((3, 4), (10, 11));
        let mut hits = vec![0; panel.0 * panel.1];
        for patch in 0..12 {
            let rect = cell(grid, patch, panel);
            for y in rect.top..rect.bottom {
                (rect.left..rect.right).for_each(|x| hits[y * panel.1 + x] += 1);
            }
        }
        assert!(hits.iter().all(|hit| *hit == 1));
    }
}
