"""A data set on disk: a folder for each class, split or not, or a manifest. Nothing is copied or moved.

    photos/cat/1.jpg               not split: class folders; `split_data` splits them
    photos/train/cat/1.jpg         split: train, val and test under any usual name (folders.py), each with class folders
    photos.csv                     a manifest: path,label and optionally split,group; paths relative to its folder
    shards/shards.json             shards written by `effnet pack` (shards.py), or the URL of their folder

Classes are in alphabetical order, as in torchvision's ImageFolder, and two lists of classes are matched by name. Images
are found at any depth of a class folder; hidden files are ignored.

File names that are not UTF-8 appear in a manifest byte for byte as on disk.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import os
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from unicodedata import normalize

from effnet.data.duplicates import connect
from effnet.data.folders import SPLIT_WORDS, Row, class_name, list_names, read_folders
from effnet.data.shards import MANIFEST, ShardFolder, explain_lost, file_size, name_of, open_shards, url
from effnet.errors import DataError, UnknownNameError, nearest
from effnet.files import csv_text, write_text

SPLITS = ("train", "val", "test")
COLUMNS = ("path", "label", "split", "group")
SIZE = "bytes"  # a column of a run's split.csv


@dataclass(frozen=True, slots=True)
class Sample:
    """An image and its class."""

    path: str  # relative to the data set's root, with forward slashes; or absolute
    label: int  # index of its class in the data set's `classes`
    split: str = ""  # one of SPLITS; empty if the data is not split
    group: str = ""  # images of one group (a patient, a film, near-duplicates) stay in one split

    @property
    def name(self) -> str:
        """The path without the shard, so that images have the same order in a folder and in shards."""
        return name_of(self.path)


@dataclass(frozen=True)
class Dataset:
    """Images with their classes."""

    root: Path
    classes: tuple[str, ...]
    samples: tuple[Sample, ...]
    passed_over: tuple[tuple[str, str], ...] = ()  # files and folders that were skipped, with the reason
    source: str = ""  # the folder or manifest that it was read from

    def __str__(self) -> str:
        return self.source or str(self.root)

    def __len__(self) -> int:
        return len(self.samples)

    def file(self, sample: Sample) -> Path:
        """The path of a sample's image."""
        return place(self.root, sample.path)

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """The splits; empty if the data is not split."""
        found = {sample.split for sample in self.samples}
        return tuple(name for name in SPLITS if name in found)

    def subset(self, split: str) -> Dataset:
        """The samples of one split; "" for a data set that is not split.

        Raises:
            UnknownNameError: there is no such split.
        """
        if split not in (*self.splits, ""):
            raise UnknownNameError("split", split, self.splits)
        return dataclasses.replace(self, samples=tuple(s for s in self.samples if s.split == split))

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Images of each class."""
        counted = Counter(sample.label for sample in self.samples)
        return tuple(counted[label] for label in range(len(self.classes)))

    @cached_property
    def digest(self) -> str:
        """The sha256 of all paths, classes, splits and file sizes, to detect changes of the data."""
        rows = ((s.path, self.classes[s.label], s.split, str(file_size(self.file(s)))) for s in self.samples)
        text = "".join(sorted("\t".join(row) + "\n" for row in rows))
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def place(root: Path, path: str) -> Path:
    """The location of a data set's path: below its root, unless it is absolute or a URL."""
    return Path(path) if "://" in path and url(path) else root / path


def root_of(data: Path) -> Path:
    """What the paths of a data set are relative to: its folder, its URL, or the folder of its manifest."""
    return data if url(data) or data.is_dir() else data.parent


def read_data(data: str | Path) -> Dataset:
    """The data set of a folder or a manifest.

    Raises:
        DataError: it does not exist, holds no image, or is not laid out as described in the module's docstring.
    """
    if not str(data):
        raise DataError("the name of the data is empty; give a folder or a manifest")
    path = Path(data)
    if shards := open_shards(path):
        return _read_shards(path, shards)
    if path.is_dir():
        rows, passed_over = read_folders(path)
        return dataclasses.replace(_dataset(path, rows, str(path)), passed_over=tuple(passed_over))
    if path.is_file():
        return read_manifest(path)
    folder = path.parent if path.parent.is_dir() else Path()
    raise DataError(f"{data} does not exist.{nearest(path.name, (each.name for each in folder.iterdir()))}")


