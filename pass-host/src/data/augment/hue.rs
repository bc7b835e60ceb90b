//! Hue shift through 8-bit HSV, with the rounding of Pillow's conversions (torchvision's `adjust_hue` on PIL images).
//!
//! The hue is a byte, so a difference in the last bit before it is cut moves a channel by up to six gray levels: the
//! arithmetic keeps Pillow's mix of single and double precision. It is written without branches to be vectorized.

use pulp::Arch;

use super::planes::Planes;

/// Shifts the hue by `turns` in `[-0.5, 0.5]`.
pub fn adjust_hue(planes: &mut Planes, turns: f64) {
    let shift = shift_of(turns);
    let [red, green, blue] = planes.channels_mut();
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for ((red, green), blue) in red.iter_mut().zip(green).zip(blue) {
                let (hue, saturation, value) = to_hsv(*red, *green, *blue);
                [*red, *green, *blue] = to_rgb(hue.wrapping_add(shift), saturation, value);
            }
        },
    );
}

/// A shift in turns as what is added to the byte of the hue.
pub(super) fn shift_of(turns: f64) -> u8 {
    (turns * 255.0) as i32 as u8
}

#[inline(always)]
fn to_hsv(red: u8, green: u8, blue: u8) -> (u8, u8, u8) {
    let high = red.max(green).max(blue);
    let low = red.min(green).min(blue);
    let colorful = high != low;
    // the divisor of a gray pixel does not matter as long as it is not zero
    let range = f32::from(if colorful { high - low } else { 1 });
    let distance = |channel: u8| f32::from(high - channel) / range;
    let (from_red, from_green, from_blue) = (distance(red), distance(green), distance(blue));
    let of_red = from_blue - from_green;
    let of_green = (2.0 + f64::from(from_red) - f64::from(from_blue)) as f32;
    let of_blue = (4.0 + f64::from(from_green) - f64::from(from_red)) as f32;
    let sector = if red == high {
        of_red
    } else if green == high {
        of_green
    } else {
        of_blue
    };
    let turn = f64::from(sector) / 6.0 + 1.0;
    let turn = if turn >= 1.0 { turn - 1.0 } else { turn } as f32;
    let hue = whole_byte(f64::from(turn) * 255.0);
    let saturation = range / f32::from(high.max(1));
    let saturation = whole_byte(f64::from(saturation) * 255.0);
    if colorful { (hue, saturation, high) } else { (0, 0, high) }
}

#[inline(always)]
fn to_rgb(hue: u8, saturation: u8, value: u8) -> [u8; 3] {
    let position = f64::from(f32::from(hue)) * 6.0 / 255.0;
    let whole = position.floor();
    let fraction = (position - whole) as f32;
    // position 6 is a full turn
    let sector = whole_byte(if whole < 6.0 { whole } else { 0.0 });
    let strength = (f64::from(f32::from(saturation)) / 255.0) as f32;
    let level = f64::from(value);
    let round = |x: f64| whole_byte(x + 0.5);
    let p = round(level * (1.0 - f64::from(strength)));
    let q = round(level * (1.0 - f64::from(strength * fraction)));
    let t = round(level * (1.0 - f64::from(strength) * (1.0 - f64::from(fraction))));
    let pick = |of: [u8; 6]| {
        let mut chosen = of[0];
        for candidate in 1..6 {
            chosen = if sector == candidate { of[candidate as usize] } else { chosen };
        }
        chosen
    };
    let v = value;
    [pick([v, q, p, p, t, v]), pick([t, v, v, q, p, p]), pick([p, p, t, v, v, q])]
}

/// `x` in `[0, 256)`, cut to a whole number, by a way that vectorizes (see `color::whole_byte`).
#[inline(always)]
fn whole_byte(x: f64) -> u8 {
    const UNIT_IN_LAST_PLACE: f64 = (1u64 << 52) as f64;
    (x.floor() + UNIT_IN_LAST_PLACE).to_bits() as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn primary_colors_have_the_hues_of_pillow() {
        assert_eq!(to_hsv(255, 0, 0), (0, 255, 255));
        assert_eq!(to_hsv(0, 255, 0), (85, 255, 255));
        assert_eq!(to_hsv(0, 0, 255), (170, 255, 255));
        assert_eq!(to_hsv(9, 9, 9), (0, 0, 9));
        assert_eq!(to_hsv(0, 0, 0), (0, 0, 0));
    }

    #[test]
    fn gray_stays_gray() {
        for value in 0..=255 {
            assert_eq!(to_rgb(77, 0, value), [value; 3]);
        }
    }
}
