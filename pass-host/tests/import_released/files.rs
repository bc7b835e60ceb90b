//! Released files in miniature, each in a folder of its own.

use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use flate2::read::GzDecoder;
use pass_host::config::run::Network;
use pass_host::import::{ImportError, ImportSettings, Imported, Origin, run};
use pass_host::model::encoder::{Encoder, EncoderOptions};
use tempfile::TempDir;

/// Largest difference from PyTorch, relative to the largest value.
const TOLERANCE: f32 = 1e-4;

pub(crate) fn fixture(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/import").join(format!("{name}.gz"));
    let mut bytes = Vec::new();
    GzDecoder::new(fs::File::open(&path).unwrap()).read_to_end(&mut bytes).unwrap();
    bytes
}

/// A folder with one of the files in it.
pub(crate) struct Source {
    pub(crate) folder: TempDir,
    pub(crate) path: PathBuf,
    from: Origin,
}

impl Source {
    pub(crate) fn new(name: &str, from: Origin) -> Self {
        Self::of(name, from, &fixture(name))
    }

    pub(crate) fn of(name: &str, from: Origin, bytes: &[u8]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        Self { folder, path, from }
    }

    pub(crate) fn out(&self) -> PathBuf {
        self.folder.path().join("out.safetensors")
    }

    pub(crate) fn settings(&self) -> ImportSettings {
        ImportSettings {
            source: self.path.clone(),
            from: self.from,
            out: self.out(),
            network: None,
            heads: None,
            grid: None,
        }
    }

    pub(crate) fn import(&self, network: Option<Network>, heads: Option<usize>) -> Imported {
        run(&ImportSettings { network, heads, ..self.settings() }).unwrap()
    }

    /// Why the file is refused, with all causes and the hint; nothing is written.
    pub(crate) fn error(&self) -> String {
        self.error_with(self.settings())
    }

    pub(crate) fn error_with(&self, settings: ImportSettings) -> String {
        let error: ImportError = run(&settings).expect_err("the file is refused");
        assert!(!self.out().exists(), "nothing is written");
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(inner) = cause {
            text += &format!(": {inner}");
            cause = inner.source();
        }
        format!("{text} | {}", error.hint().unwrap_or_default())
    }

    pub(crate) fn encoder(&self, options: EncoderOptions) -> Encoder {
        Encoder::open(self.out().to_str().unwrap(), &options, &Device::Cpu).unwrap()
    }
}

pub(crate) fn outputs() -> HashMap<String, Tensor> {
    candle_core::safetensors::load_buffer(&fixture("outputs.safetensors"), &Device::Cpu).unwrap()
}

pub(crate) fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[track_caller]
pub(crate) fn assert_close(found: &Tensor, expected: &Tensor, what: &str) {
    assert_eq!(found.dims(), expected.dims(), "{what}");
    let (found, expected) = (values(found), values(expected));
    let scale = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    assert!(scale > 0.1, "{what}: the expected values are all small");
    let difference = found.iter().zip(&expected).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
    assert!(difference <= TOLERANCE * scale, "{what}: off by {difference} of {scale}");
}

/// `[B, D, h, w]` as `[B, N, D]`.
pub(crate) fn rows(map: &Tensor) -> Tensor {
    map.flatten_from(2).unwrap().transpose(1, 2).unwrap().contiguous().unwrap()
}

/// The tensors of an imported file under other names, as another safetensors file.
pub(crate) fn renamed(source: &Source, rename: impl Fn(&str) -> Option<String>) -> Vec<u8> {
    let tensors = candle_core::safetensors::load(source.out(), &Device::Cpu).unwrap();
    let tensors: Vec<(String, Tensor)> =
        tensors.into_iter().filter_map(|(name, tensor)| Some((rename(&name)?, tensor))).collect();
    safetensors::serialize(tensors, None).unwrap()
}
