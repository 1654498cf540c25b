"""Every engine and precision side by side: how fast, how large, how soon, and whether it still answers the same.

- Speed: all ways take the same batch in turn, round after round, so that a disturbance meets all of them. A batch is
  divided as Backend.divided does, and the way that effnet.load takes also as effnet.load found it fastest; the fastest
  counts.
- Answers: logits and classes beside those of the first way, on views of two photos and, where there are any, on images
  with known classes, which all of them see decoded once.
- Starts: fresh processes in turn, the files in the system's cache; starts.py.
- Which of them effnet.load takes by itself is asked of effnet.load first, so that the very same takes part.

A way that fails keeps what was measured of it until then, and says why. Needs torch only for networks.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effnet.arch.spec import InputSpec
from effnet.benchmarking.cold_start import start
from effnet.benchmarking.report import Answers, Lap, Row, Scene, Standings
from effnet.benchmarking.subjects import Subject
from effnet.data.dataset import Dataset
from effnet.errors import ArgumentError, CheckpointError, EffnetError
from effnet.exporting.int8 import Guard, Watch, unwatched
from effnet.fields import positive_int
from effnet.machine import load_average, this_machine
from effnet.metrics.evaluate import predict_logits
from effnet.metrics.intervals import compare, wilson
from effnet.metrics.timing import time_rounds, turn
from effnet.runtime.agreement import VIEWS, views
from effnet.runtime.classifier import load
from effnet.runtime.graph import Array
from effnet.runtime.select import Selection, version_of
from effnet.runtime.session import Backend, Session

BATCHES = 1, 32
STARTS = 3  # processes for each way
TOGETHER = 16  # images with known classes that go together, or a full batch where that is more

Attempt = Callable[[Backend], AbstractContextManager[None]]  # what fails in it is the way's problem


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    batches: tuple[int, ...] | None = None  # None: BATCHES, or what is next below them for an artifact
    rounds: int | None = None  # None: as many as fit into 20 seconds, at least 7 and at most 30
    threads: int | None = None  # None: one for each core
    data: Dataset | None = None  # images with known classes, labels in the order of the model's outputs
    guard: Guard | None = None  # what int8 is calibrated and judged on

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ArgumentError: a value is outside its range.
        """
        for name, value in (("rounds", self.rounds), ("threads", self.threads)):
            if value is not None:
                positive_int(name, value)
        for batch in self.batches or ():
            positive_int("batch", batch)


def bench(subject: Subject, plan: Plan, *, watch: Watch = unwatched) -> Standings:
    """Measure a model in every way that it can be run here.

    Args:
        subject: as open_subject gives it, opened for the threads of the plan.
        plan: what is measured.
        watch: is told what is being done and what is counted; gives a function that is told how many of how many.

    Raises:
        ArgumentError: an artifact does not take such a batch.
    """
    return _Measuring(subject, plan, watch).standings()


