//! The training operations: each as a fused CPU `f32` kernel with a hand-written backward pass, most of them as CUDA
//! kernels too, and as the plain composition of differentiable tensor operations that both must agree with.
//!
//! [`Ops`] picks per call: fused where every tensor holds `f32` on the CPU and the run asked for it, kernels on a CUDA
//! device, the composition elsewhere (`bf16` on the CPU, `f64`). Results never depend on the number of threads: work is
//! cut by sizes, sums are formed per part and added in order.
//!
//! Mixed precision: activations may be `bf16` while parameters are `f32`. Products then take both in `bf16`; norms,
//! softmax, losses and the gradients of parameters are `f32`.
//!
//! | file | operation |
//! |---|---|
//! | `layer_norm` | LayerNorm over the last dimension |
//! | `linear` | `x Wᵀ + b`, optionally followed by the exact GELU |
//! | `head` | softmax attention of one head over strided views, shared by the next two |
//! | `attention`, `class_attention` | self-attention from packed `[q|k|v]`; few queries over many tokens |
//! | `positives`, `neighbor_attention`, `gather_mean` | every patch over its own positives |
//! | `transformer` | all blocks of the backbone over the crops of all sizes, with gradients handed to a `gradient_sink` |
//! | `recompute` | the same by single operations, run forward again in the backward pass |
//! | `normalize` | L2 normalization and weight normalization |
//! | `add_scaled` | residual connection with stochastic depth |
//! | `cross_entropy` | centered, sharpened cross-entropy over many prototypes |
//! | `convolution` | convolutions of images, optionally followed by the ReLU |
//! | `projection_loss` | projection head and cross-entropy in one |
//! | `patchify` | images -> rows of pixels, for the patch embedding |
//! | `convolution_3x3`, `batch_norm` | 3x3 convolution with weight gradient; batch normalization with ReLU, channels last |
//! | `taps`, `pixel_cross_entropy` | bilinear resampling; cross-entropy of every pixel of a picture |
//! | `adamw` | clipping norm, AdamW and momentum teacher in one pass |
//! | `cuda` | all of the above but images and convolutions, as CUDA kernels; the choice of positives and the augmentation on the device |
//! | `dense` | linear layer and GELU over slices |
//! | `product`, `buffer`, `lanes`, `access` | matrix products; output buffers; vectorized functions; tensors as slices |

mod access;
mod adamw;
mod add_scaled;
mod attention;
#[cfg(all(test, feature = "_emulator"))]
mod augment_tests;
mod batch_norm;
mod buffer;
mod class_attention;
mod convolution;
mod convolution_3x3;
mod cross_entropy;
mod cuda;
mod dense;
mod gather_mean;
mod gradient_sink;
mod head;
#[cfg(all(test, feature = "_emulator"))]
mod kernel_tests;
pub(crate) mod lanes;
mod layer_norm;
mod linear;
mod neighbor_attention;
mod normalize;
mod patchify;
mod pixel_cross_entropy;
mod positives;
pub(crate) mod product;
mod projection_loss;
mod recompute;
mod taps;
#[cfg(test)]
mod testing;
mod transformer;

use crate::config::OpsKind;
use candle_core::{DType, Device, Result, Tensor};

pub use adamw::{AdamWStep, Learned, Update, clip_scale};
pub use attention::Sequences;
pub use batch_norm::Moments;
pub use convolution::{Placement, Rectifier};
pub use cross_entropy::{PairWeights, Statistics, Stats};
pub use cuda::{Stop, Upload, Uploader};
pub(crate) use cuda::{open as open_cuda, runs_on as kernels_run_on};
pub use gradient_sink::GradientSink;
pub use pixel_cross_entropy::{IGNORED, PixelLabels};
pub use positives::Positives;
pub use projection_loss::{HeadWeights, Targets};
pub use taps::Taps;
pub use transformer::{BlockWeights, Plan};

/// Most positives that the kernel holds in shared memory.
const MOST_KERNEL_POSITIVES: usize = 512;

