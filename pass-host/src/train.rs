//! The run.
pub mod batch;
pub mod guard;
pub mod schedule;
pub mod state;
pub mod trainer;
pub mod vitals;
