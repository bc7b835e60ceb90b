//! The training operations as CUDA kernels and cuBLAS products, each with its hand-written backward pass.
//!
//! Activations are `f32` or `bf16`, parameters and their gradients always `f32`; sums, statistics, softmax and losses are
//! formed in `f32`, products of `bf16` accumulate in `f32`. Nothing here waits for the device. Every sum has a fixed
//! order and there are no atomics, so the same input gives the same bits.
//!
//! | file | job |
//! |---|---|
//! | `engine` | tensors as addresses, launches, products: on a CUDA device, or emulated on the processor for tests |
//! | `graph` | results with a backward pass as nodes of candle's graph |
//! | `sums` | sums over rows |
//! | `upload`, `augment` | pixels on their way to a device, and the crops it makes of them |
//! | `optimizer`, `matching` | norms and updates of all parameters at once; positives |
//! | the rest | one operation a file, under the name of its twin one folder up |
//!
//! The kernels are the `.cu` files beside them; `build.rs` compiles each for both types of activations. With the
//! feature `_emulator` the same files are compiled as C++ and run on the processor: then `ops = "emulated"` runs every
//! kernel, with the very launches of this module, on CPU tensors.

mod attention;
mod augment;
mod class_attention;
mod cross_entropy;
mod engine;
mod gather_mean;
mod graph;
mod layer_norm;
mod linear;
mod matching;
mod neighbor_attention;
mod normalize;
mod optimizer;
mod residual;
mod sums;
mod upload;

pub(super) use attention::attention;
pub(super) use class_attention::class_attention;
pub(super) use cross_entropy::cross_entropy;
pub(crate) use engine::open;
pub(crate) use engine::runs_on;
pub(super) use gather_mean::gather_mean;
pub(super) use layer_norm::layer_norm;
pub(super) use linear::linear;
pub(super) use matching::positives;
pub(super) use neighbor_attention::neighbor_attention;
pub(super) use normalize::{l2_normalize, weight_norm};
pub(super) use optimizer::{norms, update};
pub(super) use residual::add_scaled;
pub(super) use sums::mean_rows;
pub use upload::{Stop, Upload, Uploader};
