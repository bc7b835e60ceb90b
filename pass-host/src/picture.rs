//! Pictures of what a network sees.
//!
//! | module | job |
//! |---|---|
//! | [`view`] | an image at a size that patches divide: for the network and for the page |
//! | [`query`] | which patch is asked about |
//! | [`top_patches`] | where a patch looks: the strongest patches of its attention row (Figure 1 of the paper) |
//! | [`attention`] | where the class token looks |
//! | [`positives`] | the positives of a patch and what each adds to its target |
//! | [`pca`] | principal components of the features of several images as colors |
//! | [`field`] | one number a patch, enlarged to pixels |
//! | [`sheet`] | panels with titles and captions on one page |
//! | [`canvas`], [`colors`], [`label`] | pixels, colors, text |

pub mod attention;
pub mod canvas;
pub mod colors;
pub mod field;
pub mod label;
pub mod pca;
pub mod positives;
pub mod query;
pub mod sheet;
pub mod top_patches;
pub mod view;

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};

use crate::checkpoint::{self, CheckpointError};
use crate::config::DataConfig;
use crate::data::DataError;
use crate::data::decode::{DecodeError, decode_rgb};
use crate::data::index::{ImageIndex, ReadError};
use crate::model::encoder::{Attention, Encoder, EncoderOptions};
use crate::model::weights::WeightsError;
use view::Photo;

/// Why a picture could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PictureError {
    /// The images cannot be listed.
    #[error(transparent)]
    Data(#[from] DataError),
    /// An image cannot be read.
    #[error("cannot read image `{name}`")]
    Read {
        /// The image.
        name: String,
        /// Why.
        source: ReadError,
    },
    /// An image cannot be decoded.
    #[error("cannot decode image `{name}`")]
    Decode {
        /// The image.
        name: String,
        /// Why.
        source: DecodeError,
    },
    /// The weights.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// A patch that is not on the grid.
    #[error(
        "query patch ({row}, {column}) of image `{name}`: expected a row below {rows} and a column below {columns}"
    )]
    QueryPatch {
        /// The image.
        name: String,
        /// Row asked for.
        row: usize,
        /// Column asked for.
        column: usize,
        /// Rows of the grid.
        rows: usize,
        /// Columns of the grid.
        columns: usize,
    },
    /// A pixel that is not in the part of the image that is shown.
    #[error(
        "query pixel ({x}, {y}) of image `{name}`: expected x from {left} to {right} and y from {top} to {bottom}"
    )]
    QueryPixel {
        /// The image.
        name: String,
        /// Column asked for.
        x: u32,
        /// Row asked for.
        y: u32,
        /// First column shown.
        left: u32,
        /// Last column shown.
        right: u32,
        /// First row shown.
        top: u32,
        /// Last row shown.
        bottom: u32,
    },
    /// More patches than fit an attention matrix.
    #[error("`{name}` at {height}x{width} has {patches} patches: expected at most {MOST_PATCHES}")]
    TooLarge {
        /// The image.
        name: String,
        /// Rows of pixels.
        height: usize,
        /// Columns of pixels.
        width: usize,
        /// Its patches.
        patches: usize,
    },
    /// A picture of the aggregation head of weights that have none.
    #[error("weights `{label}` have no aggregation head: {wanted}")]
    NoAggregation {
        /// The weights.
        label: String,
        /// What would have been drawn.
        wanted: &'static str,
    },
    /// Attention that cannot be computed, for example of a ResNet, which has none.
    #[error("no attention of weights `{label}` can be drawn")]
    Attention {
        /// The weights.
        label: String,
        /// Why.
        source: candle_core::Error,
    },
    /// Numbers that cannot be drawn.
    #[error("weights `{label}` give {what} that are not finite for image `{name}`")]
    NotFinite {
        /// The weights.
        label: String,
        /// Which numbers.
        what: &'static str,
        /// The image.
        name: String,
    },
    /// The picture cannot be encoded.
    #[error("cannot encode `{}`", path.display())]
    Encode {
        /// The file.
        path: PathBuf,
        /// Why.
        source: image::ImageError,
    },
    /// The picture cannot be written.
    #[error(transparent)]
    Write(#[from] CheckpointError),
    /// The tensor library refused.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl PictureError {
    /// What to try.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Data(error) => error.hint(),
            Self::Weights(error) => error.hint(),
            Self::QueryPatch { .. } => {
                Some("rows and columns count from 0, row first; `--at X,Y` names a pixel instead".into())
            }
            Self::QueryPixel { .. } => Some(
                "pixels count from 0 in the upright image; its edges are cut so that patches divide it"
                    .into(),
            ),
            Self::TooLarge { .. } => Some("give a smaller `--size`".into()),
            Self::NoAggregation { .. } => Some(
                "give a run of `pass-host train`, one of its checkpoints, or a file of `pass-host export`"
                    .into(),
            ),
            Self::Write(error) => error.hint(),
            Self::Read { .. }
            | Self::Decode { .. }
            | Self::Attention { .. }
            | Self::NotFinite { .. }
            | Self::Encode { .. }
            | Self::Tensor(_) => None,
        }
    }
}

