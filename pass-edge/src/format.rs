//! The `.pass` file, version 1. All numbers are little-endian.
//!
//! | bytes | what |
//! |---|---|
//! | 0–7 | magic `89 50 41 53 53 0d 0a 1a` (`\x89PASS\r\n\x1a`: a transfer as text breaks it) |
//! | 8–11 | format version, `u32` |
//! | 12–15 | length of the header in bytes, `u32` |
//! | 16– | header: one [`Header`], then [`Header::tensors`] times one [`TensorEntry`], in postcard encoding |
//! | | zeros up to the next multiple of 64 |
//! | | the tensors, each starting at a multiple of 64, zeros between them |
//! | last 8 | XXH3-64 (seed 0) of every byte before |
//!
//! An architecture has exactly one list of tensors and one layout: the order below, each tensor at the first multiple of
//! 64 after its predecessor. The table repeats names, kinds, shapes and offsets for readers that do not know the
//! architecture; this reader computes them and refuses a file in which any of them differs.
//!
//! | tensor | kind, shape | present |
//! |---|---|---|
//! | `patch_embed.proj.{weight,scale,bias}` | linear `[D, 3·p·p]` | always |
//! | `pos_embed` | f32 `[N, D]`, for this grid, row-major over it | always |
//! | `prefix_tokens` | f32 `[P, D]`: class token, then registers, positions added | `P > 0` |
//! | `blocks.i.norm1.{weight,bias}` | f32 `[1, D]` | each block |
//! | `blocks.i.attn.qkv.{weight,scale,bias}` | linear `[3·D, D]`: q, k, v, each `[heads, D/heads]` | each block |
//! | `blocks.i.attn.proj.{weight,scale,bias}` | linear `[D, D]` | each block |
//! | `blocks.i.norm2.{weight,bias}` | f32 `[1, D]` | each block |
//! | `blocks.i.mlp.fc1.{weight,scale,bias}` | linear `[hidden, D]` | each block |
//! | `blocks.i.mlp.fc2.{weight,scale,bias}` | linear `[D, hidden]` | each block |
//! | `norm.{weight,bias}` | f32 `[1, D]` | with a final norm |
//! | `pca.mean`, `pca.basis` | f32 `[1, D]`, `[components, D]` | `components > 0` |
//! | `contract.block_cosine` | f32 `[1, depth]`: cosine to float after each block | always |
//! | `self_test.feature` | f32 `[1, D]`: patch token 0 of the self-test | always |
//!
//! A *linear* map `[out, in]` is `weight` (int8), `scale` (f32 `[1, out]`, weight = int8 · scale) and `bias` (f32 `[1, out]`).
//! Weights lie within ±127 ([`Mode::Exact`]) or ±63 ([`Mode::Fast`]), never at −128.
//! Its int8 values are stored as every kernel reads them: panels of 16 outputs; in a panel, groups of 4 inputs; in a
//! group, output by output its 4 values. `in` is padded with zeros to a multiple of 16 (`K`), so the value of output `o`
//! and input `i` is byte `(o/16)·16·K + (i/4)·64 + (o mod 16)·4 + i mod 4`.
//!
//! The patch embedding takes raw pixels: its input `(channel·p + row)·p + column` is the byte minus 128, so
//! normalization is part of weight and bias: `w = W/(255·std)`, `b = B + Σ W·(128/255 − mean)/std`.
//! LayerScale is part of `attn.proj` and `mlp.fc2`. The factor `(D/heads)^-1/2` of attention is *not* part of `qkv`.
//!
//! The self-test image is RGB, row-major; its bytes are those of [`generated_pixel`] for the seed in the header.
//! The digest is XXH3-64 over the little-endian bits of all features, patch tokens first, then prefix tokens.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Problem, Result, check_multiple, check_range};

