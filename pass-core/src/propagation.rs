//! Video object segmentation without training: labels of the first frame travel along similar patches (the DAVIS 2017
//! protocol of DINO and PASS, `eval_video_segmentation.py`).
//!
//! For a frame, the context is the first frame and the last [`Propagation::previous_frames`] ones. With L2-normalized
//! features, target patch `i` and context patch `j`:
//!
//! ```text
//! aff(i, j) = exp(cos(xᵢ, xⱼ)/τ)   if j lies within `radius` rows and columns of i, else 0
//! aff(i, j) = 0                     below the top_k-th largest of i over all context frames; ties stay
//! label(i)  = Σⱼ aff(i, j)·label(j) / Σⱼ aff(i, j)
//! ```
//!
//! `label(j)` is the mask of the first frame, one-hot at patch resolution, and for later frames the soft labels this
//! very sum gave them.
//!
//! | function | job |
//! |---|---|
//! | [`Clip`] | the frames remembered, in the caller's memory; labels of the next frame, by ranges of patches |
//! | [`one_hot_into`], [`resize_nearest_into`] | first mask to labels of the first frame |
//! | [`segment_into`] | soft labels to a mask of the frame's size |
//!
//! Similarities exist for one row of target patches at a time: memory grows with the window, never with the square of
//! the patches. A target patch is a function of nothing but the clip, so any division of a frame into ranges gives the
//! same bits.

mod affinity;
mod clip;
mod masks;

pub use clip::{Clip, ClipShape};
pub use masks::{one_hot_into, resize_nearest_into, segment_into, segment_scratch_len};

use crate::error::{Error, Result, check_positive};

/// How labels travel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Propagation {
    /// Frames remembered beside the first one.
    pub previous_frames: usize,
    /// Rows and columns that a context patch may lie away from the target patch; 0: any number.
    pub radius: usize,
    /// Context patches that decide about a target patch; of all context frames together.
    pub top_k: usize,
    /// Temperature `τ` of the affinity.
    pub temperature: f32,
}

impl Propagation {
    /// The numbers of the published evaluations: 7 frames, radius 12, top 5, temperature 0.1.
    pub const DAVIS: Self = Self { previous_frames: 7, radius: 12, top_k: 5, temperature: 0.1 };

    fn validate(&self) -> Result<()> {
        if self.top_k == 0 {
            return Err(Error::OutOfRange { what: "top-k", min: 1, max: usize::MAX, actual: 0 });
        }
        check_positive("affinity temperature", self.temperature)
    }
}
