//! Trained weights -> one `.pass` file for the device: int8 weights with one scale an output, and a promise how close the
//! features are.
//!
//! Block by block, from the first to the last, on calibration photos (`smooth`, [`round`]):
//!
//! 1. *Smoothing.* Activation channels that stand out are divided, the weights that meet them multiplied (Xiao et al. 2023);
//!    folded into the LayerNorms and the values of attention, it costs nothing on the device. How much is chosen
//!    per layer by the error it leaves.
//! 2. *Rounding with feedback.* Each output's scale is the one with the smallest error; then weights are rounded one input after
//!    the other, later ones taking over the error of earlier ones, on inputs that are quantized as on the device and
//!    come from the blocks quantized before.
//!
//! Nothing is learned. The accuracy is measured with the device's own code on photos that took no part ([`fidelity`]).

mod error;
pub mod fidelity;
pub mod float_vit;
pub mod input_scales;
mod network;
pub mod pass_file;
mod read;
pub mod round;
mod smooth;

use std::path::{Path, PathBuf};

use ndarray::{Array2, s};
use pass_edge::features_with_pool;
use pass_edge::format::{Contract, Mode};
use pass_edge::image::{Image, PixelOrder};
use pass_edge::kernels::Kernel;
use pass_edge::model::Model;
use pass_edge::parallel::{MOST_THREADS, Pool, Threads};
use pass_edge::scratch::{ScratchBuffer, ScratchLen};
use pass_edge::writer::{Description, write};
use serde::Serialize;

use crate::checkpoint::write_atomically;
use crate::config::DataConfig;
use crate::config::run::Network;
use crate::data::augment::{Augmenter, Planes};
use crate::data::index::ImageIndex;
use crate::features::{CENTER_SHARE, load};
pub use error::QuantizeError;
use fidelity::{Comparison, Fidelity};
use float_vit::FloatVit;

/// Directions stored for pictures of the features.
const PCA_COMPONENTS: usize = 3;
/// Seed of the self-test image.
const SELF_TEST_SEED: u64 = 0x7061_7373;

/// Everything `quantize` needs.
#[derive(Clone, Debug)]
pub struct QuantizeSettings {
    /// A run, a checkpoint, an exported file, or a safetensors file with timm's names.
    pub source: PathBuf,
    /// The network, if `source` holds both.
    pub network: Network,
    /// Real photos, as in `data.images`.
    pub calibrate: Vec<String>,
    /// Photos to calibrate on; as many others are measured on.
    pub images: usize,
    /// The file.
    pub out: PathBuf,
    /// 8-bit or 7-bit weights.
    pub mode: Mode,
    /// Height and width of the images; `None` = as in training.
    pub size: Option<(usize, usize)>,
    /// Attention heads, for weights that do not tell.
    pub heads: Option<usize>,
    /// Mean cosine below which nothing is written.
    pub min_cosine: f64,
}

/// Everything `verify` needs.
#[derive(Clone, Debug)]
pub struct VerifySettings {
    /// The `.pass` file.
    pub model: PathBuf,
    /// The weights it was made from.
    pub against: PathBuf,
    /// The network, if `against` holds both.
    pub network: Network,
    /// Photos, as in `data.images`.
    pub images: Vec<String>,
    /// Photos compared, at most; 0 = all.
    pub limit: usize,
    /// Attention heads, for weights that do not tell.
    pub heads: Option<usize>,
}

/// What was measured, and written.
#[derive(Clone, Debug, Serialize)]
pub struct QuantizeReport {
    /// The file.
    pub file: PathBuf,
    /// `exact` or `fast`.
    pub mode: &'static str,
    /// Bytes of the file.
    pub bytes: usize,
    /// How the weights were read.
    pub notes: Vec<String>,
    /// Photos calibrated on.
    pub calibrated_on: usize,
    /// Mean cosine of patch tokens to float after each block, on the photos measured on.
    pub blocks: Vec<f64>,
    /// The device's features against float.
    pub fidelity: Fidelity,
    /// Photos left out, with the reason.
    pub bad: Vec<(String, String)>,
}

/// What `verify` found.
#[derive(Clone, Debug, Serialize)]
pub struct VerifyReport {
    /// The device's features against float.
    pub fidelity: Fidelity,
    /// The mean that the file promises to keep.
    pub promised: f64,
    /// Whether it does.
    pub kept: bool,
    /// Photos left out, with the reason.
    pub bad: Vec<(String, String)>,
}

/// What is going on, for a progress bar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Photos read, of all.
    Photos(usize, usize),
    /// Blocks quantized, of all.
    Blocks(usize, usize),
    /// Photos computed by the device's code, of all.
    Device(usize, usize),
}

