//! Names, shapes and first values of every tensor, as in the published checkpoints; strict loading.

use std::collections::{BTreeMap, HashMap};

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};

use super::pos_embed::sin_cos_positions;
use super::{Architecture, CLASS_ATTENTION_BLOCKS, MLP_RATIO};
use crate::config::{Positions, WeightInit};
use crate::ops::GradientSink;
use crate::random::{Purpose, Stream};

/// Standard deviation of linear weights, position embeddings and the class token at the start.
///
/// The reference truncates at ±2 in absolute value, 100 standard deviations away: a plain normal.
const WEIGHT_STD: f64 = 0.02;
/// The same of the class token beside Xavier weights (MoCo-v3).
const XAVIER_CLASS_TOKEN_STD: f64 = 1e-6;

/// How a tensor starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All zeros.
    Zeros,
    /// All ones.
    Ones,
    /// Normal with this standard deviation.
    Normal(f64),
    /// Uniform in `[-bound, bound]`.
    Uniform(f64),
    /// Positions of a square grid, see [`sin_cos_positions`].
    SinCos,
}

/// One tensor of an architecture.
#[derive(Clone, Debug, PartialEq)]
pub struct Specification {
    /// Name in checkpoints.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// First values.
    pub init: Init,
    /// Whether the student learns it.
    pub trainable: bool,
    /// Whether the teacher has none.
    pub student_only: bool,
}

impl Specification {
    /// A tensor of both networks that the student learns.
    pub fn learned(name: impl Into<String>, shape: &[usize], init: Init) -> Self {
        Self { name: name.into(), shape: shape.to_vec(), init, trainable: true, student_only: false }
    }
}

impl Architecture {
    /// Every tensor of the student, in the order of the data flow.
    pub fn specification(&self) -> Vec<Specification> {
        let mut list = SpecificationList { init: self.init, list: Vec::new() };
        let (dim, patch) = (self.dim, self.patch_size);
        let (positions, learned) = match self.positions {
            Positions::Learned => (Init::Normal(WEIGHT_STD), true),
            Positions::SinCos => (Init::SinCos, false),
        };
        list.push("backbone.pos_embed", &[1, self.grid * self.grid, dim], positions).trainable = learned;
        let pixels = 3 * patch * patch;
        let (weight, bias) = match self.init {
            WeightInit::Normal => (default_linear(pixels), default_linear(pixels)),
            WeightInit::Xavier => (xavier(pixels, dim), Init::Zeros),
        };
        let learned = !self.freeze_patch_embed;
        list.push("backbone.patch_embed.proj.weight", &[dim, 3, patch, patch], weight).trainable = learned;
        list.push("backbone.patch_embed.proj.bias", &[dim], bias).trainable = learned;
        for block in 0..self.depth {
            let name = format!("backbone.blocks.{block}");
            list.norm(&format!("{name}.norm1"), dim);
            list.packed(&format!("{name}.attn.qkv"), dim, dim, 3);
            list.linear(&format!("{name}.attn.proj"), dim, dim);
            list.norm(&format!("{name}.norm2"), dim);
            list.linear(&format!("{name}.mlp.fc1"), dim, MLP_RATIO * dim);
            list.linear(&format!("{name}.mlp.fc2"), MLP_RATIO * dim, dim);
        }
        let class_token = match self.init {
            WeightInit::Normal => WEIGHT_STD,
            WeightInit::Xavier => XAVIER_CLASS_TOKEN_STD,
        };
        list.push("ca_head.cls_token", &[1, 1, dim], Init::Normal(class_token));
        for block in 0..CLASS_ATTENTION_BLOCKS {
            let name = format!("ca_head.cls_blocks.{block}");
            list.norm(&format!("{name}.norm1"), dim);
            for part in ["q", "k", "v", "proj"] {
                list.linear(&format!("{name}.attn.{part}"), dim, dim);
            }
            list.norm(&format!("{name}.norm2"), dim);
            list.linear(&format!("{name}.mlp.fc1"), dim, MLP_RATIO * dim);
            list.linear(&format!("{name}.mlp.fc2"), MLP_RATIO * dim, dim);
        }
        list.norm("ca_head.norm", dim);
        list.list.extend(self.image_heads.iter().cloned());
        if let Some(prototypes) = self.patch_prototypes {
            let sizes = [dim, self.head_hidden, self.head_bottleneck, prototypes];
            list.list.extend(projection_head("p_head", sizes, self.norm_last_layer));
        }
        list.list
    }

    /// The tensors of [`Architecture::specification`] that a network of this role has.
    fn tensors_of(&self, role: Role) -> impl Iterator<Item = Specification> {
        let all = self.specification().into_iter();
        all.filter(move |spec| role == Role::Student || !spec.student_only)
    }
}

