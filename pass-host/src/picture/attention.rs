//! Where the class token looks: its attention to the patches, in the aggregation head's blocks or, for backbones that
//! carry a class token, in the last block.

use candle_core::{D, DType, Device, Tensor};

use super::canvas::{Canvas, mixed};
use super::colors::{heat, luma};
use super::field::{Enlarge, enlarge};
use super::sheet::{Panel, Row, Scale, Sheet};
use super::top_patches::mean_over_heads;
use super::view::{Layout, Photo, View};
use super::{Model, PictureError, common_patch};

/// How much of a panel is color; the rest is the image in gray.
const OPACITY: f32 = 0.72;
/// The light end of the scale: this share of the patches is not above it.
const LIGHT: f64 = 0.99;

/// What to draw.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Also every head by itself.
    pub per_head: bool,
    /// Sizes.
    pub layout: Layout,
    /// How patches become pixels.
    pub enlarge: Enlarge,
}

/// The attention of one token to the patches.
struct Map {
    /// Which token of which block.
    name: String,
    grid: (usize, usize),
    /// `[heads][N]`.
    heads: Vec<Vec<f32>>,
    /// What the token gives to itself (and to registers), mean over the heads.
    own: f32,
}

/// Rows are images, columns the image and then the maps of each of the weights. With `per_head` each map has a row of its
/// own, and columns are the mean and the heads.
///
/// # Errors
/// [`PictureError`]; [`PictureError::NoAggregation`] for backbones without any class token.
pub fn figure(models: &[Model], photos: &[Photo], request: &Request) -> Result<Sheet, PictureError> {
    let patch = common_patch(models);
    let (mut rows, mut columns, mut most_heads) = (Vec::new(), Vec::new(), 0);
    for photo in photos {
        let view = View::new(photo, request.layout, patch, models)?;
        let image = Panel { picture: view.drawn(), caption: String::new() };
        let mut panels = vec![image.clone()];
        columns = vec![String::from("image")];
        for model in models {
            for map in maps(model, &view)? {
                let mean = mean_over_heads(&map.heads);
                if mean.iter().any(|weight| !weight.is_finite()) {
                    let (label, name) = (model.label.clone(), view.name().to_owned());
                    return Err(PictureError::NotFinite { label, what: "attention weights", name });
                }
                let mut own = panel(&view, &mean, map.grid, request.enlarge);
                own.caption += &format!(", {} {:.0} %", own_name(model), 100.0 * map.own);
                panels.push(own);
                if request.per_head {
                    most_heads = most_heads.max(map.heads.len());
                    panels.extend(map.heads.iter().map(|head| panel(&view, head, map.grid, request.enlarge)));
                    let label = format!("{} · {} · {}", view.file_name(), model.label, map.name);
                    rows.push(Row { label, panels: std::mem::replace(&mut panels, vec![image.clone()]) });
                } else {
                    columns.push(format!("{} · {}", model.label, map.name));
                }
            }
        }
        if !request.per_head {
            rows.push(Row { label: view.file_name(), panels });
        }
    }
    if request.per_head {
        columns = ["image".into(), "mean of the heads".into()].into();
        columns.extend((1..=most_heads).map(|head| format!("head {head}")));
    }
    Ok(Sheet {
        title: "Where the class token looks".into(),
        columns,
        rows,
        scale: Some(Scale {
            caption: "attention of the class token".into(),
            low: "0".into(),
            high: "strongest percent of the panel".into(),
        }),
        note: "Softmax attention of the class token to the patches, mean over the heads unless one is named. Below: the strongest \
               patch in multiples of an even spread, and what the token gives to itself."
            .into(),
    })
}

fn own_name(model: &Model) -> &'static str {
    if model.encoder.aggregation().is_some() { "itself" } else { "itself and registers" }
}

fn maps(model: &Model, view: &View<'_>) -> Result<Vec<Map>, PictureError> {
    let images = view.tensor(model)?;
    if let Some(head) = model.encoder.aggregation() {
        let found = model.encoder.patch_features(&images)?;
        let blocks = head.attention_weights(&found.features)?;
        let map = |(block, weights): (usize, &Tensor)| {
            map_of(format!("block {}", block + 1), weights, 0, 1, found.grid)
        };
        return Ok(blocks.iter().enumerate().map(map).collect::<Result<_, _>>()?);
    }
    let attention = model.last_attention(&images)?;
    if attention.prefix == 0 {
        let wanted = "nor has the backbone a class token whose attention could be drawn";
        return Err(PictureError::NoAggregation { label: model.label.clone(), wanted });
    }
    Ok(vec![map_of("last block".into(), &attention.weights, 0, attention.prefix, attention.grid)?])
}

