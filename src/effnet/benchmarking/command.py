"""effnet bench: every engine and precision that runs a model here, side by side."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from effnet import console
from effnet.benchmarking.bench import DEFAULTS, FORMATS, BenchPlan
from effnet.benchmarking.bench import bench as measure
from effnet.benchmarking.report import BenchReport, BenchRow
from effnet.benchmarking.subject import INT8, Subject
from effnet.console import FINDING, OK, Flag
from effnet.data.dataset import match_classes, read_data
from effnet.data.held_out import HeldOut, TrainVal, hold_out, train_and_val
from effnet.errors import ArgumentError, DataError
from effnet.metrics.intervals import Interval
from effnet.plots.style import drawable
from effnet.runtime.agreement import VIEWS
from effnet.runtime.artifact import artifact_path
from effnet.runtime.session import TITLES
from effnet.weights.bundle import read_parts

NONE = "-"
LISTED = 10  # unreadable images that are named


def bench(
    model: str,
    data: str | None = None,
    *,
    plan: Annotated[BenchPlan, Parameter(name="*")] = DEFAULTS,
    split: str | None = None,
    source: str | None = None,
    plot: Path | None = None,
    json: Flag = False,
) -> int:
    """Every engine and precision side by side: speed, size, memory, cold start and, with DATA, accuracy.

    All of them take turns, so that a disturbance meets all. What effnet predict uses when nothing is pinned is marked.

    Args:
        model: Registered weights (lite0, b0 ...), a bundle, an artifact of effnet export, another library's file or
            folder, timm/NAME, hf:ORG/NAME.
        data: Images with known classes, as for effnet val: a folder with a sub-folder for each class, or a manifest.
        plan: What is measured.
        split: The part of DATA to evaluate on, as for effnet val: test (default), val, train, new or all.
        source: The library that wrote a file of weights, where its keys cannot tell: timm or timm-tf.
        plot: Draw the results into this .png, .svg or .pdf file.
        json: Print JSON instead of tables.
    """
    for option, value in (("split", split), ("int8", plan.int8 or None)):
        if value and data is None:
            raise ArgumentError(option, value, f"needs images: effnet bench {model} DATA --{option}")
    if plot is not None:
        drawable(plot)
    with console.Display(f"measuring {model}") as progress:
        subject = Subject.open(model, source)
        held_out, calibration = _read_images(subject, data, split, int8=plan.int8) if data else (None, None)
        images = held_out.data if held_out else None
        report = measure(subject, plan, images=images, calibration=calibration, progress=progress)
    if plot is not None:
        from effnet.benchmarking.plots import draw_bench

        draw_bench(report, plot)
    if json:
        about = {"data": data, "split": held_out and held_out.split}
        trained = {"seen_in_training": held_out.trained if held_out else 0}
        sys.stdout.write(console.json_text(report.to_dict() | about | trained))
    else:
        _show_speed(report)
        _show_rest(report, "" if held_out is None else f"{held_out.split} of {data}")
    for note in held_out.notes if held_out else ():
        console.remark(f"Note: {note}.")
    if held_out and held_out.split == "val" and plan.int8:
        console.remark(f"Note: int8 passed its check on {model}'s val images, which flatters it a little here.")
    _finish(report, plan, plot, data)
    return FINDING if report.unreadable or (held_out and held_out.trained) else OK


def _read_images(subject: Subject, data: str, split: str | None, *, int8: bool) -> tuple[HeldOut, TrainVal | None]:
    """The images to evaluate on, and those that int8 is calibrated and evaluated on before it takes part."""
    name, classes = subject.name, subject.model.config.classes
    if classes is None:
        raise DataError(f"{name} does not name its outputs, so it cannot be evaluated on images with known classes")
    dataset = match_classes(read_data(data), classes, f"{name}'s")
    known = read_parts(name, dataset)
    return hold_out(dataset, {name: known}, split), train_and_val(dataset, name, known) if int8 else None


def _show_speed(report: BenchReport) -> None:
    heads, cells = ["<engine", "<"], [[TITLES[row.backend.engine], row.backend.precision] for row in report.rows]
    for batch in report.batches:
        heads += [f"{batch} image{'' if batch == 1 else 's'}\nms", "10 to 90 %", "images/s"]
        divided = any(time.backend.part for row in report.rows if (time := row.time(batch)))
        heads += ["streams\nof"] if divided else []
        for row, line in zip(report.rows, cells, strict=True):
            if (time := row.time(batch)) is None:
                line += [NONE] * (4 if divided else 3)
                continue
            low, high = time.time.spread_ms
            mark = "* " if report.uses(row, batch) else ""
            line += [f"{mark}{time.time.median_ms:.2f}", f"{low:.2f} - {high:.2f}", f"{time.images_per_second:.1f}"]
            line += [f"{time.backend.streams} of {time.backend.part or batch}"] if divided else []
    rounds = sorted({len(time.time.seconds) for row in report.rows for time in row.times})
    note = f"Medians of {' and '.join(map(str, rounds))} rounds, in which all took turns."
    if any(report.uses(row, batch) for row in report.rows for batch in report.batches):
        note += "\n* what effnet.load and effnet predict use for this batch when nothing is pinned."
    console.table(heads, cells, title=f"{report.model}, {report.resolution} px\n{report.conditions}", note=note)
    console.paragraphs(f"{row.backend} is not measured in full: {row.problem}" for row in report.rows if row.problem)


def _show_rest(report: BenchReport, part: str) -> None:
    """How large, how soon, and what it answers."""
    heads = [
        "<engine",
        "<",
        "file",
        "peak\nmemory",
        "cold start\ns",
        "logits\ndiffer by",
        "same\nclass",
        "95 % interval",
    ]
    heads += ["top-1", "95 % interval", "beside the\nfirst, points", "95 % interval"] if report.images else []
    rows = []
    for row in report.rows:
        first, answers = row.backend == report.reference, row.answers
        cells = [TITLES[row.backend.engine], row.backend.precision]
        cells += [console.size(value) if value else NONE for value in (row.file_bytes, row.peak_bytes)]
        cells += [NONE if row.start_seconds is None else f"{row.start_seconds:.2f}"]
        cells += [f"{answers.share:.1e}", *_interval(answers.agreement, 1)] if answers and not first else [NONE] * 3
        if report.images:
            cells += _interval(row.accuracy.accuracy_b, 2) if row.accuracy else [NONE] * 2
            cells += _points(row) if row.accuracy and not first else [NONE] * 2
        rows.append(cells)
    console.table(heads, rows)
    starts = max((len(row.cold_starts) for row in report.rows), default=0)
    lines = [
        "File: what is shipped, for torch its weights; bf16 is what OpenVINO computes with, not what it stores.",
        f"Cold start: of a new process, until its first answer; peak memory: of that process, Python and all libraries "
        f"included; medians of {starts}, with the files in the system's cache.",
        f"Logits: the largest difference from {report.reference}, as a share of the largest logit; same class: on "
        f"{VIEWS} views of two photos; intervals at 95 %.",
    ]
    lines += [f"Top-1: on {report.images:,} images: {part}."] if report.images else []
    console.paragraphs([*lines, *(f"{note}." for note in report.notes)])


def _interval(found: Interval, digits: int) -> list[str]:
    return [f"{found.value:.{digits}%}", f"{found.low:.1%} to {found.high:.1%}"]


def _points(row: BenchRow) -> list[str]:
    """What a backend gains on the reference, in points of top-1."""
    assert row.accuracy
    gain = row.accuracy.accuracy
    return [f"{100 * gain.value:+.2f}", f"{100 * gain.low:+.2f} to {100 * gain.high:+.2f}"]


def _finish(report: BenchReport, plan: BenchPlan, plot: Path | None, data: str | None) -> None:
    """What may have disturbed the measurement, what could not be read, what was written, and what to type next."""
    conditions = report.conditions
    if conditions.crowded:
        advice = "again when it is quiet" + ("" if conditions.threads == 1 else ", or with --threads 1")
        console.remark(
            f"Other programs were busy before this began (load {conditions.load:.1f}), so the times may be too long, "
            f"and not evenly so: measure {advice}."
        )
    for path, reason in list(report.unreadable.items())[:LISTED]:
        console.remark(f"unreadable: {path}: {reason}")
    if report.unreadable:
        total = report.images + len(report.unreadable)
        console.remark(f"{len(report.unreadable):,} of {total:,} images unreadable and not counted")
    if plot is not None:
        console.remark(f"Drawn: {plot}")
    if report.kept:
        for batch, selection in report.selected.items():
            console.remark(f"Kept for batches of {batch}: {selection}")
        console.remark(f"effnet.load uses these for this model on this machine while {report.kept} exists.")
    elif plan.keep:
        console.remark("Nothing is kept: no backend answered as the reference does.")
    console.remark(f"Next: {_next(report, data)}")


def _next(report: BenchReport, data: str | None) -> str:
    """What makes a file of the fastest, or runs it where it is one."""
    batch, model = report.batches[0], shlex.quote(report.model)
    if (best := report.fastest(batch)) is None:
        return f"effnet info {model}"
    backend = best.backend
    if artifact_path(report.model) is not None:
        return f"effnet predict photo.jpg --model {model} --engine {backend.engine} --precision {backend.precision}"
    images = f" {shlex.quote(data)}" if backend == INT8 and data else ""
    format = FORMATS[backend.engine][0] if backend.engine in FORMATS else "torch"
    return f"effnet export {model}{images} --format {format} --precision {backend.precision} --batch {batch}"
