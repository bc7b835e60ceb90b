//! An ONNX graph in the making: every value is known by its name, every initializer is written once.

use std::collections::HashSet;

use prost::Message;
use prost::bytes::Bytes;

use crate::onnx::{
    Attribute, Dimension, Entry, FLOAT, GraphProto, ModelProto, Node, OperatorSet, Shape, TensorProto,
    TensorType, Type, ValueInfo,
};

/// The oldest set of operators that has everything used here (LayerNormalization).
pub(super) const OPSET: i64 = 17;
/// The version of the file format that came with it.
const IR_VERSION: i64 = 8;

/// A side of an input or output.
#[derive(Clone, Copy)]
pub(super) enum Side<'a> {
    Of(usize),
    /// Known when the graph runs.
    Called(&'a str),
}

/// Nodes and initializers so far.
#[derive(Default)]
pub(super) struct GraphBuilder {
    nodes: Vec<Bytes>,
    initializers: Vec<Bytes>,
    names: HashSet<String>,
}

impl GraphBuilder {
    /// Adds an operation with one output, which has the name of the node.
    pub(super) fn node(&mut self, op: &str, name: &str, inputs: &[&str], attributes: &[Attribute]) -> String {
        self.node_with(op, name, inputs, &[name], attributes);
        name.to_owned()
    }

    /// Adds an operation.
    pub(super) fn node_with(
        &mut self,
        op: &str,
        name: &str,
        inputs: &[&str],
        outputs: &[&str],
        attributes: &[Attribute],
    ) {
        self.names.extend(outputs.iter().map(|&output| output.to_owned()));
        let owned = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        let node = Node {
            inputs: owned(inputs),
            outputs: owned(outputs),
            name: name.into(),
            op: op.into(),
            attributes: attributes.into(),
        };
        self.nodes.push(node.encode_to_vec().into());
    }

    /// Adds a constant, unless one of that name is there.
    pub(super) fn constant(&mut self, tensor: &TensorProto) -> String {
        if self.names.insert(tensor.name.clone()) {
            self.initializers.push(tensor.encode_to_vec().into());
        }
        tensor.name.clone()
    }

    /// Float values, row-major.
    pub(super) fn floats(&mut self, name: &str, dims: &[usize], values: &[f32]) -> String {
        self.constant(&TensorProto::of_floats(name, dims, values))
    }

    /// One float.
    pub(super) fn float(&mut self, name: &str, value: f32) -> String {
        self.floats(name, &[], &[value])
    }

    /// A list of whole numbers.
    pub(super) fn ints(&mut self, name: &str, values: &[i64]) -> String {
        self.constant(&TensorProto::of_ints(name, &[values.len()], values))
    }

    /// `x` in another shape; 0 keeps a side, -1 takes what is left.
    pub(super) fn reshape(&mut self, name: &str, x: &str, sides: &[i64]) -> String {
        let shape = self.ints(&format!("{name}.shape"), sides);
        self.node("Reshape", name, &[x, &shape], &[])
    }

    /// `x` with its axes in another order.
    pub(super) fn transpose(&mut self, name: &str, x: &str, order: &[i64]) -> String {
        self.node("Transpose", name, &[x], &[Attribute::of_ints("perm", order)])
    }

    /// The bytes of the file; inputs and outputs are float.
    pub(super) fn finish(
        self,
        inputs: &[(&str, Vec<Side<'_>>)],
        outputs: &[(&str, Vec<Side<'_>>)],
        metadata: &[(String, String)],
    ) -> Vec<u8> {
        let graph = GraphProto {
            nodes: self.nodes,
            name: "pass".into(),
            initializers: self.initializers,
            inputs: inputs.iter().map(|(name, sides)| value(name, sides)).collect(),
            outputs: outputs.iter().map(|(name, sides)| value(name, sides)).collect(),
        };
        let model = ModelProto {
            ir_version: IR_VERSION,
            producer_name: "pass-host".into(),
            producer_version: env!("CARGO_PKG_VERSION").into(),
            graph: Some(graph.encode_to_vec().into()),
            opset_import: vec![OperatorSet { domain: String::new(), version: OPSET }],
            metadata: metadata
                .iter()
                .map(|(key, value)| Entry { key: key.clone(), value: value.clone() })
                .collect(),
        };
        model.encode_to_vec()
    }
}

fn value(name: &str, sides: &[Side<'_>]) -> ValueInfo {
    let dimension = |side: &Side<'_>| match *side {
        Side::Of(side) => Dimension { value: Some(side as i64), name: None },
        Side::Called(name) => Dimension { value: None, name: Some(name.into()) },
    };
    let shape = Some(Shape { dims: sides.iter().map(dimension).collect() });
    let tensor = Some(TensorType { data_type: FLOAT, shape });
    ValueInfo { name: name.into(), kind: Some(Type { tensor }) }
}
