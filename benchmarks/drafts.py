"""Cost in Lite0's accuracy, and time saved, of letting the JPEG decoder downscale a photo (Pillow's Image.draft).

    python benchmarks/drafts.py [--views 300] [--photos FOLDER ...] [--workers 2] [--seed 0] [--json FILE]

libjpeg can decode at a half, a quarter or an eighth of the size without computing the finer frequencies. "draft 1x"
asks for at least the size to which the whole photo is resized before the crop, "draft 2x" for at least twice that, and
so on; the usual resize does the rest. A photo less than twice as large as requested is decoded in full. A draft's size
is rounded up, so its last pixels extend beyond the photo: the resize uses Pillow's exact extent of the photo, except
for "rounded", which uses all pixels and so shifts the photo by a fraction of a pixel.

Three ways decode in full and save time in the resize: "only the crop" does not resize what the crop cuts off; "averaged
to 3x" and "to 2x" also average squares of whole pixels first, as long as the photo stays three times (or twice) as
large as its final size. The last is effnet's default: it drafts only while both sides stay whole, then averages. If
simplejpeg is installed, it is timed too, and its pixels are checked against Pillow's.

Views are cut from the packaged photos and, equally often, from those of --photos: random crop, zoom, flip and colours.
If a view is larger than its photo, each doubling adds the photo's finest detail at its own contrast, because real
scenes look equally rough at every scale; then camera noise is added, so that large views are not smooth. Each view is
saved once as a JPEG, with alternating qualities. The class of a view is the network's prediction for its pixels before
JPEG compression, resized as usual. "agreement" is the share of views that keep this class, minus that of a full decode.
Many views are near ties between two classes, so "accuracy" is the network's expected accuracy: the probability that it
gives, on the view's original pixels, to the class that it predicts after decoding, minus that of a full decode. Both
are differences on the same views, in points; positive favours the draft.

Some sizes are round, and others make a draft land just above the requested size, its worst case.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps, features

import effnet
from effnet.arch.spec import InputSpec
from effnet.data.image import fit_photo, load_pixels
from effnet.machine import this_machine
from effnet.metrics.intervals import Interval, Z, compare_top1, wilson
from effnet.metrics.timing import measure_in_turn
from effnet.runtime.classifier import GAP

PACKAGED = Path(effnet.__file__).parent / "data" / "photos"
SIZES = ((500, 375), (693, 520), (1000, 750), (1387, 1040), (2000, 1500), (2773, 2080), (4000, 3000))
QUALITIES = (60, 75, 90, 95)
ZOOM, TONE, NOISE = (0.5, 1.0), (0.75, 1.3), (1.0, 8.0)  # share of the photo, factors, standard deviation in levels
SURE = 0.5  # probability of the best class: most of ImageNet's photos reach it, cut-outs of them do not
TILE = 512  # pixels a side of the noise tile
TIMED = 5  # views of each size whose decoding is timed

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Way:
    """How a JPEG is decoded."""

    times: int  # decode to at least this many times the resized size; 0: in full
    extent: bool = True  # whether the resize uses the drafted photo's true extent instead of all its pixels
    gap: float | None = None  # argument of data.image.load_pixels, if that decodes the photo


ASKED = {
    "full": Way(0),
    "draft 1x": Way(1),
    "draft 2x": Way(2),
    "draft 4x": Way(4),
    "draft 2x, rounded": Way(2, extent=False),
    "only the crop": Way(0, gap=math.inf),
    "averaged to 3x": Way(0, gap=3.0),
    "averaged to 2x": Way(0, gap=2.0),
    "effnet's fast": Way(4, gap=GAP),
}


@dataclass
class Tally:
    """The network's outputs for the views of one size."""

    reference: list[NDArray[np.float32]] = field(default_factory=list)
    decoded: dict[str, list[NDArray[np.float32]]] = field(default_factory=lambda: {name: [] for name in ASKED})
    pixels: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in ASKED})  # from the view


