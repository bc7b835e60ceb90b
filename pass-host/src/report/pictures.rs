//! Pictures of a run: crops as the network sees them, and maps of its first, middle and last checkpoint.

use std::path::{Path, PathBuf};

use super::page::Html;
use super::{ReportSettings, checkpoints};
use crate::checkpoint::Checkpoint;
use crate::config::{DataConfig, TrainConfig};
use crate::data::augment::{Augmenter, GLOBAL_CROPS, Planes, plans};
use crate::data::index::ImageIndex;
use crate::model::encoder::EncoderOptions;
use crate::picture::canvas::Canvas;
use crate::picture::field::Enlarge;
use crate::picture::pca::Foreground;
use crate::picture::query::{DEFAULT, Query};
use crate::picture::sheet::Sheet;
use crate::picture::view::{Layout, Photo, ViewSize};
use crate::picture::{self, Model, PictureError, pca, top_patches};

/// Images of the page.
const IMAGES: usize = 3;
/// Images that are tried for each of them.
const TRIES: usize = 5;
/// Side of the view of the maps, in crops of the training: larger than trained, so that there is something to see.
const VIEW_IN_CROPS: usize = 2;
/// The view is never larger than this.
const LARGEST_VIEW: usize = 224;
/// Shorter side of a panel, pixels: a page of many stays small.
const PANEL: usize = 240;

/// The pictures, and why some are missing.
#[derive(Debug, Default)]
pub struct Pictures {
    /// Crops.
    pub crops: Html,
    /// Maps.
    pub maps: Html,
    /// What could not be drawn.
    pub missing: Vec<String>,
}

/// Draws all that can be drawn.
pub fn of_run(settings: &ReportSettings, config: Option<&TrainConfig>) -> Pictures {
    let mut pictures = Pictures::default();
    let Some(config) = config else {
        pictures.missing.push("pictures need the configuration of the run".into());
        return pictures;
    };
    let photos = match photos(settings, config) {
        Ok(photos) => photos,
        Err(reason) => {
            pictures.missing.push(format!("crops and pictures need images: {reason}"));
            return pictures;
        }
    };
    match crops(&photos, config) {
        Ok(html) => pictures.crops = html,
        Err(error) => pictures.missing.push(format!("crops cannot be drawn: {error}")),
    }
    match maps(settings, config, &photos) {
        Ok((html, left_out)) => {
            pictures.maps = html;
            pictures.missing.extend(left_out);
        }
        Err(reason) => pictures.missing.push(format!("there are no pictures of the features: {reason}")),
    }
    pictures
}

/// A few images, spread evenly over the list; those that cannot be decoded are passed over.
fn photos(settings: &ReportSettings, config: &TrainConfig) -> Result<Vec<Photo>, String> {
    let given = !settings.images.is_empty();
    let data = match given {
        true => DataConfig { images: settings.images.clone(), ..DataConfig::default() },
        false => config.data.clone(),
    };
    // the list that the run keeps: a large folder is not walked again
    let cache = settings.run.join("index.bin");
    let cache = (!given && cache.exists()).then_some(cache);
    let index = ImageIndex::build(&data, cache.as_deref()).map_err(|error| error.to_string())?;
    let wanted = IMAGES.min(index.len());
    let mut photos = Vec::new();
    let mut reason = String::new();
    for part in 0..wanted {
        let first = (2 * part + 1) * index.len() / (2 * wanted);
        for image in first..(first + TRIES).min(index.len()) {
            match picture::read_photo(&index, image, data.max_megapixels) {
                Ok(photo) => {
                    photos.push(photo);
                    break;
                }
                Err(error) => reason = error.to_string(),
            }
        }
    }
    if photos.is_empty() { Err(reason) } else { Ok(photos) }
}

/// For each image its crops of the first epoch, before normalization.
fn crops(photos: &[Photo], config: &TrainConfig) -> Result<Html, image::ImageError> {
    let mut html = Html::default();
    let (mut augmenter, mut planes) = (Augmenter::default(), Planes::default());
    for (index, photo) in photos.iter().enumerate() {
        let image = &photo.image;
        html.open("figure", &[("class", "crops")]).open("div", &[("class", "strip")]);
        let drawn = plans(&config.augment, config.seed, 0, index as u64, image.width, image.height);
        for (crop, plan) in drawn.iter().enumerate() {
            augmenter.apply_into(image, 1, plan, &mut planes);
            let kind = if crop < GLOBAL_CROPS { "global" } else { "local" };
            html.image(&Canvas::from_planes(&planes), &format!("{kind} crop {}", crop + 1))?;
        }
        html.close("div").open("figcaption", &[]).text(&photo.name).close("figcaption").close("figure");
    }
    Ok(html)
}

