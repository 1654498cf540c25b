"""The options of a fit, and the files of its folder.

plan.yaml              options, data and versions; with the files below, all that resuming needs
data.csv               the images that are used and their splits
findings.json          findings about the data
candidates.json        the networks that were considered, with their costs
choice.json            their scores, and the order of choice
training/, training-2/ the run of each network that was trained
model/                 the trained bundle, or in int8 the OpenVINO artifact
fit.json, report.html  the result
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from cyclopts import Parameter

from effnet.arch.spec import FitMode
from effnet.arch.specfile import read_mapping
from effnet.console import Amount, command_line, given
from effnet.data.shards import absolute, text_of
from effnet.errors import ArgumentError
from effnet.fields import check_fields, one_of, positive_float, positive_int, read_fields, seed_number, set_field
from effnet.files import write_text
from effnet.runtime.options import AnyEngine, EngineName, EnginePrecision
from effnet.scaling.budget import PARSERS, UNITS, Budget
from effnet.version import __version__, is_newer, newer_file

PLAN, DATA, FINDINGS, CANDIDATES, CHOICE = "plan.yaml", "data.csv", "findings.json", "candidates.json", "choice.json"
MODEL, RESULT, REPORT = "model", "fit.json", "report.html"
LIMITS = ("macs", "params", "memory", "latency", "file_size")  # of the network, as opposed to its training
AMOUNTS = (*LIMITS, "train_memory")


@Parameter(name="*")
@dataclass(frozen=True)
class FitOptions:
    """What the model may cost, how long finding and training it may take, and what will run it.

    Amounts are numbers (counts, bytes, seconds) or text with a unit, which construction converts to numbers.
    """

    macs: Amount | None = None
    """Most multiply-adds per image: 100M, 1G."""
    params: Amount | None = None
    """Most parameters: 4M."""
    memory: Amount | None = None
    """Most memory that a process needs to open and run the model, beyond Python and its libraries: 50MB."""
    latency: Amount | None = None
    """Longest time for one image on this machine: 20ms. Nine of ten answers have to meet it."""
    file_size: Amount | None = None
    """Largest weight file: 5MB."""
    train_memory: Amount | None = None
    """Most memory of a training step: 4GB. Kept by recomputing activations and by splitting batches."""
    resolution: int | None = None
    """Resolution in pixels. Default: several are compared."""
    minutes: float = 30.0
    """Time for everything, at most a quarter of it for the choice. A recipe that needs less takes less."""
    engine: AnyEngine = "auto"
    """Engine that will run it: native, openvino, onnxruntime or torch. Default: by the rules of effnet predict."""
    precision: EnginePrecision | None = None
    """Precision that it will compute in: fp32, bf16 or int8 (OpenVINO). Default: by rule, and int8 if only that keeps
    the budget."""
    threads: int | None = None
    """Threads that the engine may use. Default: one per core."""
    fit: FitMode | None = None
    """How photos become square: crop, pad or squash. Default: as the weights expect, mostly crop."""
    val: float = 0.15
    """Share of the images for validation, if the data has no val split."""
    test: float = 0.15
    """Share of the images for the final evaluation, if the data is not split."""
    seed: int = 0
    """Seed of the split, the initial weights and the order of the images."""

    def __post_init__(self) -> None:
        """Convert the amounts; an ArgumentError names the first value outside its range."""
        for name in AMOUNTS:
            if getattr(self, name) is not None:
                set_field(self, name, PARSERS[name](name, getattr(self, name)))
        check_fields(self, positive_float, "minutes")
        check_fields(self, seed_number, "seed")
        check_fields(self, positive_int, *(n for n in ("resolution", "threads") if getattr(self, n) is not None))
        one_of("engine", self.engine, AnyEngine)
        if self.precision is not None:
            one_of("precision", self.precision, EnginePrecision)
        if self.fit is not None:
            one_of("fit", self.fit, FitMode)
        if self.precision == "int8" and self.engine not in ("auto", "openvino"):
            raise ArgumentError("precision", "int8", f"needs the engine openvino; {self.engine} does not support it.")
        if self.resolution is not None:
            Budget(macs=1, resolution=self.resolution)  # checks its range

    @property
    def limits(self) -> dict[str, float]:
        """The limits that were given, by their names in LIMITS."""
        return {name: cast(float, getattr(self, name)) for name in LIMITS if getattr(self, name) is not None}

    @property
    def budget(self) -> dict[str, float]:
        """The limits, including that of training."""
        return self.limits | ({} if self.train_memory is None else {"train_memory": cast(float, self.train_memory)})

    @property
    def pinned_engine(self) -> EngineName | None:
        """The engine that must run the model; None if the rules choose."""
        return None if self.engine == "auto" else self.engine

    def to_options(self) -> dict[str, Any]:
        """The fields that differ from their defaults, with amounts as on a command line."""
        values = given(self)
        return values | {name: amount(name, values[name]) for name in AMOUNTS if name in values}


def amount(name: str, value: float) -> str:
    """A limit as on a command line: 100M, 5MB, 20ms."""
    from effnet.fields import write_amount

    return write_amount(value, UNITS[name])


def options_of(budget: Budget | FitOptions | None, **others: Any) -> FitOptions:
    """The options of effnet.fit, from a Budget or from limits and other fields by name.

    Raises:
        ArgumentError: the budget fixes what a fit chooses, or a value is outside its range.
    """
    if isinstance(budget, FitOptions):
        return dataclasses.replace(budget, **others) if others else budget
    if budget is not None:
        if not isinstance(budget, Budget):
            raise ArgumentError("budget", budget, "must be a Budget, as in effnet.Budget(latency='20ms').")
        for name in ("width", "depth", "max_resolution", "batch"):
            if getattr(budget, name) is not None:
                raise ArgumentError(name, getattr(budget, name), "cannot be fixed: a fit chooses it.")
        others = {name: getattr(budget, name) for name in (*AMOUNTS, "resolution")} | others
    return read_fields(FitOptions, others)


@dataclass(frozen=True)
class FitPlan:
    """Everything that determines a fit."""

    folder: Path
    data: Path
    options: FitOptions

    @property
    def source(self) -> str:
        """The data as on a command line."""
        return text_of(self.data)

    @property
    def command(self) -> str:
        """The command that started it."""
        return command_line("fit", self.options.to_options()).replace("fit", f"fit {shlex.quote(self.source)}", 1)

    def write(self) -> None:
        """Write plan.yaml."""
        values = {"effnet": __version__, "data": text_of(absolute(self.data))}
        values |= {"options": json.loads(json.dumps(dataclasses.asdict(self.options)))}
        write_text(self.folder / PLAN, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))

    @classmethod
    def read(cls, folder: Path) -> FitPlan:
        """The plan in a folder.

        Raises:
            ArgumentError: there is none, or it cannot be read.
        """
        if not (folder / PLAN).is_file():
            raise ArgumentError("resume", str(folder), f"is not a fit's folder: it has no {PLAN}.")
        values = dict(read_mapping(folder / PLAN))
        if is_newer(version := values.get("effnet")):
            raise ArgumentError("resume", str(folder), newer_file(version, "only that version can resume it"))
        try:
            return cls(folder, Path(values["data"]), read_fields(FitOptions, values["options"]))
        except (KeyError, TypeError) as error:
            raise ArgumentError("resume", str(folder), f"has a {PLAN} that cannot be read: {error}") from error
