//! One feature vector an image, for classifiers: images from disk, decoded on all cores, through a frozen network.

use candle_core::Tensor;
use ndarray::{Array2, Axis};
use rayon::prelude::*;

use super::EvaluateError;
use super::class_folders::Labelled;
use crate::config::DataConfig;
use crate::data::augment::{Augmenter, CropPlan, Planes, normalize_into, random_resized_crop};
use crate::data::decode::{Rgb8Image, decode_rgb};
use crate::features::CENTER_SHARE;
use crate::model::encoder::Encoder;
use crate::random::{Purpose, Stream};

/// Largest side of the default view: that of the published evaluations.
const USUAL_SIZE: usize = 224;
/// Area of a random crop as a share of the image, as linear classifiers are usually trained.
const CROP_SCALE: [f64; 2] = [0.08, 1.0];
/// Aspect ratio of a random crop.
const CROP_RATIO: [f64; 2] = [3.0 / 4.0, 4.0 / 3.0];

/// Which vector stands for an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum ImageToken {
    /// The class token.
    #[default]
    Class,
    /// The mean of the patch tokens.
    Mean,
}

/// What is shown of an image; each view gives one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Views {
    /// The center view.
    Center,
    /// The center view and its mirror image.
    CenterAndMirror,
    /// The center view, then random resized crops, each mirrored with probability 1/2; a pure function of seed, image and
    /// crop.
    Crops {
        /// Crops an image.
        repeats: usize,
        /// Their seed.
        seed: u64,
    },
}

impl Views {
    /// Views of one image.
    pub fn count(self) -> usize {
        match self {
            Self::Center => 1,
            Self::CenterAndMirror => 2,
            Self::Crops { repeats, .. } => 1 + repeats,
        }
    }
}

/// Features of a list of images.
#[derive(Clone, Debug)]
pub struct ImageFeatures {
    /// `[R, D]`, as the network gives them; all views of an image follow each other.
    pub rows: Array2<f32>,
    /// Class of each row.
    pub labels: Vec<usize>,
    /// Rows of one image, its center view first.
    pub views: usize,
    /// Images left out, with the reason.
    pub bad: Vec<(String, String)>,
}

/// The side of the view to use: as asked, else that of training, at most 224 pixels.
///
/// # Errors
/// [`EvaluateError::Size`] if patches do not divide it.
pub fn view_size(encoder: &Encoder, asked: Option<usize>) -> Result<usize, EvaluateError> {
    let stride = encoder.stride();
    let usual = (USUAL_SIZE / stride).max(1) * stride;
    let size = asked.unwrap_or(encoder.trained_size().min(usual));
    if size == 0 || !size.is_multiple_of(stride) {
        return Err(EvaluateError::Size { stride, found: size });
    }
    Ok(size)
}

/// How images are turned into vectors.
#[derive(Clone, Copy, Debug)]
pub struct Extraction {
    /// The vector.
    pub token: ImageToken,
    /// Side of a view in pixels.
    pub size: usize,
    /// Images computed together.
    pub batch: usize,
}

