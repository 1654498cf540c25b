"""Files, folders and patterns -> paths, one at a time; and a reader that decodes photos ahead of the network.

    photos/cat.jpg      a file: passed on unchanged, even if it is missing or not an image, which its reader reports
    photos              a folder: its images at any depth, in natural order (2.jpg before 10.jpg), without hidden ones
    shards              a folder of shards (shards.py), its URL, or a shard: their images, in stored order
    photos/**/*.jpg     a pattern: matching images, and other files only if it ends in their suffix; `**` means any
                        depth; a name that exists literally is not a pattern
    -                   a list on standard input: one path per line, read line by line

A folder that cannot be listed is also passed on, and its reader reports why. Memory grows with the largest single
folder, not with the number of files.

Patterns are matched here, name by name with fnmatch, because `glob` has no order, follows links in circles and takes
brackets in an existing folder's name for a pattern. natsort takes longer to import than a photo takes to classify, and
reads "²5" as the number 2.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import TextIO, TypeVar

from effnet.data.shards import TAR, list_shards, member_names, url
from effnet.errors import ArgumentError, ImageError, nearest
from effnet.fields import positive_int

P = TypeVar("P")
R = TypeVar("R")

# fmt: off
SUFFIXES = (".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm",
            ".tif", ".tiff", ".webp")
# fmt: on
HEIF_SUFFIXES = (".heic", ".heif", ".hif")  # read with the extra `heif`
MAGIC = re.compile(r"[*?\[]")
DIGITS = re.compile(r"([0-9]+)")
READERS = max(2, os.cpu_count() or 1)  # threads that decode photos ahead of the network; decoding releases the GIL


def expand(sources: Iterable[str], listing: TextIO | None = None) -> Iterator[str]:
    """The paths that `sources` name, in their order and spelling; "-" stands for the lines of `listing`.

    Raises:
        ArgumentError: a folder or pattern has no image, or "-" has no `listing`; raised when it is reached.
    """
    for source in (sources,) if isinstance(sources, str) else sources:
        path = ""
        if source == "-":
            if listing is None:
                raise ArgumentError("sources", source, "needs a list of paths on standard input.")
            yield from filter(None, (line.rstrip("\r\n") for line in listing))
        elif shards := _shards(source):
            for shard in shards:
                yield from (f"{shard}/{name}" for name in member_names(shard))
        elif source and is_folder(Path(source)):  # an empty name is not the working folder
            for path in _walk(source, lambda path, enter: enter or is_image(path)):
                yield path
            if not path:
                rule = (
                    f"is a folder without an image; the names of images end in {', '.join(SUFFIXES + HEIF_SUFFIXES)}."
                )
                raise ArgumentError("sources", source, rule)
        elif MAGIC.search(source) and not os.path.lexists(source):
            base, parts = _split(source)
            for path in _match(base, parts):
                yield path
            if not path:
                raise ArgumentError("sources", source, f"is a pattern that no image matches.{_hint(base, parts[0])}")
        else:
            yield source


def read_ahead(
    paths: Iterable[P], read: Callable[[P], R], *, window: int, threads: int = READERS
) -> Generator[tuple[P, R | ImageError], None, None]:
    """Each path with the result of `read`, in order, read by threads while the caller works on earlier results.

    An ImageError is a result like any other; other errors of `read` or `paths` are raised after the results before
    them. The first result comes once `window` paths were taken. Closing the generator, an error or Ctrl-C cancels calls
    of `read` that have not started and waits for the others, at most one per thread.

    Args:
        paths: taken one at a time, at most `window` ahead.
        read: called in several threads at once.
        window: most results held in memory; at least `threads` keeps all threads busy.
        threads: by default one per processor.

    Raises:
        ArgumentError: `threads` or `window` is not a positive whole number.
    """
    threads, window, paths = positive_int("threads", threads), positive_int("window", window), iter(paths)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read_ahead")
    waiting: deque[tuple[P, Future[R]]] = deque()
    end: Exception | None = None
    try:
        while waiting or not end:
            while len(waiting) < window and not end:
                try:
                    path = next(paths)
                except Exception as error:  # usually StopIteration
                    end = error
                else:
                    waiting.append((path, pool.submit(read, path)))
            if waiting:
                path, answer = waiting.popleft()
                result: R | ImageError
                try:
                    result = answer.result()
                except ImageError as error:
                    result = ImageError(*error.args)  # without its traceback, whose frames keep pixels in memory
                yield path, result
        if end and not isinstance(end, StopIteration):
            raise end
    finally:
        pool.shutdown(cancel_futures=True)


def is_image(path: str) -> bool:
    """Whether a name has an image's suffix."""
    return path.lower().endswith(SUFFIXES + HEIF_SUFFIXES)


