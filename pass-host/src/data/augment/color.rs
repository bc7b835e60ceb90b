//! Brightness, contrast, saturation, grayscale and solarization with Pillow's 8-bit arithmetic.

use pulp::Arch;

use super::planes::Planes;

/// Luma of ITU-R 601 in the 16-bit fixed point of Pillow's conversion to mode "L".
#[inline(always)]
fn luma(red: u8, green: u8, blue: u8) -> u8 {
    ((u32::from(red) * 19595 + u32::from(green) * 38470 + u32::from(blue) * 7471 + 0x8000) >> 16) as u8
}

/// `from + factor * (to - from)` in single precision, clipped to bytes and cut to whole numbers (Pillow's `Image.blend`).
#[inline(always)]
fn blend(from: u8, to: u8, factor: f32) -> u8 {
    let (from, to) = (i32::from(from), i32::from(to));
    whole_byte((from as f32 + factor * (to - from) as f32).clamp(0.0, 255.0))
}

/// `x` in `[0, 256)`, cut to a whole number. A conversion by `as` checks for overflow and does not vectorize; this
/// moves the whole number into the lowest bits of the significand and takes it from there.
#[inline(always)]
fn whole_byte(x: f32) -> u8 {
    const UNIT_IN_LAST_PLACE: f32 = (1u32 << 23) as f32;
    (x.floor() + UNIT_IN_LAST_PLACE).to_bits() as u8
}

/// Blends with black: factor 0 is black, 1 the image (Pillow's `ImageEnhance.Brightness`).
pub fn adjust_brightness(planes: &mut Planes, factor: f64) {
    blend_with_constant(planes, 0, factor as f32);
}

/// Blends with the mean gray of the image, rounded (Pillow's `ImageEnhance.Contrast`).
pub fn adjust_contrast(planes: &mut Planes, factor: f64) {
    let [red, green, blue] = planes.channels();
    let sum = Arch::new().dispatch(
        #[inline(always)]
        || {
            // rows of this length cannot overflow 32 bits, and 32-bit sums fill twice as many lanes
            const STRIDE: usize = 4096;
            let strides = red.chunks(STRIDE).zip(green.chunks(STRIDE)).zip(blue.chunks(STRIDE));
            strides
                .map(|((red, green), blue)| {
                    let pixels = red.iter().zip(green).zip(blue);
                    u64::from(pixels.map(|((&r, &g), &b)| u32::from(luma(r, g, b))).sum::<u32>())
                })
                .sum::<u64>()
        },
    );
    let mean = (sum as f64 / red.len().max(1) as f64 + 0.5) as u8;
    blend_with_constant(planes, mean, factor as f32);
}

fn blend_with_constant(planes: &mut Planes, constant: u8, factor: f32) {
    let data = planes.data_mut();
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for byte in data {
                *byte = blend(constant, *byte, factor);
            }
        },
    );
}

/// Blends with the gray version of the image (Pillow's `ImageEnhance.Color`).
pub fn adjust_saturation(planes: &mut Planes, factor: f64) {
    let factor = factor as f32;
    let [red, green, blue] = planes.channels_mut();
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for ((red, green), blue) in red.iter_mut().zip(green).zip(blue) {
                let gray = luma(*red, *green, *blue);
                *red = blend(gray, *red, factor);
                *green = blend(gray, *green, factor);
                *blue = blend(gray, *blue, factor);
            }
        },
    );
}

/// Puts the luma into all three channels (torchvision's `RandomGrayscale`).
pub fn grayscale(planes: &mut Planes) {
    let [red, green, blue] = planes.channels_mut();
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for ((red, green), blue) in red.iter_mut().zip(green).zip(blue) {
                let gray = luma(*red, *green, *blue);
                (*red, *green, *blue) = (gray, gray, gray);
            }
        },
    );
}

/// Inverts every value of at least `threshold` (Pillow's `ImageOps.solarize`).
pub fn solarize(planes: &mut Planes, threshold: u8) {
    let data = planes.data_mut();
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for byte in data {
                *byte = if *byte < threshold { *byte } else { 255 - *byte };
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn luma_of_gray_is_itself() {
        for value in 0..=255 {
            assert_eq!(luma(value, value, value), value);
        }
    }

    #[test]
    fn blend_cuts_between_and_clips_beyond() {
        assert_eq!(blend(0, 5, 0.5), 2);
        assert_eq!(blend(10, 0, 1.5), 0);
        assert_eq!(blend(0, 200, 1.4), 255);
        assert_eq!(blend(7, 9, 1.0), 9);
    }

    #[test]
    fn a_whole_byte_is_cut_not_rounded() {
        for value in 0..=255u8 {
            for part in [0.0, 0.25, 0.5, 0.999] {
                assert_eq!(whole_byte(f32::from(value) + part), value);
            }
        }
    }

    #[test]
    fn solarize_inverts_the_bright_half() {
        let mut planes = Planes::from_interleaved(1, 2, &[0, 127, 128, 255, 200, 1]);
        solarize(&mut planes, 128);
        assert_eq!(planes.to_interleaved(), [0, 127, 127, 0, 55, 1]);
    }
}
