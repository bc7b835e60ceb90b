//! AVX2: int8 widened to 16 bits and multiplied with `vpmaddwd`, which is exact.
#![expect(
    unsafe_code,
    reason = "vector instructions read through pointers and need a processor that has them"
)]

use core::arch::x86_64::*;

use super::{Arithmetic, I8Product, I16Product, PAIR, PANEL, QUAD, Work};

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

    fn matmul_i8(self, product: I8Product<'_>) {
        // SAFETY: `self` proves AVX2.
        unsafe { matmul_i8(product) }
    }

    fn matmul_i16(self, product: I16Product<'_>) {
        // SAFETY: `self` proves AVX2.
        unsafe { matmul_i16(product) }
    }
}

#[target_feature(enable = "avx2")]
fn matmul_i8(product: I8Product<'_>) {
    let I8Product { a, weight, sums, rows, depth, panels } = product;
    let columns = panels * PANEL;
    // half a panel at a time: 4 rows of 2 sums leave registers for weights and activations
    for half in 0..2 * panels {
        let (panel, offset) = (half / 2, half % 2 * 8);
        let weight = weight[panel * PANEL * depth + offset * 4..].as_ptr();
        let mut row = 0;
        while row < rows {
            let (a, sums) =
                (a[row * depth..].as_ptr(), sums[row * columns + panel * PANEL + offset..].as_mut_ptr());
            // SAFETY: `I8Product` promises `rows·depth` activations, `panels·16·depth` weights and `rows·columns` sums;
            // 4, 2 or 1 rows are left from `row` on, and the half panel starts inside panel `panel`.
            unsafe {
                if rows - row >= 4 {
                    i8_tile::<4>(a, weight, depth, sums, columns);
                    row += 4;
                } else if rows - row >= 2 {
                    i8_tile::<2>(a, weight, depth, sums, columns);
                    row += 2;
                } else {
                    i8_tile::<1>(a, weight, depth, sums, columns);
                    row += 1;
                }
            }
        }
    }
}

/// `ROWS` rows times 8 columns.
///
/// # Safety
/// `a` is readable for `ROWS` rows of `depth`; `weight` for 32 bytes in each of `depth/4` groups of 64; `sums` writable for
/// 8 elements in each of `ROWS` rows of `columns`; `depth` is a multiple of 16.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn i8_tile<const ROWS: usize>(
    a: *const i8,
    weight: *const u8,
    depth: usize,
    sums: *mut i32,
    columns: usize,
) {
    // 4 columns a register, 2 partial sums each
    let mut acc = [[_mm256_setzero_si256(); 2]; ROWS];
    for k in (0..depth).step_by(16) {
        let mut rows = [_mm256_setzero_si256(); ROWS];
        for row in 0..ROWS {
            // SAFETY: 16 activations from `k < depth` on, `depth` a multiple of 16.
            rows[row] = unsafe { _mm256_cvtepi8_epi16(_mm_loadu_si128(a.add(row * depth + k).cast())) };
        }
        macro_rules! group {
            ($group:literal, $lanes:literal) => {
                // SAFETY: group `k/4 + $group` of the panel; 32 bytes are readable there.
                let w = unsafe {
                    let at = weight.add((k / 4 + $group) * QUAD);
                    [
                        _mm256_cvtepi8_epi16(_mm_loadu_si128(at.cast())),
                        _mm256_cvtepi8_epi16(_mm_loadu_si128(at.add(16).cast())),
                    ]
                };
                for row in 0..ROWS {
                    let a = _mm256_permute4x64_epi64::<$lanes>(rows[row]);
                    acc[row][0] = _mm256_add_epi32(acc[row][0], _mm256_madd_epi16(a, w[0]));
                    acc[row][1] = _mm256_add_epi32(acc[row][1], _mm256_madd_epi16(a, w[1]));
                }
            };
        }
        group!(0, 0b00_00_00_00);
        group!(1, 0b01_01_01_01);
        group!(2, 0b10_10_10_10);
        group!(3, 0b11_11_11_11);
    }
    for row in 0..ROWS {
        // horizontal addition within 128 bits gives columns 0 1 4 5 2 3 6 7
        let mixed = _mm256_hadd_epi32(acc[row][0], acc[row][1]);
        let ordered = _mm256_permute4x64_epi64::<0b11_01_10_00>(mixed);
        // SAFETY: 8 sums are writable in row `row`.
        unsafe { _mm256_storeu_si256(sums.add(row * columns).cast(), ordered) };
    }
}

#[target_feature(enable = "avx2")]
fn matmul_i16(product: I16Product<'_>) {
    let I16Product { a, stride, rows, b, sums } = product;
    let columns = b.panels * PANEL;
    for panel in 0..b.panels {
        let mut row = 0;
        while row < rows {
            let left = rows - row;
            let (a, sums) = (a[row * stride..].as_ptr(), sums[row * columns + panel * PANEL..].as_mut_ptr());
            let values = b.values[panel * b.panel_stride..].as_ptr();
            let runs = (b.run, b.runs, b.run_stride);
            // SAFETY: `I16Product` promises the rows, every group of every run of the panel, and the sums; 4, 2 or 1 rows
            // are left from `row` on.
            unsafe {
                if left >= 4 {
                    i16_tile::<4>(a, stride, values, runs, sums, columns);
                    row += 4;
                } else if left >= 2 {
                    i16_tile::<2>(a, stride, values, runs, sums, columns);
                    row += 2;
                } else {
                    i16_tile::<1>(a, stride, values, runs, sums, columns);
                    row += 1;
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
    for (first, start) in (0..runs).map(|index| (index * run, index * run_stride)) {
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
