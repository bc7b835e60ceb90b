//! `vpdpbusd` and `vpdpwssd` on 256-bit vectors: from AVX-VNNI (processors without AVX-512), or from AVX-512 VL and VNNI. Two
//! encodings of the same instructions, so one text, compiled for each. Weights are moved up by 128 on their way into
//! the register, because `vpdpbusd` takes unsigned times signed, and 128 times the sum of a row is taken off again.
#![expect(
    unsafe_code,
    reason = "vector instructions read through pointers and need a processor that has them"
)]

use core::arch::x86_64::*;

use super::{Arithmetic, I8Product, I16Product, PAIR, PANEL, Preparation, QUAD, Work, row_blocks};
use crate::format::Mode;

/// Proof that the processor has AVX2 and 8-bit dot products of 256-bit vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AvxVnni(Encoding);

/// Which of the two the processor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encoding {
    /// AVX-VNNI.
    Vex,
    /// AVX-512 VL and VNNI.
    Evex,
}

impl AvxVnni {
    /// The proof, if there is one: asked of the processor with feature `std`, else of the build.
    pub fn new() -> Option<Self> {
        #[cfg(feature = "std")]
        let (vex, evex) = (
            std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("avxvnni"),
            std::arch::is_x86_feature_detected!("avx2")
                && std::arch::is_x86_feature_detected!("avx512vl")
                && std::arch::is_x86_feature_detected!("avx512vnni"),
        );
        #[cfg(not(feature = "std"))]
        let (vex, evex) = (
            cfg!(all(target_feature = "avx2", target_feature = "avxvnni")),
            cfg!(all(target_feature = "avx2", target_feature = "avx512vl", target_feature = "avx512vnni")),
        );
        match (vex, evex) {
            (true, _) => Some(Self(Encoding::Vex)),
            (false, true) => Some(Self(Encoding::Evex)),
            (false, false) => None,
        }
    }

    /// The proof handed in by a caller who asked the processor in some other way.
    ///
    /// # Safety
    /// The processor has AVX2 and AVX-VNNI and the operating system saves their registers.
    pub const unsafe fn assume() -> Self {
        Self(Encoding::Vex)
    }
}

impl Arithmetic for AvxVnni {
    #[inline(always)]
    fn vectorize<W: Work>(self, work: W) -> W::Output {
        #[target_feature(enable = "avx2")]
        fn with_avx2<W: Work>(work: W) -> W::Output {
            work.run()
        }
        // SAFETY: `self` proves AVX2.
        unsafe { with_avx2(work) }
    }

    fn preparation(self, _mode: Mode) -> Preparation {
        Preparation::Sums
    }

    fn matmul_i8(self, product: I8Product<'_>) {
        // SAFETY: `self` proves the instructions of its encoding.
        unsafe {
            match self.0 {
                Encoding::Vex => vex::matmul_i8(product),
                Encoding::Evex => evex::matmul_i8(product),
            }
        }
    }

    fn matmul_i16(self, product: I16Product<'_>) {
        // SAFETY: `self` proves the instructions of its encoding.
        unsafe {
            match self.0 {
                Encoding::Vex => vex::matmul_i16(product),
                Encoding::Evex => evex::matmul_i16(product),
            }
        }
    }
}

