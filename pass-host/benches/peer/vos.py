"""The peer of `pass-host eval vos`: DINO's published label propagation in PyTorch, and a table of both.

Independent of the released code: written from what it computes, with its structure kept where it costs time and memory
(one dense affinity of all patches of all context frames, exponentials first, a dense window mask, top-k over the whole,
softened labels by one product; features of past frames are kept), and with what a modern framework offers elsewhere
(scaled_dot_product_attention unless `--attention explicit` asks for the published one).

    python vos.py weights F.safetensors                     random values for a ViT-S/16 with timm's names
    python vos.py run --weights F --data DAVIS --sequence dog [--frames N] [--threads 2] [--out DIR]
    python vos.py table --program pass-host --weights F --data DAVIS --sequence dog [--threads 2] [--rounds 3]

`table` runs both in turns, each in a process of its own, and prints frames per second, processor seconds (start of the process
included) and peak memory (both the kernel's figures) of every round. On a machine that others use, compare processor seconds. Needs torch, timm, safetensors and Pillow.
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PREVIOUS, RADIUS, TOP_K, TEMPERATURE, PATCH = 7, 12, 5, 0.1, 16


def make_weights(path):
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", num_classes=0)
    save_file(model.state_dict(), path)


def run(args):
    import numpy as np
    import timm
    import torch
    import torch.nn.functional as F
    from PIL import Image
    from safetensors.torch import load_file

    torch.set_num_threads(args.threads)
    model = timm.create_model("vit_small_patch16_224", num_classes=0)
    model.load_state_dict(load_file(args.weights))
    model.eval()
    for block in model.blocks:
        block.attn.fused_attn = args.attention == "sdpa"
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]

    def read_frame(path):
        image = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).float()
        height, width = image.shape[1:]
        size = (480, 480 * width // height // 64 * 64) if width >= height else (480 * height // width // 64 * 64, 480)
        resized = F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
        return (resized / 255 - mean) / std, (height, width)

    def features(frame):
        grid = (frame.shape[1] // PATCH, frame.shape[2] // PATCH)
        tokens = model.patch_embed.proj(frame[None]).flatten(2).transpose(1, 2)
        table = model.pos_embed[:, 1:].reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
        table = F.interpolate(table, grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
        first = (model.cls_token + model.pos_embed[:, :1]).expand(1, -1, -1)
        tokens = torch.cat([first, tokens + table], 1)
        for block in model.blocks:
            tokens = block(tokens)
        return model.norm(tokens)[0, 1:], grid

    def window(grid):
        rows, columns = torch.arange(grid[0]), torch.arange(grid[1])
        near = lambda places: ((places[:, None] - places[None]).abs() <= RADIUS).float()
        mask = near(rows)[:, None, :, None] * near(columns)[None, :, None, :]
        return mask.reshape(grid[0] * grid[1], -1)

    def propagate(target, sources, labels, mask):
        target, sources = F.normalize(target, dim=1), F.normalize(torch.stack(sources), dim=1)
        n = len(sources)
        affinity = torch.exp(torch.bmm(target[None].repeat(n, 1, 1), sources) / TEMPERATURE)
        affinity *= mask[None].repeat(n, 1, 1)
        affinity = affinity.transpose(2, 1).reshape(-1, target.shape[0])
        least = torch.topk(affinity, TOP_K, dim=0)[0].min(0)[0]
        affinity[affinity < least] = 0
        affinity = affinity / affinity.sum(0, keepdim=True)
        labels = torch.cat([label.flatten(1).T for label in labels])  # [n · patches, classes]
        return torch.mm(labels.T, affinity)

    def stretched(label):
        for plane in label:
            if plane.max() > 0:
                plane -= plane.min()
                plane /= plane.max()
        return label

    frames = sorted((args.data / "JPEGImages/480p" / args.sequence).glob("*.jpg"))[: args.frames]
    annotation = args.data / "Annotations/480p" / args.sequence / f"{frames[0].stem}.png"
    given = Image.open(annotation)
    palette = given.getpalette()
    if args.out:
        (args.out / args.sequence).mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with torch.inference_mode():
        frame, size = read_frame(frames[0])
        first, grid = features(frame)
        first = first.T
        small = torch.from_numpy(np.array(given.resize((grid[1], grid[0]), 0))).long()
        first_label = F.one_hot(small).permute(2, 0, 1).float()
        kept, mask = queue.Queue(PREVIOUS), None
        for path in frames[1:]:
            frame, size = read_frame(path)
            target, grid = features(frame)
            pairs = list(kept.queue)
            if mask is None:
                mask = window(grid)
            label = propagate(target, [first] + [p[0] for p in pairs], [first_label] + [p[1] for p in pairs], mask)
            label = label.reshape(-1, *grid)
            if kept.full():
                kept.get()
            kept.put((target.T, label.clone()))
            big = F.interpolate(label[None], scale_factor=PATCH, mode="bilinear", align_corners=False)[0]
            found = stretched(big).argmax(0).to(torch.uint8).numpy()
            image = Image.fromarray(found).resize((size[1], size[0]), 0)
            if args.out:
                image.putpalette(palette)
                image.save(args.out / args.sequence / f"{path.stem}.png")
    print(json.dumps({"frames_per_s": len(frames) / (time.perf_counter() - start)}))


def measured(command):
    """Standard output of a command, its processor seconds, and its peak memory in MB."""
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 0:
            sys.exit(f"{command[0]} failed with {child.returncode}")
        output.seek(0)
        return output.read().decode(), usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def table(args):
    common = ["--weights", str(args.weights), "--data", str(args.data)]
    threads = str(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, args.rounds + 1):
            ours = [str(args.program), "eval", "vos", *common, "--sequences", args.sequence, "--threads", threads,
                    "--device", "cpu", "--out", f"{folder}/ours", "--json", "-"]
            peer = [sys.executable, __file__, "run", *common, "--sequence", args.sequence, "--threads", threads,
                    "--attention", args.attention, "--out", f"{folder}/peer"]
            for who, command in [("pass-host", ours), ("PyTorch", peer)]:
                output, processor, memory = measured(command)
                speed = json.loads(output)["frames_per_s"]
                rows.append((who, speed, processor, memory))
                print(f"round {number}: {who:10} {speed:6.3f} frames/s {processor:7.1f} processor s {memory:6.0f} MB",
                      flush=True)
        agreement(Path(folder), args.sequence)
    of = lambda who, column: [row[column] for row in rows if row[0] == who]
    speed = max(of("pass-host", 1)) / max(of("PyTorch", 1))
    processor = min(of("PyTorch", 2)) / min(of("pass-host", 2))
    memory = max(of("pass-host", 3)) / max(of("PyTorch", 3))
    print(f"best of {args.rounds} rounds: {speed:.2f} times the frames per second, {processor:.2f} times fewer processor "
          f"seconds; {memory:.3f} of the memory")


def agreement(folder, sequence):
    """Share of pixels with the same label in the masks of both."""
    import numpy as np
    from PIL import Image

    peers = sorted((folder / "peer" / sequence).glob("*.png"))
    same = [np.mean(np.array(Image.open(p)) == np.array(Image.open(folder / "ours" / sequence / p.name))) for p in peers]
    print(f"{100 * np.mean(same):.2f} % of the pixels have the same label, {100 * min(same):.2f} % in the worst frame")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("weights").add_argument("path")
    for name in ("run", "table"):
        command = commands.add_parser(name)
        command.add_argument("--weights", type=Path, required=True)
        command.add_argument("--data", type=Path, required=True)
        command.add_argument("--sequence", required=True)
        command.add_argument("--threads", type=int, default=2)
        command.add_argument("--attention", choices=["sdpa", "explicit"], default="sdpa")
        if name == "run":
            command.add_argument("--frames", type=int)
            command.add_argument("--out", type=Path)
        else:
            command.add_argument("--program", type=Path, required=True)
            command.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.command == "weights":
        make_weights(args.path)
    else:
        {"run": run, "table": table}[args.command](args)


if __name__ == "__main__":
    main()
