"""Chooses the images of DATA that a model is evaluated on, never by accident those that it was trained on.

DATA's own splits decide. If it has none, a trained model's split.csv does: its paths are looked up in DATA. If the
files of two models disagree about an image, train takes precedence over val, and val over test.

`train_and_val` chooses the images that a quantised model is calibrated and evaluated on. There the model's split.csv
takes precedence, because training may have taken its val split from DATA's train split.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

from effnet.data.dataset import SIZE, SPLITS, Dataset, Sample, place, read_table, split_data
from effnet.data.shards import file_size, name_of
from effnet.errors import DataError, UnknownNameError

ALL, NEW = "all", "new"  # every image; those that no split.csv lists

Splits = Mapping[str, str]  # train, val or test by path


@dataclass(frozen=True)
class HeldOut:
    """The images to evaluate."""

    split: str
    data: Dataset
    val: Dataset | None  # images to fit a temperature on, none of them in `data`
    trained: int = 0  # of them, images that a model was trained on, unless --split train or all includes them
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainVal:
    """The images that a model is calibrated on and evaluated on: disjoint, and without test images."""

    train: Dataset
    val: Dataset
    notes: tuple[str, ...] = ()


def match_split(text: str, root: Path, dataset: Dataset) -> Splits:
    """The splits of images according to a split.csv, keyed by their paths in `dataset`.

    An image is found by its absolute path, or by its path within the folder or the shards, in any Unicode form, if it
    has the same size. Images that are not found keep their path from `text`, the split.csv, whose paths are relative to
    `root`.
    """
    rows = read_table(text)
    by_file = {_absolute_path(place(root, row["path"])): row for row in rows}
    by_path = {normalize("NFC", name_of(row["path"])): row for row in rows}
    splits = {file: row["split"] for file, row in by_file.items()}
    for sample in dataset.samples:
        file = _absolute_path(dataset.file(sample))
        row = by_file.get(file) or by_path.get(normalize("NFC", sample.name))
        if row and (file in by_file or row.get(SIZE) in (None, str(file_size(dataset.file(sample))))):
            splits.pop(_absolute_path(place(root, row["path"])), None)
            splits[sample.path] = row["split"]
    return splits


def hold_out(dataset: Dataset, known: Mapping[str, Splits | None], split: str | None = None) -> HeldOut:
    """Choose the images to evaluate.

    Args:
        dataset: the images to choose from.
        known: for each model, the splits of its split.csv (`match_split`); None if it has none.
        split: train, val, test, new or all; by default test, else val.

    Raises:
        DataError: nothing says which images the models were trained on, or no split can be evaluated.
        UnknownNameError: there is no such split.
    """
    used = {model: splits for model, splits in known.items() if splits and _overlaps(dataset, splits)}
    if dataset.splits:
        split_of = {sample.path: sample.split for sample in dataset.samples}
    elif used:
        split_of = {sample.path: _combine(sample, used.values()) for sample in dataset.samples}
    elif split == ALL:
        split_of = {}
    else:
        raise DataError(_explain_unsplit(dataset, known, split))
    found = [name for name in (*SPLITS, NEW) if name in split_of.values()]
    name = split or next((name for name in ("test", "val") if name in found), "")
    if not name:
        raise DataError(
            f"{dataset} has no test or val split, only {' and '.join(found)}; --split {found[0]} evaluates that, "
            f"--split {ALL} everything"
        )
    if name not in (*found, ALL):
        raise UnknownNameError("split", name, (*found, ALL))
    data = _keep(dataset, [s for s in dataset.samples if name == ALL or split_of[s.path] == name])
    trained_on = {path for splits in used.values() for path, own in splits.items() if own == "train"}
    rest = [s for s in dataset.samples if split_of.get(s.path) == "val" and s.path not in trained_on]
    trained = sum(sample.path in trained_on for sample in data.samples)
    notes = [] if dataset.splits or not used else _explain_split(dataset, used, split_of, name)
    notes += [_say_unknown(model) for model in known if (used or not split_of) and model not in used]
    for model, splits in used.items():
        if count := sum(splits.get(sample.path) == "val" for sample in data.samples):
            notes.append(f"{model} was selected and calibrated on {count:,} of these images: figures slightly too good")
    if trained:
        notes.append(f"trained on {trained:,} of these {len(data):,} images: the figures are too good")
    val = _keep(dataset, rest) if rest and name not in ("val", ALL) else None
    return HeldOut(name, data, val, 0 if split in ("train", ALL) else trained, tuple(notes))


def train_and_val(dataset: Dataset, model: str, known: Splits | None) -> TrainVal:
    """The training and the validation images of a model in DATA.

    They follow its split.csv, without images of DATA's test split, and without training images that are in DATA's val
    split. Without a split.csv (`known` is None) they are DATA's splits; if DATA has no val split, it is split as in
    training by default.

    Raises:
        DataError: one of the two is empty.
    """
    if known and _overlaps(dataset, known):
        splits = [_safe_split(sample.split, known.get(sample.path, "")) for sample in dataset.samples]
        notes: tuple[str, ...] = ()
    else:
        split = dataset if "val" in dataset.splits else split_data(dataset)
        splits = [sample.split for sample in split.samples]
        notes = (_say_unknown(model),)
    found = []
    for name, purpose in (("train", "calibrate"), ("val", "evaluate")):
        found.append(_keep(dataset, [s for s, own in zip(dataset.samples, splits, strict=True) if own == name]))
        if not len(found[-1]):
            raise DataError(
                f"{dataset} has no image to {purpose} {model} with: its {name} split is empty. Give the data that "
                "it was trained on, or folders train and val, or a manifest with a column split"
            )
    train, val = found
    return TrainVal(train, val, notes)


def trained_images(dataset: Dataset, known: Splits | None) -> Dataset:
    """The images of DATA that a model was trained on by its split.csv, else DATA's train split; may be empty."""
    own = [known.get(s.path, "") if known and _overlaps(dataset, known) else s.split for s in dataset.samples]
    return _keep(dataset, [s for s, split in zip(dataset.samples, own, strict=True) if split == "train"])


