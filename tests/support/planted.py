"""Distinct images and copies of them, for tests of duplicates and checks."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

PHOTOS = Path(__file__).parents[2] / "src" / "effnet" / "data" / "photos"


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def scaled(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


# Copies that must be found: how each is made, and the suffix that it is saved with.
COPIES: dict[str, tuple[Callable[[Image.Image], Image.Image], str]] = {
    "quality 30": (lambda image: jpeg(image, 30), ".bmp"),
    "quality 60": (lambda image: jpeg(image, 60), ".bmp"),
    "half": (lambda image: scaled(image, 0.5), ".bmp"),
    "double": (lambda image: scaled(image, 2), ".jpg"),
    "webp": (lambda image: image, ".webp"),
    "mirrored, quality 60": (lambda image: jpeg(ImageOps.mirror(image), 60), ".bmp"),
    "brighter": (lambda image: ImageEnhance.Brightness(image).enhance(1.1), ".jpg"),
    "less contrast": (lambda image: ImageEnhance.Contrast(image).enhance(0.8), ".jpg"),
    "grey": (lambda image: image.convert("L"), ".bmp"),
}


def tiles() -> Iterator[Image.Image]:
    """Parts of the two photos that do not overlap, 53 to 75 pixels wide, twice as large."""
    for name, across, down in (("chelsea.png", 6, 4), ("coffee.png", 8, 6)):
        with Image.open(PHOTOS / name) as photo:
            wide, high = photo.width // across, photo.height // down
            for left in range(0, across * wide, wide):
                for top in range(0, down * high, high):
                    yield scaled(photo.crop((left, top, left + wide, top + high)).convert("RGB"), 2)


def textures(count: int, seed: int = 0) -> Iterator[Image.Image]:
    """Coloured noise of many grains."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        grain = 4 + number % 9
        noise = rng.integers(0, 256, (grain, grain, 3), dtype=np.uint8)
        yield Image.fromarray(noise).resize((120, 106), Image.Resampling.BICUBIC)


def plant(folder: Path) -> dict[Path, int]:
    """Write 90 originals and one copy of each, of all kinds in turn; for each file the number of its original."""
    origin = {}
    for number, image in enumerate([*tiles(), *textures(18)]):
        path = folder / f"{number:03d}.bmp"
        image.save(path)
        name, (change, suffix) = list(COPIES.items())[number % len(COPIES)]
        copy = folder / f"{number:03d} {name}{suffix}"
        change(image).save(copy, **({} if suffix == ".bmp" else {"quality": 85}))
        origin |= {path: number, copy: number}
    return origin


def sound_data(root: Path, each: int) -> Path:
    """Write a data set without a fault: splits train and val, classes cat and dog, so many images of each."""
    images = tiles()
    for folder in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (root / folder).mkdir(parents=True)
        for number in range(each):
            next(images).save(root / folder / f"{number:02d}.png")
    return root