/// First bytes of every `.pass` file.
pub const MAGIC: [u8; 8] = *b"\x89PASS\r\n\x1a";
/// The version written and read here.
pub const VERSION: u32 = 1;
/// Every tensor starts at a multiple of this many bytes.
pub const ALIGNMENT: usize = 64;
/// Bytes before the header.
pub(crate) const PREAMBLE: usize = 16;
/// Bytes of the checksum.
pub(crate) const CHECKSUM: usize = 8;
/// Outputs in a panel of int8 weights.
pub(crate) const PANEL: usize = 16;
/// Inputs are padded to a multiple of this.
pub(crate) const INPUT_MULTIPLE: usize = 16;

/// Every size of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Architecture {
    /// Embedding width D, a multiple of 16 · heads.
    pub dim: u32,
    /// Transformer blocks.
    pub depth: u32,
    /// Attention heads.
    pub heads: u32,
    /// Hidden width of the MLP, a multiple of 16.
    pub hidden: u32,
    /// Side of a patch in pixels.
    pub patch_size: u32,
    /// Patches `(rows, columns)`.
    pub grid: (u32, u32),
    /// Whether there is a class token.
    pub class_token: bool,
    /// Register tokens.
    pub register_tokens: u32,
    /// Whether a LayerNorm follows the last block.
    pub final_norm: bool,
    /// Whether LayerScale was folded into the weights (a note; the arithmetic is the same).
    pub layer_scale_folded: bool,
    /// Rows of the PCA basis; 0 without one.
    pub pca_components: u32,
}

impl Architecture {
    /// ViT-Ti (D 192, 3 heads), 12 blocks, no prefix tokens, no final norm: the backbone of the released checkpoints.
    pub const fn vit_tiny(patch_size: u32, grid: (u32, u32)) -> Self {
        Self::vit(192, 3, patch_size, grid)
    }

    /// ViT-S (D 384, 6 heads), otherwise as [`Architecture::vit_tiny`].
    pub const fn vit_small(patch_size: u32, grid: (u32, u32)) -> Self {
        Self::vit(384, 6, patch_size, grid)
    }

    /// ViT-B (D 768, 12 heads), otherwise as [`Architecture::vit_tiny`].
    pub const fn vit_base(patch_size: u32, grid: (u32, u32)) -> Self {
        Self::vit(768, 12, patch_size, grid)
    }

    const fn vit(dim: u32, heads: u32, patch_size: u32, grid: (u32, u32)) -> Self {
        Self {
            dim,
            depth: 12,
            heads,
            hidden: 4 * dim,
            patch_size,
            grid,
            class_token: false,
            register_tokens: 0,
            final_norm: false,
            layer_scale_folded: false,
            pca_components: 0,
        }
    }

    /// Embedding width D.
    pub const fn dim(&self) -> usize {
        self.dim as usize
    }

    /// Patches N of the grid.
    pub const fn patches(&self) -> usize {
        self.grid.0 as usize * self.grid.1 as usize
    }

    /// Class and register tokens P.
    pub const fn prefix_tokens(&self) -> usize {
        self.class_token as usize + self.register_tokens as usize
    }

    /// All tokens, N + P.
    pub const fn tokens(&self) -> usize {
        self.patches() + self.prefix_tokens()
    }

    /// Channels of one attention head.
    const fn head_dim(&self) -> usize {
        (self.dim / self.heads) as usize
    }

    /// Inputs of the patch embedding, `3·p·p`.
    pub const fn patch_inputs(&self) -> usize {
        3 * self.patch_size as usize * self.patch_size as usize
    }

    /// Image size in pixels, `(height, width)`.
    pub const fn image_size(&self) -> (usize, usize) {
        let side = self.patch_size as usize;
        (self.grid.0 as usize * side, self.grid.1 as usize * side)
    }

