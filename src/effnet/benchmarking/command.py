"""effnet bench: every engine and precision that runs a model here, side by side."""

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
from effnet.benchmarking.subject import Subject
from effnet.console import FINDING, OK, Flag
from effnet.data.dataset import match_classes, read_data
from effnet.data.held_out import HeldOut, TrainVal, hold_out, train_and_val
from effnet.errors import ArgumentError, DataError
from effnet.metrics.intervals import Interval
from effnet.plots.style import drawable
from effnet.runtime.classifier import read_model
from effnet.runtime.session import TITLES
from effnet.weights.bundle import find_splits

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
        split: The split of DATA to evaluate on, as for effnet val: test (default), val, train, new or all.
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
        subject = Subject(model, read_model(model, source=source, progress=progress), source)
        held_out, calibration = _read_images(subject, data, split, int8=plan.int8) if data else (None, None)
        images = held_out.data if held_out else None
        report = measure(subject, plan, images=images, calibration=calibration, progress=progress)
    split, trained = (held_out.split, held_out.trained) if held_out else (None, 0)
    if json:
        about = {"data": data, "split": split, "seen_in_training": trained}
        sys.stdout.write(console.json_text(report.to_dict() | about))
    else:
        _show_speed(report)
        _show_rest(report, f"{split} of {data}")
    if plot is not None:
        from effnet.benchmarking.plots import draw_bench

        draw_bench(report, plot)
        console.remark(f"Drawn: {plot}")
    for note in held_out.notes if held_out else ():
        console.remark(f"Note: {note}.")
    if split == "val" and plan.int8:
        console.remark(f"Note: int8 passed its check on {model}'s val images, which flatters it a little here.")
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
        console.remark("Nothing is kept: no backend answered as the reference does.")
    console.remark(f"Next: {_next(report, data, artifact=subject.artifact is not None)}")
    return FINDING if missed or trained else OK


def _read_images(subject: Subject, data: str, split: str | None, *, int8: bool) -> tuple[HeldOut, TrainVal | None]:
    """The images to evaluate on, and those that int8 is calibrated and evaluated on before it takes part."""
    name, classes = subject.name, subject.model.config.classes
    if classes is None:
        raise DataError(f"{name} does not name its outputs, so it cannot be evaluated on images with known classes")
    dataset = match_classes(read_data(data), classes, f"{name}'s")
    known = find_splits(name, dataset)
    return hold_out(dataset, {name: known}, split), train_and_val(dataset, name, known) if int8 else None


def _show_speed(report: BenchReport) -> None:
    """A line for each backend, with its times for each batch."""
    heads, lines = ["<engine", "<"], [[TITLES[row.backend.engine], row.backend.precision] for row in report.rows]
    for batch in report.batches:
        heads += [f"{batch} image{'' if batch == 1 else 's'}\nms", "10 to 90 %", "images/s", "streams\nof"]
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
        f"Medians of {' and '.join(map(str, rounds))} rounds, in which all took turns.\n"
        "* what effnet.load and effnet predict use for this batch when nothing is pinned."
    )
    console.table(heads, lines, title=f"{report.model}, {report.resolution} px\n{report.conditions}", note=note)
    console.paragraphs(f"{row.backend} is not measured in full: {row.problem}" for row in report.rows if row.problem)


def _show_rest(report: BenchReport, data: str) -> None:
    """How large, how soon, and how it answers."""
    heads = [
        "<engine",
        "<",
        "file",
        "peak\nmemory",
        "cold start\ns",
        "logits\ndiffer by",
        "same class\n(95 % interval)",
    ]
    heads += ["top-1\n(95 % interval)", "gain on the first\n(95 % interval)"] if report.images else []
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
        "File: what is shipped, for torch its weights; bf16 is what OpenVINO computes with, not what it stores.",
        f"Cold start: a new process until its first answer; peak memory: of that process, Python and all libraries "
        f"included; medians of {COLD_STARTS}, with the files in the system's cache.",
        f"Logits: the largest difference from {report.reference}, as a share of the largest logit; same class: on "
        f"{VIEWS} views of two photos.",
        *([f"Top-1: on {report.images:,} images: {data}."] if report.images else []),
    ]
    console.paragraphs([*notes, *(f"{note}." for note in report.notes)])


def _interval(found: Interval | None, form: str) -> str:
    return f"{found.value:{form}} ({found.low:{form}} to {found.high:{form}})" if found else NONE


def _next(report: BenchReport, data: str | None, *, artifact: bool) -> str:
    """The command that writes the fastest as a file, or runs it where it is one."""
    batch, model = report.batches[0], shlex.quote(report.model)
    if (best := report.fastest(batch)) is None:
        return f"effnet info {model}"
    engine, precision = best.backend.engine, best.backend.precision
    if artifact:
        return f"effnet predict photo.jpg --model {model} --engine {engine} --precision {precision}"
    images = f" {shlex.quote(data)}" if precision == "int8" and data else ""
    return f"effnet export {model}{images} --format {FORMATS[engine][0]} --precision {precision} --batch {batch}"
