//! Features of images from trained weights, streamed to a safetensors or npy file.

use std::path::{Path, PathBuf};

use candle_core::Tensor;

use crate::checkpoint::{CheckpointError, write_atomically};
use crate::config::DataConfig;
use crate::config::run::{FeatureSettings, Tokens};
use crate::data::DataError;
use crate::data::augment::Augmenter;
use crate::data::decode::decode_rgb;
use crate::data::index::ImageIndex;
use crate::model::encoder::{Encoder, EncoderOptions};
use crate::model::weights::WeightsError;

mod file;

use file::FeatureFile;
pub use file::FileFormat;

/// Share of the crop in the resized shorter side, as in the usual evaluation view (224 of 256).
pub(crate) const CENTER_SHARE: f64 = 0.875;

/// What was written.
#[derive(Clone, Debug, serde::Serialize)]
pub struct FeatureSummary {
    /// The file.
    pub file: PathBuf,
    /// Its axes.
    pub shape: Vec<usize>,
    /// The list of image names, one a line, in the order of the first axis.
    pub names: PathBuf,
    /// Images left out, with the reason.
    pub bad: Vec<(String, String)>,
}

/// Why features could not be computed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FeatureError {
    /// The images.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The weights.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// A view without a feature.
    #[error("view size: expected {expected}, found {height}x{width}")]
    Size {
        /// What the sides must be.
        expected: String,
        /// The height asked for.
        height: usize,
        /// The width asked for.
        width: usize,
    },
    /// No image could be decoded.
    #[error("none of {count} images could be used; the first: `{name}`: {reason}")]
    AllBad {
        /// Images tried.
        count: usize,
        /// The first.
        name: String,
        /// Why.
        reason: String,
    },
    /// The file name tells no known format.
    #[error("`{}`: expected a name ending in .safetensors or .npy", path.display())]
    Format {
        /// The file.
        path: PathBuf,
    },
    /// The file cannot be written.
    #[error("cannot write `{}`", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The list of names cannot be written.
    #[error(transparent)]
    Names(#[from] CheckpointError),
    /// The tensor library refused.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl FeatureError {
    /// What to try.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Data(error) => error.hint(),
            Self::Weights(error) => error.hint(),
            Self::Size { .. } => Some("for example `--size 224` or `--size 480x832`".into()),
            Self::Format { .. } => Some("name the file `features.safetensors` or `features.npy`".into()),
            Self::Names(error) => error.hint(),
            Self::AllBad { .. } | Self::Write { .. } | Self::Tensor(_) => None,
        }
    }
}

/// Computes the features of all images; `progress(done, all)` is called after every batch.
pub fn run(
    settings: &FeatureSettings,
    mut progress: impl FnMut(usize, usize),
) -> Result<FeatureSummary, FeatureError> {
    let format =
        FileFormat::of(&settings.out).ok_or_else(|| FeatureError::Format { path: settings.out.clone() })?;
    let options =
        EncoderOptions { network: settings.network, heads: settings.heads, ..EncoderOptions::default() };
    let encoder = Encoder::open(&settings.weights, &options, &settings.compute.device)?;
    let stride = encoder.stride();
    let (height, width) = settings.size.unwrap_or((encoder.trained_size(), encoder.trained_size()));
    if let Some(expected) = encoder.wanted_instead_of((height, width)) {
        return Err(FeatureError::Size { expected, height, width });
    }
    let data = DataConfig { images: settings.images.clone(), ..DataConfig::default() };
    let index = ImageIndex::build(&data, None)?;
    let row = match settings.tokens {
        Tokens::Patch => vec![(height / stride) * (width / stride), encoder.dim()],
        Tokens::Class => vec![encoder.class_dim()],
    };
    let write = |source| FeatureError::Write { path: settings.out.clone(), source };
    let mut file = FeatureFile::create(&settings.out, format, &row).map_err(write)?;
    let (mut names, mut bad) = (Vec::new(), Vec::new());
    let (mean, std) = encoder.normalization();
    let mut augmenter = Augmenter::default();
    let all = index.len();
    let mut next = 0;
    while next < all {
        let (mut pixels, mut count) = (Vec::new(), 0);
        while next < all && count < settings.batch {
            let name = index.name(next);
            match load(&index, next, data.max_megapixels) {
                Ok(image) => {
                    let resize = [height, width].map(|side| (side as f64 / CENTER_SHARE).round() as usize);
                    let view = augmenter.prepare_center(&image, resize.into(), (height, width), mean, std);
                    pixels.extend(view);
                    names.push(name);
                    count += 1;
                }
                Err(reason) => bad.push((name, reason)),
            }
            next += 1;
        }
        if count > 0 {
            let images = Tensor::from_vec(pixels, (count, 3, height, width), &settings.compute.device)?;
            let tokens = match settings.tokens {
                Tokens::Patch => encoder.patch_features(&images)?.features,
                Tokens::Class => encoder.class_features(&images)?,
            };
            file.append(&tokens.flatten_all()?.to_vec1::<f32>()?).map_err(write)?;
        }
        progress(next, all);
    }
    if let (0, Some((name, reason))) = (names.len(), bad.first()) {
        return Err(FeatureError::AllBad { count: bad.len(), name: name.clone(), reason: reason.clone() });
    }
    let shape = file.finish(names.len()).map_err(write)?;
    let list = names_path(&settings.out);
    let text: String = names.iter().flat_map(|name| [name.as_str(), "\n"]).collect();
    write_atomically(&list, text.as_bytes())?;
    Ok(FeatureSummary { file: settings.out.clone(), shape, names: list, bad })
}

/// `features.npy` -> `features.images.txt`.
fn names_path(out: &Path) -> PathBuf {
    out.with_extension("images.txt")
}

pub(crate) fn load(
    index: &ImageIndex,
    image: usize,
    max_megapixels: f64,
) -> Result<crate::data::decode::Rgb8Image, String> {
    let bytes = index.read(image).map_err(|error| error.to_string())?;
    decode_rgb(&bytes, max_megapixels).map_err(|error| error.to_string())
}
