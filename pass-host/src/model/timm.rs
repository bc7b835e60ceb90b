//! Vision Transformers from files with timm's names: class token, registers, LayerScale and final norm are optional parts.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::Architecture;
use super::parameters::LoadError;
use super::pos_embed::ResizeRule;
use super::weights::WeightsError;
use super::weights_file::WeightsFile;

/// ImageNet statistics, which networks with timm's names are trained with.
pub const IMAGENET: ([f32; 3], [f32; 3]) = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);
/// Channels of an attention head where a file does not tell.
const USUAL_HEAD: usize = 64;
/// The tensor that marks such a file.
pub const MARK: &str = "patch_embed.proj.weight";
/// Metadata keys that `pass-host import` writes.
const HEADS: &str = "heads";
const POSITIONS: &str = "positions";

/// A backbone in the names and the form of [`Vit`](super::vit::Vit): LayerScale folded into the map before it, the class
/// token's position added to the token.
pub struct TimmVit {
    /// Sizes (those of the projection heads are unset).
    pub architecture: Architecture,
    /// How positions of other grids are made.
    pub positions: ResizeRule,
    /// `backbone.…`
    pub tensors: HashMap<String, Tensor>,
    /// Parts that a backbone trained here does not have.
    pub parts: OptionalParts,
    /// Tensors read.
    pub count: usize,
}

/// Parts that a file may have or not.
#[derive(Clone, Copy, Debug, Default)]
pub struct OptionalParts {
    /// The first prefix token is a class token.
    pub class_token: bool,
    /// Register tokens behind it.
    pub registers: usize,
    /// There was LayerScale, now folded.
    pub layer_scale: bool,
}

impl TimmVit {
    /// Reads the tensors of a file with these names; `heads` overrides what its metadata says.
    ///
    /// # Errors
    /// [`WeightsError`] for a file that cannot be read and for any tensor that is missing, left over, of another shape
    /// or not finite.
    pub fn read(mut file: WeightsFile, heads: Option<usize>, device: &Device) -> Result<Self, WeightsError> {
        let tensors: BTreeMap<_, _> = file.tensors(device)?.into_iter().collect();
        let (path, metadata) = (file.path(), file.metadata());
        let told = match metadata.get(HEADS) {
            Some(text) => Some(text.parse().ok().filter(|heads| *heads > 0).ok_or_else(|| {
                let (path, found) = (path.into(), text.clone());
                WeightsError::Metadata { path, key: HEADS, expected: "a positive whole number", found }
            })?),
            None => None,
        };
        let positions = match metadata.get(POSITIONS).map(String::as_str) {
            None | Some("size") => ResizeRule::Size,
            Some("offset") => ResizeRule::Offset,
            Some(other) => {
                let (path, found) = (path.into(), other.to_owned());
                return Err(WeightsError::Metadata {
                    path,
                    key: POSITIONS,
                    expected: "`size` or `offset`",
                    found,
                });
            }
        };
        let mut source = Source { path, expected: tensors.len(), tensors };
        let (architecture, parts, tensors) = source.backbone(heads.or(told))?;
        Ok(Self { architecture, positions, tensors, parts, count: source.expected })
    }
}

/// Tensors by name, taken out one by one: what is left at the end was not expected.
struct Source<'p> {
    path: &'p Path,
    tensors: BTreeMap<String, Tensor>,
    expected: usize,
}

