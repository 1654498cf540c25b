"""Files and folders that appear whole or not at all, and never take the place of somebody else's.

What effnet writes as a folder has a config.json with an entry "effnet", and a bundle's one with a "format", too. Only
such a folder, with no other files than effnet's in it, or an empty one, is ever replaced.
"""

from __future__ import annotations

import json
import mmap
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from effnet.errors import ArgumentError

MARK = "effnet"  # the entry of config.json: the version that wrote the folder
FILE_SUFFIXES = (".pth", ".pt", ".safetensors")
ARTIFACT = {"model.xml", "model.bin"}  # what an exported folder holds
OURS = {"config.json", "preprocessor_config.json", "model.safetensors", "split.csv"}


@contextmanager
def appearing_file(target: Path) -> Iterator[Path]:
    """A temporary path, with the same suffix, that takes the place of `target` when the block ends without an error.

    Raises:
        ArgumentError: `target` is a folder.
    """
    if target.is_dir():
        raise ArgumentError("out", str(target), "is a folder; name a file.")
    with _beside(target) as temporary:
        yield temporary / target.name
        (temporary / target.name).replace(target)


@contextmanager
def appearing_folder(target: Path, *, bundle: bool) -> Iterator[Path]:
    """An empty temporary folder that takes the place of `target` when the block ends without an error.

    A bundle takes the place of a bundle alone, another library's folder that of another one. What was there is moved
    aside first and deleted last, so one of the two is whole at any time.

    Raises:
        ArgumentError: something else than a folder of effnet's is in the way, or `target` has the name of a file.
    """
    if target.suffix in FILE_SUFFIXES:
        raise ArgumentError("out", str(target), f"must name a folder; {target.suffix} is the name of a file.")
    if target.exists() and not _is_ours(target, bundle):
        raise ArgumentError("out", str(target), "exists and holds something else; choose another folder.")
    with _replacing(target) as new:
        yield new


@contextmanager
def appearing_artifact(target: Path) -> Iterator[Path]:
    """The same for an exported network of several files.

    Raises:
        ArgumentError: something else than such a folder is in the way.
    """
    held = {file.name for file in target.iterdir()} if target.is_dir() else set()
    mine = held <= ARTIFACT and "model.xml" in held and mentions_us(target / "model.xml")
    ours = target.is_dir() and (mine or not held)
    if target.exists() and not ours:
        raise ArgumentError("out", str(target), "exists and holds something else; choose another folder.")
    with _replacing(target) as new:
        yield new


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    with _beside(target) as temporary:
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        yield new
        if target.exists():
            target.replace(old)
        try:
            new.replace(target)
        except OSError:
            if old.exists():
                old.replace(target)
            raise


def mentions_us(file: Path) -> bool:
    """Whether a file holds MARK, as every exported one does."""
    with file.open("rb") as content:
        if not file.stat().st_size:
            return False
        with mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) as pages:
            return pages.find(MARK.encode()) >= 0


def restore_folder(target: Path) -> None:
    """Put back what was moved aside where a process was killed while `appearing_folder` replaced it."""
    for aside in [] if target.exists() else sorted(target.parent.glob(f".{target.name}.*/old")):
        aside.replace(target)
        shutil.rmtree(aside.parent, ignore_errors=True)
        return


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A folder on the same disk as `target`, gone in the end."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_ours(folder: Path, bundle: bool) -> bool:
    """Whether a folder is empty, or holds what effnet wrote and nothing else."""
    if not folder.is_dir():
        return False
    names = {file.name for file in folder.iterdir()}
    if not names:
        return True
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return names <= OURS and isinstance(config, dict) and MARK in config and ("format" in config) == bundle
