//! The kept models: every platform writes them byte for byte, and every kernel keeps their promise.

use std::path::{Path, PathBuf};

use crate::random_vit::FloatVit;
use crate::{SMALL, SMALLEST};
use pass_edge::format::Mode;
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
    let mut changed = Vec::new();
    for (name, architecture, seed) in [("small.pass", SMALL, 5), ("smallest.pass", SMALLEST, 1)] {
        let file = FloatVit::random(architecture, seed).quantized();
        verify_with_every_kernel(&file);
        if std::fs::read(kept(name)).ok().as_ref() != Some(&file) {
            let written = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
            std::fs::write(&written, &file).unwrap();
            changed.push(written);
        }
    }
    assert!(
        changed.is_empty(),
        "other files than in fixtures/edge; if that is meant, replace them: {changed:?}"
    );
}

/// The other mode: another compiler, processor or operating system must find the same.
#[test]
fn the_digest_of_seven_bit_weights_is_the_same_on_every_platform() {
    let file = FloatVit { mode: Mode::Fast, ..FloatVit::random(SMALL, 5) }.quantized();
    assert_eq!(format!("{:016x}", Model::from_bytes(&file).unwrap().self_test().digest), "9628439c59384fe1");
    verify_with_every_kernel(&file);
}
