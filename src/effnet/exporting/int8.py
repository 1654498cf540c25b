"""int8: a network's OpenVINO graph in 8 bits, but for the parts that it needs in float to stay accurate.

NNCF, which is OpenVINO's own, finds the ranges, all of them around 0: weights have one for each channel, maps one each.
Ranges that follow SiLU's, from -0.28 upwards, were no more accurate and 7 % slower on B0. NNCF leaves the two small
convolutions of squeeze-and-excitation in float by itself; the factors that they make, and the product, are in 8 bits.

1. Training images, and no others, calibrate: the ranges are those of the maps that they make.
2. fp32 and int8 are judged on the same val images, in the same engine. The drop is what int8 has less of top-1, in
   points; the drop counted there has to keep within the limit, and its interval says what other images may show.
3. Where it does not, every part is measured: int8 with this part alone in float, by how far its logits are from
   fp32's for calibration images. The part that leaves least goes back to float, and the network is judged again; then
   the next one, too. Where ATTEMPTS versions or all parts are not enough, the network is refused.

Every version that is judged looks at the same val images again, and the first that holds is taken. So the drop of a
later version flatters a little, by luck that was chosen; how many were judged is always told. Test images, asked once,
say what is true.

ONNX Runtime is no engine for this: on a processor with VNNI, B0 and Lite0 at 32 and 96 px took it 2.3 to 3.7 times as
long in NNCF's 8 bits as in fp32, where OpenVINO took 0.4 to 0.7 of the time.
"""

from __future__ import annotations

import io
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from effnet.arch.spec import InputSpec, NetworkSpec
from effnet.data.dataset import Dataset, Sample
from effnet.data.image import load_pixels
from effnet.data.paths import read_ahead
from effnet.errors import ArgumentError, DataError, ImageError, MissingExtraError, RefusedError
from effnet.metrics.evaluate import READERS, Predicted, predict_logits
from effnet.metrics.intervals import Difference, Interval, compare, wilson
from effnet.runtime import openvino
from effnet.runtime.graph import Array, Network

Pixels = NDArray[np.uint8]
Progress = Callable[[int, int], None]  # done, and in all
Watch = Callable[[str, str], AbstractContextManager[Progress]]  # what is being done, and what is counted

MAX_DROP = 0.5  # points of top-1
CALIBRATING = 300  # images, NNCF's own default
GROUP = 16  # images that are judged together, or the next multiple of what a model takes
MEASURING = 64  # of them, on which each part is measured
ATTEMPTS = 6  # versions that are judged at most: more looks would choose by luck
BLOCKS = 24  # up to which each block is a part; in deeper networks each stage is one
SQUEEZES = "squeeze-and-excitation"
LOUD = "nncf", "torch.utils.cpp_extension"  # loggers; NNCF imports torch's, which tells where it looks for CUDA
UNREPORTED = "NNCF_CI"  # with this in its environment NNCF sends no reports of its use


@contextmanager
def unwatched(doing: str, of: str) -> Iterator[Progress]:
    """Nobody looks."""
    yield lambda done, total: None


@dataclass(frozen=True)
class Guard:
    """What an int8 network is calibrated and judged on, and how far it may fall behind."""

    calibration: Dataset  # training images
    val: Dataset  # images that it was not trained on, with labels in the order of its outputs
    max_drop: float = MAX_DROP  # points of top-1 that int8 may have less than fp32 on these
    watch: Watch = unwatched

    def __post_init__(self) -> None:
        """Check that the limit makes sense and that no image is in both.

        Raises:
            ArgumentError: it does not.
            DataError: an image would be judged by what it calibrated, or there is none.
        """
        if not 0 <= self.max_drop < 100:
            raise ArgumentError("max_drop", self.max_drop, "must be points of top-1: at least 0 and below 100.")
        for name, part in (("calibrate", self.calibration), ("judge", self.val)):
            if not len(part):
                raise DataError(f"there is no image to {name} int8 with")
        judging = {self.val.file(sample) for sample in self.val.samples}
        both = [file for sample in self.calibration.samples if (file := self.calibration.file(sample)) in judging]
        if both:
            raise DataError(f"{both[0]} would calibrate int8 and judge it; an image may do one of the two")


@dataclass(frozen=True)
class Attempt:
    """An int8 version of a network, judged on the val images."""

    kept: tuple[str, ...]  # parts in float
    found: Difference  # a is fp32, b is int8
    agreement: Interval  # share of the images of which both name the same class

    @property
    def drop(self) -> float:
        """Points of top-1 that int8 has less than fp32; negative where it has more."""
        return 100 * (self.found.only_a - self.found.only_b) / self.found.n

    @property
    def bounds(self) -> tuple[float, float]:
        """The drop's interval at 95 %, in points."""
        return -100 * self.found.accuracy.high, -100 * self.found.accuracy.low

    def __str__(self) -> str:
        low, high = self.bounds
        return f"{listed(self.kept)} in float: {self.drop:+.2f} points lost ({low:+.2f} to {high:+.2f})"


