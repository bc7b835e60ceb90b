//! A loaded batch as tensors: micro-batches of crops with the draws of stochastic depth.

use candle_core::{DType, Device, Result, Tensor};

use crate::config::AugmentConfig;
use crate::data::loader::{Batch, Views};
use crate::objective::forward::{CropGroup, Crops};
use crate::random::{Purpose, Stream};

/// Global crops of an image.
pub const GLOBAL_CROPS: usize = 2;

/// How a batch is cut and what its crops are.
#[derive(Clone, Debug)]
pub struct BatchPlan {
    /// Micro-batches of equal size.
    pub accumulate: usize,
    /// Crop sizes and counts.
    pub augment: AugmentConfig,
    /// Uniform draws a crop needs for stochastic depth; 0 = off.
    pub drop_path_applications: usize,
    /// Seed of the run.
    pub seed: u64,
    /// Type of the crops, and with them of all activations.
    pub dtype: DType,
}

impl BatchPlan {
    /// Cuts a batch into micro-batches; what an image's crops look like does not depend on the cut.
    pub fn micro_batches(&self, batch: &Batch, device: &Device) -> Result<Vec<Crops>> {
        let size = batch.images.len() / self.accumulate;
        (0..self.accumulate)
            .map(|index| {
                let range = index * size..(index + 1) * size;
                let locals = self.augment.local_crops;
                let global = self.group(batch, range.clone(), 0, GLOBAL_CROPS, device)?;
                let local = match locals {
                    0 => None,
                    _ => Some(self.group(batch, range, GLOBAL_CROPS, locals, device)?),
                };
                Ok(Crops { batch: size, global, local })
            })
            .collect()
    }

    /// Crops `first .. first + count` of the images in `range`.
    fn group(
        &self,
        batch: &Batch,
        range: std::ops::Range<usize>,
        first: usize,
        count: usize,
        device: &Device,
    ) -> Result<CropGroup> {
        let side = if first == 0 { self.augment.global_size } else { self.augment.local_size };
        let images = match &batch.views {
            Views::Crops { global, local } => {
                let (pixels, image) = (if first == 0 { global } else { local }, 3 * side * side);
                let mut data = Vec::with_capacity(count * range.len() * image);
                for crop in 0..count {
                    let start = crop * batch.images.len();
                    data.extend_from_slice(
                        &pixels[(start + range.start) * image..(start + range.end) * image],
                    );
                }
                let shape = (count * range.len(), 3, side, side);
                Tensor::from_vec(data, shape, device)?.to_dtype(self.dtype)?
            }
            Views::Uploaded(upload) => {
                upload.crops(first..first + count, &range, side, &self.augment, self.dtype)?
            }
        };
        let draws = (0..self.drop_path_applications).map(|application| {
            let rows = (first..first + count).flat_map(|crop| range.clone().map(move |image| (crop, image)));
            rows.map(|(crop, image)| {
                let key = [batch.epoch, batch.images[image], crop as u64, application as u64];
                Stream::new(self.seed, Purpose::DropPath, &key).uniform()
            })
            .collect()
        });
        let drop_path = (self.drop_path_applications > 0).then(|| draws.collect());
        Ok(CropGroup { images, crops: count, drop_path })
    }
}