    /// Checks every size; the limits keep all later arithmetic far from overflow, on 32-bit machines too.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] or [`Error::NotDivisible`] with the field.
    pub fn validate(&self) -> Result<()> {
        check_range("dim", 16, 4096, self.dim as usize)?;
        check_range("depth", 1, 64, self.depth as usize)?;
        check_range("heads", 1, 256, self.heads as usize)?;
        check_range("hidden", 16, 16_384, self.hidden as usize)?;
        check_range("patch_size", 1, 64, self.patch_size as usize)?;
        check_range("grid rows", 1, 256, self.grid.0 as usize)?;
        check_range("grid columns", 1, 256, self.grid.1 as usize)?;
        check_range("patches", 1, 16_384, self.patches())?;
        check_range("register_tokens", 0, 64, self.register_tokens as usize)?;
        check_range("pca_components", 0, 16, self.pca_components as usize)?;
        check_multiple("dim / 16 over heads", 16 * self.heads as usize, self.dim as usize)?;
        check_range("channels of a head", 16, 512, self.head_dim())?;
        check_multiple("hidden", 16, self.hidden as usize)
    }
}

/// How pixels were normalized in training: `(value/255 − mean)/std`, channels RGB. It is part of the patch embedding.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Normalization {
    /// Mean of each channel.
    pub mean: [f32; 3],
    /// Standard deviation of each channel.
    pub std: [f32; 3],
}

/// What the writer measured: the accuracy this file promises.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Contract {
    /// Calibration images.
    pub images: u32,
    /// XXH3-64 over the calibration images, in their order.
    pub images_hash: u64,
    /// Mean cosine of patch tokens to the float model.
    pub mean_cosine: f32,
    /// Its first percentile.
    pub first_percentile: f32,
    /// The mean below which the writer would have refused.
    pub min_cosine: f32,
}

/// How finely weights are rounded. Both modes are exact in integers and equal in bits on every platform; the second lets
/// processors without 8-bit dot products add two products in 16 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// 8-bit weights, ±127.
    Exact,
    /// 7-bit weights, ±63.
    Fast,
}

impl Mode {
    /// Largest magnitude of a weight.
    pub const fn weight_limit(self) -> i8 {
        match self {
            Self::Exact => 127,
            Self::Fast => 63,
        }
    }

    /// The name, as on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Fast => "fast",
        }
    }
}

/// The self-test: a generated image and the digest of its features.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SelfTest {
    /// Seed of the image.
    pub seed: u64,
    /// Digest of its features.
    pub digest: u64,
}

/// The header, without the tensor table.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header<'a> {
    /// A name for people, at most 64 bytes.
    #[serde(borrow)]
    pub name: &'a str,
    /// Sizes.
    pub architecture: Architecture,
    /// Normalization of the pixels.
    pub normalization: Normalization,
    /// How finely weights are rounded.
    pub mode: Mode,
    /// Promised accuracy.
    pub contract: Contract,
    /// Self-test.
    pub self_test: SelfTest,
    /// Entries of the tensor table.
    pub tensors: u32,
}

impl Header<'_> {
    pub(crate) fn validate(&self) -> Result<()> {
        check_range("name", 0, 64, self.name.len())?;
        self.architecture.validate()?;
        if !self.normalization.mean.iter().all(|mean| mean.is_finite()) {
            return Err(Error::NotFinite { what: "normalization mean" });
        }
        if !self.normalization.std.iter().all(|std| std.is_finite() && *std > 0.0) {
            return Err(Error::NotFinite { what: "normalization std" });
        }
        let contract = &self.contract;
        for value in [contract.mean_cosine, contract.first_percentile, contract.min_cosine] {
            if !(-1.001..=1.001).contains(&value) {
                return Err(Error::NotFinite { what: "contract cosine" });
            }
        }
        Ok(())
    }
}

/// Element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// 32-bit float, row-major.
    F32,
    /// int8 in panels.
    Int8,
}

/// One entry of the tensor table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorEntry<'a> {
    /// Name.
    #[serde(borrow)]
    pub name: &'a str,
    /// Element type.
    pub kind: Kind,
    /// Rows and columns, without padding.
    pub shape: (u32, u32),
    /// First byte, counted from the start of the file.
    pub offset: u64,
}

