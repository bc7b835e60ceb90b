//! Where a patch looks: the strongest patches of its row of the last block's self-attention (Figure 1 of the paper).
//!
//! The rule (SEMANTICS §9): softmax attention of the last block, row of the query patch, columns of class token and
//! registers dropped, mean over the heads, the `round(0.1 · N)` largest of N.

use candle_core::{D, DType, Device};

use super::canvas::Canvas;
use super::colors::{QUERIES, Rgb, luma};
use super::query::{Place, Query};
use super::sheet::{Panel, Row, Sheet};
use super::view::{Layout, Photo, View, cell};
use super::{Model, PictureError, common_patch};
use crate::model::encoder::Attention;

/// Share of the patches that are kept.
pub const SHARE: f64 = 0.1;

/// Outline of the kept patches.
const OUTLINE: Rgb = [255, 214, 10];
/// How bright the other patches stay.
const DIMMED: f32 = 0.42;

/// What to draw.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// Patches asked about, a row each.
    pub queries: &'a [Query],
    /// Share of the patches that are kept, in `(0, 1]`.
    pub share: f64,
    /// Also every head by itself.
    pub per_head: bool,
    /// Sizes.
    pub layout: Layout,
}

/// The `round(share · N)` patches (at least one) with the largest attention, largest first; equal ones in their order.
pub fn top_patches(attention: &[f32], share: f64) -> Vec<usize> {
    let count = ((share * attention.len() as f64).round() as usize).clamp(1, attention.len().max(1));
    let mut patches: Vec<usize> = (0..attention.len()).collect();
    patches.sort_by(|a, b| attention[*b].total_cmp(&attention[*a]));
    patches.truncate(count);
    patches
}

/// Rows are images and queries; columns the image and then each of the weights. With `per_head` each of the weights has a
/// row of its own, and columns are the mean and the heads.
///
/// # Errors
/// [`PictureError`].
pub fn figure(models: &[Model], photos: &[Photo], request: &Request<'_>) -> Result<Sheet, PictureError> {
    let patch = common_patch(models);
    let mut rows = Vec::new();
    let mut heads = 0;
    for photo in photos {
        let view = View::new(photo, request.layout, patch, models)?;
        let attention = models.iter().map(|model| attention(model, &view)).collect::<Result<Vec<_>, _>>()?;
        let Some(first) = attention.first().map(|attention| attention.grid) else { break };
        for (index, query) in request.queries.iter().enumerate() {
            let place = query.place(&view, first)?;
            let color = QUERIES[index % QUERIES.len()];
            let image = Panel { picture: asked(&view, first, place, color), caption: String::new() };
            let asked_for = place.patch(first);
            let place_name = format!("patch ({}, {})", asked_for / first.1, asked_for % first.1);
            let mut panels = vec![image.clone()];
            for (model, attention) in models.iter().zip(&attention) {
                let row = row_of(attention, place.patch(attention.grid))?;
                let mean = mean_over_heads(&row);
                if mean.iter().any(|weight| !weight.is_finite()) {
                    let (label, name) = (model.label.clone(), view.name().to_owned());
                    return Err(PictureError::NotFinite { label, what: "attention weights", name });
                }
                let draw =
                    |weights: &[f32]| panel(&view, attention.grid, weights, place, color, request.share);
                panels.push(draw(&mean));
                if request.per_head {
                    heads = heads.max(row.len());
                    panels.extend(row.iter().map(|weights| draw(weights)));
                    let label = format!("{} · {place_name} · {}", view.file_name(), model.label);
                    rows.push(Row { label, panels: std::mem::replace(&mut panels, vec![image.clone()]) });
                }
            }
            if !request.per_head {
                rows.push(Row { label: format!("{} · {place_name}", view.file_name()), panels });
            }
        }
    }
    let columns = match request.per_head {
        true => ["image".into(), "mean of the heads".into()]
            .into_iter()
            .chain((1..=heads).map(|h| format!("head {h}")))
            .collect(),
        false => [String::from("image")]
            .into_iter()
            .chain(models.iter().map(|model| model.label.clone()))
            .collect(),
    };
    Ok(Sheet {
        title: "Where a patch looks".into(),
        columns,
        rows,
        scale: None,
        note: format!(
            "The {:.0} % of the patches that the framed patch attends to most (last block{}). Below: how many, and their \
             share of its attention to patches.",
            100.0 * request.share,
            if request.per_head { "" } else { ", mean over the heads" },
        ),
    })
}