def _read_shards(root: Path, shards: ShardFolder) -> Dataset:
    """The images that a folder of shards has; a damaged shard is one line of `passed_over`."""
    where = url(root) or str(root)
    dataset = read_manifest(root / MANIFEST, root, shards.manifest)
    lost = {sample.path for sample in dataset.samples if shards.lost(root, sample.path)}
    counts = Counter(path.partition("/")[0] for path in lost)
    passed_over = tuple(explain_lost(shards.damaged, counts))
    samples = tuple(sample for sample in dataset.samples if sample.path not in lost)
    if not samples:
        raise DataError(f"{where} holds no image: {'; '.join(': '.join(each) for each in passed_over[:3])}")
    return dataclasses.replace(dataset, samples=samples, passed_over=passed_over, source=where)


def read_manifest(path: str | Path, root: Path | None = None, content: bytes | None = None) -> Dataset:
    """The data set of a CSV file with the columns path, label and optionally split and group; others are ignored.

    Columns are separated by commas, semicolons or tabs. Paths are relative to `root`, by default the file's folder.
    `content` is the file's content if it was read already.

    Raises:
        DataError: it is not a valid manifest; the message names the line.
    """
    path = Path(path)
    root = root or path.parent
    try:
        rows = read_table((path.read_bytes() if content is None else content).decode("utf-8-sig", "surrogateescape"))
    except UnicodeError as error:
        raise DataError(f"{path} is not a manifest: its columns or labels are not UTF-8; save it as UTF-8") from error
    except (OSError, csv.Error) as error:
        raise DataError(f"{path} is not a manifest ({error}), a CSV file: path,label,split,group") from error
    if not rows or not {"path", "label"} <= rows[0].keys():
        found = list_names(map(str, rows[0])) if rows else "no line below the first"
        raise DataError(f"{path} needs the columns path and label, and may have split and group; found: {found}")
    samples: dict[str, tuple[str, str, str]] = {}
    windows = _is_of_windows(root, [row["path"] or "" for row in rows])
    for line, row in enumerate(rows, start=2):
        name, label, split, group = (row.get(column) or "" for column in COLUMNS)
        name, label, group = _existing(root, name, windows), class_name(label), group.strip()
        if not name or not label:
            raise DataError(f"{path}, line {line}: `{'label' if name else 'path'}` is empty")
        if (own := split.strip()) and own.lower() not in SPLIT_WORDS:
            raise DataError(f"{path}, line {line}: {UnknownNameError('split', own, SPLITS)}")
        if name in samples and samples[name][0] != label:
            raise DataError(f"{path}, line {line}: {name} is {samples[name][0]!r} and {label!r}: two classes")
        if name in samples:
            raise DataError(f"{path}, line {line}: {name} is listed twice")
        samples[name] = label, SPLIT_WORDS.get(own.lower(), ""), group
    del rows, row  # they take more memory than the samples
    if len({bool(split) for _, split, _ in samples.values()}) > 1:
        raise DataError(f"{path} has lines with and without a split; give all of them one, or none")
    return _dataset(root, [(name, *values) for name, values in samples.items()], str(path))


def read_table(text: str) -> list[dict[str, str]]:
    """The rows of a manifest's text; bytes of a path that are not UTF-8 are surrogates.

    Raises:
        UnicodeError: a column's name or a label is not UTF-8.
        csv.Error: it is not CSV.
    """
    delimiter = max(",;\t", key=text.partition("\n")[0].count)  # spreadsheets write semicolons in much of Europe
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
    if twice := [name for name in COLUMNS if reader.fieldnames.count(name) > 1]:
        raise csv.Error(f"the column {twice[0]} appears twice")
    rows = list(reader)
    for words in (*reader.fieldnames, *(row.get("label") or "" for row in rows)):
        words.encode()
    return rows


