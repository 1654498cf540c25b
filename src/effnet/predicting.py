"""effnet predict: photos in, class names out, as a table, JSON lines or CSV."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
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
    from effnet.runtime.classifier import Classifier, Prediction

CSV_COLUMNS = "file", "rank", "index", "label", "probability", "error", "unsure", "unfamiliar", "labels"
FLAGS = "unsure", "unfamiliar"  # of a prediction
SHOWN = 10  # labels of a set in the table
DEFAULTS = LoadOptions()


@dataclass(frozen=True)
class AnswerOptions:
    """What is said of each photo."""

    topk: int = 5
    """How many classes to list for each photo."""
    sets: float | None = None
    """Also the labels among which the true one is this often, such as .9; for models of effnet train."""


def predict(
    *sources: str,
    model: str = "lite0",
    answer: Annotated[AnswerOptions, Parameter(name="*")] = AnswerOptions(),
    json: Flag = False,
    csv: Flag = False,
    options: Annotated[LoadOptions, Parameter(name="*")] = DEFAULTS,
) -> int:
    """Classify photos. Every file gets exactly one answer, in order.

    A model of effnet train also says which answers are unsure, and which photos are unlike those of its training.

    Args:
        sources: Files, folders (at any depth), patterns such as 'photos/*.jpg', or - for a list on standard input
            (the first answers come after two batches of it).
        model: Registered weights (lite0, b0 ...), a bundle, an artifact of effnet export, another library's file or
            folder, timm/NAME, hf:ORG/NAME.
        answer: What is said of each photo.
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
    started, photos, counts = time.perf_counter(), 0, Counter[str]()
    with console.Display(f"opening {model}") as progress:
        classifier = load(model, progress=progress, **asdict(options))
    paths = expand(["-" if source == STDIN else source for source in sources], sys.stdin)
    # checks topk and sets before the head is written
    answers = classifier.stream(paths, topk=answer.topk, batch=options.batch, sets=answer.sets)
    sys.stdout.write(head)
    for photo, found in answers:
        photos += 1
        counts.update(["unreadable"] if isinstance(found, ImageError) else _flags(found))
        sys.stdout.write(format(str(photo), found))
        sys.stdout.flush()
    seconds = time.perf_counter() - started
    plural = "" if photos == 1 else "s"
    console.remark(f"{photos:,} photo{plural}, {counts['unreadable']} unreadable, {seconds:.1f} s with {model}")
    for note in _explain_flags(classifier, counts):
        console.remark(note)
    console.remark(f"{classifier.selection}")
    console.remark(f"Next: effnet info {classifier.spec.name if classifier.spec.name in VARIANTS else ''}".rstrip())
    return FINDING if counts["unreadable"] else OK


def _flags(answer: Prediction) -> list[str]:
    return [name for name in FLAGS if getattr(answer, name)]


def _explain_flags(classifier: Classifier, counts: Counter[str]) -> Iterator[str]:
    """How many photos got each flag, and what it means."""
    calibration, familiarity = classifier.calibration, classifier.familiarity
    if calibration and counts["unsure"]:
        least = calibration.threshold
        what = "no confidence" if least is None else f"only a confidence from {least:.1%}"
        promise = f"at most {calibration.error:.3g} of the answers are wrong"
        yield f"{counts['unsure']:,} unsure: {what} ensures that {promise}"
    if familiarity and counts["unfamiliar"]:
        split = familiarity.split
        yield f"{counts['unfamiliar']:,} unfamiliar: less like the training's images than 95 % of its {split} images"


def _table_lines(file: str, answer: Prediction | ImageError) -> str:
    """A line for each class, and one for a set of labels; a long name gets a line of its own."""
    first = f"{file:<40}" if len(file) <= 40 else f"{file}\n{'':<40}"
    if isinstance(answer, ImageError):
        return f"{first} {'-':>11}  unreadable: {answer}\n"
    lines = [f"{score.probability:>11.1%}  {score.label}" for score in answer]
    if flags := ", ".join(_flags(answer)):
        lines[0] += f"  ({flags})"
    if answer.labels is not None:
        more = f" and {len(answer.labels) - SHOWN:,} more" if len(answer.labels) > SHOWN else ""
        lines.append(f"{'set':>11}  {', '.join(answer.labels[:SHOWN])}{more}")
    return f"{first} " + f"\n{'':<40} ".join(lines) + "\n"


def _json_line(file: str, answer: Prediction | ImageError) -> str:
    """One object: {"file", "predictions": [{"index", "label", "probability"}], ...} or {"file", "error"}."""
    if isinstance(answer, ImageError):
        return json_line({"file": file, "error": str(answer)})
    return json_line({"file": file, **answer.to_dict()})


def _csv_lines(file: str, answer: Prediction | ImageError) -> str:
    """A line for each class, ranked from 1, or one line with the error; a set of labels is a list as in JSON."""
    if isinstance(answer, ImageError):
        return csv_lines([(file, "", "", "", "", answer, "", "", "")])
    flags = ("" if (value := getattr(answer, name)) is None else str(value).lower() for name in FLAGS)
    known = (*flags, "" if answer.labels is None else json_line(answer.labels).rstrip())
    return csv_lines(
        (file, rank, s.index, s.label, s.probability, "", *known) for rank, s in enumerate(answer, start=1)
    )
