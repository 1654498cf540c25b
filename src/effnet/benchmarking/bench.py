"""Every engine and precision side by side: speed, size, cold start, and whether predictions stay the same.

- Speed: all backends run the same batch in turn, round after round, so that a disturbance affects all of them. Each
  runs the batch in parts of the size that runtime/select.py chooses, and of half and twice that size; the fastest
  counts.
- Predictions: logits and classes are compared with those of the first backend, on views of two photos and on labelled
  images.
- Cold start: fresh processes in turn, with the files in the system's cache.

Models are opened in memory, as effnet.load does; files are what would be shipped: artifacts, or the weights for torch.
If a backend fails, its row keeps what was measured before and names the reason. Only networks need torch.
"""

from __future__ import annotations

import dataclasses
import shlex
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import nan
from pathlib import Path
from statistics import median
from threading import current_thread, main_thread
from types import FrameType
from typing import Annotated, Any, TypeVar

import numpy as np
from cyclopts import Parameter, Token

from effnet.benchmarking.backends import bytes_of, list_absent, list_backends, measure_cold_start
from effnet.benchmarking.report import VIEWS, BatchTime, BenchReport, BenchRow, engine_and_precision
from effnet.console import Flag
from effnet.data.dataset import Dataset, read_data
from effnet.data.held_out import HeldOut, TrainVal, hold_out, train_and_val
from effnet.data.image import views
from effnet.errors import ArgumentError, CheckpointError, DataError, EffnetError
from effnet.fields import positive_int
from effnet.machine import this_machine
from effnet.metrics.evaluate import Predicted, predict_logits
from effnet.metrics.intervals import compare_top1, wilson
from effnet.metrics.timing import Conditions, time_rounds, time_turn
from effnet.progress import SILENT, Progress
from effnet.runtime.artifact import Artifact, Format, Model, read_artifact
from effnet.runtime.load import read_model
from effnet.runtime.options import EngineName
from effnet.runtime.select import Selection, keep_selection, open_session, select, select_for, version_of
from effnet.runtime.session import Backend, Logits, Session
from effnet.weights.bundle import find_splits
from effnet.weights.registry import match_outputs

T = TypeVar("T")

BATCHES = 1, 32
COLD_STARTS = 3  # processes per backend
GROUP = 16  # labelled images per batch, or the largest measured batch if that is more
FORMATS: dict[EngineName, tuple[Format, str]] = {  # export format and suffix per engine
    "openvino": ("openvino", ""),
    "onnxruntime": ("onnx", ".onnx"),
}


def _read_batches(_: type, tokens: Sequence[Token]) -> tuple[int, ...]:
    pieces = tokens[0].value.split(",")
    if not all(piece.strip().isdecimal() and int(piece) for piece in pieces):
        raise ValueError(f"{tokens[0].value!r} must be positive whole numbers, separated by commas: 1,32.")
    return tuple(map(int, pieces))


@dataclass(frozen=True)
class BenchPlan:
    """What is measured."""

    batches: Annotated[
        tuple[int, ...], Parameter(name="--batch", converter=_read_batches, n_tokens=1, negative=())
    ] = ()
    """Batch sizes, separated by commas. Default: 1,32, rounded down to multiples of the batch that an artifact was
    exported for."""
    threads: int | None = None
    """Threads that an engine may use. Default: one per core."""
    rounds: int | None = None
    """Timed rounds per batch size. Default: as many as fit into 20 seconds, from 7 to 30."""
    int8: Flag = False
    """Also measure OpenVINO's int8, after calibrating it on DATA's training images, which takes minutes."""
    keep: Flag = False
    """Remember the fastest backend that agrees with fp32: effnet.load uses it for this model on this machine."""
    source: str | None = None
    """Library that wrote a weight file, if its keys do not tell: timm or timm-tf."""
    split: str | None = None
    """Split of DATA to evaluate on, as for effnet val: test (default), val, train, new or all."""

    def __post_init__(self) -> None:
        """Check `rounds`; batches and threads are checked when a backend is selected for them.

        Raises:
            ArgumentError: it is not a positive whole number.
        """
        if self.rounds is not None:
            positive_int("rounds", self.rounds)


