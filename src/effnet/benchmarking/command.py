"""effnet bench: every engine and precision that runs a model here, side by side."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from effnet import console
from effnet.console import FINDING, OK, Flag, Whole
from effnet.errors import ArgumentError, DataError
from effnet.fields import positive_int

if TYPE_CHECKING:
    from effnet.benchmarking.report import Lap, Row, Standings
    from effnet.benchmarking.subjects import Subject
    from effnet.data.held_out import HeldOut
    from effnet.exporting.int8 import Guard
    from effnet.metrics.intervals import Interval

NONE = "-"
LISTED = 10  # unreadable images that are named
FORMATS = {"torch": "torch", "openvino": "openvino", "onnxruntime": "onnx"}  # what is exported for an engine


def bench(
    model: str,
    data: str | None = None,
    *,
    batch: str | None = None,
    threads: Whole | None = None,
    rounds: Whole | None = None,
    int8: Flag = False,
    split: str | None = None,
    source: str | None = None,
    plot: Path | None = None,
    json: Flag = False,
) -> int:
    """Every engine and precision side by side: speed, size, memory, start and, with DATA, accuracy.

    All of them take turns, so that a disturbance meets all. What effnet predict takes by itself is marked.

    Args:
        model: Registered weights (lite0, b0 ...), a bundle, an artifact of effnet export, another library's file or
            folder, timm/NAME, hf:ORG/NAME.
        data: Images with known classes, as in effnet val: a folder with a sub-folder for each class, or a manifest.
        batch: Images that go through together, separated by commas. Default: 1,32.
        threads: How many an engine may use; by default one for each core.
        rounds: How many count, for each batch. Default: as many as fit into 20 seconds (7 to 30).
        int8: Measure OpenVINO's int8, too. It is calibrated on DATA's training images first, which takes minutes.
        split: The part of DATA to judge on, as in effnet val: test (default), val, train, new or all.
        source: The library that wrote a file of weights, where its keys cannot tell: timm or timm-tf.
        plot: Draw all of it into this .png, .svg or .pdf file.
        json: JSON instead of tables.
    """
    batches = None if batch is None else _batches(batch)
    for name, value in (("threads", threads), ("rounds", rounds)):
        if value is not None:
            positive_int(name, value)
    for option, given in (("split", split), ("int8", int8 or None)):
        if given and data is None:
            raise ArgumentError(option, given, f"needs images: effnet bench {model} DATA --{option}")
    if plot is not None:
        from effnet.plots.style import drawable

        drawable(plot)
    from effnet.benchmarking.bench import Plan
    from effnet.benchmarking.bench import bench as measure
    from effnet.benchmarking.subjects import open_subject

    with console.Display(f"opening {model}"):
        subject = open_subject(model, source=source, threads=threads, int8=int8)
        chosen, guard = (None, None) if data is None else _images(subject, data, split, int8=int8)
    plan = Plan(batches, rounds, threads, chosen.data if chosen else None, guard)
    found = measure(subject, plan, watch=partial(console.counting, every=1))
    if plot is not None:
        _draw(found, plot)
    if json:
        about = {"data": data, "split": chosen and chosen.split, "seen_in_training": chosen.trained if chosen else 0}
        sys.stdout.write(console.json_text(found.to_dict() | about))
    else:
        _show(found, f"{'all' if chosen.split == 'all' else f'the {chosen.split} part'} of {data}" if chosen else "")
    for note in chosen.notes if chosen else ():
        console.remark(f"Note: {note}.")
    _finish(found, plot, data)
    return FINDING if found.unreadable or (chosen and chosen.trained) else OK


def _batches(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise ArgumentError("batch", text, "must be positive whole numbers, separated by commas: 1,32.")
    return tuple(map(int, parts))


def _images(subject: Subject, data: str, split: str | None, *, int8: bool) -> tuple[HeldOut, Guard | None]:
    """The images to judge on, and those that int8 is calibrated and judged on before it takes part."""
    from effnet.data.dataset import match_classes, read_data
    from effnet.data.held_out import hold_out, train_and_val
    from effnet.exporting.int8 import Guard
    from effnet.weights.bundle import read_parts

    model, classes = subject.model, subject.config.classes
    if classes is None:
        raise DataError(f"{model} does not name its outputs, so it cannot be judged on images with known classes")
    dataset = match_classes(read_data(data), classes, f"{model}'s")
    known = read_parts(model, dataset)
    chosen = hold_out(dataset, {model: known}, split)
    if not int8:
        return chosen, None
    found = train_and_val(dataset, model, known)
    if chosen.split == "val":
        words = f"int8 was let in by its accuracy on {model}'s val images: that flatters it a little here"
        chosen = dataclasses.replace(chosen, notes=(*chosen.notes, words))
    return chosen, Guard(found.train, found.val, watch=partial(console.counting, every=1))


def _show(found: Standings, part: str) -> None:
    """How fast; then how large, how soon, and what it answers."""
    heads = [head for batch in found.batches for head in _heads(found, batch)]
    rows = [
        (*_way(row), *(cell for batch in found.batches for cell in _speed(found, row, batch))) for row in found.rows
    ]
    rounds = {len(lap.time.seconds) for row in found.rows for lap in row.laps}
    note = f"Medians of {' and '.join(map(str, sorted(rounds)))} rounds, in which all took turns."
    if any(found.takes(row, batch) for row in found.rows for batch in found.batches):
        note += "\n* what effnet.load and effnet predict take by themselves for this batch."
    title = f"{found.model}, {found.resolution} px\n{found.scene}"
    console.table(("<engine", "<", *heads), rows, title=title, note=note)
    console.paragraphs(f"{row.way} is not measured in full: {row.problem}" for row in found.rows if row.problem)
    _show_rest(found, part)


def _heads(found: Standings, batch: int) -> tuple[str, ...]:
    many = "image" if batch == 1 else "images"
    parts = ("streams\nof",) if _divided(found, batch) else ()
    return f"{batch} {many}\nms", "10 to 90 %", "images/s", *parts


def _speed(found: Standings, row: Row, batch: int) -> tuple[str, ...]:
    lap = row.lap(batch)
    if lap is None:
        return (NONE,) * (4 if _divided(found, batch) else 3)
    parts = (f"{lap.way.streams} of {lap.way.part or batch}",) if _divided(found, batch) else ()
    low, high = lap.time.spread_ms
    mark = "* " if found.takes(row, batch) else ""
    return f"{mark}{lap.time.median_ms:.2f}", f"{low:.2f} - {high:.2f}", f"{lap.images_per_second:.1f}", *parts


def _divided(found: Standings, batch: int) -> bool:
    """Whether anything was fastest in parts."""
    return any(lap.way.part for lap in _laps(found, batch))


def _laps(found: Standings, batch: int) -> list[Lap]:
    return [lap for row in found.rows if (lap := row.lap(batch))]


def _show_rest(found: Standings, part: str) -> None:
    judged = any(row.accuracy for row in found.rows)
    heads = "<engine", "<", "file", "peak\nmemory", "start\ns", "logits\ndiffer by", "same\nclass", "95 % interval"
    more = ("top-1", "95 % interval", "beside the\nfirst, points", "95 % interval") if judged else ()
    rows = [
        (*_way(row), *_size(row), *_answers(found, row), *(_accuracy(found, row) if judged else ()))
        for row in found.rows
    ]
    console.table((*heads, *more), rows)
    starts = max((len(row.starts) for row in found.rows), default=0)
    console.paragraphs(
        (
            "File: as it is shipped, for torch its weights; bf16 is what OpenVINO computes with, not what it stores.",
            f"Start: of a new process, until it answered for the first time; peak memory: of that process, Python and "
            f"all libraries included; medians of {starts}, with the files in the system's cache.",
            f"Logits: the largest difference from {found.reference}, as a share of the largest logit; same class: on "
            f"{found.views} views of two photos; intervals at 95 %.",
            *([f"Top-1: on {found.images:,} images: {part}."] if judged else []),
            *(f"{note}." for note in found.notes),
        )
    )


def _way(row: Row) -> tuple[str, str]:
    from effnet.runtime.session import TITLES

    return TITLES[row.way.engine], row.way.precision


def _size(row: Row) -> tuple[str, ...]:
    file = console.size(row.kept.bytes) if row.kept else NONE
    memory = NONE if row.peak_bytes is None else console.size(row.peak_bytes)
    return file, memory, NONE if row.start_seconds is None else f"{row.start_seconds:.2f}"


def _answers(found: Standings, row: Row) -> tuple[str, ...]:
    answers = row.answers
    if answers is None or row.way == found.reference:
        return (NONE,) * 3
    return f"{answers.share:.1e}", f"{answers.same.value:.1%}", _bounds(answers.same)


def _accuracy(found: Standings, row: Row) -> tuple[str, ...]:
    if row.accuracy is None:
        return (NONE,) * 4
    top1, gain = row.accuracy.accuracy_b, row.accuracy.accuracy
    beside = (f"{100 * gain.value:+.2f}", f"{100 * gain.low:+.2f} to {100 * gain.high:+.2f}")
    return f"{top1.value:.2%}", _bounds(top1), *((NONE, NONE) if row.way == found.reference else beside)


def _bounds(figure: Interval) -> str:
    return f"{figure.low:.1%} to {figure.high:.1%}"


def _draw(found: Standings, plot: Path) -> None:
    """Speed, start, memory and answers of all, as bars."""
    from effnet.benchmarking.plots import Panel, draw_panels

    rows, panels = found.rows, []
    for batch in found.batches:
        laps, marked = [row.lap(batch) for row in rows], [found.takes(row, batch) for row in rows]
        rates = [lap.images_per_second if lap else None for lap in laps]
        panels.append(Panel(f"images per second, {batch} at a time", rates, [*map(_rates, laps)], marked))
    panels.append(Panel("seconds until a new process answers", [row.start_seconds for row in rows]))
    panels.append(Panel("peak memory of that process, MB", [row.peak_bytes and row.peak_bytes / 1e6 for row in rows]))
    title = f"same class as {found.reference}, %"
    shares = [row.answers.same if row.answers and row.way != found.reference else None for row in rows]
    if any(row.accuracy for row in rows):
        title = f"top-1 of {found.images:,} images, %"
        shares = [row.accuracy.accuracy_b if row.accuracy else None for row in rows]
    values = [100 * share.value if share else None for share in shares]
    bounds = [(100 * share.low, 100 * share.high) if share else None for share in shares]
    panels.append(Panel(title, values, bounds, share=True))
    names = [" ".join(_way(row)) for row in rows]
    words = "Dark: what effnet.load takes by itself. Whiskers: 10 to 90 % of the rounds; of shares 95 %."
    about = f"{found.model}, {found.resolution} px: every engine and precision in turn"
    draw_panels(names, panels, plot, title=about, note=f"{found.scene}\n{words}")


def _rates(lap: Lap | None) -> tuple[float, float] | None:
    """The spread of a lap in images per second."""
    if lap is None:
        return None
    low, high = lap.time.spread_ms
    return 1e3 * lap.batch / high, 1e3 * lap.batch / low


def _finish(found: Standings, plot: Path | None, data: str | None) -> None:
    """What may have disturbed the measurement, what could not be read, where the picture is, what to type next."""
    scene = found.scene
    if scene.crowded:
        words = (
            f"Other programs were busy before this began (load {scene.load:.1f}): the times may be too long, and not "
        )
        remedy = "" if scene.threads == 1 else ", or with --threads 1"
        console.remark(f"{words}evenly so. Measure again when it is quiet{remedy}.")
    for path, reason in list(found.unreadable.items())[:LISTED]:
        console.remark(f"unreadable: {path}: {reason}")
    if found.unreadable:
        total = found.images + len(found.unreadable)
        console.remark(f"{len(found.unreadable):,} of {total:,} images unreadable and not counted")
    if plot is not None:
        console.remark(f"Drawn: {plot}")
    console.remark(f"Next: {_next(found, data)}")


def _next(found: Standings, data: str | None) -> str:
    """What makes a file of the fastest, or runs it where it is one."""
    from effnet.runtime.artifact import artifact_path

    batch = found.batches[0]
    best, model = found.fastest(batch), shlex.quote(found.model)
    if best is None:
        return f"effnet info {model}"
    way = best.way
    if artifact_path(found.model) is not None:
        return f"effnet predict photo.jpg --model {model} --engine {way.engine} --precision {way.precision}"
    images = f" {shlex.quote(data)}" if way.precision == "int8" and data else ""
    return f"effnet export {model}{images} --format {FORMATS[way.engine]} --precision {way.precision} --batch {batch}"
