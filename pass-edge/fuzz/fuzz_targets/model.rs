//! Any bytes behind the checksum: the reader returns, and what it accepts runs. `cargo fuzz run model` in `pass-edge`.
//!
//! One input in two is taken as the file itself, the other as changes to a valid one, so that accepted models occur.
#![no_main]

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use pass_edge::model::Model;
use pass_edge_fuzz::{SMALLEST, read_and_run};

#[derive(Arbitrary, Debug)]
struct Change {
    at: u16,
    value: u8,
}

fuzz_target!(|data: &[u8]| {
    let Some((first, data)) = data.split_first() else { return };
    if first % 2 == 0 {
        if let Ok(model) = Model::from_verified_bytes(data) {
            read_and_run(&model);
        }
        return;
    }
    let mut file = SMALLEST.to_vec();
    for change in Vec::<Change>::arbitrary(&mut Unstructured::new(data)).unwrap_or_default() {
        let at = usize::from(change.at) % file.len();
        file[at] = change.value;
    }
    if let Ok(model) = Model::from_verified_bytes(&file) {
        read_and_run(&model);
    }
});
