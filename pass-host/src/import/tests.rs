use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;
use safetensors::SafeTensors;

use super::onnx::{Graph, build};
use super::{Backbone, ImportError, ImportSettings, Origin, Problem, Sizes, Weights, dinov2, run};
use crate::onnx::{Attribute, Node, TensorProto};

const DIM: usize = 8;
const HEADS: usize = 2;
const HIDDEN: usize = 12;
const PATCH: usize = 2;
const GRID: usize = 3;
const DEPTH: usize = 2;

/// What differs between exports.
#[derive(Clone, Copy, Default)]
struct Export {
    /// Positions are one tensor with its name, not two without.
    named_positions: bool,
    /// Norms are one node, not eight.
    whole_norms: bool,
    registers: usize,
}

/// An export in the making: a tiny DINOv2 with a decoder of one convolution.
#[derive(Default)]
struct Model {
    export: Export,
    nodes: Vec<Node>,
    tensors: Vec<TensorProto>,
}

impl Model {
    fn new(export: Export) -> Self {
        let mut model = Self { export, ..Self::default() };
        let features = model.backbone();
        let decoder = model.weight("decoder.weight", &[1, DIM, 1, 1]);
        model.op("Conv", "/decoder", &[&features, &decoder]);
        model
    }

    fn file(&self) -> Vec<u8> {
        build::file(&self.nodes, &self.tensors)
    }

    fn read(&self) -> Result<Weights, Problem> {
        Graph::decode(self.file().into()).and_then(|graph| dinov2::read(&graph))
    }

    /// Adds a node; its output.
    fn op(&mut self, op: &str, name: &str, inputs: &[&str]) -> String {
        let output = format!("{name}_output_0");
        self.nodes.push(Node {
            inputs: inputs.iter().map(|&input| input.to_owned()).collect(),
            outputs: vec![output.clone()],
            name: name.to_owned(),
            op: op.to_owned(),
            attributes: Vec::new(),
        });
        output
    }

    fn attribute(&mut self, attribute: Attribute) {
        self.nodes.last_mut().unwrap().attributes.push(attribute);
    }

    /// Adds a tensor whose values differ from those of all others.
    fn weight(&mut self, name: &str, shape: &[usize]) -> String {
        let first = 1000 * self.tensors.len();
        let values: Vec<f32> = (0..shape.iter().product()).map(|i: usize| (first + i) as f32).collect();
        self.tensors.push(TensorProto::of_floats(name, shape, &values));
        name.to_owned()
    }

    fn constant(&mut self, name: &str, tensor: TensorProto) -> String {
        let output = self.op("Constant", name, &[]);
        self.attribute(Attribute { name: "value".into(), tensor: Some(tensor), ..Attribute::default() });
        output
    }

    fn linear(&mut self, name: &str, input: &str, inputs: usize, outputs: usize) -> String {
        let anonymous = format!("onnx::MatMul_{}", self.tensors.len());
        let weight = self.weight(&anonymous, &[inputs, outputs]);
        let bias = self.weight(&format!("{name}.bias"), &[outputs]);
        let product = self.op("MatMul", &format!("/{name}/MatMul"), &[input, &weight]);
        self.op("Add", &format!("/{name}/Add"), &[&bias, &product])
    }

    fn norm(&mut self, name: &str, input: &str) -> String {
        let weight = self.weight(&format!("{name}.weight"), &[DIM]);
        let bias = self.weight(&format!("{name}.bias"), &[DIM]);
        if self.export.whole_norms {
            let output = self.op("LayerNormalization", &format!("/{name}"), &[input, &weight, &bias]);
            self.attribute(Attribute { name: "epsilon".into(), float: Some(1e-6), ..Attribute::default() });
            return output;
        }
        let mut op =
            |op: &str, inputs: &[&str]| self.op(op, &format!("/{name}/{op}{}", inputs.join(",")), inputs);
        let mean = op("ReduceMean", &[input]);
        let centered = op("Sub", &[input, &mean]);
        let squares = op("Mul", &[&centered, &centered]);
        let variance = op("ReduceMean", &[&squares]);
        let epsilon = self.constant(&format!("/{name}/eps"), TensorProto::of_floats("", &[], &[1e-6]));
        let mut op =
            |op: &str, inputs: &[&str]| self.op(op, &format!("/{name}/{op}{}", inputs.join(",")), inputs);
        let variance = op("Add", &[&variance, &epsilon]);
        let deviation = op("Sqrt", &[&variance]);
        let divided = op("Div", &[&centered, &deviation]);
        let scaled = op("Mul", &[&divided, &weight]);
        op("Add", &[&scaled, &bias])
    }

