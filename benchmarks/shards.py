"""Small images in shards and in a folder: how long packing takes, and reading all of them in a random order.

    python benchmarks/shards.py [--images 100000] [--folder FOLDER]

The images are photographs of 64 x 64 pixels as JPEG, each with bytes of its own. Both are read by `open_file`, in
turns, twice, with the files in the system's cache. Times are the processor's, which other programs lengthen little.
Memory is what this process holds more once it has read each image.
"""

from __future__ import annotations

import argparse
import io
import random
import tempfile
import time
from pathlib import Path

from PIL import Image

from effnet.data.dataset import Dataset, read_data
from effnet.data.image import PHOTOS, open_photo
from effnet.data.shards import open_file
from effnet.machine import resident_memory
from effnet.packing.pack import pack

CLASSES, SHARD = 10, 10**8


def draw(folder: Path, count: int) -> None:
    """`count` images in class folders."""
    photo, crops = open_photo(PHOTOS / "coffee.png"), []
    for number in range(100):
        stream, left = io.BytesIO(), 2 * number
        photo.crop((left, left, left + 64, left + 64)).resize((64, 64), Image.Resampling.BILINEAR).save(stream, "JPEG")
        crops.append(stream.getvalue())
    for name in range(CLASSES):
        (folder / f"class{name}").mkdir(parents=True)
    for number in range(count):
        (folder / f"class{number % CLASSES}" / f"{number:06}.jpg").write_bytes(crops[number % 100] + b"%06d" % number)


def read_all(data: Dataset) -> tuple[float, int, int]:
    """Seconds, bytes read, and bytes of memory that reading took, in a random order."""
    files = [data.file(sample) for sample in data.samples]
    random.Random(0).shuffle(files)
    before, began, total = resident_memory(), time.process_time(), 0
    for path in files:
        with open_file(path) as file:
            total += len(file.read())
    return time.process_time() - began, total, resident_memory() - before


def main() -> None:
    """Print one line for each measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, shards = Path(name, "images"), Path(name, "shards")
        draw(folder, options.images)
        began = time.process_time()
        data = read_data(folder)
        print(f"listing the folder: {time.process_time() - began:.1f} s", flush=True)
        before, began = resident_memory(), time.process_time()
        packed = pack(data, shards, SHARD)
        more = (resident_memory() - before) / 1e6
        seconds = time.process_time() - began
        print(f"packing {packed.images:,} images: {seconds:.1f} s, {packed.shards} shards, {more:.0f} MB")
        before, began = resident_memory(), time.process_time()
        inside = read_data(shards)
        more = (resident_memory() - before) / 1e6
        print(f"opening the shards: {time.process_time() - began:.1f} s, {more:.0f} MB", flush=True)
        for _ in range(2):
            for label, each in (("folder", data), ("shards", inside)):
                seconds, total, taken = read_all(each)
                rate = options.images / seconds
                print(
                    f"{label}: {seconds:.2f} s, {rate:,.0f} images/s, {total / 1e6:.0f} MB, {taken / 1e6:+.1f} MB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
