//! The positives of every patch: the tensor side of `pass_core::matching`.
//!
//! On the CPU the similarities and the choice run in `pass-core`, one image a task: 8·N dot products are little work
//! next to the backbone, and one implementation cannot disagree with itself. On CUDA a kernel with the same order of
//! sums and the same rule for ties chooses, so that the step does not wait for the device.

use candle_core::{DType, Device, Result, Tensor};
use pass_core::matching::{
    NORM_EPSILON, match_into, match_scratch_len, similarities_into, similarity_scratch_len,
};
use pass_core::neighborhood::{Border, Neighborhood, Window};
use pass_core::shape::{PatchGrid, Tokens};
use rayon::prelude::*;

use crate::config::{self, PatchObjective};
use crate::ops::{Ops, Positives};

/// How positives are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Matching {
    window: Window,
    border: Border,
    k: usize,
}

impl Matching {
    /// The rule a configuration asks for.
    pub fn from_config(config: &PatchObjective) -> Self {
        Self {
            window: match config.window {
                config::Window::Side(side) => Window::Side(side),
                config::Window::All(_) => Window::All,
            },
            border: match config.border {
                config::Border::Wrap => Border::Wrap,
                config::Border::Clip => Border::Clip,
            },
            k: config.k,
        }
    }

    /// Positives kept per patch (a patch with fewer neighbors has fewer).
    pub fn k(&self) -> usize {
        self.k
    }

    fn neighborhood(&self, (height, width): (usize, usize)) -> Result<Neighborhood> {
        let grid = PatchGrid::new(height, width).map_err(candle_core::Error::wrap)?;
        Neighborhood::new(grid, self.window, self.border).map_err(candle_core::Error::wrap)
    }
}

/// The candidates of every patch of a grid, ascending.
pub fn neighborhoods(grid: (usize, usize), matching: &Matching) -> Result<Vec<Vec<u32>>> {
    let neighborhood = matching.neighborhood(grid)?;
    let row = |patch| neighborhood.candidates(patch).map(|candidate| candidate as u32).collect();
    Ok((0..grid.0 * grid.1).map(row).collect())
}

/// Cosine similarity of every patch of features `[B, N, D]` with its candidates: `(M, [B, N, M])`, padded with `-inf`.
pub fn similarities(
    features: &Tensor,
    grid: (usize, usize),
    matching: &Matching,
) -> Result<(usize, Vec<f32>)> {
    let neighborhood = matching.neighborhood(grid)?;
    let columns = neighborhood.max_candidates();
    let (data, patches, dim) = on_host(features)?;
    let mut out = vec![0f32; data.len() / dim * columns];
    out.par_chunks_mut(patches * columns)
        .zip(data.par_chunks(patches * dim))
        .try_for_each(|(out, image)| {
            let tokens = Tokens::new(image, patches, dim)?;
            let mut scratch = vec![0f32; similarity_scratch_len(&neighborhood)];
            similarities_into(tokens, &neighborhood, &mut scratch, out)
        })
        .map_err(candle_core::Error::wrap)?;
    Ok((columns, out))
}

/// The `k` most similar candidates of every patch of features `[B, N, D]`.
pub fn positives(features: &Tensor, grid: (usize, usize), matching: &Matching) -> Result<Positives> {
    let neighborhood = matching.neighborhood(grid)?;
    // a small grid may have fewer neighbors than k
    let k = matching.k.min(neighborhood.max_candidates());
    let (data, patches, dim) = on_host(features)?;
    let batch = data.len() / (patches * dim);
    let mut index = vec![0u32; batch * patches * k];
    index
        .par_chunks_mut(patches * k)
        .zip(data.par_chunks(patches * dim))
        .try_for_each(|(out, image)| {
            let tokens = Tokens::new(image, patches, dim)?;
            let mut scratch = vec![0f32; match_scratch_len(&neighborhood)];
            match_into(tokens, &neighborhood, k, &mut scratch, out)
        })
        .map_err(candle_core::Error::wrap)?;
    let counts = (0..patches).map(|patch| neighborhood.candidates(patch).count().min(k) as u32).collect();
    Positives::new(index, counts, k, batch, patches)
}

/// The same positives, chosen and kept where the features are if `ops` has a kernel for them.
pub fn positives_where_computed(
    features: &Tensor,
    grid: (usize, usize),
    matching: &Matching,
    ops: Ops,
) -> Result<Positives> {
    if ops.uses_kernels(features.device()) {
        let k = matching.k.min(matching.neighborhood(grid)?.max_candidates());
        let candidates = neighborhoods(grid, matching)?;
        if let Some(positives) = ops.positives(features, &candidates, k, NORM_EPSILON)? {
            return Ok(positives);
        }
    }
    positives(features, grid, matching)
}

/// Features as host memory with their N and D.
fn on_host(features: &Tensor) -> Result<(Vec<f32>, usize, usize)> {
    let (_, patches, dim) = features.dims3()?;
    let host = features.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    Ok((host, patches, dim))
}
