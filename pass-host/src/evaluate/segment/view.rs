//! A picture as the network sees it: whole, or a random crop (SEMANTICS §7).

use super::dataset::Picture;
use super::photometric::Distortion;
use crate::config::segment::SegmentConfig;
use crate::data::Rgb8Image;
use crate::ops::{IGNORED, Taps};
use crate::random::{Purpose, Stream};

/// Longer side of a picture as a multiple of the shorter, at most.
const LONGEST: f64 = 4.0;
/// Crops that are tried for one with more than one class.
const TRIES: usize = 10;

/// A normalized picture and its labels.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    /// Width in pixels.
    pub width: usize,
    /// Height in pixels.
    pub height: usize,
    /// `[3, height, width]`, normalized.
    pub pixels: Vec<f32>,
    /// `[height, width]`.
    pub labels: Vec<u8>,
}

/// Mean and standard deviation per channel, of values in `[0, 1]`.
pub type Normalization = ([f32; 3], [f32; 3]);

/// Size `(width, height)` with the shorter side `short` and the longer at most four times that, the ratio kept: mmcv's
/// `imrescale` with scale `(4·short, short)`.
fn rescaled(width: usize, height: usize, short: f64) -> (usize, usize) {
    let (w, h) = (width as f64, height as f64);
    // mmcv cuts the scale to whole pixels first
    let (short, long) = (short.floor(), (LONGEST * short).floor());
    let factor = (long / w.max(h)).min(short / w.min(h));
    let side = |side: f64| ((side * factor + 0.5) as usize).max(1);
    (side(w), side(h))
}

/// The part of a resized picture that is kept, in pixels of the resized picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    left: usize,
    top: usize,
    width: usize,
    height: usize,
}

/// The pixels of `part` of `image` resized bilinearly, without antialiasing, to `size`: interleaved RGB.
///
/// Deviation: OpenCV weighs with 11-bit fractions; here the weights are exact, at most one level apart.
fn resized(image: &Rgb8Image, size: (usize, usize), part: Part) -> Vec<u8> {
    let columns = Taps::bilinear(image.width as usize, size.0);
    let rows = Taps::bilinear(image.height as usize, size.1);
    let stride = 3 * image.width as usize;
    let mut out = Vec::with_capacity(3 * part.width * part.height);
    let mut blended = vec![0f32; stride];
    for y in part.top..part.top + part.height {
        blended.fill(0.0);
        for &(source, weight) in rows.of(y) {
            let row = &image.data[source * stride..][..stride];
            blended.iter_mut().zip(row).for_each(|(sum, &value)| *sum += weight * f32::from(value));
        }
        for x in part.left..part.left + part.width {
            for channel in 0..3 {
                let taps = columns.of(x).iter();
                let value: f32 = taps.map(|&(source, weight)| weight * blended[3 * source + channel]).sum();
                out.push((value + 0.5) as u8);
            }
        }
    }
    out
}

/// The labels of `part` of a mask resized to `size`: those of the nearest pixel above and left, as OpenCV takes them.
fn resized_labels(labels: &[u8], from: (usize, usize), size: (usize, usize), part: Part) -> Vec<u8> {
    let nearest = |target: usize, from: usize, to: usize| {
        ((target as f64 * (from as f64 / to as f64)) as usize).min(from - 1)
    };
    let columns: Vec<usize> =
        (part.left..part.left + part.width).map(|x| nearest(x, from.0, size.0)).collect();
    let mut out = Vec::with_capacity(part.width * part.height);
    for y in part.top..part.top + part.height {
        let row = &labels[nearest(y, from.1, size.1) * from.0..][..from.0];
        out.extend(columns.iter().map(|&x| row[x]));
    }
    out
}

/// Interleaved bytes to normalized planes of `size`; what they do not cover is 0, the mean color.
fn normalized(
    pixels: &[u8],
    part: (usize, usize),
    size: (usize, usize),
    normalization: Normalization,
) -> Vec<f32> {
    let (mean, std) = normalization;
    let mut planes = vec![0f32; 3 * size.0 * size.1];
    for (channel, plane) in planes.chunks_exact_mut(size.0 * size.1).enumerate() {
        let table: [f32; 256] =
            std::array::from_fn(|value| (value as f32 / 255.0 - mean[channel]) / std[channel]);
        for (row, plane) in pixels.chunks_exact(3 * part.0).zip(plane.chunks_exact_mut(size.0)) {
            for (pixel, value) in row.as_chunks::<3>().0.iter().zip(plane) {
                *value = table[usize::from(pixel[channel])];
            }
        }
    }
    planes
}

