"""The options of effnet predict: content and format of answers, and where they go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from effnet.console import Flag
from effnet.errors import ArgumentError
from effnet.fields import check_fields, positive_int


@dataclass(frozen=True)
class AnswerOptions:
    """The content of each answer."""

    topk: int = 5
    """Classes to list for each photo."""
    sets: float | None = None
    """Add a set of labels that contains the true one this often, such as .9; for models from effnet train."""


@dataclass(frozen=True)
class OutputOptions:
    """The format of the answers, where they go, and where they are computed."""

    json: Flag = False
    """Print one JSON object per line."""
    csv: Flag = False
    """Print CSV, one line per class."""
    out: Path | None = None
    """Folder for the answers, as files of JSON lines; run again, the same command goes on where it stopped. Default:
    standard output."""
    part: int = 1000
    """Photos per file in the folder of --out."""
    ray: str | None = None
    """With --out, address of a Ray cluster that computes the answers: auto, HOST:PORT, ray://HOST:10001; local starts
    one here. Each engine has one thread, or --threads. Default: this process."""

    def __post_init__(self) -> None:
        """Raise ArgumentError if a value is outside its range, or two exclude each other."""
        check_fields(self, positive_int, "part")
        if self.json and self.csv:
            raise ArgumentError("csv", self.csv, "excludes --json: choose one format.")
        if self.out is not None and (self.json or self.csv):
            name = "json" if self.json else "csv"
            raise ArgumentError(name, True, "is for standard output; the files in the folder of --out are JSON lines.")
        if self.out is None and self.ray is not None:
            raise ArgumentError("ray", self.ray, "needs --out FOLDER, where the answers are written.")
