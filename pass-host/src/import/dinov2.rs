//! DINOv2 backbones of `transformers` in an ONNX graph.
//!
//! Biases, norms and layer scales keep their names in the export; the weights of linear layers do not, and are stored
//! `[in, out]`. They are found from their biases: the `Add` that reads the bias adds it to the `MatMul` that reads the
//! weight. The walk follows the features from the images to the final norm, so that a tensor in another place than its
//! name says is an error, as is one that nothing here asks for.

use std::collections::BTreeSet;

use super::error::Problem;
use super::onnx::Graph;
use super::{Backbone, Sizes, Weight, Weights};
use crate::model::LAYER_NORM_EPS;
use crate::onnx::Node;

/// Of the pretraining only: takes the place of hidden patches, and features never contain it.
const MASK_TOKEN: &str = "embeddings.mask_token";
/// Beginnings of the names in a backbone.
const PARTS: [&str; 3] = ["embeddings.", "encoder.", "layernorm."];
/// Width of a head in every released DINOv2.
const HEAD_DIM: usize = 64;

/// The backbone in `graph`, under timm's names.
pub(super) fn read(graph: &Graph) -> Result<Weights, Problem> {
    let prefix = prefix(graph)?;
    let mut walk = Walk { graph, prefix, dim: 0, used: BTreeSet::new(), tensors: Vec::new() };
    let (features, backbone) = walk.backbone()?;
    let (found, left_out) = walk.account(&features)?;
    Ok(Weights {
        backbone: Sizes::Vit(backbone),
        tensors: walk.tensors,
        used: walk.used.len(),
        found,
        left_out,
        notes: Vec::new(),
        metadata: super::timm_metadata(&backbone),
        usage: super::usage(&backbone),
    })
}

/// What stands before the names of the backbone, such as `backbone.`.
fn prefix(graph: &Graph) -> Result<&str, Problem> {
    const CLASS_TOKEN: &str = "embeddings.cls_token";
    let mut prefixes = (graph.initializers().keys())
        .filter_map(|name| name.strip_suffix(CLASS_TOKEN))
        .filter(|prefix| prefix.is_empty() || prefix.ends_with('.'));
    match (prefixes.next(), prefixes.next()) {
        (Some(prefix), None) => Ok(prefix),
        (None, _) => Err(Problem::Missing { name: CLASS_TOKEN.into() }),
        (Some(a), Some(b)) => {
            Err(Problem::unexpected(CLASS_TOKEN, "backbones", "one", format!("`{a}` and `{b}`")))
        }
    }
}

struct Walk<'a> {
    graph: &'a Graph,
    prefix: &'a str,
    dim: usize,
    /// Initializers that became part of a tensor.
    used: BTreeSet<String>,
    tensors: Vec<Weight>,
}

/// A linear layer: its tensors in timm's layout, and the values of the graph before and after it.
struct Linear<'a> {
    /// `[out, in]`
    weight: Vec<f32>,
    bias: Vec<f32>,
    input: &'a str,
    output: &'a str,
}

impl<'a> Walk<'a> {
    /// Walks from the images to the final norm; gives the name of its output, and the sizes.
    fn backbone(&mut self) -> Result<(String, Backbone), Problem> {
        let class_token = self.name("embeddings.cls_token");
        self.dim = self.last_side(&class_token)?;
        let dim = self.dim;
        let values = self.take(&class_token, &[1, 1, dim])?;
        self.give("cls_token", &[1, 1, dim], values);
        let registers = self.registers()?;
        let patch_size = self.patch_embedding()?;
        let (embedded, grid) = self.positions(&class_token)?;

        let depth = self.depth()?;
        let hidden = self.last_side(&self.name("encoder.layer.0.mlp.fc1.bias"))?;
        let mut heads: Option<usize> = None;
        let mut stream: Option<&str> = None;
        for index in 0..depth {
            let (before, after, found) = self.block(index, hidden)?;
            let start = format!("{}encoder.layer.{index}.norm1", self.prefix);
            match stream {
                None if self.graph.behind(before, &[embedded]).values.contains(embedded) => {}
                None => return Err(differs(&start, "input", embedded, before)),
                Some(stream) if stream == before => {}
                Some(stream) => return Err(differs(&start, "input", stream, before)),
            }
            if heads.is_some_and(|heads| heads != found) {
                let expected = heads.unwrap_or_default().to_string();
                return Err(Problem::unexpected(&start, "heads of its block", expected, found.to_string()));
            }
            (heads, stream) = (Some(found), Some(after));
        }

        let (before, features) = self.norm("layernorm", "norm")?;
        match stream {
            Some(stream) if stream != before => {
                return Err(differs(&self.name("layernorm"), "input", stream, before));
            }
            _ => {}
        }
        let heads = heads.unwrap_or_default();
        let backbone = Backbone {
            dim,
            depth,
            heads,
            hidden,
            patch_size,
            grid,
            registers,
            class_token: true,
            layer_scale: true,
            final_norm: true,
        };
        Ok((features.to_owned(), backbone))
    }

