//! Integer matrix products, and the choice of the instructions that compute them. Nothing else knows the processor.
//!
//! Sums of integer products are exact, so all kernels agree to the bit whatever their order. The f32 code of `ops` is
//! written once and compiled per kernel (`Arithmetic::vectorize`); it has no fused operations, so it agrees too.
#![cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "only x86-64 prepares rows"))]

/// Calls `$tile::<ROWS>` for the number of rows of a block, at most 6: what 16 vector registers hold with 2 sums a row.
#[cfg(target_arch = "x86_64")]
macro_rules! by_rows {
    ($rows:expr, $tile:ident, $arguments:tt) => {
        match $rows {
            1 => $tile::<1> $arguments,
            2 => $tile::<2> $arguments,
            3 => $tile::<3> $arguments,
            4 => $tile::<4> $arguments,
            5 => $tile::<5> $arguments,
            _ => $tile::<6> $arguments,
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512_vnni;
#[cfg(target_arch = "x86_64")]
mod avx_vnni;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
mod dotprod;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
mod i8mm;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
mod neon;
mod scalar;

use crate::error::{Error, Result};
use crate::format::{INPUT_MULTIPLE, Mode, PANEL};
use crate::scratch::TILE;
use pass_core::rows::rows_of;

#[cfg(target_arch = "x86_64")]
pub use avx_vnni::AvxVnni;
#[cfg(target_arch = "x86_64")]
pub use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub use avx512_vnni::Avx512Vnni;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
pub use dotprod::DotProd;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
pub use i8mm::I8mm;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
use neon::Neon;
use scalar::Scalar;

/// Columns of a product computed at once: its sums stay in the first-level cache until the epilogue reads them.
pub(crate) const CHUNK: usize = 64;
/// Numbers in a group of an `i16` panel: 16 columns, 2 of the inner dimension each.
pub(crate) const PAIR: usize = 2 * PANEL;
/// Bytes in a group of an int8 panel: 16 columns, 4 of the inner dimension each.
const QUAD: usize = 4 * PANEL;

/// The sums of a tile of rows and a chunk of columns, where vectors do not cross cache lines.
#[repr(align(64))]
pub(crate) struct Sums(pub(crate) [i32; TILE * CHUNK]);

impl Sums {
    pub(crate) const fn new() -> Self {
        Self([0; TILE * CHUNK])
    }
}

/// How the arithmetic is done. Kernels beyond [`Kernel::Scalar`] hold the proof that the processor has their instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kernel {
    /// Plain Rust, compiled for the target's own instructions.
    Scalar,
    /// 16-bit multiply-add of 256-bit vectors.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// 8-bit and 16-bit dot products of 256-bit vectors.
    #[cfg(target_arch = "x86_64")]
    AvxVnni(AvxVnni),
    /// 8-bit and 16-bit dot products of 512-bit vectors.
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni(Avx512Vnni),
    /// The vector instructions that every aarch64 processor has.
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    Neon,
    /// 8-bit dot products.
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    DotProd(DotProd),
    /// 8-bit matrix products.
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    I8mm(I8mm),
}

impl Kernel {
    /// The fastest kernel of this processor: found out at run time with feature `std`, else what the build allows.
    pub fn best() -> Self {
        Self::available().last().unwrap_or(Self::Scalar)
    }

    /// All kernels of this processor, slowest first.
    pub fn available() -> impl Iterator<Item = Self> {
        #[cfg(target_arch = "x86_64")]
        let fast = [
            Avx2::new().map(Self::Avx2),
            AvxVnni::new().map(Self::AvxVnni),
            Avx512Vnni::new().map(Self::Avx512Vnni),
        ];
        #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
        let fast = [Some(Self::Neon), DotProd::new().map(Self::DotProd), I8mm::new().map(Self::I8mm)];
        #[cfg(not(any(target_arch = "x86_64", all(target_arch = "aarch64", target_endian = "little"))))]
        let fast: [Option<Self>; 0] = [];
        core::iter::once(Self::Scalar).chain(fast.into_iter().flatten())
    }

    /// The name, as on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni(_) => "avx_vnni",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni(_) => "avx512_vnni",
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::Neon => "neon",
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::DotProd(_) => "dotprod",
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::I8mm(_) => "i8mm",
        }
    }

    /// Runs `job` with this kernel.
    pub(crate) fn dispatch<J: Job>(self, job: J) -> J::Output {
        match self {
            Self::Scalar => job.run(Scalar),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(kernel) => job.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni(kernel) => job.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni(kernel) => job.run(kernel),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::Neon => job.run(Neon),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::DotProd(kernel) => job.run(kernel),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::I8mm(kernel) => job.run(kernel),
        }
    }
}