class _Measuring:
    """One bench, step by step; what fails goes on without its way."""

    def __init__(self, subject: Subject, plan: Plan, watch: Watch) -> None:
        self.subject, self.plan, self.watch = subject, plan, watch
        self.see = subject.config.input
        self.batches = _batches(plan.batches, subject)
        self.rows = {way: Row(way) for way in subject.ways}
        self.notes = list(subject.left_out)
        self.reference: Backend | None = None
        self.images, self.unreadable = 0, dict[str, str]()

    def standings(self) -> Standings:
        """All steps."""
        engines = dict.fromkeys(way.engine for way in self.rows)  # they are named as their packages are
        versions = tuple(f"{name} {version_of(name)}" for name in engines)
        machine, before = this_machine(), load_average()
        scene = Scene(machine, self.plan.threads or machine.cores, before, versions)
        with tempfile.TemporaryDirectory(prefix="effnet-bench-") as folder:
            self._keep(Path(folder))
            chosen = self._ask()
            for batch in self.batches:
                self._race(batch, chosen)
            self._start()
        return Standings(
            self.subject.model,
            self.see.size,
            scene,
            self.batches,
            tuple(self.rows.values()),
            self.reference,
            VIEWS,
            chosen,
            tuple(self.notes),
            self.images,
            self.unreadable,
        )

    def _keep(self, folder: Path) -> None:
        """The file of each way."""
        for way in self.rows:
            with self._attempt(way), self.watch(f"writing {way}", "files"):
                self._note(way, kept=self.subject.keep(way, folder, self.plan.guard))

    def _race(self, batch: int, chosen: Mapping[int, Selection]) -> None:
        """All ways in turn; after the last batch they answer, while they are open."""
        pixels = np.resize(views(self.see, min(batch, VIEWS)), (batch, self.see.size, self.see.size, self.see.channels))
        runs: dict[Backend, Session] = {}
        try:
            known = [chosen[batch].backend] if batch in chosen else []
            ways = self._open(batch, pixels, runs, known)
            left = set(ways)

            def lap(way: Backend) -> float:
                return turn(lambda: runs[way](pixels))

            def round_of_all() -> list[float]:
                laps = dict.fromkeys(ways, math.nan)
                for way in [way for way in ways if way in left]:
                    left.discard(way)
                    with self._attempt(way):
                        laps[way] = lap(way)
                        left.add(way)
                return list(laps.values())

            with self.watch(f"batch {batch}: {len(ways)} ways in turn", "rounds") as progress:
                timings = time_rounds(round_of_all, runs=self.plan.rounds, warmup=1, progress=progress) if ways else []
            for way, timing in zip(ways, timings, strict=True):
                if way in left:
                    self._note_lap(_whole(way), Lap(batch, way, timing))
            if batch == self.batches[-1]:
                laps = {row: each.lap(batch) for row, each in self.rows.items()}
                self._compare({row: runs[lap.way] for row, lap in laps.items() if lap and lap.way in left})
        finally:
            for run in runs.values():
                run.close()

    def _open(
        self, batch: int, pixels: NDArray[np.uint8], runs: dict[Backend, Session], known: Sequence[Backend]
    ) -> list[Backend]:
        """Open every way, divided as it may be and as it is known to be fast, into `runs`; those that work."""
        working: list[Backend] = []
        divided = [self.subject.divided(each, batch) for each in self.rows]
        ways = list(dict.fromkeys([*divided, *(way for way in known if _whole(way) in self.rows)]))
        with self.watch(f"batch {batch}: compiling", "ways") as progress:
            for done, way in enumerate(ways, start=1):
                with self._attempt(way):
                    run = runs[way] = self.subject.open(way, batch, self.rows[_whole(way)].kept)
                    run(pixels)  # compiles
                    working.append(way)
                progress(done, len(ways))
        return working

    def _compare(self, runs: Mapping[Backend, Session]) -> None:
        """Answers of every way beside those of the first that gives any."""
        seen, logits = views(self.see, VIEWS), dict[Backend, Array]()
        with self.watch("comparing answers", "ways") as progress:
            for done, (way, run) in enumerate(runs.items(), start=1):
                with self._attempt(way):
                    logits[way] = _finite(run(seen))
                progress(done, len(runs))
        if not logits:
            return
        self.reference = next(iter(logits))
        expected = logits[self.reference]
        for way, got in logits.items():
            difference, same = float(np.abs(got - expected).max()), int((got.argmax(1) == expected.argmax(1)).sum())
            share = difference / (float(np.abs(expected).max()) or 1.0)
            self._note(way, answers=Answers(difference, share, wilson(same, VIEWS)))
        if self.plan.data is not None:
            with self._attempt(self.reference):
                self._judge(self.plan.data, self.reference, {way: runs[way] for way in logits})

    def _judge(self, data: Dataset, reference: Backend, runs: Mapping[Backend, Session]) -> None:
        """Accuracy of every way, on images that are decoded once."""
        asked = _Together(self.see, reference, runs, self._attempt)
        with self.watch(f"{len(runs)} ways on images with known classes", "images") as progress:
            found = predict_logits(asked, data, batch=max(TOGETHER, *self.batches), progress=progress)
        self.images, self.unreadable = len(found.labels), found.unreadable
        for way in asked.left if self.images else ():
            logits = np.concatenate([answers[way] for answers in asked.said])
            self._note(way, accuracy=compare(found.logits, logits, found.labels))

    def _ask(self) -> dict[int, Selection]:
        """What effnet.load takes by itself."""
        chosen: dict[int, Selection] = {}
        how: Any = {"source": self.subject.source, "threads": self.plan.threads}
        with self.watch("asking effnet.load what it takes", "batches") as progress:
            for done, batch in enumerate(self.batches, start=1):
                try:
                    with load(self.subject.model, batch=batch, **how) as classifier:
                        chosen |= {batch: classifier.selection} if classifier.selection else {}
                except Exception as error:  # of an engine, as everywhere here
                    self.notes.append(f"effnet.load(..., batch={batch}) fails: {_reason(error)}")
                progress(done, len(self.batches))
        return chosen

    def _start(self) -> None:
        """Fresh processes in turn."""
        left = [way for way, row in self.rows.items() if row.kept]
        with self.watch("starting fresh processes in turn", "starts") as progress:
            for done, way in enumerate(left * STARTS, start=1):
                row, how = self.rows[way], self._how(way)
                if row.kept and not row.problem:
                    with self._attempt(way):
                        self._note(way, starts=(*row.starts, start(row.kept.model, self.see, how)))
                progress(done, len(left) * STARTS)

    def _how(self, way: Backend) -> dict[str, Any]:
        """What effnet.load is told in a fresh process; the artifacts that were written need no source."""
        how = {"engine": way.engine, "precision": way.precision, "batch": self.subject.step}
        source = self.subject.source if way.engine == "torch" else None
        return how | {"threads": self.plan.threads, "source": source}

    def _note(self, way: Backend, **values: Any) -> None:
        self.rows[way] = dataclasses.replace(self.rows[way], **values)

    def _note_lap(self, way: Backend, lap: Lap) -> None:
        """The faster one for each batch stays."""
        others = tuple(each for each in self.rows[way].laps if each.batch != lap.batch)
        known = self.rows[way].lap(lap.batch)
        best = lap if known is None else min(known, lap, key=lambda each: each.time.median_ms)
        self._note(way, laps=(*others, best))

    @contextmanager
    def _attempt(self, way: Backend) -> Iterator[None]:
        """What fails here is the way's problem; the first one is told."""
        try:
            yield
        except Exception as error:  # of engines: there is no common kind
            whole = _whole(way)
            self._note(whole, problem=self.rows[whole].problem or _reason(error))


