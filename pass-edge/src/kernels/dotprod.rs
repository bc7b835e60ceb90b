//! NEON with dot products of bytes (`sdot`): 4 columns of 4 bytes an instruction.
#![expect(unsafe_code, reason = "an instruction without stable intrinsic, reads through pointers")]

use core::arch::aarch64::*;
use core::arch::asm;

use super::{Arithmetic, I8Product, I16Product, PANEL, QUAD, Work, neon, row_blocks};

/// Proof that the processor has the dot-product instructions (Orin does; Nano, TX2 do not).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DotProd(());

impl DotProd {
    /// The proof, if there is one: asked of the processor with feature `std`, else of the build.
    pub fn new() -> Option<Self> {
        #[cfg(feature = "std")]
        let present = std::arch::is_aarch64_feature_detected!("dotprod");
        #[cfg(not(feature = "std"))]
        let present = cfg!(target_feature = "dotprod");
        present.then_some(Self(()))
    }

    /// The proof handed in by a caller who asked the processor in some other way.
    ///
    /// # Safety
    /// The processor has the dot-product instructions.
    pub const unsafe fn assume() -> Self {
        Self(())
    }
}

impl Arithmetic for DotProd {
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
                        1 => i8_tile::<1>(a, weight, depth, sums, columns),
                        2 => i8_tile::<2>(a, weight, depth, sums, columns),
                        3 => i8_tile::<3>(a, weight, depth, sums, columns),
                        _ => i8_tile::<4>(a, weight, depth, sums, columns),
                    }
                }
            }
        }
    }

    fn matmul_i16(self, product: I16Product<'_>) {
        neon::matmul_i16(product);
    }
}

/// `acc[i] += Σ w[4·i + j]·a[4·LANE + j]` over `j < 4`.
macro_rules! sdot {
    ($acc:expr, $w:expr, $a:expr, $lane:literal) => {
        // SAFETY: an operation on registers alone; the enclosing function enables `dotprod`.
        unsafe {
            asm!(
                concat!("sdot {acc:v}.4s, {w:v}.16b, {a:v}.4b[", $lane, "]"),
                acc = inout(vreg) $acc,
                w = in(vreg) $w,
                a = in(vreg) $a,
                options(pure, nomem, nostack, preserves_flags)
            )
        }
    };
}

/// `ROWS` rows times a panel.
///
/// # Safety
/// `a` is readable for `ROWS` rows of `depth`; `weight` for `16·depth`; `sums` writable for 16 elements in each of `ROWS` rows of
/// `columns`; `depth` is a multiple of 16.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn i8_tile<const ROWS: usize>(
    a: *const i8,
    weight: *const i8,
    depth: usize,
    sums: *mut i32,
    columns: usize,
) {
    let mut acc = [[vdupq_n_s32(0); 4]; ROWS];
    for k in (0..depth).step_by(16) {
        let mut rows = [vdupq_n_s8(0); ROWS];
        for row in 0..ROWS {
            // SAFETY: 16 activations of row `row` from `k < depth` on, `depth` a multiple of 16.
            rows[row] = unsafe { vld1q_s8(a.add(row * depth + k)) };
        }
        macro_rules! group {
            ($lane:literal) => {
                for four in 0..4 {
                    // SAFETY: 4 of the 16 columns of group `k/4 + $lane`: 16 bytes.
                    let w = unsafe { vld1q_s8(weight.add((k / 4 + $lane) * QUAD + 16 * four)) };
                    for row in 0..ROWS {
                        sdot!(acc[row][four], w, rows[row], $lane);
                    }
                }
            };
        }
        group!(0);
        group!(1);
        group!(2);
        group!(3);
    }
    for row in 0..ROWS {
        for four in 0..4 {
            // SAFETY: 16 sums are writable in row `row`.
            unsafe { vst1q_s32(sums.add(row * columns + 4 * four), acc[row][four]) };
        }
    }
}
