//! Attention of a few queries over all tokens of their image.

use super::super::class_attention::composition;
use super::engine::{Launch, MOST_SHARED, Output};
use super::graph::of_three;
use candle_core::{Result, Tensor};

/// Threads of a block, which serves one image and head.
const THREADS: u32 = 128;

pub(in super::super) fn class_attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize) -> Result<Tensor> {
    let ((images, queries, dim), tokens) = (q.dims3()?, k.dim(1)?);
    // what the backward pass holds of all queries at once
    let shared = 2 * queries * tokens * size_of::<f32>();
    if shared > MOST_SHARED {
        return composition(q, k, v, heads);
    }
    let inputs = [q.contiguous()?, k.contiguous()?, v.contiguous()?];
    let width = dim / heads;
    let scale = 1.0 / (width as f32).sqrt();
    let out = Output::like(q)?;
    launch("class_attention", &inputs, images * heads, tokens * size_of::<f32>())
        .output(&out)
        .int(queries)
        .int(tokens)
        .int(heads)
        .int(width)
        .float(scale)
        .run()?;
    let [q, k, v] = inputs.clone();
    of_three("class_attention", [&q, &k, &v], out, q.shape(), move |d_out| {
        let [q, k, v] = &inputs;
        let (dq, dk, dv) = (Output::like(q)?, Output::like(k)?, Output::like(v)?);
        launch("class_attention_backward", &inputs, images * heads, shared)
            .tensor(d_out)
            .output(&dq)
            .output(&dk)
            .output(&dv)
            .int(queries)
            .int(tokens)
            .int(heads)
            .int(width)
            .float(scale)
            .run()?;
        Ok([
            q.track_op().then(|| dq.tensor(q.shape())).transpose()?,
            k.track_op().then(|| dk.tensor(k.shape())).transpose()?,
            v.track_op().then(|| dv.tensor(v.shape())).transpose()?,
        ])
    })
}

fn launch(kernel: &'static str, [q, k, v]: &[Tensor; 3], blocks: usize, shared: usize) -> Launch {
    Launch::new("class_attention", kernel, q.dtype(), q)
        .blocks(blocks, THREADS)
        .shared(shared)
        .tensor(q)
        .tensor(k)
        .tensor(v)
}
