//! What trained features are worth: one protocol a module.

pub mod segment;