    fn embeddings(&mut self) -> String {
        let class_token = self.weight("backbone.embeddings.cls_token", &[1, 1, DIM]);
        let name = "backbone.embeddings.patch_embeddings.projection";
        let weight = self.weight(&format!("{name}.weight"), &[DIM, 3, PATCH, PATCH]);
        let bias = self.weight(&format!("{name}.bias"), &[DIM]);
        let patches = self.op("Conv", "/patches", &["images", &weight, &bias]);
        let strides = vec![PATCH as i64; 2];
        self.attribute(Attribute { name: "strides".into(), ints: strides, ..Attribute::default() });
        let patches = self.op("Transpose", "/patches/Transpose", &[&patches]);
        let class_token = self.op("Expand", "/class", &[&class_token, "batch_shape"]);
        let tokens = self.op("Concat", "/tokens", &[&class_token, &patches]);
        let positions = if self.export.named_positions {
            self.weight("backbone.embeddings.position_embeddings", &[1, 1 + GRID * GRID, DIM])
        } else {
            let class = self.weight("onnx::Concat_1", &[1, 1, DIM]);
            let grid = self.weight("onnx::Reshape_2", &[1, GRID * GRID, DIM]);
            let grid = self.op("Reshape", "/positions/Reshape", &[&grid, "grid_shape"]);
            let grid = self.op("Resize", "/positions/Resize", &[&grid, "", "", "size"]);
            self.op("Concat", "/positions", &[&class, &grid])
        };
        let embedded = self.op("Add", "/embedded", &[&tokens, &positions]);
        if self.export.registers == 0 {
            return embedded;
        }
        let registers = self.weight("backbone.embeddings.register_tokens", &[1, self.export.registers, DIM]);
        self.op("Concat", "/with_registers", &[&embedded, &registers, &embedded])
    }

    fn block(&mut self, index: usize, start: &str) -> String {
        let name = format!("backbone.encoder.layer.{index}");
        let normed = self.norm(&format!("{name}.norm1"), start);
        // the order of real exports: what leads to a tensor is its bias, never its place
        let [key, value, query] = ["key", "value", "query"].map(|part| {
            let output = self.linear(&format!("{name}.attention.attention.{part}"), &normed, DIM, DIM);
            let count = self
                .constant(&format!("/{index}/{part}/heads"), TensorProto::of_ints("", &[1], &[HEADS as i64]));
            let width = self.constant(
                &format!("/{index}/{part}/width"),
                TensorProto::of_ints("", &[1], &[(DIM / HEADS) as i64]),
            );
            let shape =
                self.op("Concat", &format!("/{index}/{part}/shape"), &["batch", "tokens", &count, &width]);
            self.op("Reshape", &format!("/{index}/{part}"), &[&output, &shape])
        });
        let scores = self.op("MatMul", &format!("/{index}/scores"), &[&query, &key]);
        let weights = self.op("Softmax", &format!("/{index}/softmax"), &[&scores]);
        let attended = self.op("MatMul", &format!("/{index}/attended"), &[&weights, &value]);
        let made = self.linear(&format!("{name}.attention.output.dense"), &attended, DIM, DIM);
        let middle = self.scaled_residual(&format!("{name}.layer_scale1.lambda1"), &made, start);

        let normed = self.norm(&format!("{name}.norm2"), &middle);
        let hidden = self.linear(&format!("{name}.mlp.fc1"), &normed, DIM, HIDDEN);
        let erf = self.op("Erf", &format!("/{index}/erf"), &[&hidden]);
        let active = self.op("Mul", &format!("/{index}/gelu"), &[&hidden, &erf]);
        let made = self.linear(&format!("{name}.mlp.fc2"), &active, HIDDEN, DIM);
        self.scaled_residual(&format!("{name}.layer_scale2.lambda1"), &made, &middle)
    }

