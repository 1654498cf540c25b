"""Shards: tar files that hold a data set, in a folder or behind a URL, and their members read by an index.

    shards/images-000000.tar       images, each followed by its class as a number: webdataset's layout
    shards/images-000000.index     each image's name, offset, size, crc32 and class, sorted by name
    shards/manifest.csv            path,label,split,group; paths include the shard: images-000000.tar/cat/1.jpg
    shards/shards.json             the shards, with their sizes and the crc32 of their indexes; written last

Such a path names an image like any other: `open_file` and `file_size` look into the shard. No file is kept open, so
processes may be forked or spawned at any time. URLs (https://, s3://, gs://) are read with fsspec, one range per image.
"""

from __future__ import annotations

import io
import os
import re
import stat
import sys
import zlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from effnet.errors import DataError, EffnetError, ImageError, optional_import
from effnet.fields import write_count
from effnet.files import parse_json
from effnet.version import newer_format

SHARDS, MANIFEST, FORMAT = "shards.json", "manifest.csv", 1
FILE_LIMIT = 2**31  # bytes of an image: 16-bit RGBA with as many pixels as Pillow reads takes 1.4 * 10^9
UNFINISHED = "unfinished.json"  # exists while a pack is under way, and says how to continue
TAR, INDEX = ".tar", ".index"
SHARD = "the shard"  # starts every message about a shard
URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.]+):/+(?=[^/])")  # a Path merges two slashes into one; C:/ is a drive
SHARD_PATH = re.compile(r"(^|/)(train|val|test|images)-\d{6,}\.tar/")
INSIDE = re.compile(r"\.tar/")


@dataclass(frozen=True)
class Member:
    """Where an image is in its shard."""

    offset: int
    size: int
    crc32: int
    label: int


@dataclass(frozen=True)
class ShardFolder:
    """A folder of shards, as described by its shards.json."""

    manifest: bytes
    sizes: dict[str, int | None]  # each shard's size on disk; None if it is missing or unusable
    damaged: dict[str, str]  # what is wrong with a shard

    def lost(self, root: Path, path: str) -> bool:
        """Whether an image of the manifest is missing."""
        shard, _, name = path.partition("/")
        if shard not in self.damaged:
            return shard not in self.sizes
        there, lines = self.sizes[shard], _index(str(root / shard)) or ()
        try:
            found = _find(lines, name)
        except ImageError:
            return True
        return there is None or found is None or found.offset + found.size > there


def url(path: str | os.PathLike[str]) -> str:
    """The URL that a path stands for, restoring the slash that Path removes; "" for a local path."""
    text = os.fspath(path).replace(os.sep, "/")
    found = URL.match(text)
    return f"{found['scheme']}://{text[found.end() :]}" if found else ""


def text_of(path: str | os.PathLike[str]) -> str:
    """A path as on a command line; a URL with both slashes."""
    return url(path) or os.fspath(path)


def absolute(path: str | os.PathLike[str]) -> Path:
    """The absolute path; a URL stays as it is."""
    return Path(path) if url(path) else Path(path).absolute()


def name_of(path: str) -> str:
    """A manifest's path without the shard."""
    return SHARD_PATH.sub(r"\1", path, count=1)


def member_of(path: str | os.PathLike[str]) -> tuple[str, Member] | None:
    """The shard in a path, and the place of the image in it; None for any other path.

    Raises:
        ImageError: the shard has no such image, or no index.
    """
    if TAR not in (text := os.fspath(path).replace(os.sep, "/")):
        return None
    for inside in INSIDE.finditer(text):
        shard, name = text[: inside.end() - 1], text[inside.end() :]
        lines = _index(shard)
        if lines is None:
            if not url(shard) and Path(shard).is_file():
                raise ImageError(f"is in a shard without an index: {Path(shard).with_suffix(INDEX).name} is missing.")
            continue
        if found := _find(lines, name):
            return shard, found
        raise ImageError(f"is not in its shard, {shard}.")
    return None


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open an image's file for reading; one in a shard is read into memory.

    Raises:
        ImageError: reading might never end, since it is a named pipe (but /dev/stdin and the like are read), a device,
            or larger than FILE_LIMIT; or it is in a damaged shard.
        OSError: it cannot be opened.
    """
    if (found := member_of(path)) is not None:
        return io.BytesIO(read_member(*found))
    with suppress(OSError, ValueError):  # opening it raises the same
        status = Path(path).stat()
        if stat.S_ISFIFO(status.st_mode) and not os.fspath(path).startswith(("/dev/", "/proc/")):
            raise ImageError("is a pipe, not a file.")
        if stat.S_ISCHR(status.st_mode) and os.fspath(path) != "/dev/stdin":
            raise ImageError("is a device, not a file.")
        if status.st_size > FILE_LIMIT:
            raise ImageError(f"has {status.st_size:,} bytes; at most {FILE_LIMIT:,} are read.")
    return Path(path).open("rb")


def file_size(path: Path) -> int:
    """Bytes of an image's file; -1 if it does not exist."""
    try:
        found = member_of(path)
        return path.stat().st_size if found is None else found[1].size
    except (OSError, ValueError, ImageError):  # ValueError: a name with a zero byte
        return -1


