#![no_std]
#![cfg_attr(not(feature = "matrixmultiply"), forbid(unsafe_code))]
#![cfg_attr(feature = "matrixmultiply", deny(unsafe_code))]
//! x
#[cfg(any(test, feature = "std"))]
extern crate std;

pub mod aggregation;
pub mod center;
pub mod class_attention;
pub mod error;
#[cfg(feature = "matrixmultiply")]
mod gemm;
pub mod layers;
pub mod loss;
pub mod matching;
pub mod math;
pub mod neighborhood;
pub mod schedule;
pub mod shape;
pub mod softmax;

pub use error::{Error, Result};
