//! The file: everything that is wrong with it is an error, nothing is a panic.

use std::sync::LazyLock;

use crate::random_vit::{FloatVit, NORMALIZATION};
use crate::{SMALL, SMALLEST};
use pass_edge::error::Problem;
use pass_edge::format::Architecture;
use pass_edge::image::{Image, PixelOrder};
use pass_edge::kernels::Kernel;
use pass_edge::model::Model;
use pass_edge::scratch::{ScratchBuffer, ScratchLen};
use pass_edge::writer::{TensorData, write};
use pass_edge::{Error, features, scratch_len, self_test};
use proptest::prelude::*;

static SMALLEST_FILE: LazyLock<Vec<u8>> = LazyLock::new(|| FloatVit::random(SMALLEST, 1).quantized());

/// Reads `bytes` without the checksum and, if they are a model of the smallest architecture, runs it.
fn run_unverified(bytes: &[u8]) {
    let Ok(model) = Model::from_verified_bytes(bytes) else { return };
    if *model.architecture() == SMALLEST {
        let mut scratch = ScratchBuffer::new(scratch_len(&model));
        let mut out = vec![0.0; model.output_len()];
        let image = Image::new(&[7; 6], (1, 2), 6, PixelOrder::Rgb).unwrap();
        features(&model, &image, Kernel::best(), &mut scratch.scratch(), &mut out).unwrap();
    }
}

#[test]
fn a_written_file_is_read_back_with_everything_in_it() {
    let float = FloatVit::random(SMALL, 3);
    let file = float.quantized();
    let model = Model::from_bytes(&file).unwrap();
    assert_eq!(*model.architecture(), SMALL);
    assert_eq!((model.name(), *model.normalization()), ("random", NORMALIZATION));
    assert_eq!(*model.contract(), float.description().contract);
    assert_eq!(model.block_cosines().collect::<Vec<_>>(), [1.0; 4]);
    let (mean, basis) = model.pca().unwrap();
    assert_eq!(mean.collect::<Vec<_>>(), float.tensor("pca.mean"));
    assert_eq!(basis.collect::<Vec<_>>(), float.tensor("pca.basis"));
}

#[test]
fn every_single_byte_change_is_refused() {
    let mut bytes = SMALLEST_FILE.clone();
    assert!(Model::from_bytes(&bytes).is_ok());
    for at in 0..bytes.len() {
        let kept = bytes[at];
        for change in 1..=255 {
            bytes[at] = kept ^ change;
            assert!(Model::from_bytes(&bytes).is_err(), "byte {at} ^ {change}");
        }
        bytes[at] = kept;
    }
}

#[test]
fn every_truncation_and_extension_is_refused() {
    let bytes = &*SMALLEST_FILE;
    for length in 0..bytes.len() {
        assert!(Model::from_bytes(&bytes[..length]).is_err(), "{length} bytes with the checksum");
        assert!(Model::from_verified_bytes(&bytes[..length]).is_err(), "{length} bytes without the checksum");
    }
    let longer = [bytes.as_slice(), &[0]].concat();
    assert!(Model::from_bytes(&longer).is_err() && Model::from_verified_bytes(&longer).is_err());
}

#[test]
fn no_single_byte_change_panics_behind_the_checksum() {
    let mut bytes = SMALLEST_FILE.clone();
    for at in 0..bytes.len() {
        let kept = bytes[at];
        for change in [1, 2, 4, 0x0f, 0x40, 0x7f, 0x80, 0xff] {
            bytes[at] = kept ^ change;
            run_unverified(&bytes);
        }
        bytes[at] = kept;
    }
}

#[test]
fn an_unknown_version_is_refused_naming_both() {
    let mut bytes = SMALLEST_FILE.clone();
    bytes[8] = 9;
    let error = Model::from_bytes(&bytes).unwrap_err();
    assert_eq!(error.to_string(), "file format version 9, this reader knows version 1");
    bytes[0] = b'P';
    assert_eq!(Model::from_bytes(&bytes).unwrap_err(), Error::NotAModel);
}

