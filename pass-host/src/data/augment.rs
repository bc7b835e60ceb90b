//! One image -> crops, exactly as DINO does it with Pillow and torchvision (SEMANTICS §5, "Augmentation").
//!
//! Random numbers are drawn into a [`CropPlan`] first ([`plan`]), then applied ([`Augmenter`]): a plan is plain data,
//! known before the image is decoded, so that the decoder can choose a smaller scale.
//!
//! Between resizing and normalization a crop is three planes of bytes (`[3, H, W]`): every operation then runs over
//! contiguous memory, and the result is already in the layout the network wants.

mod blur;
mod color;
mod crop;
mod device_crops;
mod hue;
mod planes;
mod resample;

pub use blur::gaussian_blur;
pub use color::{adjust_brightness, adjust_contrast, adjust_saturation, grayscale, solarize};
pub use crop::{CropBox, Resampler, random_resized_crop};
pub use device_crops::DeviceCrops;
pub use hue::adjust_hue;
pub use planes::{Planes, normalize_into};

use super::decode::Rgb8Image;
use crate::config::AugmentConfig;
use crate::random::{Purpose, Stream};

/// Number of global crops of an image.
pub const GLOBAL_CROPS: usize = 2;

/// One operation of the color jitter with its factor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Jitter {
    /// Blend with black.
    Brightness(f64),
    /// Blend with the mean gray of the crop.
    Contrast(f64),
    /// Blend with the gray version of the crop.
    Saturation(f64),
    /// Shift of the hue, in turns.
    Hue(f64),
}

/// Everything random about one crop, drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct CropPlan {
    /// The part of the upright image that is kept, in pixels of its full size.
    pub region: CropBox,
    /// Side of the crop in pixels.
    pub size: usize,
    /// Mirror left-right.
    pub flip: bool,
    /// Color jitter in the order of application, if any.
    pub jitter: Option<[Jitter; 4]>,
    /// Turn gray.
    pub gray: bool,
    /// Radius of the Gaussian blur in pixels, if any.
    pub blur: Option<f64>,
    /// Invert values of 128 and above.
    pub solarize: bool,
}

/// Draws crop number `crop` of an image of `width x height` pixels: crops 0 and 1 are global, the rest local.
///
/// A pure function of (seed, epoch, image, crop) and the size of the image. Probabilities and ranges are those of
/// `config`; the order of draws is fixed and every draw is made whether it is used or not, so that a changed
/// probability does not move the other parameters.
pub fn plan(
    config: &AugmentConfig,
    seed: u64,
    epoch: u64,
    image: u64,
    crop: usize,
    width: u32,
    height: u32,
) -> CropPlan {
    let mut stream = Stream::new(seed, Purpose::Augment, &[epoch, image, crop as u64]);
    let global = crop < GLOBAL_CROPS;
    let (scale, size) = if global {
        (config.global_scale, config.global_size)
    } else {
        (config.local_scale, config.local_size)
    };
    let flip = stream.chance(config.flip);
    let jittered = stream.chance(config.jitter);
    let factor = |stream: &mut Stream, reach: f64| stream.range((1.0 - reach).max(0.0), 1.0 + reach);
    let mut jitter = [
        Jitter::Brightness(factor(&mut stream, config.brightness)),
        Jitter::Contrast(factor(&mut stream, config.contrast)),
        Jitter::Saturation(factor(&mut stream, config.saturation)),
        Jitter::Hue(stream.range(-config.hue, config.hue)),
    ];
    for last in (1..jitter.len()).rev() {
        jitter.swap(last, stream.below(last as u64 + 1) as usize);
    }
    let gray = stream.chance(config.gray);
    let blurred = stream.chance(config.blur[crop.min(GLOBAL_CROPS)]);
    let radius = stream.range(config.blur_radius[0], config.blur_radius[1]);
    let solarize = stream.chance(config.solarize) && crop == 1;
    CropPlan {
        region: random_resized_crop(&mut stream, width, height, scale, config.ratio),
        size,
        flip,
        jitter: jittered.then_some(jitter),
        gray,
        blur: blurred.then_some(radius),
        solarize,
    }
}

