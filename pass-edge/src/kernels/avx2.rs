//! AVX2. 8-bit weights: both sides widened to 16 bits, multiplied with `vpmaddwd`. 7-bit weights: moved up by 64, which makes
//! them unsigned, and multiplied as bytes with `vpmaddubsw`, whose 16-bit sums of two products cannot overflow
//! (2 · 127 · 128 < 2¹⁵); 64 times the sum of a row is taken off again. Both are exact.
#![expect(
    unsafe_code,
    reason = "vector instructions read through pointers and need a processor that has them"
)]

use core::arch::x86_64::*;

use super::{Arithmetic, I8Product, I16Product, PAIR, PANEL, Preparation, QUAD, Work, row_blocks};
use crate::format::Mode;

/// Proof that the processor has AVX2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx2(());

impl Avx2 {
    /// The proof, if there is one: asked of the processor with feature `std`, else of the build.
    pub fn new() -> Option<Self> {
        #[cfg(feature = "std")]
        let present = std::arch::is_x86_feature_detected!("avx2");
        #[cfg(not(feature = "std"))]
        let present = cfg!(target_feature = "avx2");
        present.then_some(Self(()))
    }

    /// The proof handed in by a caller who asked the processor in some other way.
    ///
    /// # Safety
    /// The processor has AVX2 and the operating system saves its registers.
    pub const unsafe fn assume() -> Self {
        Self(())
    }
}

impl Arithmetic for Avx2 {
    #[inline(always)]
    fn vectorize<W: Work>(self, work: W) -> W::Output {
        #[target_feature(enable = "avx2")]
        fn with_avx2<W: Work>(work: W) -> W::Output {
            work.run()
        }
        // SAFETY: `self` proves AVX2.
        unsafe { with_avx2(work) }
    }

    fn preparation(self, mode: Mode) -> Preparation {
        match mode {
            Mode::Exact => Preparation::Words,
            Mode::Fast => Preparation::Sums,
        }
    }

    fn matmul_i8(self, product: I8Product<'_>) {
        // SAFETY: `self` proves AVX2.
        unsafe {
            match product.a.mode {
                Mode::Exact => matmul_i8(product),
                Mode::Fast => matmul_i7(product),
            }
        }
    }

    fn matmul_i16(self, product: I16Product<'_>) {
        // SAFETY: `self` proves AVX2.
        unsafe { matmul_i16(product) }
    }
}

#[target_feature(enable = "avx2")]
fn matmul_i8(product: I8Product<'_>) {
    let I8Product { a, weight, sums, panels } = product;
    let (depth, columns) = (a.depth, panels * PANEL);
    // half a panel at a time: 6 rows of 2 sums leave registers for weights and activations
    for half in 0..2 * panels {
        for (row, rows) in row_blocks(a.rows, 6) {
            // SAFETY: `I8Product` promises `rows·depth` activations as words, `panels·16·depth` weights and `rows·columns`
            // sums; `rows` rows exist from `row` on, and the half panel lies inside panel `half/2`.
            unsafe {
                let a = a.words.as_ptr().add(row * depth);
                let weight = weight.as_ptr().add(half / 2 * PANEL * depth + half % 2 * (QUAD / 2));
                let sums = sums.as_mut_ptr().add(row * columns + half * (PANEL / 2));
                by_rows!(rows, i8_tile, (a, weight, depth, sums, columns));
            }
        }
    }
}

/// `ROWS` rows times 8 columns.
///
/// # Safety
/// `a` is readable for `ROWS` rows of `depth`; `weight` for 32 bytes in each of `depth/4` groups of 64; `sums` writable for
/// 8 elements in each of `ROWS` rows of `columns`; `depth` is a multiple of 4.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn i8_tile<const ROWS: usize>(
    a: *const i16,
    weight: *const u8,
    depth: usize,
    sums: *mut i32,
    columns: usize,
) {
    // 4 columns a register, 2 partial sums each
    let mut acc = [[_mm256_setzero_si256(); 2]; ROWS];
    for group in 0..depth / 4 {
        // SAFETY: 32 bytes of group `group < depth/4`.
        let w = unsafe {
            let at = weight.add(group * QUAD);
            [
                _mm256_cvtepi8_epi16(_mm_loadu_si128(at.cast())),
                _mm256_cvtepi8_epi16(_mm_loadu_si128(at.add(16).cast())),
            ]
        };
        for row in 0..ROWS {
            // SAFETY: 4 activations of row `row` from `4·group < depth` on.
            let quad = unsafe { a.add(row * depth + 4 * group).cast::<i64>().read_unaligned() };
            let quad = _mm256_set1_epi64x(quad);
            acc[row][0] = _mm256_add_epi32(acc[row][0], _mm256_madd_epi16(quad, w[0]));
            acc[row][1] = _mm256_add_epi32(acc[row][1], _mm256_madd_epi16(quad, w[1]));
        }
    }
    for row in 0..ROWS {
        // horizontal addition within 128 bits gives columns 0 1 4 5 2 3 6 7
        let mixed = _mm256_hadd_epi32(acc[row][0], acc[row][1]);
        let ordered = _mm256_permute4x64_epi64::<0b11_01_10_00>(mixed);
        // SAFETY: 8 sums are writable in row `row`.
        unsafe { _mm256_storeu_si256(sums.add(row * columns).cast(), ordered) };
    }
}

