//! Files with the keys and the nesting of released weights (`fixtures/import/make.py`): imported, opened, and compared
//! with what PyTorch makes of them.

use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use flate2::read::GzDecoder;
use pass_host::config::run::Network;
use pass_host::import::{ImportError, ImportSettings, Imported, Origin, Sizes, run};
use pass_host::model::encoder::{Encoder, EncoderOptions, ResNetLayer};
use tempfile::TempDir;

/// Largest difference from PyTorch, relative to the largest value.
const TOLERANCE: f32 = 1e-4;

fn fixture(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/import").join(format!("{name}.gz"));
    let mut bytes = Vec::new();
    GzDecoder::new(fs::File::open(&path).unwrap()).read_to_end(&mut bytes).unwrap();
    bytes
}

/// A folder with one of the files in it.
struct Source {
    folder: TempDir,
    path: PathBuf,
    from: Origin,
}

impl Source {
    fn new(name: &str, from: Origin) -> Self {
        Self::of(name, from, &fixture(name))
    }

    fn of(name: &str, from: Origin, bytes: &[u8]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        Self { folder, path, from }
    }

    fn out(&self) -> PathBuf {
        self.folder.path().join("out.safetensors")
    }

    fn settings(&self) -> ImportSettings {
        ImportSettings {
            source: self.path.clone(),
            from: self.from,
            out: self.out(),
            network: None,
            heads: None,
            grid: None,
        }
    }

    fn import(&self, network: Option<Network>, heads: Option<usize>) -> Imported {
        run(&ImportSettings { network, heads, ..self.settings() }).unwrap()
    }

    /// Why the file is refused, with all causes and the hint; nothing is written.
    fn error(&self) -> String {
        self.error_with(self.settings())
    }

