"""A run's folder, in which every file is whole or absent: its content, and how a run is written and read.

args.yaml              the plan: settings, recipe, network, how steps are computed, versions; needed to resume
split.csv              which image is in which split
results.csv, .png      a row for each epoch
best/                  a bundle: the latest weights whose val accuracy is within a standard error of the highest
last.ckpt              a line with the format and the sha256 of the rest, then what torch.save writes; if it turns out
                       to be truncated or changed, previous.ckpt, the one before it, is used
confusion_matrix.png, per_class.csv, reliability.png, mistakes.jpg, cams.jpg, metrics.json, report.html
                       after the last epoch; best/ then has a model card, README.md
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import io
import json
import os
import re
import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from effnet.arch.spec import InputSpec, NetworkSpec, NumericPolicy
from effnet.arch.specfile import load_yaml
from effnet.data.bit_depth import describe_ranges
from effnet.data.dataset import (
    SIZE,
    Dataset,
    explain_one_class,
    manifest,
    match_classes,
    missing_classes,
    read_data,
    read_manifest,
    read_table,
    root_of,
    split_data,
)
from effnet.data.duplicates import find_duplicates
from effnet.data.fingerprint import Fingerprint
from effnet.data.fingerprint_cache import FingerprintCache
from effnet.data.folders import EMPTY, list_names
from effnet.data.image import identify
from effnet.data.shards import file_size, open_file
from effnet.errors import DataError, ImageError, TrainingError
from effnet.fields import read_fields, write_count
from effnet.files import exchange, names_in, write_text
from effnet.machine import this_machine
from effnet.native import training_instruction_set, trains
from effnet.progress import Progress
from effnet.training.execution import Execution, guess_step_seconds
from effnet.training.recipe import Recipe
from effnet.training.settings import Settings
from effnet.version import __version__, is_newer, newer_file, newer_format

ARGS, SPLIT, RESULTS, BEST, METRICS = "args.yaml", "split.csv", "results.csv", "best", "metrics.json"
REPORT = "report.html"
LAST, PREVIOUS, PART = "last.ckpt", "previous.ckpt", ".last.ckpt.part"  # the last one while it is written
RUNS = Path("runs") / "train"
FORMAT = 4  # of last.ckpt and args.yaml; raised whenever an older effnet's runs would not continue unchanged
HEAD = re.compile(rb"effnet checkpoint (\d+) ([0-9a-f]{64})\n")
FREE = ("data", "settings.workers", "settings.save_seconds", "execution.workers")  # no effect on the weights


@dataclass(frozen=True)
class RunPlan:
    """Everything that determines a run, as in args.yaml."""

    data: str  # absolute path of a folder or manifest
    settings: Settings
    recipe: Recipe
    spec: NetworkSpec
    policy: NumericPolicy
    input: InputSpec
    classes: tuple[str, ...]
    source: str  # where the weights came from
    data_sha256: str
    processes: int
    execution: Execution
    steps: int  # of the whole run; an estimate with --minutes

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {name: dataclasses.asdict(values[name]) for name in PLAIN} | {"spec": self.spec.to_dict()}
        plain: dict[str, Any] = json.loads(json.dumps(values, default=str))  # tuples as lists, paths as text
        return plain

    def guess_step_seconds(self) -> float:
        """A rough estimate of a step's time on a CPU."""
        return guess_step_seconds(self.spec, self.recipe, self.settings, self.execution.threads * self.processes)

    def write(self, folder: Path) -> None:
        """Write args.yaml."""
        values = self.to_dict() | {"versions": versions()}
        write_text(folder / ARGS, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))

    @classmethod
    def read(cls, folder: str | Path) -> tuple[RunPlan, dict[str, str]]:
        """The plan of a run, and the versions that it was started with.

        Raises:
            TrainingError: there is no run in the folder, or another version wrote it.
        """
        path, began = Path(folder) / ARGS, dict[str, str]()
        try:
            values = load_yaml(path.read_text(encoding="utf-8"))
            began = values.pop("versions")
            values |= {name: read_fields(cls_, values[name]) for name, cls_ in PLAIN.items()}
            values |= {"spec": NetworkSpec.from_dict(values["spec"]), "classes": tuple(values["classes"])}
            return read_fields(cls, values), began
        except FileNotFoundError as error:
            raise TrainingError(f"{folder} is not a run: it has no {ARGS}") from error
        except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
            _check_format(
                Path(folder),
                f"to train its model further: effnet train DATA --model {shlex.quote(str(Path(folder) / BEST))}",
            )
            if is_newer(began.get("effnet")):
                raise TrainingError(f"{path} {newer_file(began['effnet'], error)}") from error
            raise TrainingError(f"{path} is not what this version of effnet train writes: {error}") from error


PLAIN = {  # parts of a plan that are mappings of plain values
    "settings": Settings,
    "recipe": Recipe,
    "policy": NumericPolicy,
    "input": InputSpec,
    "execution": Execution,
}


