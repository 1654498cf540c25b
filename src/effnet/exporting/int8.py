"""int8: a network's OpenVINO graph in 8 bits, except for parts that must stay in float to keep its accuracy.

NNCF, OpenVINO's own tool, finds the ranges, all of them symmetric: one for each channel of the weights, one for each
map. Asymmetric ranges for SiLU, from -0.28 upwards, were no more accurate and 7 % slower on B0. NNCF leaves the two
small convolutions of squeeze-and-excitation in float; the factors that they compute, and the product, are in 8 bits.

Except in depthwise convolutions, weights use half of their range, 7 bits. Without VNNI, OpenVINO adds 8-bit products in
pairs that saturate at 16 bits, so the full range would give different answers there: on an EPYC with AVX2, Lite0's
logits for crops of two photos were off by 34 % of their mean size, and by 14 % with half the range; with exact sums, as
with VNNI, by 12 % and 14 %.

Calibration uses only training images. fp32 and int8 are evaluated on the same val images, in the same engine; the drop
is the points of top-1 that int8 loses. If it exceeds the limit, every part is measured: how far int8's logits are from
fp32's on calibration images when only this part stays in float. The part with the smallest difference goes back to
float, and the network is evaluated again; then the next part as well, and so on. If ATTEMPTS versions or all parts that
help are not enough, the network is refused. All versions are evaluated on the same images and the first one within the
limit is taken, which slightly underestimates the drop of a later version. The number of versions is always reported;
test images show the true drop.

ONNX Runtime does not run int8: on a processor with VNNI, B0 and Lite0 at 32 and 96 px took it 2.3 to 3.7 times as long
in NNCF's 8 bits as in fp32, but took OpenVINO only 0.4 to 0.7 times as long.
"""

from __future__ import annotations

import io
import logging
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from effnet.arch.spec import InputSpec, NetworkSpec
from effnet.data.dataset import Dataset
from effnet.data.held_out import TrainVal
from effnet.data.image import load_pixels
from effnet.errors import ArgumentError, DataError, ImageError, RefusedError, optional_import, without
from effnet.exporting.export import NOISE, PHOTOS, artifact_logits, artifact_place, parity_pixels, write_artifact
from effnet.fields import positive_int
from effnet.files import size_of
from effnet.metrics.evaluate import Predicted, predict_logits
from effnet.metrics.intervals import Difference, Interval, compare_top1, wilson
from effnet.metrics.timing import random_bundle
from effnet.process import unchanged
from effnet.progress import SILENT, Progress
from effnet.runtime import openvino
from effnet.runtime.artifact import OPENVINO_FILE, Form, Int8, metadata, read_artifact
from effnet.runtime.graph import network_of
from effnet.runtime.seal import write_seal
from effnet.runtime.session import Backend, BatchedSession, Pixels, Session
from effnet.weights.bundle import Bundle

MAX_DROP = 0.5  # points of top-1
CALIBRATION = 300  # images; NNCF's default
GROUP = 16  # images evaluated together, rounded up to a multiple of the artifact's batch
RANKING = 64  # calibration images to measure each part on
ATTEMPTS = 6  # most versions to evaluate: with more, luck would choose
BLOCKS = 24  # each block is a part up to this many; in deeper networks, each stage is one
REWRITTEN = 1e-4  # most that writing and reading the file may change a logit, as a share of the largest logit
SQUEEZES, NOTHING = "squeeze-and-excitation", "nothing"


@dataclass(frozen=True)
class Attempt:
    """An int8 version of a network, evaluated on the val images."""

    kept: tuple[str, ...]  # parts in float
    found: Difference  # a is fp32, b is int8
    agreement: Interval  # share of the images that get the same class from both

    @property
    def drop(self) -> Interval:
        """Points of top-1 that int8 loses against fp32; negative if it gains."""
        gain = self.found.accuracy
        return Interval(*(0 - 100 * share for share in (gain.value, gain.high, gain.low)))  # 0 - 0 is not -0

    def __str__(self) -> str:
        drop = self.drop
        return f"{_list(self.kept)} in float: {drop.value:+.2f} points lost ({drop.low:+.2f} to {drop.high:+.2f})"


@dataclass(frozen=True)
class Int8Exported:
    """A written int8 artifact."""

    path: Path
    form: Form
    bytes: int
    fp32_bytes: int  # of the same network in fp32
    attempts: tuple[Attempt, ...]  # evaluated versions; the last one is the artifact
    unreadable: int  # val images that could not be read