def _safe_split(own: str, known: str) -> str:
    """The split of an image by DATA and by a split.csv; "" if using it as train or as val would bias the result."""
    if "test" in (own, known):
        return "test"
    return "" if (own, known) == ("val", "train") else known or own


def _explain_split(dataset: Dataset, used: Mapping[str, Splits], split_of: Splits, name: str) -> list[str]:
    """Notes on where the splits come from, and which images only one of data and split.csv has."""
    notes = [f"the splits are those of split.csv in {' and '.join(used)}"]
    new = sum(split == NEW for split in split_of.values())
    if new and name not in (NEW, ALL):
        notes.append(f"{_count_images(new, dataset)} not in it and left out; --split {NEW} evaluates them")
    here = {sample.path for sample in dataset.samples}
    gone = {path for splits in used.values() for path, own in splits.items() if own == name} - here
    if gone:
        notes.append(f"{_count_images(len(gone), f'its {name} split')} not in {dataset} any more")
    return notes


def _explain_unsplit(dataset: Dataset, known: Mapping[str, Splits | None], split: str | None) -> str:
    """Why nothing can be evaluated, and what to do."""
    others = [model for model, splits in known.items() if splits]
    reason = f"split.csv in {' and '.join(others)} lists none of its images"
    if not others:
        reason = f"{' and '.join(known)} has no split.csv"
    effect = f"so there is no {split} split" if split else "so it is unknown which images the model was trained on"
    return (
        f"{dataset} is not split, and {reason}, {effect}. Either --split {ALL} evaluates all "
        f"{len(dataset):,} images, or split them: folders train, val and test, or a manifest with a column split"
    )


def _say_unknown(model: str) -> str:
    return f"{model} has no split.csv that lists these images: whether it was trained on them is unknown"


def _overlaps(dataset: Dataset, splits: Splits) -> bool:
    return any(sample.path in splits for sample in dataset.samples)


def _combine(sample: Sample, known: Collection[Splits]) -> str:
    """The split of an image in all files: train takes precedence over val, val over test."""
    found = {splits.get(sample.path, NEW) for splits in known}
    return next(name for name in (*SPLITS, NEW) if name in found)


def _keep(dataset: Dataset, samples: Sequence[Sample]) -> Dataset:
    return dataclasses.replace(dataset, samples=tuple(samples))


def _count_images(count: int, where: object) -> str:
    return f"{count:,} image of {where} is" if count == 1 else f"{count:,} images of {where} are"


def _absolute_path(path: Path) -> str:
    return os.path.abspath(path)  # noqa: PTH100  # Path.resolve stats every parent folder
