"""The networks that a fit considers, what they cost, and which limit rules each one out.

    weights        every set of ImageNet weights on this machine, at multiples of 32 px
    inherited      narrower networks, and the one that the paper's rule derives from the budget, initialized from such
                   weights; only where whole networks exceed a limit or leave most of it unused
    scratch        B0 with random weights, if there are enough images

Resolutions go up to the images' own, and in wider steps up to the one that the weights were trained at: the weights do
better on small images that are enlarged. No weights are used far above their own resolution. Multiply-adds, parameters
and file size follow from formulas. Latency and memory are measured in the engine that will run the model, with random
weights, which take as long as trained ones.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effnet import console
from effnet.arch.cost import cost
from effnet.arch.memory import file_bytes, inference_memory
from effnet.arch.spec import NetworkSpec
from effnet.arch.specfile import spec_text
from effnet.arch.variants import spec as make_spec
from effnet.data.image import natural_resolution
from effnet.errors import ArgumentError, EffnetError, MissingExtraError
from effnet.exporting.int8 import write_random_int8
from effnet.files import size_of, write_text
from effnet.fitting.measurement import measure
from effnet.fitting.settings import CANDIDATES, LIMITS, FitOptions, FitPlan, amount
from effnet.machine import this_machine
from effnet.metrics.familiarity import most_bytes
from effnet.progress import SILENT, Progress
from effnet.scaling.budget import SMALLEST_RESOLUTION, Budget
from effnet.scaling.fit import fit_spec
from effnet.training.execution import Images, choose_execution, guess_step_seconds
from effnet.training.recipe import RECIPES, Recipe
from effnet.training.settings import Settings
from effnet.training.train import FEW, batch_for
from effnet.weights.registry import REGISTRY, KnownWeights, fetch, is_here

STEP = 32  # pixels between two resolutions
BEYOND = 1.3  # the highest resolution, relative to the one that the weights were trained at
WIDTHS = (0.75, 0.5, 0.35)  # of inherited networks, relative to the network of the weights
SCRATCH_IMAGES, SCRATCH_EACH = 20_000, 500  # fewest training images, in all and per class, to train B0 from scratch
MEASURED = {"latency", "memory"}  # limits that are measured, not computed
SCRATCH_SIZES = (32, 64)  # pixels
INT8, INT8_MINUTES = 3, 5  # most networks that are quantised to see what they cost; fewest minutes for which it pays
IN_8_BITS = {"file_size": 0.26, "latency": 0.7}  # relative to fp32, at best: .28 for Lite0's file, .27 for Lite2's
TOO_SLOW = 1.5  # relative to a limit; a network this slow is not measured at higher resolutions
MARGIN = 0.95  # share of a measured limit that a network may take, since times vary
OVERHEAD = 8_000_000  # bytes that the engine takes besides weights and maps: 5.6 to 9 MB on a Xeon (AVX-512)

Body = tuple[float, ...]  # identifies a network apart from its resolution


@dataclass(frozen=True)
class Refusal:
    """The limit that a network exceeds."""

    limit: str
    value: float
    allowed: float


@dataclass(frozen=True)
class FitCandidate:
    """A network that may be trained."""

    name: str
    spec: NetworkSpec
    weights: str = ""  # the pretrained weights that it starts from; "" for random ones
    whole: bool = True  # whether these weights are of a network of this width and depth
    int8: bool = False  # whether it will run in 8 bits
    costs: dict[str, float] = dataclasses.field(default_factory=dict)  # by LIMITS and "slowest_tenth", where known
    refused: Refusal | None = None

    @property
    def start(self) -> str:
        """Where its weights come from, for display."""
        if not self.weights:
            return "random"
        return f"weights of {self.weights}" if self.whole else f"inherited from {self.weights}"

    def settings(self, folder: Path, options: FitOptions, **others: Any) -> Settings:
        """Training settings; a network without pretrained weights of its own is written to `folder` as a spec.yaml."""
        shared = {"fit": options.fit, "seed": options.seed, "train_memory": options.train_memory} | others
        if self.weights and self.whole:
            return Settings(model=self.weights, resolution=self.spec.resolution, **shared)
        file = folder / f"{self.name}.yaml"
        write_text(file, spec_text(self.spec))
        return Settings(model=str(file), init=self.weights or None, **shared)

    def recipe(self, images: int) -> Recipe:
        """The recipe for this number of training images."""
        if not self.weights:
            return RECIPES["scratch"]
        return RECIPES["few" if images < FEW and self.whole else "finetune"]

    def pace(self, images: int) -> tuple[Recipe, float]:
        """The recipe with the batch for this number of training images, and a rough time per step here, in seconds."""
        recipe = self.recipe(images)
        recipe = dataclasses.replace(recipe, batch=batch_for(recipe, images, 1))
        return recipe, guess_step_seconds(self.spec, recipe, Settings(), this_machine().cores)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        costs = dict.fromkeys((*LIMITS, "slowest_tenth", "train_memory")) | self.costs
        refused = self.refused and dataclasses.asdict(self.refused)
        return {
            "name": self.name,
            "start": self.start,
            "weights": self.weights,
            "whole": self.whole,
            "int8": self.int8,
            "resolution": self.spec.resolution,
            **costs,
            "refused": refused,
            "network": self.spec.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FitCandidate:
        """The candidate of `to_dict`."""
        costs = {name: values[name] for name in (*LIMITS, "slowest_tenth", "train_memory") if values[name] is not None}
        refused = values["refused"] and Refusal(**values["refused"])
        names = {name: values[name] for name in ("name", "weights", "whole", "int8")}
        return cls(**names, spec=NetworkSpec.from_dict(values["network"]), costs=costs, refused=refused)


@dataclass(frozen=True)
class Facts:
    """What the candidates depend on besides the options."""

    classes: int
    train: int  # images
    side: int  # the images' shorter side in pixels


def find_candidates(plan: FitPlan, facts: Facts, progress: Progress = SILENT) -> list[FitCandidate]:
    """Every network that is considered, with its costs and the limit it exceeds, if any; saved in candidates.json."""
    file = plan.folder / CANDIDATES
    if file.is_file():
        return [FitCandidate.from_dict(values) for values in json.loads(file.read_text("utf-8"))["candidates"]]
    began, options = time.monotonic(), plan.options
    found = [_counted(each, options, facts) for each in _propose(options, facts, _weights_here(progress))]
    found = _measured(found, options, progress)
    kept = any(each.refused is None and each.whole for each in found)
    worth = options.precision == "int8" or not kept or options.minutes >= INT8_MINUTES
    if worth and options.precision in (None, "int8") and options.engine in ("auto", "openvino"):
        found = _quantised(found, options, progress)
    rows = [each.to_dict() for each in found]
    write_text(file, json.dumps({"seconds": time.monotonic() - began, "candidates": rows}, indent=1) + "\n")
    return found


def require_any(found: Sequence[FitCandidate], options: FitOptions) -> list[FitCandidate]:
    """The candidates that keep every limit.

    Raises:
        ArgumentError: there is none; the message says what the smallest network needs.
    """
    kept = [each for each in found if each.refused is None]
    if kept:
        return kept
    for limit, allowed in options.limits.items():
        name = "slowest_tenth" if limit == "latency" else limit
        known = [each for each in found if name in each.costs]
        least = min(known, key=lambda each: each.costs[name], default=None)
        if least is not None and least.costs[name] > allowed:
            need = console.amount(limit, least.costs[name])
            rule = f"cannot be kept: the smallest network that is considered, {least.name}, needs {need}."
            raise ArgumentError(limit, amount(limit, allowed), rule)
    nearest = min(found, key=lambda each: each.refused.value / each.refused.allowed if each.refused else 0.0)
    refusal = nearest.refused
    assert refusal is not None
    need = f"{nearest.name} comes nearest and needs {console.amount(refusal.limit, refusal.value)}"
    raise ArgumentError(
        refusal.limit, amount(refusal.limit, refusal.allowed), f"cannot be kept with the other limits: {need}."
    )


def resolutions(side: int, own: int, fixed: int | None) -> list[int]:
    """Resolutions to try, in pixels, for weights that were trained at `own` and images with this shorter side."""
    if fixed is not None:
        return [fixed]
    whole, natural = own // STEP * STEP, natural_resolution(side)
    sizes = {size for size in range(SMALLEST_RESOLUTION, int(BEYOND * own) + 1, STEP) if size <= natural}
    return sorted(sizes | set(range(2 * STEP, whole, 2 * STEP)) | {whole})


def _weights_here(progress: Progress) -> list[KnownWeights]:
    """The pretrained weights on this machine, without damaged files."""
    here = []
    for row in filter(is_here, REGISTRY.values()):
        try:
            fetch(row)
            here.append(row)
        except EffnetError as error:
            progress.message(f"{row.name} is skipped: {error}")
    return here


def _propose(options: FitOptions, facts: Facts, here: Sequence[KnownWeights]) -> Iterator[FitCandidate]:
    """The networks, without their costs; for each set of weights, the lowest resolution first."""
    for row in here:
        own = make_spec(row.variant, num_classes=facts.classes)
        for size in resolutions(facts.side, row.input.size, options.resolution):
            yield FitCandidate(f"{row.name.replace('/', '-')}-{size}", make_spec(own, resolution=size), row.name)
    if here:
        smallest = min(here, key=lambda row: cost(make_spec(row.variant)).params)
        own = make_spec(smallest.variant, num_classes=facts.classes)
        sizes = resolutions(facts.side, smallest.input.size, options.resolution)
        for width in WIDTHS:
            for size in sizes:
                spec = make_spec(own, width=width, resolution=size)
                yield FitCandidate(f"{smallest.name}-w{width:g}-{size}", spec, smallest.name, whole=False)
        if scaled := _scaled(own, options, max(sizes)):
            yield FitCandidate(f"{smallest.name}-scaled-{scaled.resolution}", scaled, smallest.name, whole=False)
    if (facts.train >= SCRATCH_IMAGES and facts.train >= SCRATCH_EACH * facts.classes) or not here:
        for size in SCRATCH_SIZES if options.resolution is None else (options.resolution,):
            stride = 1 if size < 64 else 2
            spec = make_spec("b0", num_classes=facts.classes, resolution=size, stem_stride=stride)
            yield FitCandidate(f"b0-scratch-{size}", spec)


def _scaled(own: NetworkSpec, options: FitOptions, largest: int) -> NetworkSpec | None:
    """The network that the paper's rule scales a baseline to within the counted limits, if larger than the baseline."""
    limits: dict[str, Any] = {
        name: options.limits[name] for name in ("macs", "params", "file_size") if name in options.limits
    }
    if not limits or "latency" in options.limits:
        return None
    size: dict[str, Any] = {"resolution": options.resolution} if options.resolution else {"max_resolution": largest}
    with suppress(ArgumentError):  # the rule's smallest network exceeds the budget
        found = fit_spec(Budget(**limits, **size), own).spec
        if cost(found).params > 1.1 * cost(own).params:
            return found
    return None


