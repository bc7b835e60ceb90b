//! Label propagation as `pass-host eval vos` computes it.

use pass_host::evaluate::vos::Propagation;
use pass_tests::Golden;
use pass_tests::video::check_propagation;

pub(super) fn video_propagation(golden: &Golden) {
    check_propagation(golden, |shape, frames, first_labels| {
        let mut clip = Propagation::new(shape, frames[0], first_labels).expect("first frame");
        frames[1..].iter().map(|frame| clip.next(frame).expect("labels")).collect()
    });
}