impl Extraction {
    /// Features of `images`; `progress` is told the number of images after every batch. Images that cannot be decoded
    /// are left out and listed.
    ///
    /// # Errors
    /// [`EvaluateError`] if no image is left, no image of a class is left, or a feature is not finite.
    pub fn run(
        &self,
        encoder: &Encoder,
        images: &[Labelled],
        classes: &[String],
        views: Views,
        progress: &mut dyn FnMut(usize),
    ) -> Result<ImageFeatures, EvaluateError> {
        let (mut values, mut labels, mut bad) = (Vec::new(), Vec::new(), Vec::new());
        let normalization = encoder.normalization();
        for (batch, chunk) in images.chunks(self.batch.max(1)).enumerate() {
            let first = batch * self.batch.max(1);
            let shown: Vec<Result<Vec<Planes>, String>> = chunk
                .par_iter()
                .enumerate()
                .map(|(i, image)| Ok(show(&load(image)?, self.size, views, (first + i) as u64)))
                .collect();
            let (mut planes, mut names) = (Vec::new(), Vec::new());
            for (image, shown) in chunk.iter().zip(shown) {
                match shown {
                    Ok(views) => {
                        labels.extend(std::iter::repeat_n(image.class, views.len()));
                        names.extend(std::iter::repeat_n(image, views.len()));
                        planes.extend(views);
                    }
                    Err(reason) => bad.push((image, reason)),
                }
            }
            // batches are bounded by views, not images: memory does not grow with the number of crops
            for (planes, names) in planes.chunks(self.batch.max(1)).zip(names.chunks(self.batch.max(1))) {
                let rows = vectors(encoder, planes, normalization, self.token)?;
                if let Some(row) = rows.iter().position(|row| row.iter().any(|value| !value.is_finite())) {
                    return Err(EvaluateError::NotFinite { image: names[row].path.display().to_string() });
                }
                values.extend(rows.into_iter().flatten());
            }
            progress(chunk.len());
        }
        check_classes(images, classes, &labels, &bad)?;
        let bad = bad.into_iter().map(|(image, reason)| (image.path.display().to_string(), reason)).collect();
        // class features of a convolutional network may be wider than those of its patches
        let width = values.len().checked_div(labels.len()).unwrap_or(encoder.dim());
        let rows = Array2::from_shape_vec((labels.len(), width), values)
            .map_err(|_| candle_core::Error::Msg("features of different widths".into()))?;
        Ok(ImageFeatures { rows, labels, views: views.count(), bad })
    }
}

/// Fails if no image, or none of a class that had some, could be used: `labels` are those of the images that could, `bad`
/// the others.
///
/// # Errors
/// [`EvaluateError::AllBad`], [`EvaluateError::ClassLost`].
pub fn check_classes(
    images: &[Labelled],
    classes: &[String],
    labels: &[usize],
    bad: &[(&Labelled, String)],
) -> Result<(), EvaluateError> {
    let told = |(image, reason): &(&Labelled, String)| (image.path.display().to_string(), reason.clone());
    if let (true, Some(first)) = (labels.is_empty(), bad.first()) {
        let (name, reason) = told(first);
        return Err(EvaluateError::AllBad { count: images.len(), name, reason });
    }
    for entry @ (image, _) in bad {
        if !labels.contains(&image.class) {
            let (name, reason) = told(entry);
            return Err(EvaluateError::ClassLost { class: classes[image.class].clone(), name, reason });
        }
    }
    Ok(())
}

/// Reads and decodes an image.
///
/// # Errors
/// The reason, for people.
pub fn load(image: &Labelled) -> Result<Rgb8Image, String> {
    decode_rgb(&image.read()?, DataConfig::default().max_megapixels).map_err(|error| error.to_string())
}

/// The views of an image, each `[3, size, size]`; `number` is that of the image in its list.
pub fn show(image: &Rgb8Image, size: usize, views: Views, number: u64) -> Vec<Planes> {
    let mut augmenter = Augmenter::default();
    let resize = (size as f64 / CENTER_SHARE).round() as usize;
    let center = augmenter.center_view(image, (resize, resize), (size, size)).clone();
    let mut shown = vec![center];
    match views {
        Views::Center => {}
        Views::CenterAndMirror => {
            let mut mirror = shown[0].clone();
            mirror.flip();
            shown.push(mirror);
        }
        Views::Crops { repeats, seed } => shown.extend((0..repeats as u64).map(|crop| {
            let mut stream = Stream::new(seed, Purpose::Augment, &[number, crop]);
            let flip = stream.chance(0.5);
            let region = random_resized_crop(&mut stream, image.width, image.height, CROP_SCALE, CROP_RATIO);
            let plan =
                CropPlan { region, size, flip, jitter: None, gray: false, blur: None, solarize: false };
            let mut planes = Planes::default();
            augmenter.apply_into(image, 1, &plan, &mut planes);
            planes
        })),
    }
    shown
}

