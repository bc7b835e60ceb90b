//! (objective)