def is_folder(entry: Path | os.DirEntry[str]) -> bool:
    """Whether it is a folder, or a link to one; False if that cannot be determined, and its reader reports why."""
    try:
        return entry.is_dir()
    except (OSError, ValueError):  # a link to itself, a name too long
        return False


def _shards(source: str) -> list[str]:
    """The shards of a folder of shards, of its URL, or a single shard."""
    folder = url(source) or source.rstrip("/")
    if folder.endswith(TAR):
        return [folder] if member_names(folder) else []
    return [f"{folder}/{name}" for name in list_shards(folder)] if folder else []


def _walk(folder: str, wanted: Callable[[str, bool], bool], above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """The `wanted` files below `folder`; only `wanted` folders are entered."""
    try:
        status = Path(folder).stat()
        with os.scandir(folder or ".") as scan:
            entries = sorted(scan, key=_natural)
    except OSError:
        yield folder  # its reader reports why
        return
    here = (status.st_dev, status.st_ino)
    if here in above:
        return  # a link to one of its own parents
    for entry in entries:
        path, enter = entry.path if folder else entry.name, is_folder(entry)
        if entry.name.startswith(".") or not wanted(path, enter):
            continue
        if enter:
            yield from _walk(path, wanted, (*above, here))
        elif not Path(path).is_fifo():
            yield path


def _split(pattern: str) -> tuple[str, list[str]]:
    """The folder that `pattern` starts from, and the parts of the pattern below it."""
    base, parts = "", pattern.replace(os.sep, "/").split("/")
    while len(parts) > 1 and (not MAGIC.search(parts[0]) or is_folder(Path(base + parts[0]))):
        base += parts.pop(0) + "/"
    return base, [*parts, "*"] if parts[-1] == "**" else parts


def _match(base: str, parts: list[str]) -> Iterator[str]:
    suffix = Path(parts[-1]).suffix
    any_file = bool(suffix) and not MAGIC.search(suffix)

    def wanted(path: str, enter: bool) -> bool:
        names = Path(path[len(base) :]).parts
        return _fits(names, parts, partly=enter) and (enter or any_file or is_image(path))

    return _walk(base, wanted) if is_folder(Path(base)) else iter(())


def _fits(names: Sequence[str], parts: Sequence[str], *, partly: bool) -> bool:
    """Whether the path `names` matches the pattern `parts` or, with `partly`, may be the start of one that does."""
    if not names or not parts:
        return not names and (partly or not parts)
    if parts[0] == "**":
        return _fits(names, parts[1:], partly=partly) or _fits(names[1:], parts, partly=partly)
    return fnmatch(names[0], parts[0]) and _fits(names[1:], parts[1:], partly=partly)


def _hint(base: str, name: str) -> str:
    """The existing name nearest to the missing one."""
    with suppress(OSError):
        for folder in (Path(base), *Path(base).parents):
            if is_folder(folder):
                return nearest(name, sorted(path.name for path in folder.iterdir()))
            name = folder.name
    return ""


def _natural(entry: os.DirEntry[str]) -> tuple[list[str | int], str]:
    """A sort key: case-insensitive, numbers by value."""
    pieces: list[str | int] = [*DIGITS.split(entry.name.casefold())]
    pieces[1::2] = map(int, pieces[1::2])
    return pieces, entry.name
