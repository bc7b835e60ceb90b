//! The objects of a first mask, followed through a sequence (SEMANTICS §6).
//!
//! Three stages run at once: frames are read and prepared ahead, the network and the propagation use all cores, masks
//! are drawn from soft labels and handed on behind. Each holds a frame or two, however long the sequence is.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use candle_core::Tensor;
use pass_core::propagation::{
    ClipShape, Propagation as Rule, one_hot_into, resize_nearest_into, segment_into, segment_scratch_len,
};
use pass_core::shape::PatchGrid;

use super::davis::Frame;
use super::error::VosError;
use super::masks::{LabelImage, VOID};
use super::prepare::{Preparation, Prepared};
use super::propagate::Propagation;
use super::score::count_objects;
use crate::data::decode::{Rgb8Image, decode_rgb};
use crate::model::encoder::Encoder;

/// Larger frames are refused before memory is taken.
const MAX_MEGAPIXELS: f64 = 180.0;

/// Who follows, and how.
pub struct Follower<'a> {
    /// The network.
    pub encoder: &'a Encoder,
    /// How labels travel.
    pub rule: Rule,
    /// How frames are prepared.
    pub preparation: Preparation,
}

/// A frame and the mask that was found (of the first frame: given).
pub struct Segmented {
    /// Place in the sequence.
    pub index: usize,
    /// The frame.
    pub image: Rgb8Image,
    /// Its mask, of the same size.
    pub mask: LabelImage,
}

struct Loaded {
    image: Rgb8Image,
    prepared: Prepared,
}

/// A frame between network and mask: soft labels `[N, C]`, none for the first frame.
struct Labeled {
    image: Rgb8Image,
    labels: Option<(PatchGrid, Vec<f32>)>,
}

