//! What is no intact file of its origin is refused, with the reason, and nothing is written or run.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use pass_host::config::run::Network;
use pass_host::import::{ImportSettings, Origin, run};
use proptest::prelude::*;

use crate::files::{Source, fixture, renamed, values};

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
    for missing in ["conv1.weight", "bn1.running_var", "layer3.5.conv2.weight", "layer4.0.downsample.1.bias"]
    {
        let bytes = renamed(&resnet, |name| (name != missing).then(|| name.to_owned()));
        let error = Source::of("f.safetensors", Origin::TorchvisionResnet50, &bytes).error();
        assert!(error.contains(&format!("tensor `{missing}` is missing")), "{missing}: {error}");
    }
}

/// A file like the imported one of `whole`, with one tensor more, or another in its place.
fn with_tensor(whole: &Source, from: Origin, name: &str, shape: &[usize]) -> Source {
    let mut tensors = candle_core::safetensors::load(whole.out(), &Device::Cpu).unwrap();
    tensors.insert(name.into(), Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap());
    Source::of("f.safetensors", from, &safetensors::serialize(tensors, None).unwrap())
}

#[test]
fn unexpected_tensors_are_named() {
    for (name, from, extra) in [
        ("dino_backbone.pth", Origin::Dino, "blocks.2.norm1.weight"),
        ("dino_backbone.pth", Origin::Dino, "blocks.1.attn.gate"),
        ("dino_backbone.pth", Origin::Dino, "decoder.weight"),
        ("timm.safetensors", Origin::Timm, "fc_norm.weight"),
        ("timm.safetensors", Origin::Timm, "dist_token"),
        ("selfpatch.pth", Origin::Selfpatch, "ca_head.cls_blocks.2.norm1.weight"),
        ("resnet50.pth", Origin::TorchvisionResnet50, "layer3.6.conv1.weight"),
    ] {
        let heads = (from != Origin::TorchvisionResnet50).then_some(4);
        let whole = Source::new(name, from);
        whole.import(None, heads);
        let source = with_tensor(&whole, from, extra, &[16]);
        let error = source.error_with(ImportSettings { heads, ..source.settings() });
        // a third block is one that lacks everything else
        let expected = match extra {
            "blocks.2.norm1.weight" => "tensor `blocks.2.norm1.bias` is missing".to_owned(),
            _ => format!("tensor `{extra}` belongs to the backbone, but to no layer known here"),
        };
        assert!(error.contains(&expected), "{extra}: {error}");
    }
}

#[test]
fn tensors_of_another_shape_are_named_with_both() {
    for (name, from, heads, tensor, shape, expected) in [
        ("dino_backbone.pth", Origin::Dino, Some(4), "blocks.1.mlp.fc2.weight", &[64, 16][..], "[16, 64]"),
        ("dino_backbone.pth", Origin::Dino, Some(4), "pos_embed", &[1, 16, 16], "[1, 17, 16]"),
        (
            "dino_backbone.pth",
            Origin::Dino,
            Some(4),
            "patch_embed.proj.weight",
            &[16, 1, 4, 4],
            "[16, 3, 4, 4]",
        ),
        ("dino_backbone.pth", Origin::Dino, Some(4), "patch_embed.proj.weight", &[16, 48], "4"),
        ("selfpatch.pth", Origin::Selfpatch, Some(4), "ca_head.cls_token", &[1, 2, 16], "[1, 1, 16]"),
        ("resnet50.pth", Origin::TorchvisionResnet50, None, "layer1.1.bn2.running_var", &[3], "[2]"),
    ] {
        let whole = Source::new(name, from);
        whole.import(None, heads);
        let source = with_tensor(&whole, from, tensor, shape);
        let error = source.error_with(ImportSettings { heads, ..source.settings() });
        let expected = format!("expected {expected}, found {shape:?}");
        assert!(error.contains(tensor) && error.contains(&expected), "{tensor}: {error}");
    }
}

#[test]
fn a_file_of_another_origin_is_refused_with_what_belongs_there() {
    for (name, from, expected) in [
        ("resnet50.pth", Origin::Dino, "tensor `patch_embed.proj.weight` is missing"),
        ("dino_backbone.pth", Origin::TorchvisionResnet50, "tensor `conv1.weight` is missing"),
        ("dino_backbone.pth", Origin::MocoV3, "no tensors called `base_encoder.*`; found `blocks.0."),
        (
            "dino_checkpoint.pth",
            Origin::Timm,
            "no tensors below `model` or below `state_dict` or at the top; found below",
        ),
        (
            "dino_checkpoint.pth",
            Origin::Selfpatch,
            "`backbone.pos_embed`: shape: expected [1, 16, 16], found [1, 17, 16]",
        ),
        ("selfpatch.pth", Origin::Dino, "tensor `c_head.last_layer.weight_g` belongs"),
        ("moco_v2.pth.tar", Origin::Swav, "tensor `module.conv1.weight` is missing"),
        ("deit.pth", Origin::Dino, "no tensors below `teacher` or at the top; found below `model`"),
    ] {
        let source = Source::new(name, from);
        let error = source.error_with(ImportSettings {
            heads: (from != Origin::TorchvisionResnet50 && from != Origin::Swav).then_some(4),
            ..source.settings()
        });
        // SelfPatch's names fail at the aggregation head that DINO lacks
        let either = error.contains(expected) || error.contains("tensor `ca_head.");
        assert!(either && error.contains("| `--from "), "{name}: {error}");
    }
}

