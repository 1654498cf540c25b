"""A tiny network and a tiny set of images: a run takes a second or two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from effnet.arch.spec import NetworkSpec, StageSpec
from effnet.arch.specfile import spec_text
from effnet.training.run_folder import load_checkpoint

CLASSES = ("disc", "ring", "square")


def tiny_spec() -> NetworkSpec:
    """Two stages, the second with a shortcut, stochastic depth and squeeze-and-excitation."""
    stages = (StageSpec(1, 3, 1, 8, 1), StageSpec(4, 5, 2, 16, 2))
    return NetworkSpec("tiny", stages, resolution=32, stem=8, head=32, dropout=0.2, drop_connect=0.3)


def write_spec(path: Path) -> Path:
    """The tiny network as a spec.yaml."""
    path.write_text(spec_text(tiny_spec()))
    return path


def draw_images(root: Path, count: int = 20, seed: int = 0) -> Path:
    """A folder with `count` images of each class: a bright shape at a random place, on noise."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:32, :32]
    for name in CLASSES:
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = draw.integers(0, 90, (32, 32, 3))
            cy, cx, size = draw.integers(10, 22), draw.integers(10, 22), draw.integers(5, 9)
            away = np.hypot(y - cy, x - cx)
            mask = {
                "disc": away < size,
                "ring": abs(away - size) < 1.5,
                "square": (abs(y - cy) < size) & (abs(x - cx) < size),
            }[name]
            pixels[mask] = draw.integers(130, 256, 3)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number:03}.png")
    return root


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def weights(folder: Path) -> dict[str, Any]:
    """What a run's newest checkpoint holds, except for the clock."""
    state = load_checkpoint(folder)[0]
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in state["rows"]]
    return {name: state[name] for name in ("step", "network", "average", "optimizer", "done", "best")} | {"rows": rows}
