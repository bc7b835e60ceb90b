use std::collections::{BTreeMap, BTreeSet};

use candle_core::{Device, Tensor};
use prost::Message;

use super::*;
use crate::export::source::Source;
use crate::model::Architecture;
use crate::model::parameters::{Parameters, Role};
use crate::model::pos_embed::ResizeRule;
use crate::model::timm::{IMAGENET, OptionalParts};
use crate::onnx::{FLOAT, GraphProto, INT8, ModelProto, Node, TensorProto, ValueInfo};

const DIM: usize = 32;
const HEADS: usize = 2;
const PATCH: usize = 4;
const GRID: usize = 3;

/// Own weights with fresh values; with `registers`, a backbone with a class token too and without aggregation head.
fn source(registers: Option<usize>) -> Source {
    let architecture = Architecture::backbone_only(DIM, 2, HEADS, PATCH, GRID);
    let parameters = Parameters::init(&architecture, Role::Teacher, 1, &Device::Cpu).unwrap();
    let kept =
        |name: &str| name.starts_with("backbone.") || registers.is_none() && name.starts_with("ca_head.");
    let mut tensors: std::collections::HashMap<_, _> =
        parameters.to_tensors().into_iter().filter(|(name, _)| kept(name)).collect();
    let mut parts = OptionalParts::default();
    if let Some(registers) = registers {
        parts = OptionalParts { class_token: true, registers, layer_scale: false };
        let tokens = Tensor::randn(0_f32, 1.0, (1, 1 + registers, DIM), &Device::Cpu).unwrap();
        tensors.insert("backbone.prefix_tokens".into(), tokens);
        for (part, value) in [("weight", 1_f32), ("bias", 0.0)] {
            let norm = Tensor::full(value, DIM, &Device::Cpu).unwrap();
            tensors.insert(format!("backbone.norm.{part}"), norm);
        }
    }
    let hidden = tensors["backbone.blocks.0.mlp.fc1.weight"].dim(0).unwrap();
    let positions = ResizeRule::Offset;
    Source { architecture, hidden, parts, normalization: IMAGENET, positions, tensors, run: None }
}

/// A file taken apart.
struct Read {
    model: ModelProto,
    nodes: Vec<Node>,
    initializers: BTreeMap<String, TensorProto>,
    inputs: Vec<ValueInfo>,
    outputs: Vec<ValueInfo>,
}

/// Decodes a file and checks what holds of every graph.
fn read(bytes: &[u8]) -> Read {
    let model = ModelProto::decode(bytes).unwrap();
    let graph = GraphProto::decode(model.graph.clone().unwrap()).unwrap();
    let nodes: Vec<Node> = graph.nodes.into_iter().map(|node| Node::decode(node).unwrap()).collect();
    let mut initializers = BTreeMap::new();
    for bytes in graph.initializers {
        let tensor = TensorProto::decode(bytes).unwrap();
        let values: i64 = tensor.dims.iter().product();
        let size = match tensor.data_type {
            FLOAT => 4,
            INT8 => 1,
            _ => 8,
        };
        assert_eq!(tensor.raw_data.len() as i64, size * values, "{}", tensor.name);
        assert!(initializers.insert(tensor.name.clone(), tensor).is_none(), "an initializer twice");
    }
    let mut known: BTreeSet<&str> = initializers.keys().map(String::as_str).collect();
    known.insert("images");
    let mut read = BTreeSet::new();
    for node in &nodes {
        for input in &node.inputs {
            assert!(
                known.contains(input.as_str()),
                "`{}` reads `{input}`, which is not there yet",
                node.name
            );
            read.insert(input.as_str());
        }
        for output in &node.outputs {
            assert!(known.insert(output), "`{output}` is made twice");
        }
    }
    let unread: Vec<_> = initializers.keys().filter(|name| !read.contains(name.as_str())).collect();
    assert!(unread.is_empty(), "initializers that nothing reads: {unread:?}");
    assert_eq!(model.opset_import[0].version, 17);
    let names = |values: &[ValueInfo]| values.iter().map(|value| value.name.clone()).collect::<Vec<_>>();
    assert_eq!(
        (names(&graph.inputs), names(&graph.outputs)),
        (vec!["images".to_owned()], vec!["patch_tokens".to_owned(), "class_token".to_owned()])
    );
    for output in names(&graph.outputs) {
        assert!(known.contains(output.as_str()));
    }
    Read { model, inputs: graph.inputs, outputs: graph.outputs, nodes, initializers }
}

