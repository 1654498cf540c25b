"""The result of a run: the best weights, evaluated and calibrated; the bundle and the pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from effnet.data.dataset import Dataset, manifest
from effnet.fields import write_count
from effnet.files import write_text
from effnet.machine import peak_memory
from effnet.metrics.calibration import calibrate, confidence
from effnet.metrics.conformal import calibrate_sets
from effnet.metrics.evaluate import Evaluation, Predicted, evaluate, write_per_class
from effnet.metrics.sureness import measure_sureness
from effnet.plots.evaluation import draw_confusion, draw_mistakes, draw_reliability
from effnet.plots.fonts import explain_labels
from effnet.plots.overlay import draw_cams
from effnet.plots.style import BLUE, ORANGE, picture
from effnet.reporting.card import write_card
from effnet.reporting.page import write_report
from effnet.reporting.subject import Neighbours
from effnet.runtime.classifier import Classifier
from effnet.runtime.load import load
from effnet.training.device import device_peak
from effnet.training.execution import Execution
from effnet.training.loop import Loop
from effnet.training.report import describe_run
from effnet.training.run_folder import BEST, METRICS, REPORT, versions
from effnet.training.sureness import Evaluated, evaluate_split, learn_familiarity, see_training_images
from effnet.weights.bundle import Record, open_bundle, save

# Panels of `draw_learning_curves`: axis label, columns of results.csv with their labels, scale of the values.
PANELS = (
    ("loss", (("train_loss", "training"), ("val_loss", "validation")), 1.0),
    ("top-1 of the validation split, %", (("val_top1", "validation"),), 100.0),
    ("learning rate", (("lr", ""),), 1.0),
    ("seconds per epoch", (("seconds", ""),), 1.0),
)


@dataclass(frozen=True)
class Result:
    """How good a finished run is, and what it needed."""

    folder: Path
    steps: int
    epochs: float
    seconds: float
    split: str  # the evaluated split: test if there is one, else val
    evaluation: Evaluation
    execution: Execution
    taken_bytes: int  # peak memory beyond what the process held before the network was created
    device_bytes: int | None = None  # peak of torch's tensors on a CUDA GPU during training
    rank: int = 0  # of this process

    @property
    def bundle(self) -> Path:
        """The trained model."""
        return self.folder / BEST

    @property
    def report(self) -> Path:
        """The report's HTML page."""
        return self.folder / REPORT


def finish(loop: Loop, base: int) -> Result:
    """Evaluate the best weights on test, else val, calibrate them on val, and write the remaining files.

    Only rank 0 does; the others wait and return the same figures. `base` is the memory in bytes before the network was
    created.
    """
    taken = peak_memory() - base, device_peak(loop.fabric.device)
    result = _finish(loop, *taken) if loop.fabric.is_global_zero else None
    answer: Result = loop.fabric.broadcast(result)  # type: ignore[assignment]  # rank 0 has one
    return replace(answer, rank=loop.fabric.global_rank)


