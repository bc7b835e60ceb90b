//! What trained features are worth: one protocol a module.
//!
//! | module | job |
//! |---|---|
//! | [`class_folders`] | folders of classes: which image belongs to which class |
//! | [`image_features`] | one feature vector an image |
//! | [`neighbors`] | the most similar rows of a bank, exactly |
//! | [`knn`] | weighted k-nearest-neighbor classification |
//! | [`linear`] | linear classification of frozen features |
//! | [`retrieval`] | scenes parsed by the labels of the nearest patches |
//! | [`segment`] | scenes parsed by a head that is trained |
//! | [`error`] | what can go wrong with the first five |

pub mod class_folders;
pub mod error;
pub mod image_features;
pub mod knn;
pub mod linear;
pub mod neighbors;
pub mod retrieval;
pub mod segment;

pub use error::EvaluateError;
