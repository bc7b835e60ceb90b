//! NEON with matrix products of bytes (`smmla`): 2 rows times 2 columns of 8 bytes an instruction.
#![expect(unsafe_code, reason = "an instruction without stable intrinsic, reads through pointers")]

use core::arch::aarch64::*;
use core::arch::asm;

use super::{Arithmetic, I8Product, I16Product, PANEL, QUAD, Work, neon, row_blocks};

/// Proof that the processor has the 8-bit matrix instructions (Thor does).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct I8mm(());

impl I8mm {
    /// The proof, if there is one: asked of the processor with feature `std`, else of the build.
    pub fn new() -> Option<Self> {
        #[cfg(feature = "std")]
        let present = std::arch::is_aarch64_feature_detected!("i8mm");
        #[cfg(not(feature = "std"))]
        let present = cfg!(target_feature = "i8mm");
        present.then_some(Self(()))
    }

    /// The proof handed in by a caller who asked the processor in some other way.
    ///
    /// # Safety
    /// The processor has the 8-bit matrix instructions.
    pub const unsafe fn assume() -> Self {
        Self(())
    }
}

impl Arithmetic for I8mm {
    #[inline(always)]
    fn vectorize<W: Work>(self, work: W) -> W::Output {
        work.run()
    }

    fn matmul_i8(self, product: I8Product<'_>) {
        let I8Product { a, weight, sums, panels } = product;
        let (depth, columns) = (a.depth, panels * PANEL);
        for panel in 0..panels {
            for (row, rows) in row_blocks(a.rows, 4) {
                // SAFETY: `self` proves the instructions. `I8Product` promises `rows·depth` activations, `panels·16·depth`
                // weights and `rows·columns` sums; `rows` rows exist from `row` on, and panel `panel` exists.
                unsafe {
                    let a = a.bytes.as_ptr().add(row * depth);
                    let weight = weight.as_ptr().add(panel * PANEL * depth).cast();
                    let sums = sums.as_mut_ptr().add(row * columns + panel * PANEL);
                    match rows {
                        1 => i8_tile::<1, 1>(a, weight, depth, sums, columns),
                        2 => i8_tile::<2, 1>(a, weight, depth, sums, columns),
                        3 => i8_tile::<3, 2>(a, weight, depth, sums, columns),
                        _ => i8_tile::<4, 2>(a, weight, depth, sums, columns),
                    }
                }
            }
        }
    }

    fn matmul_i16(self, product: I16Product<'_>) {
        neon::matmul_i16(product);
    }
}

/// `ROWS` rows, in `PAIRS` pairs, times a panel; the last row is its own partner if their number is odd.
///
/// # Safety
/// `a` is readable for `ROWS` rows of `depth`; `weight` for `16·depth`; `sums` writable for 16 elements in each of `ROWS` rows of
/// `columns`; `depth` is a multiple of 8; `PAIRS` is half of `ROWS`, rounded up.
#[inline]
#[target_feature(enable = "neon,i8mm")]
unsafe fn i8_tile<const ROWS: usize, const PAIRS: usize>(
    a: *const i8,
    weight: *const i8,
    depth: usize,
    sums: *mut i32,
    columns: usize,
) {
    let second = |pair: usize| (2 * pair + 1).min(ROWS - 1);
    // of 2 columns: row 0 column 0, row 0 column 1, row 1 column 0, row 1 column 1
    let mut acc = [[vdupq_n_s32(0); 8]; PAIRS];
    for k in (0..depth).step_by(8) {
        let mut rows = [vdupq_n_s8(0); PAIRS];
        for pair in 0..PAIRS {
            // SAFETY: 8 activations of both rows from `k < depth` on, `depth` a multiple of 8.
            rows[pair] = unsafe {
                vcombine_s8(vld1_s8(a.add(2 * pair * depth + k)), vld1_s8(a.add(second(pair) * depth + k)))
            };
        }
        for four in 0..4 {
            // SAFETY: 4 of the 16 columns of groups `k/4` and `k/4 + 1`: 16 bytes each.
            let [low, high] = unsafe {
                let at = weight.add(k / 4 * QUAD + 16 * four);
                [vreinterpretq_s32_s8(vld1q_s8(at)), vreinterpretq_s32_s8(vld1q_s8(at.add(QUAD)))]
            };
            // the 8 bytes of a column side by side
            for (half, columns) in [vzip1q_s32(low, high), vzip2q_s32(low, high)].into_iter().enumerate() {
                for pair in 0..PAIRS {
                    // SAFETY: an operation on registers alone; this function enables `i8mm`.
                    unsafe {
                        asm!(
                            "smmla {acc:v}.4s, {rows:v}.16b, {columns:v}.16b",
                            acc = inout(vreg) acc[pair][2 * four + half],
                            rows = in(vreg) rows[pair],
                            columns = in(vreg) columns,
                            options(pure, nomem, nostack, preserves_flags)
                        );
                    }
                }
            }
        }
    }
    for pair in 0..PAIRS {
        for four in 0..4 {
            let [left, right] =
                [acc[pair][2 * four], acc[pair][2 * four + 1]].map(|sum| vreinterpretq_s64_s32(sum));
            // SAFETY: 16 sums are writable in each row.
            unsafe {
                let at = sums.add(2 * pair * columns + 4 * four);
                vst1q_s32(at, vreinterpretq_s32_s64(vzip1q_s64(left, right)));
                if 2 * pair + 1 < ROWS {
                    vst1q_s32(at.add(columns), vreinterpretq_s32_s64(vzip2q_s64(left, right)));
                }
            }
        }
    }
}
