//! Every hyper-parameter of a run: default (the paper's value), meaning, validation.
//!
//! Resolved once (flag > `--set` > file > preset), validated once, then never changed; derived values are methods.
//!
//! | module | job |
//! |---|---|
//! | [`presets`] | the named starting points |
//! | [`layers`] | preset < file < `--set` < flag, and where each value came from |
//! | [`validate`] | the rules every configuration obeys |
//! | [`derived`] | sizes, learning rate and step counts computed from the fields |
//! | [`mod@print`] | the configuration as commented TOML |
//! | [`run`] | what one run is started with, and how it ended |
//! | [`segment`] | the hyper-parameters of `eval segment` |

#[macro_use]
mod keys;

pub mod derived;
pub mod error;
pub mod layers;
pub mod presets;
pub mod print;
pub mod run;
pub mod segment;
pub mod validate;

pub use error::ConfigError;
pub use layers::{Layers, Resolved};

use serde::{Deserialize, Serialize};

section! {
    /// All of a training run. Sections become TOML tables; every key can be given as `--set section.key=value`.
    pub struct TrainConfig {
        /// Seed of everything random.
        pub seed: u64,
        /// Where the images come from and how they are loaded.
        pub data: DataConfig,
        /// Crops and their photometric changes (DINO's multi-crop).
        pub augment: AugmentConfig,
        /// The Vision Transformer.
        pub model: ModelConfig,
        /// The projection heads of dino and the patch objective.
        pub head: HeadConfig,
        /// The image-level method.
        pub image: ImageObjective,
        /// The patch objective of PASS.
        pub patch: PatchObjective,
        /// Optimization: batch, schedules, AdamW, teacher momentum.
        pub optim: OptimConfig,
        /// Checkpoints.
        pub checkpoint: CheckpointConfig,
        /// Logging.
        pub log: LogConfig,
        /// How good the teacher's features are, measured while training.
        pub probe: ProbeConfig,
        /// What stops a run that goes wrong.
        pub guard: GuardConfig,
        /// How the training operations are computed.
        pub ops: OpsKind,
        /// Save memory: the backward pass runs the student's blocks forward again instead of keeping what they computed.
        pub recompute: bool,
    }
}

section! {
    /// `[data]`
    pub struct DataConfig {
        /// Folders (walked recursively), image files, tars (`.tar`, `.tar.gz`, `.tgz`), shards and lists (`@list.txt`).
        pub images: Vec<String>,
        /// Use only the first this many images (sorted order); 0 = all.
        pub limit: usize,
        /// Decoding and augmentation threads; 0 = as many as cores. Never changes the result.
        pub workers: usize,
        /// Batches kept ready ahead of the training step.
        pub prefetch: usize,
        /// Share of bad images above which the run stops, in `[0, 1]`.
        pub max_bad: f64,
        /// Images with more pixels than this are refused as decompression bombs (millions of pixels).
        pub max_megapixels: f64,
    }
}

section! {
    /// `[augment]`
    pub struct AugmentConfig {
        /// Where crops are made: `cpu`, or `gpu` if the processor cannot feed it. The same pixels either way.
        pub device: AugmentDevice,
        /// Side of a global crop in pixels; there are always two.
        pub global_size: usize,
        /// Side of a local crop in pixels.
        pub local_size: usize,
        /// Number of local crops (paper 2, released code 8).
        pub local_crops: usize,
        /// Area of a global crop as a share of the image, `[low, high]`.
        pub global_scale: [f64; 2],
        /// Area of a local crop as a share of the image, `[low, high]`.
        pub local_scale: [f64; 2],
        /// Aspect ratio of a crop, log-uniform in `[low, high]`.
        pub ratio: [f64; 2],
        /// Probability of a horizontal flip.
        pub flip: f64,
        /// Probability of the color jitter.
        pub jitter: f64,
        /// Brightness factor, uniform in `[1-b, 1+b]`.
        pub brightness: f64,
        /// Contrast factor, uniform in `[1-c, 1+c]`.
        pub contrast: f64,
        /// Saturation factor, uniform in `[1-s, 1+s]`.
        pub saturation: f64,
        /// Hue shift in turns, uniform in `[-h, h]`.
        pub hue: f64,
        /// Probability of grayscale.
        pub gray: f64,
        /// Probability of Gaussian blur: first global crop, second global crop, local crops.
        pub blur: [f64; 3],
        /// Radius (standard deviation, pixels) of the blur, uniform in `[low, high]`.
        pub blur_radius: [f64; 2],
        /// Probability of solarizing the second global crop (threshold 128).
        pub solarize: f64,
        /// Mean per channel (RGB, of values in `[0, 1]`), subtracted.
        pub mean: [f32; 3],
        /// Standard deviation per channel, divided by.
        pub std: [f32; 3],
    }
}

