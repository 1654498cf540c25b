"""The kinds of commands that are killed: how each starts and resumes, and its result without times."""

from __future__ import annotations

import csv
import hashlib
import json
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ("disc", "ring", "square")
# Values that depend on the clock, and hashes of them; `data` is in the try's own folder
TIMES = {"seconds", "cost", "latency", "slowest_tenth", "memory", "bought", "missing_minutes", "digest", "findings"}
DATED = {"results.png", "report.html", "README.md", "previous.ckpt"}  # pictures and pages with times; an earlier state
Words = list[str]


@dataclass(frozen=True)
class Kind:
    """A kind of command. It runs in the folder `place`, and writes to `out` there."""

    weight: float  # how often it is drawn
    begin: Callable[[Path], Words]  # the folder of shared inputs -> the words of the command
    resume: tuple[str, ...] = ()  # the words that resume it; empty: repeat the command
    marks: tuple[str, ...] = ()  # `resume` works as soon as one of these files is in `out`
    most: int = 4  # kills per try, at most
    processes: int = 1  # started as by torchrun
    workers: bool = False  # whether it starts processes itself
    codes: tuple[int, ...] = (0,)
    once: bool = False  # whether it does not rewrite what it has finished
    before: str = ""  # what `out` contains at the start, copied from the shared folder
    quick: bool = False  # whether it runs before every merge

    def words(self, shared: Path, place: Path) -> Words:
        """The command line that fits the state of the folder."""
        out = place / "out"
        return [*self.resume] if any((out / name).exists() for name in self.marks) else self.begin(shared)

    def prepare(self, shared: Path, place: Path) -> None:
        """Put the files that it needs into the folder."""
        if self.before:
            source = shared / self.before
            if source.is_dir():
                shutil.copytree(source, place / self.out)
            else:
                shutil.copy(source, place / self.out)

    @property
    def out(self) -> str:
        """The name of its output."""
        return f"out{Path(self.before).suffix}"


def _train(data: str, *more: str) -> Callable[[Path], Words]:
    def begin(shared: Path) -> Words:
        words = [
            "train",
            str(shared / data),
            "--model",
            str(shared / "tiny.yaml"),
            "--out",
            "out",
            "--recipe",
            "scratch",
        ]
        return [*words, *shlex.split("--epochs 3 --batch 8 --lr 0.02 --threads 1 --save-seconds 0"), *more]

    return begin


def _search(shared: Path) -> Words:
    triples = [word for triple in ("1,1.41,1", "2,1,1", "1.4,1.2,1") for word in ("--triple", triple)]
    words = ["search", str(shared / "shapes"), "--from", str(shared / "tiny.yaml"), "--out", "out", "--workers", "1"]
    return [*words, *triples, *shlex.split("--rungs 2 --seeds 2 --finalists 2 --epochs 1 --val 0.3")]


def _export(*more: str) -> Callable[[Path], Words]:
    return lambda shared: ["export", str(shared / "new"), *more]


RESUME = ("train", "--resume", "out")
CHECKPOINTS = ("last.ckpt", "previous.ckpt")
DRAWN = ("--set", "augmentation=autoaugment", "--set", "mixup=0.2", "--set", "head-first=0.1", "--class-weights")
ONCE = {"most": 6, "resume": RESUME, "marks": CHECKPOINTS}
KINDS = {
    "train": Kind(8, _train("shapes", *DRAWN), **ONCE, quick=True),
    "train in parts, with a plan": Kind(8, _train("shapes", "--train-memory", "1.3MB"), **ONCE),
    "train on shards": Kind(8, _train("shards", "--shuffle", "block"), **ONCE),
    "train with a loading process": Kind(5, _train("shapes", "--workers", "1"), **ONCE, workers=True),
    "train in 2 processes": Kind(6, _train("shapes", *DRAWN), **ONCE, processes=2),
    "fit": Kind(
        3,
        lambda shared: [
            *("fit", str(shared / "many"), "--out", "out"),
            *shlex.split("--params 1M --macs 2M --minutes 60 --resolution 32 --threads 1"),
        ],
        resume=("fit", "--resume", "out"),
        marks=("plan.yaml",),
        most=5,
    ),
    "search": Kind(
        5,
        _search,
        resume=("search", "--resume", "out", "--workers", "1"),
        marks=("args.yaml",),
        most=4,
        workers=True,
    ),
    "predict --out": Kind(
        32,
        lambda shared: [
            *("predict", str(shared / "shapes"), str(shared / "broken.png"), "--model", str(shared / "new")),
            *shlex.split("--engine native --threads 1 --part 4 --out out"),
        ],
        codes=(1,),  # one photo cannot be read
        quick=True,
    ),
    "pack": Kind(24, lambda shared: ["pack", str(shared / "shapes"), "out", "--shard-size", "60kB"], quick=True),
    "pack over another": Kind(
        12, lambda shared: ["pack", str(shared / "shapes"), "out", "--shard-size", "60kB"], before="shards"
    ),
    "export to ONNX over another": Kind(
        16, _export("--format", "onnx", "--out", "out.onnx"), before="old.onnx", quick=True
    ),
    "export to OpenVINO over another": Kind(12, _export("--format", "openvino", "--out", "out"), before="old-openvino"),
    "export to torch over another": Kind(8, _export("--format", "torch", "--out", "out.pt2"), before="old.pt2"),
    "export in int8 over another": Kind(
        10,
        lambda shared: [
            *("export", str(shared / "new"), str(shared / "shapes"), "--precision", "int8"),
            *("--max-drop", "60", "--out", "out"),  # it is untrained
        ],
        before="old-openvino",
    ),
    "export for Triton": Kind(8, _export("--server", "triton", "--out", "out")),
    "convert over a bundle": Kind(
        12, lambda shared: ["convert", str(shared / "new"), "--to", "bundle", "--out", "out"], before="old"
    ),
    "explain": Kind(
        12,
        lambda shared: [
            *("explain", str(shared / "shapes" / "ring"), "--model", str(shared / "new"), "--out", "out"),
            *shlex.split("--engine native --threads 1"),
        ],
        once=True,
    ),
    "check": Kind(
        12,
        lambda shared: ["check", str(shared / "faulty"), *shlex.split("--fix out/clean.csv --pictures out/copies.png")],
        codes=(1,),  # one photo cannot be read
        quick=True,
    ),
}