def photos_in(folder: Path) -> list[Image.Image]:
    """The photos in a folder, at any depth."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    return [Image.open(file).convert("RGB") for file in files]


def finest(photo: Image.Image) -> NDArray[np.int16]:
    """The detail that halving the photo loses, mirrored so that it tiles seamlessly."""
    half = photo.resize([max(1, side // 2) for side in photo.size], Image.Resampling.BOX)
    band = np.asarray(photo, np.int16) - np.asarray(half.resize(photo.size, Image.Resampling.BICUBIC), np.int16)
    band = np.concatenate([band, band[::-1]])
    return np.concatenate([band, band[:, ::-1]], axis=1)


def repeated(tile: NDArray[np.int16], size: tuple[int, int], rng: np.random.Generator) -> NDArray[np.int16]:
    """A tile repeated to `size`, from a random offset."""
    across, down = size
    rows = (np.arange(down) + rng.integers(len(tile))) % len(tile)
    columns = (np.arange(across) + rng.integers(tile.shape[1])) % tile.shape[1]
    return tile[rows][:, columns]


def plus(photo: Image.Image, detail: NDArray[np.int16]) -> Image.Image:
    """The sum, clipped to 0 ... 255."""
    return Image.fromarray((np.asarray(photo, np.int16) + detail).clip(0, 255).astype(np.uint8))


def view(photo: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """A photo as a camera of that resolution might have taken it."""
    if rng.random() < 0.5:
        size = size[::-1]
    scale = min(side / goal for side, goal in zip(photo.size, size, strict=True)) * rng.uniform(*ZOOM)
    cut = [max(16, int(scale * goal)) for goal in size]
    left, top = (int(rng.integers(max(1, side - part + 1))) for side, part in zip(photo.size, cut, strict=True))
    seen, band = photo.crop((left, top, left + cut[0], top + cut[1])), finest(photo)
    if rng.random() < 0.5:
        seen = ImageOps.mirror(seen)
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        seen = change(seen).enhance(float(rng.uniform(*TONE)))
    while 2 * seen.width <= size[0]:
        seen = seen.resize([2 * side for side in seen.size], Image.Resampling.BICUBIC)
        seen = plus(seen, repeated(band, seen.size, rng))
    seen = seen.resize(size, Image.Resampling.BICUBIC)
    noise = rng.normal(0, rng.uniform(*NOISE), (TILE, TILE, 3)).round().astype(np.int16)
    return plus(seen, repeated(noise, size, rng))


def jpeg(photo: Image.Image, quality: int) -> bytes:
    """The photo as JPEG bytes, with chroma at half resolution, as cameras save it."""
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def decode(content: bytes, see: InputSpec, way: Way) -> Pixels:
    """Decode a JPEG as the network sees it: resized as usual and centre-cropped."""
    if way.gap is not None:
        return load_pixels(io.BytesIO(content), see, spare=way.times or None, gap=way.gap)
    image = Image.open(io.BytesIO(content))
    wanted, box = [see.resize * side // min(image.size) for side in image.size], None
    if way.times:
        drafted = image.draft("RGB", [way.times * side for side in wanted])
        box = drafted[1] if drafted else None
    if box is None or not way.extent:
        return fit_photo(image.convert("RGB"), see)
    resized = image.convert("RGB").resize(wanted, Image.Resampling[see.interpolation.upper()], box)
    return fit_photo(resized, see)  # already resized


def look(task: tuple[int, int], photos: Sequence[Sequence[Image.Image]], see: InputSpec, seed: int) -> list[Pixels]:
    """View number `task[1]` of size number `task[0]`: before JPEG compression, then from each decoder."""
    place, number = task
    rng = np.random.default_rng((seed, place, number))
    group = photos[number % len(photos)]
    seen = view(group[int(rng.integers(len(group)))], SIZES[place], rng)
    content = jpeg(seen, QUALITIES[number // len(photos) % len(QUALITIES)])
    return [fit_photo(seen, see), *(decode(content, see, way) for way in ASKED.values())]


def gather(results: Iterator[tuple[int, list[Pixels]]], classifier: effnet.Classifier) -> dict[int, Tally]:
    """Run the network on a few views at a time."""
    tallies: dict[int, Tally] = {place: Tally() for place in range(len(SIZES))}
    while group := list(itertools.islice(results, 8)):
        logits = classifier.logits(np.stack([pixels for _, variants in group for pixels in variants]))
        answers = logits.reshape(len(group), 1 + len(ASKED), -1)
        for (place, (own, *variants)), (reference, *decoded) in zip(group, answers, strict=True):
            tally = tallies[place]
            tally.reference.append(reference)
            for name, pixels, answer in zip(ASKED, variants, decoded, strict=True):
                tally.decoded[name].append(answer)
                tally.pixels[name].append(float(np.abs(pixels.astype(np.int16) - own).mean()))
    return tallies


def scaled(size: tuple[int, int], see: InputSpec, way: Way) -> int:
    """The factor by which the decoder downscales a photo of this size."""
    image = Image.open(io.BytesIO(jpeg(Image.new("RGB", size), 75)))
    if way.times:
        image.draft("RGB", [way.times * (see.resize * side // min(size)) for side in size])
    return round(size[0] / image.width)


def points(interval: Interval) -> str:
    """An interval of a share, in points."""
    return f"{100 * interval.value:.2f} [{100 * interval.low:.2f}, {100 * interval.high:.2f}]"


def row(name: str, words: Sequence[str], tallies: Sequence[Tally], sure: float = 0.0) -> dict[str, object]:
    """One decoder on the views of one or more sizes for which the network's confidence is at least `sure`."""
    reference = np.concatenate([np.stack(tally.reference) for tally in tallies])
    kept = softmax(reference).max(1) >= sure
    reference = reference[kept]
    full, drafted = (np.concatenate([tally.decoded[each] for tally in tallies])[kept] for each in ("full", name))
    found = compare_top1(full, drafted, reference.argmax(1))
    named = [np.take_along_axis(softmax(reference), each.argmax(1)[:, None], 1) for each in (full, drafted)]
    same = int((full.argmax(1) == drafted.argmax(1)).sum())
    levels = np.concatenate([tally.pixels[name] for tally in tallies])[kept]
    return {
        "size": words[0],
        "decoder": name,
        "scale": words[1],
        "views": found.n,
        "of the view's class": points(found.accuracy_b),
        "agreement": points(found.accuracy),
        "lost / won": f"{found.only_a} / {found.only_b}",
        "accuracy": points(mean(named[1] - named[0])),
        "as full decode": points(wilson(same, found.n)),
        "levels off": f"{levels.mean():.2f}",
    }


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities."""
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def mean(values: NDArray[np.float32]) -> Interval:
    """The mean with its normal interval."""
    middle, reach = float(values.mean()), Z * float(values.std(ddof=1)) / len(values) ** 0.5
    return Interval(middle, middle - reach, middle + reach)


def turbo(content: bytes, see: InputSpec, gap: float | None) -> Pixels:
    """Decode a JPEG with simplejpeg as the network sees it."""
    import simplejpeg

    return fit_photo(Image.fromarray(simplejpeg.decode_jpeg(content)), see, gap)


def rows_of(tallies: dict[int, Tally], see: InputSpec) -> list[dict[str, object]]:
    """A row for each size and decoder that has an effect, then for all sizes that a draft shrinks."""
    rows = []
    for name, way in ASKED.items():
        drafted = []
        for place, tally in tallies.items():
            scale = scaled(SIZES[place], see, way)
            if way.times == 0 or scale > 1:
                drafted.append(tally)
                rows.append(row(name, (" x ".join(map(str, SIZES[place])), f"1/{scale}"), [tally]))
        rows.append(row(name, ("all of these", ""), drafted))
        rows.append(row(name, (f"and sure: {SURE:g} or more", ""), drafted, SURE))
    return rows


def timed(photos: Sequence[Sequence[Image.Image]], see: InputSpec, seed: int) -> list[dict[str, object]]:
    """Milliseconds from a JPEG's bytes to pixels, in one thread: medians of interleaved rounds, quality 90."""
    rows = []
    for size in SIZES:
        rng = np.random.default_rng((seed, *size))
        files = [jpeg(view(photos[0][0], size, rng), 90) for _ in range(TIMED)]

        def work(decoder: Callable[[bytes], Pixels], files: Sequence[bytes] = files) -> None:
            for content in files:
                decoder(content)

        decoders = {name: partial(decode, see=see, way=way) for name, way in ASKED.items()}
        if find_spec("simplejpeg"):
            for name in ("full", "averaged to 3x"):
                ours, theirs = decoders[name], partial(turbo, see=see, gap=ASKED[name].gap)
                assert all(np.array_equal(ours(file), theirs(file)) for file in files)
                decoders[f"simplejpeg, {name}"] = theirs
        found = measure_in_turn({name: partial(work, each) for name, each in decoders.items()}, runs=9, warmup=1)
        cells = {name: f"{timing.median_ms / TIMED:.2f}" for name, timing in found.items()}
        rows.append({"size": " x ".join(map(str, size)), "kB": f"{len(files[0]) / 1e3:.0f}", **cells})
    return rows


