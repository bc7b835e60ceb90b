//! Frames of a video as the published evaluations prepare them (`read_frame` of DINO's and PASS's
//! `eval_video_segmentation.py`): short side to a given length, long side floored, bilinear without antialiasing, color
//! normalization.

use crate::error::{Error, Result, check_length};
use crate::rows::rows_of_mut;
use crate::shape::{MAX_PATCHES, part};

/// Mean of red, green and blue.
pub const MEAN: [f32; 3] = [0.485, 0.456, 0.406];
/// Standard deviation of red, green and blue, as in training.
pub const STD: [f32; 3] = [0.229, 0.224, 0.225];
/// Standard deviation in the published video evaluations, where the first number is a typing error that their results
/// carry.
pub const STD_OF_VIDEO_EVALUATION: [f32; 3] = [0.228, 0.224, 0.225];

/// The long side becomes a multiple of this many pixels.
pub const LONG_SIDE_MULTIPLE: usize = 64;

/// Size of a prepared frame: the short side becomes `short_side`, the long side keeps the ratio and is floored to a multiple
/// of [`LONG_SIDE_MULTIPLE`]. Of a square frame the width is floored.
///
/// The reference prepares square masks the other way round, which transposes their grid; masks follow their frame here.
///
/// # Errors
/// [`Error::OutOfRange`] for an empty frame or one of which nothing would be left.
pub const fn prepared_size((height, width): (usize, usize), short_side: usize) -> Result<(usize, usize)> {
    let (short, long) = if height > width { (width, height) } else { (height, width) };
    if short == 0 || long > MAX_PATCHES {
        let actual = if short == 0 { 0 } else { long };
        return Err(Error::OutOfRange { what: "frame size", min: 1, max: MAX_PATCHES, actual });
    }
    let scaled = short_side as u64 as u128 * long as u128 / short as u128;
    if short_side == 0 || scaled < LONG_SIDE_MULTIPLE as u128 || scaled > MAX_PATCHES as u128 {
        return Err(Error::OutOfRange { what: "short side", min: 1, max: MAX_PATCHES, actual: short_side });
    }
    let long = scaled as usize / LONG_SIDE_MULTIPLE * LONG_SIDE_MULTIPLE;
    Ok(if height > width { (long, short_side) } else { (short_side, long) })
}

/// Bits of the fixed-point weights.
const WEIGHT_BITS: u32 = 11;
/// Adding and subtracting this rounds a small `f32` to the nearest whole number, halves to even.
const ROUND: f32 = 12_582_912.0;

/// A place between two pixels of an axis, with weights in 1/2048.
#[derive(Clone, Copy)]
struct Between {
    low: usize,
    high: usize,
    weights: [i32; 2],
}

impl Between {
    fn new(index: usize, from: usize, to: usize) -> Self {
        let step = 1.0 / (to as f64 / from as f64);
        let position = ((index as f64 + 0.5) * step - 0.5) as f32;
        // truncation is the floor here: anything below 0 is clamped to it
        let low = (position.max(0.0) as usize).min(from.saturating_sub(1));
        let fraction = if position < 0.0 || low + 1 == from { 0.0 } else { position - low as f32 };
        let fixed = |weight: f32| ((weight * (1 << WEIGHT_BITS) as f32 + ROUND) - ROUND) as i32;
        Self {
            low,
            high: (low + 1).min(from.saturating_sub(1)),
            weights: [fixed(1.0 - fraction), fixed(fraction)],
        }
    }
}

/// Resizes 8-bit pixels bilinearly without antialiasing, in the fixed-point arithmetic of OpenCV (`INTER_LINEAR`).
///
/// - `pixels`: `[height, width, channels]` of `size`; `out`: `[.., .., channels]` of `out_size`.
///
/// # Errors
/// [`Error::OutOfRange`] for an empty size; [`Error::LengthMismatch`] if a buffer is not of its size.
pub fn resize_bilinear_into(
    pixels: &[u8],
    size: (usize, usize),
    channels: usize,
    out_size: (usize, usize),
    out: &mut [u8],
) -> Result<()> {
    let sides = [size.0, size.1, channels, out_size.0, out_size.1];
    if let Some(&actual) = sides.iter().find(|&&side| side == 0 || side > MAX_PATCHES) {
        return Err(Error::OutOfRange { what: "frame size", min: 1, max: MAX_PATCHES, actual });
    }
    let row_len = size.1.saturating_mul(channels);
    check_length("pixels", size.0.saturating_mul(row_len), pixels.len())?;
    let out_row_len = out_size.1.saturating_mul(channels);
    check_length("resized pixels", out_size.0.saturating_mul(out_row_len), out.len())?;

    for (row, out) in rows_of_mut(out, out_row_len).enumerate() {
        let vertical = Between::new(row, size.0, out_size.0);
        let lines = [vertical.low, vertical.high].map(|line| part(pixels, line * row_len, row_len));
        for (column, out) in rows_of_mut(out, channels).enumerate() {
            let horizontal = Between::new(column, size.1, out_size.1);
            let pixels = lines.map(|line| {
                [horizontal.low, horizontal.high].map(|column| part(line, column * channels, channels))
            });
            let [[upper_low, upper_high], [lower_low, lower_high]] = pixels;
            let pixels = upper_low.iter().zip(upper_high).zip(lower_low.iter().zip(lower_high));
            for (out, (upper, lower)) in out.iter_mut().zip(pixels) {
                let [upper, lower] = [upper, lower].map(|(low, high)| {
                    i32::from(*low) * horizontal.weights[0] + i32::from(*high) * horizontal.weights[1]
                });
                let sum = ((vertical.weights[0] * (upper >> 4)) >> 16)
                    + ((vertical.weights[1] * (lower >> 4)) >> 16);
                *out = ((sum + 2) >> 2).clamp(0, 255) as u8;
            }
        }
    }
    Ok(())
}

