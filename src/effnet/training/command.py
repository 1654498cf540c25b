"""effnet train: a folder of images in, a trained bundle out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from effnet import console
from effnet.arch.spec import FitMode
from effnet.bars import Bars
from effnet.console import INTERRUPTED, OK, Flag, Whole
from effnet.errors import ArgumentError, UnknownNameError

if TYPE_CHECKING:
    from effnet.training.finish import Result

Precision = Literal["auto", "fp32", "bf16"]


def train(
    data: Path | None = None,
    /,
    *,
    model: str | None = None,
    recipe: str | None = None,
    epochs: float | None = None,
    minutes: float | None = None,
    out: Path | None = None,
    resume: Path | None = None,
    batch: Whole | None = None,
    lr: float | None = None,
    resolution: Whole | None = None,
    fit: FitMode | None = None,
    stem_stride: Whole | None = None,
    train_memory: str | None = None,
    init: str | None = None,
    freeze: Whole | None = None,
    seed: Whole | None = None,
    device: str | None = None,
    precision: Precision | None = None,
    workers: Whole | None = None,
    threads: Whole | None = None,
    val: float | None = None,
    test: float | None = None,
    patience: Whole | None = None,
    class_weights: Flag | None = None,
    sync_bn: Flag | None = None,
    tensorboard: Flag | None = None,
    save_seconds: float | None = None,
    set_: Annotated[list[str] | None, Parameter(name="--set")] = None,
) -> int:
    """Train a network on a folder with a sub-folder for each class, and evaluate it.

    Args:
        data: A folder of class folders, split into train, val and test or not, or a manifest (path,label,split,group).
        model: A variant with weights, a bundle, a spec.yaml or a variant to train from scratch. Default: lite0.
        recipe: finetune (default), few (for some hundreds of images), scratch, paper, or a YAML file with what differs
            from one of them.
        epochs: Passes over the training part; parts of one count.
        minutes: Time for everything, in place of epochs: the schedule is made to fit.
        out: The run's folder; by default runs/train/ and a name.
        resume: The folder of a run that was interrupted. It goes on with its own arguments.
        batch: Images per step, over all processes. With little memory they go through in parts.
        lr: Highest learning rate, for the recipe's reference batch.
        resolution: Height and width in pixels; by default the model's own.
        fit: How photos become square; by default as the weights want it, mostly crop. For objects that fill the frame,
            pad or squash cut nothing off.
        stem_stride: 1 for images of 28 to 64 px, of which a stride of 2 leaves a last map of one pixel.
        train_memory: What a training step may hold, such as 4GB; torch itself is not counted.
        init: Weights of another network to start from, as far as its blocks match or can be sliced or grown.
        freeze: Stages 1 ... N of the network keep their weights; 9 trains the classifier alone.
        seed: Of the split, the weights, the order and the augmentation.
        device: cpu, cuda, cuda:1 or mps.
        precision: Number format of the maps; auto asks the processor.
        workers: Processes that load images; by default measured.
        threads: Of torch; by default measured.
        val: Share of the data to choose the best epoch with, where it has no val part.
        test: Share of unsplit data for the final figures.
        patience: Stop after so many epochs without better results on the val part.
        class_weights: Rare classes count as much as frequent ones.
        sync_bn: Batch statistics over all processes of torchrun.
        tensorboard: Write curves for TensorBoard, too.
        save_seconds: Time between two checkpoints, at most.
        set_: Any other field of the recipe, such as --set mixup=0.2 --set augmentation=autoaugment.
    """
    given: dict[str, Any] = {
        "epochs": epochs,
        "minutes": minutes,
        "batch": batch,
        "lr": lr,
        "resolution": resolution,
        "fit": fit,
        "stem_stride": stem_stride,
        "train_memory": train_memory,
        "init": init,
        "freeze": freeze,
        "seed": seed,
        "device": device,
        "precision": precision,
        "workers": workers,
        "threads": threads,
        "val": val,
        "test": test,
        "patience": patience,
        "class_weights": class_weights or None,
        "sync_bn": sync_bn or None,
        "tensorboard": tensorboard or None,
        "save_seconds": save_seconds,
    }
    given |= _recipe_fields(set_ or [], given)
    from effnet.training.listener import Interrupted
    from effnet.training.train import resume as go_on
    from effnet.training.train import train as begin

    with Shown() as shown:
        try:
            if resume is not None:
                everything = {"data": data, "model": model, "recipe": recipe, "out": out, **given}
                if changed := [(name, value) for name, value in everything.items() if value is not None]:
                    raise ArgumentError(*changed[0], "cannot be changed: a resumed run goes on with its own arguments.")
                result = go_on(resume, listener=shown)
            elif data is None:
                raise ArgumentError(
                    "data", "", "must be a folder of class folders or a manifest; or give --resume RUN."
                )
            else:
                result = begin(data, model or "lite0", recipe or "finetune", out=out, listener=shown, **given)
        except Interrupted as stopped:
            shown.close()
            console.remark(str(stopped))
            return INTERRUPTED
    if result.rank == 0:
        _show(result)
    return OK


class Shown(Bars):
    """A progress bar where somebody looks, a line for each epoch, and what a user should know."""

    headed = False

    def steps(self, done: int, total: int, loss: float) -> None:
        """The bar, with the time left."""
        self.advance("", f"loss {loss:.3f}", done, total)

    def epoch(self, row: Mapping[str, Any]) -> None:
        """The epoch's line."""
        if not self.headed:
            self.said(
                f"{'epoch':>6} {'step':>7} {'time':>8} {'lr':>9} {'train loss':>11} {'val loss':>9} {'val top-1':>10}"
            )
            self.headed = True
        minutes, seconds = divmod(round(row["seconds"]), 60)
        self.said(
            f"{row['epoch']:>6} {row['step']:>7} {minutes:>5}:{seconds:02} {row['lr']:>9.2g} "
            f"{row['train_loss']:>11.4f} {row['val_loss']:>9.4f} {row['val_top1']:>10.2%}"
        )