/// Something to be computed with a kernel, compiled once for each.
pub(crate) trait Job {
    type Output;
    fn run<K: Arithmetic>(self, kernel: K) -> Self::Output;
}

/// f32 work over lanes. `run` must be `inline(always)`: only what is inlined is compiled with the kernel's instructions,
/// which a closure need not be.
pub(crate) trait Work {
    type Output;
    fn run(self) -> Self::Output;
}

/// What a kernel provides.
pub(crate) trait Arithmetic: Copy + Send + Sync {
    /// Runs `work` compiled with the kernel's instructions.
    fn vectorize<W: Work>(self, work: W) -> W::Output;

    /// What [`Arithmetic::matmul_i8`] reads instead of, or beside, the bytes of a row.
    fn preparation(self, _mode: Mode) -> Preparation {
        Preparation::Nothing
    }

    /// `sums[r][n] = Σₖ a[r][k] · w[k][n]`.
    fn matmul_i8(self, product: I8Product<'_>);

    /// `sums[r][n] = Σₖ a[r][k] · b[k][n]`.
    fn matmul_i16(self, product: I16Product<'_>);
}

/// What is computed once from the rows of a tile, for all panels they are multiplied by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Preparation {
    /// Nothing.
    Nothing,
    /// The sum of each row: takes an offset of the weights off again.
    Sums,
    /// The rows as 16-bit numbers.
    Words,
}

/// Up to [`TILE`] rows of int8 activations, prepared for a kernel.
#[derive(Clone, Copy)]
pub(crate) struct I8Rows<'a> {
    bytes: &'a [i8],
    words: &'a [i16],
    sums: [i32; TILE],
    rows: usize,
    depth: usize,
    mode: Mode,
}

impl<'a> I8Rows<'a> {
    /// - `bytes`: `[rows, depth]`, `depth` a multiple of 16.
    /// - `words`: room for as many 16-bit numbers.
    /// - `mode`: that of the weights.
    pub(crate) fn prepare<K: Arithmetic>(
        kernel: K,
        rows: usize,
        depth: usize,
        bytes: &'a [i8],
        words: &'a mut [i16],
        mode: Mode,
    ) -> Result<Self> {
        let len = rows * depth;
        if rows > TILE || !depth.is_multiple_of(INPUT_MULTIPLE) || words.len() < len {
            return Err(Error::LengthMismatch { what: "rows", expected: len, actual: words.len() });
        }
        let short = Error::LengthMismatch { what: "inputs", expected: len, actual: bytes.len() };
        let bytes = bytes.get(..len).ok_or(short)?;
        let mut sums = [0; TILE];
        match kernel.preparation(mode) {
            Preparation::Nothing => {}
            Preparation::Sums => kernel.vectorize(SumRows { bytes, depth, sums: &mut sums }),
            Preparation::Words => kernel.vectorize(Widen { bytes, words }),
        }
        Ok(Self { bytes, words, sums, rows, depth, mode })
    }

    /// Rows.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Numbers in a row.
    pub(crate) fn depth(&self) -> usize {
        self.depth
    }
}

struct SumRows<'a> {
    bytes: &'a [i8],
    depth: usize,
    sums: &'a mut [i32; TILE],
}

