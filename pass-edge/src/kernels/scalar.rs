//! The reference: plain Rust in the order of the definition.

use super::{Arithmetic, I8Product, I16Product, PAIR, PANEL, QUAD, Work};
use pass_core::rows::{rows_of, rows_of_mut};

/// No instructions beyond the target's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Scalar;

impl Arithmetic for Scalar {
    #[inline(always)]
    fn vectorize<W: Work>(self, work: W) -> W::Output {
        work.run()
    }

    fn matmul_i8(self, product: I8Product<'_>) {
        let I8Product { a, weight, sums, panels } = product;
        let depth = a.depth;
        let all = rows_of(a.bytes, depth).zip(rows_of_mut(sums, panels * PANEL));
        for (a, sums) in all {
            let sums = sums.as_chunks_mut::<PANEL>().0;
            for (weight, sums) in rows_of(weight, PANEL * depth).zip(sums) {
                *sums = [0; PANEL];
                for (a, group) in a.as_chunks::<4>().0.iter().zip(weight.as_chunks::<QUAD>().0) {
                    for (sum, weight) in sums.iter_mut().zip(group.as_chunks::<4>().0) {
                        for lane in 0..4 {
                            *sum += i32::from(a[lane]) * i32::from(weight[lane].cast_signed());
                        }
                    }
                }
            }
        }
    }

    fn matmul_i16(self, product: I16Product<'_>) {
        let I16Product { a, stride, rows, b, sums } = product;
        for (row, sums) in rows_of_mut(sums, b.panels * PANEL).take(rows).enumerate() {
            let a = a.get(row * stride..).unwrap_or_default().as_chunks::<2>().0;
            for (panel, sums) in sums.as_chunks_mut::<PANEL>().0.iter_mut().enumerate() {
                *sums = [0; PANEL];
                for run in 0..b.runs {
                    let groups =
                        b.values.get(panel * b.panel_stride + run * b.run_stride..).unwrap_or_default();
                    let a = a.iter().skip(run * b.run).take(b.run);
                    for (a, group) in a.zip(groups.as_chunks::<PAIR>().0) {
                        for (sum, pair) in sums.iter_mut().zip(group.as_chunks::<2>().0) {
                            *sum +=
                                i32::from(a[0]) * i32::from(pair[0]) + i32::from(a[1]) * i32::from(pair[1]);
                        }
                    }
                }
            }
        }
    }
}
