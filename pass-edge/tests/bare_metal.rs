//! The numbers baked into the bare-metal program are the ones this machine computes.

#[path = "../bare-metal/src/expected.rs"]
mod expected;
#[path = "../bare-metal/src/scenario.rs"]
mod scenario;

use scenario::Memory;

#[test]
fn the_baked_numbers_are_what_the_workstation_computes() {
    let mut memory = Box::new(Memory::new());
    let found = scenario::run(&mut memory).unwrap_or_else(|failure| panic!("{failure}"));
    assert_eq!(found, expected::OUTCOME);
}

#[test]
fn damage_is_refused() {
    scenario::refuse_damage(&mut Box::new(Memory::new())).unwrap_or_else(|failure| panic!("{failure}"));
}