def versions() -> dict[str, str]:
    """The versions that a result depends on; `code` is a hash of effnet's own source."""
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(file.read_bytes())
    names = {"effnet": __version__, "code": code.hexdigest()[:12], "torch": importlib.metadata.version("torch")}
    return names | {"machine": str(this_machine()), "kernels": (trains() and training_instruction_set()) or "none"}


def is_unborn(folder: Path) -> bool:
    """Whether a folder holds a run that was killed before its first checkpoint."""
    names = names_in(folder) - {PART}
    return {SPLIT} <= names <= {SPLIT, ARGS} and SIZE.encode() in (folder / SPLIT).read_bytes().split(b"\n")[0]


def write_split(path: str, settings: Settings, folder: Path, progress: Progress) -> tuple[str, ...]:
    """Split the data, near-duplicates and groups together, write split.csv, and return the classes.

    Raises:
        DataError: the data cannot be trained on.
    """
    data = read_data(path)
    if "val" in data.splits:
        _refuse_broken(list(_unreadable(data, progress)), path)
    else:
        found = find_duplicates([data.file(sample) for sample in data.samples], progress=progress)
        prints = zip(found.files, found.fingerprints, strict=True)
        broken = [f"{file} {error}" for file, error in prints if isinstance(error, ImageError)]
        _refuse_broken(broken, path)
        ranges = describe_ranges(each.range for each in found.fingerprints if isinstance(each, Fingerprint))
        if ranges:
            advice = f"effnet check {shlex.quote(path)} names the images"
            progress.message(f"pixel values have several ranges: {ranges}; {advice}")
        data = split_data(data, val=settings.val, test=settings.test, seed=settings.seed, groups=found.groups)
        groups = len(set(found.groups))
        if copies := len(data) - groups:
            text = f"{write_count(copies, 'near-duplicate')} of other images: each group stays in one split"
            splits = {(group, sample.split) for group, sample in zip(found.groups, data.samples, strict=True)}
            if leaks := len(splits) - groups:
                text += f", except {write_count(leaks, 'group')} that the data's own folders split"
                text += ": expect optimistic figures"
            progress.message(text)
    if len(data.classes) < 2:
        raise DataError(f"{path} has one class, at least two are needed: {explain_one_class(data)}")
    if "val" not in data.splits:
        raise DataError(f"{path} leaves no image for validation at --val {settings.val:g}: take a larger share")
    for message in describe_gaps(data, path):
        progress.message(message)
    write_text(folder / SPLIT, manifest(data, sizes=True))
    return data.classes


def describe_gaps(data: Dataset, path: str) -> Iterator[str]:
    """What is unexpectedly missing from the data: skipped files, and classes without images in a split."""
    if files := [name for name, reason in data.passed_over if reason != EMPTY]:
        some = f"{write_count(len(files), 'file', 'are')} skipped in {path}, such as {list_names(files[:1])}"
        yield f"{some}; effnet check {shlex.quote(path)} says why"
    lacking: dict[str, list[str]] = defaultdict(list)
    for name, splits in missing_classes(data).items():
        lacking[" and ".join(splits)].append(name)
    for where, names in lacking.items():
        yield f"no image in {where} of {list_names(names)}: the figures there do not show how well it is recognised"


def _unreadable(data: Dataset, progress: Progress) -> Iterator[str]:
    """Files that are not images judging by their first bytes, each with the reason."""
    files = [data.file(sample) for sample in data.samples]
    cache = FingerprintCache(files)
    for index, file in enumerate(files):
        try:
            if not cache.knows(index):
                with open_file(file) as opened:
                    identify(opened)
        except (ImageError, OSError, ValueError) as error:
            yield f"{file} {error}"
        progress.update("reading the images", index + 1, len(files))


def _refuse_broken(broken: Sequence[str], data: str) -> None:
    if broken:
        others = f", and {len(broken) - 1} other images" if len(broken) > 1 else ""
        advice = f"A list without what cannot be read: effnet check {shlex.quote(data)} --fix clean.csv"
        raise DataError(f"{broken[0]}{others}. {advice}")


def read_split(path: str, folder: Path, classes: tuple[str, ...]) -> Dataset:
    """The data of a run by its split.csv, with the run's order of classes."""
    data = read_manifest(folder / SPLIT, root_of(Path(path)))
    return match_classes(data, classes, "the run's")


def run_inputs(plan: RunPlan, folder: Path) -> dict[str, Any]:
    """The contents of a run's files that must not change until it ends, for a checkpoint.

    Raises:
        TrainingError: there is no split.csv.
    """
    try:
        split = hashlib.sha256((folder / SPLIT).read_bytes()).hexdigest()
    except OSError as error:
        raise TrainingError(f"{folder} cannot be resumed: {SPLIT} cannot be read ({error.strerror})") from error
    return {"plan": plan.to_dict(), "split": split}