@dataclass(frozen=True)
class Ranked:
    """How far int8's logits are from fp32's with one part in float, as a share of the mean logit."""

    whole: float  # with no part in float
    parts: Mapping[str, float]  # by part, least first; only those that are nearer than the whole


@dataclass(frozen=True)
class Guarded:
    """An int8 network that kept within the limit."""

    model: Any  # OpenVINO's, for the batch that was asked for: other batches round otherwise, by a step of 8 bits
    attempts: tuple[Attempt, ...]  # the last one is the model's
    calibrated: int  # images
    unreadable: int  # images of the val part that could not be judged


class Candidate(NamedTuple):
    """What predict_logits asks."""

    input: InputSpec
    logits: Callable[[Pixels], Array]


def guarded(network: Network, guard: Guard, batch: int | None = 1) -> Guarded:
    """The network in int8, with as few parts in float as hold the guard's limit.

    Args:
        network: what it is made of.
        guard: the images and the limit.
        batch: images that it takes at once; None: any number.

    Raises:
        RefusedError: no version held it; the message says what was tried.
        DataError: no image can be read.
        MissingExtraError: NNCF or OpenVINO is not installed.
    """
    model = openvino.make(network, 1, {})
    _nncf()  # asked before anything takes time
    with guard.watch("reading training images", "images") as progress:
        pixels = calibration_pixels(guard.calibration, network.input, progress)
    reference = _judge(openvino.for_batch(model, batch), network, guard, "fp32")
    kept: tuple[str, ...] = ()
    attempts: list[Attempt] = []
    ranked: Ranked | None = None
    while True:
        words = f"int8, {listed(kept)} in float"
        with guard.watch(f"{words}: finding ranges", "parts"):
            made = openvino.for_batch(quantize(model, pixels, network.spec, kept), batch)
        attempts.append(_attempt(kept, reference, _judge(made, network, guard, words)))
        if attempts[-1].drop <= guard.max_drop:
            return Guarded(made, tuple(attempts), len(pixels), len(reference.unreadable))
        if ranked is None:
            with guard.watch("measuring what each part loses", "parts") as progress:
                ranked = rank(model, pixels[:MEASURING], network.spec, progress)
        if len(attempts) == ATTEMPTS or len(kept) == len(ranked.parts):
            raise RefusedError(_refusal(attempts, ranked, guard.max_drop))
        kept = tuple(ranked.parts)[: len(kept) + 1]


def parts_of(spec: NetworkSpec) -> dict[str, tuple[str, ...]]:
    """What can go back to float: for each part the names of its layers, without their ends."""
    blocks: dict[str, tuple[str, ...]] = {}
    for block in spec.blocks:
        name = block.name if len(spec.blocks) <= BLOCKS else block.name.rpartition(".")[0]
        blocks[name] = (*blocks.get(name, ()), block.name)
    squeezes = tuple(f"{block.name}.se" for block in spec.blocks if block.squeeze_channels)
    return {
        "stem": ("stem",),
        **({SQUEEZES: squeezes} if squeezes else {}),
        **blocks,
        **({"head": ("head",)} if spec.head else {}),
        "classifier": ("classifier",),
    }


def quantize(model: Any, pixels: Pixels, spec: NetworkSpec, kept: Sequence[str] = ()) -> Any:
    """An OpenVINO model in 8 bits; the one that is given stays as it is.

    Args:
        model: of one image.
        pixels: (N, size, size, C) uint8 that calibrate it.
        spec: of its network.
        kept: parts that stay in float, of `parts_of`.

    Raises:
        MissingExtraError: NNCF is not installed.
    """
    nncf = _nncf()
    heads = tuple(f"{layer}." for part in kept for layer in parts_of(spec)[part])
    names = [op.get_friendly_name() for op in model.get_ordered_ops() if op.get_friendly_name().startswith(heads)]
    with _quiet(*LOUD):
        return nncf.quantize(
            model.clone(),
            nncf.Dataset([image[None] for image in pixels]),
            subset_size=len(pixels),
            ignored_scope=nncf.IgnoredScope(names=names) if names else None,
        )


def rank(model: Any, pixels: Pixels, spec: NetworkSpec, progress: Progress = lambda done, total: None) -> Ranked:
    """The parts of a network by what is left of int8's error when each of them alone stays in float.

    Args:
        model: of one image, in fp32.
        pixels: (N, size, size, C) uint8: they calibrate, and the error is that of their logits.
        spec: of its network.
        progress: called with parts done and parts in all.
    """
    expected = answers(model)(pixels)
    scale = float(np.abs(expected).mean()) or 1.0

    def error(kept: Sequence[str]) -> float:
        found = answers(quantize(model, pixels, spec, kept))(pixels)
        return float(np.abs(found - expected).mean()) / scale

    names, whole = tuple(parts_of(spec)), error(())
    errors: dict[str, float] = {}
    for done, name in enumerate(names, start=1):
        errors[name] = error((name,))
        progress(done, len(names))
    return Ranked(whole, {name: errors[name] for name in sorted(names, key=errors.__getitem__) if errors[name] < whole})


