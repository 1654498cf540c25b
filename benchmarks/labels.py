"""How many planted wrong labels `effnet check --labels` finds, and whether its estimate of their number is right.

    python benchmarks/labels.py [--data benchmarks/data] [--images 4000]

The images are a random sample of the 70,000 from benchmarks/datasets.py fashion. A share of their labels is replaced by
any other class or by one that looks alike. Fashion-MNIST's own label errors count as right here, which makes the list
look slightly worse than it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import time
from pathlib import Path

from effnet import console
from effnet.checking.labels import find_label_errors
from effnet.data.dataset import Dataset, read_data
from effnet.data.duplicates import find_duplicates
from effnet.machine import this_machine

ROOT = Path(__file__).resolve().parent
ALIKE = ({"t-shirt", "shirt", "pullover", "coat", "dress"}, {"sneaker", "sandal", "ankle-boot"}, {"bag"}, {"trouser"})
PLANTED = (("any other class", 0.0), ("any other class", 0.01), ("any other class", 0.03), ("a look-alike", 0.03))


def plant(dataset: Dataset, kind: str, share: float) -> tuple[Dataset, set[str]]:
    """Replace labels; return the data set, and the paths of the images with wrong labels."""
    draw, samples, planted = random.Random(0), list(dataset.samples), set[str]()
    for row in draw.sample(range(len(samples)), round(share * len(samples))):
        own = dataset.classes[samples[row].label]
        (alike,) = (group for group in ALIKE if own in group)
        others = set(dataset.classes) if kind != "a look-alike" or len(alike) == 1 else alike
        label = dataset.classes.index(draw.choice(sorted(others - {own})))
        samples[row] = dataclasses.replace(samples[row], label=label)
        planted.add(samples[row].path)
    return dataclasses.replace(dataset, samples=tuple(samples)), planted


def main() -> None:
    """Print a row for each kind of planted labels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="where benchmarks/datasets.py put the images")
    parser.add_argument("--images", type=int, default=4000, help="size of the sample")
    arguments = parser.parse_args()
    if not (arguments.data / "fashion").is_dir():
        sys.exit(f"{arguments.data / 'fashion'} is missing. Make it with: python benchmarks/datasets.py fashion")
    whole = read_data(arguments.data / "fashion")
    some = random.Random(1).sample(whole.samples, arguments.images)
    dataset = dataclasses.replace(whole, samples=tuple(sorted(some, key=lambda sample: sample.path)))
    known = find_duplicates([dataset.file(sample) for sample in dataset.samples])
    rows = []
    for kind, share in PLANTED:
        changed, planted = plant(dataset, kind, share)
        started = time.perf_counter()
        found = find_label_errors(changed, duplicates=known)
        took = time.perf_counter() - started
        listed = [suspect.path for suspect in found.suspects]
        first = planted & set(listed[: len(planted)])
        cells = len(planted), len(listed), f"{found.expected:.0f}", len(planted & set(listed)), len(first)
        rows.append((kind, *cells, f"{found.noise.rate:.2%}", f"{took:.0f} s"))
    columns = "<replaced by", "planted", "listed", "expected wrong", "planted in it", "in as many first", "rate", "time"
    console.table(columns, rows, title=f"{len(dataset):,} images of Fashion-MNIST", note=str(this_machine()))


if __name__ == "__main__":
    main()
