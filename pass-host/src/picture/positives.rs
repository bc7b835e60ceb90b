//! The positives of a patch and what each adds to the patch's target: of its neighbors the k most similar (PASS §3.2),
//! with the weights the aggregation head gives them.

use candle_core::{DType, Device, Tensor};

use super::canvas::{Canvas, Rect};
use super::colors::{NIGHT, PAPER, QUERIES, Rgb, heat, luma};
use super::label::{Align, Style, Weight};
use super::query::Query;
use super::sheet::{Panel, Row, Scale, Sheet};
use super::top_patches::asked;
use super::view::{Layout, Photo, View};
use super::{Model, PictureError, common_patch};
use crate::config::{Border, PatchObjective, Window};
use crate::model::CLASS_ATTENTION_BLOCKS as BLOCKS;
use crate::model::aggregation::AggregationHead;
use crate::objective::matching::{self, Matching};

/// Side of the neighborhood panel, pixels.
const SIDE: usize = 324;
/// Gap between its tiles.
const GAP: usize = 4;
/// Width of the frame that tells the weight.
const FRAME: usize = 7;

/// What to draw.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// Patches asked about, a row each.
    pub queries: &'a [Query],
    /// Side of the neighborhood in patches, odd.
    pub window: usize,
    /// Beyond the edge.
    pub border: Border,
    /// Positives.
    pub k: usize,
    /// Sizes.
    pub layout: Layout,
}

/// One patch around the query.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Neighbor {
    patch: usize,
    /// Cosine similarity to the query.
    similarity: f32,
    /// Weight in the aggregate in each block, if it is a positive.
    weights: Option<[f32; BLOCKS]>,
}

/// Everything around one query.
struct Neighborhood {
    query: usize,
    /// `[window, window]`, row by row; the query in the middle and what lies beyond a clipped edge are empty.
    tiles: Vec<Option<Neighbor>>,
    /// Weight of the token itself in each block.
    own: [f32; BLOCKS],
}

/// Rows are images and queries; columns the image and then, for each of the weights, the neighborhood with the weights of
/// every block.
///
/// # Errors
/// [`PictureError`]; [`PictureError::NoAggregation`] for weights without an aggregation head.
pub fn figure(models: &[Model], photos: &[Photo], request: &Request<'_>) -> Result<Sheet, PictureError> {
    // asked before any image is looked at
    models.iter().try_for_each(|model| head_of(model).map(|_| ()))?;
    let patch = common_patch(models);
    let mut rows = Vec::new();
    for photo in photos {
        let view = View::new(photo, request.layout, patch, models)?;
        let features = models
            .iter()
            .map(|model| model.encoder.patch_features(&view.tensor(model)?))
            .collect::<Result<Vec<_>, _>>()?;
        let Some(first) = features.first().map(|found| found.grid) else { break };
        for (index, query) in request.queries.iter().enumerate() {
            let place = query.place(&view, first)?;
            let color = QUERIES[index % QUERIES.len()];
            let mut panels =
                vec![Panel { picture: asked(&view, first, place, color), caption: String::new() }];
            for (model, found) in models.iter().zip(&features) {
                let around = neighborhood(
                    model,
                    &view,
                    &found.features,
                    found.grid,
                    place.patch(found.grid),
                    request,
                )?;
                for block in 0..BLOCKS {
                    let picture = drawn(&view, found.grid, &around, block, request.window, color);
                    let caption = format!("the token itself {:.0} %", 100.0 * around.own[block]);
                    panels.push(Panel { picture, caption });
                }
            }
            let at = place.patch(first);
            let label = format!("{} · patch ({}, {})", view.file_name(), at / first.1, at % first.1);
            rows.push(Row { label, panels });
        }
    }
    let names =
        models.iter().flat_map(|model| (1..=BLOCKS).map(|block| format!("{} · block {block}", model.label)));
    Ok(Sheet {
        title: "The positives of a patch".into(),
        columns: [String::from("image")].into_iter().chain(names).collect(),
        rows,
        scale: Some(Scale {
            caption: "weight in the aggregate (frame)".into(),
            low: "0".into(),
            high: "half or more".into(),
        }),
        note: format!(
            "The framed patch in the middle, its neighbors around it{}. The {} most similar are its positives, shown in color with \
             their weight in the aggregation head (mean over the heads); gray: the others. cos: similarity to the framed patch.",
            match request.border {
                Border::Wrap => " (beyond an edge: the opposite one)",
                Border::Clip => "",
            },
            request.k,
        ),
    })
}

