//! The memory bank: features of labelled patches with the share of each class in their pixels.

use ndarray::{Array2, ArrayView2};

use super::masks::IGNORED;
use crate::random::{Purpose, Stream};

/// Labelled patch features.
#[derive(Clone, Debug)]
pub struct Bank {
    dim: usize,
    classes: usize,
    features: Vec<f32>,
    shares: Vec<f32>,
}

impl Bank {
    /// No patches yet.
    pub fn new(dim: usize, classes: usize) -> Self {
        Self { dim, classes, features: Vec::new(), shares: Vec::new() }
    }

    /// Adds a patch: its L2-normalized feature and the shares of the classes.
    ///
    /// # Panics
    /// If the lengths are others than those of the bank.
    pub fn push(&mut self, feature: &[f32], shares: &[f32]) {
        assert_eq!((feature.len(), shares.len()), (self.dim, self.classes), "sizes of a patch");
        self.features.extend_from_slice(feature);
        self.shares.extend_from_slice(shares);
    }

    /// Patches.
    pub fn len(&self) -> usize {
        self.shares.len() / self.classes
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.shares.is_empty()
    }

    /// Features, `[M, D]`.
    pub fn features(&self) -> ArrayView2<'_, f32> {
        ArrayView2::from_shape((self.len(), self.dim), &self.features).expect("whole rows were added")
    }

    /// Shares of the classes of each patch.
    pub fn shares(&self, patch: usize) -> &[f32] {
        &self.shares[patch * self.classes..][..self.classes]
    }
}

/// The share of each class in the pixels of each patch, `[rows · columns, classes]`.
///
/// - `labels`: `[height, width]`; a pixel belongs to the patch of the stretched grid that its center lies in.
///
/// Pixels that do not count give no class a share: a patch that lies mostly in them weighs little, one that lies wholly
/// in them is zero.
pub fn patch_shares(
    labels: &[u8],
    (height, width): (usize, usize),
    (rows, columns): (usize, usize),
    classes: usize,
) -> Array2<f32> {
    let mut counts = Array2::<u32>::zeros((rows * columns, classes));
    let mut pixels = vec![0u32; rows * columns];
    let patch_of = |pixel: usize, patches: usize, pixels: usize| (2 * pixel + 1) * patches / (2 * pixels);
    for (y, line) in labels.chunks_exact(width.max(1)).enumerate() {
        let row = patch_of(y, rows, height);
        for (x, &label) in line.iter().enumerate() {
            let patch = row * columns + patch_of(x, columns, width);
            pixels[patch] += 1;
            if label != IGNORED {
                counts[[patch, usize::from(label)]] += 1;
            }
        }
    }
    Array2::from_shape_fn(counts.dim(), |(patch, class)| {
        counts[[patch, class]] as f32 / pixels[patch].max(1) as f32
    })
}

/// The patches of one image that enter the bank: at most `quota` of those with a labelled pixel, in order.
///
/// A patch scores the sum, over the classes in it, of the number of patches that hold the class, times its number of
/// `uniform` (`[N]`, in `[0, 1)`); the lowest scores are kept. Rare classes of the image thus come first, but not always.
pub fn choose(shares: ArrayView2<'_, f32>, quota: usize, uniform: &[f64]) -> Vec<usize> {
    let holds = |patch: usize, class: usize| shares[[patch, class]] > 0.0;
    let patches: Vec<usize> =
        (0..shares.nrows()).filter(|&patch| (0..shares.ncols()).any(|class| holds(patch, class))).collect();
    if patches.len() <= quota {
        return patches;
    }
    let frequency: Vec<usize> = (0..shares.ncols())
        .map(|class| patches.iter().filter(|&&patch| holds(patch, class)).count())
        .collect();
    let score = |patch: usize| {
        let sum: usize =
            (0..shares.ncols()).filter(|&class| holds(patch, class)).map(|class| frequency[class]).sum();
        sum as f64 * uniform[patch]
    };
    let mut scored: Vec<(f64, usize)> = patches.into_iter().map(|patch| (score(patch), patch)).collect();
    scored.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let mut kept: Vec<usize> = scored[..quota].iter().map(|&(_, patch)| patch).collect();
    kept.sort_unstable();
    kept
}

/// The numbers [`choose`] needs for image `image` of `patches` patches.
pub fn uniform(seed: u64, image: u64, patches: usize) -> Vec<f64> {
    let mut stream = Stream::new(seed, Purpose::Subset, &[image]);
    (0..patches).map(|_| stream.uniform()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_those_of_the_pixels_that_count() {
        #[rustfmt::skip]
        let labels = [
            0, 0, 1, 1,
            0, 2, 1, IGNORED,
            IGNORED, IGNORED, 2, 2,
            IGNORED, IGNORED, 2, 2,
        ];
        let shares = patch_shares(&labels, (4, 4), (2, 2), 3);
        assert_eq!(shares, ndarray::arr2(&[[0.75, 0.0, 0.25], [0.0, 0.75, 0.0], [0.0; 3], [0.0, 0.0, 1.0]]));
        // 5 pixels in 2 patches: the center of the middle pixel lies on the border and goes to the second
        let uneven = patch_shares(&[0, 0, 1, 1, 1], (1, 5), (1, 2), 2);
        assert_eq!(uneven, ndarray::arr2(&[[1.0, 0.0], [0.0, 1.0]]));
        // more patches than pixels: some are empty
        assert_eq!(patch_shares(&[1], (1, 1), (1, 3), 2).sum(), 1.0);
    }

    #[test]
    fn rare_classes_come_first() {
        // class 1 in one patch of ten, class 0 in all others; a patch without labels is never taken
        let shares = Array2::from_shape_fn((11, 2), |(patch, class)| match (patch, class) {
            (10, _) => 0.0,
            (3, class) => class as f32,
            (_, class) => 1.0 - class as f32,
        });
        let same = vec![0.5; 11];
        assert_eq!(choose(shares.view(), 2, &same), [0, 3]);
        assert_eq!(choose(shares.view(), 20, &same), (0..10).collect::<Vec<_>>());
        assert_eq!(choose(shares.view(), 0, &same), [0usize; 0]);
        let mut lucky = same;
        lucky[7] = 0.01;
        assert_eq!(choose(shares.view(), 1, &lucky), [7]);
        assert_ne!(uniform(0, 1, 3), uniform(0, 2, 3));
    }
}
