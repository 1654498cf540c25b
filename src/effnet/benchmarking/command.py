"""effnet bench: compares every engine and precision that can run a model on this machine."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from effnet import console
from effnet.benchmarking.bench import COLD_STARTS, DEFAULTS, FORMATS, BenchPlan
from effnet.benchmarking.bench import bench as measure
from effnet.benchmarking.report import VIEWS, BenchReport
from effnet.console import FINDING, OK, Flag
from effnet.fields import write_count
from effnet.metrics.intervals import Interval
from effnet.plots.style import drawable
from effnet.runtime.artifact import artifact_path
from effnet.runtime.session import TITLES

NONE = "-"
LISTED = 10  # unreadable images to print


def bench(
    model: str,
    data: str | None = None,
    *,
    plan: Annotated[BenchPlan, Parameter(name="*")] = DEFAULTS,
    plot: Path | None = None,
    json: Flag = False,
) -> int:
    """Compare every engine and precision: speed, size, memory, cold start and, with DATA, accuracy.

    They run in turn, so that a disturbance affects all of them. The default of effnet predict is marked.

    Args:
        model: Registered weights (lite0, b0 ...), a bundle, an artifact from effnet export, another library's file or
            folder, timm/NAME, hf:ORG/NAME.
        data: Labelled images, as for effnet val: a folder of class folders, or a manifest.
        plan: What to measure.
        plot: Draw the results to this .png, .svg or .pdf file.
        json: Print JSON instead of tables.
    """
    if plot is not None:
        drawable(plot)
    with console.Display(f"measuring {model}") as progress:
        report = measure(model, plan, data, progress=progress)
    if json:
        sys.stdout.write(console.json_text(report.to_dict()))
    else:
        _show_speed(report)
        _show_rest(report)
    if plot is not None:
        report.draw(plot)
        console.remark(f"Drawn: {plot}")
    for note in report.caveats:
        console.remark(f"Note: {note}.")
    if report.split == "val" and plan.int8:
        console.remark(f"Note: int8 passed its check on {model}'s val images, so its figures are slightly optimistic.")
    if report.conditions.warning:
        console.remark(report.conditions.warning)
    for path, reason in list(report.unreadable.items())[:LISTED]:
        console.remark(f"unreadable: {path}: {reason}")
    if missed := len(report.unreadable):
        console.remark(f"{missed:,} of {report.images + missed:,} images unreadable and not counted")
    if report.kept:
        for batch, selection in report.selected.items():
            console.remark(f"Kept for batches of {batch}: {selection}")
        console.remark(f"effnet.load uses these for this model on this machine while {report.kept} exists.")
    elif plan.keep:
        console.remark("Nothing is kept: no backend agreed with the reference.")
    console.remark(f"Next: {_next(report)}")
    return FINDING if missed or report.seen_in_training else OK


def _show_speed(report: BenchReport) -> None:
    """Print a line per backend, with its times per batch."""
    heads, lines = ["<engine", "<"], [[TITLES[row.backend.engine], row.backend.precision] for row in report.rows]
    for batch in report.batches:
        heads += [f"{write_count(batch, 'image')}\nms", "10 to 90 %", "images/s", "streams\nof"]
        for row, line in zip(report.rows, lines, strict=True):
            if (found := row.time(batch)) is None:
                line += [NONE] * 4
                continue
            low, high = found.time.spread_ms
            mark = "* " if report.uses(row, batch) else ""
            line += [f"{mark}{found.time.median_ms:.2f}", f"{low:.2f} - {high:.2f}", f"{found.images_per_second:.1f}"]
            line.append(f"{found.backend.streams} of {found.backend.part or batch}")
    rounds = sorted({len(time.time.seconds) for row in report.rows for time in row.times})
    note = (
        f"Medians of {' and '.join(map(str, rounds))} rounds, in which the backends ran in turn.\n"
        "* the default of effnet.load and effnet predict for this batch."
    )
    console.table(heads, lines, title=f"{report.model}, {report.resolution} px\n{report.conditions}", note=note)
    console.paragraphs(f"{row.backend} was not fully measured: {row.problem}" for row in report.rows if row.problem)


def _show_rest(report: BenchReport) -> None:
    """Print sizes, cold starts and how predictions differ."""
    heads = [
        "<engine",
        "<",
        "file",
        "peak\nmemory",
        "cold start\ns",
        "logits\ndiffer by",
        "same class\n(95 % interval)",
    ]
    heads += ["top-1\n(95 % interval)", "gain over first\n(95 % interval)"] if report.images else []
    lines = []
    for row in report.rows:
        accuracy, first = row.accuracy, row.backend == report.reference
        line = [TITLES[row.backend.engine], row.backend.precision]
        line += [console.size(value) if value else NONE for value in (row.file_bytes, row.peak_memory_bytes)]
        line.append(f"{row.cold_start_seconds:.2f}" if row.cold_start_seconds else NONE)
        line.append(NONE if first or row.logit_difference is None else f"{row.logit_difference:.1e}")
        line.append(_interval(None if first else row.same_class, ".1%"))
        if report.images:
            line.append(_interval(accuracy.accuracy_b if accuracy else None, ".2%"))
            line.append(_interval(None if first or accuracy is None else accuracy.accuracy, "+.2%"))
        lines.append(line)
    console.table(heads, lines)
    notes = [
        "File: what is shipped, the weights for torch and native; bf16 is the precision of computing, not of storing.",
        f"Cold start: from starting a process to its first prediction; peak memory: of that process, including Python "
        f"and all libraries; medians of {COLD_STARTS}, with the files in the system's cache.",
        f"Logits: the largest difference from {report.reference}, as a share of the largest logit; same class: on "
        f"{VIEWS} views of two photos.",
        *([f"Top-1: on {report.images:,} images: {report.split} of {report.data}."] if report.images else []),
    ]
    console.paragraphs([*notes, *(f"{note}." for note in report.notes)])


def _interval(found: Interval | None, form: str) -> str:
    return f"{found.value:{form}} ({found.low:{form}} to {found.high:{form}})" if found else NONE


def _next(report: BenchReport) -> str:
    """The command that exports the fastest backend, or runs it if it is an artifact already."""
    batch, model = report.batches[0], shlex.quote(report.model)
    if (best := report.fastest(batch)) is None:
        return f"effnet info {model}"
    engine, precision = best.backend.engine, best.backend.precision
    if artifact_path(report.model) or engine not in FORMATS:
        return f"effnet predict photo.jpg --model {model} --engine {engine} --precision {precision}"
    images = f" {shlex.quote(report.data)}" if precision == "int8" and report.data else ""
    return f"effnet export {model}{images} --format {FORMATS[engine][0]} --precision {precision} --batch {batch}"
