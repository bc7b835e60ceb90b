//! `pass-host`: the program.

fn main() {}