def calibration_pixels(dataset: Dataset, see: InputSpec, progress: Progress = lambda done, total: None) -> Pixels:
    """At most CALIBRATING of the images, drawn at random but always the same: (N, size, size, C) uint8.

    Those that cannot be read are passed over.

    Raises:
        DataError: none can be read.
    """

    def read(sample: Sample) -> Pixels:
        return load_pixels(dataset.file(sample), see)

    drawn = random.Random(0).sample(dataset.samples, len(dataset))
    total = min(CALIBRATING, len(drawn))
    found: list[Pixels] = []
    reading = read_ahead(drawn, read, threads=READERS, window=2 * READERS)
    for _, pixels in reading:
        if not isinstance(pixels, ImageError):
            found.append(pixels)
            progress(len(found), total)
        if len(found) == total:
            break
    if not found:
        raise DataError(f"none of the {len(dataset):,} training images in {dataset.root} can be read")
    return np.stack(found)


def eight_bits(model: Any) -> dict[str, bool]:
    """For every convolution and matrix product by name whether its weights are in 8 bits."""
    found = {}
    for op in model.get_ordered_ops():
        if op.get_type_name() in ("Convolution", "GroupConvolution", "MatMul"):
            weights = op.input_value(1).get_node()
            while weights.get_type_name() != "Constant":
                weights = weights.input_value(0).get_node()
            found[op.get_friendly_name().rpartition(".")[0]] = weights.get_element_type().size == 1
    return found


def listed(kept: Sequence[str]) -> str:
    """Parts for a sentence."""
    return ", ".join(kept) or "nothing"


def answers(model: Any) -> Callable[[Pixels], Array]:
    """A model as a function of any number of images, whatever number it takes."""
    graph, taken = openvino.OpenVinoGraph(model), _taken(model)

    def run(pixels: Pixels) -> Array:
        missing = np.zeros((-len(pixels) % taken, *pixels.shape[1:]), np.uint8)
        padded = np.concatenate([pixels, missing])
        parts = np.split(padded, len(padded) // taken)
        return np.concatenate([graph(part) for part in parts])[: len(pixels)]

    return run


def _taken(model: Any) -> int:
    """Images that a model takes at once; 1 where it takes any number."""
    images = model.input(0).partial_shape[0]
    return 1 if images.is_dynamic else int(images.get_length())


def _judge(model: Any, network: Network, guard: Guard, words: str) -> Predicted:
    with guard.watch(f"{words}: judging on val images", "images") as progress:
        candidate = Candidate(network.input, answers(model))
        found = predict_logits(
            candidate, guard.val, batch=_taken(model) * max(1, GROUP // _taken(model)), progress=progress
        )
    if not len(found.labels):
        path, reason = next(iter(found.unreadable.items()))
        raise DataError(f"none of the {len(guard.val):,} val images can be read; {path}: {reason}")
    return found


def _attempt(kept: tuple[str, ...], reference: Predicted, found: Predicted) -> Attempt:
    same = int((reference.logits.argmax(1) == found.logits.argmax(1)).sum())
    difference = compare(reference.logits, found.logits, found.labels)
    return Attempt(kept, difference, wilson(same, difference.n))


def _refusal(attempts: Sequence[Attempt], ranked: Ranked, limit: float) -> str:
    """What was tried, with each figure."""
    n = attempts[0].found.n
    tried = "; ".join(str(attempt) for attempt in attempts)
    left = ", ".join(f"{part} {error:.1%}" for part, error in ranked.parts.items()) or "none is nearer"
    return (
        f"int8 was not written: on {n:,} val images it loses more than {limit:g} points of top-1. Tried: {tried}. "
        f"Its logits differ from fp32's by {ranked.whole:.1%} on average; with one part in float: {left}"
    )


def _nncf() -> Any:
    """NNCF, which reports nothing to its makers from here."""
    kind, reported = logging.getLoggerClass(), os.environ.get(UNREPORTED)
    os.environ.setdefault(UNREPORTED, "1")
    try:
        return import_module("nncf")
    except ImportError as error:
        raise MissingExtraError("int8", "int8") from error
    finally:
        logging.setLoggerClass(kind)  # NNCF puts its own in the place of everybody's
        if reported is None:
            del os.environ[UNREPORTED]


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Without NNCF's bars and what its loggers say: standard output is for results."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
