"""Folders of images -> the path, the class and the split of each image, and which files were passed over, and why.

A folder is a split if its name says so in one word: train, val or test, in forms such as Training, training_set,
seg_train, validation, valid or test2017. train, val, test and what the dictionary below makes of them are enough by
themselves; other names only count where the folder holds class folders, since a class may be called "steam train".

One level too many is skipped where splits leave no doubt: photos/archive/train/cat and seg_train/seg_train/cat.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path, PurePath

from effnet.data.paths import HEIF_SUFFIXES, SUFFIXES, is_folder, is_image
from effnet.errors import DataError

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLIT_WORDS)})(?:set|data)?(?![a-z])")
INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, and bytes that are not UTF-8
OUTPUT = {"args.yaml", "per_class.csv"}  # every folder of a run or an evaluation has one of them
SYSTEM_FILES = {"thumbs.db", "desktop.ini"}
EMPTY, PIPE = "holds no image", "a pipe, a socket or a device"  # reasons for passing over a folder or a file
MANIFEST = "move them, or list the images in a manifest: path,label,split"
OTHER = ("suffix", "no suffix")

Row = tuple[str, str, str, str]  # path, class, split and group of an image


@dataclass
class Listing:
    """What is below a folder, without hidden files; paths are relative to it and have forward slashes."""

    images: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)  # folders of runs and evaluations, whose pictures are no data
    passed_over: list[tuple[str, str]] = field(default_factory=list)  # files and folders, each with the reason


def split_of(name: str) -> str:
    """The split that a name stands for: train, val or test; "" for none."""
    found = {SPLIT_WORDS[word] for word in SPLIT_WORD.findall(name.lower())}
    return found.pop() if len(found) == 1 else ""


@lru_cache(2**16)  # a folder's name is asked for as often as it has images
def class_name(text: str) -> str:
    r"""The name of a class as a folder or a manifest has it, without differences that people cannot see.

    In Unicode's composed form NFC, with a single space for white space of any kind, and none at the ends. A
    control character, or a byte that is not UTF-8, is written as \xE9.
    """
    words = " ".join(unicodedata.normalize("NFC", text).split())
    return INVISIBLE.sub(lambda found: rf"\x{ord(found[0]) & 0xFF:02X}", words)


def read_folders(root: Path) -> tuple[list[Row], list[tuple[str, str]]]:
    """Every image below a folder with its class and its split, and what was passed over.

    Raises:
        DataError: it is not laid out as a data set.
    """
    found = Listing()
    _list_folder(root, "", (), found)
    rows, classes = _arrange(root, [path.split("/") for path in found.images])
    known = {row[0] for row in rows}
    loose = [(path, "not in a class folder") for path in found.images if path not in known]
    depth = min((path.count("/") for path in classes), default=-1)  # above class folders, a text is no surprise
    others = [(path, why) for path, why in found.passed_over if path.count("/") > depth or not why.startswith(OTHER)]
    passed_over = [*others, *loose, *_empty_folders(classes, found)]
    if not rows:
        reasons = Counter(reason for path, reason in passed_over if reason != EMPTY)
        why = "".join(f"; passed over: {count:,} ({reason})" for reason, count in reasons.most_common(3))
        if not found.folders:
            raise DataError(f"{root} has no sub-folders; it needs one for each class, with its images inside{why}")
        raise DataError(
            f"{root} holds no image in a class folder; the names of images end in {', '.join(SUFFIXES)}{why}"
        )
    return rows, passed_over


def list_names(names: Iterable[str]) -> str:
    """Names for a message: at most eight of them."""
    every = list(names)
    more = f" and {len(every) - 8} more" if len(every) > 8 else ""
    return ", ".join(repr(name) for name in every[:8]) + more


def _list_folder(folder: Path, prefix: str, above: tuple[tuple[int, int], ...], found: Listing) -> None:
    """Add the files of a folder, then those of its folders, all sorted by name."""
    try:
        status = folder.stat()
        with os.scandir(folder) as scan:
            entries = sorted((entry for entry in scan if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        found.passed_over.append((prefix[:-1], f"cannot be listed ({error.strerror})"))
        return
    here = status.st_dev, status.st_ino
    if here in above:
        found.passed_over.append((prefix[:-1], "a link to a folder above it"))
        return
    if prefix and not OUTPUT.isdisjoint(entry.name for entry in entries):
        found.outputs.append(prefix[:-1])
        return
    if prefix:
        found.folders.append(prefix[:-1])
    inner = []
    for entry in entries:
        if is_folder(entry):
            inner.append(entry.name)
        elif reason := _reason(entry):
            found.passed_over.append((prefix + entry.name, reason))
        elif is_image(entry.name):
            found.images.append(prefix + entry.name)
    for name in inner:
        _list_folder(folder / name, f"{prefix}{name}/", (*above, here), found)


def _reason(entry: os.DirEntry[str]) -> str:
    """Why a file is passed over; "" where it is an image, or nothing to speak of."""
    name = entry.name.lower()
    if name in SYSTEM_FILES:
        return ""
    suffix = PurePath(name).suffix
    if suffix in HEIF_SUFFIXES and not _reads_heif():
        return f"{suffix} needs: pip install 'effnet[heif]'"
    if not is_image(name):
        return f"suffix {suffix}" if suffix else "no suffix"
    if entry.is_symlink():  # of a broken link its reader says that there is nothing behind it
        target = Path(entry.path)
        return "" if target.is_file() or not target.exists() else PIPE
    return "" if entry.is_file() else PIPE


@cache
def _reads_heif() -> bool:
    return find_spec("pillow_heif") is not None


def _arrange(root: Path, paths: Sequence[list[str]], depth: int = 0) -> tuple[list[Row], set[str]]:
    """The rows of images and the class folders, from the names on their paths, of which `depth` are above the data."""
    inside = [path for path in paths if len(path) > depth + 1]
    names = sorted({path[depth] for path in inside})
    with_classes = {path[depth] for path in inside if len(path) > depth + 2}
    splits = {
        name: split
        for name in names
        if (split := split_of(name)) and (name.lower() in SPLIT_WORDS or name in with_classes)
    }
    where = root.joinpath(*paths[0][:depth]) if paths else root
    if 0 < len(splits) < len(names) and {"train"} < set(splits.values()):
        others = list_names(name for name in names if name not in splits)
        raise DataError(f"{where} has {list_names(splits)}, which are splits, and other images in {others}; {MANIFEST}")
    if len(splits) < len(names):  # "train" alone among other names is a class, such as of vehicles
        shared = _count_shared([path[:-1] for path in inside])
        if shared > depth and _has_splits(inside, shared):
            return _arrange(root, inside, shared)
        if names and with_classes == set(names) and _has_splits(inside, depth + 1):
            example = "/".join(inside[0][depth + 1 : depth + 2] + inside[0][depth : depth + 1])
            raise DataError(f"{where} has its splits inside the class folders, not above as in {example}; {MANIFEST}")
        rows = [("/".join(path), class_name(path[depth]), "", "") for path in inside]
        return rows, {"/".join(path[: depth + 1]) for path in inside}
    if twice := [split for split, count in Counter(splits.values()).items() if count > 1]:
        same = list_names(name for name in splits if splits[name] == twice[0])
        raise DataError(f"{where} has more than one {twice[0]} split: {same}")
    rows, classes = [], set()
    for name, split in splits.items():
        own = [path for path in inside if path[depth] == name and len(path) > depth + 2]
        inner = {path[depth + 1] for path in own}
        doubled = len(inner) == 1 and split_of(*inner) == split  # seg_train/seg_train
        label = depth + 1 + doubled
        own = [path for path in own if len(path) > label + 1]
        rows += [("/".join(path), class_name(path[label]), split, "") for path in own]
        classes |= {"/".join(path[: label + 1]) for path in own}
    return rows, classes


def _count_shared(folders: Sequence[list[str]]) -> int:
    """How many folders all images are in."""
    ends = zip(min(folders), max(folders), strict=False) if folders else ()
    return sum(1 for _ in takewhile(lambda names: names[0] == names[1], ends))


def _has_splits(paths: Sequence[Sequence[str]], depth: int) -> bool:
    """Whether the names at that depth are those of a train split and of another one, and of nothing else."""
    found = {split_of(path[depth]) if len(path) > depth + 1 else "" for path in paths}
    return {"train"} < found and "" not in found


def _empty_folders(classes: set[str], found: Listing) -> Iterator[tuple[str, str]]:
    """The folders beside class folders that hold neither an image nor a run."""
    beside = {path.rpartition("/")[0] for path in classes}
    for path in found.folders:
        with_run = any(f"{output}/".startswith(f"{path}/") for output in found.outputs)
        if path.rpartition("/")[0] in beside and path not in classes and not with_run:
            yield path, EMPTY
