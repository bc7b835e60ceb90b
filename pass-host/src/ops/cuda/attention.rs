//! Multi-head self-attention from packed projections: batched products with a softmax between them.
//!
//! At the 36 to 196 tokens of training, a tile of scores lives for three launches; the backward pass forms it again, so
//! nothing of size N² is kept. Images go in groups, which bounds the scores held at once whatever the batch.

use super::engine::{Launch, Matrices, Output, Product, address};
use super::graph::of_one;
use candle_core::{DType, Result, Tensor};

/// Bytes of scores held at once.
const WORKSPACE: usize = 256 << 20;
/// Scores of a query start at multiples of this many values, so that products can read them in whole accesses.
const PITCH: usize = 8;

/// The sizes of one call.
#[derive(Clone, Copy)]
struct Sizes {
    images: usize,
    tokens: usize,
    heads: usize,
    /// Features of a head.
    width: usize,
    dtype: DType,
}

impl Sizes {
    fn of(qkv: &Tensor, heads: usize) -> Result<Self> {
        let (images, tokens, width) = qkv.dims3()?;
        Ok(Self { images, tokens, heads, width: width / (3 * heads), dtype: qkv.dtype() })
    }

    fn dim(&self) -> usize {
        self.heads * self.width
    }

    fn pitch(&self) -> usize {
        self.tokens.next_multiple_of(PITCH)
    }

    fn scale(&self) -> f32 {
        1.0 / (self.width as f32).sqrt()
    }

    /// Images whose scores are held at once.
    fn group(&self) -> usize {
        let image = self.heads * self.tokens * self.pitch() * DType::F32.size_in_bytes();
        (WORKSPACE / image).clamp(1, self.images)
    }

    /// First image and number of images of every group.
    fn groups(self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.images)
            .step_by(self.group())
            .map(move |first| (first, self.group().min(self.images - first)))
    }

    /// One head of q, k or v (`part` 0, 1, 2) of all images from `image` on, `[N, d]` each.
    fn projection(&self, base: u64, image: usize, part: usize, head: usize) -> Matrices {
        let row = 3 * self.dim();
        let at = image * self.tokens * row + part * self.dim() + head * self.width;
        self.matrices(base, at, row)
    }

    /// One head of the result or its gradient, `[N, d]` each.
    fn result(&self, base: u64, image: usize, head: usize) -> Matrices {
        let row = self.dim();
        self.matrices(base, image * self.tokens * row + head * self.width, row)
    }

    fn matrices(&self, base: u64, at: usize, row: usize) -> Matrices {
        let address = base + (at * self.dtype.size_in_bytes()) as u64;
        Matrices { address, dtype: self.dtype, row, stride: self.tokens * row, transposed: false }
    }

    /// One head of scores `[images, heads, N, pitch]`, `[N, N]` each.
    fn scores(&self, scores: &Output, head: usize) -> Matrices {
        let one = self.tokens * self.pitch();
        let (address, dtype) = (scores.at(head * one), scores.dtype());
        Matrices { address, dtype, row: self.pitch(), stride: self.heads * one, transposed: false }
    }

    fn memory(&self, dtype: DType, like: &Tensor) -> Result<Output> {
        Output::new(self.group() * self.heads * self.tokens * self.pitch(), dtype, like)
    }

    /// `out[N, N] = scale · a[N, d] · b[d, N]` of every image.
    fn outer(&self, images: usize, scale: f32, a: Matrices, b: Matrices, out: Matrices) -> Product {
        Product { m: self.tokens, n: self.tokens, k: self.width, batch: images, scale, a, b, out }
    }

    /// `out[N, d] = scale · a[N, N] · b[N, d]` of every image.
    fn inner(&self, images: usize, scale: f32, a: Matrices, b: Matrices, out: Matrices) -> Product {
        Product { m: self.tokens, n: self.width, k: self.tokens, batch: images, scale, a, b, out }
    }

    /// Probabilities of a group of images, by way of `scores`.
    fn probabilities(
        &self,
        qkv: &Tensor,
        (first, images): (usize, usize),
        scores: &Output,
        probabilities: &Output,
    ) -> Result<()> {
        let base = address(qkv)?;
        for head in 0..self.heads {
            let (q, k) = (self.projection(base, first, 0, head), self.projection(base, first, 1, head));
            self.outer(images, self.scale(), q, k.t(), self.scores(scores, head)).run(qkv)?;
        }
        let rows = images * self.heads * self.tokens;
        Launch::new("attention", "softmax", self.dtype, qkv)
            .warps(rows, 0)
            .output(scores)
            .output(probabilities)
            .int(rows)
            .int(self.tokens)
            .int(self.pitch())
            .run()
    }
}

