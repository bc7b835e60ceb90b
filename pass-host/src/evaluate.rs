//! The evaluations of the papers, on any weights that [`Encoder`](crate::model::encoder::Encoder) opens.
//!
//! | module | job |
//! |---|---|
//! | [`vos`] | video object segmentation by label propagation (DAVIS 2017) |

pub mod vos;
