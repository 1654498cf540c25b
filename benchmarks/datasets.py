"""The data sets of the benchmarks and of examples/: real images, from Debian's packages, as class folders.

    python benchmarks/datasets.py fashion     60,000 + 10,000 grayscale clothing images, 28 px (MIT, Zalando Research)
    python benchmarks/datasets.py tuxpaint    191 photos of animals, plants, fruit and signs, cut out (GPL-2)
    python benchmarks/datasets.py sample      examples/fashion: the first 100 + 50 of each class of fashion
                                  [--out benchmarks/data] [--from FOLDER]

--from names a folder with the contents of the package: the four .gz files, or the stamps. Without it, the installed
package is used, or else apt-get downloads it and it is unpacked without root; nothing else needs a network. An existing
data set is left unchanged, and an interrupted one leaves nothing that looks finished.
"""

from __future__ import annotations

import argparse
import gzip
import math
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
Images = Iterator[tuple[str, Image.Image]]  # path within the data set, without suffix

# Folders for labels 0 ... 9 (README of the data set).
FASHION = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot",
)  # fmt: skip
PARTS = {"train": "train", "test": "t10k"}  # names in the files
SAMPLE = {"train": 100, "test": 50}  # per class

STAMPS = {  # class: folders of the package
    "bird": ("animals/birds",),
    "mammal": ("animals/mammals", "animals/marsupials"),
    "fruit": ("food/fruit",),
    "vegetable": ("food/vegetables",),
    "flower": ("plants/flowers",),
    "road-sign": ("town/roadsigns",),
}
DRAWN = {"cartoon", "toys", "plastic"}  # folders, at any depth, whose images are not photos of the real thing


@dataclass(frozen=True)
class Source:
    """A data set: the package it comes from, and how it is read."""

    package: str
    installed: str  # where the package puts its files
    count: int
    images: Callable[[Path], Images]
    out: Path
    folder: str


def read_idx(path: Path) -> np.ndarray:
    """The unsigned bytes of an .idx.gz file, in the shape that its header gives.

    Raises:
        ValueError: the file is of another kind, or truncated.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: {error}") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08":  # two zeros, and 8 for unsigned bytes
        raise ValueError(f"{path} is no idx file of bytes")
    start = 4 + 4 * content[3]
    shape = struct.unpack(f">{content[3]}I", content[4:start]) if len(content) >= start else ()
    if not shape or len(content) - start != math.prod(shape):
        raise ValueError(f"{path} is cut short: its header says {shape}, and {len(content) - start:,} bytes follow")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def fashion(folder: Path, per_class: dict[str, int] | None = None) -> Images:
    """Fashion-MNIST in file order, or the first images of each class; names are indices in the original file."""
    for part, name in PARTS.items():
        pixels = read_idx(folder / f"{name}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{name}-labels-idx1-ubyte.gz")
        if len(pixels) != len(labels):
            raise ValueError(f"{folder}: {len(pixels)} images and {len(labels)} labels of {name}")
        seen: Counter[int] = Counter()
        for number, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
            seen[label] += 1
            if per_class is None or seen[label] <= per_class[part]:
                yield f"{part}/{FASHION[label]}/{number:05}", Image.fromarray(image)


def sample(folder: Path) -> Images:
    """The first images of each class of Fashion-MNIST."""
    return fashion(folder, SAMPLE)


def tuxpaint(folder: Path) -> Images:
    """Tux Paint's photo stamps on a white background."""
    for label, places in STAMPS.items():
        files = sorted(path for place in places for path in (folder / place).rglob("*.png"))
        for path in files:
            if not DRAWN & set(path.relative_to(folder).parts):
                with Image.open(path) as stamp:
                    image = stamp.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                yield f"{label}/{path.stem}", Image.alpha_composite(white, image).convert("RGB")


CLOTHES = ("dataset-fashion-mnist", "usr/share/datasets/fashion-mnist")
DATA = ROOT / "benchmarks" / "data"
SOURCES = {
    "fashion": Source(*CLOTHES, 70_000, fashion, DATA, "fashion"),
    "tuxpaint": Source("tuxpaint-stamps-default", "usr/share/tuxpaint/stamps", 191, tuxpaint, DATA, "tuxpaint"),
    "sample": Source(*CLOTHES, len(FASHION) * sum(SAMPLE.values()), sample, ROOT / "examples", "fashion"),
}


def make(source: Source, target: Path, given: Path | None) -> None:
    """Write a data set to `target`, unless it exists; an existing README.md is kept.

    Raises:
        ValueError: `target` contains something else, or the files do not contain what they should.
        OSError: a file is missing or cannot be written.
    """
    there = sum(1 for _ in target.rglob("*.png"))
    if there == source.count:
        print(f"{shown(target)} is there already: {there:,} images")
        return
    if there or (target.exists() and {path.name for path in target.iterdir()} - {"README.md"}):
        raise ValueError(f"{target} holds something else ({there:,} images); remove it or name another --out")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        images = source.images(given or installed(source, Path(scratch)))
        making = Path(scratch) / target.name
        written = write(images, making, source.count)
        if written != source.count:
            raise ValueError(f"{source.package} holds {written:,} images of this kind, not {source.count:,}")
        if target.exists():
            for readme in target.iterdir():
                shutil.copy2(readme, making)
            shutil.rmtree(target)
        making.rename(target)
    print(f"{shown(target)}: {written:,} images, {size_of(target) / 1e6:.1f} MB")


def write(images: Images, folder: Path, total: int) -> int:
    """Write images as PNG and return their number."""
    written = 0
    for name, image in images:
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, optimize=True)
        written += 1
        if sys.stderr.isatty() and (written % 500 == 0 or written == total):
            print(f"\r{written:,} of {total:,}", end="\n" if written == total else "", file=sys.stderr, flush=True)
    return written


def installed(source: Source, scratch: Path) -> Path:
    """The folder of the package's files; a package that is not installed is downloaded to `scratch`.

    Raises:
        ValueError: it is not installed and cannot be downloaded.
    """
    folder = Path("/") / source.installed
    if folder.is_dir():
        return folder
    print(f"fetching {source.package} with apt-get", file=sys.stderr)
    download = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", source.package]  # the folder is private
    commands = (download, ["dpkg", "-x", f"{source.package}.deb", "."])
    try:
        for command in commands:
            subprocess.run(command, cwd=scratch, check=True, stdout=subprocess.DEVNULL)
            for package in scratch.glob(f"{source.package}_*.deb"):
                package.rename(scratch / f"{source.package}.deb")
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"{source.package} could not be fetched ({error}). On Debian: apt-get install {source.package}; "
            "elsewhere: unpack it, and name the folder with --from"
        ) from error
    return scratch / source.installed


def size_of(folder: Path) -> int:
    """Total bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def shown(path: Path) -> Path:
    """The path relative to the working folder, if it is inside."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def main() -> None:
    """Make the data set that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=SOURCES)
    parser.add_argument("--out", type=Path, help="the folder for it; default benchmarks/data, and examples for sample")
    parser.add_argument("--from", type=Path, dest="given", metavar="FOLDER", help="what the package holds, unpacked")
    options = parser.parse_args()
    source = SOURCES[options.name]
    target = (options.out or source.out).resolve() / source.folder
    try:
        make(source, target, options.given)
    except (OSError, ValueError) as error:
        sys.exit(f"datasets.py: {error}")
    print(f"Next: effnet train {shown(target)}")


if __name__ == "__main__":
    main()
