//! Which patches are the positives of which.

use candle_core::{DType, Device, Result, Tensor, bail};
use std::borrow::Cow;

/// The positives of every patch: up to `k` patches of the same image, best first.
#[derive(Clone, Debug)]
pub struct Positives {
    index: Index,
    counts: Vec<u32>,
    k: usize,
    batch: usize,
    patches: usize,
}

/// Where the indices are.
#[derive(Clone, Debug)]
enum Index {
    Host(Vec<u32>),
    /// `[batch, patches, k]`
    Device(Tensor),
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
        Ok(Self { index: Index::Host(index), counts, k, batch, patches })
    }

    /// Positives that a device has chosen and keeps: nothing waits for it until [`Positives::to_host`].
    ///
    /// - `index`: `[batch, patches, k]` in `u32`, valid by construction, 0 past a patch's count.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub(crate) fn on_device(index: Tensor, counts: Vec<u32>) -> Result<Self> {
        let (batch, patches, k) = index.dims3()?;
        if counts.len() != patches || index.dtype() != DType::U32 {
            bail!("positives: {:?} of {:?} for {} counts", index.dtype(), index.shape(), counts.len())
        }
        Ok(Self { index: Index::Device(index), counts, k, batch, patches })
    }

    /// The same positives in memory of the host.
    ///
    /// # Errors
    /// If the device cannot be read.
    pub fn to_host(&self) -> Result<Cow<'_, Self>> {
        match &self.index {
            Index::Host(_) => Ok(Cow::Borrowed(self)),
            Index::Device(index) => {
                let index = Index::Host(index.flatten_all()?.to_vec1()?);
                Ok(Cow::Owned(Self { index, counts: self.counts.clone(), ..*self }))
            }
        }
    }

    /// The indices on a device, `[batch, patches, k]`; one unused value without positives.
    pub(super) fn index_on(&self, device: &Device) -> Result<Tensor> {
        match &self.index {
            _ if self.k == 0 => Tensor::zeros((1, 1, 1), DType::U32, device),
            Index::Host(index) => Tensor::from_slice(index, (self.batch, self.patches, self.k), device),
            Index::Device(index) => index.to_device(device),
        }
    }

    /// The counts on a device, `[patches]`.
    pub(super) fn counts_on(&self, device: &Device) -> Result<Tensor> {
        Tensor::from_slice(&self.counts, self.patches, device)
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

    /// All indices, `[batch, patches, k]`; 0 past a patch's count. None while a device keeps them, see
    /// [`Positives::to_host`].
    pub fn index(&self) -> &[u32] {
        match &self.index {
            Index::Host(index) => index,
            Index::Device(_) => &[],
        }
    }

    /// The valid positives of one patch.
    ///
    /// # Panics
    /// While a device keeps them, see [`Positives::to_host`].
    #[inline]
    pub fn of(&self, image: usize, patch: usize) -> &[u32] {
        &self.index()[(image * self.patches + patch) * self.k..][..self.counts[patch] as usize]
    }

    /// Rows of a flattened `[batch · patches, ..]` tensor: the positives of all patches one after the other.
    pub(super) fn rows(&self, device: &Device) -> Result<Tensor> {
        let first: Vec<u32> = (0..self.batch).map(|image| (image * self.patches) as u32).collect();
        let first = Tensor::from_vec(first, (self.batch, 1, 1), device)?;
        self.index_on(device)?.broadcast_add(&first)?.flatten_all()
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
