//! The mathematics of PASS, patch-level self-supervision of Vision Transformers, over caller-owned buffers:
//! no standard library, no allocation, no randomness, no input or output.
//!
//! A frozen teacher looks at the patches of a crop, finds for each patch the most similar of its neighbors, aggregates
//! them into one target, and the student learns to predict that target from the patch alone, beside the usual loss on
//! the class token.
//!
//! # In the order of the data
//!
//! | module | job |
//! |---|---|
//! | [`shape`] | checked views: a grid of patches, the tokens on it |
//! | [`neighborhood`] | which patches are candidates for a patch: window, borders |
//! | [`matching`] | cosine similarity and the `k` best candidates |
//! | [`layers`], [`class_attention`] | LayerNorm, linear maps, one class-attention block and its gradient |
//! | [`aggregation`] | a patch and its matches become one target: the aggregation head, or the mean |
//! | [`softmax`] | softmax and log-softmax with a temperature |
//! | [`center`] | running center of the teacher's outputs |
//! | [`loss`] | class-token loss, patch loss, their weighted sum, and the gradients |
//! | [`propagation`] | labels of a video travel along similar patches |
//! | [`frame`] | frames of a video as the published evaluations prepare them |
//! | [`segmentation_metrics`] | region similarity and contour accuracy of masks |
//! | [`schedule`] | learning rate, weight decay, momentum and teacher temperature as functions of the step |
//! | [`math`] | dot, norm, exp, ln, sqrt, erf, GELU: the only home of float primitives |
//! | [`rows`] | rows of a buffer, without a check that could panic |
//! | [`error`] | the one error |
//!
//! # From equation to function
//!
//! | equation | function |
//! |---|---|
//! | `s(i,j) = cos(xᵢ, xⱼ)` for `j ∈ N(i)` | [`matching::similarities_into`] |
//! | `P(i) = top-k of s(i,·)` | [`matching::top_k_into`] |
//! | `c ← c + Wproj·softmax(q·kᵀ)·v`, `c ← c + MLP(LN(c))` | [`class_attention::ClassAttention::forward_into`] |
//! | `gᵢ = aggregate({xⱼ : j ∈ P(i)})`, `g_cls = aggregate({x₁ … x_N})` | [`aggregation::AggregationHead::aggregate_into`] |
//! | `t = softmax((g − c)/τₜ)` | [`softmax::centered_softmax_into`] |
//! | `L_class = mean over q, v ≠ q of H(t_q, s_v)` | [`loss::class_loss`] |
//! | `L_patch = mean over v, i of H(t_vi, s_vi)` | [`loss::patch_loss`] |
//! | `∂H/∂s = (softmax(s/τₛ) − t)/τₛ` | [`loss::patch_loss_with_gradient`], [`loss::class_loss_with_gradient`] |
//! | `L = L_class + λ·L_patch` | [`loss::total_loss`] |
//! | `c ← m·c + (1 − m)·mean(g)` | [`center::update_mut`] |
//! | `label(i) = Σ aff(i, j)·label(j) / Σ aff(i, j)` over the top-k of a window | [`propagation::Clip::propagate_into`] |
//!
//! # Example
//!
//! `examples/positives.rs`:
//!
#![doc = concat!("```\n", include_str!("../examples/positives.rs"), "```")]
//!
//! # Contracts
//!
//! Arguments are checked at the door and errors name the argument, the expected and the given size; no input makes a
//! function panic. A buffer called `scratch` may hold anything and is as long as its `…_scratch_len` says.
//! Numbers are `f32` in a fixed order of operations, schedules are `f64`.
//!
//! Features, none of them default: `ndarray` (array views as inputs), `matrixmultiply` (linear maps of the aggregation
//! as matrix products; this one allocates), `std`.
#![no_std]
#![cfg_attr(not(feature = "matrixmultiply"), forbid(unsafe_code))]
#![cfg_attr(feature = "matrixmultiply", deny(unsafe_code))]

#[cfg(any(test, feature = "std"))]
extern crate std;

pub mod aggregation;
pub mod center;
pub mod class_attention;
pub mod error;
pub mod frame;
#[cfg(feature = "matrixmultiply")]
mod gemm;
pub mod layers;
pub mod loss;
pub mod matching;
pub mod math;
pub mod neighborhood;
pub mod propagation;
pub mod rows;
pub mod schedule;
pub mod segmentation_metrics;
pub mod shape;
pub mod softmax;

pub use error::{Error, Result};