/// The network's input: `(x/255 − mean)/std`, one plane a channel.
///
/// - `rgb`: `[height, width, 3]`; `out`: `[3, height, width]`.
///
/// # Errors
/// [`Error::NotDivisible`] if `rgb` holds no whole pixels; [`Error::LengthMismatch`] if `out` is not as long.
pub fn normalize_into(rgb: &[u8], mean: [f32; 3], std: [f32; 3], out: &mut [f32]) -> Result<()> {
    if !rgb.len().is_multiple_of(3) {
        return Err(Error::NotDivisible { what: "rgb", actual: rgb.len(), divisor: 3 });
    }
    check_length("normalized frame", rgb.len(), out.len())?;
    let n = rgb.len() / 3;
    if n == 0 {
        return Ok(());
    }
    let moments = mean.iter().zip(&std);
    for ((channel, plane), (mean, std)) in rows_of_mut(out, n).enumerate().zip(moments) {
        for (out, value) in plane.iter_mut().zip(rgb.iter().skip(channel).step_by(3)) {
            *out = (f32::from(*value) / 255.0 - mean) / std;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec;
    use std::vec::Vec;

    #[test]
    fn the_long_side_is_floored_to_64() {
        let cases = [
            ((480, 854), 480, (480, 832)),
            ((854, 480), 480, (832, 480)),
            ((1080, 1920), 480, (480, 832)),
            ((500, 500), 480, (480, 448)),
            ((480, 1152), 480, (480, 1152)),
        ];
        for (size, short, expected) in cases {
            assert_eq!(prepared_size(size, short), Ok(expected), "{size:?}");
        }
        for (size, short) in [((0, 9), 480), ((9, 0), 480), ((9, 9), 0), ((9, 9), 63), ((1, usize::MAX), 480)]
        {
            assert!(prepared_size(size, short).is_err(), "{size:?} {short}");
        }
        assert!(prepared_size((1, MAX_PATCHES), usize::MAX).is_err());
    }

    #[test]
    fn resizing_interpolates_between_pixel_centers_and_repeats_the_border() {
        let mut out = [0; 4];
        resize_bilinear_into(&[0, 100], (1, 2), 1, (1, 4), &mut out).unwrap();
        assert_eq!(out, [0, 25, 75, 100]);
        let mut out = [0; 2];
        resize_bilinear_into(&[0, 0, 100, 200], (1, 4), 1, (1, 2), &mut out).unwrap();
        assert_eq!(out, [0, 150]);
        assert!(resize_bilinear_into(&[0; 3], (1, 4), 1, (1, 2), &mut out).is_err());
        assert!(resize_bilinear_into(&[0; 4], (1, 4), 1, (0, 2), &mut out).is_err());
        assert!(resize_bilinear_into(&[0; 4], (1, 4), 1, (1, 3), &mut out).is_err());
    }

    #[test]
    fn normalization_makes_planes() {
        let mut out = [0.0; 6];
        normalize_into(&[255, 0, 0, 0, 255, 51], [0.0, 0.5, 0.0], [1.0, 0.5, 0.1], &mut out).unwrap();
        let expected = [1.0, 0.0, -1.0, 1.0, 0.0, 2.0];
        assert!(out.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{out:?}");
        assert!(normalize_into(&[0; 4], MEAN, STD, &mut [0.0; 4]).is_err());
        assert!(normalize_into(&[0; 3], MEAN, STD, &mut [0.0; 4]).is_err());
        assert!(normalize_into(&[], MEAN, STD, &mut []).is_ok());
    }

    proptest! {
        #[test]
        fn resizing_agrees_with_a_double_precision_twin(
            pixels in prop::collection::vec(any::<u8>(), 36),
            height in 1_usize..20,
            width in 1_usize..20,
        ) {
            let (h, w) = (9, 4);
            let mut out = vec![0; height * width];
            resize_bilinear_into(&pixels, (h, w), 1, (height, width), &mut out).unwrap();
            let places = |from: usize, to: usize| -> Vec<(usize, usize, f64)> {
                (0..to)
                    .map(|index| {
                        let position = (index as f64 + 0.5) * from as f64 / to as f64 - 0.5;
                        let position = position.clamp(0.0, (from - 1) as f64);
                        let low = position as usize;
                        (low, (low + 1).min(from - 1), position - low as f64)
                    })
                    .collect()
            };
            for (y, &(y0, y1, v)) in places(h, height).iter().enumerate() {
                for (x, &(x0, x1, u)) in places(w, width).iter().enumerate() {
                    let pixel = |y: usize, x: usize| f64::from(pixels[y * w + x]);
                    let line = |y: usize| pixel(y, x0) * (1.0 - u) + pixel(y, x1) * u;
                    let expected = line(y0) * (1.0 - v) + line(y1) * v;
                    prop_assert!((f64::from(out[y * width + x]) - expected).abs() <= 1.0);
                }
            }
        }
    }
}
