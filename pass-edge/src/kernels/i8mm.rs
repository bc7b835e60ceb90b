//! NEON with matrix products of bytes (`smmla`): 2 rows times 2 columns of 8 bytes an instruction.
#![expect(unsafe_code, reason = "an instruction without stable intrinsic, reads through pointers")]

use core::arch::aarch64::*;
use core::arch::asm;

use super::{Arithmetic, I8Product, I16Product, PANEL, QUAD, Work, neon};

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
        let I8Product { a, weight, sums, rows, depth, panels } = product;
        let columns = panels * PANEL;
        for panel in 0..panels {
            let weight = weight[panel * PANEL * depth..].as_ptr().cast();
            for row in (0..rows).step_by(2) {
                let (a, sums) =
                    (a[row * depth..].as_ptr(), sums[row * columns + panel * PANEL..].as_mut_ptr());
                // SAFETY: `self` proves the instructions. `I8Product` promises `rows·depth` activations, `panels·16·depth`
                // weights and `rows·columns` sums; 2 rows, or the last, are left from `row` on, and panel `panel` exists.
                unsafe { i8_tile(a, rows - row >= 2, weight, depth, sums, columns) };
            }
        }
    }

    fn matmul_i16(self, product: I16Product<'_>) {
        neon::matmul_i16(product);
    }
}

/// 2 rows (or 1, which then is both) times a panel.
///
/// # Safety
/// `a` is readable for the rows of `depth`; `weight` for `16·depth`; `sums` writable for 16 elements in each of the rows of
/// `columns`; `depth` is a multiple of 16.
#[inline]
#[target_feature(enable = "neon,i8mm")]
unsafe fn i8_tile(a: *const i8, two: bool, weight: *const i8, depth: usize, sums: *mut i32, columns: usize) {
    let second = if two { depth } else { 0 };
    // of 2 columns: row 0 column 0, row 0 column 1, row 1 column 0, row 1 column 1
    let mut acc = [vdupq_n_s32(0); 8];
    for k in (0..depth).step_by(8) {
        // SAFETY: 8 activations of each row from `k < depth` on, `depth` a multiple of 8.
        let rows = unsafe { vcombine_s8(vld1_s8(a.add(k)), vld1_s8(a.add(second + k))) };
        for four in 0..4 {
            // SAFETY: 4 of the 16 columns of groups `k/4` and `k/4 + 1`: 16 bytes each.
            let [low, high] = unsafe {
                let at = weight.add(k / 4 * QUAD + 16 * four);
                [vreinterpretq_s32_s8(vld1q_s8(at)), vreinterpretq_s32_s8(vld1q_s8(at.add(QUAD)))]
            };
            // the 8 bytes of a column side by side
            for (half, columns) in [vzip1q_s32(low, high), vzip2q_s32(low, high)].into_iter().enumerate() {
                // SAFETY: an operation on registers alone; this function enables `i8mm`.
                unsafe {
                    asm!(
                        "smmla {acc:v}.4s, {rows:v}.16b, {columns:v}.16b",
                        acc = inout(vreg) acc[2 * four + half],
                        rows = in(vreg) rows,
                        columns = in(vreg) columns,
                        options(pure, nomem, nostack, preserves_flags)
                    );
                }
            }
        }
    }
    for four in 0..4 {
        let [left, right] = [vreinterpretq_s64_s32(acc[2 * four]), vreinterpretq_s64_s32(acc[2 * four + 1])];
        // SAFETY: 16 sums are writable in each row.
        unsafe {
            vst1q_s32(sums.add(4 * four), vreinterpretq_s32_s64(vzip1q_s64(left, right)));
            if two {
                vst1q_s32(sums.add(columns + 4 * four), vreinterpretq_s32_s64(vzip2q_s64(left, right)));
            }
        }
    }
}
