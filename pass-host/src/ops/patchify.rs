//! Images as rows of pixels, one row per patch.

use super::access::{stored, tensor};
use super::buffer::build;
use candle_core::{Result, Tensor, bail};

pub(super) fn check(images: &Tensor, patch: usize) -> Result<()> {
    let (_, _, height, width) = images.dims4()?;
    if patch == 0 || height % patch != 0 || width % patch != 0 {
        bail!("patchify: patches of {patch} pixels do not tile images {:?}", images.shape())
    }
    Ok(())
}

pub(super) fn composition(images: &Tensor, patch: usize) -> Result<Tensor> {
    let (batch, channels, height, width) = images.dims4()?;
    let (rows, columns) = (height / patch, width / patch);
    images
        .reshape(&[batch, channels, rows, patch, columns, patch][..])?
        .permute([0, 2, 4, 1, 3, 5])?
        .contiguous()?
        .reshape((batch, rows * columns, channels * patch * patch))
}

pub(super) fn fused(images: &Tensor, patch: usize) -> Result<Tensor> {
    let (batch, channels, height, width) = images.dims4()?;
    let (rows, columns) = (height / patch, width / patch);
    let images = images.contiguous()?;
    let (storage, layout) = images.storage_and_layout();
    let pixels = stored(&storage, layout)?;
    let row_of_patch = channels * patch * patch;
    // one task per row of patches
    let (out, _) = build(pixels.len(), columns * row_of_patch, |part, out| {
        let (image, row) = (part / rows, part % rows);
        for channel in 0..channels {
            for y in 0..patch {
                let line = ((image * channels + channel) * height + row * patch + y) * width;
                for column in 0..columns {
                    let to = column * row_of_patch + (channel * patch + y) * patch;
                    out[to..to + patch].copy_from_slice(&pixels[line + column * patch..][..patch]);
                }
            }
        }
    });
    tensor(out, (batch, rows * columns, row_of_patch))
}

#[cfg(test)]
mod tests {
    use super::super::{Ops, testing::*};
    use candle_core::Var;

    #[test]
    fn fused_agrees_with_composition() {
        for (batch, channels, height, width, patch) in [(1, 1, 1, 1, 1), (2, 3, 8, 12, 4), (3, 3, 6, 15, 3)] {
            let images = random(1, &[batch, channels, height, width]);
            let (fused, plain) =
                (Ops::fused().patchify(&images, patch), Ops::reference().patchify(&images, patch));
            let (fused, plain) = (fused.unwrap(), plain.unwrap());
            assert_eq!(fused.dims(), plain.dims());
            assert_eq!(flat(&fused), flat(&plain));
        }
    }

    #[test]
    fn a_linear_layer_over_it_is_the_patch_convolution() {
        let (images, weight) = (random(1, &[2, 3, 8, 8]), random(2, &[5, 3, 4, 4]));
        let convolution = images.conv2d(&weight, 0, 4, 1, 1).unwrap().flatten_from(2).unwrap().t().unwrap();
        let rows = Ops::fused().patchify(&images, 4).unwrap();
        let linear = Ops::fused().linear(&rows, &weight.flatten_from(1).unwrap(), None).unwrap();
        assert_close("embedding", &flat(&linear), &flat(&convolution.contiguous().unwrap()), 1e-5);
    }

    #[test]
    fn tracked_images_get_a_gradient_and_wrong_sizes_an_error() {
        let images = Var::from_tensor(&random(1, &[1, 3, 4, 4])).unwrap();
        let rows = Ops::fused().patchify(&images, 2).unwrap();
        let gradients = rows.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let expected: Vec<f64> = flat(&images).iter().map(|v| 2.0 * v).collect();
        assert_close("gradient", &flat(gradients.get(&images).unwrap()), &expected, 1e-6);
        assert!(Ops::fused().patchify(&images, 3).is_err());
        assert!(Ops::fused().patchify(&images, 0).is_err());
    }
}
