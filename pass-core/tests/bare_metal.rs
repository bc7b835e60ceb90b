//! The numbers baked into the bare-metal program are the ones this machine computes.

#[path = "../bare-metal/src/expected.rs"]
mod expected;
#[path = "../bare-metal/src/scenario.rs"]
mod scenario;

#[test]
fn the_baked_numbers_are_what_the_workstation_computes() {
    let found = scenario::run().expect("the scenario runs");
    let expected = expected::OUTCOME;
    assert_eq!(found.matches, expected.matches, "{found:?}");
    // A matrix product sums in another order; the scalar path must agree to the last bit.
    let tolerance = if cfg!(feature = "matrixmultiply") { 1e-4 } else { 0.0 };
    for (found, expected) in [
        (&found.targets[..], &expected.targets[..]),
        (&found.losses, &expected.losses),
        (&found.gradient, &expected.gradient),
    ] {
        for (a, b) in found.iter().zip(expected) {
            assert!((a - b).abs() <= tolerance, "expected {expected:?}\nfound {found:?}");
        }
    }
}