/// Where crops are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AugmentDevice {
    /// By the threads that decode.
    #[default]
    Cpu,
    /// By the CUDA device that trains, from decoded images.
    Gpu,
}

/// Width, depth and heads of a Vision Transformer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arch {
    /// ViT-Ti: 192 wide, 12 deep, 3 heads.
    VitTiny,
    /// ViT-S: 384 wide, 12 deep, 6 heads.
    VitSmall,
    /// ViT-B: 768 wide, 12 deep, 12 heads.
    VitBase,
    /// `model.dim`, `model.depth`, `model.heads` say.
    Custom,
}

section! {
    /// `[model]`
    pub struct ModelConfig {
        /// `vit_tiny`, `vit_small`, `vit_base`, or `custom` with the three sizes below.
        pub arch: Arch,
        /// Embedding width; read only with `arch = "custom"`.
        pub dim: usize,
        /// Transformer blocks; read only with `arch = "custom"`.
        pub depth: usize,
        /// Attention heads; read only with `arch = "custom"`.
        pub heads: usize,
        /// Side of a patch in pixels; must divide both crop sizes.
        pub patch_size: usize,
        /// Stochastic depth of the last block of the student (grows linearly from 0).
        pub drop_path: f64,
        /// `learned` position embeddings, or fixed ones of sines and cosines, `sin_cos` (width a multiple of 4).
        pub positions: Positions,
        /// Keep the patch embedding at its first, random values in both networks.
        pub freeze_patch_embed: bool,
        /// First values of the linear layers of backbone and aggregation head: `normal`, or `xavier` (uniform).
        pub init: WeightInit,
    }
}

/// Where position embeddings come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Positions {
    /// They are learned.
    Learned,
    /// Sines and cosines of row and column, never changed.
    SinCos,
}

/// First values of linear layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightInit {
    /// Normal, standard deviation 0.02; the patch embedding uniform within 1/√inputs.
    Normal,
    /// Uniform within √(6 / (inputs + outputs)), queries, keys and values each on their own, patch embedding alike.
    Xavier,
}

section! {
    /// `[head]`
    pub struct HeadConfig {
        /// Width of the two hidden layers.
        pub hidden: usize,
        /// Width of the normalized bottleneck.
        pub bottleneck: usize,
        /// K of the class head.
        pub class_prototypes: usize,
        /// K of the patch head.
        pub patch_prototypes: usize,
        /// Freeze the magnitude `g` of the last layer at 1.
        pub norm_last_layer: bool,
    }
}

/// The image-level method.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageMethod {
    /// DINO: cross-entropy between centered, sharpened class-token distributions.
    Dino,
    /// MoCo-v3: the key of the other view among the keys of all images of the batch.
    MocoV3,
    /// MoBY: the key of the other view among the keys of earlier steps.
    Moby,
}

impl ImageMethod {
    /// As it is written in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dino => "dino",
            Self::MocoV3 => "moco_v3",
            Self::Moby => "moby",
        }
    }
}

section! {
    /// `[image]`
    pub struct ImageObjective {
        /// `dino`, `moco_v3` or `moby`.
        pub method: ImageMethod,
        /// Temperature of the student, for dino and the patch objective.
        pub student_temp: f64,
        /// First temperature of the teacher, for dino and the patch objective.
        pub teacher_temp_start: f64,
        /// Temperature of the teacher after its warm-up.
        pub teacher_temp_end: f64,
        /// Epochs over which the teacher temperature rises linearly.
        pub teacher_temp_warmup_epochs: f64,
        /// Momentum of the centers, of dino and the patch objective.
        pub center_momentum: f64,
        /// Temperature τ of moco_v3 and moby.
        pub temperature: f64,
        /// Width of the hidden layers of their projector and predictor.
        pub hidden: usize,
        /// Width of their queries and keys.
        pub out: usize,
        /// Keys in each of the two queues of moby; a multiple of the images of a step.
        pub queue: usize,
    }
}

/// What lies beyond the edge of the patch grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Border {
    /// The opposite edge (released code).
    Wrap,
    /// Nothing: border patches have fewer neighbors.
    Clip,
}

/// How positives become one target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Aggregation {
    /// The aggregation head attends over the positives (paper).
    ClassAttention,
    /// The plain mean of the positives ("w/o Aggregation").
    Mean,
}

