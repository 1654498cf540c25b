"""Shards compared with a folder of the same images: reading speed, and the effect of --shuffle block on accuracy.

    python benchmarks/shards.py read [--images 100000] [--folder FOLDER]
    python benchmarks/shards.py shuffle [--seeds 6] [--data benchmarks/data]

read: distinct JPEGs of 64 x 64 pixels, first a tenth of them and then all. Shards and folder are read with `open_file`
in random order, alternately, twice, each time in a new process, with the files in the system's cache. Times are
processor times, which other programs hardly affect. Memory is the growth of the process from opening the data, and the
further growth at the peak of reading.

shuffle: a small network is trained on 4,000 images of Fashion-MNIST in three orders, with the same seeds: fully
shuffled; in blocks of `effnet pack`'s shards, which mix classes; in blocks of the folder, each of one class. Blocks
have about 20 images and windows 8 blocks, so that an epoch has 25 windows; one of ImageNet has 550. The figure is top-1
on the 10,000 test images after the last step, with 95 % intervals by Student's t over the seeds.
"""

from __future__ import annotations

import argparse
import io
import math
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from effnet.data import blocks
from effnet.data.dataset import Dataset, read_data
from effnet.data.image import PHOTOS, open_photo
from effnet.data.shards import open_file
from effnet.machine import forget_peak, peak_memory, resident_memory
from effnet.packing.pack import pack

ROOT = Path(__file__).resolve().parent
CLASSES, SHARD = 10, 10**8
LEARNED, EPOCHS, BATCH = 4000, 6, 40
BLOCK_IMAGES, WINDOW = 20, 8


@dataclass(frozen=True)
class Reading:
    """Time and memory of reading a data set in a process of its own."""

    seconds: float
    bytes: int
    opened: int  # bytes that opening took
    peak: int  # further bytes at the peak of reading


def draw(folder: Path, count: int) -> None:
    """Write `count` images into class folders."""
    photo, crops = open_photo(PHOTOS / "coffee.png"), []
    for number in range(100):
        stream, left = io.BytesIO(), 2 * number
        photo.crop((left, left, left + 64, left + 64)).resize((64, 64), Image.Resampling.BILINEAR).save(stream, "JPEG")
        crops.append(stream.getvalue())
    for name in range(CLASSES):
        (folder / f"class{name}").mkdir(parents=True)
    for number in range(count):
        (folder / f"class{number % CLASSES}" / f"{number:06}.jpg").write_bytes(crops[number % 100] + b"%06d" % number)


def read_all(folder: Path) -> Reading:
    """Read every image of a data set in a random order."""
    before = resident_memory()
    data = read_data(folder)
    with open_file(data.file(data.samples[0])) as file:  # its index
        file.read()
    forget_peak()
    opened, total = resident_memory(), 0
    order = random.Random(0).sample(data.samples, len(data))
    began = time.process_time()
    for sample in order:
        with open_file(data.file(sample)) as file:
            total += len(file.read())
    return Reading(time.process_time() - began, total, opened - before, peak_memory() - opened)


