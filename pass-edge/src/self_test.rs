//! The promise of a file, checked on the device: a generated image must give exactly the promised features.

use xxhash_rust::xxh3::Xxh3;

use crate::error::{Error, Result};
use crate::features_with_pool;
use crate::image::Image;
use crate::kernels::Kernel;
use crate::model::Model;
use crate::parallel::{Pool, Serial};
use crate::scratch::Scratch;

/// XXH3-64 over the little-endian bits of `features`.
pub fn digest(features: &[f32]) -> u64 {
    let mut hash = Xxh3::new();
    for value in features {
        hash.update(&value.to_le_bytes());
    }
    hash.digest()
}

/// Computes the features of the model's self-test image and compares their digest with the one in the file.
///
/// - `out`: as for [`crate::features`]; holds the features of the self-test afterwards.
///
/// # Errors
/// [`Error::SelfTest`] if the digest differs; otherwise those of [`crate::features`].
pub fn verify(model: &Model<'_>, kernel: Kernel, scratch: &mut Scratch<'_>, out: &mut [f32]) -> Result<()> {
    verify_with_pool(model, kernel, &Serial, scratch, out)
}

/// [`verify`] on several threads, with working memory for as many.
///
/// # Errors
/// Those of [`verify`].
pub fn verify_with_pool(
    model: &Model<'_>,
    kernel: Kernel,
    pool: &dyn Pool,
    scratch: &mut Scratch<'_>,
    out: &mut [f32],
) -> Result<()> {
    let test = model.self_test();
    let image = Image::generated(test.seed, model.architecture().image_size());
    features_with_pool(model, &image, kernel, pool, scratch, out)?;
    let actual = digest(out.get(..model.output_len()).unwrap_or_default());
    if actual == test.digest { Ok(()) } else { Err(Error::SelfTest { expected: test.digest, actual }) }
}
