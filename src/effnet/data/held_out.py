"""Which images of DATA a model is evaluated on: never by accident those that it was trained on.

DATA's own parts decide. Where it has none, the split.csv of a trained model does: its paths are looked up in DATA. If
the files of two models disagree about an image, train counts before val, and val before test.

`train_and_val` chooses the images that a quantised model is calibrated and evaluated on. There the model's split.csv
comes first, because training may have taken the val part out of DATA's train part.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from effnet.data.dataset import SIZE, SPLITS, Dataset, Sample, file_size, split_data
from effnet.errors import DataError, UnknownNameError

ALL, NEW = "all", "new"  # every image; those that no split.csv lists

Parts = Mapping[str, str]  # train, val or test by path


@dataclass(frozen=True)
class HeldOut:
    """What is evaluated."""

    split: str
    data: Dataset
    val: Dataset | None  # images to fit a temperature on, none of them in `data`
    trained: int = 0  # evaluated images that a model was trained on, unless --split train or all includes them
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainVal:
    """What a model is calibrated on and what it is evaluated on: disjoint, and without images of a test part."""

    train: Dataset
    val: Dataset
    notes: tuple[str, ...] = ()


def match_split(text: str, root: Path, dataset: Dataset) -> Parts:
    """The parts of images by a split.csv, keyed by their paths in `dataset`.

    An image is found by its absolute path, or by its path within the folder if it has the same size. Images that are
    not found keep the path that they had in `text`, the split.csv, where paths are relative to `root`.
    """
    rows = list(csv.DictReader(io.StringIO(text)))
    at = {_absolute(root / row["path"]): row for row in rows}
    named = {row["path"]: row for row in rows}
    parts = {file: row["split"] for file, row in at.items()}
    for sample in dataset.samples:
        file = _absolute(dataset.file(sample))
        row = at.get(file) or named.get(sample.path)
        if row and (file in at or row.get(SIZE) in (None, str(file_size(dataset.file(sample))))):
            parts.pop(_absolute(root / row["path"]), None)
            parts[sample.path] = row["split"]
    return parts


def hold_out(dataset: Dataset, known: Mapping[str, Parts | None], split: str | None = None) -> HeldOut:
    """Choose the images to evaluate.

    Args:
        dataset: the images to choose from.
        known: by model, the parts of its split.csv (`match_split`); None where it has none.
        split: train, val, test, new or all; by default test, else val.

    Raises:
        DataError: nothing says which images the models were trained on, or no part can be evaluated.
        UnknownNameError: there is no such part.
    """
    used = {model: parts for model, parts in known.items() if parts and _overlaps(dataset, parts)}
    if dataset.splits:
        split_of = {sample.path: sample.split for sample in dataset.samples}
    elif used:
        split_of = {sample.path: _strictest(sample, used.values()) for sample in dataset.samples}
    elif split == ALL:
        split_of = {}
    else:
        raise DataError(_unsplit(dataset, known, split))
    found = [name for name in (*SPLITS, NEW) if name in split_of.values()]
    name = split or next((name for name in ("test", "val") if name in found), "")
    if not name:
        raise DataError(
            f"{dataset.root} has no test or val part, only {' and '.join(found)}; --split {found[0]} evaluates that, "
            f"--split {ALL} everything"
        )
    if name not in (*found, ALL):
        raise UnknownNameError("split", name, (*found, ALL))
    data = _only(dataset, [s for s in dataset.samples if name == ALL or split_of[s.path] == name])
    trained_on = {path for parts in used.values() for path, part in parts.items() if part == "train"}
    rest = [s for s in dataset.samples if split_of.get(s.path) == "val" and s.path not in trained_on]
    trained = sum(sample.path in trained_on for sample in data.samples)
    notes = [] if dataset.splits or not used else _explain_split(dataset, used, split_of, name)
    notes += [_unknown(model) for model in known if (used or not split_of) and model not in used]
    for model, parts in used.items():
        if count := sum(parts.get(sample.path) == "val" for sample in data.samples):
            notes.append(f"{model} was selected and calibrated on {count:,} of these images: figures slightly too good")
    if trained:
        notes.append(f"trained on {trained:,} of these {len(data):,} images: the figures are too good")
    val = _only(dataset, rest) if rest and name not in ("val", ALL) else None
    return HeldOut(name, data, val, 0 if split in ("train", ALL) else trained, tuple(notes))


def train_and_val(dataset: Dataset, model: str, known: Parts | None) -> TrainVal:
    """The training and the validation images of a model in DATA.

    They follow its split.csv, without images of DATA's test part, and without trained images of DATA's val part.
    Without a split.csv (`known` is None) they are DATA's parts; where DATA has no val part, it is split as training
    would by default.

    Raises:
        DataError: one of the two is empty.
    """
    if known and _overlaps(dataset, known):
        parts = [_safe_part(sample.split, known.get(sample.path, "")) for sample in dataset.samples]
        notes: tuple[str, ...] = ()
    else:
        split = dataset if "val" in dataset.splits else split_data(dataset)
        parts = [sample.split for sample in split.samples]
        notes = (_unknown(model),)
    found = []
    for name, purpose in (("train", "calibrate"), ("val", "evaluate")):
        found.append(_only(dataset, [s for s, part in zip(dataset.samples, parts, strict=True) if part == name]))
        if not len(found[-1]):
            raise DataError(
                f"{dataset.root} has no image to {purpose} {model} with: its {name} part is empty. Give the data that "
                "it was trained on, or folders train and val, or a manifest with a column split"
            )
    train, val = found
    return TrainVal(train, val, notes)


def _safe_part(own: str, known: str) -> str:
    """The part of an image by DATA and by a split.csv; "" if using it as train or as val would bias the result."""
    if "test" in (own, known):
        return "test"
    return "" if (own, known) == ("val", "train") else known or own


def _explain_split(dataset: Dataset, used: Mapping[str, Parts], split_of: Parts, name: str) -> list[str]:
    """Notes on where the parts come from, and which images the split.csv lacks or has too many."""
    notes = [f"the parts are those of split.csv in {' and '.join(used)}"]
    new = sum(part == NEW for part in split_of.values())
    if new and name not in (NEW, ALL):
        notes.append(f"{_images(new, dataset.root)} not in it and left out; --split {NEW} evaluates them")
    here = {sample.path for sample in dataset.samples}
    gone = {path for parts in used.values() for path, part in parts.items() if part == name} - here
    if gone:
        notes.append(f"{_images(len(gone), f'its {name} part')} not in {dataset.root} any more")
    return notes


def _unsplit(dataset: Dataset, known: Mapping[str, Parts | None], split: str | None) -> str:
    """Why nothing can be evaluated, and what to do."""
    others = [model for model, parts in known.items() if parts]
    reason = f"split.csv in {' and '.join(others)} lists none of its images"
    if not others:
        reason = f"{' and '.join(known)} has no split.csv"
    effect = f"so there is no {split} part" if split else "so which images the model was trained on is not known"
    return (
        f"{dataset.root} is not split, and {reason}, {effect}. Either --split {ALL} evaluates all "
        f"{len(dataset):,} images, or split them: folders train, val and test, or a manifest with a column split"
    )


def _unknown(model: str) -> str:
    return f"{model} has no split.csv that lists these images: whether it was trained on them is not known"


def _overlaps(dataset: Dataset, parts: Parts) -> bool:
    return any(sample.path in parts for sample in dataset.samples)


def _strictest(sample: Sample, known: Collection[Parts]) -> str:
    """The part of an image by all files: train before val, val before test."""
    found = {parts.get(sample.path, NEW) for parts in known}
    return next(name for name in (*SPLITS, NEW) if name in found)


def _only(dataset: Dataset, samples: Sequence[Sample]) -> Dataset:
    return dataclasses.replace(dataset, samples=tuple(samples))


def _images(count: int, where: object) -> str:
    return f"{count:,} image of {where} is" if count == 1 else f"{count:,} images of {where} are"


def _absolute(path: Path) -> str:
    return os.path.abspath(path)  # noqa: PTH100  # Path.resolve asks the disk about every folder on the way