fn head_of(model: &Model) -> Result<&AggregationHead, PictureError> {
    let wanted = "positives are weighed by the head that PASS trains";
    let none = || PictureError::NoAggregation { label: model.label.clone(), wanted };
    model.encoder.aggregation().ok_or_else(none)
}

fn neighborhood(
    model: &Model,
    view: &View<'_>,
    features: &Tensor,
    grid: (usize, usize),
    query: usize,
    request: &Request<'_>,
) -> Result<Neighborhood, PictureError> {
    let objective = PatchObjective {
        window: Window::Side(request.window),
        border: request.border,
        k: request.k,
        ..PatchObjective::default()
    };
    let matching = Matching::from_config(&objective);
    let positives = matching::positives(features, grid, &matching)?;
    let candidates = &matching::neighborhoods(grid, &matching)?[query];
    let (columns, similarities) = matching::similarities(features, grid, &matching)?;
    let similarities = &similarities[query * columns..(query + 1) * columns];
    let chosen = positives.of(0, query);
    let head = head_of(model)?;
    let index = Tensor::new(chosen, features.device())?;
    let mut weights = [const { Vec::new() }; BLOCKS];
    for (kept, block) in weights.iter_mut().zip(head.attention_weights(&features.index_select(&index, 1)?)?) {
        let mean = block.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.mean(1)?; // [1, 1, 1 + k]
        *kept = mean.flatten_all()?.to_vec1::<f32>()?;
    }
    if weights.iter().flatten().chain(similarities.iter().take(candidates.len())).any(|x| !x.is_finite()) {
        let name = view.name().to_owned();
        return Err(PictureError::NotFinite {
            label: model.label.clone(),
            what: "similarities or weights",
            name,
        });
    }
    let neighbor = |patch: u32| {
        let place = candidates.iter().position(|candidate| *candidate == patch)?;
        let rank = chosen.iter().position(|positive| *positive == patch);
        let weights = rank.map(|rank| std::array::from_fn(|block| weights[block][1 + rank]));
        Some(Neighbor { patch: patch as usize, similarity: similarities[place], weights })
    };
    let tiles = offsets(query, grid, request.window, request.border);
    Ok(Neighborhood {
        query,
        tiles: tiles.into_iter().map(|patch| patch.and_then(neighbor)).collect(),
        own: std::array::from_fn(|block| weights[block].first().copied().unwrap_or(0.0)),
    })
}

/// The patch at every place of the window around `query`, `[window, window]`.
fn offsets(query: usize, (rows, columns): (usize, usize), window: usize, border: Border) -> Vec<Option<u32>> {
    let (row, column) = ((query / columns) as isize, (query % columns) as isize);
    let half = (window / 2) as isize;
    let place = |index: isize, of: usize| match border {
        Border::Wrap => Some(index.rem_euclid(of as isize)),
        Border::Clip => (0..of as isize).contains(&index).then_some(index),
    };
    let at = |down: isize, across: isize| {
        let (row, column) = place(row + down, rows).zip(place(column + across, columns))?;
        Some((row * columns as isize + column) as u32)
    };
    (-half..=half).flat_map(|down| (-half..=half).map(move |across| at(down, across))).collect()
}

