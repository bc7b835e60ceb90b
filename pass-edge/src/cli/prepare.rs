//! Any image to one of the model's size, with memory that is kept from image to image.

use clap::ValueEnum;
use pass_edge::image::Image;
use pass_edge::kernels::Kernel;
use pass_edge::resize::{Filter, Fit, Resize, ResizeScratch};

/// Which part of an image becomes the model's input, by its name on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum FitChoice {
    /// 7/8 of the shorter side, from the center: what `pass-host features` shows its network.
    Center,
    /// The largest part from the center that has the model's shape.
    Cover,
    /// All of it, out of shape if need be.
    Stretch,
}

impl From<FitChoice> for Fit {
    fn from(choice: FitChoice) -> Self {
        match choice {
            FitChoice::Center => Self::CenterCrop,
            FitChoice::Cover => Self::Cover,
            FitChoice::Stretch => Self::Stretch,
        }
    }
}

/// Prepares images.
#[derive(Debug)]
pub(super) struct Preparer {
    target: (usize, usize),
    fit: Fit,
    kernel: Kernel,
    plan: Option<Resize>,
    words: Vec<i32>,
    bytes: Vec<u8>,
    rgb: Vec<u8>,
}

impl Preparer {
    /// For a model whose images are `target = (height, width)`.
    pub(super) fn new(target: (usize, usize), fit: Fit, kernel: Kernel) -> Self {
        let (words, bytes) = (Vec::new(), Vec::new());
        Self { target, fit, kernel, plan: None, words, bytes, rgb: vec![0; 3 * target.0 * target.1] }
    }

    /// The image itself if it needs no change, or a resized one.
    pub(super) fn prepare<'a>(&'a mut self, image: &Image<'a>) -> pass_edge::Result<Image<'a>> {
        let plan = match self.plan {
            Some(plan) if plan.source() == image.size() => plan,
            _ => Resize::new(image.size(), self.target, self.fit, Filter::Bicubic)?,
        };
        self.plan = Some(plan);
        if plan.is_identity() {
            return Ok(*image);
        }
        let len = plan.scratch_len();
        self.words.resize(len.words, 0);
        self.bytes.resize(len.bytes, 0);
        let mut scratch = ResizeScratch { words: &mut self.words, bytes: &mut self.bytes };
        plan.resize_into(image, self.kernel, &mut scratch, &mut self.rgb)
    }
}
