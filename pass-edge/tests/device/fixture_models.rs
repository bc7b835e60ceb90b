//! The kept models: every platform writes them byte for byte, and every kernel keeps their promise.

use std::path::{Path, PathBuf};

use crate::random_vit::FloatVit;
use crate::{SMALL, SMALLEST};
use pass_edge::kernels::Kernel;
use pass_edge::model::Model;
use pass_edge::scratch::ScratchBuffer;
use pass_edge::{scratch_len, self_test};

fn kept(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/edge").join(name)
}

fn verify_with_every_kernel(file: &[u8]) {
    let model = Model::from_bytes(file).unwrap();
    let mut scratch = ScratchBuffer::new(scratch_len(&model));
    let mut out = vec![f32::NAN; model.output_len()];
    for kernel in Kernel::available() {
        self_test::verify(&model, kernel, &mut scratch.scratch(), &mut out)
            .unwrap_or_else(|error| panic!("{}: {error}", kernel.name()));
    }
}

#[test]
fn every_platform_writes_the_kept_models_and_every_kernel_keeps_their_promise() {
    for (name, architecture, seed) in [("small.pass", SMALL, 5), ("smallest.pass", SMALLEST, 1)] {
        let file = FloatVit::random(architecture, seed).quantized();
        if std::fs::read(kept(name)).ok().as_ref() != Some(&file) {
            let written = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
            std::fs::write(&written, &file).unwrap();
            panic!("fixtures/edge/{name} is another file; if that is meant, replace it by {}", written.display());
        }
        verify_with_every_kernel(&file);
    }
}

/// Digests of the self-test in both modes: another compiler, processor or operating system must find the same.
#[test]
fn the_digests_are_the_same_on_every_platform() {
    let float = FloatVit::random(SMALL, 5);
    for (file, digest) in
        [(float.quantized(), 0x55b6_02ff_82df_3870), (float.fast().quantized(), 0xae47_29e0_5bf5_4e0d)]
    {
        assert_eq!(Model::from_bytes(&file).unwrap().self_test().digest, digest);
        verify_with_every_kernel(&file);
    }
}