def show(rows: Sequence[dict[str, object]]) -> None:
    """Print a table in Markdown."""
    print(f"\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for cells in rows:
        print(f"| {' | '.join(map(str, cells.values()))} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--views", type=int, default=300, help="of each size")
    parser.add_argument("--photos", type=Path, nargs="*", default=[], help="folders of more photos")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    photos = [photos_in(folder) for folder in (PACKAGED, *options.photos)]
    classifier = effnet.load("lite0", engine="openvino", precision="fp32", batch=8 * (1 + len(ASKED)), threads=1)
    see = classifier.input
    tasks = [(place, number) for number in range(options.views) for place in range(len(SIZES))]
    with get_context("spawn").Pool(options.workers) as pool:
        looks = pool.imap(partial(look, photos=photos, see=see, seed=options.seed), tasks)
        tallies = gather(((place, pixels) for (place, _), pixels in zip(tasks, looks, strict=True)), classifier)
    report = {"accuracy": rows_of(tallies, see), "ms": timed(photos, see, options.seed)}
    print(f"{this_machine()}; Pillow {PIL.__version__}, libjpeg-turbo {features.version('jpg')}; Lite0 on ImageNet's")
    print(f"classes, resize {see.resize}, {see.interpolation}; {sum(map(len, photos))} photos, seed {options.seed}")
    for rows in report.values():
        show(rows)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
