//! The program from the outside: what it prints, writes and refuses.

mod bench;
mod checks;
mod features;
mod harness;
#[path = "../device/random_vit.rs"]
mod random_vit;
mod track;
