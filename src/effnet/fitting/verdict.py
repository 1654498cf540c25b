"""Step 5 of a fit: the model as it would be shipped, measured in a fresh process, and the limits that it breaks."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effnet.arch.cost import cost
from effnet.data.dataset import Dataset
from effnet.data.held_out import TrainVal
from effnet.errors import RefusedError
from effnet.exporting.int8 import export_int8
from effnet.files import write_folder
from effnet.fitting.candidates import FitCandidate
from effnet.fitting.measurement import Measurement, measure, model_bytes
from effnet.fitting.settings import LIMITS, MODEL, FitOptions, FitPlan
from effnet.progress import Progress
from effnet.training.run_folder import BEST
from effnet.weights.bundle import open_bundle

ACCURACY = "accuracy in 8 bits"  # the limit that is broken if 8 bits lose too much
TIGHT = 0.9  # share of a broken limit that the next network may need


def check_model(
    plan: FitPlan, data: Dataset, candidate: FitCandidate, run: Path, progress: Progress
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Step 5: put the model in its place and measure it; the broken limits, and all measurements.

    A model that loses too much in 8 bits stays as it was trained.
    """
    target, options = plan.folder / MODEL, plan.options
    refused: list[dict[str, Any]] = []
    if candidate.int8:
        bundle = open_bundle(run / BEST)
        images = TrainVal(data.subset("train"), data.subset("val"))
        try:
            export_int8(bundle, target, images, progress=progress)
        except RefusedError as error:
            progress.message(str(error))
            refused = [{"limit": ACCURACY, "value": None, "allowed": None, "why": str(error)}]
    if refused or not candidate.int8:
        with write_folder(target, "bundle") as new:
            shutil.copytree(run / BEST, new, dirs_exist_ok=True)
    taken = measure(target, backend_of(options), latency=options.limits.get("latency"))
    price = cost(candidate.spec)
    measured = dataclasses.asdict(taken) | {
        "macs": price.macs,
        "params": price.params,
        "file_size": model_bytes(target),
    }
    return [*refused, *_broken(options, taken, measured)], measured


def backend_of(options: FitOptions) -> dict[str, Any]:
    """What runs the model, if it was chosen; int8 follows from the artifact."""
    precision = None if options.precision == "int8" else options.precision
    pins = {"engine": options.pinned_engine, "precision": precision, "threads": options.threads}
    return {name: value for name, value in pins.items() if value is not None}


def _broken(options: FitOptions, taken: Measurement, measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    values = {name: measured[name] for name in LIMITS} | {"latency": taken.slowest_tenth}
    return [
        {"limit": limit, "value": values[limit], "allowed": allowed}
        for limit, allowed in options.limits.items()
        if values[limit] > allowed
    ]