/// The row of token `query` of `weights` `[1, heads, ·, prefix + N]`.
fn map_of(
    name: String,
    weights: &Tensor,
    query: usize,
    prefix: usize,
    grid: (usize, usize),
) -> candle_core::Result<Map> {
    let weights = weights.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
    let row = weights.get(0)?.narrow(D::Minus2, query, 1)?.squeeze(1)?; // [heads, prefix + N]
    let heads = row.narrow(1, prefix, grid.0 * grid.1)?.contiguous()?.to_vec2::<f32>()?;
    let own = row.narrow(1, 0, prefix)?.sum(1)?.mean(0)?.to_scalar::<f32>()?;
    Ok(Map { name, grid, heads, own })
}

fn panel(view: &View<'_>, attention: &[f32], grid: (usize, usize), how: Enlarge) -> Panel {
    let mut picture = view.drawn();
    let mut sorted = attention.to_vec();
    sorted.sort_by(f32::total_cmp);
    let light = sorted[((sorted.len() - 1) as f64 * LIGHT).round() as usize];
    overlay(&mut picture, attention, grid, light, how);
    let even = attention.iter().sum::<f32>() / attention.len() as f32;
    let strongest = sorted[sorted.len() - 1] / even.max(f32::MIN_POSITIVE);
    Panel { picture, caption: format!("strongest {strongest:.1}×") }
}

/// Color from 0 to `light` over the image in gray.
fn overlay(picture: &mut Canvas, values: &[f32], grid: (usize, usize), light: f32, how: Enlarge) {
    let width = picture.width();
    let values = enlarge(values, grid, (picture.height(), width), how);
    let all = picture.bounds();
    picture.map(all, |x, y, old| {
        let color = heat(values[y * width + x] / light.max(f32::MIN_POSITIVE));
        let gray = luma(old);
        color.map(|byte| mixed(gray, byte, OPACITY))
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::picture::view::ViewSize;
    use crate::picture::view::tests::photo;

    #[test]
    fn the_token_itself_is_no_patch() {
        let weights: Vec<f32> = vec![0.5, 0.1, 0.4, 0.3, 0.6, 0.1];
        let weights = Tensor::from_vec(weights, (1, 2, 1, 3), &Device::Cpu).unwrap();
        let map = map_of("block 1".into(), &weights, 0, 1, (1, 2)).unwrap();
        assert_eq!(map.heads, [[0.1, 0.4], [0.6, 0.1]]);
        assert!((map.own - 0.4).abs() < 1e-6);
    }

    #[test]
    fn light_patches_have_the_light_color() {
        let photo = photo(64, 64);
        let view = View::new(&photo, ViewSize::Short(64).into(), 16, &[]).unwrap();
        let mut attention = vec![0.0; 16];
        attention[5] = 0.3;
        attention[6] = 0.3;
        let panel = panel(&view, &attention, (4, 4), Enlarge::Nearest);
        assert_eq!(panel.caption, "strongest 8.0×");
        let (plain, size) = (view.drawn(), view.panel());
        for (patch, color) in [(5, heat(1.0)), (0, heat(0.0)), (15, heat(0.0))] {
            let area = super::super::view::cell((4, 4), patch, size);
            let gray = luma(plain.get(area.left + 3, area.top + 3));
            let expected = color.map(|byte| mixed(gray, byte, OPACITY));
            assert_eq!(panel.picture.get(area.left + 3, area.top + 3), expected, "patch {patch}");
        }
    }

    #[test]
    fn all_zero_attention_is_dark() {
        let photo = photo(64, 64);
        let view = View::new(&photo, ViewSize::Short(64).into(), 16, &[]).unwrap();
        let panel = panel(&view, &[0.0; 16], (4, 4), Enlarge::Smooth);
        assert_eq!(panel.caption, "strongest 0.0×");
    }
}
