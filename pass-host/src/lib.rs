//! Trains Vision Transformers without labels: an image-level method (DINO) plus the patch objective of PASS.
//!
//! The modules in the order in which data flows through a run:
//!
//! | module | job |
//! |---|---|
//! | [`config`] | every hyper-parameter: default, meaning, validation |
//! | [`data`] | image folders and tars -> batches of augmented crops |
//! | [`model`] | Vision Transformer, aggregation head, projection heads |
//! | [`objective`] | matching, aggregation and the two losses over tensors |
//! | [`ops`] | the training operations, fused, each with its composition twin |
//! | [`optimizer`] | parameter groups, clipping, AdamW and the momentum teacher |
//! | [`train`] | the loop |
//! | [`checkpoint`], [`metrics`] | what a run leaves on disk |
//! | [`evaluate`] | what trained features are worth |
//! | [`export`], [`features`] | what leaves the run |
//! | [`picture`], [`pca`] | what a network sees, drawn |
//! | [`report`] | a run as one HTML page |
//! | [`quantize`](mod@quantize) | the file for the device, and the check of it |
//! | [`import`] | weights of others |
//! | [`allocator`] | memory that is kept between steps |
#![deny(unsafe_code)]

pub mod allocator;
pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod data;
pub mod device;
pub mod error;
pub mod evaluate;
pub mod export;
pub mod features;
pub mod import;
pub mod metrics;
pub mod model;
pub mod objective;
pub mod ops;
pub mod optimizer;
pub mod pca;
pub mod picture;
pub mod quantize;
pub mod random;
pub mod report;
pub mod train;
