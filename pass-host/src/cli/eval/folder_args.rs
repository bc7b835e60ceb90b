//! Folders of classes and how their images become vectors: the flags that `knn` and `linear` share.

use std::path::PathBuf;

use clap::Args;

use super::encoder_args::at_least_one;
use crate::error::Error;
use crate::evaluate::class_folders::ClassFolders;
use crate::evaluate::image_features::{Extraction, ImageToken, view_size};
use crate::model::encoder::Encoder;

#[derive(Debug, Args)]
pub(super) struct FolderArgs {
    /// The data: DIR/train/CLASS/*.jpg to learn from, DIR/val/CLASS/*.jpg to judge with; or a shard of such a folder.
    #[arg(long, value_name = "DIR", required_unless_present_all = ["train", "val"], conflicts_with_all = ["train", "val"])]
    data: Option<PathBuf>,
    /// Class folders to learn from, instead of DIR/train.
    #[arg(long, value_name = "DIR", requires = "val")]
    train: Option<PathBuf>,
    /// Class folders to judge with, instead of DIR/val.
    #[arg(long, value_name = "DIR", requires = "train")]
    val: Option<PathBuf>,
    /// What stands for an image: `class` token or `mean` of its patch tokens.
    #[arg(long, value_enum, value_name = "TOKENS", default_value = "class", hide_possible_values = true)]
    tokens: ImageToken,
    /// Side of the center view in pixels, a multiple of the patch size [default: as in training, at most 224].
    #[arg(long, value_name = "PIXELS")]
    size: Option<usize>,
    /// Images computed together.
    #[arg(long, value_name = "N", default_value_t = 16)]
    images_per_pass: usize,
}

impl FolderArgs {
    pub(super) fn open(&self) -> Result<ClassFolders, Error> {
        at_least_one(&[("--images-per-pass", self.images_per_pass)])?;
        Ok(match (&self.data, &self.train, &self.val) {
            (None, Some(train), Some(val)) => ClassFolders::open_splits(train, val)?,
            (data, ..) => ClassFolders::open(data.as_deref().unwrap_or("".as_ref()))?,
        })
    }

    pub(super) fn extraction(&self, encoder: &Encoder) -> Result<Extraction, Error> {
        let size = view_size(encoder, self.size)?;
        Ok(Extraction { token: self.tokens, size, batch: self.images_per_pass })
    }
}
