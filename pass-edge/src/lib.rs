//! Patch features on the device: an int8 Vision Transformer read in place from a `.pass` file, with working memory handed
//! in by the caller. No standard library, no heap, and the same bits from every kernel on every platform.
//!
//! # In the order of the data
//!
//! | module | job |
//! |---|---|
//! | [`format`](mod@format) | the file, specified |
//! | [`model`] | a validated, borrowed view of a file |
//! | [`image`] | where the bytes of a pixel are |
//! | [`resize`] | any image to the size of the model |
//! | [`scratch`] | working memory; its size is a `const fn` |
//! | [`parallel`] | threads, lent by the caller |
//! | `vit`, `ops` | the forward pass and its parts |
//! | [`kernels`] | integer matrix products: scalar reference and vector instructions |
//! | [`tracking`] | labels of a video, from frame to frame |
//! | [`self_test`] | the promise of a file, checked on the device |
//! | `writer` | writing files (feature `alloc`) |
//!
//! # Image to features
//!
//! `examples/features_of_a_frame.rs`:
//!
#![doc = concat!("```\n", include_str!("../examples/features_of_a_frame.rs"), "```")]
//!
//! # Arithmetic
//!
//! Every large product is one of integers, exact in every kernel: int8 × int8 for linear maps (weights with a scale per
//! output, activations with a scale per token, both symmetric), 12-bit integers held in `i16` for the two products of
//! attention (a scale per token and head). int8 is too coarse for attention, f32 is slower and its sum depends on the
//! order; 12 bits cost what 16-bit multiply-add costs and lose nothing that can be seen. Everything else is f32, written
//! once as additions, multiplications, divisions and comparisons in a fixed order, never fused: a kernel only decides with
//! which vector instructions that code is compiled. So results are identical to the bit for finite numbers.
#![no_std]
#![deny(unsafe_code)]

#[cfg(feature = "alloc")]
extern crate alloc;
#[cfg(any(test, feature = "std"))]
extern crate std;

pub mod error;
pub mod format;
pub mod image;
pub mod kernels;
pub mod model;
mod ops;
pub mod parallel;
pub mod resize;
pub mod scratch;
pub mod self_test;
pub mod tracking;
mod vit;
#[cfg(feature = "alloc")]
pub mod writer;

pub use error::{Error, Result};
pub use pass_core as core;
pub use scratch::scratch_len;
pub use vit::{features, features_with_pool};
