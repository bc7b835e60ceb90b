//! Any sizes and any bit patterns, buffers that fit or not: every public function returns, none panics, and what is
//! accepted keeps its promises. `cargo fuzz run sizes` in `pass-core`.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pass_core::aggregation::{AggregationHead, mean_into};
use pass_core::class_attention::{ClassAttention, ClassAttentionParameters};
use pass_core::layers::LayerNorm;
use pass_core::loss::{Temperatures, class_loss, patch_loss_with_gradient};
use pass_core::matching::{Matches, match_into, match_scratch_len};
use pass_core::neighborhood::{Border, Neighborhood, Window};
use pass_core::shape::{PatchGrid, Tokens};
use pass_core::{center, softmax};

#[derive(Arbitrary, Debug)]
struct Input {
    grid: (usize, usize),
    small: bool,
    window: Option<usize>,
    wrap: bool,
    patch: usize,
    k: usize,
    dim: u8,
    heads: u8,
    hidden: u8,
    /// Elements taken off a buffer: 0 fits.
    missing: [u8; 4],
    temperatures: (f32, f32),
    momentum: f32,
    values: Vec<f32>,
}

impl Input {
    fn numbers(&self, len: usize) -> Vec<f32> {
        self.values.iter().copied().chain([0.5]).cycle().take(len).collect()
    }

    /// A buffer of `len` numbers, sometimes too short.
    fn buffer(&self, which: usize, len: usize) -> Vec<f32> {
        self.numbers(len.saturating_sub(usize::from(self.missing[which] % 4 / 3)))
    }
}

fuzz_target!(|input: Input| {
    let (height, width) = if input.small { (input.grid.0 % 9, input.grid.1 % 9) } else { input.grid };
    let Ok(grid) = PatchGrid::new(height, width) else { return };
    let window =
        input.window.map_or(Window::All, |side| Window::Side(if input.small { side % 12 } else { side }));
    let border = if input.wrap { Border::Wrap } else { Border::Clip };
    let Ok(neighborhood) = Neighborhood::new(grid, window, border) else { return };
    for (slot, candidate) in neighborhood.candidates(input.patch).enumerate().take(100) {
        assert_eq!(neighborhood.slot(input.patch, candidate), Some(slot));
        assert!(neighborhood.slot(candidate, input.patch).is_some());
    }
    let _ = neighborhood.list::<24>(input.patch);
    if !input.small {
        return;
    }

    let (n, dim, k) = (grid.n_patches(), usize::from(input.dim % 9), input.k % 12);
    let features = input.buffer(0, n * dim);
    let Ok(tokens) = Tokens::new(&features, n, dim) else { return };
    let mut scratch = input.buffer(1, match_scratch_len(&neighborhood));
    let mut indices = vec![0; n * k];
    if match_into(tokens, &neighborhood, k, &mut scratch, &mut indices).is_err() {
        return;
    }
    let matches = Matches::new(&indices, n, k).expect("what matching writes is valid");
    for patch in 0..n {
        let candidates: Vec<_> = neighborhood.candidates(patch).collect();
        let found = matches.of(patch);
        assert_eq!(found.len(), k.min(candidates.len()));
        assert!(found.iter().all(|&index| candidates.contains(&(index as usize))));
        assert!((1..found.len()).all(|i| !found[..i].contains(&found[i])));
    }
    let _ = mean_into(tokens, matches, &mut input.buffer(2, n * dim));

    let (heads, hidden) = (usize::from(input.heads % 5), usize::from(input.hidden % 17));
    let parameters = ClassAttentionParameters::from_fn(|name| {
        input.buffer(3, ClassAttentionParameters::<()>::len_of(name, dim, hidden))
    });
    if let Ok(block) = ClassAttention::new(parameters.as_ref().map(Vec::as_slice), heads) {
        let vector = input.numbers(dim);
        let blocks = [block, block];
        let head =
            LayerNorm::new(&vector, &vector).and_then(|norm| AggregationHead::new(&vector, &blocks, norm));
        if let Ok(head) = head {
            let mut scratch = input.buffer(1, head.scratch_len(n));
            let _ = head.aggregate_into(tokens, matches, &mut scratch, &mut input.buffer(2, (n + 1) * dim));
            let _ = head.class_into(tokens, &mut scratch, &mut input.buffer(2, (n + 1) * dim));
        }
        let mut gradients = parameters.clone();
        let _ = block.gradient_into(
            tokens,
            &vector,
            &vector,
            &mut input.buffer(1, block.gradient_scratch_len(n)),
            gradients.as_mut().map(Vec::as_mut_slice),
            &mut input.buffer(2, n * dim),
            &mut input.buffer(2, dim),
        );
    }

    let temperatures = Temperatures { student: input.temperatures.0, teacher: input.temperatures.1 };
    let mut center = input.buffer(3, dim);
    let mut scratch = input.buffer(1, 2 * dim);
    let mut gradient = input.buffer(2, n * dim);
    let _ = class_loss(&[&features], &[&features, &features], &center, temperatures, &mut scratch);
    let (crops, mut gradients): ([&[f32]; 1], [&mut [f32]; 1]) = ([&features], [&mut gradient]);
    let _ =
        patch_loss_with_gradient(&crops, &crops, &center, temperatures, 1.0, &mut gradients, &mut scratch);
    let _ = softmax::softmax_into(&features, input.temperatures.0, &mut input.buffer(2, n * dim));
    let mut sum = vec![0.0; center.len()];
    if let Ok(rows) = center::add_rows(&mut sum, &features) {
        let _ = center::update_mut(&mut center, &sum, rows, input.momentum);
    }
});
