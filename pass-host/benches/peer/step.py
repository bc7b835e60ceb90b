"""One training step of the published SelfPatch algorithm in PyTorch, and PyTorch's time for single operations.

Independent of the released code: written from the description of what it computes, with its structure kept where
it costs time (the teacher sees all crops; neighborhoods are gathered as [B, N, 8, D]; keys and values are projected
anew for every neighborhood; class attention normalizes and projects the concatenated tokens), and with what a modern
framework offers elsewhere (scaled_dot_product_attention, AdamW with its default implementation).

    python step.py --arch vit_tiny --batch 4 --threads 2 --steps 10 --json
    python step.py --ops --threads 2 --json
    python step.py --arch vit_small --batch 64 --device cuda --precision bf16 --compile --class-prototypes 65536 --json

With --compile the forward pass with its losses is compiled, and clipping, AdamW and the momentum teacher run over lists
of tensors (the same numbers, no reading of each norm by the host): the fastest PyTorch does without other arithmetic.
"""

import argparse
import contextlib
import copy
import json
import resource
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

SIZES = {"vit_tiny": (192, 12, 3), "vit_small": (384, 12, 6)}
PATCH = 16
GRID = 14  # of the 224-pixel crop, to which pos_embed belongs
NEIGHBORS, POSITIVES = 8, 4


def init_linear(module):
    """Weights N(0, 0.02), biases 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def mlp(dim):
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))


def split_heads(x, heads):
    """[B, T, D] -> [B, heads, T, D/heads]"""
    b, t, d = x.shape
    return x.view(b, t, heads, d // heads).transpose(1, 2)


def merge_heads(x):
    """[B, heads, T, d] -> [B, T, heads·d]"""
    return x.transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Pre-norm transformer block with stochastic depth per sample."""

    def __init__(self, dim, heads, drop_path):
        super().__init__()
        self.heads, self.drop_path = heads, drop_path
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.qkv, self.proj, self.mlp = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), mlp(dim)

    def drop(self, branch):
        if self.drop_path == 0.0:
            return branch
        keep = 1.0 - self.drop_path
        mask = (keep + torch.rand(branch.shape[0], 1, 1, device=branch.device)).floor()
        return branch / keep * mask

    def forward(self, x):
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.drop(self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v))))
        return x + self.drop(self.mlp(self.norm2(x)))