def read_member(shard: str, member: Member) -> bytes:
    """The bytes of an image in a shard.

    Raises:
        ImageError: the shard ends before it, or its bytes have changed.
        OSError: the shard cannot be read.
    """
    content = _read(shard, member.offset, member.size)
    if len(content) < member.size:
        raise ImageError(f"is cut off: its shard ends before it, at {member.offset + len(content):,} bytes.")
    if zlib.crc32(content) != member.crc32:
        raise ImageError(f"is damaged: its shard's bytes at {member.offset:,} are not those that were packed.")
    return content


def member_names(shard: str) -> list[str]:
    """The images of a shard in stored order; none if it is not a shard with an index.

    Raises:
        DataError: its index is damaged.
    """
    try:
        rows = [(_member(line).offset, line.partition(b"\t")[0]) for line in _index(shard) or ()]
    except ImageError as error:
        raise DataError(f"{text_of(shard)} cannot be read: its index is damaged; pack the data again") from error
    return [os.fsdecode(name) for _, name in sorted(rows)]


def list_shards(folder: str | os.PathLike[str]) -> list[str]:
    """The names of a folder's shards; none if it is not a folder of shards."""
    described = _describe(folder)
    return [shard["name"] for shard in described["shards"]] if described else []


def open_shards(folder: str | os.PathLike[str]) -> ShardFolder | None:
    """A folder of shards, with the size and index of each checked; None for any other folder.

    Raises:
        DataError: its shards.json or its manifest cannot be used.
    """
    if (described := _describe(folder)) is None:
        return None
    root = Path(folder)
    try:
        manifest = _read(str(root / MANIFEST))
    except OSError as error:
        raise DataError(f"{url(folder) or folder} has no {MANIFEST}, which effnet pack wrote: {error}") from error
    sizes: dict[str, int | None] = {}
    damaged: dict[str, str] = {}
    for shard in described["shards"]:
        sizes[shard["name"]], reason = _inspect(str(root / shard["name"]), shard)
        if reason:
            damaged[shard["name"]] = reason
    return ShardFolder(manifest, sizes, damaged)


def index_lines(members: dict[str, Member]) -> bytes:
    """The text of an index."""
    rows = (b"%s\t%d\t%d\t%d\t%d\n" % (os.fsencode(name), *vars(each).values()) for name, each in members.items())
    return b"".join(sorted(rows))


def read_index(shard: str) -> dict[str, Member]:
    """The images of a shard; none if its index is missing or damaged."""
    try:
        return {os.fsdecode(line.partition(b"\t")[0]): _member(line) for line in _index(shard) or ()}
    except ImageError:
        return {}


def explain_lost(damaged: dict[str, str], lost: Counter[str]) -> list[tuple[str, str]]:
    """For each damaged shard, what is wrong with it and how many of its images are left out."""
    return [
        (shard, f"{reason}: {write_count(lost[shard], 'image', 'are')} left out") for shard, reason in damaged.items()
    ]


def _inspect(shard: str, described: dict[str, Any]) -> tuple[int | None, str]:
    """The size of a shard, and what is wrong with it."""
    try:
        size = _size(shard)
    except OSError:
        return None, f"{SHARD} is missing"
    lines = _index(shard)
    if lines is None:
        return None, f"{SHARD}'s index is missing"
    if zlib.crc32(b"".join(line + b"\n" for line in lines)) != described["index_crc32"]:
        return None, f"{SHARD}'s index does not match: it is damaged, or another pack's"
    if size is not None and size < described["bytes"]:
        return size, f"{SHARD} is cut short at {size:,} of {described['bytes']:,} bytes"
    if size is not None and size > described["bytes"]:
        return None, f"{SHARD} does not match its index: {size:,} bytes, not {described['bytes']:,}"
    return size, ""


