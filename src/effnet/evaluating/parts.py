"""Which images of DATA a model is judged on: never by accident those that it was trained on.

DATA's own parts decide where it has any. Where it has none, the split.csv that a model trained here brings along does:
its paths are looked for in DATA. Of an image that two models' files know, what is worst counts: trained on before
chosen on, chosen on before tested on.

What a model is calibrated on and judged on, `halves`, are its own training and val images, also where DATA's parts say
less: training takes val out of a train part.
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
from effnet.weights.bundle import is_bundle, read_config, read_split

ALL, NEW = "all", "new"  # every image; those that no split.csv knows

Parts = Mapping[str, str]  # train, val or test by path


@dataclass(frozen=True)
class Chosen:
    """What is evaluated, and what else there is."""

    split: str
    data: Dataset
    val: Dataset | None  # images to fit a temperature on: another part than the evaluated one
    seen: int = 0  # images among the evaluated that a model was trained on, unasked
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Halves:
    """What a model is calibrated on, and what it is judged on; never an image of a test part, or of both."""

    train: Dataset
    val: Dataset
    notes: tuple[str, ...] = ()


def halves(dataset: Dataset, model: str, learned: Parts | None) -> Halves:
    """The training and the val images of a MODEL in DATA.

    They are those of the split.csv that it brings, less what DATA itself calls test, or val where they were trained on.
    Without one they are DATA's, split by the shares and the seed that training has where there is no val part.

    Args:
        dataset: DATA.
        model: its name, for messages.
        learned: what it was trained on, see `learned_parts`.

    Raises:
        DataError: there are none.
    """
    if learned and _meet(dataset, learned):
        parts = [_half(sample.split, learned.get(sample.path, "")) for sample in dataset.samples]
        notes: tuple[str, ...] = ()
    else:
        split = dataset if "val" in dataset.splits else split_data(dataset)
        parts = [sample.split for sample in split.samples]
        words = "brings no split.csv that knows these images: whether it was trained on the val images is not known"
        notes = (f"{model} {words}",)
    of = {
        name: _only(dataset, [s for s, part in zip(dataset.samples, parts, strict=True) if part == name])
        for name in SPLITS
    }
    for name, wanted in (("train", "calibrate"), ("val", "judge")):
        if not len(of[name]):
            raise DataError(
                f"{dataset.root} has no image to {wanted} {model} with: none is of its {name} part. Give the data that "
                "it was trained on, or folders train and val, or a manifest with a column split"
            )
    return Halves(of["train"], of["val"], notes)


def _half(own: str, learned: str) -> str:
    """The part of an image that DATA and a split.csv know; none where it is neither safe to calibrate nor to judge."""
    if "test" in (own, learned):
        return "test"
    if (own, learned) == ("val", "train"):
        return ""
    return learned or own


def learned_parts(model: str, dataset: Dataset) -> Parts | None:
    """What a MODEL was trained, chosen and tested on, by path in DATA; None where it does not say.

    An image is found by where it lies, or by its path within the folder if it has the same size. What is not found
    keeps the path that it had.

    Raises:
        BundleError: its split.csv was changed.
    """
    text = read_split(model) if is_bundle(Path(model)) else None
    if text is None:
        return None
    data = Path(str(read_config(model).provenance.get("data", "")))
    root = data if data.is_dir() else data.parent
    rows = list(csv.DictReader(io.StringIO(text)))
    lying = {_absolute(root / row["path"]): row for row in rows}
    named = {row["path"]: row for row in rows}
    parts = {file: row["split"] for file, row in lying.items()}
    for sample in dataset.samples:
        file = _absolute(dataset.file(sample))
        row = lying.get(file) or named.get(sample.path)
        if row and (file in lying or row.get(SIZE) in (None, str(file_size(dataset.file(sample))))):
            parts.pop(_absolute(root / row["path"]), None)
            parts[sample.path] = row["split"]
    return parts


def _absolute(path: Path) -> str:
    return os.path.abspath(path)  # noqa: PTH100  # Path.resolve asks the disk about every folder on the way


def choose(dataset: Dataset, learned: Mapping[str, Parts | None], split: str | None = None) -> Chosen:
    """The images to evaluate.

    Args:
        dataset: DATA.
        learned: for each model what it was trained on.
        split: train, val, test, new or all; by default test, else val.

    Raises:
        DataError: nothing says which images the models were trained on, or there is no part for figures.
        UnknownNameError: there is no such part.
    """
    known = {model: parts for model, parts in learned.items() if parts and _meet(dataset, parts)}
    if dataset.splits:
        split_of = {sample.path: sample.split for sample in dataset.samples}
    elif known:
        split_of = {sample.path: _worst(sample, known.values()) for sample in dataset.samples}
    elif split == ALL:
        split_of = {}
    else:
        raise DataError(_unsplit(dataset, learned, split))
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
    trained = {path for parts in known.values() for path, part in parts.items() if part == "train"}
    rest = [s for s in dataset.samples if split_of.get(s.path) == "val" and s.path not in trained]
    seen = sum(sample.path in trained for sample in data.samples)
    notes = () if dataset.splits or not known else _told(dataset, known, split_of, name)
    notes += tuple(
        f"{model} brings no split.csv that knows these images: whether it was trained on them is not known"
        for model in learned
        if (known or split_of == {}) and model not in known
    )
    for model, parts in known.items():
        chosen_on = sum(parts.get(sample.path) == "val" for sample in data.samples)
        if chosen_on:
            notes += (f"{model} was chosen and calibrated on {chosen_on:,} of these images: that flatters it a little",)
    if seen:
        notes += (f"trained on {seen:,} of these {len(data):,} images: the figures are too good",)
    val = _only(dataset, rest) if rest and name not in ("val", ALL) else None
    return Chosen(name, data, val, 0 if split in ("train", ALL) else seen, notes)


def _told(dataset: Dataset, known: Mapping[str, Parts], split_of: Mapping[str, str], name: str) -> tuple[str, ...]:
    """Where the parts come from, and what does not fit."""
    notes = [f"the parts are those of split.csv in {' and '.join(known)}"]
    new = sum(part == NEW for part in split_of.values())
    if new and name not in (NEW, ALL):
        notes.append(f"{_images(new, dataset.root)} not in it and left out; --split {NEW} evaluates them")
    here = {sample.path for sample in dataset.samples}
    gone = {path for parts in known.values() for path, part in parts.items() if part == name} - here
    if gone:
        notes.append(f"{_images(len(gone), f'its {name} part')} not in {dataset.root} any more")
    return tuple(notes)


def _unsplit(dataset: Dataset, learned: Mapping[str, Parts | None], split: str | None) -> str:
    """Why nothing can be evaluated, and the ways out."""
    strangers = [model for model, parts in learned.items() if parts]
    brings = (
        f"split.csv in {' and '.join(strangers)} knows none of its images"
        if strangers
        else f"{' and '.join(learned)} brings no split.csv"
    )
    asked = f"so there is no {split} part" if split else "so nothing says which images the model was not trained on"
    return (
        f"{dataset.root} is not split, and {brings}, {asked}. Either --split {ALL} evaluates all "
        f"{len(dataset):,} images, or split them: folders train, val and test, or a manifest with a column split"
    )


def _meet(dataset: Dataset, parts: Parts) -> bool:
    return any(sample.path in parts for sample in dataset.samples)


def _worst(sample: Sample, learned: Collection[Parts]) -> str:
    """The part of an image by all that know it."""
    found = {parts.get(sample.path, NEW) for parts in learned}
    return next(name for name in (*SPLITS, NEW) if name in found)


def _only(dataset: Dataset, samples: Sequence[Sample]) -> Dataset:
    return dataclasses.replace(dataset, samples=tuple(samples))


def _images(count: int, where: object) -> str:
    return f"{count:,} image of {where} is" if count == 1 else f"{count:,} images of {where} are"