class Backbone(nn.Module):
    """ViT without class token and without final norm."""

    def __init__(self, dim, depth, heads, drop_path):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, PATCH, PATCH)
        self.pos_embed = nn.Parameter(torch.zeros(1, GRID * GRID, dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        rates = torch.linspace(0, drop_path, depth).tolist()
        self.blocks = nn.ModuleList(Block(dim, heads, rate) for rate in rates)
        init_linear(self)

    def positions(self, rows, columns):
        if (rows, columns) == (GRID, GRID):
            return self.pos_embed
        square = self.pos_embed.view(1, GRID, GRID, -1).permute(0, 3, 1, 2)
        scale = ((rows + 0.1) / GRID, (columns + 0.1) / GRID)
        return F.interpolate(square, scale_factor=scale, mode="bicubic").flatten(2).transpose(1, 2)

    def forward(self, images):
        x = self.patch_embed(images)
        rows, columns = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2) + self.positions(rows, columns)
        for block in self.blocks:
            x = block(x)
        return x


class ClassBlock(nn.Module):
    """Class attention over [class, tokens]; keys and values are projected anew for each set of tokens."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.mlp = mlp(dim)

    def forward(self, x, token):
        u = self.norm1(torch.cat([token, x], dim=1))
        q, k, v = (split_heads(p, self.heads) for p in (self.q(u[:, :1]), self.k(u), self.v(u)))
        token = token + self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))
        return token + self.mlp(self.norm2(token))


def neighbor_table(rows, columns):
    """The 8 neighbors on the torus, ascending: [N, 8]."""
    table = []
    for r in range(rows):
        for c in range(columns):
            around = {(r + i) % rows * columns + (c + j) % columns for i in (-1, 0, 1) for j in (-1, 0, 1)}
            table.append(sorted(around - {r * columns + c}))
    return torch.tensor(table)


class Aggregation(nn.Module):
    """The head that holds the class token."""

    def __init__(self, dim, heads):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.blocks = nn.ModuleList(ClassBlock(dim, heads) for _ in range(2))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.tables = {GRID * GRID: neighbor_table(GRID, GRID), 36: neighbor_table(6, 6)}
        init_linear(self)

    def run(self, x, count):
        token = self.cls_token.expand(count, -1, -1)
        for block in self.blocks:
            token = block(x, token)
        return token

    def forward(self, x, aggregate):
        b, n, d = x.shape
        token = self.run(x, b)
        if not aggregate:
            return self.norm(torch.cat([token, x], dim=1))
        with torch.no_grad():
            neighbors = x[:, self.tables[n].to(x.device).flatten()].view(b, n, NEIGHBORS, d)
            similarity = F.normalize(neighbors, dim=-1) @ F.normalize(x, dim=-1).unsqueeze(-1)
            best = similarity.squeeze(-1).topk(POSITIVES, dim=-1).indices
        positives = neighbors.gather(2, best.unsqueeze(-1).expand(-1, -1, -1, d)).view(b * n, POSITIVES, d)
        patches = self.run(positives, b * n).view(b, n, d)
        return self.norm(torch.cat([token, patches], dim=1))


class Projection(nn.Module):
    """DINO head: three layers, normalized bottleneck, weight-normalized prototypes."""

    def __init__(self, dim, prototypes, hidden=2048, bottleneck=256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        init_linear(self)
        self.last_layer = nn.utils.parametrizations.weight_norm(nn.Linear(bottleneck, prototypes, bias=False))
        magnitude = self.last_layer.parametrizations.weight.original0
        magnitude.data.fill_(1)
        magnitude.requires_grad = False

    def forward(self, x):
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class Network(nn.Module):
    def __init__(self, arch, class_prototypes, patch_prototypes, drop_path):
        super().__init__()
        dim, depth, heads = SIZES[arch]
        self.backbone = Backbone(dim, depth, heads, drop_path)
        self.aggregation = Aggregation(dim, heads)
        self.class_head = Projection(dim, class_prototypes)
        self.patch_head = Projection(dim, patch_prototypes)

    def forward(self, groups, aggregate):
        """Class logits and patch logits of every crop, one list entry a crop."""
        classes, patches = [], []
        for crops in groups:
            tokens = self.aggregation(self.backbone(torch.cat(crops)), aggregate)
            classes += self.class_head(tokens[:, :1]).squeeze(1).chunk(len(crops))
            patches += self.patch_head(tokens[:, 1:]).chunk(len(crops))
        return classes, patches


def cross_entropy(target, logits, student_temp=0.1):
    return -(target * F.log_softmax(logits / student_temp, dim=-1)).sum(-1).mean()


class Trainer:
    def __init__(self, args):
        classes = args.class_prototypes or args.prototypes
        self.student = Network(args.arch, classes, args.prototypes, 0.1).to(args.device)
        self.teacher = Network(args.arch, classes, args.prototypes, 0.0).to(args.device)
        self.teacher.load_state_dict(copy.deepcopy(self.student.state_dict()))
        for parameter in self.teacher.parameters():
            parameter.requires_grad = False
        decayed, plain = [], []
        for name, parameter in self.student.named_parameters():
            if parameter.requires_grad:
                (plain if parameter.ndim == 1 or name.endswith(".bias") else decayed).append(parameter)
        groups = [{"params": decayed, "weight_decay": 0.04}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=args.compile or None)
        self.class_center = torch.zeros(1, classes, device=args.device)
        self.patch_center = torch.zeros(1, args.prototypes, device=args.device)
        self.in_lists = args.compile
        self.losses = torch.compile(self.forward) if args.compile else self.forward
        half = torch.autocast(torch.device(args.device).type, torch.bfloat16)
        self.precision = half if args.precision == "bf16" else contextlib.nullcontext()

    def forward(self, groups, class_center, patch_center, teacher_temp):
        """The loss and the means of the teacher's logits."""
        with torch.no_grad():
            teacher_classes, teacher_patches = self.teacher(groups, True)
        classes, patches = self.student(groups, False)

        image_loss, terms = 0.0, 0
        for t, teacher in enumerate(teacher_classes[:2]):
            target = F.softmax((teacher - class_center) / teacher_temp, dim=-1)
            for s, student in enumerate(classes):
                if s != t:
                    image_loss, terms = image_loss + cross_entropy(target, student), terms + 1
        patch_loss = 0.0
        for teacher, student in zip(teacher_patches, patches):
            target = F.softmax((teacher - patch_center) / teacher_temp, dim=-1)
            patch_loss = patch_loss + cross_entropy(target, student)
        loss = image_loss / terms + 0.1 * patch_loss / len(patches)
        class_mean = torch.cat(teacher_classes).mean(0, keepdim=True)
        patch_mean = torch.cat([t.flatten(0, 1) for t in teacher_patches]).mean(0, keepdim=True)
        return loss, class_mean, patch_mean

    def step(self, groups, teacher_temp=0.04, momentum=0.996):
        with self.precision:
            loss, class_mean, patch_mean = self.losses(groups, self.class_center, self.patch_center, teacher_temp)
        with torch.no_grad():
            # new tensors: a compiled backward pass reads the old ones
            self.class_center = 0.9 * self.class_center + 0.1 * class_mean
            self.patch_center = 0.9 * self.patch_center + 0.1 * patch_mean

        value = loss.item()
        self.optimizer.zero_grad()
        loss.backward()
        if self.in_lists:
            self.update_in_lists(momentum)
            return value
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                factor = 3.0 / (parameter.grad.norm(2) + 1e-6)
                if factor < 1:
                    parameter.grad.mul_(factor)
        self.optimizer.step()
        with torch.no_grad():
            for teacher, student in zip(self.teacher.parameters(), self.student.parameters()):
                teacher.mul_(momentum).add_((1 - momentum) * student)
        return value

    @torch.no_grad()
    def update_in_lists(self, momentum):
        """Clipping per tensor, AdamW, momentum teacher: what the loops of `step` do, without a wait for each tensor."""
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        norms = torch._foreach_norm(gradients, 2)
        torch._foreach_mul_(gradients, [(3.0 / (norm + 1e-6)).clamp(max=1.0) for norm in norms])
        self.optimizer.step()
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1 - momentum)


