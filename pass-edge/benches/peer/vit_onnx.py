"""A Vision Transformer as an ONNX graph, the way exporters write one, with random weights of a fixed seed.

The architecture is the backbone of the benchmark beside it: patch tokens only, no class token, no final norm.
"""

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save

SIZES = {"tiny": (192, 3), "small": (384, 6)}


def vit(size, path, patch=16, side=224, depth=12, seed=1):
    """Writes the graph `image [1, 3, side, side] -> features [1, N, D]` to `path`."""
    dim, heads = SIZES[size]
    grid = side // patch
    tokens = grid * grid
    random = np.random.default_rng(seed)
    nodes, weights = [], []

    def constant(name, value):
        weights.append(numpy_helper.from_array(value, name))
        return name

    def normal(name, *shape, std=0.02):
        return constant(name, (random.standard_normal(shape) * std).astype(np.float32))

    def node(kind, inputs, output, **attributes):
        nodes.append(helper.make_node(kind, inputs, [output] if isinstance(output, str) else output, **attributes))
        return output

    def linear(x, name, inputs, outputs):
        # a spread of sizes over the inputs, as trained weights have one
        spread = np.exp(random.standard_normal((inputs, 1)) * 0.5) / np.sqrt(inputs)
        weight = (random.standard_normal((inputs, outputs)) * spread).astype(np.float32)
        product = node("MatMul", [x, constant(f"{name}.weight", weight)], f"{name}.product")
        return node("Add", [product, normal(f"{name}.bias", outputs)], f"{name}.out")

    def norm(x, name):
        scale = constant(f"{name}.weight", (1 + 0.1 * random.standard_normal(dim)).astype(np.float32))
        return node("LayerNormalization", [x, scale, normal(f"{name}.bias", dim)], f"{name}.out", axis=-1, epsilon=1e-6)

    def integers(name, *values):
        return constant(name, np.array(values, dtype=np.int64))

    kernel = normal("patch.weight", dim, 3, patch, patch, std=0.04)
    x = node("Conv", ["image", kernel, normal("patch.bias", dim)], "patch", kernel_shape=[patch] * 2, strides=[patch] * 2)
    x = node("Reshape", [x, integers("to_tokens", 1, dim, tokens)], "flat")
    x = node("Transpose", [x], "tokens", perm=[0, 2, 1])
    x = node("Add", [x, normal("positions", 1, tokens, dim)], "embedded")
    split = integers("to_heads", 1, tokens, heads, dim // heads)
    merge = integers("from_heads", 1, tokens, dim)
    thirds = integers("thirds", dim, dim, dim)
    factor = constant("factor", np.array((dim // heads) ** -0.5, dtype=np.float32))
    for block in range(depth):
        name = f"blocks.{block}"
        qkv = linear(norm(x, f"{name}.norm1"), f"{name}.qkv", dim, 3 * dim)
        parts = node("Split", [qkv, thirds], [f"{name}.{part}" for part in "qkv"], axis=-1)
        orders = {"q": [0, 2, 1, 3], "k": [0, 2, 3, 1], "v": [0, 2, 1, 3]}
        q, k, v = (
            node("Transpose", [node("Reshape", [part, split], f"{part}.heads")], f"{part}.ready", perm=orders[part[-1]])
            for part in parts
        )
        scores = node("MatMul", [node("Mul", [q, factor], f"{name}.q.scaled"), k], f"{name}.scores")
        attended = node("MatMul", [node("Softmax", [scores], f"{name}.softmax", axis=-1), v], f"{name}.attended")
        attended = node("Transpose", [attended], f"{name}.rows", perm=[0, 2, 1, 3])
        attended = node("Reshape", [attended, merge], f"{name}.merged")
        x = node("Add", [x, linear(attended, f"{name}.proj", dim, dim)], f"{name}.middle")
        hidden = linear(norm(x, f"{name}.norm2"), f"{name}.fc1", dim, 4 * dim)
        hidden = node("Gelu", [hidden], f"{name}.gelu")
        x = node("Add", [x, linear(hidden, f"{name}.fc2", 4 * dim, dim)], f"{name}.out")
    nodes[-1].output[0] = "features"
    graph = helper.make_graph(
        nodes,
        f"vit_{size}",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, side, side])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, [1, tokens, dim])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    save(model, path)
