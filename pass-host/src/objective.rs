//! What is optimized: the image-level loss and the patch loss over tensors; twins of `pass-core` under the same names.
//!
//! | file | job |
//! |---|---|
//! | [`matching`] | the positives of every patch |
//! | [`center`] | running centers of the teacher's outputs |
//! | [`loss`] | which student row learns from which teacher row, with which weight |
//! | [`forward`] | crops through student and teacher to the two losses |

pub mod center;
pub mod forward;
pub mod loss;
pub mod matching;
