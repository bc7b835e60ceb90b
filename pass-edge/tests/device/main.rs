//! The device from file to features: what is read, what is computed, what is refused.

mod fixture_models;
mod float_twin;
mod float_vit;
mod model_file;
mod no_allocation;
mod random_vit;

use pass_edge::format::Architecture;

/// The smallest architecture with every optional tensor: its file is small enough to change each byte.
const SMALLEST: Architecture = Architecture {
    dim: 16,
    depth: 2,
    heads: 1,
    hidden: 16,
    patch_size: 1,
    grid: (1, 2),
    class_token: true,
    register_tokens: 1,
    final_norm: true,
    layer_scale_folded: true,
    pca_components: 1,
};

/// Several heads and blocks, a grid that is no multiple of a tile, prefix tokens, an odd patch size.
const SMALL: Architecture = Architecture {
    dim: 64,
    depth: 4,
    heads: 2,
    hidden: 256,
    patch_size: 7,
    grid: (5, 7),
    class_token: true,
    register_tokens: 4,
    final_norm: true,
    layer_scale_folded: false,
    pca_components: 3,
};