impl Work for SumRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (sum, row) in self.sums.iter_mut().zip(rows_of(self.bytes, self.depth)) {
            *sum = row.iter().map(|value| i32::from(*value)).sum();
        }
    }
}

struct Widen<'a> {
    bytes: &'a [i8],
    words: &'a mut [i16],
}

impl Work for Widen<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (word, byte) in self.words.iter_mut().zip(self.bytes) {
            *word = i16::from(*byte);
        }
    }
}

/// int8 rows times int8 panels, lengths checked: the rows hold `rows·depth` elements (as bytes, and as words if the kernel
/// asked for them), `weight` `panels·16·depth` and `sums` `rows·panels·16`; `depth` is a multiple of 16, `rows` at most 16.
pub(crate) struct I8Product<'a> {
    a: I8Rows<'a>,
    weight: &'a [u8],
    sums: &'a mut [i32],
    panels: usize,
}

impl<'a> I8Product<'a> {
    /// All rows of `a` times all panels of `weight`, whose numbers keep to the limit of the mode that `a` was prepared for.
    pub(crate) fn new(a: I8Rows<'a>, weight: &'a [u8], sums: &'a mut [i32]) -> Result<Self> {
        let panels = weight.len().checked_div(a.depth * PANEL).unwrap_or(0);
        let needed = a.rows * panels * PANEL;
        if sums.len() < needed {
            return Err(Error::LengthMismatch { what: "sums", expected: needed, actual: sums.len() });
        }
        Ok(Self { a, weight, sums, panels })
    }
}

/// `(first row, rows)` of blocks of at most `most` rows, as equal as can be: what a kernel holds in registers at once.
fn row_blocks(rows: usize, most: usize) -> impl Iterator<Item = (usize, usize)> {
    let blocks = rows.div_ceil(most.max(1));
    let start = move |block: usize| (block * rows).checked_div(blocks).unwrap_or(0);
    (0..blocks).map(move |block| (start(block), start(block + 1) - start(block)))
}

/// Panels of 16 columns of `i16`. The inner dimension is `runs` runs of `run` groups of 2.
#[derive(Clone, Copy)]
pub(crate) struct I16Panels<'a> {
    pub(crate) values: &'a [i16],
    pub(crate) panels: usize,
    /// From a panel to the next.
    pub(crate) panel_stride: usize,
    /// Groups that follow each other directly.
    pub(crate) run: usize,
    pub(crate) runs: usize,
    /// From a run to the next.
    pub(crate) run_stride: usize,
}

impl I16Panels<'_> {
    /// Inner dimension.
    fn depth(&self) -> usize {
        2 * self.run * self.runs
    }
}

/// `i16` rows times `i16` panels, lengths checked: row `r < rows` is `a[r·stride..][..depth]`, `b.values` holds the last
/// group of the last run of the last panel, `sums` holds `rows·panels·16` elements.
pub(crate) struct I16Product<'a> {
    a: &'a [i16],
    stride: usize,
    rows: usize,
    b: I16Panels<'a>,
    sums: &'a mut [i32],
}

impl<'a> I16Product<'a> {
    pub(crate) fn new(
        a: &'a [i16],
        stride: usize,
        rows: usize,
        b: I16Panels<'a>,
        sums: &'a mut [i32],
    ) -> Result<Self> {
        let needed = rows * b.panels * PANEL;
        if sums.len() < needed {
            return Err(Error::LengthMismatch { what: "sums", expected: needed, actual: sums.len() });
        }
        let needed = rows.saturating_sub(1) * stride + b.depth();
        if a.len() < needed {
            return Err(Error::LengthMismatch { what: "rows", expected: needed, actual: a.len() });
        }
        let last_panel = b.panels.saturating_sub(1) * b.panel_stride;
        let needed = last_panel + b.runs.saturating_sub(1) * b.run_stride + b.run * PAIR;
        if b.values.len() < needed {
            return Err(Error::LengthMismatch { what: "panels", expected: needed, actual: b.values.len() });
        }
        Ok(Self { a, stride, rows, b, sums })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec;
    use std::vec::Vec;

    /// Rows and panels, waiting for a kernel.
    struct RowsTimesPanels<'a> {
        a: &'a [i8],
        weight: &'a [u8],
        shape: (usize, usize),
        mode: Mode,
        sums: &'a mut [i32],
    }