/// Quantizes, measures, and writes the file if the measure is good enough.
///
/// # Errors
/// [`QuantizeError`]; nothing is written then.
pub fn run(
    settings: &QuantizeSettings,
    mut progress: impl FnMut(Progress),
) -> Result<QuantizeReport, QuantizeError> {
    let read::Source { mut vit, mut notes } =
        read::open(&settings.source, settings.network, settings.size, settings.heads)?;
    let wanted = 2 * settings.images.max(1);
    let photos =
        Photos::read(&settings.calibrate, wanted, &vit, |done, all| progress(Progress::Photos(done, all)))?;
    // every second photo is kept for measuring
    let (calibration, measured): (Vec<_>, Vec<_>) =
        photos.views.iter().enumerate().partition(|(index, _)| index % 2 == 0);
    let [calibration, measured] = [calibration, measured]
        .map(|views: Vec<(usize, &Planes)>| views.into_iter().map(|(_, view)| view).collect::<Vec<_>>());
    if measured.is_empty() {
        return Err(QuantizeError::TooFewImages { found: calibration.len(), bad: photos.bad });
    }
    if calibration.len() < settings.images {
        notes.push(format!("{} photos to calibrate on, {} asked for", calibration.len(), settings.images));
    }
    // by the network as it was read, before anything is folded into its weights
    let exact: Vec<Array2<f32>> = measured.iter().map(|view| vit.forward(view.data())).collect();
    let quantized = network::quantize(&mut vit, settings.mode, &calibration, &measured, |done, all| {
        progress(Progress::Blocks(done, all));
    });

    let mut description = Description {
        name: &name(&settings.source),
        architecture: vit.architecture,
        normalization: vit.normalization,
        mode: settings.mode,
        contract: Contract {
            images: calibration.len() as u32,
            images_hash: hash(&calibration),
            mean_cosine: 0.0,
            first_percentile: 0.0,
            min_cosine: settings.min_cosine as f32,
        },
        self_test_seed: SELF_TEST_SEED,
    };
    let mut tensors = |name: &str, _: usize, _: usize| quantized.tensor(&vit, name);
    let draft = write(&description, &mut tensors)?;
    let mut exact = exact.into_iter();
    let fidelity = measure(
        &draft,
        &measured,
        |_| exact.next().unwrap_or_default(),
        |done, all| progress(Progress::Device(done, all)),
    )?;
    if fidelity.mean.is_nan() || fidelity.mean < settings.min_cosine {
        return Err(QuantizeError::Contract { fidelity, min: settings.min_cosine, mode: settings.mode });
    }
    description.contract.mean_cosine = fidelity.mean as f32;
    description.contract.first_percentile = fidelity.first_percentile as f32;
    let file = write(&description, &mut tensors)?;
    write_atomically(&settings.out, &file)?;
    Ok(QuantizeReport {
        file: settings.out.clone(),
        mode: settings.mode.name(),
        bytes: file.len(),
        notes,
        calibrated_on: calibration.len(),
        blocks: quantized.block_cosines,
        fidelity,
        bad: photos.bad,
    })
}

/// Runs the self-test of a file and compares its features with those of the float network.
///
/// # Errors
/// [`QuantizeError`] for a damaged file, a failed self-test, or weights of another network.
pub fn verify(
    settings: &VerifySettings,
    mut progress: impl FnMut(Progress),
) -> Result<VerifyReport, QuantizeError> {
    let path = &settings.model;
    let device = |error| QuantizeError::Device { path: Some(path.clone()), error };
    let file = std::fs::read(path).map_err(|source| QuantizeError::Read { path: path.clone(), source })?;
    let model = Model::from_bytes(&file).map_err(device)?;
    let architecture = *model.architecture();
    let mut scratch = ScratchBuffer::new(ScratchLen::of(&architecture));
    let mut out = vec![0.0; model.output_len()];
    pass_edge::self_test::verify(&model, Kernel::best(), &mut scratch.scratch(), &mut out).map_err(device)?;
    let size = Some(architecture.image_size());
    let vit = read::open(&settings.against, settings.network, size, settings.heads)?.vit;
    check_same_network(path, &vit, &model)?;
    let photos = Photos::read(&settings.images, settings.limit, &vit, |done, all| {
        progress(Progress::Photos(done, all))
    })?;
    let views: Vec<&Planes> = photos.views.iter().collect();
    let fidelity = measure(
        &file,
        &views,
        |view| vit.forward(view.data()),
        |done, all| progress(Progress::Device(done, all)),
    )?;
    let promised = f64::from(model.contract().min_cosine);
    Ok(VerifyReport { fidelity, promised, kept: fidelity.mean >= promised, bad: photos.bad })
}

