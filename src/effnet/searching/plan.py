"""The plan of a search: its options, images, candidates and length of trainings, saved in its folder.

args.yaml              options, recipe and networks; with the two files below, all that resuming needs
split.csv              which image is in which split
baseline.yaml          the baseline at the resolution of the search
candidates.csv         the networks: alpha, beta and gamma, the effective growth, and the cost
trials.csv             a line for each finished training
rule.yaml              alpha, beta and gamma of the best candidate, and how they were found, for effnet scale --rule
verdict.json           which candidates are level with the best, and how often the ranking changed
search.png             the scores of all candidates
pixels/                decoded images, until the search is over
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from cyclopts import Parameter

from effnet.arch.cost import cost
from effnet.arch.spec import FitMode, InputSpec, NetworkSpec
from effnet.arch.specfile import read_mapping, spec_text
from effnet.arch.variants import spec as make_spec
from effnet.console import Amount, csv_lines
from effnet.data.dataset import (
    SIZE,
    Dataset,
    Sample,
    explain_one_class,
    manifest,
    read_data,
    read_manifest,
    root_of,
    split_data,
)
from effnet.data.shards import absolute, text_of
from effnet.errors import ArgumentError, DataError
from effnet.fields import (
    non_negative_float,
    non_negative_int,
    one_of,
    positive_float,
    positive_int,
    read_fields,
    seed_number,
)
from effnet.files import names_in, write_text
from effnet.machine import this_machine
from effnet.scaling.budget import Budget
from effnet.scaling.compound import Rule, read_rule
from effnet.searching.candidates import PRODUCT, Candidate, grid
from effnet.searching.halving import Rung, make_rungs
from effnet.training.execution import LIBRARIES, most_workers
from effnet.training.recipe import Recipe
from effnet.version import __version__, is_newer, newer_file

ARGS, SPLIT, BASELINE, CANDIDATES, TRIALS = "args.yaml", "split.csv", "baseline.yaml", "candidates.csv", "trials.csv"
CACHE = "pixels"
DIMENSIONS = ("depth", "width", "resolution")
LARGEST_PHI = 16  # 65,536 times the multiply-adds
DECODING = "decoding images"  # a progress task


@dataclass(frozen=True)
class SearchOptions:
    """What a search compares, and how its networks are trained; fixed once it has begun."""

    step: float = 0.05
    """Step of the grid for alpha, beta and gamma, which starts at 1."""
    tolerance: float = 0.1
    """Largest difference of alpha beta^2 gamma^2 from 2."""
    phi: float = 1.0
    """1, as in the paper, compares networks with twice the multiply-adds, 2 with four times."""
    triple: Annotated[tuple[str, ...], Parameter(negative=())] = ()
    """A candidate as alpha,beta,gamma, instead of the grid; may be repeated."""
    memory: Amount | None = None
    """Limit on a candidate's inference memory, the paper's target_memory: 10MB."""
    params: Amount | None = None
    """Limit on a candidate's parameters: 1M."""
    latency: Amount | None = None
    """Limit on a candidate's measured time for one image on this machine: 5ms."""
    rungs: int = 3
    """Stages; after each, the best third goes on to trainings three times as long."""
    seeds: int = 5
    """Trainings of each finalist."""
    finalists: int = 4
    """Least number of candidates at the last rung."""
    epochs: float | None = None
    """Length of the longest training. Default: 600 steps."""
    resolution: int | None = None
    """Resolution of the baseline in pixels. Default: half the images' own, if that is less than the baseline's."""
    recipe: str = "scratch"
    """How networks are trained: scratch, paper, or a YAML file. Images are only mirrored and shifted."""
    fit: FitMode = "squash"
    """How images become square: squash, pad or crop."""
    images: int | None = None
    """Training images, evenly over the classes, and limit on images to score with. Default: all."""
    val: float = 0.15
    """Share of the images to score networks with, if the data has no val split."""
    seed: int = 0
    """Seed of the split, the initial weights and the order of the images."""
    device: str = "cpu"
    """Device for the trainings: cpu or cuda."""

    def __post_init__(self) -> None:
        """Raise ArgumentError if a value is outside its range, or a triple's product is too far from 2."""
        object.__setattr__(self, "triple", tuple(self.triple))
        one_of("fit", self.fit, FitMode)
        _check_positive(self, ("epochs",), ("images", "resolution", "rungs", "seeds", "finalists"))
        seed_number("seed", self.seed)
        if not 0 < self.phi <= LARGEST_PHI:
            raise ArgumentError("phi", self.phi, f"must be more than 0 and at most {LARGEST_PHI}.")
        for rule in map(read_rule, self.triple):
            if abs(rule.product - PRODUCT) > self.tolerance + 1e-9:
                product = f"has alpha beta^2 gamma^2 = {rule.product:.3g}"
                why = f"{product}, more than {self.tolerance:g} from 2: see --tolerance."
                raise ArgumentError("triple", rule.growths, why)
        _ = self.budget

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The given triples, or the grid."""
        return tuple(map(read_rule, self.triple)) or grid(self.step, self.tolerance)

    @property
    def budget(self) -> Budget | None:
        """The limits that every candidate keeps."""
        limits = {name: getattr(self, name) for name in ("memory", "params", "latency")}
        return Budget(**limits) if any(value is not None for value in limits.values()) else None


@dataclass(frozen=True)
class WorkOptions:
    """Where networks are trained and for how long, until the search is resumed."""

    minutes: float | None = None
    """Time after which no training starts; the verdict uses the finished ones. 0: only the verdict."""
    trials: int | None = None
    """Most trainings to start now. 0: only the verdict on finished ones."""
    workers: int | None = None
    """Trainings at a time, each on one thread. Default: one per core, or what the Ray cluster has room for."""
    ray: str | None = None
    """Address of a Ray cluster to train on: auto, ray://HOST:10001; local starts one here. Default: processes."""

    def __post_init__(self) -> None:
        """Raise ArgumentError if a value is outside its range."""
        _check_positive(self, (), ("workers",))
        if self.minutes is not None:
            non_negative_float("minutes", self.minutes)
        if self.trials is not None:
            non_negative_int("trials", self.trials)

    def count_workers(self, device: str) -> int:
        """Trainings at a time on this machine."""
        return self.workers or (min(this_machine().cores, most_workers(LIBRARIES)) if device == "cpu" else 1)