def _counted(candidate: FitCandidate, options: FitOptions, facts: Facts) -> FitCandidate:
    """The candidate with the costs that follow from formulas, and the first limit that they exceed."""
    spec, price = candidate.spec, cost(candidate.spec)
    costs: dict[str, float] = {
        "macs": price.macs,
        "params": price.params,
        "memory": inference_memory(spec) + file_bytes(spec) + OVERHEAD,  # weights as read and as packed
        "file_size": file_bytes(spec),
    }
    refused = None
    if options.train_memory is not None:
        recipe, _ = candidate.pace(facts.train)
        settings = Settings(train_memory=options.train_memory)
        try:
            execution = choose_execution(spec, recipe, settings, Images(facts.train, facts.side), world=1)
            costs["train_memory"] = execution.forecast_bytes
        except ArgumentError:
            refused = Refusal("train_memory", float("inf"), float(options.train_memory))
    exact = {name: limit for name, limit in options.limits.items() if name not in MEASURED}
    over = next((name for name, limit in exact.items() if costs[name] > limit), None)
    if refused is None and over is not None:
        refused = Refusal(over, costs[over], options.limits[over])
    return dataclasses.replace(candidate, costs=costs, refused=refused)


def _measured(found: list[FitCandidate], options: FitOptions, progress: Progress) -> list[FitCandidate]:
    """The candidates with latency and memory where these are limited, and the limit that each exceeds."""
    if not MEASURED & set(options.limits) or options.precision == "int8":
        return found
    backend = {"engine": options.pinned_engine, "precision": options.precision, "threads": options.threads}
    backend = {name: value for name, value in backend.items() if value is not None}
    able, done, slow = sum(each.refused is None for each in found), 0, dict[Body, Refusal]()
    for place, each in enumerate(found):
        if each.refused is None:
            done += 1
            progress.update("timing networks", done, able, each.name)
            if _body(each) in slow:  # was already much too slow at a lower resolution
                found[place] = dataclasses.replace(each, refused=slow[_body(each)])
                continue
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "spec.yaml"
                file.write_text(spec_text(each.spec), "utf-8")
                found[place] = made = _with_measured(each, file, backend, options)
            if made.refused and made.refused.value > TOO_SLOW * made.refused.allowed:
                slow[_body(each)] = made.refused
    return found