    /// `reg_token`, if there is one; the number of registers.
    fn registers(&mut self) -> Result<usize, Problem> {
        let name = self.name("embeddings.register_tokens");
        let Some(tensor) = self.graph.initializers().get(&name) else { return Ok(0) };
        let registers = tensor.shape()?.get(1).copied().unwrap_or_default();
        if registers == 0 {
            return Err(differs(&name, "registers", "1 or more", "none"));
        }
        let shape = [1, registers, self.dim];
        let values = self.take(&name, &shape)?;
        self.give("reg_token", &shape, values);
        Ok(registers)
    }

    /// `patch_embed.proj`: a convolution whose steps are as large as its kernel; the side of a patch.
    fn patch_embedding(&mut self) -> Result<usize, Problem> {
        let weight = self.name("embeddings.patch_embeddings.projection.weight");
        let bias = self.name("embeddings.patch_embeddings.projection.bias");
        let side = self.last_side(&weight)?;
        let conv = self.graph.consumer(&weight, &["Conv"])?;
        if conv.input(1)? != weight || conv.input(2)? != bias {
            return Err(differs(
                &conv.name,
                "inputs",
                &format!("`{weight}`, `{bias}`"),
                &conv.inputs.join(", "),
            ));
        }
        let step = i64::try_from(side).unwrap_or_default();
        for (name, expected, default) in [
            ("strides", vec![step; 2], vec![1; 2]),
            ("pads", vec![0; 4], vec![0; 4]),
            ("dilations", vec![1; 2], vec![1; 2]),
        ] {
            let found = conv.attribute(name).map_or(default, |attribute| attribute.ints.clone());
            if found != expected {
                let (expected, found) = (format!("{name} {expected:?}"), format!("{found:?}"));
                return Err(Problem::unexpected(&conv.name, "attributes", expected, found));
            }
        }
        let shape = [self.dim, 3, side, side];
        let values = self.take(&weight, &shape)?;
        self.give("patch_embed.proj.weight", &shape, values);
        let values = self.take(&bias, &[self.dim])?;
        self.give("patch_embed.proj.bias", &[self.dim], values);
        Ok(side)
    }

    /// `pos_embed`; the name of the tokens with their positions, and the side of the grid.
    ///
    /// The positions are one tensor of the known name, or one without a name that is added to the tokens, or, where the
    /// export interpolates them, two: that of the class token, and those of the patches on their way through a `Resize`.
    fn positions(&mut self, class_token: &str) -> Result<(&'a str, usize), Problem> {
        let graph = self.graph;
        let expanded = graph.consumer(class_token, &["Expand", "Concat"])?;
        let tokens = match expanded.op.as_str() {
            "Expand" => graph.consumer(expanded.output()?, &["Concat"])?,
            _ => expanded,
        };
        let add = graph.consumer(tokens.output()?, &["Add"])?;
        let added = add.other_input(tokens.output()?)?;
        let named = self.name("embeddings.position_embeddings");
        let whole = if graph.initializers().contains_key(&named) {
            Some(named.as_str())
        } else {
            graph.initializers().contains_key(added).then_some(added)
        };
        let dim = self.dim;
        let (values, patches) = if let Some(name) = whole {
            let count = self.graph.initializer(name)?.shape()?.get(1).copied().unwrap_or_default();
            (self.take(name, &[1, count, dim])?, count.saturating_sub(1))
        } else {
            let concat = graph.producer(added, &["Concat"])?;
            let (class, patches) = (concat.input(0)?, self.before_resizing(concat.input(1)?)?);
            let count = graph.initializer(patches)?.shape()?.get(1).copied().unwrap_or_default();
            let mut values = self.take(class, &[1, 1, dim])?;
            values.extend(self.take(patches, &[1, count, dim])?);
            (values, count)
        };
        let grid = patches.isqrt();
        if patches == 0 || grid * grid != patches {
            let name = whole.unwrap_or(added);
            return Err(differs(name, "patch positions", "a square number", &patches.to_string()));
        }
        self.give("pos_embed", &[1, 1 + patches, dim], values);
        Ok((add.output()?, grid))
    }