/// A tensor as the architecture asks for it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TensorSpec {
    pub(crate) block: Option<usize>,
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
}

impl TensorSpec {
    /// Bytes in the file.
    pub(crate) fn bytes(&self) -> usize {
        match self.kind {
            Kind::F32 => self.rows * self.columns * size_of::<f32>(),
            Kind::Int8 => self.rows * self.columns.next_multiple_of(INPUT_MULTIPLE),
        }
    }

    pub(crate) fn error(&self, problem: Problem) -> Error {
        Error::Tensor { block: self.block, name: self.name, problem }
    }

    /// Whether `name` is this tensor's full name.
    pub(crate) fn is_called(&self, name: &str) -> bool {
        let Some(block) = self.block else { return name == self.name };
        let Some((number, part)) = name.strip_prefix("blocks.").and_then(|rest| rest.split_once('.')) else {
            return false;
        };
        // `parse` alone would accept "+1" and "01"
        let canonical =
            number == "0" || number.bytes().next().is_some_and(|first| (b'1'..=b'9').contains(&first));
        canonical && number.parse() == Ok(block) && part == self.name
    }
}

/// Something done with every tensor in file order: validated, borrowed, written.
pub(crate) trait Visit {
    type Tensor;
    fn tensor(&mut self, spec: TensorSpec) -> Result<Self::Tensor>;
}

/// Weight and bias of a LayerNorm.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Norm<T> {
    pub(crate) weight: T,
    pub(crate) bias: T,
}

/// A linear map with one scale per output.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Linear<T> {
    pub(crate) weight: T,
    pub(crate) scale: T,
    pub(crate) bias: T,
}

/// The tensors before the blocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Embedding<T> {
    pub(crate) patch: Linear<T>,
    pub(crate) positions: T,
    pub(crate) prefix: Option<T>,
}

/// The tensors of one block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block<T> {
    pub(crate) norm1: Norm<T>,
    pub(crate) qkv: Linear<T>,
    pub(crate) proj: Linear<T>,
    pub(crate) norm2: Norm<T>,
    pub(crate) fc1: Linear<T>,
    pub(crate) fc2: Linear<T>,
}

/// The tensors after the blocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tail<T> {
    pub(crate) norm: Option<Norm<T>>,
    pub(crate) pca: Option<(T, T)>,
    pub(crate) block_cosine: T,
    pub(crate) self_test: T,
}

struct Walk<'v, V> {
    visit: &'v mut V,
    block: Option<usize>,
}

