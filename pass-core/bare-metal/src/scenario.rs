//! One pass over a small image: match the patches, aggregate the positives, compare student and teacher.
//!
//! Compiled twice: into the program on the board, and into a host test that holds `expected.rs` to it.

use pass_core::aggregation::AggregationHead;
use pass_core::class_attention::{ClassAttention, ClassAttentionParameters};
use pass_core::layers::LayerNorm;
use pass_core::loss::{Temperatures, class_loss, patch_loss_with_gradient, total_loss};
use pass_core::matching::{Matches, match_into, match_scratch_len};
use pass_core::neighborhood::{Border, Neighborhood, Window};
use pass_core::shape::{PatchGrid, Tokens};
use pass_core::{Error, Result};

const HEIGHT: usize = 3;
const WIDTH: usize = 4;
/// Patches.
pub(crate) const N: usize = HEIGHT * WIDTH;
/// Values of a token; the tokens stand in for the logits of the projection heads.
pub(crate) const D: usize = 8;
const HIDDEN: usize = 16;
const HEADS: usize = 2;
/// Positives of a patch.
pub(crate) const K: usize = 4;
const BLOCK: usize = 4 * D * D + 2 * D * HIDDEN + HIDDEN + 9 * D;
const SCRATCH: usize = 4096;

/// `LEN` numbers in `[-1, 1)` from a linear congruential sequence.
const fn table<const LEN: usize>(seed: u32) -> [f32; LEN] {
    let mut values = [0.0; LEN];
    let mut state = seed;
    let mut index = 0;
    while index < LEN {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        values[index] = (state >> 8) as f32 / 8_388_608.0 - 1.0;
        index += 1;
    }
    values
}

static TEACHER: [f32; N * D] = table(1);
static STUDENT: [f32; N * D] = table(2);
static BLOCKS: [[f32; BLOCK]; 2] = [table(3), table(4)];
static CLASS: [f32; D] = table(5);
static NORM: [[f32; D]; 2] = [table(6), table(7)];
static CENTER: [f32; D] = table(8);

/// What the board and the workstation must agree on, bit for bit.
#[derive(Debug, PartialEq)]
pub(crate) struct Outcome {
    /// `[N, K]`
    pub(crate) matches: [u32; N * K],
    /// `[1 + N, D]`
    pub(crate) targets: [f32; (1 + N) * D],
    /// Class, patch and total loss.
    pub(crate) losses: [f32; 3],
    /// Gradient of the total with respect to the first patch of the student.
    pub(crate) gradient: [f32; D],
}

/// Runs everything.
pub(crate) fn run() -> Result<Outcome> {
    let mut scratch = [0.0; SCRATCH];
    let neighborhood = Neighborhood::new(PatchGrid::new(HEIGHT, WIDTH)?, Window::Side(3), Border::Wrap)?;
    let teacher = Tokens::new(&TEACHER, N, D)?;
    let mut matches = [0; N * K];
    match_into(
        teacher,
        &neighborhood,
        K,
        fit(&mut scratch, match_scratch_len(&neighborhood))?,
        &mut matches,
    )?;

    let blocks = [block(&BLOCKS[0])?, block(&BLOCKS[1])?];
    let head = AggregationHead::new(&CLASS, &blocks, LayerNorm::new(&NORM[0], &NORM[1])?)?;
    let mut targets = [0.0; (1 + N) * D];
    let mut predictions = [0.0; (1 + N) * D];
    head.aggregate_into(teacher, Matches::new(&matches, N, K)?, &mut scratch, &mut targets)?;
    head.class_into(Tokens::new(&STUDENT, N, D)?, &mut scratch, &mut predictions)?;

    let temperatures = Temperatures { student: 0.1, teacher: 0.04 };
    let (class_target, patch_targets) = targets.split_at(D);
    let (class_prediction, patch_predictions) = predictions.split_at(D);
    // The first patch stands in for the class token of a second crop.
    let views: [&[f32]; 2] = [class_prediction, &patch_predictions[..D]];
    let class = class_loss(&[class_target], &views, &CENTER, temperatures, &mut scratch)?;
    let mut gradient = [0.0; N * D];
    let patch = patch_loss_with_gradient(
        &[patch_targets],
        &[patch_predictions],
        &CENTER,
        temperatures,
        0.1,
        &mut [&mut gradient],
        &mut scratch,
    )?;
    let losses = [class, patch, total_loss(class, patch, 0.1)];
    let mut first = [0.0; D];
    first.copy_from_slice(&gradient[..D]);
    Ok(Outcome { matches, targets, losses, gradient: first })
}

fn block(weights: &[f32]) -> Result<ClassAttention<'_>> {
    let mut rest = weights;
    let parameters = ClassAttentionParameters::from_fn(|name| {
        let len = ClassAttentionParameters::<()>::len_of(name, D, HIDDEN).min(rest.len());
        let (taken, left) = rest.split_at(len);
        rest = left;
        taken
    });
    ClassAttention::new(parameters, HEADS)
}

fn fit(scratch: &mut [f32], len: usize) -> Result<&mut [f32]> {
    let actual = scratch.len();
    scratch.get_mut(..len).ok_or(Error::LengthMismatch { what: "scratch", expected: len, actual })
}
