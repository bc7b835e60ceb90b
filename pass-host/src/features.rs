//! (features)
