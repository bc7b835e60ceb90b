//! Imported weights give PyTorch's features.

use candle_core::{Device, Tensor};
use pass_host::config::run::Network;
use pass_host::import::{ImportSettings, Origin, Sizes, run};
use pass_host::model::encoder::{Encoder, EncoderOptions, ResNetLayer};

use crate::files::{Source, assert_close, outputs, renamed, rows, values};

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
    assert!(
        error.contains("16 wide") && error.ends_with("give the number of attention heads with `--heads N`"),
        "{error}"
    );
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

#[test]
fn safetensors_are_read_for_every_origin_and_missing_sines_are_computed() {
    let whole = Source::new("moco_v3.pth.tar", Origin::MocoV3);
    whole.import(None, None);
    let bytes = renamed(&whole, |name| (name != "pos_embed").then(|| format!("module.base_encoder.{name}")));
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
