"""What a search and a comparison share: the data, the baseline on it, how long a training is, the study and its folder.

A contest's folder:

split.csv              which image is in which part
study.sqlite3          the trainings, unless another database was named
trials.csv             a row for each finished training
candidates.csv         the networks: what they grow by, as asked and in effect, and what they cost
pixels/                decoded images, until the contest is over
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import itertools
import math
import random
import re
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from effnet.arch.cost import cost
from effnet.arch.spec import FitMode, InputSpec, NetworkSpec
from effnet.arch.variants import spec as make_spec
from effnet.data.dataset import Dataset, Sample, manifest, read_data, read_manifest, split_data
from effnet.errors import ArgumentError, DataError
from effnet.fields import one_of, positive_float, positive_int
from effnet.machine import this_machine
from effnet.progress import Progress
from effnet.searching.candidates import suited
from effnet.searching.crew import CACHE, Task, together
from effnet.searching.halving import Job, Plan
from effnet.searching.score import PARTS, Scorer
from effnet.searching.study import Study
from effnet.training.recipe import read_recipe
from effnet.training.run import ARGS, SPLIT, write_text
from effnet.training.start import short_side

MINUTES = 60.0  # for which the trainings are made to last, where nothing else is said
USED = 0.8  # of the minutes: workers share the memory's bandwidth, and images have to be decoded
TIMED = 8  # steps
LEAST_STEPS = 50  # of the shortest training
EVALUATION = 1 / 3  # of the time of a training step, for as many images
DEVICES = ("cpu", "cuda")
CANDIDATES = "candidates.csv"


@dataclass(frozen=True)
class Terms:
    """What a user says about a contest."""

    data: str  # a folder or a manifest
    baseline: str | NetworkSpec = "b0"  # a variant, another baseline's name, a spec.yaml
    out: str | Path | None = None  # None: runs/search and a name
    resolution: int | None = None  # of the baseline; None: see `suited`
    recipe: str = "scratch"
    fit: FitMode = "squash"  # how images become square
    images: int | None = None  # of the training part, evenly over the classes; None: all
    val: float = 0.15  # share of data without a val part
    seed: int = 0
    epochs: float | None = None  # of the longest training; None: what fits into the minutes
    minutes: float | None = None  # no training begins after so many
    trials: int | None = None  # no more trainings than these, this time
    workers: int | None = None  # processes; None: one for each core
    storage: str | None = None  # the URL of a database, in place of a file
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ArgumentError: a value is outside its range.
        """
        one_of("fit", self.fit, FitMode)
        for field in ("epochs", "minutes"):
            if getattr(self, field) is not None:
                positive_float(field, getattr(self, field))
        for field in ("images", "trials", "workers", "resolution"):
            if getattr(self, field) is not None:
                positive_int(field, getattr(self, field))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ArgumentError("seed", self.seed, "must be a whole number from 0 on.")
        kind = self.device.partition(":")[0]
        if kind not in DEVICES or not {"cpu": True, "cuda": torch.cuda.is_available()}[kind]:
            raise ArgumentError("device", self.device, f"is not there: {' or '.join(DEVICES)}, if torch sees it.")