DEFAULTS = BenchPlan()


def bench(
    model: str, plan: BenchPlan = DEFAULTS, data: str | None = None, *, progress: Progress = SILENT
) -> BenchReport:
    """Measure a model on every backend that can run it here.

    Args:
        model: as for effnet.load.
        plan: what is measured.
        data: labelled images: a folder of class folders, or a manifest. int8 is calibrated on its training images.
        progress: reports each step.

    Raises:
        ArgumentError: the machine does not have so many threads; an artifact was exported for another batch, or is to
            be measured in int8; or `data` is missing for int8 or the split.
        DataError: the images or their classes do not fit the model.
    """
    for option, value in (("split", plan.split), ("int8", plan.int8 or None)):
        if value and data is None:
            raise ArgumentError(option, value, f"needs images: effnet bench {shlex.quote(str(model))} DATA --{option}")
    opened = read_model(model, source=plan.source, progress=progress)
    with tempfile.TemporaryDirectory(prefix="effnet-bench-") as folder, _note_interrupts() as interrupts:
        images = (None, None) if data is None else _read_images(model, opened, data, plan)
        report = _Bench(model, opened, plan, interrupts, progress).run(Path(folder), *images)
    return dataclasses.replace(report, data=data)


def _read_images(name: str, model: Model, data: str, plan: BenchPlan) -> tuple[HeldOut, TrainVal | None]:
    """The images to evaluate on, and those that int8 is calibrated and checked on first."""
    classes = model.config.classes
    if classes is None:
        raise DataError(f"{name} has no class names for its outputs, so it cannot be evaluated on labelled images")
    dataset = match_outputs(read_data(data), classes, f"{name}'s")
    known = find_splits(name, dataset)
    held_out = hold_out(dataset, {name: known}, plan.split)
    return held_out, train_and_val(dataset, name, known) if plan.int8 else None