    fn error_with(&self, settings: ImportSettings) -> String {
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

    fn encoder(&self, options: EncoderOptions) -> Encoder {
        Encoder::open(self.out().to_str().unwrap(), &options, &Device::Cpu).unwrap()
    }
}

fn outputs() -> HashMap<String, Tensor> {
    candle_core::safetensors::load_buffer(&fixture("outputs.safetensors"), &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[track_caller]
fn assert_close(found: &Tensor, expected: &Tensor, what: &str) {
    assert_eq!(found.dims(), expected.dims(), "{what}");
    let (found, expected) = (values(found), values(expected));
    let scale = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    assert!(scale > 0.1, "{what}: the expected values are all small");
    let difference = found.iter().zip(&expected).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
    assert!(difference <= TOLERANCE * scale, "{what}: off by {difference} of {scale}");
}

/// `[B, D, h, w]` as `[B, N, D]`.
fn rows(map: &Tensor) -> Tensor {
    map.flatten_from(2).unwrap().transpose(1, 2).unwrap().contiguous().unwrap()
}

#[test]
fn vision_transformers_give_the_features_of_pytorch() {
    use Network::{Student, Teacher};
    let outputs = outputs();
    let images = &outputs["vit.images"];
    // file, origin, network, heads, name of the outputs
    for (name, from, network, heads, case) in [
        ("selfpatch.pth", Origin::Selfpatch, None, Some(4), "selfpatch.teacher"),
        ("selfpatch.pth", Origin::Selfpatch, Some(Student), Some(4), "selfpatch.student"),
        ("dino_checkpoint.pth", Origin::Dino, Some(Teacher), Some(4), "dino.teacher"),
        ("dino_checkpoint.pth", Origin::Dino, Some(Student), Some(4), "dino.student"),
        ("dino_backbone.pth", Origin::Dino, None, Some(4), "dino.teacher"),
        ("deit.pth", Origin::Timm, None, None, "deit"),
        ("timm.safetensors", Origin::Timm, None, Some(4), "timm"),
        ("moco_v3.pth.tar", Origin::MocoV3, None, None, "moco_v3.base"),
        ("moco_v3.pth.tar", Origin::MocoV3, Some(Teacher), None, "moco_v3.momentum"),
        ("moby.pth", Origin::Moby, None, Some(4), "moby.online"),
        ("moby.pth", Origin::Moby, Some(Teacher), Some(4), "moby.target"),
    ] {
        let source = Source::new(name, from);
        let imported = source.import(network, heads);
        assert_eq!((imported.used, imported.tensors), (imported.found, imported.found), "{case}");
        let encoder = source.encoder(EncoderOptions::default());
        let patches = encoder.patch_features(images).unwrap();
        assert_eq!(patches.grid, (6, 4));
        assert_close(&patches.features, &outputs[&format!("{case}.patches")], case);
        assert_close(&encoder.class_features(images).unwrap(), &outputs[&format!("{case}.class")], case);
    }
}

#[test]
fn resnets_give_the_features_of_pytorch() {
    let outputs = outputs();
    let images = &outputs["resnet.images"];
    for (name, from, network, case) in [
        ("resnet50.pth", Origin::TorchvisionResnet50, None, "resnet50"),
        ("moco_v2.pth.tar", Origin::MocoV2, None, "moco_v2.query"),
        ("moco_v2.pth.tar", Origin::MocoV2, Some(Network::Teacher), "moco_v2.key"),
        ("swav.pth.tar", Origin::Swav, None, "swav"),
        ("densecl.pth", Origin::Densecl, None, "densecl"),
        ("resim.pth.tar", Origin::Resim, None, "resim"),
        ("detco.pkl", Origin::Detco, None, "detco"),
    ] {
        let source = Source::new(name, from);
        let imported = source.import(network, None);
        assert_eq!((imported.used, imported.found, imported.tensors), (265, 265, 265), "{case}");
        let third = source.encoder(EncoderOptions::default());
        let features = third.patch_features(images).unwrap();
        assert_eq!((features.grid, third.stride()), ((4, 3), 16));
        assert_close(&features.features, &rows(&outputs[&format!("{case}.layer3")]), case);
        assert_close(&third.class_features(images).unwrap(), &outputs[&format!("{case}.class")], case);
        let fourth =
            source.encoder(EncoderOptions { resnet_layer: ResNetLayer::Fourth, ..Default::default() });
        let features = fourth.patch_features(images).unwrap();
        assert_eq!(features.features.dims(), [2, 12, fourth.dim()]);
        assert_close(&features.features, &rows(&outputs[&format!("{case}.layer4_dilated")]), case);
    }
}

#[test]
fn layers_of_a_resnet_share_a_grid() {
    let outputs = outputs();
    let source = Source::new("resnet50.pth", Origin::TorchvisionResnet50);
    source.import(None, None);
    let (layers, grid) = source
        .encoder(EncoderOptions::default())
        .block_outputs(&outputs["resnet.images"], &[0, 1, 2, 3])
        .unwrap();
    assert_eq!((layers.len(), grid), (4, (4, 3)));
    for (index, pooled) in [(0, 4), (1, 2), (2, 1)] {
        let expected = outputs[&format!("resnet50.layer{}", index + 1)].avg_pool2d(pooled).unwrap();
        assert_close(&layers[index], &rows(&expected), "layer");
    }
    assert_close(&layers[3], &rows(&outputs["resnet50.layer4_dilated"]), "layer 4");
}

#[test]
fn a_resnet_can_be_trained_and_drawn_anew() {
    let images = &outputs()["resnet.images"];
    let source = Source::new("resnet50.pth", Origin::TorchvisionResnet50);
    source.import(None, None);
    let encoder = source.encoder(EncoderOptions { trainable: true, ..Default::default() });
    let loss = encoder.class_features(images).unwrap().sqr().unwrap().sum_all().unwrap();
    let gradients = loss.backward().unwrap();
    for (name, parameter) in encoder.parameters().iter() {
        let stem = name.starts_with("conv1.");
        assert_eq!(gradients.get(&parameter.tensor).is_some(), !stem, "{name}");
    }
    let out = format!("random:{}", source.out().display());
    let fresh = Encoder::open(&out, &EncoderOptions::default(), &Device::Cpu).unwrap();
    let features = fresh.class_features(images).unwrap();
    assert!(values(&features).iter().all(|value| value.is_finite()));
    assert_ne!(values(&features), values(&encoder.class_features(images).unwrap()));
    assert!(fresh.last_attention(images).unwrap_err().to_string().contains("no attention"));
    assert!(fresh.patch_features(&images.narrow(3, 0, 40).unwrap()).is_err());
}

#[test]
fn what_is_left_out_is_counted() {
    let parts = |name, from, network| {
        let imported = Source::new(name, from).import(network, Some(4));
        let mut parts: Vec<String> =
            imported.left_out.iter().map(|name| name.split('.').next().unwrap().into()).collect();
        let count = parts.len();
        parts.dedup();
        (count, parts)
    };
    assert_eq!(parts("selfpatch.pth", Origin::Selfpatch, None), (16, vec!["c_head".into(), "p_head".into()]));
    assert_eq!(parts("dino_checkpoint.pth", Origin::Dino, None), (8, vec!["head".into()]));
    assert_eq!(parts("dino_backbone.pth", Origin::Dino, None), (0, vec![]));
    let (_, moby) = parts("moby.pth", Origin::Moby, None);
    assert_eq!(moby, ["encoder_k", "predictor", "projector", "projector_k", "queue1", "queue2", "queue_ptr"]);
}

#[test]
fn heads_are_those_of_the_origin() {
    let heads = |name, from, heads| match Source::new(name, from).import(None, heads).backbone {
        Sizes::Vit(sizes) => sizes.heads,
        Sizes::ResNet(_) => 0,
    };
    assert_eq!(heads("deit.pth", Origin::Timm, None), 1);
    assert_eq!(heads("moco_v3.pth.tar", Origin::MocoV3, None), 12);
    assert_eq!(heads("moco_v3.pth.tar", Origin::MocoV3, Some(6)), 6);
    let source = Source::new("dino_backbone.pth", Origin::Dino);
    let error = source.error();
    assert!(error.contains("16 wide") && error.ends_with("give the number of attention heads with `--heads N`"), "{error}");
    let error = source.error_with(ImportSettings { heads: Some(5), ..source.settings() });
    assert!(error.contains("the network is 16 wide, which 5 heads do not divide"), "{error}");
}

#[test]
fn positions_of_another_grid_are_written_and_said() {
    let outputs = outputs();
    let images = &outputs["vit.images"];
    for (name, from, network) in [
        ("dino_backbone.pth", Origin::Dino, None),
        ("timm.safetensors", Origin::Timm, None),
        ("selfpatch.pth", Origin::Selfpatch, Some(Network::Teacher)),
    ] {
        let source = Source::new(name, from);
        source.import(network, Some(4));
        let larger = images.pad_with_zeros(3, 0, 8).unwrap();
        let on_the_fly = source.encoder(EncoderOptions::default()).patch_features(&larger).unwrap();
        let settings = ImportSettings { network, heads: Some(4), grid: Some(6), ..source.settings() };
        let imported = run(&settings).unwrap();
        assert_eq!(imported.notes, ["position embeddings resized from 4x4 to 6x6, bicubic"]);
        let encoder = source.encoder(EncoderOptions::default());
        assert_eq!(encoder.trained_size(), 24);
        let stored = encoder.patch_features(&larger).unwrap();
        assert_eq!((stored.grid, on_the_fly.grid), ((6, 6), (6, 6)));
        assert_close(&stored.features, &on_the_fly.features, name);
    }
}

/// The tensors of an imported file under other names, as another safetensors file.
fn renamed(source: &Source, rename: impl Fn(&str) -> Option<String>) -> Vec<u8> {
    let tensors = candle_core::safetensors::load(source.out(), &Device::Cpu).unwrap();
    let tensors: Vec<(String, Tensor)> =
        tensors.into_iter().filter_map(|(name, tensor)| Some((rename(&name)?, tensor))).collect();
    safetensors::serialize(tensors, None).unwrap()
}

#[test]
fn safetensors_are_read_for_every_origin_and_missing_sines_are_computed() {
    let whole = Source::new("moco_v3.pth.tar", Origin::MocoV3);
    whole.import(None, None);
    let bytes = renamed(&whole, |name| {
        (name != "pos_embed").then(|| format!("module.base_encoder.{name}"))
    });
    let source = Source::of("moco_v3.safetensors", Origin::MocoV3, &bytes);
    // without positions the grid is that of 224 pixels; the wavelengths do not depend on it
    let imported = source.import(None, None);
    assert_eq!(imported.notes, ["position embeddings computed: 56x56, sine and cosine"]);
    let load = |source: &Source| candle_core::safetensors::load(source.out(), &Device::Cpu).unwrap();
    let (stored, computed) = (&load(&whole)["pos_embed"], &load(&source)["pos_embed"]);
    assert_eq!(computed.dims(), [1, 1 + 56 * 56, 24]);
    for (row, column) in [(0, 0), (0, 3), (2, 0), (3, 1)] {
        let at = |positions: &Tensor, side: usize| positions.narrow(1, 1 + row * side + column, 1).unwrap();
        assert_close(&at(computed, 56), &at(stored, 4), "position");
    }
    assert!(values(&computed.narrow(1, 0, 1).unwrap()).iter().all(|value| *value == 0.0));
}

#[test]
fn a_selfpatch_backbone_alone_has_timm_names() {
    let outputs = outputs();
    let whole = Source::new("selfpatch.pth", Origin::Selfpatch);
    whole.import(None, Some(4));
    let bytes = renamed(&whole, |name| name.strip_prefix("backbone.").map(str::to_owned));
    let source = Source::of("backbone.safetensors", Origin::Selfpatch, &bytes);
    let imported = source.import(None, Some(4));
    assert!(imported.usage.contains("class_token=False") && imported.usage.contains("final_norm=False"));
    let features = source.encoder(EncoderOptions::default()).patch_features(&outputs["vit.images"]).unwrap();
    assert_close(&features.features, &outputs["selfpatch.teacher.patches"], "backbone");
}

#[test]
fn every_missing_tensor_is_named() {
    let whole = Source::new("dino_backbone.pth", Origin::Dino);
    whole.import(None, Some(4));
    let names: Vec<String> =
        candle_core::safetensors::load(whole.out(), &Device::Cpu).unwrap().into_keys().collect();
    assert_eq!(names.len(), 6 + 12 * 2);
    for missing in &names {
        let bytes = renamed(&whole, |name| (name != missing).then(|| name.to_owned()));
        let source = Source::of("f.safetensors", Origin::Dino, &bytes);
        let error = source.error_with(ImportSettings { heads: Some(4), ..source.settings() });
        assert!(error.contains(&format!("tensor `{missing}` is missing")), "{missing}: {error}");
    }
    let resnet = Source::new("resnet50.pth", Origin::TorchvisionResnet50);
    resnet.import(None, None);
    for missing in ["conv1.weight", "bn1.running_var", "layer3.5.conv2.weight", "layer4.0.downsample.1.bias"] {
        let bytes = renamed(&resnet, |name| (name != missing).then(|| name.to_owned()));
        let error = Source::of("f.safetensors", Origin::TorchvisionResnet50, &bytes).error();
        assert!(error.contains(&format!("tensor `{missing}` is missing")), "{missing}: {error}");
    }
}

#[test]
fn unexpected_tensors_are_named() {
    for (name, from, network, extra) in [
        ("dino_backbone.pth", Origin::Dino, None, "blocks.2.norm1.weight"),
        ("dino_backbone.pth", Origin::Dino, None, "blocks.1.attn.gate"),
        ("dino_backbone.pth", Origin::Dino, None, "decoder.weight"),
        ("timm.safetensors", Origin::Timm, None, "fc_norm.weight"),
        ("timm.safetensors", Origin::Timm, None, "dist_token"),
        ("selfpatch.pth", Origin::Selfpatch, None, "ca_head.cls_blocks.2.norm1.weight"),
        ("resnet50.pth", Origin::TorchvisionResnet50, None, "layer3.6.conv1.weight"),
    ] {
        let whole = Source::new(name, from);
        let heads = (from.eq(&Origin::TorchvisionResnet50)).then_some(0).xor(Some(4)).filter(|heads| *heads > 0);
        whole.import(network, heads);
        let mut tensors = candle_core::safetensors::load(whole.out(), &Device::Cpu).unwrap();
        tensors.insert(extra.into(), Tensor::zeros(16, candle_core::DType::F32, &Device::Cpu).unwrap());
        let source = Source::of("f.safetensors", from, &safetensors::serialize(tensors, None).unwrap());
        let error = source.error_with(ImportSettings { heads, ..source.settings() });
        assert!(error.contains(&format!("`{extra}`")) || error.contains("blocks.2."), "{extra}: {error}");
    }
}
