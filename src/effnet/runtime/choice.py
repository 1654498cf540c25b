"""Which engine runs a network fastest on this machine: measured once with the network itself, and remembered.

First every engine and precision takes a single image, or as many as an artifact takes at least. Those that are far
behind others of their precision are out. The rest takes full batches in turn, in parts of a few images side by side
(Way.divided), and the fastest tries larger and smaller parts until neither is faster: how many images have their maps
in the cache depends on the network and the processor. The fastest wins; a lower precision only if it names nearly all
views of two photos as fp32 does.

What was found is kept in the user's cache (machine.cache_folder) under all that it depends on: the network, the
processor, the engines' versions, the batch and the threads. What was found beside programs that kept all cores busy is
measured again once they are gone. Needs no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effnet.arch.spec import InputSpec
from effnet.data.image import colour_mode, fit_photo, open_photo
from effnet.errors import ArgumentError, MissingExtraError
from effnet.fields import positive_int, read_fields
from effnet.files import write_file
from effnet.machine import cache_folder, load_average, this_machine
from effnet.metrics.intervals import wilson
from effnet.metrics.timing import TURN, turn
from effnet.runtime.engines import BATCH, Batches, EngineName, Precision, Way
from effnet.version import __version__

logger = logging.getLogger("effnet")

PHOTOS = Path(__file__).parents[1] / "data" / "photos"
NEEDED: dict[EngineName, tuple[str, ...]] = {
    "torch": (),
    "openvino": ("openvino",),
    "onnxruntime": ("onnxruntime", "onnx"),
}
LOOKS = 2  # rounds after which those that are far behind are out
BEHIND = 2.0  # times the best of the same precision, which is far
SECOND = 1.0  # that a batch may take where nobody says how large it is
PATIENCE = 1.5  # seconds that a race may take, and as many that the views may
FEWEST, MOST = 4, 12  # rounds
GAIN = 0.97  # of the time, which other parts must not exceed: less is noise
VIEWS, FEWEST_VIEWS = 64, 8  # of the packaged photos
AGREE = 0.95  # share of the views that a lower precision must name as fp32 does


@dataclass(frozen=True)
class Question:
    """What a choice depends on, beside the machine."""

    subject: str  # a digest of the network, or of the artifact
    input: InputSpec
    ways: tuple[Way, ...]  # for a batch as a whole; the first one is exact
    batch: int | None = None  # images of a full batch; None: as many as take a second, BATCH at most or if unmeasured
    step: int = 1  # images that the smallest session takes
    threads: int | None = None  # None: one for each core
    fixed: tuple[EngineName, ...] = ()  # engines whose requests take `step` images and no other number
    agree: float = AGREE  # share of the views that a lower precision must name as the exact one does; 0: unasked

    def divided(self, way: Way, batch: int) -> list[Way]:
        """How full batches may go through, before anything is measured."""
        fixed = way.engine in self.fixed
        return way.divided(batch, step=self.step if fixed else 1, threads=self.threads, fixed=fixed)

    def neighbours(self, way: Way, batch: int) -> list[Way]:
        """The same with parts of half and of twice as many images, where there can be."""
        if way.part is None or way.engine in self.fixed:
            return []
        parts = [part for part in (way.part // 2, way.part * 2) if part and part * way.streams <= batch]
        return [dataclasses.replace(way, part=part) for part in parts]


@dataclass(frozen=True)
class Measured:
    """How long a way took for a full batch."""

    way: Way
    ms: float  # lower quartile of the rounds: what else runs on a machine makes a round longer, never shorter


@dataclass(frozen=True)
class Choice:
    """What runs a network, and why."""

    way: Way
    batch: int  # images of a full batch
    measured: tuple[Measured, ...] = ()  # those that took part to the end, fastest first; none: there was no choice
    same: int = 0  # views of photos that a lower precision names as fp32 does
    views: int = 0  # 0 where no lower precision was fastest
    refused: tuple[str, ...] = ()  # lower precisions that were faster and named too many views otherwise
    busy: bool = False  # whether other programs kept all cores busy when this was measured

    def __post_init__(self) -> None:
        """Check what may have been read from a file.

        Raises:
            ArgumentError: a value is outside its range.
        """
        positive_int("batch", self.batch)
        if self.measured and self.way not in [each.way for each in self.measured]:
            raise ArgumentError("way", str(self.way), "must be among those that were measured.")

    def __str__(self) -> str:
        if not self.measured:
            return f"{self.way}: there was nothing to choose between"
        mine = next(each.ms for each in self.measured if each.way == self.way)
        words = [f"{self.way}: {mine / self.batch:.2f} ms an image in batches of {self.batch}"]
        rest = [each for each in self.measured if (each.way.engine, each.way.precision) != _kind(self.way)]
        words += [f"{each.way} took {each.ms / mine:.2f} times as long" for each in rest[:1]]
        if self.views:
            share = wilson(self.same, self.views)
            words.append(f"{self.same} of {self.views} views of photos are named as in fp32 (at least {share.low:.0%})")
        words += self.refused
        words += ["measured on a busy machine, so measured again when it is not"] if self.busy else []
        return "; ".join(words)


def installed(name: str) -> bool:
    """Whether a package can be imported."""
    try:
        return find_spec(name) is not None
    except ValueError:  # something stands in for it
        return False


def ways_of_network(engine: EngineName | None, precision: Precision | None) -> tuple[Way, ...]:
    """The ways of running a network that is in memory, among what is installed here and fast; exact ones first.

    Args:
        engine: the only one that may run it; None: whatever is installed.
        precision: the only one that it may compute with; None: fp32, and bf16 where the processor multiplies it.

    Raises:
        ArgumentError: no engine computes so with a network in memory.
        MissingExtraError: the only engine that does is not installed.
    """
    if precision == "int8":
        rule = "takes images to calibrate on: effnet export MODEL DATA --precision int8 makes an artifact of them."
        raise ArgumentError("precision", precision, rule)
    engines = [engine] if engine else [name for name, needed in NEEDED.items() if all(map(installed, needed))]
    if precision is not None:
        known = [name for name in engines if engine or precision == "fp32" or name == "openvino"]
        if not known:
            raise MissingExtraError(f"computing in {precision}", "openvino")
        return tuple(Way(name, precision) for name in known)
    lower = [Way("openvino", "bf16")] if "openvino" in engines and this_machine().bf16 else []
    return (*(Way(name) for name in engines), *lower)


def choose(question: Question, open: Callable[[Way, int], Batches]) -> Choice:
    """The fastest way, from the cache where it was measured before.

    Args:
        question: what there is to choose between.
        open: a network that is run in a way, in batches of so many images.
    """
    if len(question.ways) == 1:
        batch = _whole(question.batch or BATCH, question.step)
        divided = question.divided(question.ways[0], batch)
        if question.batch is None or divided == [question.ways[0]]:
            return Choice(divided[-1], batch)
    conditions = _conditions(question)
    file = cache_folder() / "choices" / f"{_digest(conditions)}.json"
    known = _remembered(file)
    busy = this_machine().busy(load_average())
    if known is not None and _kind(known.way) in map(_kind, question.ways) and (busy or not known.busy):
        return known
    choice = dataclasses.replace(_measure(question, open), busy=busy)
    with suppress(OSError):  # a home that cannot be written to costs the measurement each time
        file.parent.mkdir(parents=True, exist_ok=True)
        with write_file(file) as temporary:
            temporary.write_text(json.dumps({"conditions": conditions, "choice": dataclasses.asdict(choice)}, indent=1))
    return choice


def _measure(question: Question, open: Callable[[Way, int], Batches]) -> Choice:
    with ExitStack() as stack:

        def opened(way: Way, batch: int) -> Batches:
            run = open(way, batch)
            stack.callback(run.close)
            return run

        few = views(question.input, question.step)
        runs = _working(question.ways, lambda way: opened(way, question.step), few)
        laps = _race(runs, few, LOOKS)
        batch = question.batch or min(BATCH, max(1, int(SECOND / (laps[0].ms / 1e3 / question.step))))
        batch = _whole(batch, question.step)
        ways = [way for lap in laps for way in question.divided(lap.way, batch)]
        pixels = np.resize(few, (batch, *few.shape[1:]))
        if batch > question.step or ways != [lap.way for lap in laps]:
            stack.close()
            runs = _working(ways, lambda way: opened(way, batch), pixels)
        choice = _settle(question, _race({way: runs[way] for way in ways if way in runs}, pixels), batch, runs)
        for way, run in runs.items():
            if way != choice.way:
                run.close()
        return _climb(question, choice, runs[choice.way], lambda way: opened(way, batch), pixels)


def _working(
    ways: Sequence[Way], open: Callable[[Way], Batches], pixels: NDArray[np.uint8], *, needed: bool = True
) -> dict[Way, Batches]:
    """The ways that answer: one that fails is left out with a warning, unless one is needed and none works."""
    runs: dict[Way, Batches] = {}
    for way in ways:
        logger.info("opening %s", way)
        try:
            run = open(way)
            run(pixels)
        except Exception as error:  # whatever an engine fails with
            if needed and way == ways[-1] and not runs:
                raise
            logger.warning("%s is left out, for it fails: %s", way, error)
        else:
            runs[way] = run
    return runs


def _race(runs: Mapping[Way, Batches], pixels: NDArray[np.uint8], most: int = MOST) -> list[Measured]:
    """The ways' times for these images, fastest first, without those that are far behind after LOOKS rounds."""
    laps: dict[Way, list[float]] = {way: [] for way in runs}
    number, rounds = 0, most
    while number < rounds:
        number += 1
        logger.info("timing %s, %d of %d", " and ".join(map(str, laps)), number, rounds)
        for way, taken in laps.items():
            taken.append(turn(partial(runs[way], pixels)))
        if number == LOOKS:
            once = {way: min(taken) for way, taken in laps.items()}
            best = {each.precision: min(once[way] for way in laps if way.precision == each.precision) for each in laps}
            laps = {way: taken for way, taken in laps.items() if once[way] <= BEHIND * best[way.precision]}
            fit = int(PATIENCE / sum(2 * once[way] + TURN for way in laps))
            rounds = LOOKS if len(laps) == 1 else min(most, max(FEWEST, fit))
    quartiles = {way: statistics.quantiles(taken, n=4, method="inclusive")[0] for way, taken in laps.items()}
    return _sorted(Measured(way, 1e3 * taken) for way, taken in quartiles.items())