def draw_learning_curves(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Draw the learning curves of a run.

    Args:
        rows: rows of results.csv: epoch, train_loss, val_loss, val_top1 (0 to 1), lr, and seconds since the start.
        out: the picture's file.
    """
    epochs = [float(row["epoch"]) for row in rows]
    with picture(out, 12, 7.2, write_count(len(rows), "epoch")) as figure:
        for axes, (label, columns, scale) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
            for column, name in columns:
                values = np.array([float(row[column]) * scale for row in rows])
                if column == "seconds":
                    values = np.diff(values, prepend=0.0)
                colour = ORANGE if name == "training" else BLUE
                axes.plot(epochs, values, "o-", color=colour, markersize=4, label=name)
            axes.set(xlabel="epoch", ylabel=label)
            axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
            axes.locator_params(axis="x", integer=True, min_n_ticks=1)  # no half epochs
            if label == "seconds per epoch":
                axes.set_ylim(bottom=0)
            if len(columns) > 1:
                axes.legend(frameon=False)


def _finish(loop: Loop, taken: int, device_taken: int | None) -> Result:
    plan, folder, data = loop.plan, loop.folder, loop.data
    best = open_bundle(folder / BEST)
    network = best.network.to(loop.fabric.device)

    def predict(images: Dataset) -> Evaluated:
        return evaluate_split(loop, network, images, "evaluating the best weights")

    val, seen_val = predict(data.subset("val"))
    calibration = calibrate(val.logits, val.labels)
    sets = calibrate_sets(val.logits, val.labels, calibration.temperature)
    train = see_training_images(loop, network)
    familiarity = learn_familiarity(loop, network, train[1], seen_val)
    split = "test" if "test" in data.splits else "val"
    images = data.subset(split)
    found, seen = (val, seen_val) if split == "val" else predict(images)
    if found.unreadable:
        path, reason = next(iter(found.unreadable.items()))
        count = len(found.unreadable)
        loop.progress.message(
            f"{write_count(count, 'image')} of {split} cannot be read and will not be counted, such as {path}: {reason}"
        )
    evaluation = evaluate(
        found.logits, found.labels, plan.classes, temperature=calibration.temperature, threshold=calibration.threshold
    )
    measured, scores = measure_sureness(found.logits, found.labels, calibration.temperature), None
    if split != "val":  # calibrated on val, so not measured there
        scores = familiarity.of(seen.logits, seen.features) if familiarity else None
        told = None if familiarity is None or scores is None else (familiarity, scores)
        measured = measure_sureness(found.logits, found.labels, calibration.temperature, sets=sets, told=told)
    epochs, seconds = loop.step / loop.loader.order.steps, loop.elapsed
    metrics = {f"{split}_top1": evaluation.top1.value, f"{split}_macro_f1": evaluation.macro_f1.value}
    metrics |= {f"{split}_ece": evaluation.after.ece}
    metrics.setdefault("val_top1", best.config.metrics["val_top1"])
    provenance = {
        "data": plan.data,
        "data_sha256": plan.data_sha256,
        "recipe": asdict(plan.recipe),
        "epochs": epochs,
        "seconds": seconds,
        "from": plan.source,
        "versions": versions(),
    }
    save(
        network,
        folder / BEST,
        classes=plan.classes,
        input=plan.input,
        source=f"effnet train from {plan.source}",
        metrics=metrics,
        record=Record(calibration, provenance, manifest(data, sizes=True), sets, familiarity),
    )
    memory = {"forecast_bytes": plan.execution.forecast_bytes, "taken_bytes": taken, "device_bytes": device_taken}
    cost = {"steps": loop.step, "epochs": epochs, "seconds": seconds, **memory}
    written = {"split": split, **evaluation.to_dict(), "sureness": measured.to_dict()}
    written |= {"unreadable": len(found.unreadable), "cost": cost}
    write_text(folder / METRICS, json.dumps(written, indent=2) + "\n")
    with load(folder / BEST, engine="torch", decode="exact") as classifier:
        _draw(loop, evaluation, found, found.readable(images), classifier)
        neighbours = Neighbours(train[0], train[1].features)
        limits = calibration, measured, scores
        subject = describe_run(loop, classifier, (split, found, evaluation), val, limits, neighbours)
        write_card(subject, folder / BEST)
        write_report(subject, folder / REPORT, loop.progress)
    return Result(folder, loop.step, epochs, seconds, split, evaluation, plan.execution, taken, device_taken)


def _draw(loop: Loop, evaluation: Evaluation, found: Predicted, images: Dataset, classifier: Classifier) -> None:
    folder = loop.folder
    draw_learning_curves(loop.rows, folder / "results.png")
    draw_confusion(evaluation.pairs, evaluation.classes, folder / "confusion_matrix.png")
    draw_reliability(evaluation.reliability_curves, folder / "reliability.png")
    write_per_class(evaluation, folder / "per_class.csv")
    answers = images, found.logits.argmax(1), confidence(found.logits, evaluation.after.temperature)
    draw_mistakes(*answers, folder / "mistakes.jpg")
    draw_cams(classifier, *answers, folder / "cams.jpg")
    if numbered := explain_labels(evaluation.classes):
        loop.progress.message(numbered)
