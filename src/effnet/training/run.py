"""The folder of a run: what was asked for, what was chosen, what came of it. Every file in it is whole or absent.

args.yaml              settings, recipe, network, choices, versions: all that a resumed run needs
split.csv              which image is in which part
results.csv, .png      a row for each epoch
best/                  a bundle: the latest weights whose val accuracy is within a standard error of the highest
last.ckpt, previous.ckpt
confusion_matrix.png, per_class.csv, reliability.png, mistakes.jpg, metrics.json     after the last epoch
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from effnet.data.dataset import SIZE
from effnet.errors import TrainingError
from effnet.files import write_file

ARGS, SPLIT, RESULTS, BEST, METRICS = "args.yaml", "split.csv", "results.csv", "best", "metrics.json"
RUNS = Path("runs") / "train"


def new_folder(out: str | Path | None, name: str) -> Path:
    """An empty folder for a run: `out`, or runs/train/NAME with the next number that is free.

    Raises:
        TrainingError: `out` holds a run already, or something else.
    """
    if out is not None:
        folder = Path(out)
        from effnet.training.checkpoint import LAST

        if (folder / LAST).exists():
            raise TrainingError(f"{folder} holds a run; go on with it: effnet train --resume {folder}")
        if folder.exists() and not _is_unborn(folder):
            raise TrainingError(f"{folder} exists and is not empty; choose another --out")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    RUNS.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = RUNS / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
            continue
        return folder


def _is_unborn(folder: Path) -> bool:
    """Whether a folder is empty, or a run that was killed before its first checkpoint."""
    if not folder.is_dir():
        return False
    names = {each.name for each in folder.iterdir()}
    return not names or (names <= {SPLIT, ARGS} and SIZE in (folder / SPLIT).read_text(encoding="utf-8").split("\n")[0])


def write_args(folder: Path, values: Mapping[str, Any]) -> None:
    """Write args.yaml."""
    plain = json.loads(json.dumps(values, default=str))  # tuples as lists, paths as text
    with write_file(folder / ARGS) as temporary:
        temporary.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")


def read_args(folder: str | Path) -> dict[str, Any]:
    """What args.yaml says.

    Raises:
        TrainingError: there is no run in that folder.
    """
    path = Path(folder) / ARGS
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TrainingError(f"{folder} is no run: it has no {ARGS}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise TrainingError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict) or "settings" not in values:
        raise TrainingError(f"{path} is not what effnet train writes")
    return values


def write_rows(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write results.csv: a row for each epoch."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_text(folder / RESULTS, text.getvalue())


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    with write_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two mappings, in words; names that only one of them has count as different."""
    words = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old != new:
            words.append(f"{name} was {old!r} and is {new!r}")
    return words


@contextmanager
def undone(folder: Path) -> Iterator[None]:
    """Take the folder of a run away again if it fails before its first step."""
    try:
        yield
    except BaseException:
        (folder / SPLIT).unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()
        raise


def link_latest(folder: Path) -> None:
    """runs/train/latest -> the newest run there; where links cannot be made there is none."""
    if folder.parent != RUNS:
        return
    link = folder.parent / "latest"
    temporary = folder.parent / f".latest.{os.getpid()}"
    try:
        temporary.symlink_to(folder.name, target_is_directory=True)
        temporary.replace(link)
    except OSError:
        temporary.unlink(missing_ok=True)