class Contest:
    """Networks of one baseline that are trained briefly on one data set.

    Args:
        terms: what the user says.
        kind: "search" or "compare", the name of its folder's.
        progress: told of trainings and of what the user should know.

    Raises:
        DataError: the data cannot be used.
        ArgumentError: a value is outside its range.
        MissingExtraError: Optuna is not installed.
    """

    def __init__(self, terms: Terms, kind: str, progress: Progress) -> None:
        self.terms, self.progress = terms, progress
        baseline = make_spec(terms.baseline)
        self.out = self._folder(f"{kind}-{Path(terms.data).resolve().stem}-{baseline.name}")
        self.recipe = read_recipe(terms.recipe)
        if not self.recipe.fresh:
            words = "is for networks with weights: take scratch, paper, or a YAML file with base: scratch."
            raise ArgumentError("recipe", self.recipe.name, words)
        self.data = self._kept() if self.known and (self.out / SPLIT).exists() else self._split()
        self.native = short_side(self.data)
        counted = make_spec(baseline, num_classes=len(self.data.classes))
        self.baseline = suited(counted, self.native, terms.resolution)
        self.see = InputSpec(fit=terms.fit).with_channels(baseline.in_channels)

    @functools.cached_property
    def study(self) -> Study:
        """The trainings' database, made where there is none."""
        return Study(self.out, storage=self.terms.storage)

    @property
    def known(self) -> dict[str, Any] | None:
        """What the contest was begun with; None for a new one, of which nothing is on the disk yet."""
        begun = self.terms.storage is not None or (self.out / SPLIT).exists()
        return self.study.about if begun else None

    @property
    def moved(self) -> str:
        """How the baseline differs from what the user named, in words; empty where it does not."""
        named = make_spec(self.terms.baseline)
        if named.resolution == self.baseline.resolution:
            return ""
        strides = _strides(named) - _strides(self.baseline)
        fewer = f" and {strides} strides of 2 fewer" if strides else ""
        return (
            f"the images have {self.native} px, so {named.name} starts at {self.baseline.resolution} px{fewer}: "
            f"{cost(self.baseline).macs / 1e6:.4g} M multiply-adds, last map {self.baseline.final_size} px"
        )

    def compete(
        self,
        networks: Sequence[NetworkSpec],
        rows: Sequence[Mapping[str, Any]],
        plan: Plan,
        shares: Sequence[float],
        jobs: Sequence[Job],
        **about: Any,
    ) -> dict[Job, float] | None:
        """Train until nothing is left; the scores, or None where time or trials ran out first.

        Args:
            networks: the candidates.
            rows: of candidates.csv.
            plan: what there is to do, given the scores.
            shares: of the longest training, at each rung.
            jobs: all trainings; where the plan decides later who takes part, others of the same cost stand for them.
            about: what the study is about, beside the terms and the networks.
        """
        terms, known = self.terms, self.known
        epochs = terms.epochs or (known or {}).get("epochs") or self._epochs(networks, shares, jobs)
        if terms.epochs is None and known is None and (known := self.known):
            epochs = known["epochs"]  # of a machine that began with the same study in the meantime
        if known is None or not (self.out / SPLIT).exists():
            write_text(self.out / SPLIT, manifest(self.data, sizes=True))
            self.data = self._kept()
        self.study.begin(
            {
                **about,
                "networks": [network.to_dict() for network in networks],
                "recipe": self.recipe.to_dict(),
                "fit": terms.fit,
                "data": self.data.digest,
                "val": terms.val,
                "images": terms.images,
                "seed": terms.seed,
                "epochs": epochs,
            }
        )
        _write_rows(self.out / CANDIDATES, rows)
        done = len(self.study.scores())
        self.progress.message(
            f"{len(jobs)} trainings of {len(networks)} networks, the longest {epochs:.3g} epochs of "
            f"{len(self.data.part('train')):,} images; {done} are done. All in {self.out}"
        )
        lengths = tuple(epochs * share for share in shares)
        task = Task(
            self.out, terms.storage, plan, len(jobs), tuple(networks), lengths, self.data, self.recipe, self.see,
            terms.seed, terms.device,
        )  # fmt: skip
        until = None if terms.trials is None else done + terms.trials
        if not together(task, self.workers, self.progress, minutes=terms.minutes, until=until):
            return None
        shutil.rmtree(self.out / CACHE, ignore_errors=True)
        return self.study.scores()

    @property
    def workers(self) -> int:
        """Processes that train."""
        return self.terms.workers or (1 if self.terms.device != "cpu" else this_machine().cores)

    def _folder(self, name: str) -> Path:
        """Where everything is kept: a new folder, or this contest's."""
        out = Path("runs", "search", re.sub(r"[^\w.-]+", "-", name)) if self.terms.out is None else Path(self.terms.out)
        if "?" in str(out.absolute()):
            raise ArgumentError("out", str(out), "must have no question mark: it ends the path in a database's URL.")
        empty = not out.exists() or (out.is_dir() and not any(out.iterdir()))
        if not empty and (not (out / SPLIT).is_file() or (out / ARGS).exists()):  # which a training's folder has
            raise ArgumentError("out", str(out), "exists and holds something else; choose another folder.")
        return out

    def _split(self) -> Dataset:
        """The data in two parts, with as many images as were asked for."""
        root = Path(self.terms.data)
        data = split_data(read_data(root), val=self.terms.val, test=0.0, seed=self.terms.seed)
        for part in PARTS:
            if part not in data.splits:
                raise DataError(f"{root} leaves no image for {part} at --val {self.terms.val:g}")
        kept: list[Sequence[Sample]] = [data.part(part).samples for part in PARTS]
        if self.terms.images is not None:
            kept = [_some(part, self.terms.images, self.terms.seed) for part in kept]
        samples = (sample for part in kept for sample in part)
        return dataclasses.replace(data, samples=tuple(sorted(samples, key=lambda sample: sample.path)))

    def _kept(self) -> Dataset:
        """The data as the folder's split.csv has it."""
        root = Path(self.terms.data)
        return read_manifest(self.out / SPLIT, root if root.is_dir() else root.parent)

    def _epochs(self, networks: Sequence[NetworkSpec], shares: Sequence[float], jobs: Sequence[Job]) -> float:
        """The length of the longest training with which all of them take USED of the minutes."""
        macs = [cost(network).macs for network in networks]
        timed = sorted(range(len(networks)), key=macs.__getitem__)[len(networks) // 2]
        per_image = self._seconds_per_image(networks[timed]) / macs[timed]  # and multiply-add
        train, minutes = len(self.data.part("train")), self.terms.minutes or MINUTES
        scored = sum(macs[job.candidate] for job in jobs) * per_image * EVALUATION * len(self.data.part("val"))
        epoch = sum(shares[job.rung] * macs[job.candidate] for job in jobs) * per_image * train  # seconds, of all
        a_minute = USED * 60 * self.workers
        epochs = (a_minute * minutes - scored) / epoch
        least = self.recipe.batch * LEAST_STEPS / (min(shares) * train)
        if epochs < least:
            raise ArgumentError(
                "minutes",
                minutes,
                f"leaves trainings of fewer than {LEAST_STEPS} steps: give about "
                f"{math.ceil((least * epoch + scored) / a_minute)}, fewer candidates or seeds, or a smaller baseline.",
            )
        return float(f"{epochs:.3g}")

    def _seconds_per_image(self, network: NetworkSpec) -> float:
        """How long a training step takes, on one thread, over its images."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if self.terms.device == "cpu" else threads)
        try:
            few = tuple(sample for part in PARTS for sample in self.data.part(part).samples[: self.recipe.batch])
            data = dataclasses.replace(self.data, samples=few)
            with tempfile.TemporaryDirectory() as cache:
                scorer, marks = Scorer(data, self.recipe, self.see, Path(cache), self.terms.device), list[float]()

                def mark(done: int, total: int) -> None:
                    marks.append(time.perf_counter())
                    self.progress.update("steps timed", done, total)

                scorer(network, TIMED, 0, mark)
            return statistics.median(b - a for a, b in pairwise(marks)) / scorer.batch
        finally:
            torch.set_num_threads(threads)


def described(place: int, network: NetworkSpec, effective: tuple[float, float, float]) -> dict[str, Any]:
    """What candidates.csv says about every network."""
    price = cost(network)
    alpha, beta, gamma = effective
    return {
        "candidate": place,
        "network": network.name,
        "depth": round(network.depth, 6),
        "width": round(network.width, 6),
        "resolution": network.resolution,
        "layers": " ".join(map(str, network.layers)),
        "effective_depth": round(alpha, 4),
        "effective_width": round(beta, 4),
        "effective_resolution": round(gamma, 4),
        "macs": price.macs,
        "params": price.params,
    }


def _write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(file, text.getvalue())


def _some(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """`count` samples, evenly over the classes, in their order; all where there are no more."""
    places: dict[int, list[int]] = defaultdict(list)
    for place, sample in enumerate(samples):
        places[sample.label].append(place)
    for label, some in sorted(places.items()):
        random.Random(f"{seed} {label}").shuffle(some)
    turns = [place for turn in itertools.zip_longest(*places.values()) for place in turn if place is not None]
    return [samples[place] for place in sorted(turns[:count])]


def _strides(network: NetworkSpec) -> int:
    strides = [network.stem_stride, 2 if network.stem_pool else 1, *(row.stride for row in network.stages)]
    return strides.count(2)
