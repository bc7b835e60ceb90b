//! Key names of OpenMMLab: mmsegmentation's `VisionTransformer` and the `ViT` of mmdetection's ViTDet.

use candle_core::Tensor;

use super::ExportError;
use super::source::Source;
use super::timm;

/// Tensors of mmsegmentation's `VisionTransformer`.
///
/// It has a class token and its position whether the blocks see them or not: `with_cls_token=False` takes both off before the
/// first block, so backbones without one bring zeros.
pub(super) fn mmsegmentation(source: &Source) -> Result<Vec<(String, Tensor)>, ExportError> {
    if source.parts.registers > 0 {
        return Err(ExportError::Unsupported { format: "mmsegmentation", what: "register tokens" });
    }
    let mut tensors = Vec::new();
    for (name, tensor) in timm::tensors(source)? {
        let name = match name.split('.').collect::<Vec<_>>()[..] {
            ["patch_embed", "proj", part] => format!("patch_embed.projection.{part}"),
            ["blocks", block, layer, part] => {
                format!("layers.{block}.{}.{part}", layer.replace("norm", "ln"))
            }
            ["blocks", block, "attn", "qkv", part] => format!("layers.{block}.attn.attn.in_proj_{part}"),
            ["blocks", block, "attn", "proj", part] => format!("layers.{block}.attn.attn.out_proj.{part}"),
            ["blocks", block, "mlp", "fc1", part] => format!("layers.{block}.ffn.layers.0.0.{part}"),
            ["blocks", block, "mlp", "fc2", part] => format!("layers.{block}.ffn.layers.1.{part}"),
            ["norm", part] => format!("ln1.{part}"),
            _ => name,
        };
        tensors.push((name, tensor));
    }
    if !source.parts.class_token {
        let positions = source.tensor("backbone.pos_embed")?;
        let class = positions.narrow(1, 0, 1)?.zeros_like()?;
        tensors.retain(|(name, _)| name != "pos_embed");
        tensors.push(("pos_embed".into(), Tensor::cat(&[&class, positions], 1)?));
        tensors.push(("cls_token".into(), class));
    }
    Ok(tensors)
}

/// Tensors of the `ViT` of mmdetection's ViTDet: timm's names without class token and final norm, which it does not have.
///
/// A class token that the blocks were trained with is left out, as ViTDet does with weights of others; one has to expect other
/// features before fine-tuning.
pub(super) fn mmdetection(source: &Source) -> Result<Vec<(String, Tensor)>, ExportError> {
    let mut tensors = timm::backbone(source)?;
    tensors.retain(|(name, _)| !["cls_token", "reg_token", "pos_embed"].contains(&name.as_str()));
    tensors.push(("pos_embed".into(), source.tensor("backbone.pos_embed")?.clone()));
    Ok(tensors)
}

/// The backbone in a configuration of mmsegmentation.
pub(super) fn mmsegmentation_config(source: &Source) -> String {
    let sizes = &source.architecture;
    let side = sizes.grid * sizes.patch_size;
    let python = |flag: bool| if flag { "True" } else { "False" };
    format!(
        "dict(type='VisionTransformer', img_size=({side}, {side}), patch_size={}, embed_dims={}, num_layers={}, \
         num_heads={}, mlp_ratio={}, with_cls_token={}, final_norm={}, norm_cfg=dict(type='LN', eps=1e-6), \
         interpolate_mode='bicubic')",
        sizes.patch_size,
        sizes.dim,
        sizes.depth,
        sizes.heads,
        source.hidden as f64 / sizes.dim as f64,
        python(source.parts.class_token),
        python(timm::final_norm(source).is_some()),
    )
}

/// The backbone in a configuration of mmdetection.
pub(super) fn mmdetection_config(source: &Source) -> String {
    let sizes = &source.architecture;
    format!(
        "dict(type='ViT', img_size=1024, pretrain_img_size={}, patch_size={}, embed_dim={}, depth={}, num_heads={}, \
         mlp_ratio={}, qkv_bias=True, use_rel_pos=False, pretrain_use_cls_token=False, \
         norm_cfg=dict(type='LN', eps=1e-6))",
        sizes.grid * sizes.patch_size,
        sizes.patch_size,
        sizes.dim,
        sizes.depth,
        sizes.heads,
        source.hidden as f64 / sizes.dim as f64,
    )
}
