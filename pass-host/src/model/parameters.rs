//! Names, shapes and first values of every tensor, as in the published checkpoints; strict loading.

use std::collections::{BTreeMap, HashMap};

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};

use super::{Architecture, CLASS_ATTENTION_BLOCKS, MLP_RATIO};
use crate::ops::GradientSink;
use crate::random::{Purpose, Stream};

/// Standard deviation of linear weights, position embeddings and the class token at the start.
///
/// The reference truncates at ±2 in absolute value, 100 standard deviations away: a plain normal.
const WEIGHT_STD: f64 = 0.02;

/// How a tensor starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All zeros.
    Zeros,
    /// All ones.
    Ones,
    /// Normal with standard deviation 0.02.
    Normal,
    /// Uniform in `[-bound, bound]` (the framework default 1/√fan_in that the reference leaves in place).
    Uniform(f64),
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
}

impl Architecture {
    /// Every tensor of the network, in the order of the data flow.
    pub fn specification(&self) -> Vec<Specification> {
        let mut list = SpecificationList::default();
        let (dim, patch) = (self.dim, self.patch_size);
        list.push("backbone.pos_embed", &[1, self.grid * self.grid, dim], Init::Normal);
        let conv = Init::Uniform(1.0 / ((3 * patch * patch) as f64).sqrt());
        list.push("backbone.patch_embed.proj.weight", &[dim, 3, patch, patch], conv);
        list.push("backbone.patch_embed.proj.bias", &[dim], conv);
        for block in 0..self.depth {
            let name = format!("backbone.blocks.{block}");
            list.norm(&format!("{name}.norm1"), dim);
            list.linear(&format!("{name}.attn.qkv"), dim, 3 * dim);
            list.linear(&format!("{name}.attn.proj"), dim, dim);
            list.norm(&format!("{name}.norm2"), dim);
            list.linear(&format!("{name}.mlp.fc1"), dim, MLP_RATIO * dim);
            list.linear(&format!("{name}.mlp.fc2"), MLP_RATIO * dim, dim);
        }
        list.push("ca_head.cls_token", &[1, 1, dim], Init::Normal);
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
        list.head("c_head", self, self.class_prototypes);
        if let Some(prototypes) = self.patch_prototypes {
            list.head("p_head", self, prototypes);
        }
        list.0
    }
}

#[derive(Default)]
struct SpecificationList(Vec<Specification>);

impl SpecificationList {
    fn push(&mut self, name: &str, shape: &[usize], init: Init) {
        self.0.push(Specification { name: name.into(), shape: shape.to_vec(), init, trainable: true });
    }

    fn norm(&mut self, name: &str, dim: usize) {
        self.push(&format!("{name}.weight"), &[dim], Init::Ones);
        self.push(&format!("{name}.bias"), &[dim], Init::Zeros);
    }

    fn linear(&mut self, name: &str, inputs: usize, outputs: usize) {
        self.push(&format!("{name}.weight"), &[outputs, inputs], Init::Normal);
        self.push(&format!("{name}.bias"), &[outputs], Init::Zeros);
    }

    fn head(&mut self, name: &str, architecture: &Architecture, prototypes: usize) {
        let (hidden, bottleneck) = (architecture.head_hidden, architecture.head_bottleneck);
        self.linear(&format!("{name}.mlp.0"), architecture.dim, hidden);
        self.linear(&format!("{name}.mlp.2"), hidden, hidden);
        self.linear(&format!("{name}.mlp.4"), hidden, bottleneck);
        self.push(&format!("{name}.last_layer.weight_g"), &[prototypes, 1], Init::Ones);
        self.0.last_mut().expect("just pushed").trainable = !architecture.norm_last_layer;
        let bound = 1.0 / (bottleneck as f64).sqrt();
        self.push(&format!("{name}.last_layer.weight_v"), &[prototypes, bottleneck], Init::Uniform(bound));
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
        for spec in architecture.specification() {
            let values = initial_values(&spec, seed);
            let tensor = Tensor::from_vec(values, spec.shape.as_slice(), device)?;
            tensors.insert(spec.name, Parameter::new(tensor, role, spec.trainable)?);
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
        let specification = architecture.specification();
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
            parameters.insert(spec.name, Parameter::new(tensor, role, spec.trainable)?);
        }
        let mut unknown: Vec<_> = tensors.keys().filter(|name| !parameters.contains_key(*name)).collect();
        unknown.sort();
        match unknown.first() {
            Some(name) => Err(LoadError::Unexpected { name: (*name).clone(), expected }),
            None => Ok(Self::from(parameters)),
        }
    }

    /// The momentum teacher's first state: a copy, without variables.
    pub fn to_teacher(&self) -> Result<Self> {
        let copy = |(name, parameter): (&String, &Parameter)| {
            let tensor = parameter.tensor.detach().copy()?;
            Ok((name.clone(), Parameter { tensor, trainable: false }))
        };
        Ok(Self::from(self.tensors.iter().map(copy).collect::<Result<BTreeMap<_, _>>>()?))
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
            (name, Parameter { tensor, trainable })
        };
        Self::from(tensors.into_iter().map(wrap).collect::<BTreeMap<_, _>>())
    }
}

impl Parameter {
    fn new(tensor: Tensor, role: Role, trainable: bool) -> Result<Self> {
        let trainable = trainable && role == Role::Student;
        let tensor = if trainable { Var::from_tensor(&tensor)?.as_tensor().clone() } else { tensor };
        Ok(Self { tensor, trainable })
    }
}

fn initial_values(spec: &Specification, seed: u64) -> Vec<f32> {
    let count = spec.shape.iter().product();
    let key = xxhash_rust::xxh3::xxh3_64(spec.name.as_bytes());
    let mut stream = Stream::new(seed, Purpose::Init, &[key]);
    match spec.init {
        Init::Zeros => vec![0.0; count],
        Init::Ones => vec![1.0; count],
        Init::Normal => (0..count).map(|_| (WEIGHT_STD * stream.normal()) as f32).collect(),
        Init::Uniform(bound) => (0..count).map(|_| stream.range(-bound, bound) as f32).collect(),
    }
}