def make_shared(shared: Path) -> None:
    """Make images, a network, two bundles of it, and the existing files that some commands overwrite."""
    import torch

    import effnet
    from effnet.arch.spec import InputSpec, NetworkSpec, StageSpec
    from effnet.arch.specfile import spec_text
    from effnet.data.dataset import read_data
    from effnet.exporting.export import export
    from effnet.packing.pack import pack
    from effnet.weights.bundle import open_bundle

    torch.set_num_threads(1)
    _draw_images(shared / "shapes", 20)
    _draw_images(shared / "many", 60)  # enough that a fit runs all of its steps in few epochs
    (shared / "broken.png").write_bytes(b"\x89PNG cut")
    shutil.copytree(shared / "shapes", shared / "faulty")
    shutil.copy(shared / "shapes" / "ring" / "003.png", shared / "faulty" / "disc" / "copy.png")
    shutil.copy(shared / "broken.png", shared / "faulty" / "disc")
    stages = (StageSpec(1, 3, 1, 8, 1), StageSpec(4, 5, 2, 16, 2))
    spec = NetworkSpec("tiny", stages, resolution=32, stem=8, head=32, dropout=0.2, drop_connect=0.3, num_classes=3)
    (shared / "tiny.yaml").write_text(spec_text(spec))
    for seed, name in enumerate(("old", "new")):
        torch.manual_seed(seed)
        effnet.save(effnet.EfficientNet(spec), shared / name, classes=CLASSES, input=InputSpec(32, 32))
    pack(read_data(shared / "shapes"), shared / "shards", 200_000)
    old = open_bundle(shared / "old")
    export(old, shared / "old.onnx", format="onnx")
    export(old, shared / "old.pt2", format="torch")
    export(old, shared / "old-openvino", format="openvino")


def _draw_images(root: Path, count: int) -> None:
    draw = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32]
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = draw.integers(0, 90, (32, 32, 3))
            cy, cx, size = draw.integers(10, 22), draw.integers(10, 22), draw.integers(5, 9)
            away = np.hypot(y - cy, x - cx)
            square = (abs(y - cy) < size) & (abs(x - cx) < size)
            mask = {"disc": away < size, "ring": abs(away - size) < 1.5, "square": square}[name]
            pixels[mask] = draw.integers(130, 256, 3)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number:03}.png")


def read_result(place: Path) -> dict[str, Any]:
    """The files of a folder by name, as contents or hashes, without times and leftovers."""
    found: dict[str, Any] = {}
    for path in sorted(place.rglob("*")):
        name = path.relative_to(place)
        if path.is_file() and not any(part.startswith(".") for part in name.parts) and name.parts[0] != "cache":
            found[str(name)] = _content(path)
    return found


def _content(path: Path) -> Any:
    if path.name in DATED:
        return None
    if path.name == "last.ckpt":
        return _state(path)
    if path.suffix == ".json":
        return _timeless(json.loads(path.read_text()))
    if path.suffix == ".csv":
        rows = list(csv.DictReader(path.read_text().splitlines()))
        rows = [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
        return sorted(map(str, rows)) if path.name == "trials.csv" else rows  # in the order of their ends
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _timeless(each) for name, each in value.items() if name not in TIMES}
    return list(map(_timeless, value)) if isinstance(value, list) else value


def _state(path: Path) -> Any:
    """A checkpoint with tensors as hashes of their bits."""
    import torch

    from effnet.training.run_folder import load_checkpoint

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            bits = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            return str(value.dtype), tuple(value.shape), hashlib.sha256(bits).hexdigest()
        if isinstance(value, dict):
            return {name: plain(each) for name, each in value.items() if name not in TIMES}
        return [*map(plain, value)] if isinstance(value, Sequence) and not isinstance(value, str) else value

    state = load_checkpoint(path.parent)[0]
    return plain({name: value for name, value in state.items() if name != "begun"})


def find_difference(expected: Any, found: Any, name: str = "") -> str:
    """The first difference between two results, or ""."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in [*expected, *(key for key in found if key not in expected)]:
            if key not in found or key not in expected:
                return f"{name} {key} is {'lacking' if key in expected else 'too much'}".lstrip()
            if differs := find_difference(expected[key], found[key], f"{name} {key}".lstrip()):
                return differs
        return ""
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = enumerate(zip(expected, found, strict=True))
        return next((text for place, pair in pairs if (text := find_difference(*pair, f"{name} {place}"))), "")
    return "" if expected == found else f"{name} is {str(found)[:80]} and not {str(expected)[:80]}"
