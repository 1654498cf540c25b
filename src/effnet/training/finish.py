"""The end of a run: the best weights evaluated and calibrated, the bundle, the pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effnet.data.dataset import Dataset, manifest
from effnet.machine import peak_memory
from effnet.metrics.calibration import calibrate, confidence
from effnet.metrics.evaluate import Evaluation, Predicted, evaluate, predict_logits, write_per_class
from effnet.plots import run as run_plots
from effnet.training.choices import Choices
from effnet.training.module import Answering
from effnet.training.prepare import versions
from effnet.training.run import BEST, METRICS, SPLIT, write_text
from effnet.weights.bundle import Record, open_bundle, save

if TYPE_CHECKING:
    from effnet.training.loop import Loop


@dataclass(frozen=True)
class Result:
    """What came of a run."""

    folder: Path
    steps: int
    epochs: float
    seconds: float
    split: str  # the part that `evaluation` is of: test where there is one, else val
    evaluation: Evaluation
    choices: Choices
    taken_bytes: int  # of memory, beyond what the process held before the network was made
    rank: int = 0  # of this process

    @property
    def bundle(self) -> Path:
        """The trained model."""
        return self.folder / "best"


def finish(going: Loop, base: int) -> Result:
    """Evaluate the best weights on test, else val, fit the temperature on val, and write what the folder still lacks.

    Rank 0 does; the others wait and return the same figures.
    """
    result: Result | None = None
    if going.fabric.is_global_zero:
        result = _finish(going, peak_memory() - base)
    answer: Result = going.fabric.broadcast(result)  # type: ignore[assignment]  # rank 0 has one
    return replace(answer, rank=going.fabric.global_rank)


def _finish(going: Loop, taken: int) -> Result:
    plan, folder, data = going.plan, going.folder, going.data
    bundle = open_bundle(folder / BEST)
    network = bundle.network.to(going.fabric.device)
    answering = Answering(network, plan.see, plan.classes)
    how: dict[str, Any] = {
        "batch": going.choices.part,
        "progress": partial(going.listener.counted, "evaluating the best weights"),
    }
    val = predict_logits(answering, data.part("val"), **how)
    calibration = calibrate(val.logits, val.labels)
    split = "test" if "test" in data.splits else "val"
    part = data.part(split)
    found = val if split == "val" else predict_logits(answering, part, **how)
    if found.unreadable:
        path, reason = next(iter(found.unreadable.items()))
        count = len(found.unreadable)
        going.listener.said(f"{count} images of {split} cannot be read and do not count, such as {path}: {reason}")
    evaluation = evaluate(
        found.logits,
        found.labels,
        plan.classes,
        temperature=calibration.temperature,
        threshold=calibration.threshold,
    )
    epochs = going.step / going.loader.order.steps
    seconds = going.elapsed
    metrics = {f"{split}_top1": evaluation.top1.value, f"{split}_macro_f1": evaluation.macro_f1.value}
    metrics |= {"val_top1": going.kept, f"{split}_ece": evaluation.after.ece}
    provenance: dict[str, Any] = {
        "data": plan.settings.data,
        "data_sha256": plan.digest,
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
        input=plan.see,
        source=f"effnet train from {plan.source}",
        metrics=metrics,
        record=Record(calibration, json.loads(json.dumps(provenance)), {SPLIT: manifest(data, sizes=True)}),
    )
    cost = {"steps": going.step, "epochs": epochs, "seconds": seconds}
    cost |= {"forecast_bytes": going.choices.forecast_bytes, "taken_bytes": taken}
    written = {"split": split, **evaluation.to_dict(), "unreadable": len(found.unreadable), "cost": cost}
    write_text(folder / METRICS, json.dumps(written, indent=2) + "\n")
    _draw(going, evaluation, found, part, calibration.temperature)
    return Result(
        folder=folder,
        steps=going.step,
        epochs=epochs,
        seconds=going.elapsed,
        split=split,
        evaluation=evaluation,
        choices=going.choices,
        taken_bytes=taken,
    )


def _draw(going: Loop, evaluation: Evaluation, found: Predicted, part: Dataset, temperature: float) -> None:
    """The pictures of a run."""
    folder = going.folder
    run_plots.draw_results(going.rows, folder / "results.png")
    run_plots.draw_confusion(evaluation.confusion, evaluation.classes, folder / "confusion_matrix.png")
    run_plots.draw_reliability(evaluation.reliability_curves, folder / "reliability.png")
    write_per_class(evaluation, folder / "per_class.csv")
    named, sure = found.logits.argmax(1), confidence(found.logits, temperature)
    run_plots.draw_mistakes(found.readable(part), named, sure, folder / "mistakes.jpg")
