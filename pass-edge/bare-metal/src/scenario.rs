//! A model in read-only memory: its features, its self-test, matching and aggregation on them; a damaged copy.
//!
//! Compiled twice: into the program on the board, and into a host test that holds `expected.rs` to it.

use core::fmt;

use pass_edge::core::aggregation::mean_into;
use pass_edge::core::matching::{Matches, match_into, match_scratch_len};
use pass_edge::core::neighborhood::{Border, Neighborhood, Window};
use pass_edge::core::shape::{PatchGrid, Tokens};
use pass_edge::format::Architecture;
use pass_edge::kernels::Kernel;
use pass_edge::model::Model;
use pass_edge::scratch::{Scratch, ScratchLen};
use pass_edge::{Error, self_test};

/// The file, as it lies in flash.
pub(crate) static MODEL: &[u8] = include_bytes!("../../../fixtures/edge/small.pass");

/// Its sizes, known when the program is built: memory is laid out for them.
pub(crate) const ARCHITECTURE: Architecture = Architecture {
    dim: 64,
    depth: 4,
    heads: 2,
    hidden: 256,
    patch_size: 7,
    grid: (5, 7),
    class_token: true,
    register_tokens: 4,
    final_norm: true,
    layer_scale_folded: false,
    pca_components: 3,
};
const SCRATCH: ScratchLen = ScratchLen::of(&ARCHITECTURE);
const N: usize = ARCHITECTURE.patches();
const D: usize = ARCHITECTURE.dim();
/// Positives of a patch.
const K: usize = 3;

/// Working memory, placed by the caller.
pub(crate) struct Memory {
    floats: [f32; SCRATCH.floats],
    words: [i16; SCRATCH.words],
    bytes: [i8; SCRATCH.bytes],
    features: [f32; ARCHITECTURE.tokens() * D],
    targets: [f32; N * D],
    /// For a copy that can be damaged.
    file: [u8; MODEL.len()],
}

impl Memory {
    pub(crate) const fn new() -> Self {
        Self {
            floats: [0.0; SCRATCH.floats],
            words: [0; SCRATCH.words],
            bytes: [0; SCRATCH.bytes],
            features: [0.0; ARCHITECTURE.tokens() * D],
            targets: [0.0; N * D],
            file: [0; MODEL.len()],
        }
    }
}

/// What the board and the workstation must agree on, bit for bit.
#[derive(Debug, PartialEq)]
pub(crate) struct Outcome {
    /// Digest of all features of the self-test image; the file promises it.
    pub(crate) features: u64,
    /// Digest of the mean feature of each patch's three best matches.
    pub(crate) targets: u64,
}

/// What went wrong.
#[derive(Debug)]
pub(crate) enum Failure {
    Edge(Error),
    Core(pass_edge::core::Error),
    /// The file is of another architecture than the program.
    Architecture,
    /// A damaged file was not refused.
    Accepted(&'static str),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Edge(error) => write!(f, "{error}"),
            Self::Core(error) => write!(f, "{error}"),
            Self::Architecture => f.write_str("the file is of another architecture than the program"),
            Self::Accepted(damage) => write!(f, "{damage} was accepted"),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Edge(error)
    }
}

impl From<pass_edge::core::Error> for Failure {
    fn from(error: pass_edge::core::Error) -> Self {
        Self::Core(error)
    }
}

/// The features of the self-test image, compared with the promise of the file; then what they are good for.
pub(crate) fn run(memory: &mut Memory) -> Result<Outcome, Failure> {
    let model = Model::from_bytes(MODEL)?;
    if *model.architecture() != ARCHITECTURE {
        return Err(Failure::Architecture);
    }
    let Memory { floats, words, bytes, features, targets, .. } = memory;
    let mut scratch = Scratch::new(SCRATCH, floats, words, bytes)?;
    self_test::verify(&model, Kernel::best(), &mut scratch, features)?;

    let (height, width) = (ARCHITECTURE.grid.0 as usize, ARCHITECTURE.grid.1 as usize);
    let neighborhood = Neighborhood::new(PatchGrid::new(height, width)?, Window::Side(3), Border::Clip)?;
    let patches = Tokens::new(features.get(..N * D).unwrap_or_default(), N, D)?;
    let mut matches = [0; N * K];
    let scratch = floats.get_mut(..match_scratch_len(&neighborhood)).unwrap_or_default();
    match_into(patches, &neighborhood, K, scratch, &mut matches)?;
    mean_into(patches, Matches::new(&matches, N, K)?, targets)?;
    Ok(Outcome { features: self_test::digest(features), targets: self_test::digest(targets) })
}

/// Every kind of damage is found: by the checksum; without it, by the self-test; a file cut short by both.
pub(crate) fn refuse_damage(memory: &mut Memory) -> Result<(), Failure> {
    let Memory { floats, words, bytes, features, file, .. } = memory;
    file.copy_from_slice(MODEL);
    // a weight in the middle
    file[MODEL.len() / 2] ^= 1;
    if !matches!(Model::from_bytes(file), Err(Error::Checksum { .. })) {
        return Err(Failure::Accepted("a changed byte with the checksum"));
    }
    let model = Model::from_verified_bytes(file)?;
    let mut scratch = Scratch::new(SCRATCH, floats, words, bytes)?;
    if !matches!(
        self_test::verify(&model, Kernel::best(), &mut scratch, features),
        Err(Error::SelfTest { .. })
    ) {
        return Err(Failure::Accepted("a changed weight without the checksum"));
    }
    let short = MODEL.get(..MODEL.len() - 64).unwrap_or_default();
    if Model::from_bytes(short).is_ok() || Model::from_verified_bytes(short).is_ok() {
        return Err(Failure::Accepted("a file cut short"));
    }
    Ok(())
}