    fn scaled_residual(&mut self, name: &str, made: &str, start: &str) -> String {
        let gamma = self.weight(name, &[DIM]);
        let scaled = self.op("Mul", &format!("/{name}/Mul"), &[made, &gamma]);
        self.op("Add", &format!("/{name}/Add"), &[&scaled, start])
    }

    fn backbone(&mut self) -> String {
        let mut stream = self.embeddings();
        for index in 0..DEPTH {
            stream = self.block(index, &stream);
        }
        self.norm("backbone.layernorm", &stream)
    }

    fn tensor(&mut self, name: &str) -> &mut TensorProto {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
    }

    fn node(&mut self, name: &str) -> &mut Node {
        self.nodes.iter_mut().find(|node| node.name == name).unwrap()
    }

    /// The values of the weight of a linear layer, `[in, out]`.
    fn stored(&self, bias: &str) -> Vec<f32> {
        let at = self.tensors.iter().position(|tensor| tensor.name == bias).unwrap();
        self.tensors[at - 1].floats().unwrap()
    }
}

/// `[in, out]` -> `[out, in]`, spelled out.
fn transposed(stored: &[f32], inputs: usize, outputs: usize) -> Vec<f32> {
    let mut weight = vec![0.0; stored.len()];
    for input in 0..inputs {
        for output in 0..outputs {
            weight[output * inputs + input] = stored[input * outputs + output];
        }
    }
    weight
}

/// The error of a changed model, causes included.
fn error_of(change: impl FnOnce(&mut Model)) -> String {
    let mut model = Model::new(Export::default());
    change(&mut model);
    model.read().expect_err("the changed model is refused").to_string()
}

fn settings(source: PathBuf, out: PathBuf) -> ImportSettings {
    ImportSettings { source, from: Origin::Dinov2Onnx, out, network: None, heads: None, grid: None }
}

