//! Trains Vision Transformers without labels: an image-level method (DINO) plus the patch objective of PASS.
//!
//! The modules in the order in which data flows through a run:
//!
//! | module | job |
//! |---|---|
//! | [`config`] | every hyper-parameter: default, meaning, validation |
//! | [`data`] | image folders, tars and shards -> batches of augmented crops |
//! | [`model`] | Vision Transformer, aggregation head, projection heads |
//! | [`objective`] | matching, aggregation and the two losses over tensors |
//! | [`ops`] | the training operations, fused, each with its composition twin |
//! | [`optimizer`] | parameter groups, clipping, AdamW and the momentum teacher |
//! | [`train`] | the loop |
//! | [`distributed`] | several processes that train one network |
//! | [`checkpoint`], [`metrics`] | what a run leaves on disk |
//! | [`evaluate`] | what trained features are worth |
//! | [`pack`] | all images of a data set in one file |
//! | [`export`], [`features`] | what leaves the run |
//! | [`picture`], [`pca`] | what a network sees, drawn |
//! | [`report`] | a run as one HTML page |
//! | [`sweep`] | many runs and one table |
//! | [`bench`](mod@bench), [`cost`] | how fast training is, and what a step costs |
//! | [`quantize`](mod@quantize) | the file for the device, and the check of it |
//! | [`import`] | weights of others |
//! | [`allocator`] | memory that is kept between steps |
#![deny(unsafe_code)]

pub mod allocator;
pub mod bench;
pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod cost;
pub mod data;
pub mod device;
pub mod distributed;
pub mod error;
pub mod evaluate;
pub mod export;
pub mod features;
pub mod import;
pub mod metrics;
pub mod model;
pub mod objective;
mod onnx;
pub mod ops;
pub mod optimizer;
pub mod pack;
pub mod pca;
pub mod picture;
pub mod quantize;
pub mod random;
pub mod report;
pub mod sweep;
pub mod train;