/// The plans of all crops of one image, global ones first.
pub fn plans(
    config: &AugmentConfig,
    seed: u64,
    epoch: u64,
    image: u64,
    width: u32,
    height: u32,
) -> Vec<CropPlan> {
    (0..GLOBAL_CROPS + config.local_crops)
        .map(|crop| plan(config, seed, epoch, image, crop, width, height))
        .collect()
}

/// Applies plans; holds the buffers that one worker reuses from crop to crop.
#[derive(Debug, Default)]
pub struct Augmenter {
    resampler: Resampler,
    planes: Planes,
    scratch: Planes,
}

impl Augmenter {
    /// Applies `plan` to `image`, which shows the whole picture at `1/reduction` of the size the plan was drawn for.
    /// `planes` becomes `[3, size, size]`, 8-bit.
    pub fn apply_into(&mut self, image: &Rgb8Image, reduction: u32, plan: &CropPlan, planes: &mut Planes) {
        self.resampler.crop_resize(image, plan.region, reduction, plan.size, plan.size, planes);
        if plan.flip {
            planes.flip();
        }
        for operation in plan.jitter.iter().flatten() {
            match *operation {
                Jitter::Brightness(factor) => adjust_brightness(planes, factor),
                Jitter::Contrast(factor) => adjust_contrast(planes, factor),
                Jitter::Saturation(factor) => adjust_saturation(planes, factor),
                Jitter::Hue(turns) => adjust_hue(planes, turns),
            }
        }
        if plan.gray {
            grayscale(planes);
        }
        if let Some(radius) = plan.blur {
            gaussian_blur(planes, radius, &mut self.scratch);
        }
        if plan.solarize {
            solarize(planes, SOLARIZE_THRESHOLD);
        }
    }

    /// The whole image resized to `width x height` without keeping its proportions, normalized, `[3, height, width]`.
    pub fn resize_whole(
        &mut self,
        image: &Rgb8Image,
        width: usize,
        height: usize,
        mean: [f32; 3],
        std: [f32; 3],
    ) -> Vec<f32> {
        let whole = CropBox { left: 0, top: 0, width: image.width, height: image.height };
        self.resampler.crop_resize(image, whole, 1, width, height, &mut self.planes);
        let mut out = vec![0.0; 3 * width * height];
        normalize_into(&self.planes, mean, std, &mut out);
        out
    }

    /// The evaluation view of torchvision, of any proportions: [`Augmenter::center_view`], normalized, `[3, height, width]`.
    pub fn prepare_center(
        &mut self,
        image: &Rgb8Image,
        resize: (usize, usize),
        size: (usize, usize),
        mean: [f32; 3],
        std: [f32; 3],
    ) -> Vec<f32> {
        let planes = self.center_view(image, resize, size);
        let mut out = vec![0.0; 3 * size.0 * size.1];
        normalize_into(planes, mean, std, &mut out);
        out
    }

    /// The same view as bytes, of any proportions: resized (bicubic) until it covers `resize`, then its center of `size`; both
    /// `(height, width)`.
    pub fn center_view(
        &mut self,
        image: &Rgb8Image,
        resize: (usize, usize),
        size: (usize, usize),
    ) -> &Planes {
        let (width, height) = covering(image, (resize.0.max(size.0), resize.1.max(size.1)));
        let whole = CropBox { left: 0, top: 0, width: image.width, height: image.height };
        self.resampler.crop_resize(image, whole, 1, width, height, &mut self.planes);
        let offset = |extent: usize, size: usize| ((extent - size) as f64 / 2.0).round_ties_even() as usize;
        self.planes.crop(offset(width, size.1), offset(height, size.0), size.1, size.0);
        &self.planes
    }
}

/// Threshold of the solarization (Pillow's default).
const SOLARIZE_THRESHOLD: u8 = 128;

