//! Encoder and head together: pictures in, a coarse map of logits out.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor};

use super::head_fpn::{self, FpnHead, FpnSizes};
use super::head_linear::{LinearHead, Statistics};
use super::view::View;
use crate::config::segment::{HeadKind, SegmentConfig};
use crate::model::encoder::Encoder;
use crate::model::parameters::Parameters;
use crate::ops::{Ops, PixelLabels, Taps};
use crate::random::{Purpose, Stream};

/// Features that a head reads: one map for the linear head, four for the FPN.
pub struct Features {
    /// Each `[B, h, w, D]`.
    pub maps: Vec<Tensor>,
}

/// What turns features into logits.
pub enum Head {
    /// One linear layer.
    Linear(LinearHead),
    /// Semantic FPN.
    Fpn(FpnHead),
}

/// A network that segments.
pub struct SegmentModel {
    /// The backbone.
    pub encoder: Encoder,
    /// The head.
    pub head: Head,
    config: SegmentConfig,
    ops: Ops,
}

impl SegmentModel {
    /// A fresh head on a backbone.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn new(encoder: Encoder, classes: usize, config: &SegmentConfig, ops: Ops) -> Result<Self> {
        let device = encoder.device().clone();
        let head = match config.head {
            HeadKind::Linear => Head::Linear(LinearHead::new(encoder.dim(), classes, config.seed, &device)?),
            HeadKind::Fpn => {
                let sizes = FpnSizes {
                    dims: head_fpn::blocks(encoder.depth()).map(|block| encoder.block_dim(block)),
                    neck: config.neck_channels,
                    channels: config.head_channels,
                    classes,
                };
                Head::Fpn(FpnHead::new(sizes, config.seed, &device, ops)?)
            }
        };
        Ok(Self { encoder, head, config: config.clone(), ops })
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        self.encoder.device()
    }

    /// Pictures of one size as `[B, 3, H, W]`, filled up with the mean color at the right and below so that patches
    /// divide them.
    ///
    /// # Errors
    /// If the pictures differ in size.
    pub fn images(&self, views: &[&View]) -> Result<Tensor> {
        let Some(first) = views.first() else { candle_core::bail!("no pictures") };
        let stride = self.encoder.stride();
        let (width, height) = (first.width.next_multiple_of(stride), first.height.next_multiple_of(stride));
        let mut pixels = vec![0f32; views.len() * 3 * height * width];
        for (view, pixels) in views.iter().zip(pixels.chunks_exact_mut(3 * height * width)) {
            if (view.width, view.height) != (first.width, first.height) {
                candle_core::bail!("pictures of several sizes in one batch");
            }
            let planes = view.pixels.chunks_exact(view.width * view.height);
            for (plane, pixels) in planes.zip(pixels.chunks_exact_mut(height * width)) {
                for (row, pixels) in plane.chunks_exact(view.width).zip(pixels.chunks_exact_mut(width)) {
                    pixels[..view.width].copy_from_slice(row);
                }
            }
        }
        Tensor::from_vec(pixels, (views.len(), 3, height, width), self.device())
    }

    /// What the head reads of images `[B, 3, H, W]`: the last block for the linear head as the weights' own evaluation
    /// reads it, the raw outputs of four blocks for the FPN. `iteration` switches stochastic depth on.
    ///
    /// # Errors
    /// If patches do not divide the images.
    pub fn features(&self, images: &Tensor, iteration: Option<u64>) -> Result<Features> {
        let batch = images.dim(0)?;
        let (maps, (rows, columns)) = match &self.head {
            Head::Linear(_) => {
                let found = self.encoder.patch_features(images)?;
                (vec![found.features], found.grid)
            }
            Head::Fpn(_) => {
                let draws = iteration.filter(|_| self.config.fine_tune).map(|step| self.draws(step, batch));
                let blocks = head_fpn::blocks(self.encoder.depth());
                self.encoder.block_outputs_dropping(images, &blocks, draws.as_deref())?
            }
        };
        let maps = maps.into_iter().map(|map| map.reshape((batch, rows, columns, ())));
        Ok(Features { maps: maps.collect::<Result<_>>()? })
    }

    /// Uniform numbers for stochastic depth, a pure function of (seed, iteration).
    fn draws(&self, iteration: u64, batch: usize) -> Vec<Vec<f64>> {
        let draw = |application: u64| {
            let coordinates = [iteration, application];
            let mut stream = Stream::new(self.config.seed, Purpose::DropPath, &coordinates);
            (0..batch).map(|_| stream.uniform()).collect()
        };
        (0..self.encoder.drop_path_applications() as u64).map(draw).collect()
    }

    /// Logits `[B, h, w, C]` for training step `iteration`; moves the running statistics of the head.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn train_logits(&mut self, features: &Features, iteration: u64) -> Result<Tensor> {
        match &mut self.head {
            Head::Linear(head) => head.logits(&features.maps[0], self.ops),
            Head::Fpn(head) => {
                let batch = features.maps[0].dim(0)?;
                let keep = head.dropout(batch, self.config.dropout, self.config.seed, iteration)?;
                head.train(&features.maps, &keep)
            }
        }
    }

    /// Logits `[B, h, w, C]` for judging.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn judge_logits(&self, features: &Features) -> Result<Tensor> {
        match &self.head {
            Head::Linear(head) => head.logits(&features.maps[0], self.ops),
            Head::Fpn(head) => head.judge(&features.maps),
        }
    }

    /// How a map of `grid` patches, of a picture of `size` pixels, comes to `target` pixels; all (height, width):
    /// bilinearly to the padded picture, of which the picture is cut out, then bilinearly to the target.
    ///
    /// Deviation: mmsegmentation stretches the map of the padded picture over the picture without its padding, which
    /// moves its right and lower border by up to a patch. Both agree wherever patches divide the picture.
    pub fn resampling(
        &self,
        grid: (usize, usize),
        size: (usize, usize),
        target: (usize, usize),
    ) -> [Taps; 2] {
        let stride = self.encoder.stride();
        let axis = |patches: usize, size: usize, target: usize| {
            let picture = Taps::bilinear(patches, patches * stride).first(size);
            if size == target { picture } else { picture.then(&Taps::bilinear(size, target)) }
        };
        [axis(grid.0, size.0, target.0), axis(grid.1, size.1, target.1)]
    }

    /// Labels of a batch beside the map that is to tell them.
    pub fn targets(
        &self,
        grid: (usize, usize),
        size: (usize, usize),
        target: (usize, usize),
        labels: Arc<[u8]>,
    ) -> PixelLabels {
        let [rows, columns] = self.resampling(grid, size, target);
        PixelLabels { labels, rows: Arc::new(rows), columns: Arc::new(columns) }
    }

    /// `scale` times the summed cross-entropy of the pixels.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn loss(&self, logits: &Tensor, target: &PixelLabels, scale: f64) -> Result<Tensor> {
        self.ops.pixel_cross_entropy(logits, target, scale)
    }

    /// Standardizes the features of a linear head.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn standardize(&mut self, statistics: &Statistics) -> Result<()> {
        match &mut self.head {
            Head::Linear(head) => head.standardize(statistics),
            Head::Fpn(_) => Ok(()),
        }
    }

    /// What is learned: the head, and the backbone if it is fine-tuned.
    pub fn learned(&self) -> Vec<&Parameters> {
        let head = match &self.head {
            Head::Linear(head) => head.parameters(),
            Head::Fpn(head) => head.parameters(),
        };
        if self.config.fine_tune { vec![head, self.encoder.parameters()] } else { vec![head] }
    }

    /// What is not learned but kept: standardization or running statistics.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn buffers(&self) -> Result<Vec<(String, Tensor)>> {
        match &self.head {
            Head::Linear(head) => Ok(head.buffers()),
            Head::Fpn(head) => head.buffers(),
        }
    }

    /// Takes over buffers, as [`SegmentModel::buffers`] gives them.
    ///
    /// # Errors
    /// If `get` does.
    pub fn restore_buffers(&mut self, get: impl FnMut(&str) -> Result<Tensor>) -> Result<()> {
        match &mut self.head {
            Head::Linear(head) => head.restore(get),
            Head::Fpn(head) => head.restore(get),
        }
    }
}