/// Whose features choose the positives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MatchingSource {
    /// The momentum teacher (released code).
    Teacher,
    /// The student (the paper's notation).
    Student,
}

/// Which crops carry a patch loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PatchCrops {
    /// Global and local crops (released code).
    All,
    /// The two global crops only.
    Global,
}

/// Side of the neighborhood: a number, or `"all"` for every other patch ("w/o Neighbor").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Window {
    /// An odd side in patches.
    Side(usize),
    /// The word `all`.
    All(AllPatches),
}

/// The word `all`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AllPatches {
    /// Every other patch of the grid.
    All,
}

section! {
    /// `[patch]`
    pub struct PatchObjective {
        /// Off = the plain image-level baseline.
        pub enabled: bool,
        /// λ, the weight of the patch loss.
        pub weight: f64,
        /// `wrap` or `clip`.
        pub border: Border,
        /// Side of the neighborhood in patches, odd, or `"all"`.
        pub window: Window,
        /// Positives kept per patch.
        pub k: usize,
        /// `class_attention` or `mean`.
        pub aggregation: Aggregation,
        /// `teacher` or `student`.
        pub matching: MatchingSource,
        /// `all` or `global`.
        pub crops: PatchCrops,
    }
}

/// Whose gradient norm is clipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClipBy {
    /// That of each parameter tensor on its own.
    Tensor,
    /// That of all gradients together.
    Global,
}

section! {
    /// `[optim]`
    pub struct OptimConfig {
        /// Images a step of each rank (`mpirun -np 4` has four), over accumulated micro-batches.
        pub batch: usize,
        /// Micro-batches a step; each holds `batch / accumulate` images.
        pub accumulate: usize,
        /// Passes over the images; read unless `steps` is positive.
        pub epochs: usize,
        /// Optimizer steps; 0 = `epochs` says. Schedules stretch over this length.
        pub steps: usize,
        /// Peak learning rate for 256 images a step; the real peak is `lr_per_256 * batch * ranks / 256`.
        pub lr_per_256: f64,
        /// Last learning rate.
        pub min_lr: f64,
        /// Epochs of linear warm-up.
        pub warmup_epochs: f64,
        /// First weight decay.
        pub weight_decay: f64,
        /// Last weight decay (cosine).
        pub weight_decay_end: f64,
        /// First momentum of the teacher; rises to 1 (cosine).
        pub momentum: f64,
        /// AdamW β₁ and β₂.
        pub betas: [f64; 2],
        /// AdamW ε.
        pub eps: f64,
        /// Largest gradient norm, of each parameter tensor or of all together (`clip_by`); 0 = no clipping.
        pub clip: f64,
        /// Whose norm is clipped: each `tensor` on its own (released code), or all together, `global`.
        pub clip_by: ClipBy,
        /// Epochs in which the last layers of both heads stay fixed.
        pub freeze_last_layer_epochs: f64,
    }
}

section! {
    /// `[checkpoint]`
    pub struct CheckpointConfig {
        /// Steps between checkpoints; 0 = once an epoch.
        pub every_steps: usize,
        /// Newest checkpoints kept.
        pub keep: usize,
        /// Every this-many-th step is kept for good; 0 = none.
        pub keep_every: usize,
    }
}

section! {
    /// `[log]`
    pub struct LogConfig {
        /// Steps between lines of `metrics.jsonl`.
        pub every_steps: usize,
        /// Write TensorBoard event files.
        pub tensorboard: bool,
        /// Steps between renewals of `report.html`, which is then also written at the end; 0 = never.
        pub report_every_steps: usize,
    }
}

/// How features are probed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProbeKind {
    /// Weighted k-nearest-neighbor classification of class tokens.
    Knn,
    /// Scene parsing by the nearest patches.
    Retrieval,
}

section! {
    /// `[probe]`
    pub struct ProbeConfig {
        /// Steps between probes, each logged as `knn_top1` or `retrieval_miou`; 0 = none.
        pub every_steps: usize,
        /// Labelled folder: `train/CLASS` and `val/CLASS` (knn), or `images`, `labels` and their classes (retrieval).
        pub data: String,
        /// `knn` or `retrieval`.
        pub kind: ProbeKind,
        /// Most images of each of the two splits; they are kept in memory at the size of a global crop.
        pub images: usize,
        /// Neighbors of an image (knn).
        pub k: usize,
    }
}

/// What to do on signs of collapse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnCollapse {
    /// Write a checkpoint, explain, exit 3.
    Stop,
    /// Explain and go on.
    Warn,
}