/// A projection head with widths `[D, hidden, bottleneck, K]`; its magnitudes are learned unless `norm_last_layer`.
pub fn projection_head(
    name: &str,
    [dim, hidden, bottleneck, prototypes]: [usize; 4],
    norm_last_layer: bool,
) -> Vec<Specification> {
    let mut list = SpecificationList { init: WeightInit::Normal, list: Vec::new() };
    list.linear(&format!("{name}.mlp.0"), dim, hidden);
    list.linear(&format!("{name}.mlp.2"), hidden, hidden);
    list.linear(&format!("{name}.mlp.4"), hidden, bottleneck);
    let magnitude = list.push(&format!("{name}.last_layer.weight_g"), &[prototypes, 1], Init::Ones);
    magnitude.trainable = !norm_last_layer;
    let direction = format!("{name}.last_layer.weight_v");
    list.push(&direction, &[prototypes, bottleneck], default_linear(bottleneck));
    list.list
}

/// Uniform within 1/√inputs, the default of the reference's framework.
pub(crate) fn default_linear(inputs: usize) -> Init {
    Init::Uniform(1.0 / (inputs as f64).sqrt())
}

/// Uniform within √(6/(inputs + outputs)).
fn xavier(inputs: usize, outputs: usize) -> Init {
    Init::Uniform((6.0 / (inputs + outputs) as f64).sqrt())
}

struct SpecificationList {
    init: WeightInit,
    list: Vec<Specification>,
}

impl SpecificationList {
    fn push(&mut self, name: &str, shape: &[usize], init: Init) -> &mut Specification {
        self.list.push(Specification::learned(name, shape, init));
        self.list.last_mut().expect("just pushed")
    }

    fn norm(&mut self, name: &str, dim: usize) {
        self.push(&format!("{name}.weight"), &[dim], Init::Ones);
        self.push(&format!("{name}.bias"), &[dim], Init::Zeros);
    }

    fn linear(&mut self, name: &str, inputs: usize, outputs: usize) {
        self.packed(name, inputs, outputs, 1);
    }

    /// So many layers of equal size, one below the other.
    fn packed(&mut self, name: &str, inputs: usize, outputs: usize, layers: usize) {
        let init = match self.init {
            WeightInit::Normal => Init::Normal(WEIGHT_STD),
            WeightInit::Xavier => xavier(inputs, outputs),
        };
        self.push(&format!("{name}.weight"), &[layers * outputs, inputs], init);
        self.push(&format!("{name}.bias"), &[layers * outputs], Init::Zeros);
    }
}

/// Why tensors do not fit an architecture.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A tensor of the architecture is not there.
    #[error("tensor `{name}` is missing ({found} of {expected} tensors found)")]
    Missing {
        /// First missing name.
        name: String,
        /// Tensors of the architecture that were found.
        found: usize,
        /// Tensors of the architecture.
        expected: usize,
    },
    /// A tensor that the architecture does not know.
    #[error("tensor `{name}` is not part of this model ({expected} tensors expected)")]
    Unexpected {
        /// First unknown name.
        name: String,
        /// Tensors of the architecture.
        expected: usize,
    },
    /// A tensor of another shape.
    #[error("tensor `{name}`: expected {expected:?}, found {found:?}")]
    Shape {
        /// Its name.
        name: String,
        /// Shape in this architecture.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },
    /// The tensor library refused.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl LoadError {
    /// What to try.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Shape { .. } | Self::Missing { .. } | Self::Unexpected { .. } => Some(
                "the weights come from another architecture; pass the same `model.*`, `head.*` and `augment.global_size` \
                 as the run that wrote them, or start a new run"
                    .into(),
            ),
            Self::Tensor(_) => None,
        }
    }
}

/// Whether gradients are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Trainable tensors are variables.
    Student,
    /// Nothing is a variable: forward passes build no graph.
    Teacher,
}

/// One tensor of a network.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// Its value; a variable if it is trained.
    pub tensor: Tensor,
    /// Whether the optimizer changes it.
    pub trainable: bool,
    /// Whether the teacher has none.
    pub student_only: bool,
}

/// All tensors of a network by name.
#[derive(Clone, Debug)]
pub struct Parameters {
    tensors: BTreeMap<String, Parameter>,
    sink: GradientSink,
}

impl Parameters {
    /// Fresh weights; each tensor is a pure function of (seed, its name).
    pub fn init(architecture: &Architecture, role: Role, seed: u64, device: &Device) -> Result<Self> {
        let mut tensors = BTreeMap::new();
        for spec in architecture.tensors_of(role) {
            let values = initial_values(&spec, seed);
            let tensor = Tensor::from_vec(values, spec.shape.as_slice(), device)?;
            let parameter = Parameter::new(tensor, role, &spec)?;
            tensors.insert(spec.name, parameter);
        }
        Ok(Self::from(tensors))
    }

