"""Exports against the libraries they are for, and against `pass-host features` of the same pixels.

    python tests/export_check.py PASS_HOST PHOTOS [WEIGHTS ...]

PASS_HOST is the program, PHOTOS a folder of images; WEIGHTS are more files of `pass-host import` to check. Needs torch, timm,
transformers, onnx, onnxruntime and Pillow. Prints one line a check and fails at the end if any of them failed.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import onnx
import onnxruntime
import safetensors.torch
import timm
import torch
import transformers
from PIL import Image

SIZES = [(224, 224), (480, 854)]
TOLERANCE = 1e-4
MIN_COSINE = 0.995
IMAGES = 3
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])

failed = []


def report(name, value, good):
    print(f"{'ok  ' if good else 'FAIL'} {name}: {value}", flush=True)
    if not good:
        failed.append(name)


def close(name, found, expected):
    """The largest difference, absolute, or relative where values are above 1."""
    assert found.shape == expected.shape, f"{name}: {found.shape} and {expected.shape}"
    difference = np.abs(found - expected) / np.maximum(1, np.abs(expected))
    report(name, f"{difference.max():.1e}", difference.max() <= TOLERANCE)


def cosines(a, b):
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


class Checker:
    def __init__(self, program, photos, work):
        self.program, self.photos, self.work = program, photos, pathlib.Path(work)
        self.pixels = {}
        sources = sorted(p for p in pathlib.Path(photos).rglob("*") if p.suffix in (".jpg", ".jpeg", ".png"))
        for height, width in SIZES:
            # what `features` crops is the center of its own enlarged view: of an image of that size, nothing is resized
            rows, columns = round(height / 0.875), round(width / 0.875)
            top, left = round((rows - height) / 2), round((columns - width) / 2)
            folder = self.work / f"images-{height}x{width}"
            folder.mkdir()
            views = []
            for index, source in enumerate(sources[:IMAGES]):
                image = Image.open(source).convert("RGB").resize((columns, rows), Image.BICUBIC)
                image.save(folder / f"{index}.png")
                views.append(np.asarray(image)[top : top + height, left : left + width])
            self.pixels[height, width] = np.stack(views).transpose(0, 3, 1, 2)

    def run(self, *arguments):
        done = subprocess.run([self.program, *map(str, arguments)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(map(str, arguments))}\n{done.stderr}")
        return done.stdout

    def export(self, weights, form, out, *flags):
        out = self.work / out
        self.run("export", weights, "--to", form, "--out", out, *flags)
        assert (out / "README.md").exists() or out.with_name(out.name + ".md").exists(), "a model card"
        return out

    def features(self, weights, size, tokens):
        out = self.work / "features.npy"
        text = f"{size[0]}x{size[1]}"
        images = self.work / f"images-{text}"
        self.run("features", images, "--weights", weights, "--size", text, "--tokens", tokens, "--out", out)
        return np.load(out)

    def images(self, size):
        return (self.pixels[size] / np.float32(255) - MEAN[:, None, None]) / STD[:, None, None]


def session(path):
    onnx.checker.check_model(str(path), full_check=True)
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def check_onnx(checker, name, weights):
    dynamic = session(checker.export(weights, "onnx", f"{name}-any.onnx", "--dynamic-grid"))
    for size in SIZES:
        label = f"{name} {size[0]}x{size[1]}"
        patches, classes = (checker.features(weights, size, tokens) for tokens in ("patch", "class"))
        text, images = f"{size[0]}x{size[1]}", checker.images(size)
        fixed = session(checker.export(weights, "onnx", f"{name}.onnx", "--size", text))
        flags = ["--size", text, "--input", "bytes"]
        raw = session(checker.export(weights, "onnx", f"{name}-bytes.onnx", *flags))
        pixels = checker.pixels[size].astype(np.float32)
        for kind, graph, given in [("fixed", fixed, images), ("dynamic", dynamic, images), ("bytes", raw, pixels)]:
            found = graph.run(["patch_tokens", "class_token"], {"images": given})
            close(f"onnx {kind} {label} patches", found[0], patches)
            close(f"onnx {kind} {label} class", found[1], classes)
        alone = fixed.run(["patch_tokens"], {"images": images[:1]})[0]
        close(f"onnx batch of one {label}", alone, patches[:1])


def check_quantized(checker, name, weights):
    model = checker.work / f"{name}.pass"
    checker.run("quantize", weights, "--calibrate", checker.photos, "--images", 8, "--size", 224, "--out", model)
    expected = checker.features(weights, (224, 224), "patch")
    for kind, flags in [("static", ["--calibrate", checker.photos]), ("per token", [])]:
        path = checker.export(weights, "onnx", f"{name}-int8.onnx", "--quantized", model, *flags)
        kinds = {node.op_type for node in onnx.load(path).graph.node}
        found, _ = session(path).run(["patch_tokens", "class_token"], {"images": checker.images((224, 224))})
        near = cosines(found, expected)
        text = f"mean {near.mean():.5f}, smallest {near.min():.5f}"
        good = near.mean() >= MIN_COSINE and {"QuantizeLinear", "DequantizeLinear"} <= kinds
        report(f"int8 {kind} {name} patch cosine", text, good)
    raw = checker.export(weights, "onnx", f"{name}-int8-bytes.onnx", "--quantized", model, "--input", "bytes")
    pixels = checker.pixels[224, 224].astype(np.float32)
    same = cosines(session(raw).run(["patch_tokens"], {"images": pixels})[0], found)
    report(f"int8 {name} bytes against normalized", f"{same.min():.6f}", same.min() > 0.9999)


def check_timm(checker, name, weights, grid):
    path = checker.export(weights, "timm", f"{name}-timm.safetensors")
    call = safetensors.safe_open(path, "pt").metadata()["timm"]
    model = eval(f"timm.models.{call}").eval()
    model.load_state_dict(safetensors.torch.load_file(path), strict=True)
    images = torch.from_numpy(checker.images((224, 224)))
    if images.shape[-1] != grid:
        return
    with torch.no_grad():
        prefix = model.num_prefix_tokens
        behind = model.forward_features(images)[:, prefix:].numpy()
        before = model.get_intermediate_layers(images, n=1, norm=False)[0].numpy()
    expected = checker.features(weights, (224, 224), "patch")
    own = "class_token=False" in call
    close(f"timm {name} patches {'before' if own else 'behind'} the norm", before if own else behind, expected)
    return behind


def check_transformers(checker, name, weights, normed):
    classes = [("huggingface", transformers.ViTModel)]
    own = name.startswith("own")
    if own:
        classes.append(("huggingface-ijepa", transformers.IJepaModel))
    for form, kind in classes:
        folder = checker.export(weights, form, f"{name}-{form}")
        model, told = kind.from_pretrained(folder, add_pooling_layer=False, output_loading_info=True)
        wrong = {key: value for key, value in told.items() if value}
        report(f"{kind.__name__} {name} keys", wrong or "all", not wrong)
        with torch.no_grad():
            tokens = model.eval()(torch.from_numpy(checker.images((224, 224)))).last_hidden_state.numpy()
        dim = normed.shape[-1]
        patches = tokens[:, -normed.shape[1] :]
        close(f"{kind.__name__} {name} patches behind the norm", patches[..., :dim], normed)
        if not own:
            close(f"{kind.__name__} {name} class", tokens[:, 0], checker.features(weights, (224, 224), "class"))
        else:
            rest = np.abs(patches[..., dim:]).max(initial=0)
            report(f"{kind.__name__} {name} channels beyond D", f"{rest:.0e}", rest < TOLERANCE)
        sizes = transformers.AutoImageProcessor.from_pretrained(folder).size
        report(f"{kind.__name__} {name} processor", dict(sizes), sizes["height"] == 224)


class MmsegBlock(torch.nn.Module):
    """The parameters of a layer of mmsegmentation's VisionTransformer."""

    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.ln1, self.ln2 = (torch.nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.attn = torch.nn.Module()
        self.attn.attn = torch.nn.MultiheadAttention(dim, heads, batch_first=True)
        self.ffn = torch.nn.Module()
        first = torch.nn.Sequential(torch.nn.Linear(dim, hidden), torch.nn.GELU())
        self.ffn.layers = torch.nn.Sequential(first, torch.nn.Linear(hidden, dim))

    def forward(self, x):
        y = self.ln1(x)
        x = x + self.attn.attn(y, y, y, need_weights=False)[0]
        return x + self.ffn.layers(self.ln2(x))


class Mmseg(torch.nn.Module):
    """The parameters of mmsegmentation's VisionTransformer, as far as they are used here."""

    def __init__(self, dim, depth, heads, hidden, patch, grid):
        super().__init__()
        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = torch.nn.Parameter(torch.zeros(1, grid * grid + 1, dim))
        self.patch_embed = torch.nn.Module()
        self.patch_embed.projection = torch.nn.Conv2d(3, dim, patch, patch)
        self.layers = torch.nn.ModuleList(MmsegBlock(dim, heads, hidden) for _ in range(depth))
        self.ln1 = torch.nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x, with_cls_token):
        x = self.patch_embed.projection(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        x = x if with_cls_token else x[:, 1:]
        for layer in self.layers:
            x = layer(x)
        return self.ln1(x)


def check_openmmlab(checker, name, weights, normed):
    own = name.startswith("own")
    state = safetensors.torch.load_file(checker.export(weights, "mmsegmentation", f"{name}-mmseg.safetensors"))
    dim, patch = state["patch_embed.projection.weight"].shape[0], state["patch_embed.projection.weight"].shape[-1]
    depth = sum(key.endswith("ln2.weight") for key in state)
    model = Mmseg(dim, depth, dim // 64, state["layers.0.ffn.layers.0.0.weight"].shape[0], patch, 224 // patch).eval()
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        tokens = model(torch.from_numpy(checker.images((224, 224))), with_cls_token=not own).numpy()
    close(f"mmsegmentation names {name}", tokens[:, -normed.shape[1] :], normed)

    state = safetensors.torch.load_file(checker.export(weights, "mmdetection", f"{name}-mmdet.safetensors"))
    side = 224 // patch
    expected = {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    layers = ["norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    expected |= {f"blocks.{b}.{layer}.{part}" for b in range(depth) for layer in layers for part in ("weight", "bias")}
    shaped = tuple(state["pos_embed"].shape) == (1, side * side, dim)
    report(f"mmdetection names {name}", len(state), set(state) == expected and shaped)


def random_timm(checker, name, model, **options):
    """A network of timm with fresh values that are not all zeros or ones."""
    torch.manual_seed(0)
    network = timm.create_model(model, num_classes=0, **options)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, parameter.mean().item(), 0.03)
    path = checker.work / f"{name}.safetensors"
    safetensors.torch.save_file(network.state_dict(), path)
    return path


def main():
    program, photos, *more = sys.argv[1:]
    with tempfile.TemporaryDirectory() as work:
        checker = Checker(program, photos, work)
        weights = {}
        for arch in ("vit_tiny", "vit_small"):
            run = checker.work / f"run-{arch}"
            small = {"model.arch": arch, "head.class_prototypes": 64, "head.patch_prototypes": 64, "head.hidden": 64,
                     "optim.batch": 2, "checkpoint.every_steps": 2, "augment.local_crops": 1, "optim.lr_per_256": 0.1, "optim.warmup_epochs": 0.0, "optim.momentum": 0.0}
            settings = [f for key, value in small.items() for f in ("--set", f"{key}={json.dumps(value)}")]
            checker.run("train", photos, "--out", run, "--device", "cpu", "--steps", 2, *settings)
            weights[f"own-{arch}"] = run
            weights[f"timm-{arch}"] = random_timm(checker, f"timm-{arch}", f"{arch}_patch16_224")
        for name, path in weights.items():
            check_onnx(checker, name, path)
            normed = check_timm(checker, name, path, 224)
            check_transformers(checker, name, path, normed)
            check_openmmlab(checker, name, path, normed)
        registers = random_timm(checker, "registers", "vit_small_patch14_reg4_dinov2", img_size=224)
        check_onnx(checker, "registers", registers)
        check_timm(checker, "registers", registers, 224)
        for path in more:
            check_onnx(checker, pathlib.Path(path).stem, path)
            check_timm(checker, pathlib.Path(path).stem, path, None)
        for name, path in [*weights.items(), *((pathlib.Path(path).stem, path) for path in more)]:
            check_quantized(checker, name, path)
    sys.exit(f"{len(failed)} failed: {failed}" if failed else 0)


if __name__ == "__main__":
    main()