/// How an operation is computed.
enum Way {
    /// By its fused CPU operation.
    Fused,
    /// By CUDA kernels.
    Kernels,
    /// By its composition.
    Composition,
}

/// The training operations, fused or as compositions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ops(pub OpsKind);

impl From<OpsKind> for Ops {
    fn from(kind: OpsKind) -> Self {
        Self(kind)
    }
}

impl Ops {
    /// Fused kernels where they exist.
    pub fn fused() -> Self {
        Self(OpsKind::Fused)
    }

    /// Compositions of tensor operations, everywhere.
    pub fn reference() -> Self {
        Self(OpsKind::Reference)
    }

    /// CUDA kernels run by the emulator, on CPU tensors; for tests.
    #[cfg(feature = "_emulator")]
    pub fn emulated() -> Self {
        Self(OpsKind::Emulated)
    }

    /// True where the fused CPU kernels are to be used for these tensors.
    fn fuses(self, tensors: &[&Tensor]) -> bool {
        self.0 == OpsKind::Fused && access::on_cpu_f32(tensors)
    }

    /// How to compute an operation on these activations, and parameters in `f32`.
    fn way(self, activations: &[&Tensor], parameters: &[&Tensor]) -> Way {
        let Some(first) = activations.first() else { return Way::Composition };
        let of =
            |tensor: &Tensor, dtype| tensor.dtype() == dtype && tensor.device().same_device(first.device());
        let typed = matches!(first.dtype(), DType::F32 | DType::BF16)
            && activations.iter().all(|tensor| of(tensor, first.dtype()))
            && parameters.iter().all(|tensor| of(tensor, DType::F32));
        if typed && self.uses_kernels(first.device()) {
            return Way::Kernels;
        }
        match self.fuses(activations) && self.fuses(parameters) {
            true => Way::Fused,
            false => Way::Composition,
        }
    }

    /// True where CUDA kernels take the place of fused operations.
    pub(crate) fn uses_kernels(self, device: &Device) -> bool {
        let wanted = match self.0 {
            OpsKind::Fused => device.is_cuda(),
            OpsKind::Reference => false,
            #[cfg(feature = "_emulator")]
            OpsKind::Emulated => true,
        };
        wanted && cuda::runs_on(device)
    }

