"""How many planted duplicates `effnet check` finds among real images, and how long it takes.

    python benchmarks/checking.py planted   copies of every fifth photo cut-out and piece of clothing
    python benchmarks/checking.py speed     10,000 JPEG files of 500 x 375 px
    python benchmarks/checking.py again     `effnet check` of Fashion-MNIST twice: the second time from its cache
        [--data benchmarks/data]

The images come from benchmarks/datasets.py, tuxpaint and fashion. Every reported pair of images with different
originals counts against precision, even if the originals are duplicates of each other.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageEnhance, ImageOps

from effnet import console
from effnet.data.duplicates import find_duplicates
from effnet.machine import this_machine
from effnet.metrics.timing import seconds

ROOT = Path(__file__).resolve().parent
EVERY = 5  # every fifth original is copied
CLOTHES = 1000  # pieces of clothing
FILES, SIZE = 10_000, (500, 375)
COPIES: dict[str, tuple[Callable[[Image.Image], Image.Image], str, int]] = {  # how it is made, suffix, quality
    "JPEG, quality 30": (lambda image: image, ".jpg", 30),
    "JPEG, quality 75": (lambda image: image, ".jpg", 75),
    "half as large": (lambda image: image.resize([max(1, side // 2) for side in image.size]), ".png", 0),
    "twice as large": (lambda image: image.resize([2 * side for side in image.size]), ".jpg", 90),
    "mirrored, quality 75": (ImageOps.mirror, ".jpg", 75),
    "brighter by 10 %": (lambda image: ImageEnhance.Brightness(image).enhance(1.1), ".jpg", 90),
    "grey": (lambda image: image.convert("L"), ".png", 0),
    "cropped by 2 % a side": (lambda image: ImageOps.crop(image, round(min(image.size) / 50)), ".png", 0),
}


def flat(file: Path) -> Image.Image:
    """A photo on white."""
    image = Image.open(file).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def planted(name: str, files: list[Path]) -> list[tuple[object, ...]]:
    """Rows per kind of copy: how many were planted and found; then a row for false positives."""
    with tempfile.TemporaryDirectory() as folder:
        kinds: dict[Path, tuple[int, str]] = {}
        for number, file in enumerate(files):
            image = flat(file)
            place = Path(folder) / f"{number}.png"
            image.save(place)
            kinds[place] = number, ""
            for kind, (change, suffix, quality) in COPIES.items() if number % EVERY == 0 else ():
                copy = Path(folder) / f"{number} {kind}{suffix}"
                change(image).save(copy, **({"quality": quality} if quality else {}))
                kinds[copy] = number, kind
        places = sorted(kinds)
        os.environ["EFFNET_CACHE"] = str(Path(folder, "cache"))
        found = find_duplicates(places)
    groups = defaultdict(list)
    for place, group in zip(places, found.groups, strict=True):
        groups[group].append(kinds[place])
    right: Counter[str] = Counter()
    for members in groups.values():
        originals = {number for number, kind in members if not kind}
        right.update(kind for number, kind in members if kind and number in originals)
    pairs = [pair for members in groups.values() for pair in itertools.combinations(members, 2)]
    wrong = sum(first[0] != second[0] for first, second in pairs)
    total = len(files[::EVERY])
    rows: list[tuple[object, ...]] = [(name, kind, total, right[kind], f"{right[kind] / total:.3f}") for kind in COPIES]
    precision = 1 - wrong / max(1, len(pairs))
    return [*rows, (name, f"precision: {wrong} wrong of {len(pairs):,} pairs", "", "", f"{precision:.3f}")]


def show_planted(data: Path) -> None:
    """Print the table of both kinds of images."""
    photos = sorted((data / "tuxpaint").rglob("*.png"))
    clothes = sorted((data / "fashion" / "train").rglob("*.png"))
    rows = planted("photo cut-outs", photos) + planted("clothing", clothes[:: len(clothes) // CLOTHES][:CLOTHES])
    console.table(("<images", "<copy", "planted", "found", "share"), rows, title="Copies among real images")


def show_speed(data: Path) -> None:
    """Print the seconds that many files take."""
    photos = [flat(file).resize(SIZE) for file in sorted((data / "tuxpaint").rglob("*.png"))]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number:05}.jpg" for number in range(FILES)]
        for number, file in enumerate(files):  # shifted sideways, so that each is a different photo
            shifted = Image.new("RGB", SIZE)
            shift = number // len(photos) * 9
            shifted.paste(photos[number % len(photos)], (shift, 0))
            shifted.paste(photos[number % len(photos)], (shift - SIZE[0], 0))
            shifted.save(file, quality=90)
        os.environ["EFFNET_CACHE"] = str(Path(folder, "cache"))  # empty
        taken = seconds(lambda: find_duplicates(files))
    sys.stdout.write(f"{FILES:,} JPEG files of {SIZE[0]} x {SIZE[1]} px: {taken:.1f} s. {this_machine()}\n")


def show_again(data: Path) -> None:
    """Print the processor seconds, which other programs hardly affect, of the first and the second check."""
    command = [sys.executable, "-m", "effnet", "check", str(data / "fashion"), "--json"]
    answers = []
    with tempfile.TemporaryDirectory() as cache:
        for name in ("first", "second"):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            answers.append(subprocess.run(command, env=os.environ | {"EFFNET_CACHE": cache}, stdout=-1).stdout)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
            size = sum(file.stat().st_size for file in Path(cache).rglob("*"))
            print(f"{name}: {user:.1f} s user, {system:.1f} s system; cache {size / 1e6:.0f} MB", flush=True)
    print("the same findings" if answers[0] == answers[1] else "DIFFERENT findings", f"({len(answers[0]):,} bytes)")


BENCHMARKS = {"planted": show_planted, "speed": show_speed, "again": show_again}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="the folder of datasets.py")
    options = parser.parse_args()
    if missing := [name for name in ("tuxpaint", "fashion") if not (options.data / name).is_dir()]:
        sys.exit(f"{options.data / missing[0]} is missing. Make it with: python benchmarks/datasets.py {missing[0]}")
    BENCHMARKS[options.name](options.data)
