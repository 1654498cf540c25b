"""Accuracy of the recipes on whole data sets, each with the commands of a user.

    python benchmarks/learning.py finetune   Lite0's weights on Fashion-MNIST at 64 px for 15 minutes
    python benchmarks/learning.py scratch    B0 from scratch on it at 32 px for half an hour each: two recipes, two
                                             strides of the stem
    python benchmarks/learning.py tuxpaint   Lite0's weights on 191 photo cut-outs of 6 classes, in five folds
    python benchmarks/learning.py linear     a linear classifier on Lite0's features of the same folds, by --fit
    python benchmarks/learning.py inherit    networks without weights of their own, with and without --init lite0
    python benchmarks/learning.py feed       images per second that the data path loads, and that a step of B0 consumes
        [--data benchmarks/data] [--out benchmarks/runs]

The data come from benchmarks/datasets.py. A run that is finished in --out is reused, an interrupted one is resumed. The
minutes of a row are those of its run; the machine should be otherwise idle.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import itertools
import json
import math
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import effnet
from effnet import console
from effnet.arch.spec import InputSpec
from effnet.arch.specfile import spec_text
from effnet.data.dataset import read_data
from effnet.data.image import load_pixels, open_photo
from effnet.data.loader import Loader, Order, TrainingImages
from effnet.machine import this_machine
from effnet.metrics.timing import random_images, seconds
from effnet.training.learner import Normalise, augment_of
from effnet.training.recipe import read_recipe
from effnet.weights.load import open_model

ROOT = Path(__file__).resolve().parent
FOLDS = 5
PENALTY = 0.3  # times the squared weights of the linear classifier, over all images
HALF_HOUR = "--model b0 --resolution 32 --val 0.05 --minutes 30"
FASHION = {
    "finetune": {"15 minutes": "--model lite0 --resolution 64 --val 0.05 --minutes 15"},
    "scratch": {
        "scratch, stem stride 1": f"{HALF_HOUR} --recipe scratch --stem-stride 1",
        "paper, stem stride 1": f"{HALF_HOUR} --recipe paper --stem-stride 1",
        "scratch, stem stride 2": f"{HALF_HOUR} --recipe scratch",
    },
}
INHERIT = {"wider and deeper": {"width": 1.2, "depth": 1.2}, "narrower": {"width": 0.75}}
STARTS = {"random start": "--recipe scratch", "from lite0": "--recipe finetune --init lite0"}
READ = 512  # images, timed in the data path
EACH = 3.0  # the data path should load this many times what a step consumes


@dataclass(frozen=True)
class Run:
    """A finished run."""

    name: str
    command: str
    figures: dict[str, Any]  # from its metrics.json

    def row(self) -> tuple[str, ...]:
        """Its line in the table."""
        top1, cost = self.figures["top1"], self.figures["cost"]
        return (
            self.name,
            f"{top1['value']:.2%}",
            f"{top1['low']:.2%} to {top1['high']:.2%}",
            f"{self.figures['macro_f1']['value']:.2%}",
            f"{cost['epochs']:.1f}",
            f"{cost['seconds'] / 60:.1f}",
            console.size(cost["forecast_bytes"]),
            console.size(cost["taken_bytes"]),
        )


def train(name: str, data: Path, options: str, out: Path) -> Run:
    """Train, resume, or read a finished run; the shown command starts such a run from scratch."""
    folder = out / "".join(letter if letter.isalnum() or letter == "." else "-" for letter in name)
    shown = f"effnet train {data.name} {options}".strip()
    if not (folder / "metrics.json").exists():
        begun = (folder / "last.ckpt").exists()
        words = ["--resume", str(folder)] if begun else [str(data), *shlex.split(options), "--out", str(folder)]
        console.remark(f"$ {shown}")
        subprocess.run([sys.executable, "-m", "effnet", "train", *words], check=True, stdout=subprocess.DEVNULL)
    return Run(name, shown, json.loads((folder / "metrics.json").read_text()))


def show(title: str, runs: list[Run], note: str = "") -> None:
    """Print a table of runs and their commands."""
    columns = ("<run", "top-1", "95 % interval", "macro F1", "epochs", "minutes", "memory forecast", "taken")
    split = runs[0].figures["split"]
    console.table(columns, [run.row() for run in runs], title=title, note=f"{split} split. {this_machine()}. {note}")
    for run in runs:
        console.remark(f"{run.name}: {run.command}")


def fashion(kind: str, data: Path, out: Path) -> None:
    """One of the tables of FASHION."""
    show(f"Fashion-MNIST, {kind}", [train(name, data, options, out) for name, options in FASHION[kind].items()])


def inherit(data: Path, out: Path) -> None:
    """Networks without weights of their own, with and without weights inherited from Lite0."""
    runs = []
    for name, factors in INHERIT.items():
        spec = out / f"lite0-{name.split()[0]}.yaml"
        spec.write_text(spec_text(effnet.spec("lite0", **factors)))
        for start, options in STARTS.items():
            command = f"--model {spec} {options} --resolution 64 --epochs 8 --threads 1"
            runs.append(train(f"{name}, {start}", data, command, out))
    show("1,000 pieces of clothing, networks without weights", runs)


def folds(data: Path, out: Path) -> Iterator[Path]:
    """Manifests in which each fold in turn is the test split; the folds are equally large in every class.

    Duplicates would leak between folds; `effnet check` found none in this set.
    """
    files = {folder.name: sorted(folder.iterdir()) for folder in sorted(data.iterdir()) if folder.is_dir()}
    shuffled = [(str(file), name) for name, images in files.items() for file in sorted(images, key=_shuffled)]
    placed = [(path, name, number % FOLDS) for number, (path, name) in enumerate(shuffled)]
    for fold in range(FOLDS):
        manifest = out / f"tuxpaint-{fold}.csv"
        with manifest.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("path", "label", "split"))
            for path, label, place in placed:
                writer.writerow((path, label, "test" if place == fold else "train"))
        yield manifest


def _shuffled(file: Path) -> str:
    """A sort key that is independent of file names."""
    return hashlib.sha256(file.name.encode()).hexdigest()


def tuxpaint(data: Path, out: Path) -> None:
    """The mean accuracy over the folds."""
    how = "--model lite0 --recipe few --fit squash --val 0.06 --threads 1"
    runs = [train(manifest.stem, manifest, how, out) for manifest in folds(data, out)]
    scores = [run.figures["top1"]["value"] for run in runs]
    error = statistics.stdev(scores) / math.sqrt(len(scores))
    right = sum(round(run.figures["top1"]["value"] * run.figures["n"]) for run in runs)
    images = sum(run.figures["n"] for run in runs)
    show(
        "Tux Paint, five folds",
        runs,
        f"Mean of the folds {statistics.mean(scores):.3f}, standard error {error:.3f}; {right} of {images} right.",
    )


def linear(data: Path, out: Path) -> None:
    """Logistic regression with weight decay PENALTY on pooled features of the photos and their mirror images."""
    model = open_model("lite0")
    rows = []
    for fit in ("crop", "pad", "squash"):
        see = dataclasses.replace(model.config.input, fit=fit)
        normalise, scores = Normalise(see), []
        features: dict[str, torch.Tensor] = {}
        for manifest in folds(data, out):
            dataset = read_data(manifest)
            for sample in dataset.samples if not features else ():
                pixels = torch.from_numpy(load_pixels(dataset.file(sample), see))
                with torch.inference_mode():
                    features[sample.path] = model.network.embed(normalise(torch.stack([pixels, pixels.flip(1)])))
            parts = [dataset.subset(name).samples for name in ("train", "test")]
            (learned, labels), (asked, truth) = (
                (torch.stack([features[s.path] for s in part]), torch.tensor([s.label for s in part])) for part in parts
            )
            head = torch.nn.Linear(learned.shape[-1], len(dataset.classes))
            optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100)
            fitting = partial(_fitting, optimizer, head, learned.flatten(0, 1).clone(), labels.repeat_interleave(2))
            optimizer.step(fitting)
            scores.append(float((head(asked[:, 0]).argmax(1) == truth).float().mean()))
        rows.append((fit, *(f"{score:.3f}" for score in scores), f"{statistics.mean(scores):.3f}"))
    columns = ("<fit", *(f"fold {number + 1}" for number in range(FOLDS)), "mean")
    console.table(columns, rows, title="Tux Paint, a linear classifier on Lite0's features")


def _fitting(
    optimizer: torch.optim.Optimizer, head: torch.nn.Linear, features: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(head(features), labels)
    loss = loss + PENALTY * head.weight.square().sum() / len(features)
    loss.backward()
    return loss


def _read(batches: Iterator[Any], count: int) -> None:
    for _ in range(count):
        next(batches)


def feed(data: Path, out: Path) -> None:
    """Images per second that the data path loads at 224 px, compared with what training steps of B0 consume."""
    from networks import training_step

    del out
    photos = read_data(data)
    photos = dataclasses.replace(photos, samples=tuple(dataclasses.replace(s, split="train") for s in photos.samples))
    batch = 16
    network = effnet.create("b0", num_classes=len(photos.classes)).to(memory_format=torch.channels_last).train()
    pixels = random_images(batch, 224)
    laps = [seconds(lambda: training_step(network, pixels)) for _ in range(6)]
    consumed = batch / statistics.median(laps[1:])
    rows = []
    for recipe in ("finetune", "paper"):
        images = TrainingImages(photos, augment_of(read_recipe(recipe), InputSpec()), 0)
        for workers in (0, 2):
            loader = Loader(images, Order(len(images), batch, batch, 0), workers)
            epochs = itertools.chain.from_iterable(loader.epoch(number) for number in itertools.count())
            next(epochs)
            loaded = READ / seconds(partial(_read, epochs, READ // batch))
            rows.append((recipe, workers, f"{loaded:.0f}", f"{loaded / consumed:.1f}"))
    sizes = [open_photo(photos.file(sample)).size for sample in photos.samples]
    typical = " x ".join(str(round(statistics.median(side))) for side in zip(*sizes, strict=True))
    title = f"Images a second at 224 px; a training step of B0 consumes {consumed:.1f} (batch {batch}, fp32, 2 threads)"
    console.table(
        ("<recipe", "worker processes", "images/s", "x what is consumed"),
        rows,
        title=title,
        note=f"{len(photos)} photos, typically {typical} px, from PNG files. {this_machine()}. Wanted: {EACH:.0f}x.",
    )


BENCHMARKS = {
    "finetune": ("fashion", partial(fashion, "finetune")),
    "scratch": ("fashion", partial(fashion, "scratch")),
    "tuxpaint": ("tuxpaint", tuxpaint),
    "linear": ("tuxpaint", linear),
    "inherit": (str(ROOT.parent / "examples" / "fashion"), inherit),
    "feed": ("tuxpaint", feed),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="where datasets.py put them")
    parser.add_argument("--out", type=Path, default=ROOT / "runs", help="the folder of the runs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    folder, benchmark = BENCHMARKS[options.name]
    if not (options.data / folder).is_dir():
        sys.exit(f"{options.data / folder} is missing. Make it with: python {ROOT.name}/datasets.py {folder}")
    benchmark(options.data / folder, options.out)