    /// LayerNorm over the last dimension: `(x − mean) / sqrt(variance + eps) · weight + bias`, biased variance.
    ///
    /// - `x`: `[.., D]`; `weight`, `bias`: `[D]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn layer_norm(self, x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
        layer_norm::check(x, weight, bias)?;
        match self.way(&[x], &[weight, bias]) {
            Way::Fused => layer_norm::fused(x, weight, bias, eps),
            Way::Kernels => cuda::layer_norm(x, weight, bias, eps),
            Way::Composition => layer_norm::composition(x, weight, bias, eps),
        }
    }

    /// `x Wᵀ + b`.
    ///
    /// - `x`: `[.., I]`; `weight`: `[O, I]`; `bias`: `[O]`; result `[.., O]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn linear(self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        linear::check(x, weight, bias)?;
        match self.way(&[x], &[weight, bias.unwrap_or(weight)]) {
            Way::Fused => linear::fused(x, weight, bias, linear::Activation::None),
            Way::Kernels => cuda::linear(x, weight, bias, linear::Activation::None),
            Way::Composition => linear::composition(x, weight, bias, linear::Activation::None),
        }
    }

    /// `GELU(x Wᵀ + b)`, the exact GELU `u · Φ(u)`.
    ///
    /// Shapes as for [`Ops::linear`].
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn linear_gelu(self, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
        linear::check(x, weight, Some(bias))?;
        match self.way(&[x], &[weight, bias]) {
            Way::Fused => linear::fused(x, weight, Some(bias), linear::Activation::Gelu),
            Way::Kernels => cuda::linear(x, weight, Some(bias), linear::Activation::Gelu),
            Way::Composition => linear::composition(x, weight, Some(bias), linear::Activation::Gelu),
        }
    }

    /// Kernels over images, plus bias, optionally rectified.
    ///
    /// - `x`: `[B, C, H, W]`; `weight`: `[O, C, k, k]`; `bias`: `[O]`; result `[B, O, h, w]` with
    ///   `h = (H + 2·padding − dilation·(k − 1) − 1) / stride + 1`, rounded down.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn convolution(
        self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        placement: Placement,
        rectifier: Rectifier,
    ) -> Result<Tensor> {
        convolution::check(x, weight, bias, placement)?;
        match self.fuses(&[x, weight, bias]) {
            true => convolution::fused(x, weight, bias, placement, rectifier),
            false => convolution::composition(x, weight, bias, placement, rectifier),
        }
    }

    /// Multi-head self-attention from packed projections: `softmax(q kᵀ · (D/heads)^-½) v` per head.
    ///
    /// - `qkv`: `[B, N, 3D]`, a token is `[q|k|v]`, each `[heads, D/heads]`; result `[B, N, D]`.
    ///
    /// # Errors
    /// If the last dimension is not three times a multiple of `heads`.
    pub fn attention(self, qkv: &Tensor, heads: usize) -> Result<Tensor> {
        attention::check(qkv, heads)?;
        match self.way(&[qkv], &[]) {
            Way::Fused => attention::fused(qkv, heads),
            Way::Kernels => cuda::attention(qkv, heads),
            Way::Composition => attention::composition(qkv, heads),
        }
    }

    /// The blocks of a Vision Transformer, one after the other, over the tokens of all crops.
    ///
    /// - `x`: `[R, D]`, the tokens of all images of `plan.groups` one after the other; result `[R, D]`.
    ///
    /// The fused operation, and any with `plan.recompute`, puts the gradients of the blocks' variables into `sink`; by
    /// plain compositions they go to candle's store.
    ///
    /// # Errors
    /// If the shapes do not fit each other or `plan`.
    pub fn transformer(
        self,
        x: &Tensor,
        blocks: &[BlockWeights],
        plan: &Plan,
        sink: &GradientSink,
    ) -> Result<Tensor> {
        transformer::check(x, blocks, plan)?;
        match self.fuses(&[x]) {
            true => transformer::fused(x, blocks, plan, sink),
            false if plan.recompute && x.track_op() => recompute::transformer(self, x, blocks, plan, sink),
            false => transformer::composition(self, x, blocks, plan),
        }
    }

    /// One of these blocks by single operations.
    ///
    /// - `x`: `[B, N, D]`; `scales`: factors of the residual branches, attention and MLP, one per image; `None` = 1.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn transformer_block(
        self,
        x: &Tensor,
        weights: &BlockWeights,
        heads: usize,
        eps: f64,
        scales: [Option<&[f32]>; 2],
    ) -> Result<Tensor> {
        transformer::block(self, x, weights, heads, eps, scales)
    }

    /// The attention probabilities of [`Ops::attention`], `[B, heads, N, N]`; rows sum to 1.
    ///
    /// # Errors
    /// If the last dimension is not three times a multiple of `heads`.
    pub fn attention_weights(self, qkv: &Tensor, heads: usize) -> Result<Tensor> {
        attention::check(qkv, heads)?;
        attention::weights(qkv, heads)
    }

    /// Attention of a few queries over all tokens of their image (CaiT's class attention, with one query).
    ///
    /// - `q`: `[B, M, D]`; `k`, `v`: `[B, T, D]`; heads are consecutive parts of `D`; scale `(D/heads)^-½`;
    ///   result `[B, M, D]`.
    ///
    /// # Errors
    /// If the shapes do not fit or `heads` does not divide `D`.
    pub fn class_attention(self, q: &Tensor, k: &Tensor, v: &Tensor, heads: usize) -> Result<Tensor> {
        class_attention::check(q, k, v, heads)?;
        match self.way(&[q, k, v], &[]) {
            Way::Fused => class_attention::fused(q, k, v, heads),
            Way::Kernels => cuda::class_attention(q, k, v, heads),
            Way::Composition => class_attention::composition(q, k, v, heads),
        }
    }

    /// Attention of every patch over its own key and value and those of its positives.
    ///
    /// - `q`: `[B, N, D]`, or `[1, 1, D]` where all queries are the same;
    /// - `own_kv`: `[B, N, 2D]`, a token is `[k|v]`, or `[1, 1, 2D]` where all are the same;
    /// - `patch_kv`: `[B, N, 2D]`, from which the positives of the same image are gathered;
    /// - result `[B, N, D]`.
    ///
    /// # Errors
    /// If the shapes do not fit each other or `positives`.
    pub fn neighbor_attention(
        self,
        q: &Tensor,
        own_kv: &Tensor,
        patch_kv: &Tensor,
        positives: &Positives,
        heads: usize,
    ) -> Result<Tensor> {
        neighbor_attention::check(q, own_kv, patch_kv, positives, heads)?;
        match self.way(&[q, own_kv, patch_kv], &[]) {
            Way::Fused => neighbor_attention::fused(q, own_kv, patch_kv, positives, heads),
            Way::Kernels => cuda::neighbor_attention(q, own_kv, patch_kv, positives, heads),
            Way::Composition => neighbor_attention::composition(q, own_kv, patch_kv, positives, heads),
        }
    }

    /// Mean of the positives of every patch; zero where a patch has none.
    ///
    /// - `x`: `[B, N, D]`; result `[B, N, D]`.
    ///
    /// # Errors
    /// If the shape does not fit `positives`.
    pub fn gather_mean(self, x: &Tensor, positives: &Positives) -> Result<Tensor> {
        gather_mean::check(x, positives)?;
        match self.way(&[x], &[]) {
            Way::Fused => gather_mean::fused(x, positives),
            Way::Kernels => cuda::gather_mean(x, positives),
            Way::Composition => gather_mean::composition(x, positives),
        }
    }

    /// `x / max(‖x‖₂, eps)` over the last dimension.
    ///
    /// - `x`: `[.., D]`.
    ///
    /// # Errors
    /// If `x` is a scalar.
    pub fn l2_normalize(self, x: &Tensor, eps: f64) -> Result<Tensor> {
        match self.way(&[x], &[]) {
            Way::Fused => normalize::fused(x, eps),
            Way::Kernels => cuda::l2_normalize(x, eps),
            Way::Composition => normalize::composition(x, eps),
        }
    }

    /// Weight normalization of each row: `g · v / ‖v‖₂`.
    ///
    /// - `v`: `[K, D]`; `g`: `[K, 1]`; result `[K, D]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn weight_norm(self, v: &Tensor, g: &Tensor) -> Result<Tensor> {
        normalize::check_weight(v, g)?;
        match self.way(&[v, g], &[v, g]) {
            Way::Fused => normalize::fused_weight(v, g),
            Way::Kernels => cuda::weight_norm(v, g),
            Way::Composition => normalize::composition_weight(v, g),
        }
    }

    /// Residual connection with stochastic depth: `x + scale · branch`.
    ///
    /// - `x`, `branch`: `[B, ..]`, the same shape; `scale`: one factor per sample, all 1 if absent.
    ///
    /// # Errors
    /// If the shapes differ or `scale` does not have `B` factors.
    pub fn add_scaled(self, x: &Tensor, branch: &Tensor, scale: Option<&[f32]>) -> Result<Tensor> {
        add_scaled::check(x, branch, scale)?;
        match self.way(&[x, branch], &[]) {
            Way::Fused => add_scaled::fused(x, branch, scale),
            Way::Kernels => cuda::add_scaled(x, branch, scale),
            Way::Composition => add_scaled::composition(x, branch, scale),
        }
    }

    /// `Σ_pairs w · CE(softmax((t − c)/τ_t), log_softmax(s/τ_s))`, a scalar; gradient to the student only.
    ///
    /// - `student`: `[R, K]` logits; `teacher`: `[T, K]` logits; `center`: `[K]`;
    /// - `pairs`: rows `(student, teacher)`; `weights`: one for all (`f32`) or one per pair (`&[f32]`).
    ///
    /// # Errors
    /// If the shapes do not fit, a row does not exist, or a temperature is not positive.
    pub fn cross_entropy<'a>(
        self,
        student: &Tensor,
        teacher: &Tensor,
        center: &Tensor,
        student_temp: f64,
        teacher_temp: f64,
        pairs: &[(u32, u32)],
        weights: impl Into<PairWeights<'a>>,
    ) -> Result<Tensor> {
        let (loss, _) = self.cross_entropy_with_stats(
            student,
            teacher,
            center,
            student_temp,
            teacher_temp,
            pairs,
            weights,
        )?;
        Ok(loss)
    }

    /// [`Ops::cross_entropy`] and what monitoring wants to know about the pairs.
    ///
    /// # Errors
    /// As [`Ops::cross_entropy`].
    pub fn cross_entropy_with_stats<'a>(
        self,
        student: &Tensor,
        teacher: &Tensor,
        center: &Tensor,
        student_temp: f64,
        teacher_temp: f64,
        pairs: &[(u32, u32)],
        weights: impl Into<PairWeights<'a>>,
    ) -> Result<(Tensor, Statistics)> {
        let temperatures = [student_temp, teacher_temp];
        let weights = weights.into();
        cross_entropy::check(student.dims2()?.into(), teacher, center, temperatures, pairs, weights)?;
        match self.way(&[student, teacher], &[center]) {
            Way::Fused => cross_entropy::fused(student, teacher, center, temperatures, pairs, weights),
            Way::Kernels => cuda::cross_entropy(student, teacher, center, temperatures, pairs, weights),
            Way::Composition => {
                cross_entropy::composition(student, teacher, center, temperatures, pairs, weights)
            }
        }
    }

    /// The cross-entropy of [`Ops::cross_entropy_with_stats`] between the logits that a projection head makes of tokens
    /// and those of the teacher.
    ///
    /// - `tokens`: `[R, D]`.
    ///
    /// The fused operation puts the gradients of the head's variables into `sink`; by compositions they go to candle's
    /// store.
    ///
    /// # Errors
    /// If the shapes do not fit, a row does not exist, or a temperature is not positive.
    pub fn projection_loss(
        self,
        tokens: &Tensor,
        head: &HeadWeights,
        targets: &Targets<'_>,
        sink: &GradientSink,
    ) -> Result<(Tensor, Statistics)> {
        projection_loss::check(tokens, head, targets)?;
        match self.fuses(&[tokens, targets.teacher, targets.center]) {
            true => projection_loss::fused(tokens, head, targets, sink),
            false => projection_loss::composition(self, tokens, head, targets),
        }
    }

    /// Images as rows of pixels in the order of a flattened convolution weight `[D, C, patch, patch]`, so that the
    /// patch embedding is a linear layer.
    ///
    /// - `images`: `[B, C, height, width]`; result `[B, N, C·patch·patch]`, patches row by row.
    ///
    /// # Errors
    /// If `patch` does not divide both sides.
    pub fn patchify(self, images: &Tensor, patch: usize) -> Result<Tensor> {
        patchify::check(images, patch)?;
        match self.fuses(&[images]) && !images.track_op() {
            true => patchify::fused(images, patch),
            false => patchify::composition(images, patch),
        }
    }

    /// 3x3 convolution with stride 1 and zero padding 1, channels last.
    ///
    /// - `x`: `[B, H, W, I]`; `weight`: `[O, I, 3, 3]`; result `[B, H, W, O]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn convolution_3x3(self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        convolution_3x3::check(x, weight)?;
        match self.fuses(&[x, weight]) {
            true => convolution_3x3::fused(x, weight),
            false => convolution_3x3::composition(x, weight),
        }
    }

    /// `relu(batch_norm(x))` with the statistics of this batch, which are returned for the running ones.
    ///
    /// - `x`: `[.., C]`; `weight`, `bias`: `[C]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn batch_norm_relu(
        self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        eps: f64,
    ) -> Result<(Tensor, Moments)> {
        batch_norm::check(x, weight, bias)?;
        match self.fuses(&[x, weight, bias]) {
            true => batch_norm::fused(x, weight, bias, eps),
            false => batch_norm::composition(x, weight, bias, eps),
        }
    }

    /// Resamples a channels-last map along both axes.
    ///
    /// - `x`: `[B, H, W, C]`; result `[B, rows.outputs(), columns.outputs(), C]`.
    ///
    /// # Errors
    /// If the map has another size than `rows` and `columns` expect.
    pub fn resample(self, x: &Tensor, rows: &Taps, columns: &Taps) -> Result<Tensor> {
        taps::check(x, rows, columns)?;
        match self.fuses(&[x]) {
            true => taps::fused(x, rows, columns),
            false => taps::composition(x, rows, columns),
        }
    }

    /// `scale · Σ_pixels CE(resampled logits, label)`, a scalar; pixels labelled [`IGNORED`] count nothing.
    ///
    /// - `logits`: `[B, h, w, C]`, a coarse map.
    ///
    /// # Errors
    /// If the shapes do not fit or a label is no class.
    pub fn pixel_cross_entropy(self, logits: &Tensor, target: &PixelLabels, scale: f64) -> Result<Tensor> {
        pixel_cross_entropy::check(logits, target)?;
        match self.fuses(&[logits]) {
            true => pixel_cross_entropy::fused(logits, target, scale),
            false => pixel_cross_entropy::composition(logits, target, scale),
        }
    }

    /// Euclidean norm of all values, in `f64`; not finite if any value is not.
    ///
    /// # Errors
    /// If the tensor cannot be read.
    pub fn grad_norm(self, gradient: &Tensor) -> Result<f64> {
        match self.fuses(&[gradient]) {
            true => adamw::norm(gradient),
            false => adamw::norm_composition(gradient)?.to_scalar(),
        }
    }

    /// [`Ops::grad_norm`] of each of these gradients, `[count]` in `f64`, where the gradients are: nothing waits.
    ///
    /// # Errors
    /// If there are none, or a tensor cannot be read.
    pub fn grad_norms(self, gradients: &[&Tensor]) -> Result<Tensor> {
        match self.way(gradients, gradients) {
            Way::Fused => {
                let norms: Vec<f64> =
                    gradients.iter().map(|gradient| adamw::norm(gradient)).collect::<Result<_>>()?;
                Tensor::from_vec(norms, gradients.len(), &Device::Cpu)
            }
            Way::Kernels => cuda::norms(gradients),
            Way::Composition => {
                let norms: Vec<Tensor> = gradients
                    .iter()
                    .map(|gradient| adamw::norm_composition(gradient))
                    .collect::<Result<_>>()?;
                Tensor::stack(&norms, 0)
            }
        }
    }

    /// [`Ops::adamw_ema_step`] or, without a gradient, [`Ops::ema_step`] of many parameters: on CUDA in one launch.
    ///
    /// # Errors
    /// As those.
    pub fn update(self, updates: &[Update<'_>]) -> Result<()> {
        let mut tensors = Vec::with_capacity(5 * updates.len());
        for update in updates {
            let learned = update.learned.iter().flat_map(|l| [l.gradient, l.first, l.second]);
            let others: Vec<&Tensor> = learned.chain(update.teacher).collect();
            adamw::check(update.student, &others)?;
            tensors.push(update.student);
            tensors.extend(others);
        }
        if let Way::Kernels = self.way(&tensors, &tensors) {
            return cuda::update(updates);
        }
        for Update { student, learned, teacher, step } in updates {
            match (learned, teacher) {
                (Some(l), _) => {
                    self.adamw_ema_step(student, l.gradient, l.first, l.second, *teacher, step)?
                }
                (None, Some(teacher)) => self.ema_step(teacher, student, step.momentum)?,
                (None, None) => {}
            }
        }
        Ok(())
    }

    /// Mean over the rows of `[R, K]`, in `f32` at least, without a gradient.
    ///
    /// # Errors
    /// If it is no matrix.
    pub fn mean_rows(self, rows: &Tensor) -> Result<Tensor> {
        match self.way(&[rows], &[]) {
            Way::Kernels => cuda::mean_rows(rows),
            Way::Fused | Way::Composition => {
                // as a product with a constant row: one fast pass in a fixed order
                let (count, _) = rows.dims2()?;
                let rows = access::wide(&rows.detach())?;
                let share =
                    Tensor::full(1.0 / count as f32, (1, count), rows.device())?.to_dtype(rows.dtype())?;
                share.matmul(&rows)?.squeeze(0)
            }
        }
    }

    /// The positives that a device chooses among the candidates of every patch and keeps; `None` where the host has to.
    ///
    /// - `features`: `[B, N, D]`; `candidates`: `[N][..]`, ascending; `eps`: smallest norm a feature is divided by.
    ///
    /// # Errors
    /// If the shapes do not fit or the device fails.
    pub(crate) fn positives(
        self,
        features: &Tensor,
        candidates: &[Vec<u32>],
        k: usize,
        eps: f32,
    ) -> Result<Option<Positives>> {
        let Way::Kernels = self.way(&[features], &[]) else { return Ok(None) };
        let (_, patches, _) = features.dims3()?;
        let slots = candidates.iter().map(Vec::len).max().unwrap_or_default();
        if candidates.len() != patches || k == 0 || k > slots.min(MOST_KERNEL_POSITIVES) {
            return Ok(None);
        }
        let padded =
            |row: &Vec<u32>| row.iter().copied().chain(std::iter::repeat(u32::MAX)).take(slots).collect();
        let table: Vec<Vec<u32>> = candidates.iter().map(padded).collect();
        let table = Tensor::from_vec(table.concat(), (patches, slots), features.device())?;
        let index = cuda::positives(features, &table, k, eps)?;
        let counts = candidates.iter().map(|row| row.len().min(k) as u32).collect();
        Positives::on_device(index, counts).map(Some)
    }

    /// One AdamW step of one parameter and, if a teacher is given, its exponential moving average, in place.
    ///
    /// All tensors have one shape and storages of their own.
    ///
    /// # Errors
    /// If the shapes differ or a tensor is not contiguous.
    pub fn adamw_ema_step(
        self,
        student: &Tensor,
        gradient: &Tensor,
        first_moment: &Tensor,
        second_moment: &Tensor,
        teacher: Option<&Tensor>,
        step: &AdamWStep,
    ) -> Result<()> {
        adamw::check(student, &[gradient, first_moment, second_moment, teacher.unwrap_or(student)])?;
        match self.fuses(&[student, gradient, first_moment, second_moment, teacher.unwrap_or(student)]) {
            true => adamw::fused(student, gradient, first_moment, second_moment, teacher, step),
            false => adamw::composition(student, gradient, first_moment, second_moment, teacher, step),
        }
    }

    /// `teacher ← momentum · teacher + (1 − momentum) · student`, in place: for parameters without a gradient.
    ///
    /// # Errors
    /// If the shapes differ or a tensor is not contiguous.
    pub fn ema_step(self, teacher: &Tensor, student: &Tensor, momentum: f64) -> Result<()> {
        adamw::check(student, &[teacher])?;
        match self.fuses(&[teacher, student]) {
            true => adamw::fused_ema(teacher, student, momentum),
            false => adamw::composition_ema(teacher, student, momentum),
        }
    }
}

/// The class with the largest resampled logit of every pixel, `[H, W]`; the lowest of equals.
///
/// - `map`: logits `[h, w, C]` of one picture, at most 256 classes.
///
/// # Panics
/// If the map has another size than `rows` and `columns` expect.
pub fn largest_class(map: &[f32], classes: usize, rows: &Taps, columns: &Taps) -> Vec<u8> {
    assert_eq!(map.len(), rows.inputs() * columns.inputs() * classes, "size of the map");
    pixel_cross_entropy::largest(map, classes, rows, columns)
}
