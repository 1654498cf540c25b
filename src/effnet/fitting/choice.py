"""Chooses which of the networks that keep the budget to train: linear probes first, then short trainings.

The best networks in the probes get short trainings of equally many steps, and the better half trainings three times as
long (`searching.halving`); with equally many seconds the smallest network would win, since it learns fastest at first.
All networks are judged on the same images, taken from train and val; test images are not used.

The winner is the network that gets the most images right. A cheaper one replaces it if the images show no difference
and it gets at most half a point fewer of them right. The 1-SE rule (Breiman et al. 1984) would give up more when there
are few images: two points on 162 photos, to save budget that the user has granted anyway.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from effnet.cluster import Cluster, ClusterJob, scratch_folder
from effnet.data.dataset import Dataset
from effnet.data.image import natural_resolution
from effnet.errors import ClusterError, TrainingError
from effnet.files import write_text
from effnet.fitting.candidates import FitCandidate
from effnet.fitting.probes import PROBE, Right, probe, start_of
from effnet.fitting.settings import CHOICE, FitPlan
from effnet.metrics.familiarity import spread_classes
from effnet.metrics.intervals import Difference, Interval, compare_right, wilson
from effnet.models.efficientnet import EfficientNet
from effnet.progress import SILENT, Progress
from effnet.searching.halving import FACTOR, Job, make_rungs, open_jobs, survivors
from effnet.searching.score import load_split, train_briefly
from effnet.training.initial_network import short_side
from effnet.training.learner import Learner, derive_seed

SHARE, PROBE_SHARE = 0.25, 0.12  # share of the minutes for the choice, and for its probes
FINALISTS, INHERITED = 4, 3  # networks that are trained briefly: the best in the probes, and with inherited weights
ENLARGED = 4  # the highest resolution of a network with inherited weights, relative to the images' own
LARGER = 1.2  # multiply-adds, relative to the largest whole network, beyond which an inherited one is worth a try
LEAST_VAL, MOST_VAL = 200, 2000  # val images that a short training is scored on
SPARED = 0.005  # accuracy that may be given up for a cheaper network
# Least epochs of the training that follows, besides its recipe's least steps: Lite0 at 64 px got 92.1 % of
# Fashion-MNIST right after 1.3 epochs, 93.9 % after 4.
LEAST_EPOCHS = 3
LEAST_STEPS = 60  # of the shortest training; fewer show nothing
MOST_IMAGES, MOST_BYTES = 10_000, 2**29  # of short trainings; the bytes are pixels at the largest resolution

SHORT = "short"


@dataclass(frozen=True)
class Choice:
    """What to train, and why."""

    order: tuple[str, ...]  # names of candidates, the chosen one first
    reason: str
    scores: Mapping[str, Mapping[str, Interval]]  # of each candidate, by PROBE and SHORT
    seconds: float

    @property
    def chosen(self) -> str:
        """The name of the chosen network."""
        return self.order[0]


class ScoreRecord:
    """Which images each network got right, in a file that is rewritten after every score."""

    def __init__(self, file: Path) -> None:
        self.file = file
        values: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        self.seconds: float = values.get("seconds", 0.0)
        self.rights: dict[str, Right] = {key: _unpack(text) for key, text in values.get("right", {}).items()}
        self._since = time.monotonic()

    def get(self, key: str, score: Callable[[], Right]) -> Right:
        """The score under this name, computed if it is not known yet."""
        if key not in self.rights:
            self.keep(key, score())
        return self.rights[key]

    def keep(self, key: str, right: Right) -> None:
        """Store a score under this name, and write the file."""
        self.rights[key] = right
        self.write()

    def write(self, **more: Any) -> None:
        """Write the file."""
        now = time.monotonic()
        self.seconds, self._since = self.seconds + now - self._since, now
        values = {"seconds": self.seconds, "right": {key: _pack(right) for key, right in self.rights.items()}, **more}
        write_text(self.file, json.dumps(values, indent=1) + "\n")


def choose(
    plan: FitPlan,
    data: Dataset,
    candidates: Sequence[FitCandidate],
    progress: Progress = SILENT,
    ray: str | None = None,
) -> Choice:
    """Choose among the candidates that keep the budget; earlier scores are read from choice.json.

    Args:
        plan: the fit.
        data: the data with its splits; test is not used.
        candidates: the candidates that keep the budget.
        progress: receives the progress of probes and trainings.
        ray: the address of a Ray cluster for the short trainings; None runs them here, one after the other.
    """
    record = ScoreRecord(plan.folder / CHOICE)
    budget = 60 * plan.options.minutes
    time_given = f"{plan.options.minutes:g} minute{'' if plan.options.minutes == 1 else 's'}"
    images = len(data.subset("train"))
    learnable = _learnable(candidates, images, (1 - SHARE) * budget)
    whole = [each for each in learnable if each.whole and each.weights]
    probed = probe(plan, data, whole, record.get, PROBE_SHARE * budget, progress) if len(whole) > 1 else {}
    compared = [each for each in whole if each.name in probed] or whole
    best = sorted(compared, key=lambda each: (-int(probed[each.name].sum()) if probed else 0, _price(each)))
    others = _without_probe(learnable, whole, data)
    entrants = [*best[: FINALISTS - (len(others) > 0)], *others]
    seconds = (SHARE - PROBE_SHARE) * budget  # estimated, not timed, so that a command always makes the same choice
    while (steps := _affordable_steps(entrants, images, seconds)) < LEAST_STEPS and len(entrants) > 2:
        entrants.pop()
    val = min(MOST_VAL, len(data.subset("val")))
    rights, kind = probed, PROBE
    if len(entrants) == 1:
        order, reason = [entrants[0]], "It is the only network that keeps the budget."
        if len(learnable) > 1:
            reason = "No other network that keeps the budget starts from weights of its own or is larger."
    elif val >= LEAST_VAL and steps >= LEAST_STEPS:
        rights, order = _train(plan, data, entrants, record, steps, progress, ray)
        kind = SHORT
        order, reason = decide(order[:2], rights, f"after a short training, on {val:,} val images")
    elif probed:
        n = len(next(iter(probed.values())))
        order, reason = decide(best, probed, f"by linear probes on its features, out of fold on {n:,} images")
        why = f"{val} val images" if val < LEAST_VAL else time_given
        reason += f" No network was trained to compare: {why} are too few to show a difference."
    else:
        order = sorted(entrants, key=lambda each: (not (each.whole and each.weights), -each.costs["macs"]))
        kind_of = "starts from weights of its own and " if order[0].whole and order[0].weights else ""
        reason = f"It {kind_of}has the most multiply-adds of {len(entrants)}; there was no time to compare them."
    if left_out := len(candidates) - len(learnable):
        reason += f" {left_out} of {len(candidates)} cannot be trained for long enough in {time_given}."
    rest = [each for each in (*best, *others, *candidates) if each.name not in {one.name for one in order}]
    names = tuple(dict.fromkeys(each.name for each in (*order, *rest)))
    scores: dict[str, dict[str, Interval]] = {}
    for name, right in probed.items():
        scores.setdefault(name, {})[PROBE] = wilson(int(right.sum()), len(right))
    for name, right in rights.items() if kind == SHORT else ():
        scores.setdefault(name, {})[SHORT] = wilson(int(right.sum()), len(right))
    record.write(order=names, reason=reason)
    return Choice(names, reason, scores, record.seconds)


def decide(order: Sequence[FitCandidate], rights: Mapping[str, Right], how: str) -> tuple[list[FitCandidate], str]:
    """The order with the chosen network first, and the reason for the choice."""
    best = order[0]
    chosen, found = best, None
    for other in sorted(order[1:], key=_price):
        difference = compare_right(rights[other.name], rights[best.name])
        lost = difference.accuracy.value
        if _price(other) < _price(best) and difference.accuracy.low <= 0 and lost <= SPARED:
            chosen, found = other, difference
            break
    rest = [each for each in order if each is not chosen]
    if found is not None:
        shown = f"no difference from {best.name} was found ({_points(found)}), so this cheaper one was taken"
    else:
        runner = max(rest, key=lambda each: int(rights[each.name].sum()))
        difference = compare_right(rights[runner.name], rights[best.name])
        shown = f"it gets more images right than the next, {runner.name} ({_points(difference)})"
        if difference.accuracy.value == 0:
            shown = f"it gets as many images right as {runner.name}, and is cheaper"
        elif not difference.significant:
            shown += ", though so few images cannot prove it"
    return [chosen, *rest], f"{chosen.name}: {shown}, {how}."


def _points(difference: Difference) -> str:
    """The difference in percentage points, with its interval."""
    gain = difference.accuracy
    return f"{100 * gain.value:+.2f} points, {100 * gain.low:+.2f} to {100 * gain.high:+.2f}"


def _price(candidate: FitCandidate) -> float:
    """By what networks count as cheaper: latency where it is known, else multiply-adds."""
    return candidate.costs.get("latency") or 1e-11 * candidate.costs["macs"]


def _learnable(candidates: Sequence[FitCandidate], images: int, seconds: float) -> list[FitCandidate]:
    """The candidates that there is time to train for a few epochs and for the least steps of their recipe.

    If there is no such candidate, the quickest. Linear probes prefer high resolutions, at which a network may not see
    all images even once.
    """

    def lasts(candidate: FitCandidate) -> float:
        recipe, step = candidate.pace(images)
        return max(LEAST_EPOCHS * (images // recipe.batch), recipe.least_steps) * step

    most = max(seconds, min(map(lasts, candidates)))
    return [each for each in candidates if lasts(each) <= most]


def _without_probe(
    candidates: Sequence[FitCandidate], whole: Sequence[FitCandidate], data: Dataset
) -> list[FitCandidate]:
    """Networks without pretrained weights of their own to train briefly; the last is the first to be dropped.

    If whole networks keep the budget, a larger one; else the widest, at resolutions that do not enlarge images much.
    """
    narrow = sorted(
        (each for each in candidates if each.weights and not each.whole), key=lambda each: each.costs["macs"]
    )
    if whole:
        largest = max(each.costs["macs"] for each in whole)
        inherited = [each for each in narrow if each.costs["macs"] > LARGER * largest][-1:]
    else:
        widest = max((each.costs["params"] for each in narrow), default=0.0)
        most = ENLARGED * natural_resolution(short_side(data))
        inherited = [each for each in narrow if each.costs["params"] == widest and each.spec.resolution <= most]
        inherited = inherited[-INHERITED:]
    return [*inherited, *[each for each in candidates if not each.weights][:1]]


def _affordable_steps(entrants: Sequence[FitCandidate], images: int, seconds: float) -> int:
    """Steps of the shortest training by the estimated cost of a step, if the two most expensive networks go on."""
    each = [candidate.pace(images)[1] for candidate in entrants]
    return int(seconds / (sum(each) + FACTOR * sum(sorted(each)[-2:])))


def _train(
    plan: FitPlan,
    data: Dataset,
    entrants: Sequence[FitCandidate],
    record: ScoreRecord,
    steps: int,
    progress: Progress,
    ray: str | None,
) -> tuple[dict[str, Right], list[FitCandidate]]:
    """Short trainings: which val images the finalists get right, and the entrants, best first."""
    rungs = make_rungs(len(entrants), rungs=2, seeds=1, finalists=2)
    largest = max(each.spec.resolution for each in entrants)
    sizes = {"train": min(MOST_IMAGES, MOST_BYTES // (3 * largest**2)), "val": MOST_VAL}
    train, val = (_some(data.subset(split), most, plan) for split, most in sizes.items())
    scores: dict[Job, float] = {}
    rights: dict[Job, Right] = {}
    total, done = sum(rung.trainings for rung in rungs), 0
    scratch = f"effnet-fit-{data.digest[:16]}-{os.getpid()}"
    with (
        tempfile.TemporaryDirectory(dir=plan.folder, prefix=".pixels.") as cache,
        Cluster(ray, torch.get_num_threads(), scratch=scratch) if ray else nullcontext() as cluster,
    ):
        while jobs := open_jobs(rungs, scores):
            work: dict[Job, ClusterJob] = {}
            for job in jobs:
                candidate, lasts = entrants[job.candidate], round(steps * rungs[job.rung].share / rungs[0].share)
                seed = derive_seed(plan.options.seed, job.rung)
                work[job] = f"{SHORT} {candidate.name} {job.rung}", (plan, candidate, train, val, lasts, seed)
            if cluster:
                _train_elsewhere(cluster, scratch, work.values(), record, progress)
            for job, (name, arguments) in work.items():
                candidate, lasts = arguments[1], arguments[4]
                score = functools.partial(_train_one, Path(cache, "pixels"), progress, *arguments)
                progress.update("short trainings", done, total, f"{candidate.name}, {lasts} steps")
                rights[job] = record.get(name, score)
                scores[job] = float(rights[job].mean())
                done += 1
                progress.message(f"{candidate.name}: {scores[job]:.2%} of {len(val):,} val images")
    progress.update("short trainings", total, total)
    finalists = survivors(rungs, 1, scores) or ()
    order = sorted(finalists, key=lambda place: (-scores[Job(1, 0, place)], _price(entrants[place])))
    rest = (place for place in range(len(entrants)) if place not in order)
    order += sorted(rest, key=lambda place: -scores[Job(0, 0, place)])
    # Finalists are scored after their longer training, the others after the shorter one.
    found = {entrants[job.candidate].name: right for job, right in sorted(rights.items())}
    return found, [entrants[place] for place in order]


def _train_elsewhere(
    cluster: Cluster, scratch: str, work: Iterable[ClusterJob], record: ScoreRecord, progress: Progress
) -> None:
    """Short trainings on the machines of a cluster; this machine does those whose workers die."""
    there = ((name, (cluster.each, scratch, *arguments)) for name, arguments in work if name not in record.rights)
    try:
        for name, right in cluster.run(_train_there, there, progress):
            record.keep(name, right)
    except ClusterError as error:
        progress.message(f"{error}; this machine does it instead")


def _train_there(threads: int, scratch: str, *arguments: Any) -> Right:
    torch.set_num_threads(threads)  # the exact result depends on it
    return _train_one(scratch_folder(scratch), SILENT, *arguments)


def _some(data: Dataset, most: int, plan: FitPlan) -> Dataset:
    """At most `most` images, evenly over the classes."""
    rows = spread_classes(np.array([sample.label for sample in data.samples]), most, plan.options.seed)
    return dataclasses.replace(data, samples=tuple(data.samples[row] for row in rows))


def _train_one(
    cache: Path,
    progress: Progress,
    plan: FitPlan,
    candidate: FitCandidate,
    train: Dataset,
    val: Dataset,
    steps: int,
    seed: int,
) -> Right:
    """Which val images a network gets right after a short training; none if it cannot be trained."""
    start = start_of(plan, train, candidate)
    recipe, _ = candidate.pace(len(train))
    epochs = steps / (len(train) // recipe.batch)
    splits = []
    for name, images in (("train", train), ("val", val)):
        file = cache / f"{name}-{start.input.size}-{start.input.resize}.npy"
        splits.append(load_split(images, start.input, file, progress))
    network: EfficientNet = start.network.to(memory_format=torch.channels_last)
    torch.manual_seed(seed)
    try:
        right = train_briefly(
            Learner(network, recipe, start.input), *splits, epochs=epochs, seed=seed, progress=progress
        )
    except TrainingError as error:
        progress.message(f"{candidate.name} cannot be trained: {error}")
        return np.zeros(len(val), np.bool_)
    return right.numpy()


def _pack(right: Right) -> str:
    return f"{len(right)} {np.packbits(right).tobytes().hex()}"


def _unpack(text: str) -> Right:
    count, digits = text.split(" ")
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8))[: int(count)].astype(np.bool_)
