"""Checks that every file in a folder is whole: each is read to its end, by effnet's own reader if there is one.

A killed process leaves what it was writing in a hidden file or folder, whose name starts with a dot and the name of the
final file. Such leftovers are skipped; any other hidden name is a fault.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import tarfile
import xml.etree.ElementTree
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from effnet.data.shards import INDEX, TAR, read_index, read_member
from effnet.runtime.artifact import read_artifact
from effnet.weights.arrays import read_safetensors
from effnet.weights.bundle import is_bundle, open_bundle

TAR_BLOCK = 512  # bytes; two zero blocks mark the end
LEFTOVER = re.compile(r"\..+\.[a-z0-9_]{8}|\.last\.ckpt\.part")


def find_damage(path: Path, growing: Sequence[str] = ()) -> Iterator[str]:
    """Describe the damage in a file or folder, a line for each; files named `growing` may end anywhere."""
    if path.name.startswith("."):
        if not LEFTOVER.fullmatch(path.name):
            yield f"{path.name} does not look like a leftover"
        return
    try:
        if path.is_dir():
            if is_bundle(path):
                open_bundle(path)
            elif (path / "model.xml").exists():
                read_artifact(path)
            for each in sorted(path.iterdir()):
                yield from find_damage(each, growing)
        elif path.name not in growing:
            _read(path)
    except Exception as error:
        yield f"{path.name} is damaged: {type(error).__name__}: {error}"


def list_leftovers(folder: Path) -> list[str]:
    """The hidden files and folders below a folder."""
    return sorted(path.name for path in folder.rglob(".*"))


def _read(path: Path) -> None:
    reader = READERS.get(path.suffix)
    if reader is None:
        raise ValueError("nothing is known of such files")
    reader(path)


def _lines(path: Path) -> list[str]:
    text = path.read_text("utf-8")
    if not text.endswith("\n"):
        raise ValueError("its last line has no end")
    return text.splitlines()


def _json_lines(path: Path) -> None:
    for line in _lines(path):
        json.loads(line)


def _table(path: Path) -> None:
    if len({len(row) for row in csv.reader(_lines(path))}) != 1:
        raise ValueError("its rows have different lengths")


def _yaml(path: Path) -> None:
    if yaml.safe_load("\n".join(_lines(path))) is None:
        raise ValueError("it is empty")


def _checkpoint(path: Path) -> None:
    head, _, payload = path.read_bytes().partition(b"\n")
    if hashlib.sha256(payload).hexdigest() != head[-64:].decode():
        raise ValueError("its sha256 is not the one in its first line")


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path) as file:
        if damaged := file.testzip():
            raise ValueError(f"the checksum of {damaged} is another")


def _shard(path: Path) -> None:
    content = path.read_bytes()
    if len(content) % TAR_BLOCK or content[-2 * TAR_BLOCK :] != bytes(2 * TAR_BLOCK):
        raise ValueError("it was cut short")  # tarfile does not detect this
    with tarfile.open(path) as tar:
        names = tar.getnames()
    if path.with_suffix(INDEX).exists():
        for name, member in read_index(str(path)).items():
            read_member(str(path), member)
            names.remove(name)
        if any(not name.endswith(".cls") for name in names):
            raise ValueError("its index lacks images")


def _picture(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


def _page(path: Path) -> None:
    if not path.read_text("utf-8").rstrip().endswith("</html>"):
        raise ValueError("it was cut short")


def _rows(path: Path) -> None:
    head, _, content = path.read_bytes().partition(b"\n")
    if f"{zlib.crc32(content):08x}" != head[-8:].decode():
        raise ValueError("its checksum is not the one in its first line")


READERS: dict[str, Callable[[Path], object]] = {
    ".json": lambda path: json.loads(path.read_text("utf-8")),
    ".jsonl": _json_lines,
    ".csv": _table,
    ".yaml": _yaml,
    ".md": _lines,
    ".txt": _lines,
    ".pbtxt": _lines,
    ".ckpt": _checkpoint,
    ".safetensors": lambda path: read_safetensors(memoryview(bytearray(path.read_bytes()))),
    TAR: _shard,
    INDEX: lambda path: read_index(str(path.with_suffix(TAR))),
    ".png": _picture,
    ".jpg": _picture,
    ".html": _page,
    ".pth": _zip,
    ".onnx": read_artifact,
    ".pt2": read_artifact,
    ".xml": lambda path: xml.etree.ElementTree.parse(path),
    ".bin": lambda path: path.read_bytes()[0],
    ".npy": lambda path: np.load(path, mmap_mode="r"),
    ".images": _rows,
}
