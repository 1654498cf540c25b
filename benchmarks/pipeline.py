"""From JPEG files to the top five classes with B0 at 224 px: effnet's stream against common loops.

    python benchmarks/pipeline.py [--rounds 5] [--small 256] [--large 96] [--json FILE]
    python benchmarks/pipeline.py memory [--images 100000] [--tiny]

The files are made in a temporary folder from the packaged photos, as in benchmarks/drafts.py: about 500 x 375 and about
2000 x 1500 pixels, qualities 75 to 95. All contestants have the same weights of torchvision's network, random as in
benchmarks/rows.py. effnet's engine is its own choice for batches of 32, and the loops with "effnet's engine" call the
same classifier's `logits`. Workers of a DataLoader start once, before the first round.

Whole passes over the files take turns, in reverse order every second round; the first round does not count. Figures are
medians. "names as the loop" is the share of files whose top class is that of the tutorial loop.

`memory` checks that answers come in order and that a damaged file costs only its own answer, then streams the same few
files over and over and prints the memory of the process on the way; --tiny uses small files and a small network, which
takes a minute or two.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from drafts import PACKAGED, jpeg, photos_in, view
from inference import PAUSE
from numpy.typing import NDArray
from PIL import Image
from rows import MEAN, STD, Row, network_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import effnet
from effnet.arch.spec import InputSpec
from effnet.data.image import load_pixels
from effnet.errors import ImageError
from effnet.machine import resident_memory, this_machine
from effnet.runtime.classifier import GAP, SPARE

SIZES = {"small": (500, 375), "large": (2000, 1500)}
VARY = 0.1  # share of a side by which files of a kind differ
QUALITIES = (75, 85, 90, 95)
BATCH, WORKERS, TOPK = 32, 2, 5
OWN = "effnet"
TARGETS = {  # least speed of effnet relative to each
    "2 threads, effnet's decoder and engine": 1.0,
    "tutorial loop, one by one": 1.1,
    "DataLoader, 2 workers, eager": 1.1,
}

Pass = Callable[[], NDArray[np.int64]]  # over all files: their top classes, best first (N, TOPK)


def make_files(folder: Path, kind: str, count: int) -> list[Path]:
    """JPEGs of one kind."""
    photos, files = photos_in(PACKAGED), []
    for number in range(count):
        rng = np.random.default_rng((number, *SIZES[kind]))
        size = [int(side * rng.uniform(1 - VARY, 1 + VARY)) for side in SIZES[kind]]
        seen = view(photos[number % len(photos)], (size[0], size[1]), rng)
        files.append(folder / f"{kind}-{number:04}.jpg")
        files[-1].write_bytes(jpeg(seen, QUALITIES[number % len(QUALITIES)]))
    return files


class Decoded(Dataset[object]):
    """Files that are decoded when accessed."""

    def __init__(self, files: Sequence[Path], read: Callable[[Path], object]) -> None:
        self.files, self.read = files, read

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: int) -> object:
        return self.read(self.files[place])


class Tutorial:
    """Preparation of a photo as in torchvision's documentation."""

    def __init__(self, see: InputSpec) -> None:
        mode = transforms.InterpolationMode(see.interpolation)
        resize, crop = transforms.Resize(see.resize, interpolation=mode), transforms.CenterCrop(see.size)
        self.prepare = transforms.Compose([resize, crop, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def __call__(self, file: Path) -> Tensor:
        """(3, size, size) float32."""
        with Image.open(file) as photo:
            prepared: Tensor = self.prepare(photo.convert("RGB"))
            return prepared


def best(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """The top classes of each row."""
    return np.argsort(-logits, axis=1)[:, :TOPK]


@torch.inference_mode()
def loop(network: nn.Module, files: Sequence[Path], read: Callable[[Path], Tensor]) -> NDArray[np.int64]:
    """Open, prepare and classify one file after another."""
    return torch.cat([network(read(file)[None]).softmax(1).topk(TOPK).indices for file in files]).numpy()


@torch.inference_mode()
def eager(network: nn.Module, loader: DataLoader[Tensor]) -> NDArray[np.int64]:
    """Batches of a DataLoader through a module in channels_last."""
    batches = (network(images.contiguous(memory_format=torch.channels_last)) for images in loader)
    return torch.cat([logits.softmax(1).topk(TOPK).indices for logits in batches]).numpy()


def engine(classifier: effnet.Classifier, loader: DataLoader[Tensor]) -> NDArray[np.int64]:
    """Batches of a DataLoader through effnet's engine."""
    return np.concatenate([best(classifier.logits(pixels.numpy())) for pixels in loader])


def pool(
    classifier: effnet.Classifier, files: Sequence[Path], read: Callable[[Path], NDArray[np.uint8]]
) -> NDArray[np.int64]:
    """Threads decode everything as fast as they can, while this one classifies batches."""
    found = []
    with ThreadPoolExecutor(WORKERS) as threads:
        decoded: Iterator[NDArray[np.uint8]] = threads.map(read, files)
        while batch := list(itertools.islice(decoded, BATCH)):
            found.append(best(classifier.logits(np.stack(batch))))
    return np.concatenate(found)


def stream(classifier: effnet.Classifier, files: Sequence[Path]) -> NDArray[np.int64]:
    """effnet with its defaults."""
    answers = classifier.stream(files, topk=TOPK)
    return np.array([[score.index for score in prediction] for _, prediction in answers])


def passes(network: nn.Module, weights: Path, files: Sequence[Path]) -> dict[str, Pass]:
    """All contestants by name."""
    classifier = effnet.load(weights, batch=BATCH)
    exact = effnet.load(weights, batch=BATCH, decode="exact")
    print(f"effnet's engine: {classifier.selection}")
    see, last = classifier.input, network_of(Row("b0", 224, BATCH)).to(memory_format=torch.channels_last)
    tutorial, read = Tutorial(see), partial(load_pixels, spec=see, spare=SPARE, gap=GAP)
    loaders: list[DataLoader[Tensor]] = [
        DataLoader(Decoded(files, each), BATCH, num_workers=WORKERS, persistent_workers=True)
        for each in (tutorial, partial(load_pixels, spec=see))
    ]
    return {
        OWN: partial(stream, classifier, files),
        "effnet, decode exact": partial(stream, exact, files),
        "tutorial loop, one by one": partial(loop, network, files, tutorial),
        "DataLoader, 2 workers, eager": partial(eager, last, loaders[0]),
        "DataLoader, 2 workers, effnet's engine": partial(engine, classifier, loaders[1]),
        "2 threads, effnet's decoder and engine": partial(pool, classifier, files, read),
    }


def compare(kind: str, count: int, rounds: int) -> dict[str, object]:
    """Measure one kind of files: seconds of each pass, and agreement with the loop."""
    network = network_of(Row("b0", 224, BATCH))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EFFNET_CACHE"] = folder  # empty, so that rules decide
        weights = Path(folder) / "torchvision.pth"
        torch.save(network.state_dict(), weights)
        files = make_files(Path(folder), kind, count)
        contestants = passes(network, weights, files)
        load, found = os.getloadavg()[0], {name: run() for name, run in contestants.items()}
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for number in range(rounds):
            for name in list(contestants)[:: 1 if number % 2 == 0 else -1]:
                time.sleep(PAUSE)
                started = time.perf_counter()
                contestants[name]()
                times[name].append(time.perf_counter() - started)
        size = statistics.fmean(file.stat().st_size for file in files)
    reference = found["tutorial loop, one by one"][:, 0]
    same = {name: float((named[:, 0] == reference).mean()) for name, named in found.items()}
    return {"kind": kind, "files": count, "bytes": size, "load": load, "seconds": times, "same": same}


def show(report: dict[str, object]) -> None:
    """Print a kind's table."""
    times, files = report["seconds"], report["files"]
    title = f"about {' x '.join(map(str, SIZES[report['kind']]))}"
    print(
        f"\n### {files} files, {title}, {report['bytes'] / 1e3:.0f} kB on average\nLoad before: {report['load']:.1f}\n"
    )
    print("| from files to answers | images/s | x | of effnet | names as the loop |\n|---|---:|---:|---:|---:|")
    first = times["tutorial loop, one by one"]
    missed = []
    for name, taken in times.items():
        x, of_ours = (
            statistics.median(a / b for a, b in zip(*pair, strict=True))
            for pair in ((first, taken), (taken, times[OWN]))
        )
        missed += [name] * (of_ours < TARGETS.get(name, 0))
        cells = f"{files / statistics.median(taken):.1f}", f"{x:.2f}", f"{of_ours:.2f}", f"{report['same'][name]:.1%}"
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"\nTargets: {f'MISSED against {missed}' if missed else 'reached'}", flush=True)


def check_order(classifier: effnet.Classifier, files: Sequence[Path], folder: Path) -> None:
    """Check that answers come in the order of the files, with one error for a damaged file."""
    damaged = folder / "damaged.jpg"
    damaged.write_bytes(files[0].read_bytes()[:2000])
    mixed = [*files, damaged, *files[::-1]]
    answers = list(classifier.stream(mixed))
    if [file for file, _ in answers] != mixed:
        sys.exit("answers came in another order than files")
    errors = [number for number, (_, answer) in enumerate(answers) if isinstance(answer, ImageError)]
    if errors != [len(files)]:
        sys.exit(f"errors at {errors}, and the damaged file is number {len(files)}")
    there, back = ([answer for _, answer in part] for part in (answers[: len(files)], answers[: len(files) : -1]))
    if [answer.index for answer in there] != [answer.index for answer in back]:
        sys.exit("the same files got other answers")
    print(f"{len(mixed)} files in order, one error: {answers[len(files)][1]}")


def memory(images: int, tiny: bool) -> None:
    """Print the memory of the process while it streams files."""
    with tempfile.TemporaryDirectory() as name:
        folder, weights = Path(name), Path(name) / ("tiny" if tiny else "torchvision.pth")
        os.environ["EFFNET_CACHE"] = name
        files = make_files(folder, "small", 2 * BATCH)
        if tiny:
            effnet.save(effnet.create(effnet.spec("b0", width=0.25, depth=0.25, resolution=32)), weights)
            for file in files:
                Image.open(file).resize((80, 60)).save(file)
        else:
            torch.save(network_of(Row("b0", 224, BATCH)).state_dict(), weights)
        classifier = effnet.load(weights, batch=BATCH)
        check_order(classifier, files, folder)
        marks = [max(1, images * share // 100) for share in (1, 10, 100)]
        started = time.perf_counter()
        for number, _ in enumerate(classifier.stream(itertools.islice(itertools.cycle(files), images)), start=1):
            if number in marks:
                held = resident_memory() / 2**20
                print(f"{number:>9,} images: {held:.1f} MiB, {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("compare", "memory"), default="compare")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", type=int, default=256, help="files")
    parser.add_argument("--large", type=int, default=96, help="files")
    parser.add_argument("--images", type=int, default=100_000, help="of memory")
    parser.add_argument("--tiny", action="store_true", help="memory of small files in a small network")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {PIL.__version__}"
    print(f"{this_machine()}; {torch.get_num_threads()} threads; {versions}")
    if options.what == "memory":
        memory(options.images, options.tiny)
    else:
        print(f"Medians of {options.rounds} rounds")
        reports = []
        for kind in SIZES:
            reports.append(compare(kind, getattr(options, kind), options.rounds))
            show(reports[-1])
            if options.json:
                options.json.write_text(json.dumps(reports, indent=1))
