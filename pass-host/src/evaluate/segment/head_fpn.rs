//! Semantic FPN on four maps of one size (SEMANTICS §7): a feature pyramid without levels, then four branches that
//! convolve, grow, shrink back and are added up. Tensor names and layouts are those of mmsegmentation; maps are
//! channels last.

use candle_core::{DType, Device, Result, Tensor, Var};

use crate::model::parameters::Parameters;
use crate::ops::{Moments, Ops, Taps};
use crate::random::{Purpose, Stream};

/// Maps that enter.
pub const LEVELS: usize = 4;
/// Convolutions of each branch; all but the first branch double the map after each.
const BRANCH: [usize; LEVELS] = [1, 1, 2, 3];
/// ε of the batch normalization.
const EPS: f64 = 1e-5;
/// Share of a new batch in the running statistics.
const MOMENTUM: f32 = 0.1;
/// Standard deviation of the last layer's first weights.
const LAST_STD: f64 = 0.01;

/// Every size of the head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FpnSizes {
    /// Width D of the features of each level.
    pub dims: [usize; LEVELS],
    /// Channels of the pyramid.
    pub neck: usize,
    /// Channels of the branches.
    pub channels: usize,
    /// Classes.
    pub classes: usize,
}

/// Four maps of patch features -> logits of every patch.
pub struct FpnHead {
    sizes: FpnSizes,
    parameters: Parameters,
    /// Running statistics of every batch normalization, in the order of the branches.
    running: Vec<Running>,
    device: Device,
    ops: Ops,
}

#[derive(Clone, Debug, PartialEq)]
struct Running {
    name: String,
    mean: Vec<f32>,
    variance: Vec<f32>,
}

impl Running {
    /// Takes in the statistics of a batch, with the unbiased variance.
    fn update(&mut self, moments: &Moments) {
        let unbiased = moments.count as f32 / (moments.count.max(2) - 1) as f32;
        for (running, &mean) in self.mean.iter_mut().zip(&moments.mean) {
            *running += MOMENTUM * (mean - *running);
        }
        for (running, &variance) in self.variance.iter_mut().zip(&moments.variance) {
            *running += MOMENTUM * (variance * unbiased - *running);
        }
    }
}

/// The index of a branch's convolution in mmsegmentation's list, where every other entry doubles the map.
fn layer(branch: usize, step: usize) -> String {
    format!("decode_head.scale_heads.{branch}.{}", 2 * step)
}