/// The whole picture at the size it is judged at, with its labels at their own size.
pub fn whole(picture: &Picture, config: &SegmentConfig, normalization: Normalization) -> View {
    let image = &picture.image;
    let own = (image.width as usize, image.height as usize);
    let size = match config.size {
        0 => own,
        short => rescaled(own.0, own.1, short as f64),
    };
    let all = Part { left: 0, top: 0, width: size.0, height: size.1 };
    let pixels = if size == own { image.data.clone() } else { resized(image, size, all) };
    View {
        width: size.0,
        height: size.1,
        pixels: normalized(&pixels, size, size, normalization),
        labels: picture.labels.clone(),
    }
}

/// A random crop for training: random scale, a crop in which no class covers too much, mirrored or not, other colors,
/// filled up at the right and below. A pure function of `(seed, epoch, image)`.
pub fn crop(
    picture: &Picture,
    config: &SegmentConfig,
    normalization: Normalization,
    epoch: u64,
    image: u64,
) -> View {
    let mut stream = Stream::new(config.seed, Purpose::Augment, &[epoch, image, CROP]);
    let own = (picture.image.width as usize, picture.image.height as usize);
    let short = if config.size == 0 { own.0.min(own.1) } else { config.size };
    let ratio = stream.range(config.scale[0], config.scale[1]);
    let size = rescaled(own.0, own.1, ratio * short as f64);
    let flip = stream.chance(config.flip);
    let distortion = Distortion::draw(&mut stream);
    let side = config.crop;
    let mut draw = || Part {
        left: stream.below((size.0.saturating_sub(side) + 1) as u64) as usize,
        top: stream.below((size.1.saturating_sub(side) + 1) as u64) as usize,
        width: side.min(size.0),
        height: side.min(size.1),
    };
    let mut part = draw();
    let mut labels = resized_labels(&picture.labels, own, size, part);
    for _ in 0..TRIES {
        if config.cat_max_ratio >= 1.0 || is_varied(&labels, config.cat_max_ratio) {
            break;
        }
        part = draw();
        labels = resized_labels(&picture.labels, own, size, part);
    }
    let mut pixels = resized(&picture.image, size, part);
    if flip {
        pixels.chunks_exact_mut(3 * part.width).for_each(|row| row.as_chunks_mut::<3>().0.reverse());
        labels.chunks_exact_mut(part.width).for_each(<[u8]>::reverse);
    }
    if config.photometric {
        distortion.apply(&mut pixels);
    }
    let mut filled = vec![IGNORED; side * side];
    for (row, filled) in labels.chunks_exact(part.width).zip(filled.chunks_exact_mut(side)) {
        filled[..part.width].copy_from_slice(row);
    }
    View {
        width: side,
        height: side,
        pixels: normalized(&pixels, (part.width, part.height), (side, side), normalization),
        labels: filled,
    }
}

/// The last coordinate of the random numbers of a crop, apart from those of pre-training.
const CROP: u64 = 1 << 40;