macro_rules! products {
    ($encoding:ident, $features:literal, $dpbusd:ident, $dpwssd:ident) => {
        mod $encoding {
            use super::*;

            #[target_feature(enable = $features)]
            pub(super) fn matmul_i8(product: I8Product<'_>) {
                let I8Product { a, weight, sums, panels } = product;
                let (depth, columns) = (a.depth, panels * PANEL);
                for panel in 0..panels {
                    for (row, rows) in row_blocks(a.rows, 6) {
                        // SAFETY: `I8Product` promises `rows·depth` activations, `panels·16·depth` weights and
                        // `rows·columns` sums, and at most as many rows as there are row sums; `rows` rows exist from
                        // `row` on, and panel `panel` exists.
                        unsafe {
                            let row_sums = a.sums.as_ptr().add(row);
                            let a = a.bytes.as_ptr().add(row * depth);
                            let weight = weight.as_ptr().add(panel * PANEL * depth);
                            let sums = sums.as_mut_ptr().add(row * columns + panel * PANEL);
                            by_rows!(rows, i8_tile, (a, row_sums, weight, depth, sums, columns));
                        }
                    }
                }
            }

            /// `ROWS` rows times a panel.
            ///
            /// # Safety
            /// `a` is readable for `ROWS` rows of `depth`, `row_sums` for `ROWS` elements; `weight` for `16·depth`; `sums`
            /// writable for 16 elements in each of `ROWS` rows of `columns`; `depth` is a multiple of 4.
            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn i8_tile<const ROWS: usize>(
                a: *const i8,
                row_sums: *const i32,
                weight: *const u8,
                depth: usize,
                sums: *mut i32,
                columns: usize,
            ) {
                let mut acc = [[_mm256_setzero_si256(); 2]; ROWS];
                let sign = _mm256_set1_epi8(-128);
                for group in 0..depth / 4 {
                    // SAFETY: 64 bytes of group `group < depth/4`.
                    let w = unsafe {
                        let at = weight.add(group * QUAD);
                        [_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(32).cast())]
                    };
                    let w = [_mm256_xor_si256(w[0], sign), _mm256_xor_si256(w[1], sign)];
                    for row in 0..ROWS {
                        // SAFETY: 4 activations of row `row` from `4·group < depth` on.
                        let quad = unsafe { a.add(row * depth + 4 * group).cast::<i32>().read_unaligned() };
                        let quad = _mm256_set1_epi32(quad);
                        acc[row][0] = $dpbusd(acc[row][0], w[0], quad);
                        acc[row][1] = $dpbusd(acc[row][1], w[1], quad);
                    }
                }
                for row in 0..ROWS {
                    // SAFETY: `ROWS` sums of rows.
                    let excess = _mm256_set1_epi32(unsafe { *row_sums.add(row) }.wrapping_mul(128));
                    for half in 0..2 {
                        // SAFETY: 16 sums are writable in row `row`.
                        unsafe {
                            let at = sums.add(row * columns + 8 * half);
                            _mm256_storeu_si256(at.cast(), _mm256_sub_epi32(acc[row][half], excess));
                        }
                    }
                }
            }

            #[target_feature(enable = $features)]
            pub(super) fn matmul_i16(product: I16Product<'_>) {
                let I16Product { a, stride, rows, b, sums } = product;
                let columns = b.panels * PANEL;
                let runs = (b.run, b.runs, b.run_stride);
                for panel in 0..b.panels {
                    for (row, rows) in row_blocks(rows, 6) {
                        // SAFETY: `I16Product` promises the rows, every group of every run of the panel, and the sums; `rows`
                        // rows exist from `row` on.
                        unsafe {
                            let a = a.as_ptr().add(row * stride);
                            let values = b.values.as_ptr().add(panel * b.panel_stride);
                            let sums = sums.as_mut_ptr().add(row * columns + panel * PANEL);
                            by_rows!(rows, i16_tile, (a, stride, values, runs, sums, columns));
                        }
                    }
                }
            }

            /// `ROWS` rows times a panel.
            ///
            /// # Safety
            /// `a` is readable for `ROWS` rows, `stride` apart, of `2·run·runs` elements; `values` for `runs` runs,
            /// `run_stride` apart, of `run` groups; `sums` writable for 16 elements in each of `ROWS` rows of `columns`.
            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn i16_tile<const ROWS: usize>(
                a: *const i16,
                stride: usize,
                values: *const i16,
                (run, runs, run_stride): (usize, usize, usize),
                sums: *mut i32,
                columns: usize,
            ) {
                let mut acc = [[_mm256_setzero_si256(); 2]; ROWS];
                for index in 0..runs {
                    let (first, start) = (index * run, index * run_stride);
                    for group in 0..run {
                        // SAFETY: group `group < run` of a run: 32 elements.
                        let b = unsafe {
                            let at = values.add(start + group * PAIR);
                            [_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(16).cast())]
                        };
                        for row in 0..ROWS {
                            // SAFETY: elements `2·(first + group)` and the next of row `row`, below `2·run·runs`.
                            let pair = unsafe {
                                a.add(row * stride + 2 * (first + group)).cast::<i32>().read_unaligned()
                            };
                            let pair = _mm256_set1_epi32(pair);
                            acc[row][0] = $dpwssd(acc[row][0], b[0], pair);
                            acc[row][1] = $dpwssd(acc[row][1], b[1], pair);
                        }
                    }
                }
                for row in 0..ROWS {
                    // SAFETY: 16 sums are writable in row `row`.
                    unsafe {
                        let at = sums.add(row * columns);
                        _mm256_storeu_si256(at.cast(), acc[row][0]);
                        _mm256_storeu_si256(at.add(8).cast(), acc[row][1]);
                    }
                }
            }
        }
    };
}

products!(vex, "avx2,avxvnni", _mm256_dpbusd_avx_epi32, _mm256_dpwssd_avx_epi32);
products!(evex, "avx2,avx512vl,avx512vnni", _mm256_dpbusd_epi32, _mm256_dpwssd_epi32);