@contextmanager
def _note_interrupts() -> Iterator[list[int]]:
    """A list that grows with every Ctrl-C, since an import may turn the KeyboardInterrupt into an ImportError."""
    interrupts: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        signal.default_int_handler(number, frame)

    if signal.getsignal(signal.SIGINT) != signal.default_int_handler or current_thread() != main_thread():
        yield interrupts  # SIGINT is ignored or handled elsewhere, or this thread may not set a handler
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class _Bench:
    """One bench, step by step; if a backend fails, the others continue."""

    def __init__(self, name: str, model: Model, plan: BenchPlan, interrupts: list[int], progress: Progress) -> None:
        self.name, self.model, self.plan, self.interrupts, self.progress = name, model, plan, interrupts, progress
        self.input = model.config.input
        self.step = (isinstance(model, Artifact) and model.form.batch) or 1  # batch of an artifact
        smaller = (max(self.step, batch - batch % self.step) for batch in BATCHES)
        self.batches = tuple(sorted({*(plan.batches or smaller)}))
        self.selected = self._select()
        self.rows = {backend: BenchRow(backend) for backend in list_backends(model, int8=plan.int8)}
        self.models: dict[Backend, Model] = dict.fromkeys(self.rows, model)
        self.files: dict[Backend, str] = {}  # that a fresh process opens
        self.reference: Backend | None = None
        self.expected: Logits | None = None  # the reference's, on views
        self.found: Predicted | None = None  # the reference's, on labelled images

    def run(self, folder: Path, held_out: HeldOut | None, calibration: TrainVal | None) -> BenchReport:
        """Run all steps."""
        engines = dict.fromkeys(backend.engine for backend in self.rows)  # named as their packages
        versions = tuple(f"{name} {version_of(name)}" for name in engines)
        conditions = Conditions(self.plan.threads or this_machine().cores, versions, machine=this_machine())
        for row in self.rows:
            self._try(row, self._write_file, row, folder, calibration)
        for batch in self.batches:
            self._measure(batch, held_out.data if held_out else None)
        self._start_processes()
        report = BenchReport(
            model=self.name,
            resolution=self.input.size,
            conditions=conditions,
            batches=self.batches,
            rows=tuple(self.rows.values()),
            reference=self.reference,
            selected=self.selected,
            notes=list_absent(self.name, self.model, self.rows),
            split=held_out.split if held_out else None,
            images=len(self.found.labels) if self.found else 0,
            seen_in_training=held_out.trained if held_out else 0,
            caveats=held_out.notes if held_out else (),
            unreadable=self.found.unreadable if self.found else {},
        )
        return self._keep(report) if self.plan.keep else report

    def _write_file(self, row: Backend, folder: Path, calibration: TrainVal | None) -> None:
        """Write the file that a fresh process opens: an artifact for single images, or for other engines the model."""
        model = self.model
        if isinstance(model, Artifact) or row.engine not in FORMATS:
            self.files[row] = self.name
            self._set(row, file_bytes=bytes_of(model))
            return
        from effnet.exporting.export import export
        from effnet.exporting.int8 import export_int8

        format, suffix = FORMATS[row.engine]
        out = folder / f"{row.engine}-{row.precision}{suffix}"
        if row.precision != "int8":
            size = export(model, out, format=format, precision=row.precision).bytes
        elif calibration is None:
            raise ArgumentError("calibration", None, "must be given for int8.")
        else:
            size = export_int8(model, out, calibration, progress=self.progress).bytes
            self.models[row] = read_artifact(out)
        self.files[row] = str(out)
        self._set(row, file_bytes=size)

    def _measure(self, batch: int, images: Dataset | None) -> None:
        """Time all backends in turn; after the last batch compare their predictions, while they are open."""
        size, channels = self.input.size, self.input.channels
        pixels = np.resize(views(self.input, min(batch, VIEWS)), (batch, size, size, channels))
        sessions: dict[Backend, Session] = {}

        def open_parts(row: Backend) -> None:
            for backend in self._divide(row, batch):
                sessions[backend] = open_session(self.models[row], Selection(backend, batch, "measured"))
                sessions[backend](pixels)  # compiles

        def run_round() -> list[float]:
            return [self._try(backend, time_turn, partial(run, pixels)) or nan for backend, run in sessions.items()]

        try:
            for done, row in enumerate(self.rows, start=1):
                self._try(row, open_parts, row)
                self.progress.update(f"batch {batch}: compiling", done, len(self.rows))
            rounds: Any = {"runs": self.plan.rounds, "warmup": 1, "progress": self.progress}
            timings = time_rounds(run_round, task=f"batch {batch}, rounds", **rounds) if sessions else []
            times = [BatchTime(batch, *each) for each in zip(sessions, timings, strict=True)]
            for row, before in list(self.rows.items()):
                own = [time for time in times if engine_and_precision(time.backend) == row]
                if before.problem or not own:
                    continue
                fastest = max(own, key=lambda time: time.images_per_second)
                self._set(row, times=(*before.times, fastest))
                if batch == self.batches[-1]:
                    self._try(row, self._compare, row, sessions[fastest.backend], images)
        finally:
            for session in sessions.values():
                session.close()

    def _divide(self, row: Backend, batch: int) -> list[Backend]:
        """The backend with parts of the size by rule, and of half and twice that size as far as the batch allows."""
        model = self.models[row]
        artifact = model if isinstance(model, Artifact) else None
        pins: Any = {"engine": row.engine, "precision": row.precision, "threads": self.plan.threads}
        rule = select(model.config.spec, batch=batch, artifact=artifact, **pins).backend
        if rule.part is None or (artifact and artifact.form.batch):  # the part is the exported batch
            return [rule]
        parts = [part for part in (rule.part // 2, rule.part * 2) if 1 <= part <= batch // rule.streams]
        return [rule, *(dataclasses.replace(rule, part=part) for part in parts)]

    def _compare(self, row: Backend, session: Session, images: Dataset | None) -> None:
        """Compare a backend's predictions with the reference's; the first backend that works is the reference."""
        logits = session(views(self.input, VIEWS))
        if not np.isfinite(logits).all():
            raise CheckpointError("its outputs are not finite numbers")
        if self.expected is None:
            self.reference, self.expected = row, logits
        expected = self.expected
        difference = float(np.abs(logits - expected).max() / (np.abs(expected).max() or 1))
        same = int((logits.argmax(1) == expected.argmax(1)).sum())
        self._set(row, logit_difference=difference, same_class=wilson(same, VIEWS))
        if images is None or (self.found is None and row != self.reference):
            return
        batch, task = max(GROUP, *self.batches), f"{row}: labelled images"
        found = predict_logits(session, self.input, images, batch=batch, progress=self.progress, task=task)
        self.found = self.found or found
        if len(found.labels):
            self._set(row, accuracy=compare_top1(self.found.logits, found.logits, found.labels))

    def _start_processes(self) -> None:
        """Start fresh processes of all backends in turn."""
        found: dict[Backend, list[tuple[float, int]]] = {row: [] for row in self.files}
        for done in range(COLD_STARTS):
            for row, starts in found.items():
                pins: dict[str, Any] = {"engine": row.engine, "precision": row.precision, "threads": self.plan.threads}
                source = self.plan.source if row.engine not in FORMATS else None  # artifacts need none
                pins |= {"batch": self.step, "source": source}
                if start := self._try(row, measure_cold_start, self.files[row], pins):
                    starts.append(start)
                    seconds, held = (median(values) for values in zip(*starts, strict=True))
                    self._set(row, cold_start_seconds=seconds, peak_memory_bytes=round(held) or None)
            self.progress.update("starting fresh processes in turn", done + 1, COLD_STARTS)

    def _keep(self, report: BenchReport) -> BenchReport:
        """Make effnet.load use the fastest backend that agrees with the reference, for each batch."""
        rows = tuple(row for row in report.rows if self.models[row.backend] is self.model)  # without int8
        loadable, kept = dataclasses.replace(report, rows=rows), []
        for batch in self.batches:
            if (row := loadable.fastest(batch)) and (time := row.time(batch)) and row.same_class:
                agreement = f"the same class as {self.reference} for {row.same_class.value:.0%} of {VIEWS} views"
                reason = f"the fastest in effnet bench on this machine, {time.time.median_ms:.2f} ms; {agreement}"
                kept.append(Selection(time.backend, batch, reason))
        if not kept:
            return report
        file = keep_selection(self.model, kept, threads=self.plan.threads)
        return dataclasses.replace(report, selected=self._select(), kept=file)

    def _select(self) -> dict[int, Selection]:
        """What effnet.load uses for each batch when nothing is pinned."""
        return {batch: select_for(self.model, batch=batch, threads=self.plan.threads) for batch in self.batches}

    def _set(self, row: Backend, **values: Any) -> None:
        self.rows[row] = dataclasses.replace(self.rows[row], **values)

    def _try(self, backend: Backend, step: Callable[..., T], *arguments: Any) -> T | None:
        """The result of a step; None if the backend failed, in this step or before."""
        row = engine_and_precision(backend)
        if self.rows[row].problem:
            return None
        try:
            return step(*arguments)
        except Exception as error:  # engines have no common exception
            text = " ".join(str(error).split())
            clear = text and isinstance(error, (EffnetError, ChildProcessError))
            self._set(row, problem=text if clear else f"{type(error).__name__}: {text}")
            return None
        finally:
            if self.interrupts:
                raise KeyboardInterrupt
