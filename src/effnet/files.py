"""Files and folders that appear whole or not at all, and never replace a folder that effnet did not write.

A folder that effnet wrote has a config.json with an entry "effnet" (a bundle's has "format" as well), or a model.xml
that mentions effnet. Only such a folder, with nothing else in it, or an empty one is ever replaced.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from effnet.errors import ArgumentError, EffnetError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # typed as a module

Content = Literal["bundle", "hub", "artifact"]  # hub: a folder for timm or transformers

MARK = "effnet"  # in config.json, the version that wrote the folder
FILE_SUFFIXES = (".pth", ".pt", ".safetensors")
ARTIFACT_FILES = {"model.xml", "model.bin", "README.md"}
OTHER_FILES = {
    *("config.json", "preprocessor_config.json", "model.safetensors", "split.csv", "familiarity.safetensors"),
    "README.md",
}
HERE, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
ROOM = 2**24  # bytes: a disk on which a writer failed, and that takes as many, is not full
TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]+")  # a folder in which what has that name is written


@contextmanager
def write_file(target: Path) -> Iterator[Path]:
    """A temporary path, with the same suffix, that takes the place of `target` when the block ends without an error.

    Raises:
        ArgumentError: `target` is a folder.
    """
    if target.is_dir():
        raise ArgumentError("out", str(target), "is a folder; name a file.")
    with _folder_beside(target) as temporary:
        yield temporary / target.name
        (temporary / target.name).replace(target)


@contextmanager
def write_folder(target: Path, content: Content | None = None) -> Iterator[Path]:
    """An empty temporary folder that takes the place of `target` when the block ends without an error.

    Only an empty folder or one with the same content is replaced, at one moment where the system can do that. Elsewhere
    it is moved aside first and deleted last, so one of the two is whole at any time; `sweep` undoes the move after a
    crash.

    Raises:
        ArgumentError: something else is in the way, or `target` has the name of a file.
    """
    if target.suffix in FILE_SUFFIXES:
        raise ArgumentError("out", str(target), f"must name a folder; {target.suffix} is the name of a file.")
    if target.exists() and not _may_replace(target, content):
        raise ArgumentError("out", str(target), "exists and holds something else; choose another folder.")
    with _folder_beside(target) as temporary:
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        yield new
        if target.exists():
            if exchange(new, target):
                return
            target.replace(old)
        try:
            new.replace(target)
        except OSError:
            if old.exists():
                old.replace(target)
            raise


def leftovers(folder: Path) -> list[Path]:
    """What killed processes left of `write_file` and `write_folder` in a folder, the newest first."""
    found = []
    for each in folder.iterdir():
        with suppress(OSError):  # the process that writes there is not dead, and has just finished
            match = TEMPORARY.fullmatch(each.name)
            if match and each.is_dir() and {inside.name for inside in each.iterdir()} <= {match[1], "new", "old"}:
                found.append((each.stat().st_mtime_ns, each))
    return [each for _, each in sorted(found, reverse=True)]


def names_in(folder: Path) -> set[str]:
    """The names in a folder without leftovers."""
    return {each.name for each in folder.iterdir()} - {each.name for each in leftovers(folder)}


def sweep(folder: Path) -> None:
    """Remove leftovers from a folder in which no other process writes; what was moved aside and is gone is put back."""
    import shutil

    for each in leftovers(folder):
        target = folder / str(TEMPORARY.fullmatch(each.name)[1])  # type: ignore[index]  # it has matched
        if not target.exists() and (each / "old").exists():
            (each / "old").replace(target)
        shutil.rmtree(each, ignore_errors=True)


@contextmanager
def new_run(
    out: str | Path | None,
    runs: Path,
    name: str,
    begun: tuple[str, ...] = (),
    is_unborn: Callable[[Path], bool] = lambda _: False,
) -> Iterator[Path]:
    """A folder for a new run: `out`, or `runs`/`name` with the next free number, to which `runs`/latest then links.

    It is removed if the block fails; one of `runs` also if nothing was written.

    Args:
        out: a folder that does not exist, or is empty.
        runs: where the runs of a command are kept; it has the command's name.
        name: of the run.
        begun: the files by any of which a run that can be resumed is recognised.
        is_unborn: whether a folder holds only what a run leaves that was killed before it could be resumed.

    Raises:
        ArgumentError: `out` holds a run or something else, or another process begins one there.
    """
    folder = _next_free(runs, re.sub(r"[^\w.-]+", "-", name)) if out is None else Path(out)
    other = ArgumentError("out", str(folder), "exists and holds something else; choose another folder.")
    if folder.exists() and not folder.is_dir():
        raise other
    folder.mkdir(parents=True, exist_ok=True)
    with hold_lock(folder, "out"):  # another process may begin there: it neither writes nor removes what this one does
        if any((folder / each).exists() for each in begun):
            raise ArgumentError(
                "out",
                str(folder),
                f"holds a run; go on with it: effnet {runs.name} --resume {shlex.quote(str(folder))}",
            )
        if names_in(folder) and not is_unborn(folder):
            raise other
        try:
            yield folder
        except BaseException:
            import shutil

            shutil.rmtree(folder, ignore_errors=True)
            if out is None:
                with suppress(OSError):  # runs of others are there
                    os.removedirs(runs)
            raise
    if out is None and not any(folder.iterdir()):
        folder.rmdir()
    elif folder.parent == runs:
        _link_latest(folder)


@contextmanager
def hold_lock(place: Path, argument: str = "resume") -> Iterator[None]:
    """Lock a file of a run, or a folder, so that no other process writes there meanwhile; not where there are no locks.

    Raises:
        ArgumentError: another process holds the lock, about that `argument`. A process that ends, even by kill -9,
            gives it back.
    """
    if fcntl is None:
        yield
        return
    opened = _open_to_lock(place)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(opened)
        folder = place if place.is_dir() else place.parent
        raise ArgumentError(argument, str(folder), "is in use by another process.") from error
    except OSError:  # a disk without locks
        pass
    try:
        yield
    finally:
        os.close(opened)


def _open_to_lock(place: Path) -> int:
    with suppress(OSError):  # a folder, or a disk that is read-only
        return os.open(place, os.O_RDWR | os.O_CLOEXEC)  # NFS locks only what can be written
    return os.open(place, os.O_RDONLY | os.O_CLOEXEC)


def exchange(new: Path, target: Path) -> bool:
    """Let two files or folders beside each other change places, at one moment; False where that cannot be."""
    import ctypes

    try:
        rename = ctypes.CDLL(None).renameat2  # of Linux
    except (AttributeError, OSError, TypeError):
        return False
    return not rename(HERE, os.fsencode(new.absolute()), HERE, os.fsencode(target.absolute()), EXCHANGE)


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all; bytes of file names that are not UTF-8 are written as they are."""
    with write_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def read_bytes(path: Path) -> memoryview:
    """The content of a file, in memory that can be written to, so that torch can take views of it. Raises OSError.

    Other threads run meanwhile, as they would not while a bytearray is filled with zeros.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        # Of no file; private, so that a forked process gets a copy. Windows, which does not fork, may refuse that.
        access = mmap.ACCESS_COPY if hasattr(os, "fork") else mmap.ACCESS_WRITE
        memory = mmap.mmap(-1, max(1, size), access=access)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        content = memoryview(memory)
        return content[: file.readinto(content[:size])]


def parse_json(text: str | bytes) -> Any:
    """The values in JSON; raises ValueError for other text, what is nested too deeply and numbers beyond float's."""
    try:
        return json.loads(text, parse_int=_whole, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _whole(text: str) -> int:
    if len(text) > sys.float_info.max_10_exp:
        raise ValueError(f"{text[:20]} ... has {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):  # no whole number could be made of it
        raise ValueError(f"{text[:20]} is infinite")
    return number


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Lines of CSV that every reader divides alike: a carriage return is quoted, which the csv module leaves bare."""
    import csv

    text = io.StringIO()
    quoted, plain = (csv.writer(text, lineterminator="\n", quoting=way) for way in (csv.QUOTE_ALL, csv.QUOTE_MINIMAL))
    for row in rows:
        bare = any("\r" in value for value in row if isinstance(value, str))
        (quoted if bare else plain).writerow(row)
    return text.getvalue()


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))


def has_mark(file: Path) -> bool:
    """Whether a file mentions effnet, as every exported one does."""
    if not file.stat().st_size:
        return False
    with file.open("rb") as content, mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        return pages.find(MARK.encode()) >= 0


def _next_free(runs: Path, name: str) -> Path:
    """Create `runs`/`name`, or the same with the first number that is free, from 2 on."""
    runs.mkdir(parents=True, exist_ok=True)
    number, folder = 1, runs / name
    while True:
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
            folder = runs / f"{name}-{number}"
        else:
            return folder


def _link_latest(folder: Path) -> None:
    """Link `latest` to the folder beside it; where links cannot be made, there is none."""
    temporary = folder.parent / f".latest.{os.getpid()}"
    try:
        temporary.symlink_to(folder.name, target_is_directory=True)
        temporary.replace(folder.parent / "latest")
    except OSError:
        temporary.unlink(missing_ok=True)


@contextmanager
def name_file(file: Path) -> Iterator[None]:
    """Name a file in errors of the system that name none, as those of writing to an open file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(file)) from error


@contextmanager
def _folder_beside(target: Path) -> Iterator[Path]:
    import shutil
    from tempfile import mkdtemp

    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with name_file(target):
            yield folder
    except (OSError, EffnetError):
        raise
    except Exception as error:  # torch, OpenVINO and safetensors do not say why they cannot write
        try:
            (folder / "room").write_bytes(bytes(ROOM))
        except OSError as full:
            raise OSError(full.errno, full.strerror, str(target)) from error
        raise
    finally:
        if target.exists() or not (folder / "old").is_dir():  # else it could not be put back, and is all that is left
            shutil.rmtree(folder, ignore_errors=True)


def _may_replace(folder: Path, content: Content | None) -> bool:
    if not folder.is_dir():
        return False
    names = names_in(folder)
    if not names or content is None:
        return not names
    if content == "artifact":
        return names <= ARTIFACT_FILES and "model.xml" in names and has_mark(folder / "model.xml")
    try:
        config = parse_json((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    ours = isinstance(config, dict) and MARK in config and ("format" in config) == (content == "bundle")
    return ours and names <= OTHER_FILES
