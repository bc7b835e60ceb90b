//! ResNet-50 (He et al., 2016) as torchvision builds and names it ("v1.5": the stride is at the 3x3 convolution), for the
//! baselines that are judged beside Vision Transformers.
//!
//! Batch normalization is that of evaluation, folded into the convolution before it when the file is opened:
//! `w' = w γ/√(σ² + ε)`, `b' = β − μ γ/√(σ² + ε)`.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Result, Tensor};

use super::parameters::{LoadError, Parameters};
use super::weights::WeightsError;
use super::weights_file::WeightsFile;
use crate::ops::{Ops, Placement, Rectifier};
use crate::random::{Purpose, Stream};

/// ε of every batch normalization.
const BATCH_NORM_EPS: f64 = 1e-5;
/// Blocks of layer 1 to layer 4.
pub const BLOCKS: [usize; 4] = [3, 4, 6, 3];
/// Names of the tensors of a batch normalization.
const BATCH_NORM: [&str; 4] = ["weight", "bias", "running_mean", "running_var"];
/// The tensor that marks such a file.
pub const MARK: &str = "layer1.0.conv1.weight";

/// Widths, which are the only sizes that differ between two networks here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct ResNetSizes {
    /// Channels of the first convolution.
    pub stem: usize,
    /// Channels inside the blocks of layer 1 to layer 4.
    pub inner: [usize; 4],
    /// Channels after each of them.
    pub outer: [usize; 4],
}

/// Name and kernel of a convolution and the name of the batch normalization behind it.
struct Unit {
    convolution: String,
    norm: String,
    /// `[out, in, k, k]`
    shape: [usize; 4],
}

impl ResNetSizes {
    /// The widths by the shapes of some tensors.
    ///
    /// # Errors
    /// The name of a tensor that is not there or no convolution.
    pub fn find(shape: impl Fn(&str) -> Option<Vec<usize>>) -> std::result::Result<Self, String> {
        let outputs = |name: String| match shape(&name).as_deref() {
            Some([outputs, _, _, _]) if *outputs > 0 => Ok(*outputs),
            _ => Err(name),
        };
        let mut sizes = Self { stem: outputs("conv1.weight".into())?, inner: [0; 4], outer: [0; 4] };
        for layer in 0..4 {
            sizes.inner[layer] = outputs(format!("layer{}.0.conv1.weight", layer + 1))?;
            sizes.outer[layer] = outputs(format!("layer{}.0.conv3.weight", layer + 1))?;
        }
        Ok(sizes)
    }

    /// Names and shapes of all tensors, in the order of the data flow.
    pub fn specification(&self) -> Vec<(String, Vec<usize>)> {
        let mut list = Vec::new();
        for Unit { convolution, norm, shape } in self.units() {
            list.push((format!("{convolution}.weight"), shape.to_vec()));
            list.extend(BATCH_NORM.map(|part| (format!("{norm}.{part}"), vec![shape[0]])));
        }
        list
    }

    fn units(&self) -> Vec<Unit> {
        let unit = |name: &str, convolution: &str, norm: &str, shape| Unit {
            convolution: format!("{name}{convolution}"),
            norm: format!("{name}{norm}"),
            shape,
        };
        let mut units = vec![unit("", "conv1", "bn1", [self.stem, 3, 7, 7])];
        let mut input = self.stem;
        for layer in 0..4 {
            let (inner, outer) = (self.inner[layer], self.outer[layer]);
            for block in 0..BLOCKS[layer] {
                let name = format!("layer{}.{block}.", layer + 1);
                units.push(unit(&name, "conv1", "bn1", [inner, input, 1, 1]));
                units.push(unit(&name, "conv2", "bn2", [inner, inner, 3, 3]));
                units.push(unit(&name, "conv3", "bn3", [outer, inner, 1, 1]));
                if block == 0 {
                    units.push(unit(&name, "downsample.0", "downsample.1", [outer, input, 1, 1]));
                }
                input = outer;
            }
        }
        units
    }

