//! The matrix product of `matrixmultiply` behind a checked, safe function.
#![expect(unsafe_code, reason = "matrixmultiply takes raw pointers")]

/// `out += x·Wᵀ` for `x` `[T, in]`, `W` `[out, in]` and `out` `[T, out]`; whole rows only.
pub(crate) fn add_product(x: &[f32], weight: &[f32], n_in: usize, n_out: usize, out: &mut [f32]) {
    let tokens = (x.len() / n_in).min(out.len() / n_out);
    if weight.len() < n_in * n_out {
        return;
    }
    // SAFETY: `x` holds `tokens * n_in` values, `weight` `n_out * n_in` and `out` `tokens * n_out`, all row-major with
    // the strides given; `out` is borrowed mutably, so it overlaps neither input.
    unsafe {
        matrixmultiply::sgemm(
            tokens,
            n_in,
            n_out,
            1.0,
            x.as_ptr(),
            n_in as isize,
            1,
            weight.as_ptr(),
            1,
            n_in as isize,
            1.0,
            out.as_mut_ptr(),
            n_out as isize,
            1,
        );
    }
}