/// More than one class, and none that covers the given share or more.
fn is_varied(labels: &[u8], most: f64) -> bool {
    let mut counts = [0usize; 256];
    labels.iter().for_each(|&label| counts[usize::from(label)] += 1);
    let counts = &counts[..usize::from(IGNORED)];
    let present = counts.iter().filter(|count| **count > 0).count();
    let total: usize = counts.iter().sum();
    let largest = counts.iter().max().copied().unwrap_or(0);
    present > 1 && (largest as f64) < most * total as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::segment::{HeadKind, SegmentPreset};

    const PLAIN: Normalization = ([0.0; 3], [1.0; 3]);

    /// A picture whose red and label tell the column and whose green tells the row.
    fn picture(width: usize, height: usize) -> Picture {
        let byte = |place: usize| (4 * place % 256) as u8;
        let pixels = (0..height).flat_map(|y| (0..width).flat_map(move |x| [byte(x), byte(y), 7]));
        let labels = (0..height).flat_map(|_| (0..width).map(|x| x as u8)).collect();
        let image = Rgb8Image { width: width as u32, height: height as u32, data: pixels.collect() };
        Picture { image, labels }
    }

    fn config() -> SegmentConfig {
        SegmentConfig { photometric: false, ..SegmentConfig::preset(HeadKind::Fpn, SegmentPreset::Small) }
    }

    #[test]
    fn sizes_are_those_of_mmcv() {
        assert_eq!(rescaled(480, 360, 512.0), (683, 512));
        assert_eq!(rescaled(360, 480, 512.0), (512, 683));
        // the longer side limits
        assert_eq!(rescaled(1000, 100, 512.0), (2048, 205));
        assert_eq!(rescaled(683, 512, 256.7), (342, 256));
        assert_eq!(rescaled(4000, 1, 16.0), (64, 1));
    }

    #[test]
    fn whole_pictures_keep_their_labels() {
        let picture = picture(40, 30);
        let view = whole(&picture, &SegmentConfig { size: 0, ..config() }, PLAIN);
        assert_eq!((view.width, view.height), (40, 30));
        assert_eq!(view.pixels[5], 20.0 / 255.0);
        let view = whole(&picture, &SegmentConfig { size: 60, ..config() }, PLAIN);
        assert_eq!((view.width, view.height, view.labels.len()), (80, 60, 1200));
        // bilinear: pixel 1 of 80 lies at 0.25 of 40
        assert_eq!(view.pixels[1], 1.0 / 255.0);
    }

    #[test]
    fn pixels_and_labels_of_a_crop_move_together() {
        let picture = picture(60, 48);
        let config = SegmentConfig { crop: 32, size: 48, scale: [1.0, 1.0], cat_max_ratio: 1.0, ..config() };
        let mut seen = std::collections::HashSet::new();
        for image in 0..40 {
            let view = crop(&picture, &config, PLAIN, 0, image);
            for (place, &label) in view.labels.iter().enumerate() {
                assert_eq!((view.pixels[place] * 255.0 / 4.0).round() as u8, label);
            }
            seen.insert((view.labels[0], view.labels[0] > view.labels[1]));
        }
        assert!(seen.len() > 20, "positions and mirrors vary");
        assert_eq!(crop(&picture, &config, PLAIN, 3, 5), crop(&picture, &config, PLAIN, 3, 5));
        assert_ne!(crop(&picture, &config, PLAIN, 3, 5), crop(&picture, &config, PLAIN, 4, 5));
    }

    #[test]
    fn small_pictures_are_filled_up_at_the_right_and_below() {
        let picture = picture(20, 16);
        let config = SegmentConfig {
            crop: 32,
            size: 16,
            scale: [1.0, 1.0],
            flip: 0.0,
            cat_max_ratio: 1.0,
            ..config()
        };
        let view = crop(&picture, &config, ([0.5; 3], [0.5; 3]), 0, 0);
        assert_eq!(view.labels[19], 19);
        assert_eq!(view.labels[20], IGNORED);
        assert_eq!(view.labels[16 * 32], IGNORED);
        assert_eq!((view.pixels[20], view.pixels[16 * 32], view.pixels[0]), (0.0, 0.0, -1.0));
    }

    #[test]
    fn one_sided_crops_are_drawn_again() {
        assert!(!is_varied(&[1, 1, 1, IGNORED], 0.75));
        assert!(!is_varied(&[1, 1, 1, 2], 0.75));
        assert!(is_varied(&[1, 1, 1, 2, 2], 0.75));
        assert!(!is_varied(&[IGNORED; 4], 0.75));
        // a picture with a second class in one corner: crops land there more often than by chance
        let mut picture = picture(96, 96);
        picture.labels = (0..96 * 96).map(|i| u8::from(i / 96 < 30 && i % 96 < 30)).collect();
        let varied = |cat_max_ratio| {
            let config = SegmentConfig { crop: 32, size: 96, scale: [1.0, 1.0], cat_max_ratio, ..config() };
            let crops = (0..60).map(|image| crop(&picture, &config, PLAIN, 0, image));
            crops.filter(|view| is_varied(&view.labels, 0.75)).count()
        };
        assert!(varied(0.75) > varied(1.0) + 10, "{} against {}", varied(0.75), varied(1.0));
    }
}