/// One vector for each of some views of one size.
///
/// # Errors
/// If the network does not take them.
pub fn vectors(
    encoder: &Encoder,
    views: &[Planes],
    normalization: ([f32; 3], [f32; 3]),
    token: ImageToken,
) -> candle_core::Result<Vec<Vec<f32>>> {
    let Some(first) = views.first() else { return Ok(Vec::new()) };
    let images = images(views, (first.height(), first.width()), normalization, encoder)?;
    let features = match token {
        ImageToken::Class => encoder.class_features(&images)?,
        ImageToken::Mean => encoder.patch_features(&images)?.features.mean(1)?,
    };
    features.to_vec2()
}

/// Views of one size as a normalized tensor, `[B, 3, H, W]`.
///
/// # Errors
/// If the views differ in size.
pub fn images(
    views: &[Planes],
    (height, width): (usize, usize),
    (mean, std): ([f32; 3], [f32; 3]),
    encoder: &Encoder,
) -> candle_core::Result<Tensor> {
    let area = 3 * height * width;
    let mut pixels = vec![0.0; views.len() * area];
    for (out, view) in pixels.chunks_exact_mut(area.max(1)).zip(views) {
        if view.data().len() != area {
            candle_core::bail!("views of different sizes");
        }
        normalize_into(view, mean, std, out);
    }
    Tensor::from_vec(pixels, (views.len(), 3, height, width), encoder.device())
}

/// L2-normalizes rows in place; a row of zeros stays.
pub fn normalize_rows(rows: &mut Array2<f32>) {
    for mut row in rows.axis_iter_mut(Axis(0)) {
        let norm = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
        if norm > 0.0 {
            let inverse = 1.0 / norm;
            row.mapv_inplace(|x| (f64::from(x) * inverse) as f32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture() -> Rgb8Image {
        let mut stream = Stream::new(4, Purpose::Subset, &[]);
        Rgb8Image { width: 40, height: 30, data: (0..3 * 40 * 30).map(|_| stream.bits() as u8).collect() }
    }

    #[test]
    fn views_have_their_size_and_depend_on_seed_image_and_crop() {
        let image = picture();
        let crops = |seed, number| show(&image, 16, Views::Crops { repeats: 3, seed }, number);
        let one = crops(1, 0);
        assert_eq!(one.len(), Views::Crops { repeats: 3, seed: 1 }.count());
        assert!(one.iter().all(|view| (view.width(), view.height()) == (16, 16)));
        assert_eq!(one, crops(1, 0));
        assert!(one[1] != one[2] && one[1..] != crops(2, 0)[1..] && one[1..] != crops(1, 1)[1..]);
        let mut both = show(&image, 16, Views::CenterAndMirror, 0);
        assert_eq!(show(&image, 16, Views::Center, 7), both[..1]);
        assert_eq!(one[0], both[0]);
        both[1].flip();
        assert_eq!(both[0], both[1]);
    }

    #[test]
    fn normalized_rows_have_length_one() {
        let mut rows = ndarray::arr2(&[[3.0, 4.0], [0.0, 0.0], [1e-20, 0.0]]);
        normalize_rows(&mut rows);
        assert_eq!(rows, ndarray::arr2(&[[0.6, 0.8], [0.0, 0.0], [1.0, 0.0]]));
    }

    #[test]
    fn a_class_without_a_usable_image_is_named() {
        let image = |class| Labelled { path: format!("{class}.jpg").into(), class, shard: None };
        let images = [image(0), image(1)];
        let classes = ["cat".to_owned(), "dog".to_owned()];
        let bad = [(&images[1], "cut".to_owned())];
        let error = check_classes(&images, &classes, &[0], &bad).unwrap_err();
        assert_eq!(error.to_string(), "no image of class `dog` could be used; the first: `1.jpg`: cut");
        assert!(check_classes(&images, &classes, &[0, 1], &bad).is_ok());
        assert!(matches!(
            check_classes(&images, &classes, &[], &bad),
            Err(EvaluateError::AllBad { count: 2, .. })
        ));
    }
}