def time_steps(args):
    torch.manual_seed(0)
    trainer = Trainer(args)
    groups = [
        [torch.randn(args.batch, 3, 224, 224).to(args.device) for _ in range(2)],
        [torch.randn(args.batch, 3, 96, 96).to(args.device) for _ in range(args.local_crops)],
    ]
    on_gpu = torch.device(args.device).type == "cuda"
    finish = torch.cuda.synchronize if on_gpu else lambda: None
    losses, seconds = [trainer.step(groups) for _ in range(args.warmup)], []
    cpu = time.process_time()
    for _ in range(args.steps):
        finish()
        start = time.perf_counter()
        losses.append(trainer.step(groups))
        finish()
        seconds.append(time.perf_counter() - start)
    cpu = (time.process_time() - cpu) / args.steps
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "precision": args.precision,
        "compile": args.compile,
        "torch": torch.__version__,
        "arch": args.arch,
        "batch": args.batch,
        "local_crops": args.local_crops,
        "prototypes": args.prototypes,
        "threads": args.threads,
        "seconds_min": min(seconds),
        "seconds_median": statistics.median(seconds),
        "images_per_second": args.batch / statistics.median(seconds),
        "cpu_seconds": cpu,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "device_peak_mb": torch.cuda.max_memory_reserved() / 2**20 if on_gpu else None,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def operations():
    """Name -> (function, tracked inputs): the same sizes as `ops.rs`."""
    rand = lambda *shape: torch.randn(*shape).requires_grad_()
    linear = lambda x, w, b: F.linear(x, w, b)
    gelu = lambda x, w, b: F.gelu(F.linear(x, w, b))

    def attention(qkv):
        q, k, v = (split_heads(part, 3) for part in qkv.chunk(3, dim=-1))
        return merge_heads(F.scaled_dot_product_attention(q, k, v))

    def class_attention(q, k, v):
        return merge_heads(F.scaled_dot_product_attention(*(split_heads(part, 3) for part in (q, k, v))))

    index = torch.randint(196, (8, 196, 4))
    rows = (index + 196 * torch.arange(8).view(8, 1, 1)).flatten()

    def neighbor_attention(q, own, patches):
        gathered = patches.view(-1, 384)[rows].view(8 * 196, 4, 384)
        k, v = torch.cat([own.view(-1, 1, 384), gathered], dim=1).chunk(2, dim=-1)
        return class_attention(q.view(-1, 1, 192), k, v)

    def gather_mean(x):
        return x.view(-1, 192)[rows].view(8, 196, 4, 192).mean(2)

    def weight_norm(v, g):
        return torch._weight_norm(v, g, 0)

    keep = torch.tensor([0.0, 1.1, 1.1, 1.1, 1.1, 0.0, 1.1, 1.1]).view(8, 1, 1)
    patch_teacher, patch_center = torch.randn(1856, 4096), torch.randn(4096)
    class_teacher, class_center = torch.randn(8, 65536), torch.randn(65536)

    def cross_entropy_patch(student):
        return cross_entropy(F.softmax((patch_teacher - patch_center) / 0.04, dim=-1), student)

    def cross_entropy_class(student):
        crops, loss = student.chunk(4), 0.0
        for t, teacher in enumerate(class_teacher.chunk(2)):
            target = F.softmax((teacher - class_center) / 0.04, dim=-1)
            loss = loss + sum(cross_entropy(target, crop) for s, crop in enumerate(crops) if s != t)
        return loss / 6

    return {
        "layer_norm": (lambda x, w, b: F.layer_norm(x, (192,), w, b, 1e-6), [rand(8, 196, 192), rand(192), rand(192)]),
        "linear_qkv": (linear, [rand(8, 196, 192), rand(576, 192), rand(576)]),
        "linear_fc2": (linear, [rand(8, 196, 768), rand(192, 768), rand(192)]),
        "linear_gelu_fc1": (gelu, [rand(8, 196, 192), rand(768, 192), rand(768)]),
        "linear_gelu_head": (gelu, [rand(1856, 2048), rand(2048, 2048), rand(2048)]),
        "linear_prototypes": (F.linear, [rand(1856, 256), rand(4096, 256)]),
        "attention": (attention, [rand(8, 196, 576)]),
        "class_attention": (class_attention, [rand(8, 1, 192), rand(8, 197, 192), rand(8, 197, 192)]),
        "neighbor_attention": (neighbor_attention, [rand(8, 196, 192), rand(8, 196, 384), rand(8, 196, 384)]),
        "gather_mean": (gather_mean, [rand(8, 196, 192)]),
        "l2_normalize": (lambda x: F.normalize(x, dim=-1), [rand(1856, 256)]),
        "weight_norm": (weight_norm, [rand(4096, 256), rand(4096, 1)]),
        "add_scaled": (lambda x, b: x + b * keep, [rand(8, 196, 192), rand(8, 196, 192)]),
        "cross_entropy_patch": (cross_entropy_patch, [rand(1856, 4096)]),
        "cross_entropy_class": (cross_entropy_class, [rand(16, 65536)]),
    }