def _sorted(laps: Iterable[Measured]) -> list[Measured]:
    """The fastest first."""
    return sorted(laps, key=lambda lap: lap.ms)


def _climb(
    question: Question, choice: Choice, run: Batches, open: Callable[[Way], Batches], pixels: NDArray[np.uint8]
) -> Choice:
    """The choice with larger and smaller parts of its way, until neither is faster; all but the fastest are closed."""
    tried = {lap.way for lap in choice.measured}
    while others := [way for way in question.neighbours(choice.way, choice.batch) if way not in tried]:
        tried.update(others)
        near = {choice.way: run, **_working(others, open, pixels, needed=False)}
        times = {lap.way: lap.ms for lap in _race(near, pixels)}
        before = next(lap.ms for lap in choice.measured if lap.way == choice.way)
        drift = before / times.pop(choice.way, before)  # since the race before
        laps = [*choice.measured, *(Measured(way, ms * drift) for way, ms in times.items())]
        best = min(times, key=times.__getitem__, default=choice.way)
        if best in times and times[best] * drift > GAIN * before:
            best = choice.way
        choice = dataclasses.replace(choice, way=best, measured=tuple(_sorted(laps)))
        run = near.pop(best)
        for other in near.values():
            other.close()
    return choice


def _settle(question: Question, laps: Sequence[Measured], batch: int, runs: Mapping[Way, Batches]) -> Choice:
    """The fastest way that is exact, or that names the views as the exact one does."""
    exact = question.ways[0].precision
    reference = next((lap.way for lap in laps if lap.way.precision == exact), laps[0].way)
    refused: list[str] = []
    kinds: set[tuple[str, str]] = set()
    for lap in laps:
        if lap.way.precision == exact or not question.agree:
            return Choice(lap.way, batch, tuple(laps), refused=tuple(refused))
        if _kind(lap.way) in kinds:
            continue
        kinds.add(_kind(lap.way))
        logger.info("comparing %s with %s", lap.way, reference)
        count = min(VIEWS, max(FEWEST_VIEWS, int(PATIENCE / (2 * lap.ms / 1e3 / batch))))
        seen = views(question.input, count)
        same = int((runs[lap.way](seen).argmax(1) == runs[reference](seen).argmax(1)).sum())
        if same >= question.agree * count:
            return Choice(lap.way, batch, tuple(laps), same, count, tuple(refused))
        refused.append(f"{lap.way} is faster, but names {count - same} of {count} views of photos otherwise")
    return Choice(reference, batch, tuple(laps), refused=tuple(refused))