def export_int8(
    bundle: Bundle,
    out: str | Path,
    data: TrainVal,
    *,
    max_drop: float = MAX_DROP,
    batch: int | None = 1,
    progress: Progress = SILENT,
) -> Int8Exported:
    """Write a network as an OpenVINO artifact in int8, with as few parts in float as its accuracy allows.

    Args:
        bundle: the network with its context, from open_model.
        out: a folder.
        data: training images for calibration and val images for evaluation, with labels in the order of the outputs.
        max_drop: points of top-1 that int8 may lose against fp32 on the val images.
        batch: images per call; None: any number. Also used for the evaluation, because other batch sizes round
            differently, by one step of 8 bits.
        progress: follows each version.

    Raises:
        ArgumentError: a value is outside its range, or `out` exists and effnet did not write it.
        DataError: no image can be read, or an image would be used for both calibration and evaluation.
        RefusedError: no version stays within the limit; the message lists the versions tried.
        MissingExtraError: NNCF or OpenVINO is not installed.
    """
    if not 0 <= max_drop < 100:
        raise ArgumentError("max_drop", max_drop, "must be points of top-1: at least 0 and below 100.")
    batch = None if batch is None else positive_int("batch", batch)
    if both := {data.train.file(each) for each in data.train.samples} & {data.val.file(s) for s in data.val.samples}:
        raise DataError(f"{min(both)} would be used both to calibrate int8 and to evaluate it")
    _nncf()  # fails here if missing, before anything slow
    network, spec = network_of(bundle), bundle.config.spec
    with artifact_place(out, "openvino") as target, tempfile.TemporaryDirectory() as folder:
        model = openvino.make(network, 1, {})
        pixels = read_calibration(data.train, network.input, progress)
        reference = _evaluate(openvino.for_batch(model, batch), network.input, data.val, "fp32", progress)
        attempts: list[Attempt] = []
        errors: dict[str, float] = {}
        kept: tuple[str, ...] = ()
        while True:
            version = f"int8, {_list(kept)} in float"
            progress.update(f"{version}: calibrating", 0, 1)
            made = openvino.for_batch(quantize(model, pixels, spec, kept), batch)
            progress.update(f"{version}: calibrating", 1, 1)
            found = _evaluate(made, network.input, data.val, version, progress)
            same = int((reference.logits.argmax(1) == found.logits.argmax(1)).sum())
            difference = compare_top1(reference.logits, found.logits, found.labels)
            attempts.append(Attempt(kept, difference, wilson(same, difference.n)))
            if attempts[-1].drop.value <= max_drop:
                break
            errors = errors or measure_parts(model, pixels[:RANKING], spec, progress)
            helpful = [part for part in errors if errors[part] < errors[NOTHING]]
            if len(attempts) == ATTEMPTS or len(kept) == len(helpful):
                raise RefusedError(_refusal(attempts, errors, max_drop))
            kept = tuple(helpful[: len(kept) + 1])

        drop = attempts[-1].drop
        int8 = Int8(len(pixels), kept, drop.value, drop.low, drop.high, difference.n, len(attempts))
        form = Form("openvino", "int8", batch, int8)
        shown = parity_pixels(network.input)
        evaluated = _open(made)(shown)
        openvino.describe(made, metadata(bundle.config, form))
        openvino.write(made, target / OPENVINO_FILE)
        write_seal(target / OPENVINO_FILE)
        written = artifact_logits(read_artifact(target), shown)
        if not np.abs(written - evaluated).max() <= REWRITTEN * np.abs(evaluated).max():
            raise RefusedError("int8 was not written: the file answers differently from the model that was evaluated")
        with artifact_place(Path(folder) / "fp32", "openvino") as single:  # names a full disk
            write_artifact(bundle, Form("openvino", "fp32", batch), single)
            sizes = size_of(target), size_of(single)
    return Int8Exported(Path(out), form, *sizes, tuple(attempts), len(reference.unreadable))


def write_random_int8(spec: NetworkSpec, out: Path) -> None:
    """Write an int8 artifact with random weights, as large and as fast as one with trained weights.

    Raises:
        MissingExtraError: OpenVINO or NNCF is not installed.
    """
    bundle = random_bundle(spec)
    network = network_of(bundle)
    with artifact_place(out, "openvino") as target:
        made = quantize(openvino.make(network, 1, {}), parity_pixels(network.input), spec)
        form = Form("openvino", "int8", 1, Int8(NOISE + PHOTOS, (), 0.0, 0.0, 0.0, 1, 1))
        openvino.describe(made, metadata(bundle.config, form))
        openvino.write(made, target / OPENVINO_FILE)