def _describe(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    path = Path(folder) / SHARDS
    if not url(folder) and file_size(path) < 0:
        _refuse_unfinished(Path(folder))
        return None
    try:
        described: dict[str, Any] = parse_json(_read(str(path)))
        if described["format"] > FORMAT:
            raise DataError(f"{path} {newer_format(described['effnet'], described['format'], FORMAT)}")
        kinds: dict[str, Callable[[Any], Any]] = {"name": _shard_name, "bytes": int, "index_crc32": int}
        described["shards"] = [{key: kind(row[key]) for key, kind in kinds.items()} for row in described["shards"]]
    except OSError as error:
        why = "does not exist" if isinstance(error, FileNotFoundError) else "cannot be read"
        raise DataError(f"{text_of(path)} {why}: {str(error) or type(error).__name__}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{url(path) or path} is not what effnet pack writes: pack the data again") from error
    return described


def _shard_name(name: str) -> str:
    """Check the name of a shard next to shards.json; raises ValueError for any other."""
    if not SHARD_PATH.fullmatch(f"{name}/"):
        raise ValueError(f"{name} is not a shard's name")
    return name


def _refuse_unfinished(folder: Path) -> None:
    """Raise DataError if a folder holds shards without shards.json."""
    try:
        command = str(parse_json((folder / UNFINISHED).read_text("utf-8"))["command"])
    except (OSError, ValueError, KeyError, TypeError):
        for name in (f"{split}-000000{TAR}" for split in ("train", "val", "test", "images")):
            if os.path.isfile(folder / name):  # noqa: PTH113  # also for impossible names
                why = "an unfinished or partly copied pack, or written by another program"
                advice = "to finish it, run its effnet pack command again"
                raise DataError(f"{folder} has shards ({name}) and no {SHARDS}: {why}; {advice}") from None
    else:
        raise DataError(f"{folder} is an unfinished pack; to finish it: {command}")


def _find(lines: list[bytes] | tuple[()], name: str) -> Member | None:
    key = os.fsencode(name) + b"\t"  # names have no tab and no smaller character
    place = bisect_left(lines, key)
    if place == len(lines) or not lines[place].startswith(key):
        return None
    return _member(lines[place])


def _member(line: bytes) -> Member:
    """Parse a line of an index; raises ImageError if it is not one."""
    try:
        found = Member(*map(int, line.split(b"\t")[1:]))
    except (ValueError, TypeError) as error:
        raise ImageError("is in a shard whose index is damaged.") from error
    if min(vars(found).values()) < 0 or found.size > FILE_LIMIT or found.offset > sys.maxsize:
        raise ImageError("is in a shard whose index is damaged.")
    return found


def _index(shard: str) -> list[bytes] | None:
    """The lines of a shard's index; None if there is none."""
    file = shard.removesuffix(TAR) + INDEX
    if url(file):
        return _lines(file, 0, 0)
    try:
        status = os.stat(file)  # noqa: PTH116  # creating a Path takes longer than the rest
    except (OSError, ValueError):  # ValueError: a name with a zero byte
        return None
    return _lines(file, status.st_mtime_ns, status.st_size)


@cache
def _lines(file: str, changed_ns: int, size: int) -> list[bytes] | None:
    """The lines of an index, cached by its time and size."""
    try:
        return _read(file).splitlines()
    except FileNotFoundError:
        return None


def _size(file: str) -> int | None:
    """Bytes of a file; None if a server does not say. Raises OSError."""
    if not (address := url(file)):
        return Path(file).stat().st_size
    with _reported(address):
        size = _system(address).info(address)["size"]
    return None if size is None else int(size)


def _read(file: str, offset: int = 0, size: int | None = None) -> bytes:
    """Bytes of a file from `offset` on, at most `size`. Raises OSError."""
    if address := url(file):
        end = None if size is None else offset + size
        with _reported(address):
            content: bytes = _system(address).cat_file(address, start=offset or None, end=end)
        return content
    with open(file, "rb", buffering=0) as stream:  # noqa: PTH123  # as in _index
        stream.seek(offset)
        return stream.read() if size is None else stream.read(size)


@contextmanager
def _reported(address: str) -> Iterator[None]:
    """Raise any error of a server or its package as an OSError."""
    try:
        yield
    except (OSError, EffnetError):
        raise
    except Exception as error:
        raise OSError(f"{address}: {error or type(error).__name__}") from error


def _system(address: str) -> Any:
    """fsspec's file system for a URL.

    Raises:
        MissingExtraError: fsspec is not installed.
        DataError: fsspec has none for its scheme.
    """
    with optional_import(f"reading {address}"):
        import fsspec
    try:
        return fsspec.core.url_to_fs(address)[0]
    except (ImportError, ValueError) as error:  # for s3:// it names s3fs, for gs:// gcsfs
        raise DataError(f"{address} cannot be read: {error}") from error
