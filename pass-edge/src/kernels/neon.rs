//! NEON: bytes multiplied to 16 bits, where the products of 2 groups (8-bit weights: 2 · 127 · 128 < 2¹⁵) or 4 (7-bit weights:
//! 4 · 63 · 128 < 2¹⁵) are added before they go to 32 bits; 16-bit numbers multiplied and accumulated in 32 bits. Every
//! processor of this architecture has it, older Jetson boards nothing more.
#![expect(unsafe_code, reason = "vector instructions read through pointers")]

use core::arch::aarch64::*;

use super::{Arithmetic, I8Product, I16Product, PAIR, PANEL, QUAD, Work, row_blocks};
use crate::format::Mode;

/// The vector instructions that every aarch64 processor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Neon;

impl Arithmetic for Neon {
    #[inline(always)]
    fn vectorize<W: Work>(self, work: W) -> W::Output {
        work.run()
    }

    fn matmul_i8(self, product: I8Product<'_>) {
        let I8Product { a, weight, sums, panels } = product;
        let (depth, columns) = (a.depth, panels * PANEL);
        for panel in 0..panels {
            for (row, rows) in row_blocks(a.rows, 2) {
                // SAFETY: `I8Product` promises `rows·depth` activations, `panels·16·depth` weights within the limit of the mode
                // and `rows·columns` sums; `rows` rows exist from `row` on, and panel `panel` exists. NEON belongs to the
                // architecture.
                unsafe {
                    let weight = weight.as_ptr().add(panel * PANEL * depth).cast();
                    let sums = sums.as_mut_ptr().add(row * columns + panel * PANEL);
                    let first = a.bytes.as_ptr().add(row * depth);
                    match (rows, a.mode) {
                        (2, Mode::Exact) => i8_tile::<2, 2>(first, weight, depth, sums, columns),
                        (2, Mode::Fast) => i8_tile::<2, 4>(first, weight, depth, sums, columns),
                        (_, Mode::Exact) => i8_tile::<1, 2>(first, weight, depth, sums, columns),
                        (_, Mode::Fast) => i8_tile::<1, 4>(first, weight, depth, sums, columns),
                    }
                }
            }
        }
    }

    fn matmul_i16(self, product: I16Product<'_>) {
        matmul_i16(product);
    }
}

/// `ROWS` rows times a panel; the products of `GROUPS` groups are added in 16 bits.
///
/// # Safety
/// `a` is readable for `ROWS` rows of `depth`; `weight` for `16·depth`; `sums` writable for 16 elements in each of `ROWS` rows of
/// `columns`; `depth` is a multiple of `4·GROUPS`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn i8_tile<const ROWS: usize, const GROUPS: usize>(
    a: *const i8,
    weight: *const i8,
    depth: usize,
    sums: *mut i32,
    columns: usize,
) {
    // 2 columns a register, 2 partial sums each
    let mut acc = [[vdupq_n_s32(0); 8]; ROWS];
    for first in (0..depth / 4).step_by(GROUPS) {
        let mut quads = [[vdup_n_s8(0); GROUPS]; ROWS];
        for row in 0..ROWS {
            for group in 0..GROUPS {
                // SAFETY: 4 activations of row `row` from `4·(first + group) < depth` on.
                let quad = unsafe { a.add(row * depth + 4 * (first + group)).cast::<i32>().read_unaligned() };
                quads[row][group] = vreinterpret_s8_s32(vdup_n_s32(quad));
            }
        }
        for pair in 0..8 {
            let mut w = [vdup_n_s8(0); GROUPS];
            for group in 0..GROUPS {
                // SAFETY: 2 of the 16 columns of group `first + group`: 8 bytes.
                w[group] = unsafe { vld1_s8(weight.add((first + group) * QUAD + 8 * pair)) };
            }
            for row in 0..ROWS {
                let mut products = vmull_s8(w[0], quads[row][0]);
                for group in 1..GROUPS {
                    products = vmlal_s8(products, w[group], quads[row][group]);
                }
                acc[row][pair] = vpadalq_s16(acc[row][pair], products);
            }
        }
    }
    for row in 0..ROWS {
        for four in 0..4 {
            let sum = vpaddq_s32(acc[row][2 * four], acc[row][2 * four + 1]);
            // SAFETY: 16 sums are writable in row `row`.
            unsafe { vst1q_s32(sums.add(row * columns + 4 * four), sum) };
        }
    }
}

/// The product of 16-bit numbers, also for the kernels with more instructions for bytes.
pub(super) fn matmul_i16(product: I16Product<'_>) {
    let I16Product { a, stride, rows, b, sums } = product;
    let columns = b.panels * PANEL;
    let runs = (b.run, b.runs, b.run_stride);
    for panel in 0..b.panels {
        for (row, rows) in row_blocks(rows, 4) {
            // SAFETY: `I16Product` promises the rows, every group of every run of the panel, and the sums; `rows` rows exist
            // from `row` on. NEON belongs to the architecture.
            unsafe {
                let a = a.as_ptr().add(row * stride);
                let values = b.values.as_ptr().add(panel * b.panel_stride);
                let sums = sums.as_mut_ptr().add(row * columns + panel * PANEL);
                match rows {
                    1 => i16_tile::<1>(a, stride, values, runs, sums, columns),
                    2 => i16_tile::<2>(a, stride, values, runs, sums, columns),
                    3 => i16_tile::<3>(a, stride, values, runs, sums, columns),
                    _ => i16_tile::<4>(a, stride, values, runs, sums, columns),
                }
            }
        }
    }
}

/// `ROWS` rows times a panel.
///
/// # Safety
/// `a` is readable for `ROWS` rows, `stride` apart, of `2·run·runs` elements; `values` for `runs` runs, `run_stride` apart, of
/// `run` groups; `sums` writable for 16 elements in each of `ROWS` rows of `columns`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn i16_tile<const ROWS: usize>(
    a: *const i16,
    stride: usize,
    values: *const i16,
    (run, runs, run_stride): (usize, usize, usize),
    sums: *mut i32,
    columns: usize,
) {
    let mut acc = [[vdupq_n_s32(0); 4]; ROWS];
    for index in 0..runs {
        let (first, start) = (index * run, index * run_stride);
        for group in 0..run {
            for half in 0..2 {
                // SAFETY: 8 of the 16 columns of group `group < run`: 16 elements, the two of a column side by side.
                let b = unsafe { vld2q_s16(values.add(start + group * PAIR + 16 * half)) };
                for row in 0..ROWS {
                    // SAFETY: elements `2·(first + group)` and the next of row `row`, below `2·run·runs`.
                    let (even, odd) = unsafe {
                        let at = a.add(row * stride + 2 * (first + group));
                        (at.read(), at.add(1).read())
                    };
                    let [low, high] = [2 * half, 2 * half + 1];
                    acc[row][low] = vmlal_n_s16(acc[row][low], vget_low_s16(b.0), even);
                    acc[row][low] = vmlal_n_s16(acc[row][low], vget_low_s16(b.1), odd);
                    acc[row][high] = vmlal_high_n_s16(acc[row][high], b.0, even);
                    acc[row][high] = vmlal_high_n_s16(acc[row][high], b.1, odd);
                }
            }
        }
    }
    for row in 0..ROWS {
        for four in 0..4 {
            // SAFETY: 16 sums are writable in row `row`.
            unsafe { vst1q_s32(sums.add(row * columns + 4 * four), acc[row][four]) };
        }
    }
}