class _Together:
    """What predict_logits asks: every way at once, though it sees the reference's answers alone."""

    def __init__(self, see: InputSpec, reference: Backend, runs: Mapping[Backend, Session], attempt: Attempt) -> None:
        self.input, self.reference, self.attempt = see, reference, attempt
        self.left = dict(runs)
        self.said: list[dict[Backend, Array]] = []

    def logits(self, images: NDArray[np.uint8], /) -> Array:
        """The reference's; those of all are kept."""
        answers = {self.reference: self.left[self.reference](images)}
        for way, run in self.left.items():
            if way != self.reference:
                with self.attempt(way):
                    answers[way] = _finite(run(images))
        self.left = {way: run for way, run in self.left.items() if way in answers}
        self.said.append(answers)
        return answers[self.reference]


def _finite(logits: Array) -> Array:
    if not np.isfinite(logits).all():
        raise CheckpointError("its outputs are not finite numbers")
    return logits


def _batches(wanted: Sequence[int] | None, subject: Subject) -> tuple[int, ...]:
    """Every batch once, the smallest first."""
    step = subject.step
    if wanted is None:
        wanted = [max(step, batch - batch % step) for batch in BATCHES]
    for batch in wanted:
        if batch % step:
            rule = f"cannot be measured: {subject.model} was exported for {step}; it takes a multiple of that."
            raise ArgumentError("batch", batch, rule)
    return tuple(sorted(set(wanted)))


def _whole(way: Backend) -> Backend:
    """The way of whole batches, which its row is about."""
    return dataclasses.replace(way, streams=1, part=None, threads=None)


def _reason(error: Exception) -> str:
    """An error on one line."""
    words, told = " ".join(str(error).split()), isinstance(error, (EffnetError, ChildProcessError))
    return words if told and words else f"{type(error).__name__}: {words}"
