//! Gaussian blur as Pillow computes it: three box blurs of fractional width, first along rows, then along columns,
//! each rounded to bytes.

use pulp::Arch;

use super::planes::Planes;

/// Box blurs that stand for one Gaussian (Pillow's constant).
pub(super) const PASSES: u32 = 3;

/// Blurs with a Gaussian of standard deviation `radius` pixels (Pillow's `ImageFilter.GaussianBlur`). `scratch` is
/// any image; its buffer is reused.
pub fn gaussian_blur(planes: &mut Planes, radius: f64, scratch: &mut Planes) {
    let kernel = BoxKernel::of_gaussian(radius);
    let (width, height) = (planes.width(), planes.height());
    if width == 0 || height == 0 || kernel.changes_nothing() {
        return;
    }
    scratch.resize(width, height);
    for _ in 0..PASSES {
        kernel.along_rows(planes.data(), scratch.data_mut(), width);
        std::mem::swap(planes, scratch);
    }
    for _ in 0..PASSES {
        let pairs = planes.data().chunks_exact(width * height);
        for (from, to) in pairs.zip(scratch.data_mut().chunks_exact_mut(width * height)) {
            kernel.along_columns(from, to, width);
        }
        std::mem::swap(planes, scratch);
    }
}

/// The radius of the box whose `passes`-fold repetition has the variance of a Gaussian of standard deviation
/// `radius` (Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering").
fn box_radius(radius: f32, passes: u32) -> f32 {
    let variance = radius * radius / passes as f32;
    let length = (12.0 * f64::from(variance) + 1.0).sqrt() as f32;
    let whole = ((f64::from(length) - 1.0) / 2.0).floor() as f32;
    let numerator = (2.0 * whole + 1.0) * (whole * (whole + 1.0) - 3.0 * variance);
    whole + numerator / (6.0 * (variance - (whole + 1.0) * (whole + 1.0)))
}

/// A box of `2 * reach + 1` pixels of weight `center` and one more at each end of weight `edge`, in units of `2^-24`.
#[derive(Clone, Copy, Debug)]
pub(super) struct BoxKernel {
    pub(super) reach: usize,
    pub(super) center: u32,
    pub(super) edge: u32,
}

impl BoxKernel {
    /// The box of which [`PASSES`] in a row stand for a Gaussian of standard deviation `radius`.
    pub(super) fn of_gaussian(radius: f64) -> Self {
        Self::new(box_radius(radius as f32, PASSES))
    }

    /// True if the box is one pixel.
    pub(super) fn changes_nothing(self) -> bool {
        self.edge == 0 && self.reach == 0
    }

    fn new(radius: f32) -> Self {
        let reach = radius as usize;
        // single precision as in Pillow: the last bit of the weight decides where a sum is half-way between two bytes
        let center = ((1 << 24) as f32 / (radius * 2.0 + 1.0)) as u32;
        let edge = (1u32 << 24).saturating_sub((reach as u32 * 2 + 1) * center) / 2;
        Self { reach, center, edge }
    }

    #[inline(always)]
    fn round(self, inner: u32, ends: u32) -> u8 {
        ((inner * self.center + ends * self.edge + (1 << 23)) >> 24) as u8
    }

    /// Blurs every row of `width` pixels; the outermost pixels repeat.
    fn along_rows(self, from: &[u8], to: &mut [u8], width: usize) {
        let margin = self.reach + 1;
        let mut padded = vec![0; width + 2 * margin];
        for (from, to) in from.chunks_exact(width).zip(to.chunks_exact_mut(width)) {
            padded[..margin].fill(from[0]);
            padded[margin..margin + width].copy_from_slice(from);
            padded[margin + width..].fill(from[width - 1]);
            self.weigh(|offset| &padded[offset..offset + width], to);
        }
    }

    /// Blurs every column of a plane whose rows hold `width` pixels; the outermost rows repeat.
    fn along_columns(self, from: &[u8], to: &mut [u8], width: usize) {
        let height = from.len() / width;
        for (row, to) in to.chunks_exact_mut(width).enumerate() {
            let line = |offset: usize| {
                let row = (row + offset).saturating_sub(self.reach + 1).min(height - 1);
                &from[row * width..(row + 1) * width]
            };
            self.weigh(line, to);
        }
    }