    /// The initializer that `value` is a reshaped, resized form of.
    fn before_resizing(&self, value: &'a str) -> Result<&'a str, Problem> {
        const FORMS: [&str; 5] = ["Reshape", "Transpose", "Cast", "Resize", "Identity"];
        let mut value = value;
        let mut seen = BTreeSet::new();
        while !self.graph.initializers().contains_key(value) {
            if !seen.insert(value) {
                return Err(differs(value, "made from", "an initializer", "itself"));
            }
            value = self.graph.producer(value, &FORMS)?.input(0)?;
        }
        Ok(value)
    }

    /// The number of blocks, which are numbered without a gap.
    fn depth(&self) -> Result<usize, Problem> {
        let start = self.name("encoder.layer.");
        let indices: BTreeSet<usize> = (self.graph.initializers().keys())
            .filter_map(|name| name.strip_prefix(&start)?.split('.').next()?.parse().ok())
            .collect();
        match (0..).zip(&indices).find(|(expected, found)| expected != *found) {
            Some((missing, _)) => Err(Problem::Missing { name: format!("{start}{missing}.norm1.weight") }),
            None if indices.is_empty() => Err(Problem::Missing { name: format!("{start}0.norm1.weight") }),
            None => Ok(indices.len()),
        }
    }

    /// A transformer block; the names of its input and its output, and the number of its heads.
    fn block(&mut self, index: usize, hidden: usize) -> Result<(&'a str, &'a str, usize), Problem> {
        let (from, to) = (format!("encoder.layer.{index}"), format!("blocks.{index}"));
        let dim = self.dim;

        let (start, normed) = self.norm(&format!("{from}.norm1"), &format!("{to}.norm1"))?;
        let (mut weight, mut bias, mut outputs) = (Vec::new(), Vec::new(), Vec::new());
        for part in ["query", "key", "value"] {
            let name = self.name(&format!("{from}.attention.attention.{part}.bias"));
            let linear = self.linear(&name, dim, dim)?;
            follows(&name, linear.input, normed)?;
            weight.extend(linear.weight);
            bias.extend(linear.bias);
            outputs.push(linear.output);
        }
        self.give(&format!("{to}.attn.qkv.weight"), &[3 * dim, dim], weight);
        self.give(&format!("{to}.attn.qkv.bias"), &[3 * dim], bias);
        let heads = self.heads(outputs[0])?;

        let name = self.name(&format!("{from}.attention.output.dense.bias"));
        let linear = self.linear(&name, dim, dim)?;
        let behind = self.graph.behind(linear.input, &outputs);
        if let Some(output) = outputs.iter().find(|output| !behind.values.contains(**output)) {
            return Err(differs(&name, "input", &format!("made from `{output}`"), linear.input));
        }
        self.expect_op(&name, &behind.ops, &["Softmax"])?;
        let attended = linear.output;
        self.give_linear(&format!("{to}.attn.proj"), dim, dim, linear);
        let scaled =
            self.layer_scale(&format!("{from}.layer_scale1.lambda1"), &format!("{to}.ls1.gamma"), attended)?;
        let middle = self.residual(scaled, start)?;

        let (before, normed) = self.norm(&format!("{from}.norm2"), &format!("{to}.norm2"))?;
        follows(&self.name(&format!("{from}.norm2.bias")), before, middle)?;
        let name = self.name(&format!("{from}.mlp.fc1.bias"));
        let first = self.linear(&name, dim, hidden)?;
        follows(&name, first.input, normed)?;
        let name = self.name(&format!("{from}.mlp.fc2.bias"));
        let second = self.linear(&name, hidden, dim)?;
        let behind = self.graph.behind(second.input, &[first.output]);
        if !behind.values.contains(first.output) {
            return Err(differs(&name, "input", &format!("made from `{}`", first.output), second.input));
        }
        self.expect_op(&name, &behind.ops, &["Erf", "Gelu"])?;
        let made = second.output;
        self.give_linear(&format!("{to}.mlp.fc1"), dim, hidden, first);
        self.give_linear(&format!("{to}.mlp.fc2"), hidden, dim, second);
        let scaled =
            self.layer_scale(&format!("{from}.layer_scale2.lambda1"), &format!("{to}.ls2.gamma"), made)?;
        Ok((start, self.residual(scaled, middle)?, heads))
    }

    /// A LayerNorm, as one node or as its parts; the names of its input and its output.
    fn norm(&mut self, from: &str, to: &str) -> Result<(&'a str, &'a str), Problem> {
        let (graph, dim) = (self.graph, self.dim);
        let (weight, bias) = (self.name(&format!("{from}.weight")), self.name(&format!("{from}.bias")));
        for (name, to) in [(&weight, format!("{to}.weight")), (&bias, format!("{to}.bias"))] {
            let values = self.take(name, &[dim])?;
            self.give(&to, &[dim], values);
        }
        let last = graph.consumer(&bias, &["Add", "LayerNormalization"])?;
        let (input, epsilon) = if last.op == "LayerNormalization" {
            if last.input(1)? != weight || last.input(2)? != bias {
                return Err(differs(&bias, "normalizes with", &weight, last.input(1)?));
            }
            let epsilon = last.attribute("epsilon").and_then(|attribute| attribute.float).unwrap_or(1e-5);
            (last.input(0)?, Some(epsilon))
        } else {
            let scaled = graph.producer(last.other_input(&bias)?, &["Mul"])?;
            let divided = graph.producer(scaled.other_input(&weight)?, &["Div"])?;
            let centered = graph.producer(divided.input(0)?, &["Sub"])?;
            let deviation = graph.producer(divided.input(1)?, &["Sqrt"])?;
            let variance = graph.producer(deviation.input(0)?, &["Add"])?;
            let epsilon = variance.inputs.iter().find_map(|input| graph.scalar(input));
            (centered.input(0)?, epsilon)
        };
        let close = |epsilon: f32| (f64::from(epsilon) / LAYER_NORM_EPS - 1.0).abs() < 1e-3;
        if !epsilon.is_some_and(close) {
            let found = epsilon.map_or("no constant".into(), |epsilon| format!("{epsilon:e}"));
            return Err(differs(&weight, "epsilon of its norm", &format!("{LAYER_NORM_EPS:e}"), &found));
        }
        Ok((input, last.output()?))
    }

    /// The linear layer with this bias.
    fn linear(&mut self, bias_name: &str, inputs: usize, outputs: usize) -> Result<Linear<'a>, Problem> {
        let graph = self.graph;
        let bias = self.take(bias_name, &[outputs])?;
        let add = graph.consumer(bias_name, &["Add"])?;
        let product = graph.producer(add.other_input(bias_name)?, &["MatMul"])?;
        let stored = self.take(product.input(1)?, &[inputs, outputs])?;
        let weight = transpose(&stored, inputs, outputs);
        Ok(Linear { weight, bias, input: product.input(0)?, output: add.output()? })
    }

