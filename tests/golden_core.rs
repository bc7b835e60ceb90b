//! (golden_core)
