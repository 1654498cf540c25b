"""A cache of fingerprints and comparisons in the user's cache folder, so that images are decoded and compared once.

    <EFFNET_CACHE>/fingerprints/   or `effnet/fingerprints` in the user's cache folder
      NAME.images                  the fingerprints of the images below a folder or a URL
      NAME.pairs                   the near-duplicates among a set of fingerprints

A file is recognised by its path, size and modification time; an image in a shard also by its own size and crc32, and
one behind a URL without a time. Files that could not be read, or changed a moment ago, are read again.

Each cache file begins with a line: the code that computed its rows, Pillow's version and the rows' crc32. One that does
not match is ignored and rewritten. Files appear whole. If two processes write one at the same time, the later wins, and
the other's images are read again. The cache holds at most LIMIT bytes in FILES files; the least recently used go first.
Without a writable folder, everything is computed each time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray

from effnet.data.fingerprint import COLOUR_SIDE, SIDE, Fingerprint
from effnet.data.shards import member_of, url
from effnet.errors import EffnetError, ImageError
from effnet.files import write_file
from effnet.machine import cache_folder

LIMIT, FILES = 2 * 10**9, 500  # an image takes 1.3 KB
SETTLED_NS = 50_000_000  # file systems have coarse clocks: what changed so recently may change again at the same time
LEFTOVER = 86_400  # seconds after which the temporary folder of a killed process is removed
# The code that the rows depend on
CODE = ("fingerprint.py", "fingerprint_cache.py", "duplicates.py", "image.py", "bit_depth.py", "scans.py")
KEY = "key"

Table = NDArray[Any]
ROW = np.dtype(
    [
        (KEY, "V16"),
        ("sha256", "V32"),
        ("size_bytes", "<i8"),
        ("format", "S16"),
        ("mode", "S16"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("turned", "?"),
        ("frames", "<i4"),
        ("range", "<i4"),  # 0: none
        ("spread", "<f8"),
        ("thumbnail", f"V{SIDE**2}"),
        ("colours", f"V{2 * COLOUR_SIDE**2}"),
    ]
)


class FingerprintCache:
    """The known fingerprints of some files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._keys = [_identify(file) for file in files]
        self._folder = _common_folder(files)
        self._rows: dict[bytes, tuple[Any, ...]] = {}
        wanted = {key for key in self._keys if key is not None}
        for folder in _with_parents(self._folder):
            if not wanted:
                break
            if (table := load_table(_name(folder), ROW)) is not None:
                places = [place for place, key in enumerate(table[KEY].tolist()) if key in wanted]
                self._rows |= {row[0]: row for row in table[places].tolist()}
                wanted -= self._rows.keys()

    def knows(self, index: int) -> bool:
        """Whether a file was read before and has not changed since."""
        return self._keys[index] in self._rows

    def fingerprints(self) -> list[Fingerprint | None]:
        """The known fingerprint of each file."""
        rows = (None if key is None else self._rows.get(key) for key in self._keys)
        return [None if row is None else _fingerprint(row) for row in rows]

    def keep(self, fingerprints: Sequence[Fingerprint | ImageError | None]) -> None:
        """Store the fingerprints of all files, if there are new ones."""
        found = {
            key: _row(key, each)
            for key, each in zip(self._keys, fingerprints, strict=True)
            if key is not None and isinstance(each, Fingerprint)
        }
        if found.keys() <= self._rows.keys():
            return
        rows = np.array(list(found.values()), ROW)
        name = _name(self._folder)
        if (others := load_table(name, ROW)) is not None:  # another process may have written meanwhile
            rows = np.concatenate((rows, others[[key not in found for key in others[KEY].tolist()]]))
        save_table(name, rows[: LIMIT // ROW.itemsize])


def load_table(name: str, dtype: np.dtype[Any]) -> Table | None:
    """The rows of a cache file; None if it is missing or cannot be used."""
    file = _file(name)
    with suppress(OSError, ValueError):
        with file.open("rb") as stream:
            head, content = stream.readline(200), stream.read()
        if head == _head(content):
            with suppress(OSError):
                os.utime(file)  # marks it as used
            return np.frombuffer(content, dtype)
    return None


def save_table(name: str, rows: Table) -> None:
    """Write a cache file, if possible, and remove the least recently used ones if there are too many."""
    content = np.ascontiguousarray(rows).view(np.uint8).data
    with suppress(OSError, EffnetError):
        with write_file(_file(name)) as temporary, temporary.open("wb") as stream:
            stream.write(_head(content))
            stream.write(content)
        _trim()


def _head(content: bytes | memoryview) -> bytes:
    return f"effnet fingerprints {_maker()} {zlib.crc32(content):08x}\n".encode()


@cache
def _maker() -> str:
    """Identifies the code that computes the rows."""
    code = hashlib.sha256(PIL.__version__.encode())
    for module in CODE:
        code.update(Path(__file__).with_name(module).read_bytes())
    return code.hexdigest()[:16]


def _file(name: str) -> Path:
    return cache_folder() / "fingerprints" / name


def _trim() -> None:
    files, total = [], 0
    for each in _file("").iterdir():
        status = each.stat()
        if each.is_file():
            files.append((status.st_mtime, status.st_size, each))
        elif status.st_mtime < time.time() - LEFTOVER:
            shutil.rmtree(each, ignore_errors=True)
    for number, (_, size, each) in enumerate(sorted(files, reverse=True)):
        total += size
        if total > LIMIT or number >= FILES:
            each.unlink(missing_ok=True)


def _identify(file: Path) -> bytes | None:
    """A file's key; None if the file is missing or may be changing."""
    try:
        inside = member_of(file)
        place = url(file) or os.path.abspath(file)  # noqa: PTH100  # does not stat every parent folder
        facts = [] if inside is None else [inside[1].size, inside[1].crc32]
        if not url(file):
            status = os.stat(file if inside is None else inside[0])  # noqa: PTH116  # a Path takes longer
            if abs(time.time_ns() - status.st_mtime_ns) < SETTLED_NS:
                return None
            facts += [status.st_size, status.st_mtime_ns]
    except (OSError, ValueError, ImageError):
        return None
    return hashlib.blake2b(f"{facts}{place}".encode(errors="surrogateescape"), digest_size=16).digest()


def _common_folder(files: Sequence[Path]) -> str:
    """The folder or URL that all files are below, without a trailing slash."""
    places = [url(file) or os.path.abspath(file).replace(os.sep, "/") for file in files]  # noqa: PTH100  # as above
    return os.path.commonprefix(places).rpartition("/")[0]  # noqa: RUF071  # commonpath takes no URLs


def _with_parents(folder: str) -> Iterator[str]:
    while folder:
        yield folder
        folder = folder.rpartition("/")[0]
    yield ""


def _name(folder: str) -> str:
    return hashlib.blake2b(folder.encode(errors="surrogateescape"), digest_size=16).hexdigest() + ".images"


def _row(key: bytes, each: Fingerprint) -> tuple[Any, ...]:
    values = vars(each) | {"sha256": bytes.fromhex(each.sha256), "range": each.range or 0}
    return (key, *values.values())


def _fingerprint(row: tuple[Any, ...]) -> Fingerprint:
    values = dict(zip(ROW.names or (), row, strict=True))
    del values[KEY]
    values |= {name: values[name].decode() for name in ("format", "mode")}
    return Fingerprint(**values | {"sha256": values["sha256"].hex(), "range": values["range"] or None})
