"""The report of a run: what its page and model card say besides the figures."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from effnet import console
from effnet.arch.spec import Calibration
from effnet.data.dataset import Dataset
from effnet.metrics.evaluate import Evaluation, Predicted
from effnet.metrics.sureness import Sureness
from effnet.reporting.subject import Neighbours, Subject, Suspect, suspect_labels
from effnet.runtime.classifier import Classifier
from effnet.training.device import device_peak
from effnet.training.loop import Loop
from effnet.training.run_folder import BEST, describe_gaps, versions


def describe_run(
    loop: Loop,
    classifier: Classifier,
    evaluated: tuple[str, Predicted, Evaluation],
    val: Predicted,
    limits: tuple[Calibration, Sureness, NDArray[np.float64] | None],
    neighbours: Neighbours,
) -> Subject:
    """A finished run, for its report.

    Args:
        loop: the run.
        classifier: its best weights.
        evaluated: the split, its logits, and the figures.
        val: the logits of the val split.
        limits: calibration, how well the model knows its limits, and how familiar each evaluated image is.
        neighbours: training images with their features.
    """
    (split, found, evaluation), (calibration, sureness, scores) = evaluated, limits
    plan, data, bundle = loop.plan, loop.data, shlex.quote(str(loop.folder / BEST))
    images, temperature = found.readable(data.subset(split)), calibration.temperature
    suspects: list[Suspect] = suspect_labels(images, found.logits, temperature)
    if split != "val":
        suspects += suspect_labels(val.readable(data.subset("val")), val.logits, temperature)
    where = shlex.quote(plan.data)
    return Subject(
        name=Path(plan.settings.model).name,
        source=Path(plan.data).name,
        data=images,
        split=split,
        logits=found.logits,
        evaluation=evaluation,
        classifier=classifier,
        calibration=calibration,
        calibrated_on=f"the {calibration.n:,} images of the val split",
        sureness=sureness,
        scores=scores,
        neighbours=neighbours,
        suspects=sorted(suspects, key=lambda each: each[3]),
        history=loop.rows,
        splits={name: len(data.subset(name)) for name in data.splits},
        notes=[f"{text[0].upper()}{text[1:]}." for text in _notes(data, plan.data, len(found.unreadable))],
        commands=(
            ("Classify photos:", f"effnet predict PHOTO --model {bundle}"),
            ("Try it in a browser:", f"effnet serve {bundle}"),
            ("Look for duplicates and leaks between the splits:", f"effnet check {where}"),
            ("Train again with the same settings:", f"effnet train {where} --like {shlex.quote(str(loop.folder))}"),
        ),
        facts=_facts(loop),
    )


def _notes(data: Dataset, where: str, unreadable: int) -> list[str]:
    counts = [count for count in data.subset("train").counts if count]
    texts = [f"{len(data.classes)} classes, of {min(counts):,} to {max(counts):,} training images"]
    if unreadable:
        texts.append(f"{unreadable:,} of the evaluated images cannot be read and are not counted")
    return [*texts, *describe_gaps(data, where)]


def _facts(loop: Loop) -> dict[str, str]:
    """Where the run came from, for the report."""
    plan, recipe = loop.plan, loop.plan.recipe
    epochs = loop.step / loop.loader.order.steps
    execution = plan.execution
    facts = {
        "data": plan.data,
        "sha256 of the data": plan.data_sha256,
        "initial weights": plan.source,
        "recipe": f"{recipe.name}, {loop.step:,} steps of {recipe.batch} images, {epochs:.3g} epochs",
        "seed": str(plan.settings.seed),
        "time": f"{loop.elapsed / 60:.1f} minutes",
        "trained in": f"{execution.precision} on {plan.settings.device}, {execution.threads} threads",
        "memory of a step": f"{console.size(execution.forecast_bytes)} forecast",
    }
    if (peak := device_peak(loop.fabric.device)) is not None:
        facts["memory of a step"] += f", {console.size(peak)} used on the GPU"
        facts["trained in"] += f", other float32 products at precision {execution.float32!r}"
    return facts | {
        f"version of {name}" if name in ("effnet", "torch") else name: text for name, text in versions().items()
    }
