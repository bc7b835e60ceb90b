//! ONNX files as they are read: the values of tensors, and the graph around them.
//!
//! Graph, nodes and initializers are decoded one by one from slices of the file, so that an error names the damaged one and the
//! values are never copied before they are checked.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use prost::Message;
use prost::bytes::Bytes;

use super::error::Problem;
use crate::onnx::{Attribute, FLOAT, GraphProto, INT64, ModelProto, Node, TensorProto};

/// The largest real exports have some ten thousand nodes; more is damage, and would take memory before it is noticed.
const MOST_ITEMS: usize = 1 << 18;

impl TensorProto {
    /// The shape, if it is one: no negative side, and a number of bytes that fits in memory.
    pub(super) fn shape(&self) -> Result<Vec<usize>, Problem> {
        let sides: Option<Vec<usize>> = self.dims.iter().map(|&side| usize::try_from(side).ok()).collect();
        sides.filter(|sides| count(sides).is_some()).ok_or_else(|| {
            Problem::unexpected(
                &self.name,
                "dims",
                "sides whose product fits in memory",
                format!("{:?}", self.dims),
            )
        })
    }

    /// The values, row-major; exactly as many as the shape says, all of them finite.
    pub(super) fn floats(&self) -> Result<Vec<f32>, Problem> {
        let shape = self.shape()?;
        let values = count(&shape).unwrap_or_default();
        let differs = |field, expected: String, found: String| {
            Err(Problem::unexpected(&self.name, field, expected, found))
        };
        if self.data_type != FLOAT {
            return differs("data_type", format!("{FLOAT} (float32)"), self.data_type.to_string());
        }
        if self.data_location != 0 {
            return Err(Problem::External { name: self.name.clone() });
        }
        let floats: Vec<f32> = if self.raw_data.is_empty() {
            if self.float_data.len() != values {
                let found = format!("{}, and no raw_data", self.float_data.len());
                return differs("float_data", format!("{values} values for shape {shape:?}"), found);
            }
            self.float_data.clone()
        } else {
            if self.raw_data.len() != 4 * values {
                let expected = format!("{} bytes for shape {shape:?}", 4 * values);
                return differs("raw_data", expected, format!("{} bytes", self.raw_data.len()));
            }
            self.raw_data.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
        };
        match floats.iter().position(|value| !value.is_finite()) {
            Some(at) => differs("values", "finite numbers".into(), format!("{} as value {at}", floats[at])),
            None => Ok(floats),
        }
    }

    /// The values of a small integer tensor, such as a shape; `None` if it is none.
    fn ints(&self) -> Option<Vec<i64>> {
        let values = count(&self.shape().ok()?)?;
        let ints: Vec<i64> = if self.raw_data.is_empty() {
            self.int64_data.clone()
        } else {
            self.raw_data.as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect()
        };
        (self.data_type == INT64 && ints.len() == values).then_some(ints)
    }

    /// Whether these are numbers of the computation (a shape, an index, a divisor) and no weights.
    pub(super) fn is_constant(&self) -> bool {
        self.data_type != FLOAT || self.shape().is_ok_and(|shape| shape.is_empty() || shape == [1])
    }
}

/// The number of f32 values of a shape, if their bytes can be counted.
fn count(shape: &[usize]) -> Option<usize> {
    let values = shape.iter().try_fold(1_usize, |product, &side| product.checked_mul(side))?;
    values.checked_mul(4).map(|_| values)
}

/// A computation: operations that read and make named values, and the values it starts from.
#[derive(Debug)]
pub(super) struct Graph {
    nodes: Vec<Node>,
    initializers: BTreeMap<String, TensorProto>,
    /// Value -> the node that makes it.
    producers: HashMap<String, usize>,
    /// Value -> the nodes that read it.
    consumers: HashMap<String, Vec<usize>>,
}

impl Graph {
    /// Decodes a whole ONNX file.
    pub(super) fn decode(file: Bytes) -> Result<Self, Problem> {
        let damaged = |what: &str| {
            let what = what.to_owned();
            |source| Problem::Damaged { what, source }
        };
        let model = ModelProto::decode(file).map_err(damaged("model"))?;
        let graph = model.graph.ok_or(Problem::NoGraph)?;
        let graph = GraphProto::decode(graph).map_err(damaged("field `graph` of the model"))?;
        for (what, found) in [("nodes", graph.nodes.len()), ("initializers", graph.initializers.len())] {
            if found > MOST_ITEMS {
                return Err(Problem::TooMany { what, found, limit: MOST_ITEMS });
            }
        }
        let mut initializers = BTreeMap::new();
        for (index, bytes) in graph.initializers.into_iter().enumerate() {
            let tensor = TensorProto::decode(bytes).map_err(damaged(&format!("initializer {index}")))?;
            let name = tensor.name.clone();
            if initializers.insert(name.clone(), tensor).is_some() {
                return Err(Problem::Duplicate { what: "initializers", name });
            }
        }
        let mut nodes: Vec<Node> = Vec::with_capacity(graph.nodes.len());
        let (mut producers, mut consumers) = (HashMap::new(), HashMap::<String, Vec<usize>>::new());
        for (index, bytes) in graph.nodes.into_iter().enumerate() {
            let node = Node::decode(bytes).map_err(damaged(&format!("node {index}")))?;
            for output in node.outputs.iter().filter(|output| !output.is_empty()) {
                if producers.insert(output.clone(), index).is_some() || initializers.contains_key(output) {
                    return Err(Problem::Duplicate { what: "values", name: output.clone() });
                }
            }
            for input in &node.inputs {
                consumers.entry(input.clone()).or_default().push(index);
            }
            nodes.push(node);
        }
        Ok(Self { nodes, initializers, producers, consumers })
    }

