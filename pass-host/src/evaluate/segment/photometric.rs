//! The photometric distortion of mmsegmentation: brightness, contrast, saturation and hue of 8-bit pixels, with
//! OpenCV's conventions for HSV (hue in half degrees, 0 to 179).

use crate::random::Stream;

/// Largest change of brightness.
const BRIGHTNESS: f64 = 32.0;
/// Range of the factors of contrast and saturation.
const FACTOR: [f64; 2] = [0.5, 1.5];
/// Largest change of hue, in half degrees (excluded above, as in NumPy's `randint`).
const HUE: i64 = 18;
/// Hues of a full turn.
const TURN: i64 = 180;

/// Everything random about one distortion; what is nothing is left out.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Distortion {
    brightness: Option<f64>,
    contrast: Option<f64>,
    /// Contrast changes before saturation and hue rather than after them.
    contrast_first: bool,
    saturation: Option<f64>,
    hue: Option<i64>,
}

impl Distortion {
    /// Draws one: each of the four with probability ½. Every draw is made whether it is used or not.
    pub fn draw(stream: &mut Stream) -> Self {
        let mut some = |value: f64| stream.chance(0.5).then_some(value);
        let used = [some(0.0), some(0.0), some(0.0), some(0.0)].map(|drawn| drawn.is_some());
        let brightness = stream.range(-BRIGHTNESS, BRIGHTNESS);
        let [contrast, saturation] = [0; 2].map(|_| stream.range(FACTOR[0], FACTOR[1]));
        let hue = stream.below(2 * HUE as u64) as i64 - HUE;
        Self {
            brightness: used[0].then_some(brightness),
            contrast: used[1].then_some(contrast),
            contrast_first: stream.chance(0.5),
            saturation: used[2].then_some(saturation),
            hue: used[3].then_some(hue),
        }
    }

    /// Changes interleaved RGB pixels.
    pub fn apply(&self, pixels: &mut [u8]) {
        if let Some(delta) = self.brightness {
            convert(pixels, 1.0, delta);
        }
        if let (Some(factor), true) = (self.contrast, self.contrast_first) {
            convert(pixels, factor, 0.0);
        }
        if self.saturation.is_some() || self.hue.is_some() {
            for pixel in pixels.as_chunks_mut::<3>().0 {
                let [mut hue, mut saturation, value] = to_hsv(*pixel);
                if let Some(factor) = self.saturation {
                    saturation = scaled(saturation, factor, 0.0);
                }
                if let Some(shift) = self.hue {
                    hue = (i64::from(hue) + shift).rem_euclid(TURN) as u8;
                }
                *pixel = to_rgb([hue, saturation, value]);
            }
        }
        if let (Some(factor), false) = (self.contrast, self.contrast_first) {
            convert(pixels, factor, 0.0);
        }
    }
}

fn convert(pixels: &mut [u8], factor: f64, delta: f64) {
    let table: [u8; 256] = std::array::from_fn(|value| scaled(value as u8, factor, delta));
    pixels.iter_mut().for_each(|pixel| *pixel = table[usize::from(*pixel)]);
}

/// `value · factor + delta` within 0 to 255, cut to a whole number as NumPy's `astype` does.
fn scaled(value: u8, factor: f64, delta: f64) -> u8 {
    (f64::from(value) * factor + delta).clamp(0.0, 255.0) as u8
}

fn to_hsv([r, g, b]: [u8; 3]) -> [u8; 3] {
    let value = r.max(g).max(b);
    let chroma = f64::from(value - r.min(g).min(b));
    if chroma == 0.0 {
        return [0, 0, value];
    }
    let [r, g, b] = [r, g, b].map(f64::from);
    let top = f64::from(value);
    let sixth = if top == r {
        (g - b) / chroma
    } else if top == g {
        2.0 + (b - r) / chroma
    } else {
        4.0 + (r - g) / chroma
    };
    let hue = (sixth * TURN as f64 / 6.0).round() as i64;
    [hue.rem_euclid(TURN) as u8, (255.0 * chroma / top).round() as u8, value]
}

fn to_rgb([hue, saturation, value]: [u8; 3]) -> [u8; 3] {
    let (saturation, value) = (f64::from(saturation) / 255.0, f64::from(value));
    let sixth = f64::from(hue) * 6.0 / TURN as f64;
    let channel = |offset: f64| {
        let k = (offset + sixth) % 6.0;
        (value - value * saturation * k.min(4.0 - k).clamp(0.0, 1.0)).round() as u8
    };
    [channel(5.0), channel(3.0), channel(1.0)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Purpose;

    #[test]
    fn colors_have_the_hues_of_opencv() {
        // cv2.cvtColor(…, COLOR_RGB2HSV)
        for (rgb, hsv) in [
            ([255, 0, 0], [0, 255, 255]),
            ([0, 255, 0], [60, 255, 255]),
            ([0, 0, 255], [120, 255, 255]),
            ([255, 255, 255], [0, 0, 255]),
            ([0, 0, 0], [0, 0, 0]),
            ([128, 64, 64], [0, 128, 128]),
            ([10, 200, 100], [74, 242, 200]),
            ([255, 0, 128], [165, 255, 255]),
        ] {
            assert_eq!(to_hsv(rgb), hsv, "{rgb:?}");
        }
    }

    #[test]
    fn there_and_back_changes_little() {
        for r in (0..=255).step_by(15) {
            for g in (0..=255).step_by(15) {
                for b in (0..=255).step_by(15) {
                    let rgb = [r as u8, g as u8, b as u8];
                    let back = to_rgb(to_hsv(rgb));
                    // a hue step is 1/30 of a side of the color hexagon: half of one is up to 255/60 levels
                    let far = rgb.iter().zip(back).any(|(a, b)| a.abs_diff(b) > 6);
                    assert!(!far, "{rgb:?} became {back:?}");
                }
            }
        }
    }

    #[test]
    fn each_change_is_its_formula() {
        let mut pixels = [10, 100, 250];
        Distortion { brightness: Some(-20.5), ..Distortion::default() }.apply(&mut pixels);
        assert_eq!(pixels, [0, 79, 229]);
        let mut pixels = [10, 101, 250];
        Distortion { contrast: Some(1.5), ..Distortion::default() }.apply(&mut pixels);
        assert_eq!(pixels, [15, 151, 255]);
        let mut pixels = [255, 0, 0];
        Distortion { hue: Some(-60), ..Distortion::default() }.apply(&mut pixels);
        assert_eq!(pixels, [0, 0, 255]);
        let mut pixels = [200, 100, 100];
        Distortion { saturation: Some(0.5), ..Distortion::default() }.apply(&mut pixels);
        assert_eq!(pixels, [200, 150, 150]);
    }

    #[test]
    fn draws_stay_in_their_ranges() {
        let mut stream = Stream::new(0, Purpose::Augment, &[]);
        let drawn: Vec<Distortion> = (0..400).map(|_| Distortion::draw(&mut stream)).collect();
        let used = |field: &dyn Fn(&Distortion) -> bool| drawn.iter().filter(|d| field(d)).count();
        for count in [
            used(&|d| d.brightness.is_some_and(|b| b.abs() <= BRIGHTNESS)),
            used(&|d| d.contrast.is_some_and(|c| (0.5..1.5).contains(&c))),
            used(&|d| d.saturation.is_some_and(|s| (0.5..1.5).contains(&s))),
            used(&|d| d.hue.is_some_and(|h| (-HUE..HUE).contains(&h))),
            used(&|d| d.contrast_first),
        ] {
            assert!((140..=260).contains(&count), "{count} of 400");
        }
    }
}