def split_parts(spec: NetworkSpec) -> dict[str, tuple[str, ...]]:
    """The parts that can go back to float, each with the prefixes of its layers' node names."""
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
    """A copy of an OpenVINO model in 8 bits.

    Args:
        model: a model for one image.
        pixels: (N, size, size, C) uint8 for calibration.
        spec: the network's spec.
        kept: parts of `split_parts` that stay in float.

    Raises:
        MissingExtraError: NNCF is not installed.
    """
    nncf, parts = _nncf(), split_parts(spec)
    prefixes = tuple(f"{layer}." for part in kept for layer in parts[part])
    names = [op.get_friendly_name() for op in model.get_ordered_ops() if op.get_friendly_name().startswith(prefixes)]
    with _silenced():
        return nncf.quantize(
            model.clone(),
            nncf.Dataset([image[None] for image in pixels]),
            subset_size=len(pixels),
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix="enable"),
            ignored_scope=nncf.IgnoredScope(names=names) if names else None,
        )


def measure_parts(model: Any, pixels: Pixels, spec: NetworkSpec, progress: Progress = SILENT) -> dict[str, float]:
    """int8's error for each part when only this part stays in float, smallest first; NOTHING: all in int8.

    The error is the mean absolute difference of int8's logits from fp32's, as a share of the mean absolute logit.

    Args:
        model: a model for one image, in fp32.
        pixels: (N, size, size, C) uint8, for calibration and for the error.
        spec: the network's spec.
        progress: follows the parts.
    """
    expected = _open(model)(pixels)
    errors: dict[str, float] = {}
    parts = (NOTHING, *split_parts(spec))
    for done, part in enumerate(parts, start=1):
        logits = _open(quantize(model, pixels, spec, () if part == NOTHING else (part,)))(pixels)
        errors[part] = float(np.abs(logits - expected).mean() / (np.abs(expected).mean() or 1))
        progress.update("measuring what each part loses", done, len(parts))
    return dict(sorted(errors.items(), key=lambda error: error[1]))


def read_calibration(dataset: Dataset, input_spec: InputSpec, progress: Progress = SILENT) -> Pixels:
    """At most CALIBRATION readable images, drawn with a fixed seed: (N, size, size, C) uint8.

    Raises:
        DataError: none can be read.
    """
    found: list[Pixels] = []
    for sample in random.Random(0).sample(dataset.samples, len(dataset)):
        with suppress(ImageError):
            found.append(load_pixels(dataset.file(sample), input_spec))
        progress.update("reading training images", len(found), min(CALIBRATION, len(dataset)))
        if len(found) == CALIBRATION:
            break
    if not found:
        raise DataError(f"none of the {len(dataset):,} training images in {dataset} can be read")
    return np.stack(found)


def _open(model: Any) -> Session:
    """A session that runs an OpenVINO model on any number of images."""
    graph, images = openvino.OpenVinoGraph(model), model.input(0).partial_shape[0]
    batch = 0 if images.is_dynamic else int(images.get_length())
    return BatchedSession(lambda *_: graph, Backend("openvino"), batch or GROUP, least=batch)


def _evaluate(model: Any, input_spec: InputSpec, val: Dataset, version: str, progress: Progress) -> Predicted:
    session = _open(model)
    found = predict_logits(
        session,
        input_spec,
        val,
        batch=session.batch * -(-GROUP // session.batch),
        progress=progress,
        task=f"{version}: evaluating on val images",
    )
    if not len(found.labels):
        raise DataError(f"none of the {len(val):,} val images in {val} can be read")
    return found


def _refusal(attempts: Sequence[Attempt], errors: Mapping[str, float], limit: float) -> str:
    """The message of a refusal: the versions tried, with all figures."""
    tried = "; ".join(str(attempt) for attempt in attempts)
    left = ", ".join(f"{part} {error:.1%}" for part, error in errors.items())
    return (
        f"int8 was not written: on {attempts[0].found.n:,} val images it loses more than {limit:g} points of top-1. "
        f"Tried: {tried}. Mean difference of its logits from fp32's, by part in float: {left}"
    )


def _list(kept: Sequence[str]) -> str:
    return ", ".join(kept) or NOTHING


def _nncf() -> Any:
    """Import NNCF without its telemetry, which is sent on import, whatever NNCF_CI says."""
    with optional_import("int8"), unchanged(), without("openvino_telemetry"):
        return import_module("nncf")


@contextmanager
def _silenced() -> Iterator[None]:
    """Suppress progress bars and messages of NNCF and its imports: standard output is for results."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
