"""J and F of DAVIS 2017 (semi-supervised) from their published definition, to hold `pass-host eval vos` against.

    python davis_score.py perturb DAVIS_ROOT OUT [SEQUENCE...]     masks that are wrong in known ways, from the true ones
    python davis_score.py score DAVIS_ROOT MASKS [SEQUENCE...]     figures as JSON
    python davis_score.py compare DAVIS_ROOT MASKS FIGURES.json    against the JSON of `pass-host eval vos`

Written from the definition: an object is a label of the first true mask; the first and the last frame are not measured;
J is intersection over union, 1 where both are empty; F is the harmonic mean of precision and recall of contours, which
run where a pixel differs from its right, lower or lower right neighbor, and match within a disk of
ceil(0.008 * diagonal) pixels; void pixels (255) of the truth belong to nothing. Needs numpy and Pillow.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

TOLERANCE = 1e-4


def sequences(root, names):
    if names:
        return names
    return (root / "ImageSets/2017/val.txt").read_text().split()


def true_masks(root, name):
    return sorted((root / "Annotations/480p" / name).glob("*.png"))


def read(path):
    image = Image.open(path)
    assert image.mode == "P", f"{path}: no palette"
    return np.asarray(image)


def contour(mask):
    """Pixels whose right, lower or lower right neighbor is on the other side; past the border nothing differs."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, below, corner = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:].copy()
    corner[-1, :], corner[:, -1] = mask[-1, :], mask[:, -1]
    return (mask != right) | (mask != below) | (mask != corner)


def dilated(points, radius):
    """All pixels within a disk around a point."""
    height, width = points.shape
    out = np.zeros_like(points)
    for dy in range(-radius, radius + 1):
        reach = int(np.floor(np.sqrt(radius * radius - dy * dy)))
        for dx in range(-reach, reach + 1):
            to_y, from_y = slice(max(0, dy), min(height, height + dy)), slice(max(0, -dy), min(height, height - dy))
            to_x, from_x = slice(max(0, dx), min(width, width + dx)), slice(max(0, -dx), min(width, width - dx))
            out[to_y, to_x] |= points[from_y, from_x]
    return out


def similarity(truth, found):
    union = (truth | found).sum()
    return 1.0 if union == 0 else (truth & found).sum() / union


def accuracy(truth, found):
    radius = int(np.ceil(0.008 * np.linalg.norm(truth.shape)))
    a, b = contour(truth), contour(found)
    if not a.any() or not b.any():
        return float(a.any() == b.any())
    precision = (b & dilated(a, radius)).sum() / b.sum()
    recall = (a & dilated(b, radius)).sum() / a.sum()
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def score(root, masks, names):
    found, objects = {}, []
    for name in sequences(root, names):
        paths = true_masks(root, name)
        first = read(paths[0]).astype(int)
        count = int(np.where(first == 255, 0, first).max())
        figures = {label: ([], []) for label in range(1, count + 1)}
        for path in paths[1:-1]:
            truth, prediction = read(path), read(masks / name / path.name)
            void = truth == 255
            for label, (j, f) in figures.items():
                a, b = (truth == label) & ~void, (prediction == label) & ~void
                j.append(similarity(a, b))
                f.append(accuracy(a, b))
        found[name] = {
            str(label): {
                "J_mean": float(np.mean(j)),
                "F_mean": float(np.mean(f)),
                "J_recall": float(np.mean(np.array(j) > 0.5)),
                "F_recall": float(np.mean(np.array(f) > 0.5)),
            }
            for label, (j, f) in figures.items()
        }
        objects += found[name].values()
    mean = {key: float(np.mean([o[key] for o in objects])) for key in objects[0]}
    mean["J&F_mean"] = (mean["J_mean"] + mean["F_mean"]) / 2
    return {**mean, "sequences": found}


def perturb(root, out, names):
    random = np.random.default_rng(5)
    for name in sequences(root, names):
        (out / name).mkdir(parents=True, exist_ok=True)
        for index, path in enumerate(true_masks(root, name)):
            image = Image.open(path)
            mask = np.roll(np.asarray(image).copy(), (index % 5, -(index % 9)), (0, 1))
            height, width = mask.shape
            if index % 7 == 3:
                mask[mask == 1] = 0  # the object is lost
            if index % 11 == 5:
                mask[:] = 0
            for _ in range(index % 4):  # holes and spots
                y, x, side = random.integers(height), random.integers(width), random.integers(4, 60)
                mask[y : y + side, x : x + side] = random.integers(0, mask.max() + 1)
            changed = Image.fromarray(mask, mode="P")
            changed.putpalette(image.getpalette())
            changed.save(out / name / path.name)


def compare(root, masks, figures):
    ours = json.loads(figures.read_text())
    expected = score(root, masks, sorted(ours["sequences"]))
    worst = 0.0
    pairs = [(key, value, ours[key]) for key, value in expected.items() if key != "sequences"]
    for name, objects in expected["sequences"].items():
        for label, object_figures in objects.items():
            found = ours["sequences"][name]["objects"][label]
            pairs += [(f"{name} {label} {key}", value, found[key]) for key, value in object_figures.items()]
    for what, value, found in pairs:
        worst = max(worst, abs(value - found))
        print(f"{what:40} {value:.6f} {found:.6f}")
    print(f"largest difference of {len(pairs)} figures: {worst:.2e}")
    return 0 if worst <= TOLERANCE else 1


def main():
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    command, root, masks, rest = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
    if command == "perturb":
        perturb(root, masks, rest)
    elif command == "score":
        print(json.dumps(score(root, masks, rest), indent=2))
    elif command == "compare" and len(rest) == 1:
        sys.exit(compare(root, masks, Path(rest[0])))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