def _with_measured(candidate: FitCandidate, model: Path, backend: dict[str, Any], options: FitOptions) -> FitCandidate:
    """The candidate with its latency and memory, and the first limit that it exceeds."""
    costs, refused = candidate.costs, None
    if MEASURED & set(options.limits):
        taken = measure(model, backend, latency=options.limits.get("latency"))
        costs = costs | {"latency": taken.latency, "slowest_tenth": taken.slowest_tenth, "memory": taken.memory}
    for limit, allowed in options.limits.items():
        value = costs["slowest_tenth" if limit == "latency" else limit]
        most = MARGIN * allowed if limit in MEASURED else allowed
        if refused is None and value > most:
            refused = Refusal(limit, value, most)
    return dataclasses.replace(candidate, costs=costs, refused=refused)


def _quantised(found: list[FitCandidate], options: FitOptions, progress: Progress) -> list[FitCandidate]:
    """Adds the networks in 8 bits, if int8 was requested or may be the only way to keep the latency or file size.

    Each is exported to see the size of its file; a trained model adds the data for detecting unfamiliar images. If
    latency is limited as well, each resolution is measured.
    """
    forced = options.precision == "int8"
    chosen = [each for each in found if each.weights and (forced or each.whole) and _in_reach(each.refused, forced)]
    chosen = sorted(chosen, key=lambda each: -each.costs["macs"])
    if MEASURED & set(options.limits):
        chosen = chosen[: INT8 * (1 + forced)]
    bodies = list(dict.fromkeys(map(_body, chosen)))[: INT8 * (1 + forced)]
    chosen = [each for each in chosen if _body(each) in bodies]
    threads = {} if options.threads is None else {"threads": options.threads}
    made, sizes = list[FitCandidate](), dict[Body, int]()
    for done, each in enumerate(chosen, start=1):
        progress.update("networks in 8 bits", done, len(chosen), each.name)
        named = dataclasses.replace(each, name=f"{each.name}-int8", int8=True, refused=None)
        try:
            with tempfile.TemporaryDirectory() as folder:
                artifact = Path(folder) / "int8"
                if MEASURED & set(options.limits) or _body(each) not in sizes:
                    write_random_int8(each.spec, artifact)
                    sizes[_body(each)] = size_of(artifact) + most_bytes(each.spec.head_channels)
                named = dataclasses.replace(named, costs=each.costs | {"file_size": sizes[_body(each)]})
                made.append(_with_measured(named, artifact, threads, options))
        except MissingExtraError:
            if forced:
                raise
            return found
        except EffnetError as error:
            progress.message(f"{named.name} cannot be made: {error}")
    if forced:  # then no network in fp32
        found = [each for each in found if each.refused is not None and each not in chosen]
    return [*found, *made]


def _in_reach(refusal: Refusal | None, forced: bool) -> bool:
    """Whether a network may keep a limit in 8 bits that it exceeds in fp32."""
    if refusal is None:
        return forced
    share = IN_8_BITS.get(refusal.limit)
    return share is not None and (forced or share * refusal.value <= refusal.allowed)


def _body(candidate: FitCandidate) -> Body:
    """What identifies a network apart from its resolution."""
    return candidate.spec.width, candidate.spec.depth, candidate.costs["params"]
