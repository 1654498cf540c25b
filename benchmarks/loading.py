"""Images per second loaded from JPEG files for training at 224 px: effnet's loader and common alternatives.

    python benchmarks/loading.py [--rounds 5] [--small 256] [--large 32]

The files are those of benchmarks/pipeline.py, about 500 x 375 and about 2000 x 1500 pixels. Every contestant crops at
least three quarters of a photo, mirrors half of them and returns batches of 32: effnet uint8, which its training step
normalises, the others float32. There are as many threads and workers as cores, or one. Whole passes over the files are
interleaved, the first is not counted, figures are medians. "ms of a core" is processor time of this process and its
children. Then come the parts of effnet's time, on one thread.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from pipeline import SIZES, Decoded, make_files
from rows import MEAN, STD
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

from effnet.arch.spec import InputSpec
from effnet.data.augment import Augment
from effnet.data.dataset import Dataset, Sample
from effnet.data.image import open_photo
from effnet.data.jpeg import read_pixels
from effnet.data.loader import Loader, Order, TrainingImages
from effnet.machine import load_average, this_machine
from effnet.runtime.torch import torch_threads
from effnet.training.recipe import Recipe

SEE, BATCH = InputSpec(224, 256), 32
RECIPE = Recipe()
AREA, RATIO = (RECIPE.crop_area, 1.0), (1 / RECIPE.crop_ratio, RECIPE.crop_ratio)


def torchvisions(file: Path) -> Tensor:
    """A photo as the scripts of torchvision prepare it for training."""
    with Image.open(file) as photo:
        prepared: Tensor = SCRIPT(photo.convert("RGB"))
        return prepared


SCRIPT = transforms.Compose(
    [
        transforms.RandomResizedCrop(SEE.size, AREA, RATIO, transforms.InterpolationMode(SEE.interpolation)),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
)


def own(files: Sequence[Path], policy: str = "none", workers: int = 0) -> Loader:
    """effnet's loader."""
    data = Dataset(Path(), ("a",), tuple(Sample(str(file), 0) for file in files))
    augment = Augment(SEE, RECIPE.crop_area, RECIPE.crop_ratio, policy=policy)
    return Loader(TrainingImages(data, augment, 0), Order(len(files), BATCH, BATCH, 0), workers)


def drain(batches: Callable[[], Iterable[object]], threads: int) -> None:
    """A pass over all files."""
    with torch_threads(threads):
        for _ in batches():
            pass


def contestants(files: Sequence[Path], cores: int) -> dict[str, Callable[[], None]]:
    """Passes over the files by name."""
    script = Decoded(files, torchvisions)
    alone = DataLoader(script, BATCH)
    side_by_side = DataLoader(script, BATCH, num_workers=cores, persistent_workers=True)
    found = {"effnet, 1 thread": partial(drain, partial(own(files).epoch, 0), 1)}
    if cores > 1:
        found[f"effnet, {cores} threads"] = partial(drain, partial(own(files).epoch, 0), cores)
    for policy in ("autoaugment", "randaugment", "trivialaugment"):
        found[f"effnet, 1 thread, {policy}"] = partial(drain, partial(own(files, policy).epoch, 0), 1)
    found["torchvision's script, in the process"] = partial(drain, alone.__iter__, 1)
    found[f"torchvision's script, {cores} workers"] = partial(drain, side_by_side.__iter__, cores)
    return found


def compare(kind: str, count: int, rounds: int) -> None:
    """Print the tables of one kind of files."""
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(Path(folder), kind, count - count % BATCH)
        passes = contestants(files, this_machine().cores)
        size = statistics.fmean(file.stat().st_size for file in files)
        print(
            f"\n### {len(files)} files of about {' x '.join(map(str, SIZES[kind]))}, {size / 1e3:.0f} kB on average\n"
        )
        print(f"Load before: {load_average():.1f}\n\n| loader | images/s | ms of a core an image |\n|---|---:|---:|")
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in passes}
        for number, (name, run) in itertools.product(range(rounds + 1), passes.items()):
            began, used = time.perf_counter(), sum(os.times()[:2])
            run()
            taken = time.perf_counter() - began, sum(os.times()[:2]) - used
            seconds[name] += [taken] * (number > 0)
        for name, taken in seconds.items():
            wall, core = (statistics.median(each) / len(files) for each in zip(*taken, strict=True))
            worker = "workers" in name  # their processor time is counted only when they end
            print(f"| {name} | {1 / wall:.0f} | {'' if worker else f'{1e3 * core:.2f}'} |")
        show_parts(files[:BATCH])


def show_parts(files: Sequence[Path]) -> None:
    """Print the parts of one thread's time."""
    augment = Augment(SEE, RECIPE.crop_area, RECIPE.crop_ratio)
    photos, arrays, boxes = [], [], []
    for file in files:
        photos.append(open_photo(file))
        arrays.append(read_pixels(file))
        width, height = photos[-1].size
        left, top = width // 32, height // 32
        boxes.append((left, top, width - left, height - top))
    resampling, side = Image.Resampling[SEE.interpolation.upper()], (SEE.size, SEE.size)
    parts: dict[str, Callable[[], object]] = {
        "decoding, by Pillow": lambda: [open_photo(file) for file in files],
        "decoding": lambda: [read_pixels(file) for file in files],
        "cropping and resizing, by Pillow": lambda: [
            photo.crop(box).resize(side, resampling) for photo, box in zip(photos, boxes, strict=True)
        ],
        "cropping and resizing": lambda: [
            augment.cut(array, top, left, bottom - top, right - left)
            for array, (left, top, right, bottom) in zip(arrays, boxes, strict=True)
        ],
        "all": lambda: [augment(augment.read(file), seed) for seed, file in enumerate(files)],
    }
    print("\n| part, one thread | ms an image |\n|---|---:|")
    with torch_threads(1):
        for name, work in parts.items():
            taken = []
            for _ in range(5):
                began = time.thread_time()
                work()
                taken.append(time.thread_time() - began)
            print(f"| {name} | {1e3 * min(taken) / len(files):.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", type=int, default=256, help="files")
    parser.add_argument("--large", type=int, default=32, help="files")
    options = parser.parse_args()
    print(f"{this_machine()}; torch {torch.__version__}; medians of {options.rounds} rounds")
    for kind in SIZES:
        compare(kind, getattr(options, kind), options.rounds)