def _check_positive(options: object, floats: Sequence[str], integers: Sequence[str]) -> None:
    for name in (*floats, *integers):
        if (value := getattr(options, name)) is not None:
            (positive_float if name in floats else positive_int)(name, value)


@dataclass(frozen=True)
class SearchPlan:
    """Everything that determines a search."""

    folder: Path
    options: SearchOptions
    data: Dataset
    recipe: Recipe
    baseline: NetworkSpec
    candidates: tuple[Candidate, ...]
    epochs: float  # of the longest training

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """The stages of the search."""
        options = self.options
        return make_rungs(len(self.candidates), rungs=options.rungs, seeds=options.seeds, finalists=options.finalists)

    @property
    def names(self) -> list[str]:
        """The candidates' names."""
        return [each.network.name for each in self.candidates]

    @property
    def input_spec(self) -> InputSpec:
        """How images are prepared, except for their size."""
        return InputSpec(fit=self.options.fit).with_channels(self.baseline.in_channels)

    def write(self, data: Path) -> None:
        """Write the files of a search that has no trial yet, args.yaml last."""
        write_text(self.folder / SPLIT, manifest(self.data, sizes=True))
        write_text(self.folder / BASELINE, spec_text(self.baseline))
        rows = [candidate_row(place, each) for place, each in enumerate(self.candidates)]
        write_text(self.folder / CANDIDATES, csv_lines([tuple(rows[0]), *(tuple(row.values()) for row in rows)]))
        values = {
            "effnet": __version__,
            "data": text_of(absolute(data)),
            "data_sha256": self.data.digest,
            "epochs": self.epochs,
            "options": dataclasses.asdict(self.options),
            "recipe": dataclasses.asdict(self.recipe),
            "candidates": [
                {"triples": [rule.growths for rule in each.triples], "network": each.network.to_dict()}
                for each in self.candidates
            ],
        }
        plain = json.loads(json.dumps(values))  # tuples as lists
        plain["sha256"] = _digest(plain)
        write_text(self.folder / ARGS, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))

    @classmethod
    def read(cls, folder: Path, data: Path | None = None) -> SearchPlan:
        """The plan in a folder; `data` is where the images are now, if they were moved.

        Raises:
            ArgumentError: there is none, or it was edited.
            DataError: images have changed or are gone.
        """
        if not (folder / ARGS).is_file() or "candidates" not in (values := dict(read_mapping(folder / ARGS))):
            raise ArgumentError("resume", str(folder), "is not a search's folder.")
        if is_newer(version := values.get("effnet")):
            raise ArgumentError("resume", str(folder), newer_file(version, "only that version can resume it"))
        if "sha256" not in values:
            why = "was begun by an older effnet and cannot be resumed; start over: effnet search DATA"
            raise ArgumentError("resume", str(folder), f"{why}.")
        if values["sha256"] != _digest(values):
            raise ArgumentError(
                "resume", str(folder), f"has an {ARGS} that was edited since the search began: undo the change."
            )
        root = data or Path(values["data"])
        images = read_manifest(folder / SPLIT, root_of(root))
        if images.digest != values["data_sha256"]:
            raise DataError(f"{root} has changed since the search began: images differ from {folder / SPLIT}")
        baseline = make_spec(str(folder / BASELINE))
        found = [
            Candidate.of(baseline, NetworkSpec.from_dict(each["network"]), [Rule(*row) for row in each["triples"]])
            for each in values["candidates"]
        ]
        options = read_fields(SearchOptions, values["options"])
        recipe = read_fields(Recipe, values["recipe"])
        return cls(folder, options, images, recipe, baseline, tuple(found), values["epochs"])


