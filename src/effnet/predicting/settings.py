"""What is said of each photo, in what form, and where: the options of effnet predict."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from effnet.console import Flag
from effnet.errors import ArgumentError
from effnet.fields import check_fields, positive_int


@dataclass(frozen=True)
class AnswerOptions:
    """What is said of each photo."""

    topk: int = 5
    """How many classes to list for each photo."""
    sets: float | None = None
    """Also the labels among which the true one is this often, such as .9; for models of effnet train."""


@dataclass(frozen=True)
class OutputOptions:
    """The form of the answers, where they go, and who gives them."""

    json: Flag = False
    """One JSON object a line."""
    csv: Flag = False
    """CSV, one line for each class."""
    out: Path | None = None
    """Write them into this folder, as files of JSON lines; the same command, given again, goes on where it stopped.
    Default: standard output."""
    part: int = 1000
    """Photos of a file in the folder of --out."""
    ray: str | None = None
    """Address of a Ray cluster that answers, with --out: auto, HOST:PORT, ray://HOST:10001; local starts one here. Each
    engine has one thread, or --threads. Default: this process."""

    def __post_init__(self) -> None:
        """Raise ArgumentError where a value is outside its range, or two exclude each other."""
        check_fields(self, positive_int, "part")
        if self.json and self.csv:
            raise ArgumentError("csv", self.csv, "excludes --json: choose one form of output.")
        if self.out is not None and (self.json or self.csv):
            name = "json" if self.json else "csv"
            raise ArgumentError(name, True, "is for standard output; the files in the folder of --out are JSON lines.")
        if self.out is None and self.ray is not None:
            raise ArgumentError("ray", self.ray, "needs --out FOLDER, where the answers are written.")
