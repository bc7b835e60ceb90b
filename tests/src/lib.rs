//! What the integration tests share: the golden reference set, its tolerances and the proof that all of it was checked.
//!
//! | file | job |
//! |---|---|
//! | [`golden`] | opens the set, hands out tensors and hyper-parameters, accounts for coverage |
//! | [`json`] | the JSON files of the set, with the same accounting |
//! | [`compare`] | `abs(a - b) <= atol + rtol * abs(b)`, integers exactly, sets, stepped weights |
//! | [`mod@device`] | where the tests compute, and in which ways |
//! | [`suite`] | one test per file, and one that refuses a file no test knows |
//! | [`video`] | label propagation over the clips of the set |
//!
//! A golden test binary is a table from file to function:
//!
//! ```ignore
//! pass_tests::golden_suite! {
//!     elsewhere: ["augment.safetensors"];
//!     neighbours_json: "neighbours.json",
//!     loss: "loss.safetensors",
//! }
//!
//! fn loss(golden: &Golden) {
//!     let file = golden.file("loss.safetensors");
//!     let batch = file.hyper_usize("batch");
//!     let (logits, shape) = file.tensor("student_global_cls");
//!     file.check("epoch0.total", &[total(logits, shape, batch)]);
//! }
//! ```
//!
//! The set is `fixtures/golden`, or the folder named by `PASS_GOLDEN_DIR` (same format, other seeds and sizes).

pub mod compare;
pub mod device;
pub mod golden;
pub mod json;
pub mod suite;
pub mod video;

pub use compare::{Comparison, SteppedWeights, Tolerance};
pub use device::{all_ops, device};
pub use golden::{Golden, GoldenFile, TensorSpec};
pub use json::GoldenJson;