def show_reading(options: argparse.Namespace) -> None:
    """Print one line for each measurement."""
    for count in (options.images // 10, options.images):
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            folder, shards = Path(name, "images"), Path(name, "shards")
            draw(folder, count)
            data = read_data(folder)
            before, began = resident_memory(), time.process_time()
            packed = pack(data, shards, SHARD)
            more, seconds = (resident_memory() - before) / 1e6, time.process_time() - began
            print(f"packing {count:,} images: {seconds:.1f} s, {packed.shards} shards, {more:.0f} MB", flush=True)
            for each in (folder, shards, folder, shards):
                with get_context("spawn").Pool(1) as pool:
                    found = pool.apply(read_all, (each,))
                rate, size = count / found.seconds, found.bytes / 1e6
                memory = f"memory {found.opened / 1e6:.1f} MB, reading {found.peak / 1e6:+.1f} MB"
                print(f"{each.name}: {found.seconds:.2f} s, {rate:,.0f} images/s, {size:.0f} MB; {memory}", flush=True)


def load(data: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, 28, 28) uint8 and labels of all images."""
    pixels = []
    for sample in data.samples:
        with open_file(data.file(sample)) as file:
            pixels.append(np.asarray(Image.open(file).convert("L")))
    return np.stack(pixels), np.array([sample.label for sample in data.samples])


def learn(data: Dataset, order: blocks.Blocks | None, seed: int, test: tuple[np.ndarray, np.ndarray]) -> float:
    """Top-1 after a training in the order of blocks, or fully shuffled."""
    import torch

    from effnet.arch.spec import NetworkSpec, StageSpec
    from effnet.data.loader import Order
    from effnet.models.efficientnet import EfficientNet

    torch.manual_seed(seed)
    stages = (StageSpec(1, 3, 1, 12, 1), StageSpec(4, 3, 2, 20, 2), StageSpec(4, 5, 2, 32, 2))
    spec = NetworkSpec("small", stages, resolution=28, stem=12, head=96, in_channels=1, num_classes=CLASSES)
    network = EfficientNet(spec).train()
    pixels, labels = map(torch.from_numpy, load(data))
    steps, done = EPOCHS * (len(labels) // BATCH), 0
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    for epoch in range(EPOCHS):
        for part in Order(len(labels), BATCH, BATCH, seed, blocks=order).epoch(epoch):
            chosen = [index for _, index in part]
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 + math.cos(math.pi * done / steps))
            optimizer.zero_grad()
            logits = network(pixels[chosen, None].float() / 255 - 0.3)
            torch.nn.functional.cross_entropy(logits, labels[chosen]).backward()
            optimizer.step()
            done += 1
    right, (images, truth) = 0, map(torch.from_numpy, test)
    network.eval()
    with torch.inference_mode():
        for first in range(0, len(truth), 500):
            logits = network(images[first : first + 500, None].float() / 255 - 0.3)
            right += int((logits.argmax(1) == truth[first : first + 500]).sum())
    return right / len(truth)


def interval(values: Sequence[float]) -> str:
    """The mean in points, with its interval."""
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.mean(values)
    return f"{100 * mean:.2f} ({100 * (mean - half):.2f} to {100 * (mean + half):.2f})"


def show_shuffle(options: argparse.Namespace) -> None:
    """Print top-1 of each order, and its difference from the fully shuffled one."""
    import torch

    torch.set_num_threads(1)
    whole = read_data(options.data / "fashion")
    train, test = whole.subset("train"), load(whole.subset("test"))
    own = [[s for s in train.samples if s.label == label][: LEARNED // CLASSES] for label in range(CLASSES)]
    chosen = replace(train, samples=tuple(replace(sample, split="") for each in own for sample in each))
    with tempfile.TemporaryDirectory() as name:
        pack(chosen, Path(name, "out"), 10**6)
        packed = read_data(Path(name, "out"))
        mean = sum(len(chosen.file(sample).read_bytes()) for sample in chosen.samples) / LEARNED
        blocks.BLOCK_BYTES, blocks.WINDOW = round(BLOCK_IMAGES * mean), WINDOW
        mixed, sorted_ = (blocks.find_blocks([each.file(s) for s in each.samples]) for each in (packed, chosen))
        print(f"{len(mixed.ranges)} blocks of the shards, {len(sorted_.ranges)} of the folder", flush=True)
        arms = {"full": (chosen, None), "mixed shards": (packed, mixed), "sorted by class": (chosen, sorted_)}
        found: dict[str, list[float]] = {arm: [] for arm in arms}
        for seed in range(options.seeds):
            for arm, (data, order) in arms.items():
                found[arm].append(learn(data, order, seed, test))
            print(seed, *(f"{values[-1]:.4f}" for values in found.values()), flush=True)
    for arm, values in found.items():
        apart = [one - two for one, two in zip(values, found["full"], strict=True)]
        more = f"; {interval(apart)} from full" if arm != "full" else ""
        print(f"{arm}: top-1 {interval(values)}{more}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="name", required=True)
    reading = commands.add_parser("read")
    reading.add_argument("--images", type=int, default=100_000)
    reading.add_argument("--folder", type=Path)
    shuffle = commands.add_parser("shuffle")
    shuffle.add_argument("--seeds", type=int, default=6)
    shuffle.add_argument("--data", type=Path, default=ROOT / "data", help="where datasets.py put them")
    options = parser.parse_args()
    {"read": show_reading, "shuffle": show_shuffle}[options.name](options)
