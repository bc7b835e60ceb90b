//! Colors: of the page, of the markers, and one perceptually uniform scale from dark to light.

use std::sync::LazyLock;

/// Red, green, blue in sRGB.
pub type Rgb = [u8; 3];

/// Ground of a figure.
pub const PAPER: Rgb = [255, 255, 255];
/// Text.
pub const INK: Rgb = [28, 30, 36];
/// Less important text.
pub const FAINT: Rgb = [110, 114, 124];
/// Thin lines.
pub const LINE: Rgb = [214, 217, 223];
/// Ground behind what is left out.
pub const NIGHT: Rgb = [20, 22, 28];

/// Colors of the query patches, told apart by hue and lightness.
pub const QUERIES: [Rgb; 6] =
    [[255, 64, 64], [64, 196, 255], [255, 208, 0], [120, 230, 90], [255, 128, 230], [255, 150, 50]];

/// Colors the scale passes through, in OKLab: black, indigo, magenta, orange, pale yellow. The lightness grows all the way.
const ANCHORS: [[f32; 3]; 6] = [
    [0.06, 0.000, -0.010],
    [0.25, 0.040, -0.125],
    [0.42, 0.140, -0.070],
    [0.60, 0.165, 0.075],
    [0.79, 0.060, 0.150],
    [0.97, -0.025, 0.085],
];

/// Entries of the scale.
const STEPS: usize = 256;

static SCALE: LazyLock<[Rgb; STEPS]> = LazyLock::new(scale);

/// The color of a value in `[0, 1]`, dark to light; equal differences of the value are equal differences to the eye
/// (equal distances in OKLab). Values outside are cut, NaN is 0.
pub fn heat(value: f32) -> Rgb {
    let step = (value.clamp(0.0, 1.0) * (STEPS - 1) as f32).round();
    SCALE[if step.is_nan() { 0 } else { step as usize }]
}

/// Luma of a color, `[0, 255]` (ITU-R 601).
pub fn luma([red, green, blue]: Rgb) -> u8 {
    (0.299 * f32::from(red) + 0.587 * f32::from(green) + 0.114 * f32::from(blue)).round() as u8
}

/// A smooth curve through the anchors, walked in steps of equal length.
fn scale() -> [Rgb; STEPS] {
    const FINE: usize = 2048;
    let curve: Vec<[f32; 3]> = (0..=FINE).map(|i| through_anchors(i as f32 / FINE as f32)).collect();
    let mut length = vec![0.0];
    for pair in curve.windows(2) {
        length.push(length[length.len() - 1] + distance(pair[0], pair[1]));
    }
    let whole = length[FINE];
    std::array::from_fn(|step| {
        let wanted = whole * step as f32 / (STEPS - 1) as f32;
        to_srgb(curve[length.partition_point(|&l| l < wanted).min(FINE)])
    })
}

fn distance(a: [f32; 3], b: [f32; 3]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt()
}

/// Catmull-Rom spline over the anchors, `t` in `[0, 1]`.
fn through_anchors(t: f32) -> [f32; 3] {
    let pieces = ANCHORS.len() - 1;
    let place = t * pieces as f32;
    let piece = (place as usize).min(pieces - 1);
    let t = place - piece as f32;
    let at = |offset: usize| ANCHORS[(piece + offset).saturating_sub(1).min(pieces)];
    let points = [at(0), at(1), at(2), at(3)];
    std::array::from_fn(|channel| {
        let [a, b, c, d] = points.map(|point| point[channel]);
        let (linear, square, cube) = (c - a, 2.0 * a - 5.0 * b + 4.0 * c - d, 3.0 * b - a - 3.0 * c + d);
        b + 0.5 * t * (linear + t * (square + t * cube))
    })
}

/// OKLab to sRGB (Björn Ottosson's matrices), cut to what a screen can show.
fn to_srgb([lightness, a, b]: [f32; 3]) -> Rgb {
    let l = (lightness + 0.396_337_78 * a + 0.215_803_76 * b).powi(3);
    let m = (lightness - 0.105_561_346 * a - 0.063_854_17 * b).powi(3);
    let s = (lightness - 0.089_484_18 * a - 1.291_485_5 * b).powi(3);
    let linear = [
        4.076_741_7 * l - 3.307_711_6 * m + 0.230_969_93 * s,
        -1.268_438 * l + 2.609_757_4 * m - 0.341_319_4 * s,
        -0.004_196_086_3 * l - 0.703_418_6 * m + 1.707_614_7 * s,
    ];
    linear.map(|x| {
        let x = x.clamp(0.0, 1.0);
        let encoded = if x <= 0.003_130_8 { 12.92 * x } else { 1.055 * x.powf(1.0 / 2.4) - 0.055 };
        (encoded * 255.0).round() as u8
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to_oklab(color: Rgb) -> [f32; 3] {
        let [r, g, b] = color.map(|byte| {
            let x = f32::from(byte) / 255.0;
            if x <= 0.04045 { x / 12.92 } else { ((x + 0.055) / 1.055).powf(2.4) }
        });
        let l = (0.412_221_46 * r + 0.536_332_55 * g + 0.051_445_995 * b).cbrt();
        let m = (0.211_903_5 * r + 0.680_699_5 * g + 0.107_396_96 * b).cbrt();
        let s = (0.088_302_46 * r + 0.281_718_85 * g + 0.629_978_7 * b).cbrt();
        [
            0.210_454_26 * l + 0.793_617_8 * m - 0.004_072_047 * s,
            1.977_998_5 * l - 2.428_592_2 * m + 0.450_593_7 * s,
            0.025_904_037 * l + 0.782_771_77 * m - 0.808_675_77 * s,
        ]
    }

    #[test]
    fn the_scale_is_uniform_and_grows_lighter() {
        // sixteen strides: single steps are dominated by rounding to bytes
        let strides: Vec<[f32; 3]> = (0..=16).map(|i| to_oklab(heat(i as f32 / 16.0))).collect();
        let lengths: Vec<f32> = strides.windows(2).map(|pair| distance(pair[0], pair[1])).collect();
        let mean = lengths.iter().sum::<f32>() / 16.0;
        for (stride, length) in lengths.iter().enumerate() {
            assert!((length / mean - 1.0).abs() < 0.2, "stride {stride}: {length} of {mean}");
        }
        assert!(strides.windows(2).all(|pair| pair[1][0] > pair[0][0] + 0.02), "{strides:?}");
    }

    #[test]
    fn values_outside_are_cut() {
        assert_eq!(heat(-3.0), heat(0.0));
        assert_eq!(heat(7.0), heat(1.0));
        assert_eq!(heat(f32::NAN), heat(0.0));
        assert!(luma(heat(0.0)) < 12 && luma(heat(1.0)) > 230);
    }

    #[test]
    fn queries_differ() {
        for (i, a) in QUERIES.iter().enumerate() {
            for b in &QUERIES[i + 1..] {
                assert!(distance(to_oklab(*a), to_oklab(*b)) > 0.1, "{a:?} {b:?}");
            }
        }
    }
}
