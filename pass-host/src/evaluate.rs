//! What features are worth, on any weights that [`Encoder`](crate::model::encoder::Encoder) opens: one protocol a module.
//!
//! | module | job |
//! |---|---|
//! | [`vos`] | video object segmentation by label propagation (DAVIS 2017) |
//! | [`segment`] | a head trained on the features: linear, or Semantic FPN |
//! | [`retrieval`] | scenes parsed by the labels of the nearest patches |
//! | [`knn`] | weighted k-nearest-neighbor classification |
//! | [`linear`] | linear classification of frozen features |
//! | [`class_folders`] | folders of classes: which image belongs to which class |
//! | [`image_features`] | one feature vector an image |
//! | [`index_png`] | masks as PNG files of numbers |
//! | [`neighbors`] | the most similar rows of a bank, exactly |
//! | [`error`] | what can go wrong |

pub mod class_folders;
pub mod error;
pub mod image_features;
pub mod index_png;
pub mod knn;
pub mod linear;
pub mod neighbors;
pub mod retrieval;
pub mod segment;
pub mod vos;

pub use error::EvaluateError;
