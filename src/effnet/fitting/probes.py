"""Linear probes: which networks have features that tell these images apart, before any of them is trained.

A linear classifier is fitted to the pooled features of a network with its ImageNet weights and judged out of fold, so
that every image counts. Test images are not used.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from effnet.data.dataset import Dataset
from effnet.errors import TrainingError
from effnet.fitting.candidates import FitCandidate
from effnet.fitting.settings import FitPlan
from effnet.machine import this_machine
from effnet.metrics.evaluate import predict_logits
from effnet.metrics.familiarity import spread_classes
from effnet.metrics.linear_probe import assign_folds, choose_penalty, out_of_fold
from effnet.progress import SILENT, Progress
from effnet.runtime.select import open_session, select
from effnet.runtime.session import Logits, Pixels
from effnet.training.initial_network import InitialNetwork, find_initial_network
from effnet.weights.bundle import Bundle, BundleConfig

MAC_RATE = 2.5e10  # multiply-adds per second and core, roughly, including reading the images
FIT_SECONDS, CLASSES = 2.5, 50  # rough time of a probe's classifiers for few classes; for this many it is twice that
FEWEST, MOST = 400, 4000  # images
PROBE = "probe"

Right = NDArray[np.bool_]  # (N,): which images a network gets right


def probe(
    plan: FitPlan,
    data: Dataset,
    candidates: Sequence[FitCandidate],
    known: Callable[[str, Callable[[], Right]], Right],
    seconds: float,
    progress: Progress,
) -> dict[str, Right]:
    """Which train and val images a linear classifier on each network's features gets right, out of fold.

    The largest networks are probed, as many as the estimated seconds allow; `known` stores their scores.
    """
    seen = dataclasses.replace(data, samples=tuple(sample for sample in data.samples if sample.split != "test"))
    each_fit = FIT_SECONDS * (1 + len(data.classes) / CLASSES)
    networks = list(dict.fromkeys(_probed_network(each) for each in sorted(candidates, key=lambda c: -c.costs["macs"])))
    networks = networks[: max(2, int(seconds / 2 / each_fit))]
    candidates = [each for each in candidates if _probed_network(each) in networks]
    macs = sum({_probed_network(each): each.costs["macs"] for each in candidates}.values())
    fitting = MAC_RATE * this_machine().cores * (seconds - len(networks) * each_fit) / macs
    labels = np.array([sample.label for sample in seen.samples])
    rows = spread_classes(labels, int(min(max(fitting, FEWEST), MOST)), plan.options.seed)
    some = dataclasses.replace(seen, samples=tuple(seen.samples[row] for row in rows))
    labels = labels[rows]
    folds = assign_folds(labels, [sample.group or sample.path for sample in some.samples], seed=plan.options.seed)
    found: dict[str, Right] = {}
    for place, candidate in enumerate(candidates):
        key = f"{PROBE} {_probed_network(candidate)}"
        progress.update("linear probes", place, len(candidates), candidate.name)

        def score(candidate: FitCandidate = candidate) -> Right:
            features = _features(plan, some, candidate, progress)
            penalty = choose_penalty(features, labels, len(data.classes), folds)
            logits = out_of_fold(features, labels, len(data.classes), folds, penalty)
            return np.asarray(logits.argmax(1) == labels)

        found[candidate.name] = known(key, score)
    progress.update("linear probes", len(candidates), len(candidates))
    return found


def _probed_network(candidate: FitCandidate) -> str:
    """What a probe depends on; a network in 8 bits has the same probe."""
    return f"{candidate.weights} {candidate.spec.resolution}"


def _features(plan: FitPlan, images: Dataset, candidate: FitCandidate, progress: Progress) -> NDArray[np.float32]:
    """The pooled features (N, C) of a network before its training, by effnet's own engine if it is installed."""
    start = start_of(plan, images, candidate)
    config = BundleConfig(start.network.spec, start.network.policy, start.input)
    bundle = Bundle.from_network(start.network.eval(), config)
    kept: list[NDArray[np.float32]] = []
    with open_session(bundle, select(start.network.spec, precision="fp32")) as session:

        def answer(pixels: Pixels) -> Logits:
            logits, maps = session.maps(pixels)
            kept.append(maps.mean((2, 3)))
            return logits

        task = f"features of {candidate.weights} at {candidate.spec.resolution} px"
        found = predict_logits(answer, start.input, images, batch=session.batch, progress=progress, task=task)
    if found.unreadable:
        path, reason = next(iter(found.unreadable.items()))
        raise TrainingError(f"{path} cannot be read: {reason}")
    return np.concatenate(kept)


def start_of(plan: FitPlan, data: Dataset, candidate: FitCandidate) -> InitialNetwork:
    """A candidate with the weights that it starts from."""
    torch.manual_seed(plan.options.seed)
    recipe = candidate.recipe(len(data))
    with tempfile.TemporaryDirectory() as folder:
        return find_initial_network(candidate.settings(Path(folder), plan.options), recipe, data, SILENT)