def check_inputs(before: Mapping[str, Any], plan: RunPlan, folder: Path) -> None:
    """Check that a run's files match its checkpoint, except for FREE; `before` is what `run_inputs` returned.

    Raises:
        TrainingError: a file was edited, so the run would not continue as it began.
    """
    now = run_inputs(plan, folder)
    for name, old, new in _changes(before["plan"], now["plan"]):
        if name not in FREE:
            why = f"was changed since the run began: {name} was {old!r} and is {new!r}. A run goes on as it began"
            again = f"effnet train {shlex.quote(plan.data)} --like {shlex.quote(str(folder))}"
            raise TrainingError(f"{folder / ARGS} {why}; to begin another: {again}")
    if before["split"] != now["split"]:
        raise TrainingError(f"{folder / SPLIT} was changed since the run began: put it back as it was")


def _changes(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The values that differ, by dotted name; None for a missing one."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old | new:
            yield from _changes(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
    elif old != new:
        yield name, old, new


def check_resumed(plan: RunPlan, folder: Path, began: Mapping[str, str], data: Dataset) -> list[str]:
    """What has changed since the run began, in sentences.

    Raises:
        TrainingError: images are gone, so the run cannot go on.
    """
    table = read_table((folder / SPLIT).read_bytes().decode(errors="surrogateescape"))
    sizes = {row["path"]: row.get(SIZE) for row in table}
    now = {sample.path: file_size(data.file(sample)) for sample in data.samples}
    added = list[str]()
    with suppress(DataError):
        added = [sample.path for sample in read_data(plan.data).samples if sample.path not in now]
    new = f"{write_count(len(added), 'image', 'are')} new, such as {added[0]}" if added else ""
    if gone := [path for path, size in now.items() if size < 0]:
        renamed = f" ({new}: if they were renamed, undo that)" if new else ""
        text = (
            f"{write_count(len(gone), 'image', 'are')} gone from {plan.data}, such as {gone[0]}: put them back{renamed}"
        )
        raise TrainingError(f"{text}, or say where they are: effnet train DATA --resume {shlex.quote(str(folder))}")
    current = versions()
    differences = [
        f"{name} was {began.get(name)!r} and is {current.get(name)!r}"
        for name in sorted(began.keys() | current.keys())
        if began.get(name) != current.get(name)
    ]
    if changed := [path for path, size in now.items() if sizes[path] not in (None, str(size))]:
        differences.append(
            f"{write_count(len(changed), 'image', 'have')} another size than when the run began, such as {changed[0]}"
        )
    digits = "the result may differ from an uninterrupted run's in its last digits"
    unused = [f"{new}; this run does not use them"] if new else []
    return [f"{difference}; {digits}" for difference in differences] + unused


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write last.ckpt; the old one becomes previous.ckpt. One of the two is whole at any time.

    Raises:
        TrainingError: the disk is full or the folder cannot be written; existing files are intact.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    last, temporary = folder / LAST, folder / PART
    try:
        with temporary.open("wb") as file:
            file.write(f"effnet checkpoint {FORMAT} {hashlib.sha256(payload).hexdigest()}\n".encode())
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        if last.exists():
            if exchange(temporary, last):  # so that last.ckpt always exists
                temporary.replace(folder / PREVIOUS)
                return
            last.replace(folder / PREVIOUS)
        temporary.replace(last)
    except OSError as error:
        with suppress(OSError):  # a read-only disk
            temporary.unlink(missing_ok=True)
        problem = f"{last} cannot be written ({error.strerror or error})"
        raise TrainingError(f"{problem}; earlier checkpoints are intact: make room, then resume") from error


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], str]:
    """The newest whole state in a run's folder, and if it is not the last one, the reason.

    Raises:
        TrainingError: there is none, or another effnet wrote it.
    """
    _check_format(folder, f"to start over: effnet train DATA --like {shlex.quote(str(folder))}")
    problems: list[str] = []
    for name in (LAST, PREVIOUS):
        try:
            return _read(folder / name), "; ".join(problems)
        except FileNotFoundError:
            problems.append(f"there is no {name}")
        except ValueError as error:
            problems.append(f"{name} is damaged ({error})")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
    raise TrainingError(f"{folder} cannot be resumed: {', '.join(problems)}")


def _read(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        head, payload = HEAD.fullmatch(file.readline(100)), file.read()
    if head is None:
        raise ValueError("it does not start like a checkpoint")
    if hashlib.sha256(payload).hexdigest().encode() != head[2]:
        raise ValueError("it was truncated or changed")
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own message advises to switch its protection off
        raise ValueError("it is not what torch.save writes, or holds objects whose code would run") from error
    return state


def _check_format(folder: Path, advice: str) -> None:
    """Raise TrainingError if a run's checkpoint has another format; `advice` is for an older one."""
    for path in (folder / LAST, folder / PREVIOUS):
        with suppress(OSError), path.open("rb") as file:
            if (head := HEAD.fullmatch(file.readline(100))) is None:
                continue
            if (found := int(head[1])) > FORMAT:
                raise TrainingError(f"{path} {newer_format(None, found, FORMAT)}")
            if found < FORMAT:
                why = f"was begun by an older effnet (format {found}, not {FORMAT}) and cannot go on"
                raise TrainingError(f"{folder} {why}; {advice}")
            return
