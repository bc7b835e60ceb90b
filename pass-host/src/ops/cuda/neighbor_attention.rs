//! Attention of every patch over its own token and its positives.

use super::super::neighbor_attention::composition;
use super::super::positives::Positives;
use super::engine::{Launch, MOST_SHARED, Output};
use super::graph::of_three;
use super::sums::scaled_sum;
use candle_core::{DType, Result, Shape, Tensor};

/// Warps of a block.
const WARPS: usize = 8;

pub(in super::super) fn neighbor_attention(
    q: &Tensor,
    own_kv: &Tensor,
    patch_kv: &Tensor,
    positives: &Positives,
    heads: usize,
) -> Result<Tensor> {
    // a warp of the backward pass holds two numbers for each token of one head
    if WARPS * 2 * (1 + positives.k()) * size_of::<f32>() > MOST_SHARED {
        return composition(q, own_kv, patch_kv, positives, heads);
    }
    let call = Call {
        q: q.contiguous()?,
        own: own_kv.contiguous()?,
        patches: patch_kv.contiguous()?,
        index: positives.index_on(q.device())?,
        counts: positives.counts_on(q.device())?,
        rows: positives.batch() * positives.patches(),
        n: positives.patches(),
        k: positives.k(),
        heads,
        width: q.dim(2)? / heads,
    };
    let out = Output::new(call.rows * call.dim(), q.dtype(), q)?;
    let launch = call.by_head("neighbor_attention", (1 + call.k) * size_of::<f32>()).output(&out);
    call.sizes(launch).run()?;
    let (shape, [q, own, patches]) =
        ((positives.batch(), call.n, call.dim()), [call.q.clone(), call.own.clone(), call.patches.clone()]);
    of_three("neighbor_attention", [&q, &own, &patches], out, shape, move |d_out| call.backward(d_out))
}

/// What all launches of a call are given.
struct Call {
    q: Tensor,
    own: Tensor,
    patches: Tensor,
    index: Tensor,
    counts: Tensor,
    rows: usize,
    n: usize,
    k: usize,
    heads: usize,
    width: usize,
}

impl Call {
    fn dim(&self) -> usize {
        self.heads * self.width
    }

    fn q_shared(&self) -> bool {
        self.q.dims() == [1, 1, self.dim()]
    }

    fn own_shared(&self) -> bool {
        self.own.dims() == [1, 1, 2 * self.dim()]
    }

    /// A launch with one warp for every patch and head, with the tensors all of them read.
    fn by_head(&self, kernel: &'static str, shared: usize) -> Launch {
        Launch::new("neighbors", kernel, self.q.dtype(), &self.q)
            .warps(self.rows * self.heads, shared)
            .tensor(&self.q)
            .tensor(&self.own)
            .tensor(&self.patches)
            .tensor(&self.index)
            .tensor(&self.counts)
    }

    fn sizes(&self, launch: Launch) -> Launch {
        launch
            .int(self.rows)
            .int(self.n)
            .int(self.k)
            .int(self.heads)
            .int(self.width)
            .int(self.q_shared().into())
            .int(self.own_shared().into())
            .float(1.0 / (self.width as f32).sqrt())
    }

    fn backward(&self, d_out: &Tensor) -> Result<[Option<Tensor>; 3]> {
        let (dim, dtype) = (self.dim(), self.q.dtype());
        let dq = Output::new(self.rows * dim, dtype, &self.q)?;
        let d_own = Output::new(self.rows * 2 * dim, dtype, &self.q)?;
        let kept = Output::new(self.rows * self.heads * 2 * (1 + self.k), DType::F32, &self.q)?;
        let launch = self
            .by_head("neighbor_attention_backward", 2 * (1 + self.k) * size_of::<f32>())
            .tensor(d_out)
            .output(&dq)
            .output(&d_own)
            .output(&kept);
        self.sizes(launch).run()?;
        let d_patches = if self.patches.track_op() {
            let d_patches = Output::like(&self.patches)?;
            Launch::new("neighbors", "neighbor_attention_gather", dtype, &self.q)
                .warps(self.rows, 0)
                .tensor(&self.q)
                .tensor(&self.index)
                .tensor(&self.counts)
                .tensor(d_out)
                .output(&kept)
                .output(&d_patches)
                .int(self.rows)
                .int(self.n)
                .int(self.k)
                .int(self.heads)
                .int(self.width)
                .int(self.q_shared().into())
                .run()?;
            Some(d_patches.tensor(self.patches.shape())?)
        } else {
            None
        };
        Ok([
            self.q.track_op().then(|| one_or_all(dq, self.q.shape(), self.rows)).transpose()?,
            self.own.track_op().then(|| one_or_all(d_own, self.own.shape(), self.rows)).transpose()?,
            d_patches,
        ])
    }
}

/// Gradients of all rows, or their sum where all patches share one row.
fn one_or_all(gradients: Output, shape: &Shape, rows: usize) -> Result<Tensor> {
    let (images, patches, width) = shape.dims3()?;
    if images * patches == rows {
        return gradients.tensor(shape);
    }
    let dtype = gradients.dtype();
    let gradients = gradients.tensor((rows, width))?;
    scaled_sum(&gradients, width, 1.0, dtype)?.tensor(shape)
}
