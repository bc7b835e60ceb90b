//! (step)
fn main() {}
