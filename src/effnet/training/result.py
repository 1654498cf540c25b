"""The result of a run: the best weights evaluated and calibrated, the bundle, the pictures."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

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
    split: str  # the split that `evaluation` is of: test where there is one, else val
    evaluation: Evaluation
    execution: Execution
    taken_bytes: int  # memory, beyond what the process held before the network was made
    rank: int = 0  # of this process

    @property
    def bundle(self) -> Path:
        """The trained model."""
        return self.folder / BEST


def finish(loop: Loop, base: int) -> Result:
    """Evaluate the best weights on test, else val, fit the temperature on val, and write the remaining files.

    Rank 0 does; the others wait and return the same figures. `base` is the memory in bytes before the network was made.
    """
    result = _finish(loop, peak_memory() - base) if loop.fabric.is_global_zero else None
    answer: Result = loop.fabric.broadcast(result)  # type: ignore[assignment]  # rank 0 has one
    return replace(answer, rank=loop.fabric.global_rank)


def _finish(loop: Loop, taken: int) -> Result:
    plan, folder, data = loop.plan, loop.folder, loop.data
    network = open_bundle(folder / BEST).network.to(loop.fabric.device)

    def predict(images: Dataset) -> Predicted:
        logits, batch = Answering(network, plan.input).logits, plan.execution.part
        task = "evaluating the best weights"
        return predict_logits(logits, plan.input, images, batch=batch, progress=loop.progress, task=task)

    val = predict(data.subset("val"))
    calibration = calibrate(val.logits, val.labels)
    split = "test" if "test" in data.splits else "val"
    images = data.subset(split)
    found = val if split == "val" else predict(images)
    if found.unreadable:
        path, reason = next(iter(found.unreadable.items()))
        count = len(found.unreadable)
        loop.progress.message(f"{count} images of {split} cannot be read and do not count, such as {path}: {reason}")
    evaluation = evaluate(
        found.logits, found.labels, plan.classes, temperature=calibration.temperature, threshold=calibration.threshold
    )
    epochs, seconds = loop.step / loop.loader.order.steps, loop.elapsed
    metrics = {f"{split}_top1": evaluation.top1.value, f"{split}_macro_f1": evaluation.macro_f1.value}
    metrics |= {"val_top1": loop.kept, f"{split}_ece": evaluation.after.ece}
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
        record=Record(calibration, provenance, manifest(data, sizes=True)),
    )
    memory = {"forecast_bytes": plan.execution.forecast_bytes, "taken_bytes": taken}
    cost = {"steps": loop.step, "epochs": epochs, "seconds": seconds, **memory}
    written = {"split": split, **evaluation.to_dict(), "unreadable": len(found.unreadable), "cost": cost}
    write_text(folder / METRICS, json.dumps(written, indent=2) + "\n")
    _draw(loop, evaluation, found, images, calibration.temperature)
    return Result(folder, loop.step, epochs, seconds, split, evaluation, plan.execution, taken)


def _draw(loop: Loop, evaluation: Evaluation, found: Predicted, images: Dataset, temperature: float) -> None:
    folder = loop.folder
    run_plots.draw_results(loop.rows, folder / "results.png")
    run_plots.draw_confusion(evaluation.confusion, evaluation.classes, folder / "confusion_matrix.png")
    run_plots.draw_reliability(evaluation.reliability_curves, folder / "reliability.png")
    write_per_class(evaluation, folder / "per_class.csv")
    predicted, sure = found.logits.argmax(1), confidence(found.logits, temperature)
    run_plots.draw_mistakes(found.readable(images), predicted, sure, folder / "mistakes.jpg")