impl Source<'_> {
    fn fail(&self, source: LoadError) -> WeightsError {
        WeightsError::Load { path: self.path.into(), source }
    }

    fn missing(&self, name: &str) -> WeightsError {
        let found = self.expected - self.tensors.len();
        self.fail(LoadError::Missing { name: name.into(), found, expected: self.expected })
    }

    fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The length of an axis of a tensor that must be there and have `rank` axes.
    fn axis(&self, name: &str, axis: usize, rank: usize) -> Result<usize, WeightsError> {
        let tensor = self.tensors.get(name).ok_or_else(|| self.missing(name))?;
        match tensor.dims() {
            dims if dims.len() == rank && dims[axis] > 0 => Ok(dims[axis]),
            dims => {
                let (expected, found) = (vec![1; rank], dims.to_vec());
                Err(self.fail(LoadError::Shape { name: name.into(), expected, found }))
            }
        }
    }

    /// The tensor `name`, in f32, which must have this shape.
    fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor, WeightsError> {
        let Some(tensor) = self.tensors.remove(name) else { return Err(self.missing(name)) };
        if tensor.dims() != shape {
            let (expected, found) = (shape.to_vec(), tensor.dims().to_vec());
            return Err(self.fail(LoadError::Shape { name: name.into(), expected, found }));
        }
        let tensor = tensor.to_dtype(DType::F32)?.contiguous()?;
        // a sum of finite f64 values is finite; NaN and infinity are not lost in it
        match tensor.to_dtype(DType::F64)?.abs()?.sum_all()?.to_scalar::<f64>()?.is_finite() {
            true => Ok(tensor),
            false => Err(WeightsError::NotFinite { path: self.path.into(), name: name.into() }),
        }
    }

    fn backbone(
        &mut self,
        heads: Option<usize>,
    ) -> Result<(Architecture, OptionalParts, HashMap<String, Tensor>), WeightsError> {
        let (dim, patch_size) = (self.axis(MARK, 0, 4)?, self.axis(MARK, 3, 4)?);
        let hidden = self.axis("blocks.0.mlp.fc1.weight", 0, 2)?;
        let depth = (0..).take_while(|block| self.has(&format!("blocks.{block}.norm1.weight"))).count();
        let heads = heads.unwrap_or(dim / USUAL_HEAD).max(1);
        if !dim.is_multiple_of(heads) {
            let (path, found) = (self.path.into(), heads.to_string());
            return Err(WeightsError::Metadata {
                path,
                key: HEADS,
                expected: "a divisor of the width",
                found,
            });
        }
        let mut tensors = HashMap::new();
        let mut put = |name: &str, tensor: Tensor| tensors.insert(format!("backbone.{name}"), tensor);
        put(MARK, self.take(MARK, &[dim, 3, patch_size, patch_size])?);
        put("patch_embed.proj.bias", self.take("patch_embed.proj.bias", &[dim])?);
        let count = self.axis("pos_embed", 1, 3)?;
        let mut positions = self.take("pos_embed", &[1, count, dim])?;
        let mut prefix = Vec::new();
        let mut parts = OptionalParts { class_token: self.has("cls_token"), ..OptionalParts::default() };
        if parts.class_token {
            let mut token = self.take("cls_token", &[1, 1, dim])?;
            // its position comes first, unless the positions are a square without it
            if count.isqrt().pow(2) != count {
                token = (token + positions.narrow(1, 0, 1)?)?;
                positions = positions.narrow(1, 1, count - 1)?.contiguous()?;
            }
            prefix.push(token);
        }
        if self.has("reg_token") {
            parts.registers = self.axis("reg_token", 1, 3)?;
            prefix.push(self.take("reg_token", &[1, parts.registers, dim])?);
        }
        let grid = positions.dim(1)?.isqrt();
        if grid * grid != positions.dim(1)? {
            let (expected, found) = (vec![1, grid * grid, dim], positions.dims().to_vec());
            return Err(self.fail(LoadError::Shape { name: "pos_embed".into(), expected, found }));
        }
        put("pos_embed", positions);
        if !prefix.is_empty() {
            put("prefix_tokens", Tensor::cat(&prefix, 1)?);
        }
        for block in 0..depth {
            let layers = [
                ("norm1", vec![dim], None),
                ("attn.qkv", vec![3 * dim, dim], None),
                ("attn.proj", vec![dim, dim], Some("ls1.gamma")),
                ("norm2", vec![dim], None),
                ("mlp.fc1", vec![hidden, dim], None),
                ("mlp.fc2", vec![dim, hidden], Some("ls2.gamma")),
            ];
            for (layer, shape, scale) in layers {
                let name = format!("blocks.{block}.{layer}");
                let mut weight = self.take(&format!("{name}.weight"), &shape)?;
                let mut bias = self.take(&format!("{name}.bias"), &shape[..1])?;
                let scale = scale.map(|scale| format!("blocks.{block}.{scale}"));
                if let Some(scale) = scale.filter(|scale| self.has(scale)) {
                    let scale = self.take(&scale, &shape[..1])?;
                    parts.layer_scale = true;
                    bias = (bias * &scale)?;
                    weight = weight.broadcast_mul(&scale.unsqueeze(1)?)?;
                }
                put(&format!("{name}.weight"), weight);
                put(&format!("{name}.bias"), bias);
            }
        }
        if self.has("norm.weight") {
            put("norm.weight", self.take("norm.weight", &[dim])?);
            put("norm.bias", self.take("norm.bias", &[dim])?);
        }
        if let Some(name) = self.tensors.keys().next() {
            let expected = self.expected - self.tensors.len();
            return Err(self.fail(LoadError::Unexpected { name: name.clone(), expected }));
        }
        let architecture = Architecture::backbone_only(dim, depth, heads, patch_size, grid);
        Ok((architecture, parts, tensors))
    }
}
