//! (loader)
fn main() {}
