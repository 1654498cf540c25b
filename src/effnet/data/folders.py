"""Folders of images -> path, class and split of each image, and which files were skipped and why.

A folder is a split if its name contains train, val or test, in forms such as Training, training_set, validation, valid
or test2017. The names train, val, test and those in the dictionary below suffice by themselves. Other names only count
if the folder holds class folders and their other words are plain ones, such as images, or are the same for every split:
seg_train and seg_test are splits, "bullet train" and "crash test" are classes.

An extra level of folders is skipped if splits leave no doubt: photos/archive/train/cat, seg_train/seg_train/cat and
train/images/cat. Ambiguous layouts are refused.
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
from effnet.errors import DataError, short

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLIT_WORDS)})(?:set|data)?(?![a-z])")
PLAIN_WORDS = {"set", "data", "dataset", "split", "digits", "image", "images", "img", "imgs", "photos", "pictures"}
INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, and bytes that are not UTF-8
OUTPUT = {"args.yaml", "per_class.csv"}  # every folder of a run or an evaluation has one of these
SYSTEM_FILES = {"thumbs.db", "desktop.ini"}
EMPTY, PIPE = "holds no image", "a pipe, a socket or a device"  # reasons for skipping a folder or file
MANIFEST = "move them, or list the images in a manifest: path,label,split"
OTHER = ("suffix", "no suffix")

Row = tuple[str, str, str, str]  # path, class, split and group of an image


@dataclass
class Listing:
    """The content of a folder, without hidden files; paths are relative to it and have forward slashes."""

    images: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)  # folders of runs and evaluations, whose pictures are not data
    passed_over: list[tuple[str, str]] = field(default_factory=list)  # skipped files and folders, with the reason


def split_of(name: str) -> str:
    """The split that a name stands for: train, val or test; "" for none."""
    found = {SPLIT_WORDS[word] for word in SPLIT_WORD.findall(name.lower())}
    return found.pop() if len(found) == 1 else ""


@lru_cache(2**16)  # called for every image
def class_name(text: str) -> str:
    r"""The name of a class, from that of a folder or in a manifest, without invisible differences.

    It is in Unicode's composed form NFC, with single spaces for any white space, and stripped. A control character, or
    a byte that is not UTF-8, is written as \xE9.
    """
    words = " ".join(unicodedata.normalize("NFC", text).split())
    return INVISIBLE.sub(lambda found: rf"\x{ord(found[0]) & 0xFF:02X}", words)


def read_folders(root: Path) -> tuple[list[Row], list[tuple[str, str]]]:
    """Every image below a folder with its class and split, and what was skipped.

    Raises:
        DataError: it is not laid out as a data set.
    """
    found = Listing()
    _list_folder(root, "", (), found)
    examples: dict[str, str] = {}  # one image of each folder stands for all images directly in it
    for path in found.images:
        examples.setdefault(_folder(path), path)
    arranged, classes = _arrange(root, [path.split("/") for path in examples.values()])
    known = {_folder(path): (label, split, group) for path, label, split, group in arranged}
    rows = [(path, *known[_folder(path)]) for path in found.images if _folder(path) in known]
    loose = [(path, "not in a class folder") for path in found.images if _folder(path) not in known]
    depth = min((path.count("/") for path in classes), default=-1)  # a README above them is normal
    others = [(path, why) for path, why in found.passed_over if path.count("/") > depth or not why.startswith(OTHER)]
    passed_over = [*others, *loose, *_empty_folders(classes, found)]
    if not rows:
        reasons = Counter(reason for path, reason in passed_over if reason != EMPTY)
        why = "".join(f"; skipped: {count:,} ({reason})" for reason, count in reasons.most_common(3))
        if not found.folders:
            raise DataError(f"{root} has no sub-folders; it needs one for each class, with its images inside{why}")
        raise DataError(
            f"{root} holds no image in a class folder; the names of images end in {', '.join(SUFFIXES)}{why}"
        )
    return rows, passed_over


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def list_names(names: Iterable[str]) -> str:
    """Names for a message: at most eight of them."""
    every = list(names)
    more = f" and {len(every) - 8} more" if len(every) > 8 else ""
    return ", ".join(map(short, every[:8])) + more


def _list_folder(folder: Path, prefix: str, above: tuple[tuple[int, int], ...], found: Listing) -> None:
    """Add a folder's files, then those of its sub-folders, all sorted by name."""
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
    """Why a file is skipped; "" for an image or a file that needs no mention."""
    name = entry.name.lower()
    if name in SYSTEM_FILES:
        return ""
    suffix = PurePath(name).suffix
    if suffix in HEIF_SUFFIXES and not _reads_heif():
        return f"{suffix} needs: pip install 'effnet[heif]'"
    if not is_image(name):
        return f"suffix {suffix}" if suffix else "no suffix"
    if entry.is_symlink():  # for a broken link the reader reports that its target is missing
        target = Path(entry.path)
        return "" if target.is_file() or not target.exists() else PIPE
    return "" if entry.is_file() else PIPE


@cache
def _reads_heif() -> bool:
    return find_spec("pillow_heif") is not None


