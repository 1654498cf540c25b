"""The result of a run: the best weights evaluated and calibrated, the bundle, the pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from effnet.data.dataset import Dataset, manifest
from effnet.files import write_text
from effnet.machine import peak_memory
from effnet.metrics.calibration import calibrate, confidence
from effnet.metrics.evaluate import Evaluation, Predicted, evaluate, predict_logits, write_per_class
from effnet.plots import run as run_plots
from effnet.training.loop import Loop
from effnet.training.module import Answering
from effnet.training.run import BEST, METRICS, Execution, versions
from effnet.weights.bundle import Record, open_bundle, save


@dataclass(frozen=True)
class Result:
    """How good a finished run is, and what it took."""

    folder: Path
    steps: int
    epochs: float
    seconds: float
    split: str  # the part that `evaluation` is of: test where there is one, else val
    evaluation: Evaluation
    execution: Execution
    taken_bytes: int  # memory, beyond what the process held before the network was made
    rank: int = 0  # of this process

    @property
    def bundle(self) -> Path:
        """The trained model."""
        return self.folder / "best"


def finish(loop: Loop, base: int) -> Result:
    """Evaluate the best weights on test, else val, fit the temperature on val, and write what the folder still lacks.

    Rank 0 does; the others wait and return the same figures.
    """
    result: Result | None = None
    if loop.fabric.is_global_zero:
        result = _finish(loop, peak_memory() - base)
    answer: Result = loop.fabric.broadcast(result)  # type: ignore[assignment]  # rank 0 has one
    return replace(answer, rank=loop.fabric.global_rank)


def _finish(loop: Loop, taken: int) -> Result:
    plan, folder, data = loop.plan, loop.folder, loop.data
    bundle = open_bundle(folder / BEST)
    network = bundle.network.to(loop.fabric.device)
    answering = Answering(network, plan.input, plan.classes)
    options: dict[str, Any] = {
        "batch": loop.execution.part,
        "progress": loop.progress,
        "task": "evaluating the best weights",
    }
    val = predict_logits(answering.logits, answering.input, data.part("val"), **options)
    calibration = calibrate(val.logits, val.labels)
    split = "test" if "test" in data.splits else "val"
    part = data.part(split)
    found = val if split == "val" else predict_logits(answering.logits, answering.input, part, **options)
    if found.unreadable:
        path, reason = next(iter(found.unreadable.items()))
        count = len(found.unreadable)
        loop.progress.message(f"{count} images of {split} cannot be read and do not count, such as {path}: {reason}")
    evaluation = evaluate(
        found.logits,
        found.labels,
        plan.classes,
        temperature=calibration.temperature,
        threshold=calibration.threshold,
    )
    epochs = loop.step / loop.loader.order.steps
    seconds = loop.elapsed
    metrics = {f"{split}_top1": evaluation.top1.value, f"{split}_macro_f1": evaluation.macro_f1.value}
    metrics |= {"val_top1": loop.kept, f"{split}_ece": evaluation.after.ece}
    provenance: dict[str, Any] = {
        "data": plan.data,
        "data_sha256": plan.data_sha256,
        "recipe": plan.recipe.to_dict(),
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
        record=Record(calibration, provenance, manifest(data, sizes=True)),
    )
    cost = {"steps": loop.step, "epochs": epochs, "seconds": seconds}
    cost |= {"forecast_bytes": loop.execution.forecast_bytes, "taken_bytes": taken}
    written = {"split": split, **evaluation.to_dict(), "unreadable": len(found.unreadable), "cost": cost}
    write_text(folder / METRICS, json.dumps(written, indent=2) + "\n")
    _draw(loop, evaluation, found, part, calibration.temperature)
    return Result(
        folder=folder,
        steps=loop.step,
        epochs=epochs,
        seconds=loop.elapsed,
        split=split,
        evaluation=evaluation,
        execution=loop.execution,
        taken_bytes=taken,
    )


def _draw(loop: Loop, evaluation: Evaluation, found: Predicted, part: Dataset, temperature: float) -> None:
    """The pictures of a run."""
    folder = loop.folder
    run_plots.draw_results(loop.rows, folder / "results.png")
    run_plots.draw_confusion(evaluation.confusion, evaluation.classes, folder / "confusion_matrix.png")
    run_plots.draw_reliability(evaluation.reliability_curves, folder / "reliability.png")
    write_per_class(evaluation, folder / "per_class.csv")
    named, sure = found.logits.argmax(1), confidence(found.logits, temperature)
    run_plots.draw_mistakes(found.readable(part), named, sure, folder / "mistakes.jpg")