    impl Job for RowsTimesPanels<'_> {
        type Output = Result<()>;

        fn run<K: Arithmetic>(self, kernel: K) -> Result<()> {
            let (rows, depth) = self.shape;
            let mut words = vec![0; rows * depth];
            let a = I8Rows::prepare(kernel, rows, depth, self.a, &mut words, self.mode)?;
            kernel.matmul_i8(I8Product::new(a, self.weight, self.sums)?);
            Ok(())
        }
    }

    impl Job for I16Product<'_> {
        type Output = ();

        fn run<K: Arithmetic>(self, kernel: K) {
            kernel.matmul_i16(self);
        }
    }

    /// The product by its definition, in the widest integers.
    fn i8_by_definition(a: &[i8], weight: &[u8], rows: usize, depth: usize, panels: usize) -> Vec<i32> {
        let mut sums = vec![0; rows * panels * PANEL];
        for row in 0..rows {
            for column in 0..panels * PANEL {
                let sum: i64 = (0..depth)
                    .map(|k| {
                        let at = column / PANEL * PANEL * depth + k / 4 * QUAD + column % PANEL * 4 + k % 4;
                        i64::from(a[row * depth + k]) * i64::from(weight[at].cast_signed())
                    })
                    .sum();
                sums[row * panels * PANEL + column] = sum as i32;
            }
        }
        sums
    }

    /// In both modes: the weights as they are (but −128), then halved.
    fn check_i8(a: &[i8], weight: &[u8], rows: usize, depth: usize, panels: usize) {
        for mode in [Mode::Exact, Mode::Fast] {
            let limit = mode.weight_limit();
            let within = |w: &u8| {
                let w = w.cast_signed();
                (if mode == Mode::Fast { w / 2 } else { w }).clamp(-limit, limit).cast_unsigned()
            };
            let weight: Vec<u8> = weight.iter().map(within).collect();
            let expected = i8_by_definition(a, &weight, rows, depth, panels);
            for kernel in Kernel::available() {
                let mut sums = vec![-1; rows * panels * PANEL];
                let product =
                    RowsTimesPanels { a, weight: &weight, shape: (rows, depth), mode, sums: &mut sums };
                kernel.dispatch(product).unwrap();
                assert_eq!(sums, expected, "{} {rows}x{depth}x{panels} {}", kernel.name(), mode.name());
            }
        }
    }

    fn numbers(seed: u64, count: usize) -> Vec<u8> {
        (0..count as u64).map(|index| crate::format::generated_pixel(seed, index)).collect()
    }

    #[test]
    fn int8_kernels_agree_with_the_definition_for_every_shape_and_alignment() {
        let depths: &[usize] = if cfg!(miri) { &[16] } else { &[16, 32, 48, 64, 80, 192, 592, 1536] };
        for &depth in depths {
            for rows in 0..=TILE {
                for panels in [0, 1, 2, 3, 4] {
                    let start = (rows + panels) % 4;
                    let a: Vec<i8> =
                        numbers(1, rows * depth + start).iter().map(|byte| byte.cast_signed()).collect();
                    let weight = numbers(2, panels * PANEL * depth + start);
                    check_i8(&a[start..], &weight[start..], rows, depth, panels);
                }
            }
        }
    }

    #[test]
    fn int8_extremes_do_not_saturate() {
        for (a, w) in [(-128, -128), (-128, 127), (127, -128), (127, 127), (-127, 127)] {
            check_i8(&[a; 5 * 3072], &[(w as i8).cast_unsigned(); 3 * 16 * 3072], 5, 3072, 3);
        }
    }

    fn check_i16(a: &[i16], stride: usize, rows: usize, b: I16Panels<'_>) {
        let depth = b.depth();
        let mut expected = vec![0; rows * b.panels * PANEL];
        for row in 0..rows {
            for column in 0..b.panels * PANEL {
                let sum: i64 = (0..depth)
                    .map(|k| {
                        let (run, group) = (k / 2 / b.run, k / 2 % b.run);
                        let at = column / PANEL * b.panel_stride + run * b.run_stride + group * PAIR;
                        i64::from(a[row * stride + k]) * i64::from(b.values[at + column % PANEL * 2 + k % 2])
                    })
                    .sum();
                expected[row * b.panels * PANEL + column] = sum as i32;
            }
        }
        for kernel in Kernel::available() {
            let mut sums = vec![-1; rows * b.panels * PANEL];
            kernel.dispatch(I16Product::new(a, stride, rows, b, &mut sums).unwrap());
            assert_eq!(sums, expected, "{} {rows}x{depth}x{}", kernel.name(), b.panels);
        }
    }

    #[test]
    fn i16_kernels_agree_with_the_definition_for_every_shape_and_alignment() {
        let word = |byte: u8| i16::from(byte.cast_signed()) * 16;
        for rows in if cfg!(miri) { 3..=4 } else { 0..=17 } {
            for panels in 0..=4 {
                for (run, runs) in [(8, 1), (32, 1), (8, 13), (1, 3), (5, 2)] {
                    let (run_stride, start) = (run * PAIR + 6, (rows + panels) % 4);
                    let panel_stride = runs * run_stride + 10;
                    let stride = 2 * run * runs + 3;
                    let a: Vec<i16> = numbers(3, rows * stride + 64 * stride).into_iter().map(word).collect();
                    let values: Vec<i16> = numbers(4, 5 * panel_stride).into_iter().map(word).collect();
                    let values = &values[start..];
                    check_i16(
                        &a[start..],
                        stride,
                        rows,
                        I16Panels { values, panels, panel_stride, run, runs, run_stride },
                    );
                }
            }
        }
    }

    #[test]
    fn i16_extremes_stay_below_the_limit() {
        let values = [2047; 4 * 16 * 512];
        let b = I16Panels {
            values: &values,
            panels: 4,
            panel_stride: 16 * 512,
            run: 256,
            runs: 1,
            run_stride: 0,
        };
        for extreme in [2047, -2047] {
            check_i16(&[extreme; 3 * 512], 512, 3, b);
        }
    }

    #[test]
    fn short_buffers_are_refused() {
        let refused = |depth: usize, sums: usize| {
            let (a, weight) = (vec![0; 2 * depth], vec![0; 16 * depth]);
            let mut sums = vec![0; sums];
            let product = RowsTimesPanels {
                a: &a,
                weight: &weight,
                shape: (2, depth),
                mode: Mode::Exact,
                sums: &mut sums,
            };
            Kernel::Scalar.dispatch(product).is_err()
        };
        assert!(refused(16, 31) && refused(15, 64) && !refused(16, 32));
        let b = I16Panels { values: &[0; 64], panels: 1, panel_stride: 0, run: 2, runs: 1, run_stride: 0 };
        assert!(I16Product::new(&[0; 4], 4, 1, b, &mut [0; 16]).is_ok());
        assert!(I16Product::new(&[0; 3], 4, 1, b, &mut [0; 16]).is_err());
        assert!(I16Product::new(&[0; 4], 4, 1, b, &mut [0; 15]).is_err());
        let short = I16Panels { values: &[0; 63], ..b };
        assert!(I16Product::new(&[0; 4], 4, 1, short, &mut [0; 16]).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 64 }))]
        #[test]
        fn int8_kernels_agree_on_any_numbers(a in prop::collection::vec(any::<i8>(), 3 * 48), w in prop::collection::vec(any::<u8>(), 2 * 16 * 48)) {
            check_i8(&a, &w, 3, 48, 2);
        }
    }
}