def _arrange(root: Path, paths: Sequence[list[str]], depth: int = 0) -> tuple[list[Row], set[str]]:
    """The rows of images, and the class folders, from the parts of their paths, of which `depth` are above the data."""
    inside = [path for path in paths if len(path) > depth + 1]
    names = sorted({path[depth] for path in inside})
    with_classes = {path[depth] for path in inside if len(path) > depth + 2}
    splits = _find_splits(names, with_classes)
    where = root.joinpath(*paths[0][:depth]) if paths else root
    if 0 < len(splits) < len(names) and ({"train"} < set(splits.values()) or not with_classes.isdisjoint(splits)):
        others = list_names(name for name in names if name not in splits)
        are = "are splits" if len(splits) > 1 else "is a split"
        raise DataError(f"{where} has {list_names(splits)}, which {are}, and other images in {others}; {MANIFEST}")
    if len(splits) < len(names):  # "train" among other names, without sub-folders, is a class, say of vehicles
        shared = _count_shared([path[:-1] for path in inside])
        if shared > depth and _has_splits(inside, shared):
            return _arrange(root, inside, shared)
        if names and with_classes == set(names) and _has_splits(inside, depth + 1):
            example = "/".join(inside[0][depth + 1 : depth + 2] + inside[0][depth : depth + 1])
            raise DataError(f"{where} has its splits inside the class folders, not above as in {example}; {MANIFEST}")
        if len(names) > 1 and (inner := _same_folders(inside, depth)):
            every = f"{list_names(names)} hold folders of the same names, {list_names(inner)}"
            raise DataError(f"{where}: {every}, and may be splits or classes; {MANIFEST}")
        rows = [("/".join(path), class_name(path[depth]), "", "") for path in inside]
        return rows, {"/".join(path[: depth + 1]) for path in inside}
    if twice := [split for split, count in Counter(splits.values()).items() if count > 1]:
        same = list_names(name for name in splits if splits[name] == twice[0])
        raise DataError(f"{where} has more than one {twice[0]} split: {same}; {MANIFEST}")
    below = [path for path in inside if path[depth] in splits and len(path) > depth + 2]
    label = depth + 1 + _skips_level(below, [path for path in below if splits[path[depth]] == "train"] or below, depth)
    labelled = [path for path in below if len(path) > label + 1]
    rows = [("/".join(path), class_name(path[label]), splits[path[depth]], "") for path in labelled]
    return rows, {"/".join(path[: label + 1]) for path in labelled}


def _find_splits(names: Sequence[str], with_classes: set[str]) -> dict[str, str]:
    """The names that stand for a split, with the split; `with_classes` are names of folders that hold folders."""
    found = {name: split for name in names if (split := split_of(name))}
    others = {name: set(re.findall(r"[^\W\d_]+", SPLIT_WORD.sub(" ", name.lower()))) - PLAIN_WORDS for name in found}
    alike = len(set(found.values())) > 1 and len(set(map(frozenset, others.values()))) == 1
    return {
        name: split
        for name, split in found.items()
        if name.lower() in SPLIT_WORDS or (name in with_classes and (alike or not others[name]))
    }


def _same_folders(paths: Sequence[list[str]], depth: int) -> list[str]:
    """The names of the sub-folders at this depth if they are the same, two or more, in every folder; else none."""
    inner: dict[str, set[str]] = {}
    for path in paths:
        if len(path) == depth + 2:  # an image next to them
            return []
        inner.setdefault(path[depth], set()).add(path[depth + 1])
    first, *others = inner.values()
    return sorted(first) if len(first) > 1 and all(names == first for names in others) else []


def _skips_level(paths: Sequence[list[str]], training: Sequence[list[str]], depth: int) -> bool:
    """Whether every split holds a single folder, named like the split or "images", above the class folders.

    If a training split's inner folder holds images directly, it is a class.
    """
    pairs = {(path[depth].lower(), path[depth + 1].lower()) for path in paths}
    if len(pairs) > len({split for split, _ in pairs}) or any(len(path) == depth + 3 for path in training):
        return False
    return all(split == name for split, name in pairs) or {name for _, name in pairs} <= PLAIN_WORDS


def _count_shared(folders: Sequence[list[str]]) -> int:
    """How many folders all images are in."""
    ends = zip(min(folders), max(folders), strict=False) if folders else ()
    return sum(1 for _ in takewhile(lambda names: names[0] == names[1], ends))


def _has_splits(paths: Sequence[Sequence[str]], depth: int) -> bool:
    """Whether the names at this depth are a train split and at least one other split, and nothing else."""
    found = {split_of(path[depth]) if len(path) > depth + 1 else "" for path in paths}
    return {"train"} < found and "" not in found


def _empty_folders(classes: set[str], found: Listing) -> Iterator[tuple[str, str]]:
    """Folders next to class folders that hold neither an image nor a run."""
    beside = {path.rpartition("/")[0] for path in classes}
    for path in found.folders:
        with_run = any(f"{output}/".startswith(f"{path}/") for output in found.outputs)
        if path.rpartition("/")[0] in beside and path not in classes and not with_run:
            yield path, EMPTY