section! {
    /// `[guard]`
    pub struct GuardConfig {
        /// Non-finite steps in a row that are skipped before rolling back to the last checkpoint.
        pub max_skipped: usize,
        /// Roll-backs before the run stops with exit code 3.
        pub max_rollbacks: usize,
        /// `stop` or `warn`.
        pub on_collapse: OnCollapse,
        /// Steps for which a sign of collapse must last.
        pub collapse_steps: usize,
    }
}

/// How the training operations are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OpsKind {
    /// Fused kernels with hand-written backward passes.
    Fused,
    /// Plain compositions of tensor operations: slow, for comparison.
    Reference,
    /// CUDA kernels on the processor: very slow, for tests of the kernels.
    #[cfg(feature = "_emulator")]
    Emulated,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            seed: 0,
            data: DataConfig::default(),
            augment: AugmentConfig::default(),
            model: ModelConfig::default(),
            head: HeadConfig::default(),
            image: ImageObjective::default(),
            patch: PatchObjective::default(),
            optim: OptimConfig::default(),
            checkpoint: CheckpointConfig::default(),
            log: LogConfig::default(),
            probe: ProbeConfig::default(),
            guard: GuardConfig::default(),
            ops: OpsKind::Fused,
            recompute: false,
        }
    }
}

impl Default for DataConfig {
    fn default() -> Self {
        Self { images: Vec::new(), limit: 0, workers: 0, prefetch: 2, max_bad: 0.05, max_megapixels: 180.0 }
    }
}

impl Default for AugmentConfig {
    fn default() -> Self {
        Self {
            device: AugmentDevice::Cpu,
            global_size: 224,
            local_size: 96,
            local_crops: 2,
            global_scale: [0.25, 1.0],
            local_scale: [0.05, 0.25],
            ratio: [3.0 / 4.0, 4.0 / 3.0],
            flip: 0.5,
            jitter: 0.8,
            brightness: 0.4,
            contrast: 0.4,
            saturation: 0.2,
            hue: 0.1,
            gray: 0.2,
            blur: [1.0, 0.1, 0.5],
            blur_radius: [0.1, 2.0],
            solarize: 0.2,
            mean: [0.485, 0.456, 0.406],
            std: [0.229, 0.224, 0.225],
        }
    }
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self {
            arch: Arch::VitSmall,
            dim: 384,
            depth: 12,
            heads: 6,
            patch_size: 16,
            drop_path: 0.1,
            positions: Positions::Learned,
            freeze_patch_embed: false,
            init: WeightInit::Normal,
        }
    }
}

impl Default for HeadConfig {
    fn default() -> Self {
        Self {
            hidden: 2048,
            bottleneck: 256,
            class_prototypes: 65536,
            patch_prototypes: 4096,
            norm_last_layer: true,
        }
    }
}

impl Default for ImageObjective {
    fn default() -> Self {
        Self {
            method: ImageMethod::Dino,
            student_temp: 0.1,
            teacher_temp_start: 0.04,
            teacher_temp_end: 0.07,
            teacher_temp_warmup_epochs: 30.0,
            center_momentum: 0.9,
            temperature: 0.2,
            hidden: 4096,
            out: 256,
            queue: 4096,
        }
    }
}

impl Default for PatchObjective {
    fn default() -> Self {
        Self {
            enabled: true,
            weight: 0.1,
            border: Border::Wrap,
            window: Window::Side(3),
            k: 4,
            aggregation: Aggregation::ClassAttention,
            matching: MatchingSource::Teacher,
            crops: PatchCrops::All,
        }
    }
}

impl Default for OptimConfig {
    fn default() -> Self {
        Self {
            batch: 1024,
            accumulate: 1,
            epochs: 200,
            steps: 0,
            lr_per_256: 0.0005,
            min_lr: 1e-5,
            warmup_epochs: 10.0,
            weight_decay: 0.04,
            weight_decay_end: 0.4,
            momentum: 0.996,
            betas: [0.9, 0.999],
            eps: 1e-8,
            clip: 3.0,
            clip_by: ClipBy::Tensor,
            freeze_last_layer_epochs: 1.0,
        }
    }
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self { every_steps: 0, keep: 3, keep_every: 0 }
    }
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { every_steps: 10, tensorboard: true, report_every_steps: 0 }
    }
}

impl Default for ProbeConfig {
    fn default() -> Self {
        Self { every_steps: 0, data: String::new(), kind: ProbeKind::Knn, images: 1000, k: 10 }
    }
}

impl Default for GuardConfig {
    fn default() -> Self {
        Self { max_skipped: 5, max_rollbacks: 3, on_collapse: OnCollapse::Stop, collapse_steps: 200 }
    }
}