def views(see: InputSpec, count: int) -> NDArray[np.uint8]:
    """(count, size, size, C) uint8: parts of the packaged photos, or noise where the network sees no photos."""
    random = np.random.default_rng(0)
    if see.channels not in (1, 3):
        return random.integers(0, 256, (count, see.size, see.size, see.channels), dtype=np.uint8)
    photos = [open_photo(file, colour_mode(see)) for file in sorted(PHOTOS.glob("*.png"))]
    found = []
    for number in range(count):
        photo = photos[number % len(photos)]
        share = random.uniform(0.6, 1)  # of the sides
        left, top = (random.uniform(0, side * (1 - share)) for side in photo.size)
        box = round(left), round(top), round(left + share * photo.width), round(top + share * photo.height)
        part = fit_photo(photo.crop(box), see)
        found.append(part[:, ::-1] if random.random() < 0.5 else part)
    return np.stack(found)


def _whole(batch: int, step: int) -> int:
    """The largest multiple of `step` up to `batch`, and at least one."""
    return max(step, batch - batch % step)


def _kind(way: Way) -> tuple[str, str]:
    return way.engine, way.precision


def _conditions(question: Question) -> dict[str, Any]:
    """All that a choice depends on."""
    versions = {way.engine: version_of(way.engine) for way in question.ways}
    limits = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}  # torch's
    machine = dataclasses.asdict(this_machine()) | limits
    about = {"machine": machine, "versions": versions, "effnet": __version__}
    return dataclasses.asdict(question) | about


def version_of(engine: str) -> str:
    """Of the package that an engine is named after; "unknown" where it was installed under another name."""
    try:
        return version(engine)
    except PackageNotFoundError:
        return "unknown"


def _digest(conditions: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:24]


def _remembered(file: Path) -> Choice | None:
    """What was found before; nothing where the file is missing, damaged, or of another effnet."""
    try:
        values = json.loads(file.read_text())["choice"]
        laps = tuple(Measured(read_fields(Way, lap["way"]), float(lap["ms"])) for lap in values["measured"])
        rest = {"way": read_fields(Way, values["way"]), "measured": laps, "refused": tuple(values["refused"])}
        return read_fields(Choice, {**values, **rest})
    except (OSError, ValueError, KeyError, TypeError, ArgumentError):
        return None
