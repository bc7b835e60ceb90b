//! The parts of the forward pass. Vector code is plain loops, reductions over 16 partial results, compiled per kernel; it is
//! `inline(always)` because only inlined code is compiled with the caller's instructions.

pub(crate) mod attention;
pub(crate) mod elementary;
pub(crate) mod layer_norm;
pub(crate) mod linear;
pub(crate) mod quantize;
