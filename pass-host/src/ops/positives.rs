//! Which patches are the positives of which.

use candle_core::{Device, Result, Tensor, bail};

/// The positives of every patch: up to `k` patches of the same image, best first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Positives {
    index: Vec<u32>,
    counts: Vec<u32>,
    k: usize,
    batch: usize,
    patches: usize,
}

impl Positives {
    /// - `index`: `[batch, patches, k]`, patches of the same image; entries past a patch's count are not read;
    /// - `counts`: `[patches]`, how many of the `k` are valid (the same in every image: the grid decides).
    ///
    /// # Errors
    /// If a length does not fit, a count exceeds `k`, or an index is not a patch.
    pub fn new(
        mut index: Vec<u32>,
        counts: Vec<u32>,
        k: usize,
        batch: usize,
        patches: usize,
    ) -> Result<Self> {
        if index.len() != batch * patches * k || counts.len() != patches {
            bail!(
                "positives: {batch} images of {patches} patches with {k} positives need {} indices and {patches} \
                 counts, found {} and {}",
                batch * patches * k,
                index.len(),
                counts.len()
            )
        }
        if let Some(patch) = counts.iter().position(|&count| count as usize > k) {
            bail!("positives: patch {patch} counts {} of {k} positives", counts[patch])
        }
        if k > 0 {
            for (row, positives) in index.chunks_exact_mut(k).enumerate() {
                let count = counts[row % patches] as usize;
                if let Some(&wrong) = positives[..count].iter().find(|&&i| i as usize >= patches) {
                    let (image, patch) = (row / patches, row % patches);
                    bail!("positives: image {image}, patch {patch}: {wrong} is none of {patches} patches")
                }
                positives[count..].fill(0);
            }
        }
        Ok(Self { index, counts, k, batch, patches })
    }

    /// Positives kept per patch.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Images.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Patches per image.
    pub fn patches(&self) -> usize {
        self.patches
    }

    /// How many of the `k` positives of each patch are valid, `[patches]`.
    pub fn counts(&self) -> &[u32] {
        &self.counts
    }

    /// All indices, `[batch, patches, k]`; 0 past a patch's count.
    pub fn index(&self) -> &[u32] {
        &self.index
    }

    /// The valid positives of one patch.
    #[inline]
    pub fn of(&self, image: usize, patch: usize) -> &[u32] {
        &self.index[(image * self.patches + patch) * self.k..][..self.counts[patch] as usize]
    }

    /// Rows of a flattened `[batch · patches, ..]` tensor: the positives of all patches one after the other.
    pub(super) fn rows(&self, device: &Device) -> Result<Tensor> {
        let per_image = self.patches * self.k;
        let rows: Vec<u32> = self
            .index
            .iter()
            .enumerate()
            .map(|(place, &patch)| (place / per_image * self.patches) as u32 + patch)
            .collect();
        Tensor::from_vec(rows, self.index.len(), device)
    }

    /// `valid` where a positive counts and `missing` elsewhere, `[1, patches, k]`.
    pub(super) fn mask(&self, valid: impl Fn(u32) -> f32, missing: f32, like: &Tensor) -> Result<Tensor> {
        let mask: Vec<f32> = self
            .counts
            .iter()
            .flat_map(|&count| (0..self.k as u32).map(move |j| (j, count)))
            .map(|(j, count)| if j < count { valid(count) } else { missing })
            .collect();
        Tensor::from_vec(mask, (1, self.patches, self.k), like.device())?.to_dtype(like.dtype())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::random::{Purpose, Stream};

    /// Random positives in which patch `i` has `i % (k + 1)` of `k`.
    pub(in super::super) fn random_positives(batch: usize, patches: usize, k: usize) -> Positives {
        let mut stream = Stream::new(5, Purpose::Init, &[]);
        let index = (0..batch * patches * k).map(|_| stream.below(patches as u64) as u32).collect();
        let counts = (0..patches).map(|i| (i % (k + 1)) as u32).collect();
        Positives::new(index, counts, k, batch, patches).unwrap()
    }

    #[test]
    fn only_counted_entries_are_read() {
        let positives = Positives::new(vec![1, 9, 0, 1, 2, 9, 1, 0], vec![1, 2], 2, 2, 2);
        let error = positives.unwrap_err().to_string();
        assert!(error.contains("image 1, patch 0: 2"), "{error}");
        let positives = Positives::new(vec![1, 9, 0, 1, 0, 9, 1, 0], vec![1, 2], 2, 2, 2).unwrap();
        assert_eq!(positives.of(0, 0), [1]);
        assert_eq!(positives.of(1, 1), [1, 0]);
        assert_eq!(positives.index(), [1, 0, 0, 1, 0, 0, 1, 0]);
        assert_eq!(positives.rows(&Device::Cpu).unwrap().to_vec1::<u32>().unwrap(), [1, 0, 0, 1, 2, 2, 3, 2]);
    }

    #[test]
    fn lengths_and_counts_are_checked() {
        assert!(Positives::new(vec![0; 3], vec![1; 2], 2, 1, 2).is_err());
        assert!(Positives::new(vec![0; 4], vec![3, 1], 2, 1, 2).is_err());
        assert!(Positives::new(vec![], vec![0; 2], 0, 3, 2).is_ok());
    }
}