def manifest(dataset: Dataset, *, sizes: bool = False) -> str:
    """The text of a manifest, sorted by path; with `sizes`, including each file's size in bytes."""
    rows: list[tuple[object, ...]] = [(*COLUMNS, SIZE) if sizes else COLUMNS]
    for sample in sorted(dataset.samples, key=lambda sample: sample.name):
        row = (sample.path, dataset.classes[sample.label], sample.split, sample.group)
        rows.append((*row, file_size(dataset.file(sample))) if sizes else row)
    return csv_text(rows)


def write_manifest(dataset: Dataset, path: Path) -> None:
    """Write the data set as a manifest that `read_data` reads, with paths relative to the manifest's folder."""
    moved = tuple(dataclasses.replace(s, path=path_from(path.parent, dataset.file(s))) for s in dataset.samples)
    write_text(path, manifest(dataclasses.replace(dataset, samples=moved)))


def path_from(folder: Path, file: Path) -> str:
    """A file's path for a manifest in `folder`; a URL stays as it is."""
    return url(file) or Path(os.path.relpath(file.resolve(), folder.resolve())).as_posix()


def match_classes(dataset: Dataset, names: Sequence[str], whose: str) -> Dataset:
    """The data set with its labels in the order of `names`; classes that it lacks are empty.

    Raises:
        DataError: the data has a class that is not in `names`, which are `whose`: "the model's", "the run's".
    """
    numbered = [*enumerate(names)]
    output_of = {class_name(name): number for number, name in reversed(numbered)}  # the first of equal names
    output_of |= {name: number for number, name in reversed(numbered)}
    unknown = [name for name in dataset.classes if name not in output_of]
    if unknown:
        lacking = [name for name in names if class_name(name) not in dataset.classes]
        known = f"{list_names(unknown)} {'is' if len(unknown) == 1 else 'are'} unknown to it"
        missing = f", {list_names(lacking)} missing here" if lacking else ""
        near = nearest(unknown[0], lacking or names)
        raise DataError(f"the data's classes are not {whose}: {known}{missing}.{near}")
    samples = (dataclasses.replace(s, label=output_of[dataset.classes[s.label]]) for s in dataset.samples)
    return dataclasses.replace(dataset, classes=tuple(names), samples=tuple(samples))


def split_data(
    dataset: Dataset, *, val: float = 0.15, test: float = 0.15, seed: int = 0, groups: Sequence[object] | None = None
) -> Dataset:
    """Split the data set: stratified by class, groups kept together, reproducible by the seed.

    Data that is not split gets train, val and test splits; split data without a val split gets one from its training
    split. A class with at least three groups of images is in every split.

    Args:
        dataset: the images.
        val: share of the images for choosing the best epoch and the temperature.
        test: share of the images for the final evaluation; only used if the data is not split.
        seed: of the shuffle.
        groups: a second group of every sample besides its own `group`, such as its near-duplicates.

    Raises:
        DataError: no training split was found, or the shares are negative or add up to 1 or more.
    """
    if dataset.splits and "train" not in dataset.splits:
        raise DataError(f"{dataset} has {list_names(dataset.splits)} and no train split")
    if "val" in dataset.splits:
        return dataset
    whole, shares = ("train", {"val": val}) if dataset.splits else ("", {"test": test, "val": val})
    if min(shares.values()) < 0 or sum(shares.values()) >= 1:
        raise DataError(f"the shares of {' and '.join(shares)} (={shares}) must be at least 0 and less than 1 together")
    seen: dict[object, int] = {}
    own = [("group", sample.group) if sample.group else ("path", sample.path) for sample in dataset.samples]
    links = [(index, seen.setdefault(name, index)) for index, name in enumerate(own)]
    links += [(index, seen.setdefault(("given", name), index)) for index, name in enumerate(groups or ())]
    units = connect(len(dataset), links)
    members: dict[int, list[int]] = defaultdict(list)
    for index, sample in enumerate(dataset.samples):
        if sample.split == whole:
            members[units[index]].append(index)
    by_class: dict[int, list[list[int]]] = defaultdict(list)
    for indices in members.values():
        label = Counter(dataset.samples[index].label for index in indices).most_common(1)[0][0]
        by_class[label].append(indices)
    assigned: dict[int, str] = {}
    for label in sorted(by_class):
        units_of_class = sorted(by_class[label], key=lambda indices: dataset.samples[indices[0]].name)
        random.Random(f"{seed} {dataset.classes[label]}").shuffle(units_of_class)
        for indices, split in zip(units_of_class, _assign(units_of_class, shares), strict=True):
            assigned |= dict.fromkeys(indices, split)
    samples = (
        dataclasses.replace(sample, split=assigned.get(index, sample.split))
        for index, sample in enumerate(dataset.samples)
    )
    return dataclasses.replace(dataset, samples=tuple(samples))


