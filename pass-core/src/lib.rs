#![no_std]
#![forbid(unsafe_code)]
//! x
#[cfg(any(test, feature = "std"))]
extern crate std;

pub mod center;
pub mod error;
pub mod loss;
pub mod matching;
pub mod math;
pub mod neighborhood;
pub mod schedule;
pub mod shape;
pub mod softmax;

pub use error::{Error, Result};
