"""Output of commands: tables, paragraphs, JSON, CSV and progress; and how their options are declared.

Results go to standard output; progress, remarks and the next command go to standard error, so output can be piped.

A command with more than six options takes them as a frozen dataclass, the same one that the library function takes:

    def scale(*, options: Annotated[ScaleOptions, Parameter(name="*")] = ScaleOptions()) -> int: ...

The docstring under a field is its help text: a phrase, with "Default: ..." if the field's default is None. Switches are
`Flag`, amounts such as 8GB `Amount | None`; a field whose option has another name is
Annotated[str, Parameter(name="--from")]. `__post_init__` checks values; users see its errors unchanged.
A group of options that may be absent as a whole is a parameter `Budget | None = None` of the same form.
"""

from __future__ import annotations

import codecs
import dataclasses
import io
import json
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, get_args

from cyclopts import Parameter, Token, convert

from effnet.files import csv_text

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

OK, FINDING, ERROR, INTERRUPTED = 0, 1, 2, 130  # exit codes; see cli
STDIN = "\0-"  # stands for a lone hyphen, which cyclopts would take for an option; no path can have this name

MACS = "MACs are multiply-adds, what the paper calls FLOPS; FLOPs are twice as many."
PUBLISHED = "Accuracies are published ImageNet results, not measured here."

WIDE = 500  # columns; no table is wider
PROSE = 100  # columns
SIZES = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def read_value(type_: Any, tokens: Sequence[Token]) -> Any:
    """A value as cyclopts reads it, with three exceptions.

    A whole number must be written as one; cyclopts would round 1.5 to 2. An empty word, such as an unset shell
    variable, is refused: as a path it would mean the working folder. ~/ is the user's home, which a shell does not
    write out in --out=~/photos or '~/photos/*.jpg'.
    """
    tokens = [token.evolve(value=_at_home(token.value)) for token in tokens]
    if any(token.value == "" for token in tokens):
        raise ValueError("an empty word is not a value")
    if type_ is int or int in get_args(type_):
        try:
            return int(tokens[0].value)
        except ValueError as error:
            raise ValueError(f"{tokens[0].value!r} is not a whole number") from error
    return convert(type_, tokens)


def _at_home(word: str) -> str:
    with suppress(RuntimeError):  # a user without a home
        return str(Path(word).expanduser()) if word == "~" or word.startswith("~/") else word
    return word


Flag = Annotated[bool, Parameter(negative=(), show_default=False)]
Amount = Annotated[str | float, Parameter(metavar="AMOUNT")]  # text first, so that 8, which has no unit, is refused


def given(options: Any) -> dict[str, Any]:
    """The fields of an options dataclass that differ from their defaults."""
    values = ((field, getattr(options, field.name)) for field in dataclasses.fields(options))
    return {field.name: value for field, value in values if value != field.default}


def command_line(command: str, options: Mapping[str, Any]) -> str:
    """The command line of a command with options: `from_` is --from, False is --no-..., a list repeats the option."""
    words = ["effnet", *command.split()]
    for name, value in options.items():
        option = name.strip("_").replace("_", "-")
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, bool):
                words.append(f"--{option}" if item else f"--no-{option}")
            else:
                words += [f"--{option}", str(item).removesuffix(".0") if isinstance(item, float) else str(item)]
    return shlex.join(words)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "", note: str = "") -> None:
    """Print a table; columns whose name starts with "<" are text, the others numbers."""
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
    # A table too wide for the terminal wraps; if it were cut off, numbers would be lost.
    terminal.width = max(terminal.width, terminal.measure(drawn, options=terminal.options.update(width=WIDE)).maximum)
    terminal.print(drawn)


def paragraphs(texts: Iterable[str]) -> None:
    """Print prose, wrapped."""
    for text in texts:
        sys.stdout.write(textwrap.fill(text, PROSE, subsequent_indent="  ") + "\n")


def set_encoding() -> None:
    """Let standard input and output take any name, whatever their encoding; output errors name standard output.

    Bytes of a file name that are not valid in the system's encoding are read and written unchanged; a character that
    standard output's encoding lacks is written as an escape: \\u4e2d. What is written to a closed output is lost.
    """
    codecs.register_error("effnet", _encode)
    for name in ("stdout", "stderr"):  # None if it was closed by who started the command, as by >&-
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  # as long as the process
    if sys.stdout is sys.__stdout__ and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = _Output(sys.stdout)
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "effnet")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