def _show(result: Result) -> None:
    """How good it is, and where everything lies."""
    found = result.evaluation
    rows = [
        (name, f"{value.value:.2%}", f"{value.low:.2%} to {value.high:.2%}")
        for name, value in (("top-1", found.top1), ("top-5", found.top5), ("macro F1", found.macro_f1))
        if value is not None
    ]
    note = (
        f"{result.steps:,} steps, {result.epochs:.3g} epochs, {result.seconds / 60:.1f} minutes. Memory of a step: "
        f"forecast {console.size(result.choices.forecast_bytes)}, taken {console.size(result.taken_bytes)}."
    )
    console.table(
        ("<", "value", "95 % interval"), rows, title=f"On the {found.n:,} images of {result.split}", note=note
    )
    console.remark(f"{result.folder}: results.png, confusion_matrix.png, reliability.png, mistakes.jpg, best")
    console.remark(f"Next: effnet predict PHOTO --model {result.bundle}")


def _recipe_fields(given: list[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the recipe as they are typed, which no option gives."""
    import yaml

    from effnet.training.recipe import Recipe, recipe_value

    known = [field.name for field in dataclasses.fields(Recipe)]
    fields: dict[str, Any] = {}
    for words in given:
        name, equals, value = words.partition("=")
        name = name.replace("-", "_")
        if not equals:
            raise ArgumentError("set", words, "must be NAME=VALUE, such as mixup=0.2.")
        if name not in known:
            raise UnknownNameError("set", name, known)
        if name in fields or options.get(name) is not None:
            raise ArgumentError("set", words, f"gives {name} for the second time.")
        try:
            fields[name] = recipe_value(value)
        except yaml.YAMLError as error:
            raise ArgumentError("set", words, f"has a value that is not YAML: {error}") from error
    return fields