impl FpnHead {
    /// Fresh weights as mmsegmentation draws them: Xavier in the pyramid, Kaiming in the branches.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn new(sizes: FpnSizes, seed: u64, device: &Device, ops: Ops) -> Result<Self> {
        let FpnSizes { dims, neck, channels, classes } = sizes;
        let mut tensors = Vec::new();
        let mut add = |name: String, shape: &[usize], draw: &dyn Fn(&mut Stream) -> f64| -> Result<()> {
            let mut stream = Stream::new(seed, Purpose::Init, &[xxhash_rust::xxh3::xxh3_64(name.as_bytes())]);
            let values: Vec<f32> = (0..shape.iter().product()).map(|_| draw(&mut stream) as f32).collect();
            let variable = Var::from_tensor(&Tensor::from_vec(values, shape, device)?)?;
            tensors.push((name, variable.as_tensor().clone()));
            Ok(())
        };
        let uniform = |bound: f64| move |stream: &mut Stream| stream.range(-bound, bound);
        let normal = |std: f64| move |stream: &mut Stream| std * stream.normal();
        for (level, dim) in dims.into_iter().enumerate() {
            let lateral = format!("neck.lateral_convs.{level}.conv");
            add(
                format!("{lateral}.weight"),
                &[neck, dim, 1, 1],
                &uniform((6.0 / (dim + neck) as f64).sqrt()),
            )?;
            add(format!("{lateral}.bias"), &[neck], &|_| 0.0)?;
            let conv = format!("neck.fpn_convs.{level}.conv");
            add(format!("{conv}.weight"), &[neck, neck, 3, 3], &uniform((3.0 / (9 * neck) as f64).sqrt()))?;
            add(format!("{conv}.bias"), &[neck], &|_| 0.0)?;
        }
        let mut running = Vec::new();
        for (branch, &steps) in BRANCH.iter().enumerate() {
            for step in 0..steps {
                let name = layer(branch, step);
                let inputs = if step == 0 { neck } else { channels };
                let kaiming = (2.0 / (9 * channels) as f64).sqrt();
                add(format!("{name}.conv.weight"), &[channels, inputs, 3, 3], &normal(kaiming))?;
                add(format!("{name}.bn.weight"), &[channels], &|_| 1.0)?;
                add(format!("{name}.bn.bias"), &[channels], &|_| 0.0)?;
                let (mean, variance) = (vec![0.0; channels], vec![1.0; channels]);
                running.push(Running { name: format!("{name}.bn"), mean, variance });
            }
        }
        add("decode_head.conv_seg.weight".into(), &[classes, channels, 1, 1], &normal(LAST_STD))?;
        add("decode_head.conv_seg.bias".into(), &[classes], &|_| 0.0)?;
        Ok(Self { sizes, parameters: tensors.into_iter().collect(), running, device: device.clone(), ops })
    }

    /// What is learned.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// The running statistics.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn buffers(&self) -> Result<Vec<(String, Tensor)>> {
        let mut buffers = Vec::with_capacity(2 * self.running.len());
        for running in &self.running {
            for (kind, values) in [("running_mean", &running.mean), ("running_var", &running.variance)] {
                buffers.push((
                    format!("{}.{kind}", running.name),
                    Tensor::new(values.as_slice(), &Device::Cpu)?,
                ));
            }
        }
        Ok(buffers)
    }

    /// Takes over running statistics, as [`FpnHead::buffers`] gives them.
    ///
    /// # Errors
    /// If `get` does.
    pub fn restore(&mut self, mut get: impl FnMut(&str) -> Result<Tensor>) -> Result<()> {
        for running in &mut self.running {
            running.mean = get(&format!("{}.running_mean", running.name))?.to_vec1()?;
            running.variance = get(&format!("{}.running_var", running.name))?.to_vec1()?;
        }
        Ok(())
    }

    /// Logits `[B, h, w, C]` for training: batch statistics, which also move the running ones, and dropped channels.
    ///
    /// - `maps`: [`LEVELS`] maps `[B, h, w, D]`;
    /// - `keep`: factors of the channels before the last layer, `[B, channels]`: 0 or 1 / (1 − p).
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn train(&mut self, maps: &[Tensor], keep: &Tensor) -> Result<Tensor> {
        let mut moments = Vec::with_capacity(self.running.len());
        let sum = self.branches(maps, |head, name, x| {
            let [weight, bias] = head.pair(&format!("{name}.bn"))?;
            let (x, batch) = head.ops.batch_norm_relu(x, &weight, &bias, EPS)?;
            moments.push(batch);
            Ok(x)
        })?;
        for (running, moments) in self.running.iter_mut().zip(&moments) {
            running.update(moments);
        }
        let (batch, channels) = keep.dims2()?;
        self.last(&sum.broadcast_mul(&keep.reshape((batch, 1, 1, channels))?)?)
    }

    /// Logits `[B, h, w, C]` for judging: running statistics, nothing dropped.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn judge(&self, maps: &[Tensor]) -> Result<Tensor> {
        let mut running = self.running.iter();
        let sum = self.branches(maps, |head, name, x| {
            let [weight, bias] = head.pair(&format!("{name}.bn"))?;
            let Some(running) = running.next() else { candle_core::bail!("{name}: no running statistics") };
            let inverse: Vec<f32> =
                running.variance.iter().map(|v| (1.0 / (f64::from(*v) + EPS).sqrt()) as f32).collect();
            let factor = weight.mul(&Tensor::new(inverse, &head.device)?)?;
            let shift = (bias - Tensor::new(running.mean.as_slice(), &head.device)?.mul(&factor)?)?;
            x.broadcast_mul(&factor)?.broadcast_add(&shift)?.relu()
        })?;
        self.last(&sum)
    }

    /// Pyramid and branches, added up: `[B, h, w, channels]`. `activate` normalizes after every convolution.
    fn branches(
        &self,
        maps: &[Tensor],
        mut activate: impl FnMut(&Self, &str, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        if maps.len() != LEVELS {
            candle_core::bail!("semantic FPN: expected {LEVELS} maps, found {}", maps.len());
        }
        let (_, height, width, _) = maps[0].dims4()?;
        let mut laterals = Vec::with_capacity(LEVELS);
        for (level, map) in maps.iter().enumerate() {
            let [weight, bias] = self.pair(&format!("neck.lateral_convs.{level}.conv"))?;
            laterals.push(self.ops.linear(map, &weight.flatten_from(1)?, Some(&bias))?);
        }
        for level in (1..LEVELS).rev() {
            // nearest interpolation between maps of one size is no interpolation
            laterals[level - 1] = (&laterals[level - 1] + &laterals[level])?;
        }
        let mut sum: Option<Tensor> = None;
        for (branch, lateral) in laterals.iter().enumerate() {
            let [weight, bias] = self.pair(&format!("neck.fpn_convs.{branch}.conv"))?;
            let mut x = self.ops.convolution_3x3(lateral, &weight)?.broadcast_add(&bias)?;
            for step in 0..BRANCH[branch] {
                let name = layer(branch, step);
                let weight = self.parameters.get(&format!("{name}.conv.weight"))?;
                x = activate(self, &name, &self.ops.convolution_3x3(&x, &weight)?)?;
                if branch == 0 {
                    continue;
                }
                let (_, h, w, _) = x.dims4()?;
                let (mut rows, mut columns) = (Taps::bilinear(h, 2 * h), Taps::bilinear(w, 2 * w));
                if step + 1 == BRANCH[branch] {
                    // the last doubling and the way back to the first branch's size are one map
                    rows = rows.then(&Taps::bilinear(2 * h, height));
                    columns = columns.then(&Taps::bilinear(2 * w, width));
                }
                x = self.ops.resample(&x, &rows, &columns)?;
            }
            sum = Some(match sum {
                Some(sum) => (sum + x)?,
                None => x,
            });
        }
        sum.ok_or_else(|| candle_core::Error::Msg("semantic FPN: no branches".into()))
    }

    fn last(&self, x: &Tensor) -> Result<Tensor> {
        let [weight, bias] = self.pair("decode_head.conv_seg")?;
        self.ops.linear(x, &weight.flatten_from(1)?, Some(&bias))
    }

    fn pair(&self, name: &str) -> Result<[Tensor; 2]> {
        Ok([self.parameters.get(&format!("{name}.weight"))?, self.parameters.get(&format!("{name}.bias"))?])
    }

    /// Factors of the channels before the last layer: dropped with probability `p`, else scaled up. A pure function of
    /// `(seed, iteration)`.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn dropout(&self, batch: usize, p: f64, seed: u64, iteration: u64) -> Result<Tensor> {
        let mut stream = Stream::new(seed, Purpose::DropPath, &[iteration, DROPOUT]);
        let scale = if p < 1.0 { (1.0 / (1.0 - p)) as f32 } else { 0.0 };
        let mut factor = || if stream.chance(p) { 0.0 } else { scale };
        let factors: Vec<f32> = (0..batch * self.sizes.channels).map(|_| factor()).collect();
        Tensor::from_vec(factors, (batch, self.sizes.channels), &self.device)?.to_dtype(DType::F32)
    }
}

/// Keeps the random numbers of dropped channels apart from those of dropped branches.
const DROPOUT: u64 = 1 << 40;

/// The four blocks of a backbone whose outputs enter: 2, 5, 8, 11 of twelve, evenly spaced in others, the last included.
pub fn blocks(depth: usize) -> [usize; LEVELS] {
    std::array::from_fn(|level| {
        let end = ((level + 1) as f64 * depth as f64 / LEVELS as f64).round() as usize;
        end.clamp(1, depth.max(1)) - 1
    })
}

#[cfg(test)]
mod tests;