#[test]
fn every_tensor_gets_its_name_shape_and_values() {
    let model = Model::new(Export::default());
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("f.onnx"), dir.path().join("f.safetensors"));
    fs::write(&source, model.file()).unwrap();
    let imported = run(&settings(source, out.clone())).unwrap();

    let sizes = Backbone {
        dim: DIM,
        depth: DEPTH,
        heads: HEADS,
        hidden: HIDDEN,
        patch_size: PATCH,
        grid: GRID,
        registers: 0,
        class_token: true,
        layer_scale: true,
        final_norm: true,
    };
    assert_eq!(imported.backbone, Sizes::Vit(sizes));
    assert_eq!((imported.used, imported.found), (7 + 18 * DEPTH, 7 + 18 * DEPTH));
    assert_eq!(imported.left_out, ["decoder.weight"]);
    assert_eq!(imported.tensors, 6 + 14 * DEPTH);

    let file = fs::read(out).unwrap();
    let (_, header) = SafeTensors::read_metadata(&file).unwrap();
    let metadata = header.metadata().clone().unwrap();
    assert_eq!((&*metadata["format"], &*metadata["heads"], &*metadata["patch_size"]), ("pt", "2", "2"));
    let written: BTreeMap<String, (Vec<usize>, Vec<f32>)> = (SafeTensors::deserialize(&file).unwrap().iter())
        .map(|(name, view)| {
            let values = view.data().as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
            (name.to_owned(), (view.shape().to_vec(), values))
        })
        .collect();

    let source =
        |name: &str| model.tensors.iter().find(|tensor| tensor.name == name).unwrap().floats().unwrap();
    let mut expected = BTreeMap::new();
    let mut expect = |name: String, shape: &[usize], values: Vec<f32>| {
        expected.insert(name, (shape.to_vec(), values));
    };
    let embeddings = "backbone.embeddings";
    expect("cls_token".into(), &[1, 1, DIM], source(&format!("{embeddings}.cls_token")));
    let positions = [source("onnx::Concat_1"), source("onnx::Reshape_2")].concat();
    expect("pos_embed".into(), &[1, 1 + GRID * GRID, DIM], positions);
    let projection = format!("{embeddings}.patch_embeddings.projection");
    let values = source(&format!("{projection}.weight"));
    expect("patch_embed.proj.weight".into(), &[DIM, 3, PATCH, PATCH], values);
    expect("patch_embed.proj.bias".into(), &[DIM], source(&format!("{projection}.bias")));
    for part in ["weight", "bias"] {
        expect(format!("norm.{part}"), &[DIM], source(&format!("backbone.layernorm.{part}")));
    }
    for i in 0..DEPTH {
        let from = format!("backbone.encoder.layer.{i}");
        for norm in ["norm1", "norm2"] {
            for part in ["weight", "bias"] {
                let values = source(&format!("{from}.{norm}.{part}"));
                expect(format!("blocks.{i}.{norm}.{part}"), &[DIM], values);
            }
        }
        let (mut weight, mut bias) = (Vec::new(), Vec::new());
        for part in ["query", "key", "value"] {
            let name = format!("{from}.attention.attention.{part}.bias");
            weight.extend(transposed(&model.stored(&name), DIM, DIM));
            bias.extend(source(&name));
        }
        expect(format!("blocks.{i}.attn.qkv.weight"), &[3 * DIM, DIM], weight);
        expect(format!("blocks.{i}.attn.qkv.bias"), &[3 * DIM], bias);
        for (to, name, inputs, outputs) in [
            ("attn.proj", "attention.output.dense", DIM, DIM),
            ("mlp.fc1", "mlp.fc1", DIM, HIDDEN),
            ("mlp.fc2", "mlp.fc2", HIDDEN, DIM),
        ] {
            let name = format!("{from}.{name}.bias");
            let weight = transposed(&model.stored(&name), inputs, outputs);
            expect(format!("blocks.{i}.{to}.weight"), &[outputs, inputs], weight);
            expect(format!("blocks.{i}.{to}.bias"), &[outputs], source(&name));
        }
        for part in [1, 2] {
            let values = source(&format!("{from}.layer_scale{part}.lambda1"));
            expect(format!("blocks.{i}.ls{part}.gamma"), &[DIM], values);
        }
    }
    assert_eq!(written, expected);
}

#[test]
fn the_same_weights_come_out_of_every_kind_of_export() {
    for named_positions in [false, true] {
        for whole_norms in [false, true] {
            for registers in [0, 3] {
                let weights = Model::new(Export { named_positions, whole_norms, registers }).read().unwrap();
                assert!(matches!(weights.backbone, Sizes::Vit(sizes) if sizes.registers == registers));
                assert_eq!(weights.used, weights.found);
                assert_eq!(weights.tensors.len(), 6 + 14 * DEPTH + usize::from(registers > 0));
                let tokens = weights.tensors.iter().find(|tensor| tensor.name == "reg_token");
                assert_eq!(
                    tokens.map(|tensor| tensor.shape.clone()),
                    (registers > 0).then(|| vec![1, registers, DIM])
                );
            }
        }
    }
}

#[test]
fn typed_values_are_read_like_raw_ones() {
    let plain = Model::new(Export::default());
    let mut typed = Model::new(Export::default());
    for tensor in &mut typed.tensors {
        tensor.float_data = tensor.floats().unwrap();
        tensor.raw_data = Vec::new().into();
    }
    let values = |model: &Model| -> Vec<Vec<f32>> {
        model.read().unwrap().tensors.into_iter().map(|tensor| tensor.values).collect()
    };
    assert_eq!(values(&plain), values(&typed));
}

#[test]
fn a_missing_tensor_is_named() {
    let whole = Model::new(Export::default());
    for (index, tensor) in whole.tensors.iter().enumerate().filter(|(_, t)| t.name != "decoder.weight") {
        let error = error_of(|model| {
            model.tensors.remove(index);
        });
        // an anonymous position tensor is missed where its last form is made
        let name = tensor.name.strip_prefix("backbone.").unwrap_or(&tensor.name);
        assert!(error.contains(name), "{}: {error}", tensor.name);
    }
}