    /// Fresh folded weights: normal with variance `2/(out·k²)`, batch normalization that changes nothing; each tensor a pure
    /// function of seed and name.
    ///
    /// # Errors
    /// What the tensor library refuses.
    pub fn fresh(&self, seed: u64, device: &Device) -> Result<HashMap<String, Tensor>> {
        let mut tensors = HashMap::new();
        for Unit { convolution, shape, .. } in self.units() {
            let name = format!("{convolution}.weight");
            let mut stream = Stream::new(seed, Purpose::Init, &[xxhash_rust::xxh3::xxh3_64(name.as_bytes())]);
            let deviation = (2.0 / (shape[0] * shape[2] * shape[3]) as f64).sqrt();
            let count: usize = shape.iter().product();
            let values = (0..count).map(|_| (deviation * stream.normal()) as f32).collect::<Vec<_>>();
            tensors.insert(name, Tensor::from_vec(values, &shape, device)?);
            tensors.insert(format!("{convolution}.bias"), Tensor::zeros(shape[0], DType::F32, device)?);
        }
        Ok(tensors)
    }
}

/// A file with torchvision's names.
pub struct ResNetFile {
    /// Widths.
    pub sizes: ResNetSizes,
    /// Weight and bias of every convolution, batch normalization folded in.
    pub tensors: HashMap<String, Tensor>,
    /// Tensors read.
    pub count: usize,
}

impl ResNetFile {
    /// Reads the tensors of a file with these names.
    ///
    /// # Errors
    /// [`WeightsError`] for a file that cannot be read and for any tensor that is missing, left over, of another shape
    /// or not finite.
    pub fn read(mut file: WeightsFile, device: &Device) -> std::result::Result<Self, WeightsError> {
        let mut tensors: BTreeMap<_, _> = file.tensors(&Device::Cpu)?.into_iter().collect();
        let path = file.path();
        let expected = tensors.len();
        let load = |source| WeightsError::Load { path: path.into(), source };
        let sizes = ResNetSizes::find(|name| tensors.get(name).map(|tensor| tensor.dims().to_vec()))
            .map_err(|name| load(LoadError::Missing { name, found: 0, expected }))?;
        let mut take = |name: String, shape: &[usize]| {
            let Some(tensor) = tensors.remove(&name) else {
                return Err(load(LoadError::Missing { name, found: expected - tensors.len(), expected }));
            };
            if tensor.dims() != shape {
                let (expected, found) = (shape.to_vec(), tensor.dims().to_vec());
                return Err(load(LoadError::Shape { name, expected, found }));
            }
            let tensor = tensor.to_dtype(DType::F64)?;
            // a sum of finite values of f32 is finite in f64; NaN and infinity are not lost in it
            match tensor.abs()?.sum_all()?.to_scalar::<f64>()?.is_finite() {
                true => Ok(tensor),
                false => Err(WeightsError::NotFinite { path: path.into(), name }),
            }
        };
        let mut folded = HashMap::new();
        let mut count = 0;
        for Unit { convolution, norm, shape } in sizes.units() {
            let weight = take(format!("{convolution}.weight"), &shape)?;
            let mut part = |part: usize| take(format!("{norm}.{}", BATCH_NORM[part]), &shape[..1]);
            let (gamma, beta, mean, variance) = (part(0)?, part(1)?, part(2)?, part(3)?);
            count += 1 + BATCH_NORM.len();
            let scale = (gamma / (variance + BATCH_NORM_EPS)?.sqrt()?)?;
            let weight = weight.broadcast_mul(&scale.reshape((shape[0], 1, 1, 1))?)?;
            let bias = (beta - (mean * scale)?)?;
            for (part, tensor) in [("weight", weight), ("bias", bias)] {
                let tensor = tensor.to_dtype(DType::F32)?.to_device(device)?;
                folded.insert(format!("{convolution}.{part}"), tensor);
            }
        }
        if let Some(name) = tensors.keys().next() {
            return Err(load(LoadError::Unexpected { name: name.clone(), expected: count }));
        }
        Ok(Self { sizes, tensors: folded, count })
    }
}

/// Which layers keep their resolution and look further apart instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dilation {
    /// None: strides 4, 8, 16 and 32.
    None,
    /// Layer 4: strides 4, 8, 16 and 16.
    Layer4,
    /// Layers 3 and 4: strides 4, 8, 8 and 8.
    Layer3,
}

/// The network: images to the outputs of its four layers.
pub struct ResNet {
    stem: [Tensor; 2],
    layers: Vec<Vec<Bottleneck>>,
}