pub(in super::super) fn attention(qkv: &Tensor, heads: usize) -> Result<Tensor> {
    let qkv = qkv.contiguous()?;
    let sizes = Sizes::of(&qkv, heads)?;
    let base = address(&qkv)?;
    let out = Output::new(sizes.images * sizes.tokens * sizes.dim(), sizes.dtype, &qkv)?;
    let (scores, p) = (sizes.memory(DType::F32, &qkv)?, sizes.memory(sizes.dtype, &qkv)?);
    for (first, images) in sizes.groups() {
        sizes.probabilities(&qkv, (first, images), &scores, &p)?;
        for head in 0..heads {
            let (v, to) = (sizes.projection(base, first, 2, head), sizes.result(out.at(0), first, head));
            sizes.inner(images, 1.0, sizes.scores(&p, head), v, to).run(&qkv)?;
        }
    }
    let (input, shape) = (qkv.clone(), (sizes.images, sizes.tokens, sizes.dim()));
    of_one("attention", &qkv, out, shape, move |d_out| Ok([Some(backward(&input, d_out, sizes)?)]))
}

fn backward(qkv: &Tensor, d_out: &Tensor, sizes: Sizes) -> Result<Tensor> {
    let (base, upstream) = (address(qkv)?, address(d_out)?);
    let d_qkv = Output::like(qkv)?;
    let (scores, p) = (sizes.memory(DType::F32, qkv)?, sizes.memory(sizes.dtype, qkv)?);
    for (first, images) in sizes.groups() {
        let of = |part, head| sizes.projection(base, first, part, head);
        let to = |part, head| sizes.projection(d_qkv.at(0), first, part, head);
        sizes.probabilities(qkv, (first, images), &scores, &p)?;
        // the scores are spent: their memory takes the gradients of the probabilities
        for head in 0..sizes.heads {
            let d = sizes.result(upstream, first, head);
            sizes.inner(images, 1.0, sizes.scores(&p, head).t(), d, to(2, head)).run(qkv)?;
            sizes.outer(images, 1.0, d, of(2, head).t(), sizes.scores(&scores, head)).run(qkv)?;
        }
        let rows = images * sizes.heads * sizes.tokens;
        Launch::new("attention", "softmax_backward", sizes.dtype, qkv)
            .warps(rows, 0)
            .output(&p)
            .output(&scores)
            .output(&p)
            .int(rows)
            .int(sizes.tokens)
            .int(sizes.pitch())
            .run()?;
        for head in 0..sizes.heads {
            let ds = sizes.scores(&p, head);
            sizes.inner(images, sizes.scale(), ds, of(1, head), to(0, head)).run(qkv)?;
            sizes.inner(images, sizes.scale(), ds.t(), of(0, head), to(1, head)).run(qkv)?;
        }
    }
    d_qkv.tensor(qkv.shape())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_cover_all_images_and_bound_the_scores() {
        for (images, tokens) in [(1, 196), (512, 196), (700, 36), (3, 20_000)] {
            let sizes = Sizes { images, tokens, heads: 6, width: 64, dtype: DType::BF16 };
            let groups: Vec<_> = sizes.groups().collect();
            assert_eq!(groups.iter().map(|group| group.1).sum::<usize>(), images);
            assert!(groups.windows(2).all(|pair| pair[0].0 + pair[0].1 == pair[1].0));
            assert!(sizes.group() == 1 || sizes.group() * 6 * tokens * sizes.pitch() * 4 <= WORKSPACE);
        }
    }
}
