//! Which part of an image becomes a crop, and its resampling.

use super::planes::Planes;
use super::resample::{Bicubic, Span};
use crate::data::decode::Rgb8Image;
use crate::random::Stream;

/// A rectangle in whole pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CropBox {
    /// First column.
    pub left: u32,
    /// First row.
    pub top: u32,
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
}

/// Tries before the center of the image is taken (torchvision's constant).
const TRIES: usize = 10;

/// Draws the rectangle of torchvision's `RandomResizedCrop`: area uniform in `scale` (shares of the image), aspect
/// ratio log-uniform in `ratio`; after ten tries that do not fit, the largest centered rectangle of an allowed ratio.
pub fn random_resized_crop(
    stream: &mut Stream,
    width: u32,
    height: u32,
    scale: [f64; 2],
    ratio: [f64; 2],
) -> CropBox {
    let area = f64::from(width) * f64::from(height);
    for _ in 0..TRIES {
        let target = area * stream.range(scale[0], scale[1]);
        let aspect = stream.range(ratio[0].ln(), ratio[1].ln()).exp();
        let crop_width = (target * aspect).sqrt().round_ties_even() as u32;
        let crop_height = (target / aspect).sqrt().round_ties_even() as u32;
        if (1..=width).contains(&crop_width) && (1..=height).contains(&crop_height) {
            return CropBox {
                top: stream.below(u64::from(height - crop_height) + 1) as u32,
                left: stream.below(u64::from(width - crop_width) + 1) as u32,
                width: crop_width,
                height: crop_height,
            };
        }
    }
    let shape = f64::from(width) / f64::from(height);
    let (crop_width, crop_height) = if shape < ratio[0] {
        (width, (f64::from(width) / ratio[0]).round_ties_even() as u32)
    } else if shape > ratio[1] {
        ((f64::from(height) * ratio[1]).round_ties_even() as u32, height)
    } else {
        (width, height)
    };
    let (crop_width, crop_height) = (crop_width.clamp(1, width), crop_height.clamp(1, height));
    CropBox {
        left: (width - crop_width) / 2,
        top: (height - crop_height) / 2,
        width: crop_width,
        height: crop_height,
    }
}

/// Resizes parts of images by antialiased bicubic resampling (a = -0.5), bit for bit as Pillow does; keeps its buffers.
#[derive(Debug, Default)]
pub struct Resampler {
    bicubic: Bicubic,
}

impl Resampler {
    /// Resizes `region` to `width x height`. `region` counts pixels of the full size, `image` shows the same picture at
    /// `1/reduction` of it. No pixel outside the region is looked at, as when an image is cropped first; at a reduced
    /// size the region may begin within a pixel, which then counts in full.
    ///
    /// # Panics
    /// When the region reaches beyond the image or has no pixel.
    pub fn crop_resize(
        &mut self,
        image: &Rgb8Image,
        region: CropBox,
        reduction: u32,
        width: usize,
        height: usize,
        out: &mut Planes,
    ) {
        let columns = reduced_span(region.left, region.width, reduction, image.width);
        let rows = reduced_span(region.top, region.height, reduction, image.height);
        self.bicubic.resample(image, columns, rows, width, height, out);
    }
}

/// A span of the full size in the pixels of an image that is reduced to `limit` pixels along this axis.
pub(super) fn reduced_span(start: u32, length: u32, reduction: u32, limit: u32) -> Span {
    assert!(length > 0 && (start + length).div_ceil(reduction) <= limit, "a crop lies within its image");
    let scaled = |x: u32| f64::from(x) / f64::from(reduction);
    Span::new(scaled(start), scaled(start + length))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Purpose;

    #[test]
    fn crops_lie_within_the_image_and_have_the_right_area() {
        let mut mean = 0.0;
        for image in 0..2000 {
            let mut stream = Stream::new(1, Purpose::Augment, &[image]);
            let crop = random_resized_crop(&mut stream, 320, 240, [0.25, 1.0], [0.75, 4.0 / 3.0]);
            assert!(crop.left + crop.width <= 320 && crop.top + crop.height <= 240);
            let area = f64::from(crop.width * crop.height) / (320.0 * 240.0);
            assert!((0.24..=1.0).contains(&area), "{crop:?}");
            mean += area / 2000.0;
        }
        // large areas fit less often than small ones, so the mean lies below the middle of the range
        assert!((0.5..0.625).contains(&mean), "mean area {mean}");
    }

    #[test]
    fn an_image_no_crop_fits_gives_its_center() {
        let mut stream = Stream::new(1, Purpose::Augment, &[]);
        let crop = random_resized_crop(&mut stream, 600, 30, [0.9, 1.0], [0.75, 4.0 / 3.0]);
        assert_eq!(crop, CropBox { left: 280, top: 0, width: 40, height: 30 });
        let crop = random_resized_crop(&mut stream, 30, 600, [0.9, 1.0], [0.75, 4.0 / 3.0]);
        assert_eq!(crop, CropBox { left: 0, top: 280, width: 30, height: 40 });
    }

    #[test]
    fn pixels_outside_the_region_do_not_matter() {
        let mut image = Rgb8Image { width: 20, height: 20, data: vec![200; 1200] };
        for row in 5..15 {
            for column in 5..15 {
                image.data[(row * 20 + column) * 3..][..3].fill(10);
            }
        }
        let region = CropBox { left: 5, top: 5, width: 10, height: 10 };
        let mut planes = Planes::default();
        Resampler::default().crop_resize(&image, region, 1, 24, 24, &mut planes);
        assert!(planes.data().iter().all(|&byte| byte == 10));
    }
}