def fastest(function, repeats):
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return {"min_ms": 1e3 * min(times), "median_ms": 1e3 * statistics.median(times)}


def time_operations(args):
    torch.manual_seed(0)
    result = {}
    for name, (function, inputs) in operations().items():
        ones = torch.ones_like(function(*inputs))

        def backward():
            for tensor in inputs:
                tensor.grad = None
            function(*inputs).backward(ones)

        repeats = 20 if name.startswith(("linear_gelu_head", "linear_prototypes", "cross")) else 100
        result[name] = {
            "forward": fastest(lambda: function(*inputs), repeats),
            "backward": fastest(backward, repeats),
        }
    images = torch.randn(8, 3, 224, 224)
    unfold = lambda: F.unfold(images, PATCH, stride=PATCH).transpose(1, 2).contiguous()
    result["patchify"] = {"forward": fastest(unfold, 100)}

    parameter, teacher = torch.randn(2048, 2048).requires_grad_(), torch.randn(2048, 2048)
    parameter.grad = torch.randn(2048, 2048)
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.04)

    def update():
        optimizer.step()
        with torch.no_grad():
            teacher.mul_(0.996).add_(0.004 * parameter)

    result["adamw_ema_step"] = {"forward": fastest(update, 100)}
    result["grad_norm"] = {"forward": fastest(lambda: parameter.grad.norm(2), 100)}
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=SIZES, default="vit_tiny")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--local-crops", type=int, default=2)
    parser.add_argument("--prototypes", type=int, default=4096, help="of both heads")
    parser.add_argument("--class-prototypes", type=int, help="of the class head, if it has another number")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32", help="bf16: autocast")
    parser.add_argument("--compile", action="store_true", help="compiled, with updates over lists of tensors")
    parser.add_argument("--warmup", type=int, default=1, help="steps before the clock starts, at least 1")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--ops", action="store_true", help="time single operations instead of steps")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = time_operations(args) if args.ops else time_steps(args)
    if args.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:22} {value}")


if __name__ == "__main__":
    main()
