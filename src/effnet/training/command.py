"""effnet train: a folder of images in, a trained bundle out."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from cyclopts import Parameter

from effnet import console
from effnet.console import INTERRUPTED, OK, Display, Flag
from effnet.errors import ArgumentError, UnknownNameError
from effnet.fields import write_count
from effnet.training.recipe import Recipe, recipe_value
from effnet.training.settings import Settings

if TYPE_CHECKING:
    from effnet.training.result import Result


@Parameter(name="*")
@dataclass(frozen=True)
class RecipeOptions:
    """A recipe, and fields that override its own; None keeps the recipe's value."""

    recipe: str | None = None
    """finetune (default), few (for a few hundred images), scratch, paper, or a YAML file with changes to one of
    them."""

    epochs: float | None = None
    """Passes over the training images; fractions are allowed. Default: the recipe's."""

    batch: int | None = None
    """Images per step, over all processes. Default: the recipe's, or fewer for small data sets."""

    lr: float | None = None
    """Peak learning rate at the recipe's `lr_batch` images per step. Default: the recipe's."""

    patience: int | None = None
    """Stop after this many epochs without a better result on the val split. Default: never."""

    class_weights: Flag | None = None
    """Weight the classes so that rare ones count as much as frequent ones."""

    set_: Annotated[list[str] | None, Parameter(name="--set", negative=())] = None
    """Any other field of the recipe: --set mixup=0.2 --set augmentation=autoaugment."""

    def changes(self) -> dict[str, Any]:
        """The fields of the recipe that were given.

        Raises:
            ArgumentError: --set is not NAME=VALUE, or gives a field twice.
            UnknownNameError: --set names something other than a field of the recipe.
        """
        known = [field.name for field in dataclasses.fields(Recipe)]
        given = {name: value for name, value in vars(self).items() if name in known and value is not None}
        for text in self.set_ or []:
            name, _, value = text.partition("=")
            name = name.replace("-", "_")
            if not value:
                raise ArgumentError("set", text, "must be NAME=VALUE, such as mixup=0.2.")
            if name not in known:
                raise UnknownNameError("set", name, known)
            if name in given:
                raise ArgumentError("set", text, f"gives {name} twice.")
            try:
                given[name] = recipe_value(value)
            except yaml.YAMLError as error:
                raise ArgumentError("set", text, f"has a value that is not YAML: {error}") from error
        return given


FROM_RECIPE, SETTINGS = RecipeOptions(), Settings()


def train(
    data: Path | None = None,
    /,
    *,
    out: Path | None = None,
    resume: Path | None = None,
    like: Path | None = None,
    recipe_options: RecipeOptions = FROM_RECIPE,
    settings: Settings = SETTINGS,
) -> int:
    """Train a network on a folder with a sub-folder for each class, and evaluate it.

    The same command with the same seed gives the same weights to the bit, unless --minutes is given.

    Args:
        data: A folder of class folders, split into train, val and test or not, or a manifest (path,label,split,group).
        out: Folder of the run. Default: runs/train/DATA-MODEL.
        resume: Folder of an interrupted run, to go on with its own arguments. Only --workers may be added, and DATA if
            the images were moved.
        like: Folder of a run whose settings, recipe, precision, threads and workers are reused, except for options
            given here.
    """
    given = {name: getattr(settings, name) for name in settings.given} | recipe_options.changes()
    if resume is not None:
        others = {"out": out, "like": like, "recipe": recipe_options.recipe, **given} | {"workers": None}
        if wrong := next((name for name, value in others.items() if value is not None), None):
            raise ArgumentError(wrong, others[wrong], "cannot be changed: a resumed run keeps its own arguments.")
    elif data is None:
        raise ArgumentError("data", "", "must be a folder of class folders or a manifest; or give --resume RUN.")
    from effnet.training import train as training
    from effnet.training.loop import Interrupted

    with Display() as display:
        try:
            if resume is not None:
                result = training.resume(resume, data=data, workers=settings.workers, progress=display)
            else:
                assert data is not None
                recipe = recipe_options.recipe
                result = training.train(data, recipe=recipe, out=out, like=like, progress=display, **given)
        except Interrupted as stopped:
            display.close()
            console.remark_once(str(stopped))
            return INTERRUPTED
    if result.rank == 0:
        _show(result)
    return OK


def _show(result: Result) -> None:
    found = result.evaluation
    figures = {"top-1": found.top1, "top-5": found.top5, "macro F1": found.macro_f1}
    rows = [(name, f"{it.value:.2%}", f"{it.low:.2%} to {it.high:.2%}") for name, it in figures.items() if it]
    on_device = "" if result.device_bytes is None else f"{console.size(result.device_bytes)} used on the GPU, "
    note = (
        f"{write_count(result.steps, 'step')}, {result.epochs:.3g} epoch{'' if result.epochs == 1 else 's'}, "
        f"{result.seconds / 60:.1f} minutes. Memory: {console.size(result.execution.forecast_bytes)} forecast "
        f"for a step, {on_device}{console.size(result.taken_bytes)} used by the run."
    )
    console.table(
        ("<", "value", "95 % interval"),
        rows,
        title=f"On the {write_count(found.n, 'image')} of the {result.split} split",
        note=note,
    )
    console.remark(f"{result.report}: the report; next to it are best (the model), results.png and other pictures")
    console.remark(f"Next: effnet predict PHOTO --model {shlex.quote(str(result.bundle))}")