fn drawn(
    view: &View<'_>,
    grid: (usize, usize),
    around: &Neighborhood,
    block: usize,
    window: usize,
    color: Rgb,
) -> Canvas {
    let tile = (SIDE - (window - 1) * GAP) / window;
    let side = tile * window + (window - 1) * GAP;
    let mut canvas = Canvas::new(side, side, PAPER);
    for (index, neighbor) in around.tiles.iter().enumerate() {
        let place = Rect::at(index % window * (tile + GAP), index / window * (tile + GAP), tile, tile);
        if index == window * window / 2 {
            canvas.paste(&view.drawn_patch(grid, around.query, tile), place.left, place.top);
            canvas.frame(place, FRAME, color);
            continue;
        }
        let Some(neighbor) = neighbor else {
            canvas.fill(place, [236, 238, 242]);
            continue;
        };
        canvas.paste(&view.drawn_patch(grid, neighbor.patch, tile), place.left, place.top);
        let similarity = format!("cos {:.2}", neighbor.similarity);
        match neighbor.weights {
            Some(weights) => {
                canvas.frame(place, FRAME, heat(2.0 * weights[block]));
                inscribe(&mut canvas, place, &format!("{:.0} %", 100.0 * weights[block]), &similarity);
            }
            None => {
                canvas.map(place, |_, _, old| [150 + luma(old) / 4; 3]);
                inscribe(&mut canvas, place, "", &similarity);
            }
        }
    }
    canvas
}

/// A large and a small line at the lower edge of a tile, on a dark ground; small tiles have room for one.
fn inscribe(canvas: &mut Canvas, tile: Rect, large: &str, small: &str) {
    let style = |share: f32, weight| Style {
        size: (tile.width() as f32 * share).clamp(9.0, 26.0),
        weight,
        color: PAPER,
    };
    let (first, second) = (style(0.2, Weight::Medium), style(0.14, Weight::Regular));
    let inner = tile.shrunk(FRAME);
    let lines = if large.is_empty() { second.line() } else { first.line() + second.line() };
    let top = inner.bottom.saturating_sub(lines + 2).max(inner.top);
    canvas.map(Rect { top, ..inner }, |_, _, old| {
        old.map(|byte| (f32::from(byte) * 0.35) as u8 + NIGHT[0] / 4)
    });
    let middle = (tile.left + tile.right) / 2;
    let mut y = top;
    if !large.is_empty() {
        canvas.write(large, middle, y, Align::Center, first);
        y += first.line();
    }
    canvas.write(small, middle, y, Align::Center, second);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::picture::view::ViewSize;

    #[test]
    fn windows_wrap_or_end_at_the_edge() {
        let wrapped = offsets(0, (3, 4), 3, Border::Wrap);
        assert_eq!(wrapped.into_iter().flatten().collect::<Vec<_>>(), [11, 8, 9, 3, 0, 1, 7, 4, 5]);
        let clipped = offsets(0, (3, 4), 3, Border::Clip);
        assert_eq!(clipped, [None, None, None, None, Some(0), Some(1), None, Some(4), Some(5)]);
        assert_eq!(offsets(6, (3, 4), 5, Border::Clip).len(), 25);
    }

    #[test]
    fn positives_are_framed_and_the_others_gray() {
        let photo = crate::picture::view::tests::photo(96, 96);
        let view = View::new(&photo, ViewSize::Short(96).into(), 16, &[]).unwrap();
        let neighbor = |patch, weights| Some(Neighbor { patch, similarity: 0.5, weights });
        let tiles = vec![
            neighbor(0, Some([0.5, 0.1])),
            neighbor(1, None),
            None,
            neighbor(6, None),
            None,
            neighbor(8, None),
            neighbor(12, None),
            neighbor(13, None),
            neighbor(14, None),
        ];
        let around = Neighborhood { query: 7, tiles, own: [0.5, 0.9] };
        let picture = drawn(&view, (6, 6), &around, 0, 3, QUERIES[1]);
        let tile = (SIDE - 2 * GAP) / 3;
        assert_eq!(picture.get(1, 1), heat(1.0));
        assert_eq!(picture.get(tile + GAP + 1, tile + GAP + 1), QUERIES[1]);
        let [red, green, blue] = picture.get(tile + GAP + tile / 2, 3);
        assert!(red == green && green == blue, "another neighbor is gray");
        assert_eq!(picture.get(2 * (tile + GAP) + 5, 5), [236, 238, 242], "beyond the edge");
        assert_eq!(drawn(&view, (6, 6), &around, 1, 3, QUERIES[1]).get(1, 1), heat(0.2));
    }
}
