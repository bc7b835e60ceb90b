//! AVX-512 VNNI: `vpdpbusd` multiplies unsigned by signed bytes, so weights are moved up by 128 on their way into the
//! register and 128 times the sum of a row is taken off again. `vpdpwssd` multiplies 16-bit numbers. Both are exact.
#![expect(
    unsafe_code,
    reason = "vector instructions read through pointers and need a processor that has them"
)]

use core::arch::asm;
use core::arch::x86_64::*;

use super::{Arithmetic, I8Product, I16Product, PAIR, PANEL, Preparation, QUAD, Work, row_blocks};
use crate::format::Mode;

/// Proof that the processor has AVX-512 F, BW, DQ, VL and VNNI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx512Vnni(());

impl Avx512Vnni {
    /// The proof, if there is one: asked of the processor with feature `std`, else of the build.
    pub fn new() -> Option<Self> {
        #[cfg(feature = "std")]
        let present = std::arch::is_x86_feature_detected!("avx512f")
            && std::arch::is_x86_feature_detected!("avx512bw")
            && std::arch::is_x86_feature_detected!("avx512dq")
            && std::arch::is_x86_feature_detected!("avx512vl")
            && std::arch::is_x86_feature_detected!("avx512vnni");
        #[cfg(not(feature = "std"))]
        let present = cfg!(all(
            target_feature = "avx512f",
            target_feature = "avx512bw",
            target_feature = "avx512dq",
            target_feature = "avx512vl",
            target_feature = "avx512vnni"
        ));
        present.then_some(Self(()))
    }

    /// The proof handed in by a caller who asked the processor in some other way.
    ///
    /// # Safety
    /// The processor has AVX-512 F, BW, DQ, VL and VNNI and the operating system saves its registers.
    pub const unsafe fn assume() -> Self {
        Self(())
    }
}

impl Arithmetic for Avx512Vnni {
    #[inline(always)]
    fn vectorize<W: Work>(self, work: W) -> W::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
        fn with_avx512<W: Work>(work: W) -> W::Output {
            work.run()
        }
        // SAFETY: `self` proves these features.
        unsafe { with_avx512(work) }
    }

    fn preparation(self, _mode: Mode) -> Preparation {
        Preparation::Sums
    }

    fn matmul_i8(self, product: I8Product<'_>) {
        // SAFETY: `self` proves these features.
        unsafe { matmul_i8(product) }
    }

    fn matmul_i16(self, product: I16Product<'_>) {
        // SAFETY: `self` proves these features.
        unsafe { matmul_i16(product) }
    }
}

/// Calls `$tile::<ROWS, $panels>` for the number of rows of a block.
macro_rules! by_rows {
    ($rows:expr, $tile:ident, $panels:literal, $arguments:tt) => {
        match $rows {
            1 => $tile::<1, $panels> $arguments,
            2 => $tile::<2, $panels> $arguments,
            3 => $tile::<3, $panels> $arguments,
            4 => $tile::<4, $panels> $arguments,
            5 => $tile::<5, $panels> $arguments,
            6 => $tile::<6, $panels> $arguments,
            7 => $tile::<7, $panels> $arguments,
            _ => $tile::<8, $panels> $arguments,
        }
    };
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn matmul_i8(product: I8Product<'_>) {
    let I8Product { a, weight, sums, panels } = product;
    let (depth, columns) = (a.depth, panels * PANEL);
    for panel in (0..panels).step_by(2) {
        for (row, rows) in row_blocks(a.rows, 8) {
            // SAFETY: `I8Product` promises `rows·depth` activations, `panels·16·depth` weights and `rows·columns` sums, and
            // at most as many rows as there are row sums; `rows` rows exist from `row` on, and 2 panels, or the last, from
            // `panel` on.
            unsafe {
                let row_sums = a.sums.as_ptr().add(row);
                let a = a.bytes.as_ptr().add(row * depth);
                let weight = weight.as_ptr().add(panel * PANEL * depth);
                let sums = sums.as_mut_ptr().add(row * columns + panel * PANEL);
                if panels - panel >= 2 {
                    by_rows!(rows, i8_tile, 2, (a, row_sums, weight, depth, sums, columns));
                } else {
                    by_rows!(rows, i8_tile, 1, (a, row_sums, weight, depth, sums, columns));
                }
            }
        }
    }
}

/// `ROWS` rows times `PANELS` panels.
///
/// # Safety
/// `a` is readable for `ROWS` rows of `depth`, `row_sums` for `ROWS` elements; `weight` for `PANELS` panels of `16·depth`;
/// `sums` writable for `16·PANELS` elements in each of `ROWS` rows of `columns`; `depth` is a multiple of 4.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn i8_tile<const ROWS: usize, const PANELS: usize>(
    a: *const i8,
    row_sums: *const i32,
    weight: *const u8,
    depth: usize,
    sums: *mut i32,
    columns: usize,
) {
    let mut acc = [[_mm512_setzero_si512(); PANELS]; ROWS];
    let sign = _mm512_set1_epi8(-128);
    for group in 0..depth / 4 {
        let mut w = [_mm512_setzero_si512(); PANELS];
        for panel in 0..PANELS {
            // SAFETY: group `group < depth/4` of panel `panel`: 64 bytes.
            let signed =
                unsafe { _mm512_loadu_si512(weight.add(panel * PANEL * depth + group * QUAD).cast()) };
            w[panel] = _mm512_xor_si512(signed, sign);
        }
        for row in 0..ROWS {
            // SAFETY: 4 activations of row `row` from `4·group < depth` on.
            let quad = unsafe { a.add(row * depth + 4 * group).cast::<i32>().read_unaligned() };
            let quad = _mm512_set1_epi32(quad);
            for panel in 0..PANELS {
                acc[row][panel] = _mm512_dpbusd_epi32(acc[row][panel], w[panel], quad);
            }
        }
    }
    for row in 0..ROWS {
        // SAFETY: `ROWS` sums of rows.
        let excess = _mm512_set1_epi32(unsafe { *row_sums.add(row) }.wrapping_mul(128));
        for panel in 0..PANELS {
            // SAFETY: 16 sums of panel `panel` are writable in row `row`.
            unsafe {
                let at = sums.add(row * columns + panel * PANEL);
                _mm512_storeu_si512(at.cast(), _mm512_sub_epi32(acc[row][panel], excess));
            }
        }
    }
}

