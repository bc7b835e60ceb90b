//! (export)
