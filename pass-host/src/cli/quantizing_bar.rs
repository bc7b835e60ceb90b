//! The progress of `quantize` and `verify`.

use indicatif::ProgressBar;

use super::output;
use crate::quantize::Progress;

/// One bar for all phases, each with its own length.
pub(super) struct QuantizingBar(ProgressBar);

impl QuantizingBar {
    pub(super) fn new() -> Self {
        Self(output::steps_bar())
    }

    pub(super) fn show(&self, progress: Progress) {
        let (what, done, all) = match progress {
            Progress::Photos(done, all) => ("reading photos", done, all),
            Progress::Blocks(done, all) => ("quantizing blocks", done, all),
            Progress::Device(done, all) => ("measuring on the device's code", done, all),
        };
        self.0.set_message(what);
        self.0.set_length(all as u64);
        self.0.set_position(done as u64);
    }
}

impl Drop for QuantizingBar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