/// 7-bit weights.
#[target_feature(enable = "avx2")]
fn matmul_i7(product: I8Product<'_>) {
    let I8Product { a, weight, sums, panels } = product;
    let (depth, columns) = (a.depth, panels * PANEL);
    for panel in 0..panels {
        for (row, rows) in row_blocks(a.rows, 4) {
            // SAFETY: `I8Product` promises `rows·depth` activations, `panels·16·depth` weights and `rows·columns` sums, and
            // at most as many rows as there are row sums; `rows` rows exist from `row` on, and panel `panel` exists.
            unsafe {
                let row_sums = a.sums.as_ptr().add(row);
                let a = a.bytes.as_ptr().add(row * depth);
                let weight = weight.as_ptr().add(panel * PANEL * depth);
                let sums = sums.as_mut_ptr().add(row * columns + panel * PANEL);
                by_rows!(rows, i7_tile, (a, row_sums, weight, depth, sums, columns));
            }
        }
    }
}

/// `ROWS` rows times a panel of 7-bit weights.
///
/// # Safety
/// `a` is readable for `ROWS` rows of `depth`, `row_sums` for `ROWS` elements; `weight` for `16·depth`; `sums` writable for 16
/// elements in each of `ROWS` rows of `columns`; `depth` is a multiple of 4.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn i7_tile<const ROWS: usize>(
    a: *const i8,
    row_sums: *const i32,
    weight: *const u8,
    depth: usize,
    sums: *mut i32,
    columns: usize,
) {
    let mut acc = [[_mm256_setzero_si256(); 2]; ROWS];
    let (offset, ones) = (_mm256_set1_epi8(64), _mm256_set1_epi16(1));
    for group in 0..depth / 4 {
        // SAFETY: 64 bytes of group `group < depth/4`.
        let w = unsafe {
            let at = weight.add(group * QUAD);
            [_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(32).cast())]
        };
        let w = w.map(|w| _mm256_add_epi8(w, offset));
        for row in 0..ROWS {
            // SAFETY: 4 activations of row `row` from `4·group < depth` on.
            let quad = unsafe { a.add(row * depth + 4 * group).cast::<i32>().read_unaligned() };
            let quad = _mm256_set1_epi32(quad);
            for half in 0..2 {
                let pairs = _mm256_maddubs_epi16(w[half], quad);
                acc[row][half] = _mm256_add_epi32(acc[row][half], _mm256_madd_epi16(pairs, ones));
            }
        }
    }
    for row in 0..ROWS {
        // SAFETY: `ROWS` sums of rows.
        let excess = _mm256_set1_epi32(unsafe { *row_sums.add(row) }.wrapping_mul(64));
        for half in 0..2 {
            // SAFETY: 16 sums are writable in row `row`.
            unsafe {
                let at = sums.add(row * columns + 8 * half);
                _mm256_storeu_si256(at.cast(), _mm256_sub_epi32(acc[row][half], excess));
            }
        }
    }
}

#[target_feature(enable = "avx2")]
fn matmul_i16(product: I16Product<'_>) {
    let I16Product { a, stride, rows, b, sums } = product;
    let columns = b.panels * PANEL;
    let runs = (b.run, b.runs, b.run_stride);
    for panel in 0..b.panels {
        for (row, rows) in row_blocks(rows, 6) {
            // SAFETY: `I16Product` promises the rows, every group of every run of the panel, and the sums; `rows` rows exist
            // from `row` on.
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
/// `a` is readable for `ROWS` rows, `stride` apart, of `2·run·runs` elements; `values` for `runs` runs, `run_stride` apart, of
/// `run` groups; `sums` writable for 16 elements in each of `ROWS` rows of `columns`.
#[inline]
#[target_feature(enable = "avx2")]
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
                let pair =
                    unsafe { a.add(row * stride + 2 * (first + group)).cast::<i32>().read_unaligned() };
                let pair = _mm256_set1_epi32(pair);
                acc[row][0] = _mm256_add_epi32(acc[row][0], _mm256_madd_epi16(pair, b[0]));
                acc[row][1] = _mm256_add_epi32(acc[row][1], _mm256_madd_epi16(pair, b[1]));
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
