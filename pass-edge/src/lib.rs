//! Patch features on the device; int8 inference arrives with the `.pass` model format.
//!
//! Today this crate gives the device the matching, aggregation and loss of [`pass_core`] unchanged.
#![no_std]
#![deny(unsafe_code)]

pub use pass_core as core;
