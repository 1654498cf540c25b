"""effnet predict: photos in, class names out, as a table, JSON lines or CSV."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from effnet import console
from effnet.arch.variants import VARIANTS
from effnet.console import FINDING, OK, STDIN, Flag, csv_lines, json_line
from effnet.data.paths import expand
from effnet.errors import ArgumentError, ImageError
from effnet.runtime.load import load
from effnet.runtime.options import LoadOptions

if TYPE_CHECKING:
    from effnet.runtime.classifier import Prediction

CSV_COLUMNS = "file", "rank", "index", "label", "probability", "error"
DEFAULTS = LoadOptions()


def predict(
    *sources: str,
    model: str = "lite0",
    topk: int = 5,
    json: Flag = False,
    csv: Flag = False,
    options: Annotated[LoadOptions, Parameter(name="*")] = DEFAULTS,
) -> int:
    """Classify photos. Every file gets exactly one answer, in order.

    Args:
        sources: Files, folders (at any depth), patterns such as 'photos/*.jpg', or - for a list on standard input
            (the first answers come after two batches of it).
        model: Registered weights (lite0, b0 ...), a bundle, an artifact of effnet export, another library's file or
            folder, timm/NAME, hf:ORG/NAME.
        topk: How many classes to list for each photo.
        json: One JSON object a line.
        csv: CSV, one line for each class.
    """
    if not sources:
        raise ArgumentError("sources", "", "must name a file, a folder, a pattern, or - for a list on standard input.")
    if json and csv:
        raise ArgumentError("csv", csv, "excludes --json: choose one form of output.")
    head, format = f"{'file':<40} {'probability':>11}  class\n", _table_lines
    if json or csv:
        head, format = ("", _json_line) if json else (csv_lines([CSV_COLUMNS]), _csv_lines)
    started, photos, unreadable = time.perf_counter(), 0, 0
    with console.Display(f"opening {model}") as progress:
        classifier = load(model, progress=progress, **asdict(options))
    paths = expand(["-" if source == STDIN else source for source in sources], sys.stdin)
    answers = classifier.stream(paths, topk=topk, batch=options.batch)  # checks topk before the head is written
    sys.stdout.write(head)
    for photo, answer in answers:
        photos, unreadable = photos + 1, unreadable + isinstance(answer, ImageError)
        sys.stdout.write(format(str(photo), answer))
        sys.stdout.flush()
    seconds = time.perf_counter() - started
    plural = "" if photos == 1 else "s"
    console.remark(f"{photos:,} photo{plural}, {unreadable} unreadable, {seconds:.1f} s with {model}")
    console.remark(f"{classifier.selection}")
    console.remark(f"Next: effnet info {classifier.spec.name if classifier.spec.name in VARIANTS else ''}".rstrip())
    return FINDING if unreadable else OK


def _table_lines(file: str, answer: Prediction | ImageError) -> str:
    """A line for each class; a long name gets a line of its own."""
    first = f"{file:<40}" if len(file) <= 40 else f"{file}\n{'':<40}"
    if isinstance(answer, ImageError):
        return f"{first} {'-':>11}  unreadable: {answer}\n"
    lines = [f"{score.probability:>11.1%}  {score.label}" for score in answer]
    return f"{first} " + f"\n{'':<40} ".join(lines) + "\n"


def _json_line(file: str, answer: Prediction | ImageError) -> str:
    """One object: {"file", "predictions": [{"index", "label", "probability"}]} or {"file", "error"}."""
    if isinstance(answer, ImageError):
        return json_line({"file": file, "error": str(answer)})
    return json_line({"file": file, "predictions": [vars(score) for score in answer]})


def _csv_lines(file: str, answer: Prediction | ImageError) -> str:
    """A line for each class, ranked from 1, or one line with the error."""
    if isinstance(answer, ImageError):
        return csv_lines([(file, "", "", "", "", answer)])
    return csv_lines((file, rank, s.index, s.label, s.probability, "") for rank, s in enumerate(answer, start=1))