/// Most patches of one image: an attention matrix of six heads then takes 1.6 GB.
pub const MOST_PATCHES: usize = 8192;

/// A network with the name it has on a page.
pub struct Model {
    /// Its name.
    pub label: String,
    /// The network.
    pub encoder: Encoder,
}

impl Model {
    /// Softmax attention of the last block for an image `[1, 3, H, W]`.
    ///
    /// # Errors
    /// [`PictureError::Attention`].
    fn last_attention(&self, image: &Tensor) -> Result<Attention, PictureError> {
        let named = |source| PictureError::Attention { label: self.label.clone(), source };
        self.encoder.last_attention(image).map_err(named)
    }

    /// Opens weights; the name is `label`, or made from the path.
    ///
    /// # Errors
    /// [`WeightsError`].
    pub fn open(
        weights: &str,
        label: Option<&str>,
        options: &EncoderOptions,
        device: &Device,
    ) -> Result<Self, WeightsError> {
        let encoder = Encoder::open(weights, options, device)?;
        Ok(Self { label: label.map_or_else(|| label_of(weights), str::to_owned), encoder })
    }
}

/// `runs/pass-0` -> `pass-0`; `runs/pass-0/checkpoints/step-00000500` -> `pass-0, step 500`; `x/vit.safetensors` -> `vit`.
fn label_of(weights: &str) -> String {
    if let Some(path) = weights.strip_prefix("random:") {
        return format!("{}, untrained", label_of(path));
    }
    let path = Path::new(weights);
    let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    let last = name(path).unwrap_or_else(|| weights.to_owned());
    if let Some(step) = last.strip_prefix("step-").and_then(|step| step.parse::<u64>().ok()) {
        let run = path.parent().and_then(Path::parent).and_then(name);
        return run.map_or_else(|| format!("step {step}"), |run| format!("{run}, step {step}"));
    }
    last.strip_suffix(".safetensors").map_or(last.clone(), str::to_owned)
}

/// Least common multiple of the patch sizes: a side that it divides suits all of `models`.
pub fn common_patch(models: &[Model]) -> usize {
    let gcd = |mut a: usize, mut b: usize| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a.max(1)
    };
    models.iter().map(|model| model.encoder.stride()).fold(1, |all, one| all / gcd(all, one) * one)
}

/// Reads the first `limit` images of `sources` (folders, files, tars, shards, `@lists`) and tells how many there are.
///
/// # Errors
/// [`PictureError::Data`], [`PictureError::Read`], [`PictureError::Decode`].
pub fn read_photos(sources: &[String], limit: usize) -> Result<(Vec<Photo>, usize), PictureError> {
    let data = DataConfig { images: sources.to_vec(), ..DataConfig::default() };
    let index = ImageIndex::build(&data, None)?;
    let photo = |image| read_photo(&index, image, data.max_megapixels);
    Ok(((0..index.len().min(limit)).map(photo).collect::<Result<_, _>>()?, index.len()))
}

/// Reads one image of an index.
///
/// # Errors
/// [`PictureError::Read`], [`PictureError::Decode`].
pub fn read_photo(index: &ImageIndex, image: usize, max_megapixels: f64) -> Result<Photo, PictureError> {
    let name = index.name(image);
    let bytes = match index.read(image) {
        Ok(bytes) => bytes,
        Err(source) => return Err(PictureError::Read { name, source }),
    };
    match decode_rgb(&bytes, max_megapixels) {
        Ok(image) => Ok(Photo { name, image }),
        Err(source) => Err(PictureError::Decode { name, source }),
    }
}

/// Writes a canvas as PNG: the whole file or nothing.
///
/// # Errors
/// [`PictureError::Encode`], [`PictureError::Write`].
pub fn save(canvas: &canvas::Canvas, path: &Path) -> Result<(), PictureError> {
    let encode = |source| PictureError::Encode { path: path.to_owned(), source };
    Ok(checkpoint::write_atomically(path, &canvas.to_png().map_err(encode)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_named_after_their_place() {
        for (weights, label) in [
            ("runs/pass-0", "pass-0"),
            ("runs/pass-0/", "pass-0"),
            ("runs/pass-0/checkpoints/step-00000500", "pass-0, step 500"),
            ("step-00000500", "step 500"),
            ("x/vit_s14.safetensors", "vit_s14"),
            ("random:runs/dino-1", "dino-1, untrained"),
            ("..", ".."),
        ] {
            assert_eq!(label_of(weights), label);
        }
    }
}