/// The sides of an input or output as text.
fn sides(value: &ValueInfo) -> Vec<String> {
    let tensor = value.kind.as_ref().unwrap().tensor.as_ref().unwrap();
    assert_eq!(tensor.data_type, FLOAT);
    let side = |side: &crate::onnx::Dimension| match (&side.value, &side.name) {
        (Some(value), None) => value.to_string(),
        (None, Some(name)) => name.clone(),
        other => panic!("{other:?}"),
    };
    tensor.shape.as_ref().unwrap().dims.iter().map(side).collect()
}

fn fixed(size: (usize, usize)) -> Grid {
    Grid::Fixed(size)
}

#[test]
fn a_fixed_grid_has_its_sides_in_the_file_and_an_open_one_their_names() {
    let source = source(None);
    let graph = read(&float(&source, fixed((16, 22)), PixelInput::Normalized).unwrap());
    assert_eq!(sides(&graph.inputs[0]), ["batch", "3", "16", "22"]);
    assert_eq!(sides(&graph.outputs[0]), ["batch", "20", "32"], "4 x 5 whole patches");
    assert_eq!(sides(&graph.outputs[1]), ["batch", "32"]);
    assert_eq!(graph.initializers["pos_embed"].dims, [1, 20, 32]);
    let values: Vec<f32> = graph.initializers["pos_embed"]
        .raw_data
        .as_chunks()
        .0
        .iter()
        .map(|&b| f32::from_le_bytes(b))
        .collect();
    assert_eq!(values, source.positions_of((4, 5)).unwrap());

    let graph = read(&float(&source, Grid::Dynamic, PixelInput::Normalized).unwrap());
    assert_eq!(sides(&graph.inputs[0]), ["batch", "3", "height", "width"]);
    assert_eq!(sides(&graph.outputs[0]), ["batch", "patches", "32"]);
    assert_eq!(graph.initializers["pos_embed"].dims, [3, 96], "the table of training");
}

#[test]
fn every_part_of_the_network_is_in_the_graph_once() {
    for (registers, norms, head) in
        [(None, 2 * 2 + 2 * 2 + 1, true), (Some(0), 2 * 2 + 1, false), (Some(4), 2 * 2 + 1, false)]
    {
        let source = source(registers);
        let graph = read(&float(&source, fixed((12, 12)), PixelInput::Bytes).unwrap());
        let count = |op: &str| graph.nodes.iter().filter(|node| node.op == op).count();
        assert_eq!(count("LayerNormalization"), norms);
        assert_eq!(count("Erf"), if head { 4 } else { 2 });
        assert_eq!(count("Softmax"), count("Erf"));
        assert_eq!(graph.initializers.contains_key("ca_head.cls_token"), head);
        assert_eq!(graph.initializers.contains_key("prefix_tokens"), !head);
        let input = graph.model.metadata.iter().find(|entry| entry.key == "pass.input").unwrap();
        assert_eq!(input.value, "bytes");
        // every float of the weights but the positions is there
        let weights: usize = source.tensors.values().map(Tensor::elem_count).sum();
        let written: i64 = graph
            .initializers
            .iter()
            .filter(|(name, _)| source_names(&source, name))
            .map(|(_, tensor)| tensor.dims.iter().product::<i64>())
            .sum();
        assert_eq!(written as usize, weights);
    }
}

fn source_names(source: &Source, name: &str) -> bool {
    source.tensors.contains_key(name) || source.tensors.contains_key(&format!("backbone.{name}"))
}

#[test]
fn a_size_without_a_patch_is_refused() {
    let error = float(&source(None), fixed((3, 12)), PixelInput::Normalized).unwrap_err().to_string();
    assert!(error.contains("4 pixels") && error.contains("3x12"), "{error}");
}
