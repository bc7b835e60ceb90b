//! The messages of an ONNX file, as far as weights and Vision Transformers need them.
//!
//! The numbers in the tags are those of `onnx.proto`. Graph, nodes and initializers are kept as bytes in the message around
//! them: the reader decodes them one by one, so that an error names the damaged one, and the writer encodes each once.

use prost::Message;
use prost::bytes::Bytes;

/// `TensorProto.DataType.FLOAT`
pub(crate) const FLOAT: i32 = 1;
/// `TensorProto.DataType.INT8`
pub(crate) const INT8: i32 = 3;
/// `TensorProto.DataType.INT64`
pub(crate) const INT64: i32 = 7;

/// The whole file.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct ModelProto {
    #[prost(int64, tag = "1")]
    pub(crate) ir_version: i64,
    #[prost(string, tag = "2")]
    pub(crate) producer_name: String,
    #[prost(string, tag = "3")]
    pub(crate) producer_version: String,
    /// One [`GraphProto`].
    #[prost(bytes = "bytes", optional, tag = "7")]
    pub(crate) graph: Option<Bytes>,
    #[prost(message, repeated, tag = "8")]
    pub(crate) opset_import: Vec<OperatorSet>,
    #[prost(message, repeated, tag = "14")]
    pub(crate) metadata: Vec<Entry>,
}

/// `OperatorSetIdProto`: which version of the operators the nodes mean.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct OperatorSet {
    #[prost(string, tag = "1")]
    pub(crate) domain: String,
    #[prost(int64, tag = "2")]
    pub(crate) version: i64,
}

/// `StringStringEntryProto`
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Entry {
    #[prost(string, tag = "1")]
    pub(crate) key: String,
    #[prost(string, tag = "2")]
    pub(crate) value: String,
}

/// The computation.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct GraphProto {
    /// Each a [`Node`].
    #[prost(bytes = "bytes", repeated, tag = "1")]
    pub(crate) nodes: Vec<Bytes>,
    #[prost(string, tag = "2")]
    pub(crate) name: String,
    /// Each a [`TensorProto`].
    #[prost(bytes = "bytes", repeated, tag = "5")]
    pub(crate) initializers: Vec<Bytes>,
    #[prost(message, repeated, tag = "11")]
    pub(crate) inputs: Vec<ValueInfo>,
    #[prost(message, repeated, tag = "12")]
    pub(crate) outputs: Vec<ValueInfo>,
}

/// `ValueInfoProto`: name and type of an input or output.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct ValueInfo {
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    #[prost(message, optional, tag = "2")]
    pub(crate) kind: Option<Type>,
}

/// `TypeProto` of a tensor.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Type {
    #[prost(message, optional, tag = "1")]
    pub(crate) tensor: Option<TensorType>,
}

/// `TypeProto.Tensor`
#[derive(Clone, PartialEq, Message)]
pub(crate) struct TensorType {
    #[prost(int32, tag = "1")]
    pub(crate) data_type: i32,
    #[prost(message, optional, tag = "2")]
    pub(crate) shape: Option<Shape>,
}

/// `TensorShapeProto`
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Shape {
    #[prost(message, repeated, tag = "1")]
    pub(crate) dims: Vec<Dimension>,
}

/// `TensorShapeProto.Dimension`: a number, or the name of one that is known when the graph runs.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Dimension {
    #[prost(int64, optional, tag = "1")]
    pub(crate) value: Option<i64>,
    #[prost(string, optional, tag = "2")]
    pub(crate) name: Option<String>,
}

/// `NodeProto`: one operation.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Node {
    /// Names of the values it reads; empty for an optional one left out.
    #[prost(string, repeated, tag = "1")]
    pub(crate) inputs: Vec<String>,
    /// Names of the values it makes.
    #[prost(string, repeated, tag = "2")]
    pub(crate) outputs: Vec<String>,
    #[prost(string, tag = "3")]
    pub(crate) name: String,
    /// The operator, such as `MatMul`.
    #[prost(string, tag = "4")]
    pub(crate) op: String,
    #[prost(message, repeated, tag = "5")]
    pub(crate) attributes: Vec<Attribute>,
}

/// `AttributeProto`: a named constant of an operation.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Attribute {
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    #[prost(float, optional, tag = "2")]
    pub(crate) float: Option<f32>,
    #[prost(int64, optional, tag = "3")]
    pub(crate) int: Option<i64>,
    #[prost(message, optional, tag = "5")]
    pub(crate) tensor: Option<TensorProto>,
    #[prost(int64, repeated, packed = "false", tag = "8")]
    pub(crate) ints: Vec<i64>,
    /// Which of them it is: 1 float, 2 int, 4 tensor, 7 ints.
    #[prost(int32, tag = "20")]
    pub(crate) kind: i32,
}

impl Attribute {
    /// A float.
    pub(crate) fn of_float(name: &str, value: f32) -> Self {
        Self { name: name.into(), float: Some(value), kind: 1, ..Self::default() }
    }

    /// A whole number.
    pub(crate) fn of_int(name: &str, value: i64) -> Self {
        Self { name: name.into(), int: Some(value), kind: 2, ..Self::default() }
    }

    /// Whole numbers.
    pub(crate) fn of_ints(name: &str, values: &[i64]) -> Self {
        Self { name: name.into(), ints: values.into(), kind: 7, ..Self::default() }
    }
}

/// `TensorProto`: values with a shape.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct TensorProto {
    #[prost(int64, repeated, packed = "false", tag = "1")]
    pub(crate) dims: Vec<i64>,
    #[prost(int32, tag = "2")]
    pub(crate) data_type: i32,
    #[prost(float, repeated, tag = "4")]
    pub(crate) float_data: Vec<f32>,
    #[prost(int64, repeated, tag = "7")]
    pub(crate) int64_data: Vec<i64>,
    #[prost(string, tag = "8")]
    pub(crate) name: String,
    /// Little-endian values; either these or the typed ones.
    #[prost(bytes = "bytes", tag = "9")]
    pub(crate) raw_data: Bytes,
    /// 1: the values are in another file.
    #[prost(int32, tag = "14")]
    pub(crate) data_location: i32,
}

impl TensorProto {
    /// Float32 values, row-major.
    pub(crate) fn of_floats(name: &str, dims: &[usize], values: &[f32]) -> Self {
        let raw_data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self::raw(name, dims, FLOAT, raw_data)
    }

    /// Int8 values, row-major.
    pub(crate) fn of_int8s(name: &str, dims: &[usize], values: &[i8]) -> Self {
        let raw_data: Vec<u8> = values.iter().map(|value| value.cast_unsigned()).collect();
        Self::raw(name, dims, INT8, raw_data)
    }

    /// Int64 values; no `dims` = one number.
    pub(crate) fn of_ints(name: &str, dims: &[usize], values: &[i64]) -> Self {
        let raw_data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self::raw(name, dims, INT64, raw_data)
    }

    fn raw(name: &str, dims: &[usize], data_type: i32, raw_data: Vec<u8>) -> Self {
        let dims = dims.iter().map(|&side| side as i64).collect();
        Self { name: name.into(), dims, data_type, raw_data: raw_data.into(), ..Self::default() }
    }
}