def missing_classes(dataset: Dataset) -> dict[str, list[str]]:
    """For each class with images, the splits that have none of it, if any."""
    found = {(sample.label, sample.split) for sample in dataset.samples}
    lacking = {
        name: [split for split in dataset.splits if (label, split) not in found]
        for label, name in enumerate(dataset.classes)
    }
    return {name: splits for name, splits in lacking.items() if splits and len(splits) < len(dataset.splits)}


def explain_one_class(dataset: Dataset) -> str:
    """Why a data set has only one class, as far as its folders show."""
    name = dataset.classes[0]
    below = (sample.path.split("/") for sample in dataset.samples)
    inner = {path[path.index(name) + 1] for path in below if name in path[:-2]}
    hint = f"; if {list_names(sorted(inner))} in it are the classes, name that folder instead" if inner else ""
    return f"{name!r} is its only class{hint}"


def _assign(units: Sequence[Sequence[int]], shares: dict[str, float]) -> list[str]:
    """The split of each unit of one class: shares are filled one after the other, and the rest is train."""
    sizes, splits = [len(unit) for unit in units], list[str]()
    for left, (split, share) in zip(range(len(shares), 0, -1), shares.items(), strict=True):
        taken = 0
        for size in sizes[len(splits) :]:
            needed = not taken and share > 0 and len(sizes) > len(shares)
            if not needed and (taken + size / 2 > share * sum(sizes) or len(sizes) - len(splits) <= left):
                break
            splits.append(split)
            taken += size
    return splits + ["train"] * (len(sizes) - len(splits))


def _is_of_windows(root: Path, names: Sequence[str]) -> bool:
    """Whether the first path with a backslash that can be found has slashes on disk, as in manifests from Windows."""
    for name in (name.strip() for name in names if "\\" in name):
        if file_size(place(root, name)) >= 0:
            return False
        if file_size(place(root, name.replace("\\", "/"))) >= 0:
            return True
    return False


def _existing(root: Path, name: str, windows: bool) -> str:
    """A manifest's path as written or, if no such file exists, stripped, in Unicode's other form, or with slashes."""
    plain = name.strip()
    slashed = plain.replace("\\", "/")
    first = (slashed,) if windows and slashed != plain else ()  # saves a look at the disk for each path
    forms = dict.fromkeys((*first, name, plain, normalize("NFC", plain), normalize("NFD", plain), slashed))
    return plain if len(forms) == 1 else next((form for form in forms if file_size(place(root, form)) >= 0), plain)


def _dataset(root: Path, found: Sequence[Row], where: str) -> Dataset:
    if blank := [path for path, label, *_ in found if not label]:
        raise DataError(f"{where}: the name of a class folder is blank: {blank[0]!r}")
    classes = tuple(sorted({label for _, label, _, _ in found}))
    number = {name: index for index, name in enumerate(classes)}
    samples = (Sample(path, number[label], split, group) for path, label, split, group in found)
    dataset = Dataset(root, classes, tuple(samples), source=where)
    labels_of = {split: {name for _, name, own, _ in found if own == split} for split in dataset.splits}
    trained = labels_of.get("train")
    for split, labels in labels_of.items():
        if trained and labels - trained:
            lacking, known = list_names(sorted(labels - trained)), list_names(sorted(trained))
            raise DataError(f"{where}: {split} has classes that the train split lacks: {lacking}; train has {known}")
    return dataset
