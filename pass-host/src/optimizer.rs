//! (optimizer)