#[test]
fn flags_without_meaning_are_refused() {
    let source = Source::new("resnet50.pth", Origin::TorchvisionResnet50);
    let cases = [
        (ImportSettings { heads: Some(4), ..source.settings() }, "`--heads`"),
        (ImportSettings { grid: Some(4), ..source.settings() }, "`--grid`"),
        (ImportSettings { network: Some(Network::Teacher), ..source.settings() }, "`--network`"),
    ];
    for (settings, flag) in cases {
        let error = source.error_with(settings);
        assert!(error.contains(&format!("{flag} has no meaning for this file")), "{error}");
    }
}

#[test]
fn nothing_in_a_file_is_run() {
    let ran = Path::new("ran.txt");
    let source = Source::new("malicious_value.pth", Origin::Timm);
    source.import(None, Some(4));
    let source = Source::new("malicious_weight.pth", Origin::Timm);
    let error = source.error_with(ImportSettings { heads: Some(4), ..source.settings() });
    assert!(error.contains("tensor `norm.weight` is missing"), "{error}");
    let error = Source::new("whole_module.pth", Origin::Timm).error();
    let expected = "it holds an object of `torch.nn.modules.linear.Linear`, not a dictionary of tensors";
    assert!(error.contains(expected) && error.contains("torch.save(model.state_dict(), F)"), "{error}");
    assert!(!ran.exists() && !source.folder.path().join(ran).exists());
}

#[test]
fn files_of_other_kinds_are_refused() {
    let error = |bytes: &[u8]| Source::of("f.pth", Origin::Dino, bytes).error();
    let page = error(b"<!DOCTYPE html><html>");
    assert!(
        page.contains("it starts with `<!DOCTYPE html><`") && page.contains("page of a website"),
        "{page}"
    );
    assert!(error(b"").contains("it starts with nothing"));
    let mut tar = vec![0; 512];
    tar[257..262].copy_from_slice(b"ustar");
    assert!(error(&tar).contains("tar archive"));
    let mut huge = vec![0xff; 8];
    huge.extend(b"{}");
    assert!(error(&huge).contains("`header`: length"));
    let source = Source::of("f.pth", Origin::Dino, b"");
    let missing = source.error_with(ImportSettings { source: "none-here.pth".into(), ..source.settings() });
    assert!(missing.contains("`none-here.pth` cannot be imported: it cannot be read"), "{missing}");
    let folder = source.folder.path().to_owned();
    source.error_with(ImportSettings { source: folder, ..source.settings() });
}

#[test]
fn every_half_written_file_is_refused_and_named() {
    for (name, from) in [
        ("dino_backbone.pth", Origin::Dino),
        ("moco_v2.pth.tar", Origin::MocoV2),
        ("timm.safetensors", Origin::Timm),
    ] {
        let bytes = fixture(name);
        let heads = (from != Origin::MocoV2).then_some(4);
        let source = Source::of(name, from, &bytes);
        let step = bytes.len() / 150;
        let lengths = (1..40).map(|short| bytes.len() - short).chain((0..bytes.len()).step_by(step));
        for length in lengths {
            fs::write(&source.path, &bytes[..length]).unwrap();
            let error = source.error_with(ImportSettings { heads, ..source.settings() });
            assert!(
                error.starts_with(&format!("`{}` cannot be imported: ", source.path.display())),
                "{error}"
            );
            let told = ["ends early", "ends in the middle", "damaged", "starts with"];
            assert!(told.iter().any(|told| error.contains(told)), "{length} bytes: {error}");
        }
    }
}

#[test]
fn no_changed_byte_changes_the_weights_of_an_archive() {
    let bytes = fixture("dino_backbone.pth");
    let source = Source::of("f.pth", Origin::Dino, &bytes);
    source.import(None, Some(4));
    let weights = || {
        let tensors = candle_core::safetensors::load(source.out(), &Device::Cpu).unwrap();
        let values =
            tensors.into_iter().map(|(name, tensor)| (name, (tensor.dims().to_vec(), values(&tensor))));
        values.collect::<BTreeMap<_, _>>()
    };
    let whole = weights();
    let (mut refused, mut same) = (0, 0);
    for at in (0..bytes.len()).step_by(bytes.len() / 400) {
        let mut changed = bytes.clone();
        changed[at] ^= 1 << (at % 8);
        fs::write(&source.path, &changed).unwrap();
        match run(&ImportSettings { heads: Some(4), ..source.settings() }) {
            Err(_) => refused += 1,
            Ok(_) => {
                assert!(weights() == whole, "byte {at}");
                same += 1;
            }
        }
    }
    // alignment between the members, times and names of their local headers are read by nobody
    assert!(refused > 200 && same > 0, "{refused} refused, {same} the same");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Files without archive have no checksums: whatever is still read has the shapes that were asked for.
    #[test]
    fn damaged_files_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        // the pickles, where a change matters most, are the first quarter
        let mut bytes = fixture("detco.pkl");
        let described = bytes.len() / 4;
        for (at, byte) in changes {
            bytes[at.index(described)] = byte;
        }
        let source = Source::of("f.pkl", Origin::Detco, &bytes);
        if let Ok(imported) = run(&source.settings()) {
            prop_assert_eq!(imported.used, imported.found);
        }
    }

    #[test]
    fn random_bytes_behind_a_right_start_are_an_error(kind in 0..3usize, bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let start: &[u8] = [&b"PK\x03\x04"[..], b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", b"\x10\0\0\0\0\0\0\0{"][kind];
        let file = [start, &bytes].concat();
        prop_assert!(run(&Source::of("f.pth", Origin::Timm, &file).settings()).is_err());
    }
}