class _Output(io.TextIOWrapper):
    """Standard output whose errors name it, which those of a full disk do not."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        super().__init__(
            stream.buffer,
            stream.encoding,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )

    def write(self, text: str, /) -> int:
        with self._named():
            return super().write(text)

    def flush(self) -> None:
        with self._named():
            super().flush()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise type(error)(error.errno, error.strerror, "standard output") from error


def _encode(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    letter = error.object[error.start]
    handler = "surrogateescape" if "\udc80" <= letter <= "\udcff" else "backslashreplace"
    return letter.encode("ascii", handler), error.start + 1


def one_line(name: str) -> str:
    """A file name with control characters escaped: line feeds and terminal commands."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], name)


def json_line(value: object) -> str:
    """One line of JSON."""
    return _json(value) + "\n"


def json_text(value: object) -> str:
    """Indented JSON."""
    return _json(value, 2) + "\n"


def _json(value: object, indent: int | None = None) -> str:
    """JSON with characters unescaped, or all in ASCII if standard output or UTF-8 cannot encode one of them."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    try:
        for encoding in ("utf-8", sys.stdout.encoding or "utf-8"):
            text.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


def csv_lines(rows: Iterable[Sequence[object]]) -> str:
    """Lines of CSV."""
    return csv_text(rows)


class Display:
    """Draws progress on standard error if it is a terminal: a line immediately, bars once work is counted.

    Messages appear above the bars; if standard error is not a terminal, only messages are written.
    """

    def __init__(self, task: str = "") -> None:
        self._line = f"{task} ..." if task else ""
        self._bar: Bar | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        if self._line and sys.stderr.isatty():
            sys.stderr.write(f"{self._line}\r")
            sys.stderr.flush()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the line and the bars."""
        if self._bar is not None:
            self._bar.stop()
            self._bar, self._tasks = None, {}
        elif self._line and sys.stderr.isatty():
            sys.stderr.write(f"{'':{len(self._line)}}\r")

    def message(self, text: str) -> None:
        """Write a line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            remark(text)

    def update(self, task: str, done: float, total: float, detail: str = "") -> None:
        """Draw a task's bar, which is removed when the task is finished."""
        if not sys.stderr.isatty():
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            count = TextColumn("{task.completed:.6g}/{task.total:.6g}")
            columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
        if task not in self._tasks:
            self._tasks[task] = self._bar.add_task(task, total=total)
        description = f"{task}, {detail}" if detail else task
        self._bar.update(self._tasks[task], completed=done, total=total, description=description)
        if done >= total:
            self._bar.remove_task(self._tasks.pop(task))


def remark(text: str) -> None:
    """Write a line to standard error, after the results so far; a full disk behind the log does not stop a training."""
    sys.stdout.flush()
    with suppress(OSError):
        sys.stderr.write(f"{text}\n")


def remark_once(text: str) -> None:
    """Write a line to standard error, only in the first of the processes that torchrun started on this machine."""
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")  # each start has a folder, with one for each process
    try:
        if own is not None:
            (Path(own).parents[1] / "effnet-line").touch(exist_ok=False)
    except FileExistsError:
        return
    except (OSError, IndexError):
        pass
    remark(text)


def millions(number: float) -> str:
    """Four significant digits, in millions: 5.289 M."""
    return f"{number / 1e6:#.4g} M"


def billions(number: float) -> str:
    """Four significant digits, in billions: 0.3858 G."""
    return f"{number / 1e9:#.4g} G"


def size(number: float) -> str:
    """Four significant digits, in decimal units of bytes: 21.36 MB."""
    unit, factor = next(((unit, factor) for unit, factor in SIZES if number >= factor), SIZES[-1])
    return f"{number / factor:#.4g} {unit}"


def amount(resource: str, value: float) -> str:
    """A cost of a network, by the name of its limit: 57.91 M, 4.020 MB, 12.3 ms."""
    if resource in ("latency", "slowest_tenth"):
        return f"{1e3 * value:.3g} ms"
    return millions(value) if resource in ("macs", "params") else size(value)