struct Bottleneck {
    reduce: [Tensor; 2],
    spatial: [Tensor; 2],
    expand: [Tensor; 2],
    shortcut: Option<[Tensor; 2]>,
}

impl ResNet {
    /// The network of folded weights.
    ///
    /// # Errors
    /// If one is missing.
    pub fn new(parameters: &Parameters) -> Result<Self> {
        let convolution = |name: String| -> Result<[Tensor; 2]> {
            Ok([parameters.get(&format!("{name}.weight"))?, parameters.get(&format!("{name}.bias"))?])
        };
        let block = |layer: usize, block: usize| {
            let name = format!("layer{}.{block}", layer + 1);
            Ok(Bottleneck {
                reduce: convolution(format!("{name}.conv1"))?,
                spatial: convolution(format!("{name}.conv2"))?,
                expand: convolution(format!("{name}.conv3"))?,
                shortcut: match block {
                    0 => Some(convolution(format!("{name}.downsample.0"))?),
                    _ => None,
                },
            })
        };
        let layer = |layer: usize| (0..BLOCKS[layer]).map(|index| block(layer, index)).collect();
        Ok(Self { stem: convolution("conv1".into())?, layers: (0..4).map(layer).collect::<Result<_>>()? })
    }

    /// The outputs `[B, C, h, w]` of the first `layers` layers for images `[B, 3, H, W]`.
    ///
    /// No gradient reaches the first convolution: it stays as it is, as is usual when a ResNet is fine-tuned.
    ///
    /// # Errors
    /// If the shape of the images is another one.
    pub fn forward(&self, images: &Tensor, dilation: Dilation, layers: usize) -> Result<Vec<Tensor>> {
        let [weight, bias] = &self.stem;
        let stem = [weight.detach(), bias.detach()];
        let x = convolve(&images.detach(), &stem, Step { stride: 2, dilation: 1 }, Rectifier::Relu)?;
        // after the ReLU nothing is below the zeros of the border
        let x = x.pad_with_zeros(2, 1, 1)?.pad_with_zeros(3, 1, 1)?;
        let mut x = x.max_pool2d_with_stride(3, 2)?;
        let mut outputs = Vec::with_capacity(layers);
        let mut spread = 1;
        for (index, layer) in self.layers.iter().enumerate().take(layers) {
            let dilated = match dilation {
                Dilation::None => false,
                Dilation::Layer4 => index == 3,
                Dilation::Layer3 => index >= 2,
            };
            // the first block of a dilated layer still looks as far as the layer before
            let first = spread;
            let mut stride = if index == 0 { 1 } else { 2 };
            if dilated {
                spread *= stride;
                stride = 1;
            }
            for (block, weights) in layer.iter().enumerate() {
                let step = match block {
                    0 => Step { stride, dilation: first },
                    _ => Step { stride: 1, dilation: spread },
                };
                x = weights.forward(&x, step)?;
            }
            outputs.push(x.clone());
        }
        Ok(outputs)
    }
}

impl Bottleneck {
    fn forward(&self, x: &Tensor, step: Step) -> Result<Tensor> {
        let inner = convolve(x, &self.reduce, PLAIN, Rectifier::Relu)?;
        let inner = convolve(&inner, &self.spatial, step, Rectifier::Relu)?;
        let made = convolve(&inner, &self.expand, PLAIN, Rectifier::None)?;
        let start = match &self.shortcut {
            Some(shortcut) => convolve(x, shortcut, Step { dilation: 1, ..step }, Rectifier::None)?,
            None => x.clone(),
        };
        (made + start)?.relu()
    }
}

/// How a kernel moves and how far apart its taps are.
#[derive(Clone, Copy)]
struct Step {
    stride: usize,
    dilation: usize,
}

const PLAIN: Step = Step { stride: 1, dilation: 1 };

/// A convolution `[B, C, H, W]` whose border keeps `H/stride x W/stride`.
fn convolve(x: &Tensor, [weight, bias]: &[Tensor; 2], step: Step, rectifier: Rectifier) -> Result<Tensor> {
    let Step { stride, dilation } = step;
    let placement = Placement { stride, padding: (weight.dim(3)? / 2) * dilation, dilation };
    Ops::fused().convolution(x, weight, bias, placement, rectifier)
}