    /// Every initializer by its name.
    pub(super) fn initializers(&self) -> &BTreeMap<String, TensorProto> {
        &self.initializers
    }

    /// The initializer of that name.
    pub(super) fn initializer(&self, name: &str) -> Result<&TensorProto, Problem> {
        self.initializers.get(name).ok_or_else(|| Problem::Missing { name: name.to_owned() })
    }

    /// The only node that reads `value` with one of the operators `ops`.
    pub(super) fn consumer(&self, value: &str, ops: &[&str]) -> Result<&Node, Problem> {
        let all = self.consumers.get(value).map(Vec::as_slice).unwrap_or_default();
        let mut fitting = all.iter().map(|&i| &self.nodes[i]).filter(|node| ops.contains(&node.op.as_str()));
        match (fitting.next(), fitting.next()) {
            (Some(node), None) => Ok(node),
            (first, _) => {
                let found: BTreeSet<&str> = all.iter().map(|&i| self.nodes[i].op.as_str()).collect();
                let found = match first {
                    Some(_) => format!("several among {found:?}"),
                    None if found.is_empty() => "no reader".into(),
                    None => format!("only {found:?}"),
                };
                Err(Problem::unexpected(value, "read by", format!("one {}", ops.join(" or ")), found))
            }
        }
    }

    /// The node that makes `value`, which has one of the operators `ops`.
    pub(super) fn producer(&self, value: &str, ops: &[&str]) -> Result<&Node, Problem> {
        let node = self.maker(value);
        node.filter(|node| ops.contains(&node.op.as_str())).ok_or_else(|| {
            let found = node.map_or("no node".into(), |node| format!("{} `{}`", node.op, node.name));
            Problem::unexpected(value, "made by", ops.join(" or "), found)
        })
    }

    /// The node that makes `value`, if one does.
    pub(super) fn maker(&self, value: &str) -> Option<&Node> {
        self.producers.get(value).map(|&index| &self.nodes[index])
    }

    /// Every value and every node on the way back from `value`, not going past the values in `stops`.
    pub(super) fn behind<'a>(&'a self, value: &'a str, stops: &[&str]) -> Behind<'a> {
        let mut behind = Behind { values: BTreeSet::from([value]), ops: BTreeSet::new() };
        let mut open = vec![value];
        while let Some(value) = open.pop() {
            if stops.contains(&value) {
                continue;
            }
            if let Some(node) = self.maker(value) {
                behind.ops.insert(&node.op);
                open.extend(
                    node.inputs.iter().map(String::as_str).filter(|input| behind.values.insert(input)),
                );
            }
        }
        behind
    }

    /// The integers of an initializer or of a `Constant` node.
    pub(super) fn ints(&self, value: &str) -> Option<Vec<i64>> {
        self.constant(value)?.ints()
    }

    /// The only value of an initializer or of a `Constant` node.
    pub(super) fn scalar(&self, value: &str) -> Option<f32> {
        let values = self.constant(value)?.floats().ok()?;
        (values.len() == 1).then(|| values[0])
    }

    fn constant(&self, value: &str) -> Option<&TensorProto> {
        self.initializers.get(value).or_else(|| {
            let node = self.maker(value).filter(|node| node.op == "Constant")?;
            node.attribute("value")?.tensor.as_ref()
        })
    }
}

/// What lies on the way back from a value.
pub(super) struct Behind<'a> {
    pub(super) values: BTreeSet<&'a str>,
    pub(super) ops: BTreeSet<&'a str>,
}

impl Node {
    /// The attribute of that name.
    pub(super) fn attribute(&self, name: &str) -> Option<&Attribute> {
        self.attributes.iter().find(|attribute| attribute.name == name)
    }

    /// The input at `index`.
    pub(super) fn input(&self, index: usize) -> Result<&str, Problem> {
        self.inputs
            .get(index)
            .map(String::as_str)
            .ok_or_else(|| self.sized("inputs", index, self.inputs.len()))
    }

    /// The first output.
    pub(super) fn output(&self) -> Result<&str, Problem> {
        self.outputs.first().map(String::as_str).ok_or_else(|| self.sized("outputs", 0, 0))
    }

    /// The input of an operation with two that is not `value`.
    pub(super) fn other_input(&self, value: &str) -> Result<&str, Problem> {
        match self.inputs.as_slice() {
            [a, b] if b == value && a != value => Ok(a),
            [a, b] if a == value && b != value => Ok(b),
            inputs => {
                let expected = format!("`{value}` and one more");
                Err(Problem::unexpected(&self.name, "inputs", expected, format!("{inputs:?}")))
            }
        }
    }

    fn sized(&self, field: &'static str, index: usize, found: usize) -> Problem {
        Problem::unexpected(&self.name, field, format!("at least {}", index + 1), found.to_string())
    }
}

#[cfg(test)]
pub(super) mod build {
    //! ONNX files for tests, from the same messages.

    use super::*;

    /// The bytes of a file with these nodes and initializers.
    pub(crate) fn file(nodes: &[Node], initializers: &[TensorProto]) -> Vec<u8> {
        let graph = GraphProto {
            nodes: nodes.iter().map(|node| node.encode_to_vec().into()).collect(),
            initializers: initializers.iter().map(|tensor| tensor.encode_to_vec().into()).collect(),
            ..GraphProto::default()
        };
        let graph = Some(graph.encode_to_vec().into());
        ModelProto { graph, ..ModelProto::default() }.encode_to_vec()
    }
}
