"""A photo's answer as lines of a table, JSON or CSV."""

from __future__ import annotations

from typing import TYPE_CHECKING

from effnet.console import csv_lines, json_line, one_line
from effnet.errors import ImageError

if TYPE_CHECKING:
    from effnet.runtime.prediction import Prediction

CSV_COLUMNS = "file", "rank", "index", "label", "probability", "error", "unsure", "unfamiliar", "labels"
FLAGS = "unsure", "unfamiliar"  # of a prediction
SHOWN = 10  # labels of a label set in the table, at most


def flags(answer: Prediction) -> list[str]:
    """The flags of an answer."""
    return [name for name in FLAGS if getattr(answer, name)]


def table_lines(file: str, answer: Prediction | ImageError) -> str:
    """A line for each class, and one for the label set; a long file name gets a separate line."""
    file = one_line(file)
    first = f"{file:<40}" if len(file) <= 40 else f"{file}\n{'':<40}"
    if isinstance(answer, ImageError):
        return f"{first} {'-':>11}  unreadable: {answer}\n"
    lines = [f"{score.probability:>11.1%}  {score.label}" for score in answer]
    if flagged := ", ".join(flags(answer)):
        lines[0] += f"  ({flagged})"
    if answer.labels is not None:
        more = f" and {len(answer.labels) - SHOWN:,} more" if len(answer.labels) > SHOWN else ""
        lines.append(f"{'set':>11}  {', '.join(answer.labels[:SHOWN])}{more}")
    return f"{first} " + f"\n{'':<40} ".join(lines) + "\n"


def json_object(file: str, answer: Prediction | ImageError) -> str:
    """One object: {"file", "predictions": [{"index", "label", "probability"}], ...} or {"file", "error"}."""
    if isinstance(answer, ImageError):
        return json_line({"file": file, "error": str(answer)})
    return json_line({"file": file, **answer.to_dict()})


def csv_rows(file: str, answer: Prediction | ImageError) -> str:
    """A line for each class, ranked from 1, or one line with the error; a label set is a JSON list."""
    if isinstance(answer, ImageError):
        return csv_lines([(file, "", "", "", "", answer, "", "", "")])
    values = ("" if (value := getattr(answer, name)) is None else str(value).lower() for name in FLAGS)
    known = (*values, "" if answer.labels is None else json_line(answer.labels).rstrip())
    return csv_lines(
        (file, rank, s.index, s.label, s.probability, "", *known) for rank, s in enumerate(answer, start=1)
    )