/// The first and the last of the kept checkpoints, and the one nearest to the middle between them.
fn chosen_checkpoints(run: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(checkpoints(run)).map(|entries| entries.flatten().collect::<Vec<_>>());
    let step = |path: &Path| path.file_name()?.to_str()?.strip_prefix("step-")?.parse::<u64>().ok();
    let mut found: Vec<(u64, PathBuf)> = entries
        .unwrap_or_default()
        .into_iter()
        .filter_map(|entry| Some((step(&entry.path())?, entry.path())))
        .collect();
    found.sort();
    let (Some(first), Some(last)) = (found.first(), found.last()) else { return Vec::new() };
    let middle = (first.0 + last.0) / 2;
    let nearest = found.iter().min_by_key(|(step, _)| step.abs_diff(middle)).unwrap_or(first);
    let mut chosen = vec![first, nearest, last];
    chosen.dedup();
    chosen.into_iter().map(|(_, path)| path.clone()).collect()
}

fn maps(
    settings: &ReportSettings,
    config: &TrainConfig,
    photos: &[Photo],
) -> Result<(Html, Vec<String>), String> {
    let (mut models, mut left_out) = (Vec::new(), Vec::new());
    for path in chosen_checkpoints(&settings.run) {
        // a training run may remove a checkpoint while it is read
        let opened = Checkpoint::open(&path).map_err(|error| error.to_string()).and_then(|checkpoint| {
            let label = format!("step {}", checkpoint.step());
            let path = path.to_string_lossy();
            Model::open(&path, Some(&label), &EncoderOptions::default(), &settings.device)
                .map_err(|error| error.to_string())
        });
        match opened {
            Ok(model) => models.push(model),
            Err(error) => left_out.push(format!("checkpoint `{}` is not shown: {error}", path.display())),
        }
    }
    if models.is_empty() {
        let reason = left_out.pop().unwrap_or_else(|| "the run has no checkpoint yet".into());
        return Err(reason);
    }
    let side = (VIEW_IN_CROPS * config.augment.global_size).min(LARGEST_VIEW.max(config.augment.global_size));
    let layout = Layout { size: ViewSize::Short(side), panel: PANEL };
    let queries: &[Query] = &DEFAULT[..1];
    let all = || -> Result<[Sheet; 2], PictureError> {
        let components = pca::Request { foreground: Foreground::All, layout, enlarge: Enlarge::Smooth };
        let looks = top_patches::Request { queries, share: top_patches::SHARE, per_head: false, layout };
        Ok([pca::figure(&models, photos, &components)?, top_patches::figure(&models, photos, &looks)?])
    };
    let sheets = all().map_err(|error| error.to_string())?;
    let mut html = Html::default();
    for sheet in &sheets {
        html.append(&laid_out(sheet).map_err(|error| error.to_string())?);
    }
    Ok((html, left_out))
}

/// A page of panels as a table.
fn laid_out(sheet: &Sheet) -> Result<Html, image::ImageError> {
    let mut html = Html::default();
    html.open("h3", &[]).text(&sheet.title).close("h3");
    html.open("p", &[("class", "about")]).text(&sheet.note).close("p");
    html.open("div", &[("class", "scroll")]).open("table", &[("class", "sheet")]).open("thead", &[]);
    html.open("tr", &[]);
    for column in &sheet.columns {
        html.open("th", &[]).text(column).close("th");
    }
    html.close("tr").close("thead").open("tbody", &[]);
    for row in &sheet.rows {
        html.open("tr", &[]);
        for (index, panel) in row.panels.iter().enumerate() {
            let column = sheet.columns.get(index).map_or("", String::as_str);
            html.open("td", &[]).image(&panel.picture, &format!("{}: {column}", row.label))?;
            let caption = if index == 0 { &row.label } else { &panel.caption };
            html.open("small", &[]).text(caption).close("small").close("td");
        }
        html.close("tr");
    }
    html.close("tbody").close("table").close("div");
    Ok(html)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_middle_and_last_checkpoint_are_shown() {
        let chosen = |steps: &[u64]| {
            let dir = tempfile::tempdir().unwrap();
            for step in steps {
                std::fs::create_dir_all(checkpoints(dir.path()).join(format!("step-{step:08}"))).unwrap();
            }
            std::fs::create_dir_all(checkpoints(dir.path()).join("step-x")).unwrap();
            let name = |path: PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
            chosen_checkpoints(dir.path()).into_iter().map(name).collect::<Vec<_>>()
        };
        assert_eq!(chosen(&[]), [""; 0]);
        assert_eq!(chosen(&[7]), ["step-00000007"]);
        assert_eq!(chosen(&[7, 9]), ["step-00000007", "step-00000009"]);
        let many = chosen(&[500, 1000, 1300, 1400, 1500]);
        assert_eq!(many, ["step-00000500", "step-00001000", "step-00001500"]);
    }
}
