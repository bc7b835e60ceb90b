//! (golden_host)