impl Follower<'_> {
    /// Hands every frame with its mask to `each`, in order.
    ///
    /// # Errors
    /// [`VosError`] for a frame or first mask that cannot be used, and what `each` returns.
    pub fn follow(
        &self,
        sequence: &[Frame],
        mut each: impl FnMut(Segmented) -> Result<(), VosError> + Send,
    ) -> Result<(), VosError> {
        let Some(first) = sequence.first() else { return Ok(()) };
        let first = First::read(&first.annotation)?;
        let (loads, loaded) = sync_channel(1);
        let (labels, labeled) = sync_channel(1);
        let (preparation, stride) = (self.preparation, self.encoder.stride());
        thread::scope(|scope| {
            let given = &first;
            scope.spawn(move || {
                for frame in sequence {
                    let frame = load(frame, given, &preparation);
                    let failed = frame.is_err();
                    // nobody listens any more once another stage failed
                    if loads.send(frame).is_err() || failed {
                        break;
                    }
                }
            });
            let drawing = scope.spawn(move || {
                for (index, frame) in labeled.into_iter().enumerate() {
                    let Labeled { image, labels } = frame;
                    let mask = match labels {
                        Some((grid, labels)) => given.mask_of(&labels, grid, stride)?,
                        None => given.mask.clone(),
                    };
                    each(Segmented { index, image, mask })?;
                }
                Ok(())
            });
            let tracked = self.track(sequence, &first, loaded, labels);
            match drawing.join() {
                Ok(drawn) => drawn.and(tracked),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    fn track(
        &self,
        sequence: &[Frame],
        first: &First,
        loaded: Receiver<Result<Loaded, VosError>>,
        labeled: SyncSender<Labeled>,
    ) -> Result<(), VosError> {
        let mut frames = loaded.into_iter().zip(sequence);
        let Some((Loaded { image, prepared }, frame)) = next(&mut frames)? else { return Ok(()) };
        let (tokens, grid) = self.features(prepared, frame)?;
        let shape = ClipShape::new(self.rule, grid, self.encoder.dim(), first.classes())?;
        let mut clip = Propagation::new(shape, &tokens, &first.labels(grid)?)?;
        if labeled.send(Labeled { image, labels: None }).is_err() {
            return Ok(());
        }
        while let Some((Loaded { image, prepared }, frame)) = next(&mut frames)? {
            let (tokens, _) = self.features(prepared, frame)?;
            let labels = Some((grid, clip.next(&tokens)?));
            // the stage behind tells its own error
            if labeled.send(Labeled { image, labels }).is_err() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Features `[N, D]` of a prepared frame, and their grid.
    fn features(&self, prepared: Prepared, frame: &Frame) -> Result<(Vec<f32>, PatchGrid), VosError> {
        let network = |source| VosError::Network { path: frame.image.clone(), source };
        let (height, width) = prepared.size;
        let compute = || -> candle_core::Result<_> {
            let images = Tensor::from_vec(prepared.pixels, (1, 3, height, width), self.encoder.device())?;
            let found = self.encoder.patch_features(&images)?;
            Ok((found.features.flatten_all()?.to_vec1::<f32>()?, found.grid))
        };
        let (tokens, (rows, columns)) = compute().map_err(network)?;
        if !tokens.iter().all(|value| value.is_finite()) {
            return Err(network(candle_core::Error::Msg("its features are not finite numbers".into())));
        }
        Ok((tokens, PatchGrid::new(rows, columns)?))
    }
}

fn next<'f>(
    frames: &mut impl Iterator<Item = (Result<Loaded, VosError>, &'f Frame)>,
) -> Result<Option<(Loaded, &'f Frame)>, VosError> {
    frames.next().map(|(loaded, frame)| loaded.map(|loaded| (loaded, frame))).transpose()
}

/// Decodes a frame.
///
/// # Errors
/// [`VosError::Read`] and [`VosError::Frame`].
pub(super) fn read_frame(frame: &Frame) -> Result<Rgb8Image, VosError> {
    let path = &frame.image;
    let bytes = fs::read(path).map_err(|source| VosError::Read { path: path.clone(), source })?;
    decode_rgb(&bytes, MAX_MEGAPIXELS).map_err(|source| VosError::Frame { path: path.clone(), source })
}

fn load(frame: &Frame, first: &First, preparation: &Preparation) -> Result<Loaded, VosError> {
    let image = read_frame(frame)?;
    let size = (image.height as usize, image.width as usize);
    if size != first.mask.size {
        return Err(VosError::Size {
            path: frame.image.clone(),
            size,
            other: first.path.clone(),
            other_size: first.mask.size,
        });
    }
    let refused = || VosError::Preparation {
        path: frame.image.clone(),
        size,
        short_side: preparation.short_side,
        stride: preparation.stride,
    };
    let prepared = preparation.prepare(&image).ok_or_else(refused)?;
    Ok(Loaded { image, prepared })
}

/// The given mask; void counts as background.
struct First {
    path: PathBuf,
    mask: LabelImage,
    objects: u8,
}

impl First {
    fn read(path: &Path) -> Result<Self, VosError> {
        let mut mask = LabelImage::read(path)?;
        let objects = count_objects(&mask, path)?;
        for label in mask.labels.iter_mut().filter(|label| **label == VOID) {
            *label = 0;
        }
        Ok(Self { path: path.to_owned(), mask, objects })
    }

    /// Background and objects.
    fn classes(&self) -> usize {
        usize::from(self.objects) + 1
    }

    /// One-hot labels `[N, C]` of the patches.
    fn labels(&self, grid: PatchGrid) -> Result<Vec<f32>, VosError> {
        let mut small = vec![0; grid.n_patches()];
        resize_nearest_into(&self.mask.labels, self.mask.size, (grid.height(), grid.width()), &mut small)?;
        let mut labels = vec![0.0; small.len() * self.classes()];
        one_hot_into(&small, self.classes(), &mut labels)?;
        Ok(labels)
    }

    /// The mask that soft labels say.
    fn mask_of(&self, labels: &[f32], grid: PatchGrid, stride: usize) -> Result<LabelImage, VosError> {
        let size = self.mask.size;
        let mut found = vec![0; size.0 * size.1];
        let mut scratch = vec![0.0; segment_scratch_len(grid, self.classes())];
        segment_into(labels, grid, self.classes(), stride, size, &mut scratch, &mut found)?;
        Ok(LabelImage { size, labels: found })
    }
}
