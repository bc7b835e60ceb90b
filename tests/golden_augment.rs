//! (golden_augment)