    fn give_linear(&mut self, to: &str, inputs: usize, outputs: usize, linear: Linear<'_>) {
        self.give(&format!("{to}.weight"), &[outputs, inputs], linear.weight);
        self.give(&format!("{to}.bias"), &[outputs], linear.bias);
    }

    /// The factors that multiply `value`; the name of the product.
    fn layer_scale(&mut self, from: &str, to: &str, value: &str) -> Result<&'a str, Problem> {
        let from = self.name(from);
        let values = self.take(&from, &[self.dim])?;
        self.give(to, &[self.dim], values);
        let mul = self.graph.consumer(&from, &["Mul"])?;
        follows(&from, mul.other_input(&from)?, value)?;
        mul.output()
    }

    /// The sum of what a half of a block made and what it started from.
    fn residual(&self, made: &str, start: &str) -> Result<&'a str, Problem> {
        let add = self.graph.consumer(made, &["Add"])?;
        follows(made, add.other_input(made)?, start)?;
        add.output()
    }

    /// The number of heads, from the shape the queries are given: `[.., heads, head width]`. A shape that the graph
    /// computes otherwise says nothing; then a head is as wide as in every released DINOv2.
    fn heads(&self, queries: &'a str) -> Result<usize, Problem> {
        let reshape: &Node = self.graph.consumer(queries, &["Reshape"])?;
        let shape = reshape.input(1)?;
        let sides = self.graph.ints(shape).or_else(|| {
            let concat = self.graph.producer(shape, &["Concat"]).ok()?;
            let last = concat.inputs.last_chunk::<2>()?;
            Some([self.graph.ints(&last[0])?, self.graph.ints(&last[1])?].concat())
        });
        let heads = match sides.as_deref().and_then(|sides| sides.last_chunk::<2>()) {
            Some(&[heads, width]) => {
                let heads = usize::try_from(heads).unwrap_or_default();
                (usize::try_from(width).ok().and_then(|width| heads.checked_mul(width)) == Some(self.dim))
                    .then_some(heads)
            }
            None => (self.dim.is_multiple_of(HEAD_DIM)).then_some(self.dim / HEAD_DIM),
        };
        heads.ok_or_else(|| {
            let expected = format!("heads times their width is {}", self.dim);
            Problem::unexpected(&reshape.name, "shape", expected, format!("{sides:?}"))
        })
    }

    fn expect_op(&self, name: &str, found: &BTreeSet<&str>, expected: &[&str]) -> Result<(), Problem> {
        if expected.iter().any(|op| found.contains(op)) {
            return Ok(());
        }
        Err(differs(
            name,
            "operations before it",
            &format!("with {}", expected.join(" or ")),
            &format!("{found:?}"),
        ))
    }

    /// Checks that every weight that leads to `features` was taken and no other; the number of them, and the names of
    /// the tensors outside the backbone.
    fn account(&self, features: &str) -> Result<(usize, Vec<String>), Problem> {
        let behind = self.graph.behind(features, &[]).values;
        let (mut found, mut left_out) = (0, Vec::new());
        for (name, tensor) in self.graph.initializers() {
            let (used, leads) = (self.used.contains(name), behind.contains(name.as_str()));
            let part = name.strip_prefix(self.prefix).filter(|name| *name != MASK_TOKEN);
            let named = part.is_some_and(|part| PARTS.iter().any(|start| part.starts_with(start)));
            match (used, leads) {
                (true, true) => found += 1,
                (true, false) => return Err(Problem::Disconnected { name: name.clone() }),
                (false, true) if tensor.is_constant() => {}
                (false, true) => return Err(Problem::NotUnderstood { name: name.clone() }),
                (false, false) if named => return Err(Problem::NotUnderstood { name: name.clone() }),
                (false, false) => left_out.push(name.clone()),
            }
        }
        Ok((found, left_out))
    }

    fn name(&self, rest: &str) -> String {
        format!("{}{rest}", self.prefix)
    }

    fn last_side(&self, name: &str) -> Result<usize, Problem> {
        let shape = self.graph.initializer(name)?.shape()?;
        let side = shape.last().copied().filter(|side| *side > 0);
        side.ok_or_else(|| differs(name, "shape", "at least one value", &format!("{shape:?}")))
    }

    /// The values of an initializer of this shape, which no other tensor was made from.
    fn take(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, Problem> {
        let tensor = self.graph.initializer(name)?;
        let found = tensor.shape()?;
        if found != shape {
            return Err(differs(name, "shape", &format!("{shape:?}"), &format!("{found:?}")));
        }
        if !self.used.insert(name.to_owned()) {
            return Err(differs(name, "read by", "one layer", "a second one"));
        }
        tensor.floats()
    }

    fn give(&mut self, name: &str, shape: &[usize], values: Vec<f32>) {
        self.tensors.push(Weight { name: name.to_owned(), shape: shape.to_vec(), values });
    }
}

/// An error unless the layer `name` reads the value `expected`.
fn follows(name: &str, found: &str, expected: &str) -> Result<(), Problem> {
    if found == expected {
        Ok(())
    } else {
        Err(differs(name, "input of its layer", &format!("`{expected}`"), &format!("`{found}`")))
    }
}

fn differs(name: &str, field: &'static str, expected: &str, found: &str) -> Problem {
    Problem::unexpected(name, field, expected, found)
}

/// `[rows, columns]` -> `[columns, rows]`
fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column])).collect()
}