#[test]
fn a_missing_block_is_named() {
    let error = error_of(|model| model.tensors.retain(|tensor| !tensor.name.contains("layer.0.")));
    assert!(error.contains("`backbone.encoder.layer.0."), "{error}");
}

#[test]
fn a_missing_node_is_an_error() {
    let nodes = Model::new(Export::default()).nodes;
    // nothing that is read leads through these
    let unread = ["/decoder", "ReduceMean", "/patches/Transpose", "key/shape", "value/shape"];
    let unread = |name: &str| unread.iter().any(|part| name.contains(part)) || name.contains("/Mul/backbone");
    for (index, node) in nodes.iter().enumerate() {
        let mut model = Model::new(Export::default());
        model.nodes.remove(index);
        let read = model.read();
        let weights_part = ["Conv", "MatMul", "Add", "Softmax", "Erf", "Concat"].contains(&node.op.as_str());
        assert!(!weights_part || unread(&node.name) || read.is_err(), "without `{}`", node.name);
    }
}

#[test]
fn wrong_tensors_are_named_with_what_was_expected() {
    let gamma = "backbone.encoder.layer.1.layer_scale1.lambda1";
    let case = |change: &dyn Fn(&mut TensorProto), expected: &str| {
        let error = error_of(|model| change(model.tensor(gamma)));
        assert!(error.contains(gamma) && error.contains(expected), "{error}");
    };
    case(&|t| t.dims = vec![9], "shape: expected [8], found [9]");
    case(&|t| t.dims = vec![2, 4], "shape: expected [8], found [2, 4]");
    case(&|t| t.dims = vec![-8], "dims: expected sides whose product fits in memory, found [-8]");
    case(&|t| t.dims = vec![i64::MAX, 2, 3], "dims:");
    case(&|t| t.dims = vec![1 << 62], "dims:");
    case(
        &|t| t.raw_data = t.raw_data.slice(1..),
        "raw_data: expected 32 bytes for shape [8], found 31 bytes",
    );
    case(&|t| t.raw_data = Vec::new().into(), "float_data: expected 8 values for shape [8], found 0");
    case(&|t| t.data_type = 10, "data_type: expected 1 (float32), found 10");
    case(&|t| t.data_location = 1, "external data");
    case(
        &|t| *t = TensorProto::of_floats(gamma, &[8], &[1.0, f32::NAN, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
        "found NaN as value 1",
    );
    case(&|t| t.name.push('2'), "is missing");
}

#[test]
fn wrong_wiring_is_an_error() {
    let layer = "/backbone.encoder.layer.1";
    let case = |change: &dyn Fn(&mut Model), expected: &str| {
        let error = error_of(|model| change(model));
        assert!(error.contains(expected), "{error}");
    };
    // the queries of one block read the norm of another
    case(
        &|m| {
            let other =
                m.node("/backbone.encoder.layer.0.attention.attention.query/MatMul").inputs[0].clone();
            m.node(&format!("{layer}.attention.attention.query/MatMul")).inputs[0] = other;
        },
        "layer.1.attention.attention.query.bias`: input of its layer",
    );
    // two layers share a weight
    case(
        &|m| {
            let other = m.node(&format!("{layer}.attention.attention.query/MatMul")).inputs[1].clone();
            m.node(&format!("{layer}.attention.output.dense/MatMul")).inputs[1] = other;
        },
        "read by: expected one layer",
    );
    case(
        &|m| m.node("/1/erf").op = "Tanh".into(),
        "mlp.fc2.bias`: operations before it: expected with Erf or Gelu",
    );
    case(
        &|m| m.node("/1/query/heads").attributes[0].tensor = Some(TensorProto::of_ints("", &[1], &[3])),
        "heads times their width",
    );
    case(&|m| m.node("/patches").attributes[0].ints = vec![1, 2], "strides [2, 2], found [1, 2]");
    case(
        &|m| {
            let epsilon = Some(TensorProto::of_floats("", &[], &[1e-5]));
            m.node("/backbone.layernorm/eps").attributes[0].tensor = epsilon;
        },
        "`backbone.layernorm.weight`: epsilon of its norm: expected 1e-6, found",
    );
    case(
        &|m| m.nodes.iter_mut().for_each(|n| n.inputs.clear()),
        "read by: expected one Conv, found no reader",
    );
    case(&|m| m.nodes.iter_mut().for_each(|n| n.outputs.clear()), "outputs");
}

#[test]
fn weights_that_nothing_accounts_for_are_an_error() {
    let extra = |name: &'static str, at: &'static str| {
        error_of(move |model| {
            let weight = model.weight(name, &[DIM]);
            if !at.is_empty() {
                model.node(at).inputs.push(weight);
            }
        })
    };
    for (name, at) in [("onnx::Mul_77", "/1/softmax"), ("backbone.encoder.layer.1.attention.gate", "")] {
        let error = extra(name, at);
        assert_eq!(error, format!("tensor `{name}` belongs to the backbone, but to no layer known here"));
    }
    let mut model = Model::new(Export::default());
    model.weight("backbone.embeddings.mask_token", &[1, DIM]);
    assert_eq!(model.read().unwrap().left_out, ["backbone.embeddings.mask_token", "decoder.weight"]);
}

#[test]
fn names_used_twice_are_an_error() {
    let error = error_of(|model| model.tensors.push(model.tensors[3].clone()));
    assert!(error.starts_with("two initializers are called"), "{error}");
    let error = error_of(|model| model.nodes.push(model.nodes[3].clone()));
    assert!(error.starts_with("two values are called"), "{error}");
}

#[test]
fn registers_of_no_number_are_an_error() {
    let error = error_of(|model| {
        model.weight("backbone.embeddings.register_tokens", &[1, 0, DIM]);
    });
    assert_eq!(error, "`backbone.embeddings.register_tokens`: registers: expected 1 or more, found none");
}

#[test]
fn a_graph_in_a_circle_ends() {
    let error = error_of(|model| {
        let output = model.node("/positions/Resize").outputs[0].clone();
        model.node("/positions/Reshape").inputs[0] = output;
    });
    assert!(error.contains("found itself"), "{error}");
}

#[test]
fn counts_beyond_any_model_are_refused() {
    let nodes = vec![Node::default(); (1 << 18) + 1];
    let error = Graph::decode(build::file(&nodes, &[]).into()).unwrap_err().to_string();
    assert_eq!(error, "the graph has 262145 nodes, more than 262144");
}

#[test]
fn every_truncation_is_an_error_and_writes_nothing() {
    let file = Model::new(Export::default()).file();
    for length in 0..file.len() {
        let cut = file[..length].to_vec();
        assert!(Graph::decode(cut.into()).and_then(|graph| dinov2::read(&graph)).is_err(), "{length} bytes");
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("cut.onnx"), dir.path().join("f.safetensors"));
    fs::write(&source, &file[..file.len() / 2]).unwrap();
    let error = run(&settings(source, out)).unwrap_err();
    assert!(
        matches!(&error, ImportError::Content { path, source: Problem::Damaged { .. }, .. } if path.ends_with("cut.onnx"))
    );
    assert!(error.hint().is_some());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing was written");
}

proptest! {
    #[test]
    fn random_bytes_are_an_error(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(Graph::decode(bytes.into()).and_then(|graph| dinov2::read(&graph)).is_err());
    }

    #[test]
    fn random_bytes_as_a_graph_are_an_error(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
        let mut file = vec![7 << 3 | 2, bytes.len() as u8];
        file.extend(bytes);
        prop_assert!(Graph::decode(file.into()).and_then(|graph| dinov2::read(&graph)).is_err());
    }

    /// Whatever a damaged file still gives has as many values as its shapes say.
    #[test]
    fn damaged_bytes_never_give_wrong_shapes(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let mut file = Model::new(Export::default()).file();
        for (at, byte) in changes {
            let at = at.index(file.len());
            file[at] = byte;
        }
        if let Ok(weights) = Graph::decode(file.into()).and_then(|graph| dinov2::read(&graph)) {
            for tensor in weights.tensors {
                prop_assert_eq!(tensor.shape.iter().product::<usize>(), tensor.values.len());
            }
        }
    }
}