def is_unborn(folder: Path) -> bool:
    """Whether a folder holds a search that was killed before its plan was whole."""
    names = names_in(folder)
    sized = SPLIT in names and SIZE.encode() in (folder / SPLIT).read_bytes().split(b"\n")[0]
    return sized and names <= {SPLIT, BASELINE, CANDIDATES, ARGS}


def _digest(values: Mapping[str, Any]) -> str:
    """The sha256 of the content of args.yaml, without the images' location."""
    rest = {name: value for name, value in values.items() if name not in ("data", "sha256")}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def split_images(data: Path, options: SearchOptions) -> Dataset:
    """The data in a train and a val split, with as many images as the options say; DataError if one is empty."""
    whole = split_data(read_data(data), val=options.val, test=0.0, seed=options.seed)
    if len(whole.classes) < 2:
        raise DataError(f"{data} has one class, at least two are needed: {explain_one_class(whole)}")
    if options.images is not None and options.images < len(whole.classes):
        raise DataError(f"{data} has {len(whole.classes)} classes, more than --images {options.images}")
    kept: list[Sample] = []
    for split in ("train", "val"):
        if split not in whole.splits:
            raise DataError(f"{data} leaves no image for {split} at --val {options.val:g}")
        kept += _choose(whole.subset(split).samples, options.images or len(whole), options.seed)
    return dataclasses.replace(whole, samples=tuple(sorted(kept, key=lambda sample: sample.name)))


def _choose(samples: Sequence[Sample], count: int, seed: int) -> Sequence[Sample]:
    """At most `count` random samples, evenly over the classes."""
    seen = Counter[int]()

    def turn(sample: Sample) -> int:
        seen[sample.label] += 1
        return seen[sample.label]

    return sorted(random.Random(seed).sample(samples, len(samples)), key=turn)[:count]


def candidate_row(place: int, candidate: Candidate) -> dict[str, Any]:
    """A line of candidates.csv."""
    network, price = candidate.network, cost(candidate.network)
    row = {
        "candidate": place,
        "network": network.name,
        "depth": round(network.depth, 6),
        "width": round(network.width, 6),
        "resolution": network.resolution,
        "layers": " ".join(map(str, network.layers)),
        **{f"effective_{name}": round(growth, 4) for name, growth in zip(DIMENSIONS, candidate.effective, strict=True)},
        "macs": price.macs,
        "params": price.params,
        "ratio": round(candidate.ratio, 4),
    }
    if candidate.triples:
        row |= dict(zip(("alpha", "beta", "gamma"), candidate.triples[0].growths, strict=True))
        others = (" ".join(f"{growth:g}" for growth in rule.growths) for rule in candidate.triples[1:])
        row["others"] = "; ".join(others)
    return row