fn check_same_network(path: &Path, vit: &FloatVit, model: &Model<'_>) -> Result<(), QuantizeError> {
    let (ours, theirs) = (&vit.architecture, model.architecture());
    let fields = [
        ("width", ours.dim, theirs.dim),
        ("depth", ours.depth, theirs.depth),
        ("heads", ours.heads, theirs.heads),
        ("hidden width", ours.hidden, theirs.hidden),
        ("patch size", ours.patch_size, theirs.patch_size),
        ("class token", ours.class_token.into(), theirs.class_token.into()),
        ("registers", ours.register_tokens, theirs.register_tokens),
        ("final norm", ours.final_norm.into(), theirs.final_norm.into()),
    ];
    match fields.into_iter().find(|(_, expected, found)| expected != found) {
        None => Ok(()),
        Some((field, expected, found)) => Err(QuantizeError::OtherNetwork {
            path: path.into(),
            field,
            expected: expected.to_string(),
            found: found.to_string(),
        }),
    }
}

/// Photos as the network sees them.
struct Photos {
    views: Vec<Planes>,
    bad: Vec<(String, String)>,
}

impl Photos {
    /// Up to `wanted` photos (0 = all), spread evenly over the sources, as `pass-host features` prepares them.
    fn read(
        sources: &[String],
        wanted: usize,
        vit: &FloatVit,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Self, QuantizeError> {
        let data = DataConfig { images: sources.to_vec(), ..DataConfig::default() };
        let index = ImageIndex::build(&data, None)?;
        let count = if wanted == 0 { index.len() } else { wanted.min(index.len()) };
        let size = vit.architecture.image_size();
        let resize = |side: usize| (side as f64 / CENTER_SHARE).round() as usize;
        let mut augmenter = Augmenter::default();
        let (mut views, mut bad) = (Vec::new(), Vec::new());
        for photo in 0..count {
            let image = photo * index.len() / count;
            match load(&index, image, data.max_megapixels) {
                Ok(image) => {
                    views.push(augmenter.center_view(&image, (resize(size.0), resize(size.1)), size).clone())
                }
                Err(reason) => bad.push((index.name(image), reason)),
            }
            progress(photo + 1, count);
        }
        if views.is_empty() {
            return Err(QuantizeError::TooFewImages { found: 0, bad });
        }
        Ok(Self { views, bad })
    }
}

/// Features `[N + P, D]` by the device's code against `exact` of each view in turn.
fn measure(
    file: &[u8],
    views: &[&Planes],
    mut exact: impl FnMut(&Planes) -> Array2<f32>,
    mut progress: impl FnMut(usize, usize),
) -> Result<Fidelity, QuantizeError> {
    let model = Model::from_bytes(file)?;
    let architecture = *model.architecture();
    let pool = Threads::new(rayon::current_num_threads().clamp(1, MOST_THREADS))?;
    let mut scratch = ScratchBuffer::new(ScratchLen::with_threads(&architecture, pool.threads()));
    let (height, width) = architecture.image_size();
    let patches = architecture.patches();
    let mut out = Array2::zeros((architecture.tokens(), architecture.dim()));
    let mut comparison = Comparison::default();
    for (done, view) in views.iter().enumerate() {
        let exact = exact(view);
        let pixels = view.to_interleaved();
        let image = Image::new(&pixels, (height, width), 3 * width, PixelOrder::Rgb)?;
        let features = out.as_slice_mut().unwrap_or_default();
        pool.install(|| {
            features_with_pool(&model, &image, Kernel::best(), &pool, &mut scratch.scratch(), features)
        })?;
        comparison.add(exact.slice(s![..patches, ..]), out.slice(s![..patches, ..]));
        progress(done + 1, views.len());
    }
    comparison.fidelity().ok_or(QuantizeError::TooFewImages { found: 0, bad: Vec::new() })
}

/// XXH3-64 over the bytes of all views.
fn hash(views: &[&Planes]) -> u64 {
    let mut hash = xxhash_rust::xxh3::Xxh3::new();
    views.iter().for_each(|view| hash.update(view.data()));
    hash.digest()
}

/// A name for the file: that of the weights, cut to what a header holds.
fn name(source: &Path) -> String {
    let stem = source.file_stem().unwrap_or_default().to_string_lossy();
    let end = stem.char_indices().map(|(at, c)| at + c.len_utf8()).take_while(|end| *end <= 64).last();
    stem[..end.unwrap_or(0)].to_owned()
}