    /// Weights from a file: every tensor of the architecture, of its shape, and nothing else.
    pub fn from_tensors(
        architecture: &Architecture,
        role: Role,
        tensors: &HashMap<String, Tensor>,
        device: &Device,
    ) -> std::result::Result<Self, LoadError> {
        let specification: Vec<_> = architecture.tensors_of(role).collect();
        let expected = specification.len();
        let found = specification.iter().filter(|spec| tensors.contains_key(&spec.name)).count();
        let mut parameters = BTreeMap::new();
        for spec in specification {
            let Some(tensor) = tensors.get(&spec.name) else {
                return Err(LoadError::Missing { name: spec.name, found, expected });
            };
            if tensor.dims() != spec.shape {
                let found = tensor.dims().to_vec();
                return Err(LoadError::Shape { name: spec.name, expected: spec.shape, found });
            }
            let tensor = tensor.to_device(device)?.to_dtype(DType::F32)?.contiguous()?.copy()?;
            let parameter = Parameter::new(tensor, role, &spec)?;
            parameters.insert(spec.name, parameter);
        }
        let mut unknown: Vec<_> = tensors.keys().filter(|name| !parameters.contains_key(*name)).collect();
        unknown.sort();
        match unknown.first() {
            Some(name) => Err(LoadError::Unexpected { name: (*name).clone(), expected }),
            None => Ok(Self::from(parameters)),
        }
    }

    /// The momentum teacher's first state: a copy of what both networks have, without variables.
    pub fn to_teacher(&self) -> Result<Self> {
        let copy = |(name, parameter): (&String, &Parameter)| {
            let tensor = parameter.tensor.detach().copy()?;
            Ok((name.clone(), Parameter { tensor, trainable: false, student_only: false }))
        };
        let shared = self.tensors.iter().filter(|(_, parameter)| !parameter.student_only);
        Ok(Self::from(shared.map(copy).collect::<Result<BTreeMap<_, _>>>()?))
    }

    /// The tensor called `name`.
    pub fn get(&self, name: &str) -> Result<Tensor> {
        match self.tensors.get(name) {
            Some(parameter) => Ok(parameter.tensor.clone()),
            None => candle_core::bail!("parameter `{name}` is missing"),
        }
    }

    /// The tensor called `name`, if there is one.
    pub fn find(&self, name: &str) -> Option<Tensor> {
        self.tensors.get(name).map(|parameter| parameter.tensor.clone())
    }

    /// Where fused operations leave the gradients of these tensors.
    pub fn sink(&self) -> &GradientSink {
        &self.sink
    }

    /// The gradient of one of these tensors after a backward pass: what fused operations left in the sink and what candle's
    /// store holds. Whoever calls `backward` asks here, or misses the former.
    ///
    /// # Errors
    /// If both are there and do not fit.
    pub fn take_gradient(&self, parameter: &Parameter, store: &mut GradStore) -> Result<Option<Tensor>> {
        Ok(match (self.sink.take(&parameter.tensor), store.remove(&parameter.tensor)) {
            (Some(one), Some(other)) => Some((one + other)?),
            (one, other) => one.or(other),
        })
    }

    /// The same tensors, whose gradients go to `sink`.
    pub fn with_sink(self, sink: GradientSink) -> Self {
        Self { sink, ..self }
    }

    /// Name and tensor, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Parameter)> {
        self.tensors.iter().map(|(name, parameter)| (name.as_str(), parameter))
    }

    /// Names and values for a file, sorted by name.
    pub fn to_tensors(&self) -> Vec<(String, Tensor)> {
        self.tensors.iter().map(|(name, parameter)| (name.clone(), parameter.tensor.detach())).collect()
    }

    /// Number of values.
    pub fn count(&self) -> usize {
        self.tensors.values().map(|parameter| parameter.tensor.elem_count()).sum()
    }
}

impl From<BTreeMap<String, Parameter>> for Parameters {
    fn from(tensors: BTreeMap<String, Parameter>) -> Self {
        Self { tensors, sink: GradientSink::default() }
    }
}

impl FromIterator<(String, Tensor)> for Parameters {
    /// Tensors as they are, none trained; for parts of a network under test.
    fn from_iter<I: IntoIterator<Item = (String, Tensor)>>(tensors: I) -> Self {
        let wrap = |(name, tensor): (String, Tensor)| {
            let trainable = tensor.is_variable();
            (name, Parameter { tensor, trainable, student_only: false })
        };
        Self::from(tensors.into_iter().map(wrap).collect::<BTreeMap<_, _>>())
    }
}

impl Parameter {
    fn new(tensor: Tensor, role: Role, spec: &Specification) -> Result<Self> {
        let trainable = spec.trainable && role == Role::Student;
        let tensor = if trainable { Var::from_tensor(&tensor)?.as_tensor().clone() } else { tensor };
        Ok(Self { tensor, trainable, student_only: spec.student_only })
    }
}

fn initial_values(spec: &Specification, seed: u64) -> Vec<f32> {
    let count = spec.shape.iter().product();
    let key = xxhash_rust::xxh3::xxh3_64(spec.name.as_bytes());
    let mut stream = Stream::new(seed, Purpose::Init, &[key]);
    match spec.init {
        Init::Zeros => vec![0.0; count],
        Init::Ones => vec![1.0; count],
        Init::Normal(deviation) => (0..count).map(|_| (deviation * stream.normal()) as f32).collect(),
        Init::Uniform(bound) => (0..count).map(|_| stream.range(-bound, bound) as f32).collect(),
        Init::SinCos => sin_cos_positions(spec.shape[1].isqrt(), spec.shape[2]),
    }
}