/// Attention of the last block on the host.
fn attention(model: &Model, view: &View<'_>) -> Result<Attention, PictureError> {
    let attention = model.last_attention(&view.tensor(model)?)?;
    let weights = attention.weights.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
    Ok(Attention { weights, ..attention })
}

/// The row of a patch in every head, patches only, `[heads][N]`.
fn row_of(attention: &Attention, patch: usize) -> candle_core::Result<Vec<Vec<f32>>> {
    let Attention { weights, prefix, grid } = attention;
    let row = weights.get(0)?.narrow(D::Minus2, prefix + patch, 1)?.squeeze(1)?; // [heads, T]
    row.narrow(D::Minus1, *prefix, grid.0 * grid.1)?.contiguous()?.to_vec2::<f32>()
}

pub(super) fn mean_over_heads(rows: &[Vec<f32>]) -> Vec<f32> {
    let mean = |patch: usize| rows.iter().map(|row| row[patch]).sum::<f32>() / rows.len() as f32;
    (0..rows.first().map_or(0, Vec::len)).map(mean).collect()
}

/// The image with the patch that is asked about.
pub(super) fn asked(view: &View<'_>, grid: (usize, usize), place: Place, color: Rgb) -> Canvas {
    let mut picture = view.drawn();
    picture.marker(cell(grid, place.patch(grid), view.panel()), color);
    picture
}

fn panel(
    view: &View<'_>,
    grid: (usize, usize),
    attention: &[f32],
    place: Place,
    color: Rgb,
    share: f64,
) -> Panel {
    let chosen = top_patches(attention, share);
    let mut picture = view.drawn();
    highlight(&mut picture, grid, &chosen);
    picture.marker(cell(grid, place.patch(grid), view.panel()), color);
    let all: f32 = attention.iter().sum();
    let held: f32 = chosen.iter().map(|patch| attention[*patch]).sum();
    let caption = format!(
        "{} of {} patches, {:.0} % of the attention",
        chosen.len(),
        attention.len(),
        100.0 * held / all.max(f32::MIN_POSITIVE)
    );
    Panel { picture, caption }
}

