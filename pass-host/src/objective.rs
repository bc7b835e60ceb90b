//! What is optimized: the image-level loss and the patch loss over tensors; twins of `pass-core` under the same names.
//!
//! | file | job |
//! |---|---|
//! | [`matching`] | the positives of every patch |
//! | [`center`] | running centers of the teacher's outputs |
//! | [`loss`] | which student row learns from which teacher row, with which weight |
//! | [`method`] | what an image-level method is |
//! | [`dino`], [`moco_v3`], [`moby`] | the methods |
//! | [`contrast`] | what contrastive methods share |
//! | [`forward`] | crops through student and teacher to the two losses |

pub mod center;
pub mod contrast;
pub mod dino;
pub mod forward;
pub mod loss;
pub mod matching;
pub mod method;
pub mod moby;
pub mod moco_v3;