    /// The weighted sum of the `2 * reach + 3` equally long lines `line(0)..`, rounded.
    fn weigh<'a>(self, line: impl Fn(usize) -> &'a [u8], to: &mut [u8]) {
        let last = 2 * self.reach + 2;
        let arch = Arch::new();
        match self.reach {
            0 => arch.dispatch(
                #[inline(always)]
                || {
                    let to = to; // moved: see `planes`
                    self.weigh_three(line(0), line(1), line(2), to);
                },
            ),
            1 => arch.dispatch(
                #[inline(always)]
                || {
                    let to = to; // moved: see `planes`
                    self.weigh_five([line(0), line(1), line(2), line(3), line(4)], to);
                },
            ),
            _ => {
                for (column, to) in to.iter_mut().enumerate() {
                    let inner = (1..last).map(|offset| u32::from(line(offset)[column])).sum();
                    let ends = u32::from(line(0)[column]) + u32::from(line(last)[column]);
                    *to = self.round(inner, ends);
                }
            }
        }
    }

    #[inline(always)]
    fn weigh_three(self, before: &[u8], at: &[u8], after: &[u8], to: &mut [u8]) {
        for (((to, &a), &b), &c) in to.iter_mut().zip(before).zip(at).zip(after) {
            *to = self.round(u32::from(b), u32::from(a) + u32::from(c));
        }
    }

    #[inline(always)]
    fn weigh_five(self, [first, before, at, after, last]: [&[u8]; 5], to: &mut [u8]) {
        let lines = to.iter_mut().zip(first).zip(before).zip(at).zip(after).zip(last);
        for (((((to, &a), &b), &c), &d), &e) in lines {
            *to = self.round(u32::from(b) + u32::from(c) + u32::from(d), u32::from(a) + u32::from(e));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_add_up_to_one() {
        for radius in [0.01f32, 0.1, 0.5, 0.99, 1.0, 1.3, 2.7, 5.0] {
            let kernel = BoxKernel::new(radius);
            let sum = kernel.center * (2 * kernel.reach as u32 + 1) + 2 * kernel.edge;
            assert!((1 << 24) - sum <= 1, "radius {radius}: {kernel:?}");
        }
    }

    #[test]
    fn three_boxes_have_the_variance_of_the_gaussian() {
        for sigma in [0.3f32, 0.7, 1.2, 2.0, 4.0] {
            let kernel = BoxKernel::new(box_radius(sigma, 3));
            let unit = f64::from(1 << 24);
            let inner: usize = (1..=kernel.reach).map(|x| 2 * x * x).sum();
            let end = (kernel.reach + 1) as f64;
            let variance = inner as f64 * f64::from(kernel.center) / unit
                + 2.0 * end * end * f64::from(kernel.edge) / unit;
            assert!((3.0 * variance - f64::from(sigma * sigma)).abs() < 1e-3, "sigma {sigma}: {variance}");
        }
    }

    #[test]
    fn a_flat_image_stays_flat_at_any_radius_and_size() {
        for (width, height) in [(1, 1), (1, 7), (9, 2), (40, 40)] {
            for radius in [0.0, 0.1, 0.9, 2.0, 3.0, 9.0] {
                let mut planes = Planes::from_interleaved(width, height, &vec![255; 3 * width * height]);
                gaussian_blur(&mut planes, radius, &mut Planes::default());
                assert!(planes.data().iter().all(|&byte| byte == 255), "{width}x{height} radius {radius}");
            }
        }
    }

    #[test]
    fn the_specialized_loops_agree_with_the_general_one() {
        let line: Vec<u8> = (0..97u32).map(|x| (x * x * 37 % 251) as u8).collect();
        for radius in [0.2f32, 0.8, 1.0, 1.6] {
            let kernel = BoxKernel::new(radius);
            let mut fast = vec![0; line.len()];
            kernel.along_rows(&line, &mut fast, line.len());
            for (x, &found) in fast.iter().enumerate() {
                let at =
                    |dx: isize| u32::from(line[(x as isize + dx).clamp(0, line.len() as isize - 1) as usize]);
                let reach = kernel.reach as isize;
                let inner = (-reach..=reach).map(at).sum();
                assert_eq!(found, kernel.round(inner, at(-reach - 1) + at(reach + 1)));
            }
        }
    }
}
