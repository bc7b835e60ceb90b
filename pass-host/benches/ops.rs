//! (ops)
fn main() {}