/// Leaves the chosen patches as they are, outlines them, and dims everything else to gray.
fn highlight(picture: &mut Canvas, grid: (usize, usize), chosen: &[usize]) {
    let (rows, columns) = grid;
    let size = (picture.height(), picture.width());
    let mut kept = vec![false; rows * columns];
    chosen.iter().for_each(|patch| kept[*patch] = true);
    let neighbor = |row: usize, column: usize, down: isize, across: isize| {
        let row = row.checked_add_signed(down).filter(|row| *row < rows);
        let column = column.checked_add_signed(across).filter(|column| *column < columns);
        row.zip(column).is_some_and(|(row, column)| kept[row * columns + column])
    };
    for patch in 0..rows * columns {
        let area = cell(grid, patch, size);
        if !kept[patch] {
            picture.map(area, |_, _, old| {
                let gray = f32::from(luma(old));
                old.map(|byte| (DIMMED * (0.75 * gray + 0.25 * f32::from(byte))).round() as u8)
            });
            continue;
        }
        let (row, column) = (patch / columns, patch % columns);
        let open =
            [(-1, 0), (1, 0), (0, -1), (0, 1)].map(|(down, across)| !neighbor(row, column, down, across));
        picture.map(area, |x, y, old| {
            let near = [y < area.top + 2, y + 2 >= area.bottom, x < area.left + 2, x + 2 >= area.right];
            if near.iter().zip(open).any(|(near, open)| *near && open) { OUTLINE } else { old }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::picture::view::ViewSize;
    use crate::picture::view::tests::photo;
    use candle_core::Tensor;

    #[test]
    fn the_tenth_is_rounded_and_ties_keep_the_lower_patch() {
        let weights: Vec<f32> = (0..196).map(|patch| (patch % 7) as f32).collect();
        let chosen = top_patches(&weights, SHARE);
        assert_eq!(chosen, (0..20).map(|i| 7 * i + 6).collect::<Vec<_>>());
        assert_eq!(top_patches(&[0.5; 36], SHARE), [0, 1, 2, 3]);
        assert_eq!(top_patches(&[0.1, 0.9, 0.3], SHARE), [1]);
        assert_eq!(top_patches(&[0.1, 0.9, 0.3], 1.0), [1, 2, 0]);
    }

    #[test]
    fn rows_drop_class_token_and_registers_and_heads_are_averaged() {
        // two heads, two prefix tokens, a grid of 1 x 3: weight = 100 head + 10 query + key
        let at = |head: usize, query: usize, key: usize| (100 * head + 10 * query + key) as f32;
        let all: Vec<f32> = (0..2 * 25).map(|i| at(i / 25, i / 5 % 5, i % 5)).collect();
        let weights = Tensor::from_vec(all, (1, 2, 5, 5), &Device::Cpu).unwrap();
        let attention = Attention { weights, prefix: 2, grid: (1, 3) };
        let row = row_of(&attention, 1).unwrap();
        assert_eq!(row, [[32.0, 33.0, 34.0], [132.0, 133.0, 134.0]]);
        assert_eq!(mean_over_heads(&row), [82.0, 83.0, 84.0]);
    }

    #[test]
    fn chosen_patches_keep_their_pixels_and_the_query_is_marked() {
        let photo = photo(96, 96);
        let view = View::new(&photo, ViewSize::Short(96).into(), 16, &[]).unwrap();
        let (grid, panel_size) = ((6, 6), view.panel());
        let mut weights = vec![0.0; 36];
        (weights[7], weights[8], weights[20], weights[35]) = (0.4, 0.3, 0.2, 0.1);
        let place = Query::Patch { row: 5, column: 0 }.place(&view, grid).unwrap();
        let panel = panel(&view, grid, &weights, place, QUERIES[0], SHARE);
        assert_eq!(panel.caption, "4 of 36 patches, 100 % of the attention");
        let (plain, picture) = (view.drawn(), panel.picture);
        let middle = |patch| {
            let area = cell(grid, patch, panel_size);
            ((area.left + area.right) / 2, (area.top + area.bottom) / 2)
        };
        for patch in 0..36 {
            let (x, y) = middle(patch);
            assert_eq!(
                picture.get(x, y) == plain.get(x, y),
                [7, 8, 20, 35].contains(&patch),
                "patch {patch}"
            );
        }
        let (seven, eight) = (cell(grid, 7, panel_size), cell(grid, 8, panel_size));
        assert_eq!(picture.get(seven.left, middle(7).1), OUTLINE);
        assert_ne!(picture.get(seven.right - 1, middle(7).1), OUTLINE, "no line between chosen neighbors");
        assert_eq!(picture.get(eight.right - 1, middle(8).1), OUTLINE);
        let asked_for = cell(grid, 30, panel_size);
        assert_eq!(picture.get(asked_for.left, asked_for.top), QUERIES[0]);
        assert_eq!(picture.get(asked_for.right - 1, asked_for.bottom - 1), QUERIES[0]);
        assert_eq!(picture.get(asked_for.right, asked_for.top + 5), [255; 3]);
    }
}
