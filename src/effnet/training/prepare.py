"""A run before its first step: the parts of the data, the start, the choices; or all of it read from a run's folder."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from effnet.arch.spec import InputSpec, NetworkSpec, NumericPolicy
from effnet.data.dataset import SIZE, Dataset, file_size, manifest, match_classes, read_data, read_manifest, split_data
from effnet.data.duplicates import Progress, find_duplicates
from effnet.data.image import identify
from effnet.errors import DataError, ImageError, TrainingError
from effnet.fields import read_fields
from effnet.machine import this_machine
from effnet.training.choices import Choices
from effnet.training.recipe import Recipe
from effnet.training.run import SPLIT, differences, read_args, write_args, write_text
from effnet.training.settings import Settings
from effnet.version import __version__


@dataclass(frozen=True)
class Plan:
    """Everything that a run needs to know, as args.yaml has it."""

    settings: Settings
    recipe: Recipe
    spec: NetworkSpec
    policy: NumericPolicy
    see: InputSpec
    classes: tuple[str, ...]
    source: str
    digest: str  # of the data
    world: int  # processes
    choices: Choices
    steps: int  # planned before the first step

    def write(self, folder: Path) -> None:
        """Write args.yaml."""
        values = {
            "settings": self.settings.to_dict(),
            "recipe": self.recipe.to_dict(),
            "spec": self.spec.to_dict(),
            "policy": dataclasses.asdict(self.policy),
            "input": dataclasses.asdict(self.see),
            "classes": self.classes,
            "source": self.source,
            "data_sha256": self.digest,
            "processes": self.world,
            "choices": self.choices.to_dict(),
            "steps": self.steps,
            "versions": versions(),
        }
        write_args(folder, values)

    @classmethod
    def read(cls, folder: Path) -> tuple[Plan, dict[str, str]]:
        """The plan of a run, and the versions that it was begun with.

        Raises:
            TrainingError: there is none, or the run was interrupted before its first step.
        """
        values = read_args(folder)
        plan = cls(
            settings=read_fields(Settings, values["settings"]),
            recipe=read_fields(Recipe, values["recipe"]),
            spec=NetworkSpec.from_dict(values["spec"]),
            policy=read_fields(NumericPolicy, values["policy"]),
            see=read_fields(InputSpec, values["input"]),
            classes=tuple(values["classes"]),
            source=values["source"],
            digest=values["data_sha256"],
            world=values["processes"],
            choices=Choices.from_dict(values["choices"]),
            steps=values["steps"],
        )
        return plan, values["versions"]


def versions() -> dict[str, str]:
    """What a result depends on beside its arguments; `code` is a hash of effnet's own source."""
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(file.read_bytes())
    names = {"effnet": __version__, "code": code.hexdigest()[:12], "torch": torch.__version__}
    return names | {"machine": str(this_machine())}


def split(settings: Settings, folder: Path, progress: Progress | None = None) -> tuple[tuple[str, ...], str]:
    """Put the data in parts, near-duplicates and groups together, and write split.csv; its classes, and what was found.

    `progress` is called with images compared and images in all.

    Raises:
        DataError: the data cannot be trained with.
    """
    data = read_data(settings.data)
    words = ""
    if "val" not in data.splits:
        found = find_duplicates([data.file(sample) for sample in data.samples], progress=progress)
        broken = [f"{found.files[n]} {look}" for n, look in enumerate(found.prints) if isinstance(look, ImageError)]
        _refuse_broken(broken, settings.data)
        data = split_data(data, val=settings.val, test=settings.test, seed=settings.seed, groups=found.groups)
        if together := len(data) - len(set(found.groups)):
            words = f"{together} images are near-duplicates of others; they stay in one part with them"
        parts = {(group, sample.split) for group, sample in zip(found.groups, data.samples, strict=True)}
        if leaks := len(parts) - len(set(found.groups)):
            words += f", but {leaks} times the data itself has them in two parts, which flatters the figures"
    else:
        _refuse_broken(list(_unreadable(data, progress)), settings.data)
    if "val" not in data.splits:
        raise DataError(
            f"{settings.data} leaves no image for validation at --val {settings.val:g}: more images, or a larger share"
        )
    if len(data.part("train").classes) < 2:
        raise DataError(f"{settings.data} has one class; there is nothing to tell apart")
    write_text(folder / SPLIT, manifest(data, sizes=True))
    return data.classes, words


def _unreadable(data: Dataset, progress: Progress | None) -> Iterator[str]:
    """The files whose first bytes already show that they are no images, each with the reason."""
    for done, sample in enumerate(data.samples, start=1):
        try:
            with data.file(sample).open("rb") as file:
                identify(file)
        except (ImageError, OSError) as error:
            yield f"{data.file(sample)} {error}"
        if progress:
            progress(done, len(data))


def _refuse_broken(broken: Sequence[str], data: str) -> None:
    if broken:
        others = f", and {len(broken) - 1} other images" if len(broken) > 1 else ""
        raise DataError(f"{broken[0]}{others}. A list without what cannot be read: effnet check {data} --fix clean.csv")


def read_split(settings: Settings, folder: Path, classes: tuple[str, ...]) -> Dataset:
    """The data of a run by its split.csv, with the run's order of classes."""
    root = Path(settings.data)
    data = read_manifest(folder / SPLIT, root if root.is_dir() else root.parent)
    return match_classes(data, classes, "the run's")


def check_resumed(plan: Plan, folder: Path, began: dict[str, str], data: Dataset, world: int) -> list[str]:
    """What differs from when the run began.

    Raises:
        TrainingError: images are gone, or the number of processes changed, so the run cannot go on.
    """
    if world != plan.world:
        raise TrainingError(
            f"the run was begun with {plan.world} process{'' if plan.world == 1 else 'es'} and is resumed with {world}"
        )
    with (folder / SPLIT).open(newline="", encoding="utf-8") as file:
        sizes = {row["path"]: row.get(SIZE) for row in csv.DictReader(file)}
    now = {sample.path: file_size(data.file(sample)) for sample in data.samples}
    gone = [path for path, size in now.items() if size < 0]
    if gone:
        raise TrainingError(f"{len(gone):,} images of {plan.settings.data} are gone, such as {gone[0]}: put them back")
    changed = [path for path, size in now.items() if sizes[path] not in (None, str(size))]
    words = differences(began, versions())
    if changed:
        words.append(f"{len(changed):,} images have another size than when the run began, such as {changed[0]}")
    return words


def environment() -> tuple[int, int, int]:
    """Rank, processes in all and on this machine, as torchrun sets them."""
    values: list[Any] = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")]
    rank, world, local = (int(value) if value else None for value in values)
    return rank or 0, world or 1, local or world or 1
