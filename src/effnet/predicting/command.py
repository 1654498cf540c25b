"""effnet predict: photos in, class names out, as a table, JSON lines or CSV, or into a folder."""

from __future__ import annotations

import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from effnet import console
from effnet.arch.variants import VARIANTS
from effnet.console import FINDING, INTERRUPTED, OK, STDIN, csv_lines
from effnet.data.paths import expand
from effnet.errors import ArgumentError, ImageError
from effnet.predicting.lines import CSV_COLUMNS, csv_rows, flags, json_object, table_lines
from effnet.predicting.settings import AnswerOptions, OutputOptions
from effnet.runtime.load import load
from effnet.runtime.options import LoadOptions
from effnet.weights.bundle import is_bundle

if TYPE_CHECKING:
    from effnet.runtime.classifier import Classifier

ANSWER, OUTPUT, DEFAULTS = AnswerOptions(), OutputOptions(), LoadOptions()


def predict(
    *sources: str,
    model: str = "lite0",
    answer: Annotated[AnswerOptions, Parameter(name="*")] = ANSWER,
    output: Annotated[OutputOptions, Parameter(name="*")] = OUTPUT,
    options: Annotated[LoadOptions, Parameter(name="*")] = DEFAULTS,
) -> int:
    """Classify photos. Each file gets exactly one answer, in order.

    Models from effnet train also flag answers that are unsure and photos unlike those they were trained on.

    Args:
        sources: Files, folders (at any depth), patterns such as 'photos/*.jpg', or - for a list on standard input
            (whose first answers come after two batches).
        model: Registered weights (lite0, b0 ...), a bundle, an artifact of effnet export, another library's file or
            folder, timm/NAME, hf:ORG/NAME.
        answer: The content of each answer.
        output: The format of the answers, where they go, and where they are computed.
    """
    if not sources:
        raise ArgumentError("sources", "", "must name a file, a folder, a pattern, or - for a list on standard input.")
    paths = expand(["-" if source == STDIN else source for source in sources], sys.stdin)
    if output.out is not None:
        return _write(output.out, paths, model, answer, output, options)
    head, format = f"{'file':<40} {'probability':>11}  class\n", table_lines
    if output.json or output.csv:
        head, format = ("", json_object) if output.json else (csv_lines([CSV_COLUMNS]), csv_rows)
    started, photos, counts = time.perf_counter(), 0, Counter[str]()
    with console.Display(f"opening {model}") as progress:
        classifier = load(model, progress=progress, **asdict(options))
    # checks topk and sets before the header is written
    answers = classifier.stream(paths, topk=answer.topk, batch=options.batch, sets=answer.sets)
    sys.stdout.write(head)
    for photo, found in answers:
        photos += 1
        counts.update(["unreadable"] if isinstance(found, ImageError) else flags(found))
        sys.stdout.write(format(str(photo), found))
        sys.stdout.flush()
    _remark(photos, counts, time.perf_counter() - started, model, classifier)
    console.remark(f"Next: {_next(model, classifier.spec.name)}")
    return FINDING if counts["unreadable"] else OK


def _next(model: str, name: str) -> str:
    """The next command to suggest; effnet info takes a variant or a bundle."""
    if is_bundle(Path(model)):
        return f"effnet info {shlex.quote(model)}"
    return f"effnet info {name}" if name in VARIANTS else f"effnet explain photo.jpg --model {shlex.quote(model)}"


def _write(
    out: Path, paths: Iterator[str], model: str, answer: AnswerOptions, output: OutputOptions, options: LoadOptions
) -> int:
    """Write the answers to a folder, computed here or on a cluster."""
    from effnet.cluster import check_cluster
    from effnet.predicting.parts import open_request, write_answers

    check_cluster(output.ray)
    started = time.perf_counter()
    with console.Display(f"opening {model}") as progress:
        try:
            request, classifier = open_request(model, answer, options, progress)
            counts = write_answers(out, paths, request, classifier, output, progress)
        except KeyboardInterrupt:
            progress.close()
            console.remark(f"Stopped. {out} keeps its answers; run the same command to go on.")
            return INTERRUPTED
    _remark(counts["photos"], counts, time.perf_counter() - started, model, classifier)
    console.remark(f"Next: head -n 3 {shlex.quote(str(out))}/*.jsonl")
    return FINDING if counts["unreadable"] else OK


def _remark(photos: int, counts: Mapping[str, int], seconds: float, model: str, classifier: Classifier) -> None:
    """Print a summary: how many photos, by which model."""
    plural = "" if photos == 1 else "s"
    console.remark(f"{photos:,} photo{plural}, {counts['unreadable']} unreadable, {seconds:.1f} s with {model}")
    for note in _explain_flags(classifier, counts):
        console.remark(note)
    console.remark(f"{classifier.selection}")


def _explain_flags(classifier: Classifier, counts: Mapping[str, int]) -> Iterator[str]:
    """How many photos have each flag, and what it means."""
    calibration, familiarity = classifier.calibration, classifier.familiarity
    if calibration and counts["unsure"]:
        least = calibration.threshold
        what = "no confidence" if least is None else f"only a confidence from {least:.1%}"
        promise = f"at most {calibration.error:.3g} of the answers are wrong"
        yield f"{counts['unsure']:,} unsure: {what} ensures that {promise}"
    if familiarity and counts["unfamiliar"]:
        split = familiarity.split
        yield f"{counts['unfamiliar']:,} unfamiliar: less like the training images than 95 % of the {split} images"
