"""Images that are like nobody else, and copies of them: what tests of duplicates and of checks are made from."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

PHOTOS = Path(__file__).parents[2] / "src" / "effnet" / "data" / "photos"


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def scaled(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


# Copies that must be found: how each is made, and the suffix that it is saved with.
COPIES: dict[str, tuple[Callable[[Image.Image], Image.Image], str]] = {
    "quality 30": (lambda image: jpeg(image, 30), ".png"),
    "quality 60": (lambda image: jpeg(image, 60), ".png"),
    "quality 95": (lambda image: jpeg(image, 95), ".png"),
    "half": (lambda image: scaled(image, 0.5), ".png"),
    "double": (lambda image: scaled(image, 2), ".jpg"),
    "other format": (lambda image: image, ".jpg"),
    "webp": (lambda image: image, ".webp"),
    "mirrored": (ImageOps.mirror, ".png"),
    "mirrored, quality 60": (lambda image: jpeg(ImageOps.mirror(image), 60), ".png"),
    "brighter": (lambda image: ImageEnhance.Brightness(image).enhance(1.1), ".jpg"),
    "less contrast": (lambda image: ImageEnhance.Contrast(image).enhance(0.8), ".jpg"),
    "grey": (lambda image: image.convert("L"), ".png"),
}


def tiles() -> Iterator[Image.Image]:
    """Parts of the two photos that do not overlap, 53 to 75 pixels wide, three times as large."""
    for name, across, down in (("chelsea.png", 6, 4), ("coffee.png", 8, 6)):
        with Image.open(PHOTOS / name) as photo:
            wide, high = photo.width // across, photo.height // down
            for left in range(0, across * wide, wide):
                for top in range(0, down * high, high):
                    yield scaled(photo.crop((left, top, left + wide, top + high)).convert("RGB"), 3)


def textures(count: int, seed: int = 0) -> Iterator[Image.Image]:
    """Coloured noise of many grains."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        grain = 4 + number % 9
        noise = rng.integers(0, 256, (grain, grain, 3), dtype=np.uint8)
        yield Image.fromarray(noise).resize((180, 160), Image.Resampling.BICUBIC)


def trousers(count: int, side: int, spread: float = 0.03, seed: int = 0) -> Iterator[Image.Image]:
    """Plain grey trousers before white, each cut a little differently: alike, and no copies."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        step = rng.normal(0, spread, 8)
        waist, hip, knee, hem = 0.17 + step[0], 0.22 + step[1], 0.19 + step[2], 0.15 + step[3]
        right = [(waist, 0.04), (hip, 0.35 + step[4]), (knee, 0.65 + step[5]), (hem, 0.96), (0.03 + abs(step[6]), 0.96)]
        outline = [(0.5 + x, y) for x, y in right] + [(0.5, 0.4 + step[7])] + [(0.5 - x, y) for x, y in right[::-1]]
        large = Image.new("L", (4 * side, 4 * side), 255)
        points = [(x * 4 * side, y * 4 * side) for x, y in outline]
        ImageDraw.Draw(large).polygon(points, fill=int(rng.integers(50, 190)))
        small = np.asarray(large.resize((side, side), Image.Resampling.BOX)) + rng.normal(0, 3, (side, side))
        yield Image.fromarray(small.clip(0, 255).astype(np.uint8)).convert("RGB")


def originals() -> list[Image.Image]:
    """Images of which no two are copies."""
    return [*tiles(), *textures(40), *trousers(40, 200), *trousers(60, 28, seed=1)]


def plant(folder: Path) -> dict[Path, int]:
    """Write originals and copies of some into `folder`; for each file the number of its original."""
    origin = {}
    for number, image in enumerate(originals()):
        path = folder / f"{number:03d}.png"
        image.save(path)
        origin[path] = number
        if number % 5 or image.width < 100:
            continue
        for name, (change, suffix) in COPIES.items():
            copy = folder / f"{number:03d} {name}{suffix}"
            change(image).save(copy, **({} if suffix == ".png" else {"quality": 85}))
            origin[copy] = number
    return origin