#[test]
fn a_corrupted_scale_is_found_by_the_self_test_even_without_the_checksum() {
    let mut bytes = SMALLEST_FILE.clone();
    let model = Model::from_bytes(&bytes).unwrap();
    let mut scratch = ScratchBuffer::new(scratch_len(&model));
    let mut out = vec![0.0; model.output_len()];
    for kernel in Kernel::available() {
        self_test::verify(&model, kernel, &mut scratch.scratch(), &mut out).unwrap();
    }
    assert_eq!(model.self_test_feature().collect::<Vec<_>>(), out[..16]);
    // the scale of the patch embedding follows its 256 bytes of weights, which follow the header
    let header = u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
    let scale = (16 + header).next_multiple_of(64) + 256;
    bytes[scale + 2] ^= 0x40;
    let model = Model::from_verified_bytes(&bytes).unwrap();
    let error = self_test::verify(&model, Kernel::Scalar, &mut scratch.scratch(), &mut out).unwrap_err();
    assert!(matches!(error, Error::SelfTest { .. }), "{error}");
}

#[test]
fn the_writer_refuses_wrong_numbers_by_name() {
    let float = FloatVit::random(SMALLEST, 1);
    let description = float.description();
    let refused = |data: TensorData| {
        write(&description, &mut |_, _, _| data.clone()).map(|_| ()).map_err(|error| match error {
            Error::Tensor { name: "patch_embed.proj.weight" | "patch_embed.proj.scale", problem, .. } => {
                problem
            }
            other => panic!("{other}"),
        })
    };
    assert_eq!(refused(TensorData::F32(vec![0.0; 48])), Err(Problem::Kind));
    assert_eq!(refused(TensorData::Int8(vec![0; 47])), Err(Problem::Length));
    let mut call = 0;
    let mut not_finite = |_: &str, rows: usize, columns: usize| {
        call += 1;
        if call == 1 {
            TensorData::Int8(vec![0; rows * columns])
        } else {
            TensorData::F32(vec![f32::NAN; rows * columns])
        }
    };
    let error = write(&description, &mut not_finite).unwrap_err();
    let problem = Problem::NotFinite;
    assert_eq!(error, Error::Tensor { block: None, name: "patch_embed.proj.scale", problem });
}

#[test]
fn wrong_images_and_buffers_are_refused() {
    let model = Model::from_bytes(&SMALLEST_FILE).unwrap();
    let len = scratch_len(&model);
    let mut out = vec![0.0; model.output_len()];
    let right = Image::new(&[7; 6], (1, 2), 6, PixelOrder::Rgb).unwrap();
    let wrong = Image::new(&[7; 6], (2, 1), 3, PixelOrder::Rgb).unwrap();
    let mut scratch = ScratchBuffer::new(len);
    let run = |image: &Image<'_>, scratch: &mut ScratchBuffer, out: &mut [f32]| {
        features(&model, image, Kernel::Scalar, &mut scratch.scratch(), out)
    };
    run(&right, &mut scratch, &mut out).unwrap();
    assert!(matches!(
        run(&wrong, &mut scratch, &mut out),
        Err(Error::LengthMismatch { what: "image height", .. })
    ));
    let short = out.len() - 1;
    assert!(matches!(
        run(&right, &mut scratch, &mut out[..short]),
        Err(Error::LengthMismatch { what: "out", .. })
    ));
    for (what, shorter) in [
        ("scratch floats", ScratchLen { floats: len.floats - 1, ..len }),
        ("scratch words", ScratchLen { words: len.words - 1, ..len }),
        ("scratch bytes", ScratchLen { bytes: len.bytes - 1, ..len }),
    ] {
        let error = run(&right, &mut ScratchBuffer::new(shorter), &mut out).unwrap_err();
        assert!(matches!(error, Error::LengthMismatch { what: found, .. } if found == what), "{error}");
    }
}

#[test]
fn an_impossible_architecture_is_not_written() {
    let mut description = FloatVit::random(SMALLEST, 1).description();
    description.architecture = Architecture { heads: 3, ..SMALLEST };
    let error = write(&description, &mut |_, _, _| unreachable!("no tensor is asked for")).unwrap_err();
    assert!(matches!(error, Error::NotDivisible { .. }), "{error}");
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        prop_assert!(Model::from_bytes(&bytes).is_err());
        run_unverified(&bytes);
        let header = [&SMALLEST_FILE[..16], &bytes].concat();
        run_unverified(&header);
    }

    #[test]
    fn several_changes_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20)) {
        let mut bytes = SMALLEST_FILE.clone();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        run_unverified(&bytes);
    }
}