/// Width and height after the side that limits became that of `(height, width)`; the other is rounded down, as torchvision does.
pub(crate) fn covering(image: &Rgb8Image, (height, width): (usize, usize)) -> (usize, usize) {
    let (own_width, own_height) = (image.width as usize, image.height as usize);
    if own_width * height <= own_height * width {
        (width, width * own_height / own_width)
    } else {
        (height * own_width / own_height, height)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(width: u32, height: u32) -> Rgb8Image {
        let mut stream = Stream::new(9, Purpose::Subset, &[]);
        let data = (0..width * height * 3).map(|_| stream.bits() as u8).collect();
        Rgb8Image { width, height, data }
    }

    #[test]
    fn a_plan_depends_on_each_of_its_coordinates() {
        let config = AugmentConfig::default();
        let draw = |seed, epoch, image, crop| plan(&config, seed, epoch, image, crop, 300, 200);
        assert_eq!(draw(1, 2, 3, 1), draw(1, 2, 3, 1));
        for other in [draw(2, 2, 3, 1), draw(1, 3, 3, 1), draw(1, 2, 4, 1), draw(1, 2, 3, 0)] {
            assert_ne!(draw(1, 2, 3, 1), other);
        }
    }

    #[test]
    fn probabilities_and_ranges_are_those_of_the_configuration() {
        let config = AugmentConfig::default();
        let mut count = [0usize; 8];
        let draws = 4000;
        for image in 0..draws {
            for crop in 0..3 {
                let plan = plan(&config, 0, 0, image, crop, 300, 200);
                count[crop] += usize::from(plan.blur.is_some());
                if crop == 1 {
                    count[3] += usize::from(plan.solarize);
                    count[4] += usize::from(plan.flip);
                    count[5] += usize::from(plan.jitter.is_some());
                    count[6] += usize::from(plan.gray);
                    count[7] += usize::from(plan.jitter.is_some_and(|j| matches!(j[0], Jitter::Hue(_))));
                } else {
                    assert!(!plan.solarize);
                }
                if let Some(radius) = plan.blur {
                    assert!((0.1..2.0).contains(&radius));
                }
                for operation in plan.jitter.iter().flatten() {
                    match *operation {
                        Jitter::Brightness(f) | Jitter::Contrast(f) => assert!((0.6..1.4).contains(&f)),
                        Jitter::Saturation(f) => assert!((0.8..1.2).contains(&f)),
                        Jitter::Hue(turns) => assert!((-0.1..0.1).contains(&turns)),
                    }
                }
            }
        }
        let share = count.map(|n| n as f64 / draws as f64);
        for (found, expected) in share.iter().zip([1.0, 0.1, 0.5, 0.2, 0.5, 0.8, 0.2, 0.2]) {
            assert!((found - expected).abs() < 0.03, "{share:?}");
        }
    }

    #[test]
    fn center_view_of_an_image_of_the_right_size_is_the_image() {
        let image = picture(20, 16);
        let out = Augmenter::default().prepare_center(&image, (16, 16), (16, 16), [0.0; 3], [1.0; 3]);
        for (row, column, channel) in [(0, 0, 0), (15, 15, 2), (3, 7, 1)] {
            let expected = f32::from(image.data[(row * 20 + column + 2) * 3 + channel]) / 255.0;
            assert!((out[(channel * 16 + row) * 16 + column] - expected).abs() < 1e-6);
        }
    }

    #[test]
    fn center_view_of_other_proportions_covers_what_is_asked() {
        for (width, height) in [(1, 1), (3, 200), (90, 31), (640, 480)] {
            for size in [(16, 32), (48, 16), (14, 14)] {
                let view = (size.0 * 8 / 7, size.1 * 8 / 7);
                let mut augmenter = Augmenter::default();
                let planes = augmenter.center_view(&picture(width, height), view, size);
                assert_eq!((planes.height(), planes.width()), size);
            }
        }
    }

    #[test]
    fn every_plan_applies_to_every_image_size() {
        let mut config = AugmentConfig { global_size: 32, local_size: 16, ..AugmentConfig::default() };
        config.solarize = 1.0;
        let (mut augmenter, mut planes) = (Augmenter::default(), Planes::default());
        for (width, height) in [(1, 1), (1, 600), (600, 1), (2, 3), (33, 47)] {
            let image = picture(width, height);
            for index in 0..20 {
                for plan in plans(&config, 5, 0, index, width, height) {
                    augmenter.apply_into(&image, 1, &plan, &mut planes);
                    assert_eq!((planes.width(), planes.height()), (plan.size, plan.size));
                }
            }
        }
    }
}
