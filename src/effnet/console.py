"""How results look on a terminal, in JSON lines and in CSV, and how waiting looks.

Results go to standard output; progress, remarks and the next command to standard error, so output can be piped.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from effnet.errors import ImageError

if TYPE_CHECKING:
    from effnet.deploy.runtime import Prediction

WIDE = 500  # columns; no table is wider
PROSE = 100  # columns
SIZES = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


class PredictionTable:
    """A line for each class, for a person."""

    def begin(self) -> str:
        """The first line."""
        return f"{'file':<40} {'probability':>11}  class\n"

    def answer(self, file: str, answer: Prediction | ImageError) -> str:
        """The lines of one file; a long name gets a line of its own."""
        head = f"{file:<40}" if len(file) <= 40 else f"{file}\n{'':<40}"
        if isinstance(answer, ImageError):
            return f"{head} {'-':>11}  unreadable: {answer}\n"
        lines = [f"{score.probability:>11.1%}  {score.label}" for score in answer]
        return f"{head} " + f"\n{'':<40} ".join(lines) + "\n"


class PredictionJson:
    """One object a line: {"file", "predictions": [{"index", "label", "probability"}]} or {"file", "error"}."""

    def begin(self) -> str:
        """Nothing: every line stands for itself."""
        return ""

    def answer(self, file: str, answer: Prediction | ImageError) -> str:
        """The line of one file."""
        if isinstance(answer, ImageError):
            return json_line({"file": file, "error": str(answer)})
        return json_line({"file": file, "predictions": [vars(score) for score in answer]})


class PredictionCsv:
    """A line for each class, ranked from 1, or one line with the error."""

    def begin(self) -> str:
        """The header."""
        return csv_lines([("file", "rank", "index", "label", "probability", "error")])

    def answer(self, file: str, answer: Prediction | ImageError) -> str:
        """The lines of one file."""
        if isinstance(answer, ImageError):
            return csv_lines([(file, "", "", "", "", answer)])
        return csv_lines((file, rank, s.index, s.label, s.probability, "") for rank, s in enumerate(answer, start=1))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "", note: str = "") -> None:
    """Print a table; columns that start with "<" are text, the others numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title_style="bold", caption_style="")
    drawn.title, drawn.title_justify, drawn.caption, drawn.caption_justify = title, "left", note, "left"
    for name in columns:
        drawn.add_column(name.removeprefix("<"), justify="left" if name.startswith("<") else "right", no_wrap=True)
    for row in rows:
        drawn.add_row(*(Text(str(value)) for value in row))
    terminal = Console(highlight=False)
    # Wider than the terminal is better than cut off: the eye can follow a wrapped line, but not guess a number.
    terminal.width = max(terminal.width, terminal.measure(drawn, options=terminal.options.update(width=WIDE)).maximum)
    terminal.print(drawn)


def paragraphs(texts: Iterable[str]) -> None:
    """Print prose, wrapped."""
    for text in texts:
        sys.stdout.write(textwrap.fill(text, PROSE, subsequent_indent="  ") + "\n")


def json_line(value: object) -> str:
    """One line of JSON."""
    return json.dumps(value, ensure_ascii=False) + "\n"


def csv_lines(rows: Iterable[Sequence[object]]) -> str:
    """Lines of CSV."""
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows(rows)
    return lines.getvalue()


@contextmanager
def status(doing: str) -> Iterator[None]:
    """Show what is being done until it is, where somebody looks at a terminal."""
    shown = sys.stderr.isatty()
    line = f"{doing} ..."
    if shown:
        sys.stderr.write(f"{line}\r")  # the line of a progress bar, if one comes
        sys.stderr.flush()
    try:
        yield
    finally:
        if shown:
            sys.stderr.write(f"{'':{len(line)}}\r")


@contextmanager
def hearing(doing: str) -> Iterator[None]:
    """The same, and what the rooms below say meanwhile of their progress."""
    if not sys.stderr.isatty():
        yield
        return
    spoken = _Spoken(doing)
    spoken.logger.addHandler(spoken)
    level = spoken.logger.level
    spoken.logger.setLevel(logging.INFO)
    try:
        with status(doing):
            yield
    finally:
        spoken.logger.removeHandler(spoken)
        spoken.logger.setLevel(level)
        sys.stderr.write(f"{'':{spoken.width}}\r")


class _Spoken(logging.Handler):
    """Progress on one line, warnings on lines of their own."""

    logger = logging.getLogger("effnet")

    def __init__(self, doing: str) -> None:
        super().__init__()
        self.doing, self.width = doing, 0

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage() if record.levelno >= logging.WARNING else f"{self.doing}: {record.getMessage()} ..."
        self.width = max(self.width, len(line))
        sys.stderr.write(f"{line:{self.width}}{chr(10) if record.levelno >= logging.WARNING else chr(13)}")
        sys.stderr.flush()


@contextmanager
def counting(doing: str, of: str = "images", every: int = 32) -> Iterator[Callable[[int, int], None]]:
    """Show what is being done and how many of how many are done, where somebody looks at a terminal."""
    shown, width = sys.stderr.isatty(), len(doing) + 40

    def show(done: int, total: int) -> None:
        if shown and (done % every == 0 or done == total):
            sys.stderr.write(f"{doing}: {done:,} of {total:,} {of}\r")
            sys.stderr.flush()

    with status(doing):
        try:
            yield show
        finally:
            if shown:
                sys.stderr.write(f"{'':{width}}\r")


def remark(words: str) -> None:
    """Something a person may want to know, beside the results."""
    sys.stdout.flush()
    sys.stderr.write(f"{words}\n")


def json_text(value: object) -> str:
    """Indented JSON, for eyes and for programs."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def millions(number: float) -> str:
    """Four digits that count, in millions: 5.289 M."""
    return f"{number / 1e6:#.4g} M"


def billions(number: float) -> str:
    """Four digits that count, in billions: 0.3858 G."""
    return f"{number / 1e9:#.4g} G"


def size(number: float) -> str:
    """Four digits that count, in decimal units of bytes: 21.36 MB."""
    unit, factor = next(((unit, factor) for unit, factor in SIZES if number >= factor), SIZES[-1])
    return f"{number / factor:#.4g} {unit}"
