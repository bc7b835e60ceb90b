"""The peer of the loader bench: DINO's augmentation with Pillow and torchvision, one thread.

    python loader.py FOLDER COUNT

Takes the first COUNT images of FOLDER (recursive, sorted). For each line on standard input it decodes and augments
all of them once (2 global crops of 224, 2 local crops of 96, as SelfPatch does) and answers with the seconds that took.
Needs torch, torchvision and Pillow. The bench starts it when PASS_PEER_PYTHON names a Python that has them.
"""

import random
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms


class GaussianBlur:
    def __init__(self, p):
        self.p = p

    def __call__(self, image):
        if random.random() > self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


class Solarization:
    def __call__(self, image):
        return ImageOps.solarize(image) if random.random() < 0.2 else image


def crop(size, scale, *extra):
    bicubic = transforms.InterpolationMode.BICUBIC
    jitter = transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    return transforms.Compose([
        transforms.RandomResizedCrop(size, scale=scale, interpolation=bicubic),
        transforms.RandomHorizontalFlip(p=0.5),
        transforms.RandomApply([jitter], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        *extra,
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])


def main():
    torch.set_num_threads(1)
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    endings = {".jpg", ".jpeg", ".png"}
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings)[:count]
    crops = [
        crop(224, (0.25, 1.0), GaussianBlur(1.0)),
        crop(224, (0.25, 1.0), GaussianBlur(0.1), Solarization()),
        crop(96, (0.05, 0.25), GaussianBlur(0.5)),
        crop(96, (0.05, 0.25), GaussianBlur(0.5)),
    ]
    for _ in sys.stdin:
        start = time.perf_counter()
        for file in files:
            with open(file, "rb") as stream:
                image = Image.open(stream).convert("RGB")
            for transform in crops:
                transform(image)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
