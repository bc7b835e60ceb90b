//! Any bytes with the checksum on: as they are, then with the checksum that fits them, which must make no difference to
//! the rest of the reader. `cargo fuzz run checksum` in `pass-edge`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pass_edge::Error;
use pass_edge::model::Model;
use pass_edge_fuzz::{SMALLEST, read_and_run};
use xxhash_rust::xxh3::xxh3_64;

fuzz_target!(|data: &[u8]| {
    let Some((first, data)) = data.split_first() else { return };
    let mut file = if first % 2 == 0 {
        data.to_vec()
    } else {
        // the front of a valid file is replaced by the data, or its end cut off at the data's length
        let (at, data) = data.split_at(data.len().min(2));
        let at = at.iter().fold(0, |at, byte| 256 * at + usize::from(*byte)) % SMALLEST.len();
        let mut file = SMALLEST.to_vec();
        for (byte, change) in file[at..].iter_mut().zip(data) {
            *byte = *change;
        }
        file
    };
    let as_it_is = Model::from_bytes(&file);
    if let Ok(model) = &as_it_is {
        read_and_run(model);
    }
    let Some(end) = file.len().checked_sub(8) else { return };
    let checksum = xxh3_64(&file[..end]).to_le_bytes();
    if as_it_is.is_err() && checksum == file[end..] {
        assert!(!matches!(as_it_is, Err(Error::Checksum { .. })));
    }
    file[end..].copy_from_slice(&checksum);
    match (Model::from_bytes(&file), Model::from_verified_bytes(&file)) {
        (Ok(model), Ok(_)) => read_and_run(&model),
        (Err(with), Err(without)) => assert_eq!(with, without),
        (with, without) => panic!("{:?} with the checksum, {:?} without", with.err(), without.err()),
    }
});