impl<V: Visit> Walk<'_, V> {
    fn float(&mut self, name: &'static str, rows: usize, columns: usize) -> Result<V::Tensor> {
        self.visit.tensor(TensorSpec { block: self.block, name, kind: Kind::F32, rows, columns })
    }

    fn linear(
        &mut self,
        names: [&'static str; 3],
        outputs: usize,
        inputs: usize,
    ) -> Result<Linear<V::Tensor>> {
        let [weight, scale, bias] = names;
        let spec =
            TensorSpec { block: self.block, name: weight, kind: Kind::Int8, rows: outputs, columns: inputs };
        Ok(Linear {
            weight: self.visit.tensor(spec)?,
            scale: self.float(scale, 1, outputs)?,
            bias: self.float(bias, 1, outputs)?,
        })
    }

    fn norm(&mut self, names: [&'static str; 2], dim: usize) -> Result<Norm<V::Tensor>> {
        Ok(Norm { weight: self.float(names[0], 1, dim)?, bias: self.float(names[1], 1, dim)? })
    }
}

macro_rules! linear_names {
    ($name:literal) => {
        [concat!($name, ".weight"), concat!($name, ".scale"), concat!($name, ".bias")]
    };
}

macro_rules! norm_names {
    ($name:literal) => {
        [concat!($name, ".weight"), concat!($name, ".bias")]
    };
}

pub(crate) fn walk_embedding<V: Visit>(a: &Architecture, visit: &mut V) -> Result<Embedding<V::Tensor>> {
    let mut walk = Walk { visit, block: None };
    Ok(Embedding {
        patch: walk.linear(linear_names!("patch_embed.proj"), a.dim(), a.patch_inputs())?,
        positions: walk.float("pos_embed", a.patches(), a.dim())?,
        prefix: match a.prefix_tokens() {
            0 => None,
            tokens => Some(walk.float("prefix_tokens", tokens, a.dim())?),
        },
    })
}

pub(crate) fn walk_block<V: Visit>(
    a: &Architecture,
    block: usize,
    visit: &mut V,
) -> Result<Block<V::Tensor>> {
    let (dim, hidden) = (a.dim(), a.hidden as usize);
    let mut walk = Walk { visit, block: Some(block) };
    Ok(Block {
        norm1: walk.norm(norm_names!("norm1"), dim)?,
        qkv: walk.linear(linear_names!("attn.qkv"), 3 * dim, dim)?,
        proj: walk.linear(linear_names!("attn.proj"), dim, dim)?,
        norm2: walk.norm(norm_names!("norm2"), dim)?,
        fc1: walk.linear(linear_names!("mlp.fc1"), hidden, dim)?,
        fc2: walk.linear(linear_names!("mlp.fc2"), dim, hidden)?,
    })
}

pub(crate) fn walk_tail<V: Visit>(a: &Architecture, visit: &mut V) -> Result<Tail<V::Tensor>> {
    let mut walk = Walk { visit, block: None };
    Ok(Tail {
        norm: if a.final_norm { Some(walk.norm(norm_names!("norm"), a.dim())?) } else { None },
        pca: match a.pca_components as usize {
            0 => None,
            rows => Some((walk.float("pca.mean", 1, a.dim())?, walk.float("pca.basis", rows, a.dim())?)),
        },
        block_cosine: walk.float("contract.block_cosine", 1, a.depth as usize)?,
        self_test: walk.float("self_test.feature", 1, a.dim())?,
    })
}

/// The bytes of an f32 tensor as numbers.
#[inline(always)]
pub(crate) fn floats(bytes: &[u8]) -> impl ExactSizeIterator<Item = f32> + '_ {
    bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes))
}

/// Byte `index` of the self-test image: bits 56–63 of SplitMix64's output for state `seed + index`.
pub fn generated_pixel(seed: u64, index: u64) -> u8 {
    let mut z = seed.wrapping_add(index).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 56) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_canonical_name_of_a_tensor_is_its_name() {
        let spec = TensorSpec { block: Some(11), name: "mlp.fc1.bias", kind: Kind::F32, rows: 1, columns: 4 };
        assert!(spec.is_called("blocks.11.mlp.fc1.bias"));
        for name in
            ["blocks.011.mlp.fc1.bias", "blocks.+11.mlp.fc1.bias", "blocks.1.mlp.fc1.bias", "mlp.fc1.bias"]
        {
            assert!(!spec.is_called(name), "{name}");
        }
    }

    #[test]
    fn impossible_sizes_are_refused_by_field() {
        let good = Architecture::vit_tiny(16, (14, 14));
        good.validate().unwrap();
        let refused = |change: fn(&mut Architecture), field: &str| {
            let mut architecture = good;
            change(&mut architecture);
            let error = std::string::ToString::to_string(&architecture.validate().unwrap_err());
            assert!(error.starts_with(field), "{error}");
        };
        refused(|a| a.heads = 0, "heads");
        refused(|a| a.heads = 5, "dim");
        refused(|a| a.depth = 65, "depth");
        refused(|a| a.grid = (0, 14), "grid rows");
        refused(|a| a.grid = (256, 256), "patches");
        refused(|a| a.hidden = 100, "hidden");
        refused(|a| a.patch_size = u32::MAX, "patch_size");
    }
}