/// `acc[i] += b[2·i]·pair[2·i] + b[2·i + 1]·pair[2·i + 1]`. Of the intrinsic the compiler makes a product and an addition,
/// which is half as fast here.
macro_rules! dpwssd {
    ($acc:expr, $b:expr, $pair:expr) => {
        // SAFETY: an operation on registers alone; the enclosing function enables `avx512vnni`.
        unsafe {
            asm!(
                "vpdpwssd {acc}, {b}, {pair}",
                acc = inout(zmm_reg) $acc,
                b = in(zmm_reg) $b,
                pair = in(zmm_reg) $pair,
                options(pure, nomem, nostack, preserves_flags)
            )
        }
    };
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn matmul_i16(product: I16Product<'_>) {
    let I16Product { a, stride, rows, b, sums } = product;
    let columns = b.panels * PANEL;
    let runs = (b.run, b.runs, b.run_stride);
    for panel in (0..b.panels).step_by(2) {
        for (row, rows) in row_blocks(rows, 8) {
            // SAFETY: `I16Product` promises the rows, every group of every run of every panel, and the sums; `rows` rows
            // exist from `row` on, and 2 panels, or the last, from `panel` on.
            unsafe {
                let a = a.as_ptr().add(row * stride);
                let values = b.values.as_ptr().add(panel * b.panel_stride);
                let sums = sums.as_mut_ptr().add(row * columns + panel * PANEL);
                if b.panels - panel >= 2 {
                    by_rows!(rows, i16_tile, 2, (a, stride, values, b.panel_stride, runs, sums, columns));
                } else {
                    by_rows!(rows, i16_tile, 1, (a, stride, values, b.panel_stride, runs, sums, columns));
                }
            }
        }
    }
}

/// `ROWS` rows times `PANELS` panels.
///
/// # Safety
/// `a` is readable for `ROWS` rows, `stride` apart, of `2·run·runs` elements; `values` for `PANELS` panels, `panel_stride` apart,
/// of `runs` runs, `run_stride` apart, of `run` groups; `sums` writable for `16·PANELS` elements in each of `ROWS` rows of
/// `columns`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn i16_tile<const ROWS: usize, const PANELS: usize>(
    a: *const i16,
    stride: usize,
    values: *const i16,
    panel_stride: usize,
    (run, runs, run_stride): (usize, usize, usize),
    sums: *mut i32,
    columns: usize,
) {
    let mut acc = [[_mm512_setzero_si512(); PANELS]; ROWS];
    for index in 0..runs {
        let (first, start) = (index * run, index * run_stride);
        for group in 0..run {
            let mut b = [_mm512_setzero_si512(); PANELS];
            for panel in 0..PANELS {
                // SAFETY: group `group < run` of a run of panel `panel`: 32 elements.
                b[panel] = unsafe {
                    _mm512_loadu_si512(values.add(panel * panel_stride + start + group * PAIR).cast())
                };
            }
            for row in 0..ROWS {
                // SAFETY: elements `2·(first + group)` and the next of row `row`, below `2·run·runs`.
                let pair =
                    unsafe { a.add(row * stride + 2 * (first + group)).cast::<i32>().read_unaligned() };
                let pair = _mm512_set1_epi32(pair);
                for panel in 0..PANELS {
                    dpwssd!(acc[row][panel], b[panel], pair);
                }
            }
        }
    }
    for row in 0..ROWS {
        for panel in 0..PANELS {
            // SAFETY: 16 sums of panel `panel` are writable in row `row`.
            unsafe { _mm512_storeu_si512(sums.add(row * columns + panel * PANEL).cast(), acc[row][panel]) };
        }
    }
}
