//! timm's `VisionTransformer`, and what else has its names.
//!
//! The norm of own weights is that of the aggregation head, which patch tokens pass in training too; `pass-host features` reads
//! them before it, as the published evaluations do. The class-attention blocks have no place here and stay out.

use candle_core::Tensor;

use super::ExportError;
use super::source::Source;

/// Tensors by timm's names, as `VisionTransformer` loads them strictly.
pub(super) fn tensors(source: &Source) -> Result<Vec<(String, Tensor)>, ExportError> {
    let mut tensors = backbone(source)?;
    for part in ["weight", "bias"] {
        if let Some(norm) = final_norm(source) {
            tensors.push((format!("norm.{part}"), source.tensor(&format!("{norm}.{part}"))?.clone()));
        }
    }
    Ok(tensors)
}

/// The name of the norm behind the last block, where there is one.
pub(super) fn final_norm(source: &Source) -> Option<&'static str> {
    match source.has_final_norm() {
        true => Some("backbone.norm"),
        false => source.has_aggregation().then_some("ca_head.norm"),
    }
}

/// The tensors before the final norm.
pub(super) fn backbone(source: &Source) -> Result<Vec<(String, Tensor)>, ExportError> {
    let mut tensors = Vec::new();
    for (name, tensor) in &source.tensors {
        let Some(name) = name.strip_prefix("backbone.") else { continue };
        if name.starts_with("blocks.") || name.starts_with("patch_embed.") {
            tensors.push((name.to_owned(), tensor.clone()));
        }
    }
    let mut positions = source.tensor("backbone.pos_embed")?.clone();
    if source.parts.class_token {
        let prefix = source.tensor("backbone.prefix_tokens")?;
        let class = prefix.narrow(1, 0, 1)?;
        // the token has its position; timm's models with registers have none for it, the others one that is zero here
        if source.parts.registers == 0 {
            positions = Tensor::cat(&[&class.zeros_like()?, &positions], 1)?;
        }
        tensors.push(("cls_token".into(), class));
        if source.parts.registers > 0 {
            tensors.push(("reg_token".into(), prefix.narrow(1, 1, source.parts.registers)?));
        }
    }
    tensors.push(("pos_embed".into(), positions));
    Ok(tensors)
}

/// The call that makes the network.
pub(super) fn constructor(source: &Source) -> String {
    let sizes = &source.architecture;
    let side = sizes.grid * sizes.patch_size;
    let mut call = format!(
        "VisionTransformer(img_size={side}, patch_size={}, embed_dim={}, depth={}, num_heads={}",
        sizes.patch_size, sizes.dim, sizes.depth, sizes.heads
    );
    if source.hidden != 4 * sizes.dim {
        call += &format!(", mlp_ratio={}", source.hidden as f64 / sizes.dim as f64);
    }
    if !source.parts.class_token {
        call += ", class_token=False, global_pool=''";
    }
    if source.parts.registers > 0 {
        call += &format!(", reg_tokens={}, no_embed_class=True", source.parts.registers);
    }
    if final_norm(source).is_none() {
        call += ", final_norm=False";
    }
    call + ", num_classes=0)"
}
