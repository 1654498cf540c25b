"""A model -> an artifact, whose answers are compared with the network's before it appears."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from effnet.data.image import load_pixels
from effnet.errors import ArgumentError, RefusedError
from effnet.fields import one_of, positive_int
from effnet.files import FILE_SUFFIXES, has_mark, write_file, write_folder
from effnet.runtime.agreement import PHOTOS
from effnet.runtime.artifact import OPENVINO_FILE, SUFFIXES, Artifact, Form, Format, Int8, metadata, read_artifact
from effnet.runtime.graph import network_of
from effnet.runtime.select import open_session
from effnet.runtime.session import EnginePrecision

if TYPE_CHECKING:
    from effnet.exporting.int8 import Attempt, Guard
    from effnet.weights.bundle import Bundle

LIMITS = {"fp32": 1e-4, "bf16": 0.1}  # largest difference of a logit, as a share of the largest logit
REWRITTEN = 1e-4  # the same, of an int8 file from the model that was judged
ELSEWHERE = {  # why int8 is OpenVINO's alone
    "onnx": "ONNX Runtime takes longer for these networks in int8 than in fp32",
    "torch": "a torch.export program would compute in fp32 all the same",
}
NOISE = 6  # images of noise that are compared beside the photos


@dataclass(frozen=True)
class Beside:
    """An int8 artifact beside the same network in fp32, in the same engine."""

    attempts: tuple[Attempt, ...]  # versions that were judged; the last one is the artifact
    unreadable: int  # val images that could not be judged
    eight_bits: int  # layers whose weights are in 8 bits
    layers: int
    bytes: int  # of fp32
    timed: int  # images at once
    fp32_ms: float  # for these, median of interleaved rounds
    int8_ms: float


@dataclass(frozen=True)
class Exported:
    """An artifact and how its answers differ from the network's."""

    path: Path
    form: Form
    bytes: int
    difference: float  # largest of a logit, as a share of the largest logit
    agreement: int  # images of which both name the same class
    images: int
    beside: Beside | None = None  # of int8

    def __str__(self) -> str:
        return (
            f"logits differ by at most {self.difference:.1e} of the largest, "
            f"{self.agreement} of {self.images} images get the same class"
        )


def export(
    bundle: Bundle,
    out: str | Path,
    *,
    format: Format = "openvino",
    precision: EnginePrecision = "fp32",
    batch: int | None = 1,
    guard: Guard | None = None,
) -> Exported:
    """Write a network as an artifact; nothing is written where its answers are others than the network's.

    In int8 they are a little different always: what counts there is the guard's limit, on images with known classes.

    Args:
        bundle: the network with its context, as open_model gives it; it is in eval mode afterwards.
        out: a file .onnx or .pt2, or for openvino a folder.
        format: openvino, onnx or torch.
        precision: what it computes with; bf16 and int8 are OpenVINO's alone.
        batch: images that it takes at once; None: any number, which is slower on some engines.
        guard: what int8 is calibrated and judged on, see quantize.py.

    Raises:
        ArgumentError: a value is outside its range, or something that is no artifact is in the way.
        RefusedError: the artifact's answers differ too much.
        DataError: no image to calibrate or to judge with can be read.
        MissingExtraError: the format's package is not installed, or NNCF for int8.
    """
    one_of("format", format, Format)
    one_of("precision", precision, EnginePrecision)
    batch = None if batch is None else positive_int("batch", batch)
    if precision != "fp32" and format != "openvino":
        reason = ELSEWHERE[format] if precision == "int8" else f"{format} computes in fp32"
        raise ArgumentError("precision", precision, f"is OpenVINO's alone; {reason}.")
    if (precision == "int8") != (guard is not None):
        raise ArgumentError("guard", guard, "says what int8 is calibrated and judged on, for int8 and for it alone.")
    path = Path(out)
    suffix = next(each for each, name in SUFFIXES.items() if name == format)
    if format != "openvino" and path.suffix != suffix:
        raise ArgumentError("out", str(path), f"must end with {suffix}.")
    if format == "openvino" and path.suffix in (*SUFFIXES, *FILE_SUFFIXES):
        other = f", as --format {SUFFIXES[path.suffix]} writes one" if path.suffix in (".onnx", ".pt2") else ""
        raise ArgumentError("out", str(path), f"must name a folder; {path.suffix} is the name of a file{other}.")
    if path.is_file() and not has_mark(path):
        raise ArgumentError("out", str(path), "exists, and effnet did not write it; choose another name.")
    place: AbstractContextManager[Path] = write_file(path) if format != "openvino" else write_folder(path, "artifact")
    bundle.network.eval()
    with place as temporary:
        if guard is not None:
            form, found, beside = _write_int8(bundle, guard, batch, temporary)
            return Exported(path, form, size_of(temporary), found.difference, found.agreement, found.images, beside)
        form = Form(format, precision, batch)
        _write(bundle, form, temporary)
        found = compare(bundle, read_artifact(temporary), _images(bundle))
        if not found.difference <= LIMITS[precision]:
            raise RefusedError(f"{path} was not written: {found}, more than {LIMITS[precision]:g}")
    return Exported(path, form, size_of(path), found.difference, found.agreement, found.images)


def compare(bundle: Bundle, artifact: Artifact, pixels: NDArray[np.uint8]) -> Exported:
    """How an artifact's answers differ from the network's, for pixels (N, size, size, C) uint8."""
    expected, got = torch_logits(bundle, pixels), open_session(artifact)(pixels)
    difference = float(np.abs(got - expected).max() / np.abs(expected).max())
    agreement = int((got.argmax(1) == expected.argmax(1)).sum())
    return Exported(artifact.path, artifact.form, 0, difference, agreement, len(pixels))


def turn_about(
    runs: Mapping[str, Callable[[NDArray[np.uint8]], object]],
    pixels: NDArray[np.uint8],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Milliseconds that each run takes for these pixels: the median of interleaved turns."""
    from effnet.metrics.timing import time_rounds, turn

    laps = time_rounds(lambda: [turn(partial(run, pixels)) for run in runs.values()], progress=progress)
    return {name: lap.median_ms for name, lap in zip(runs, laps, strict=True)}


def torch_logits(bundle: Bundle, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What the network itself answers."""
    from effnet.runtime.torch import compile_network

    return compile_network(bundle.network, bundle.config.input)(pixels)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))


def _write(bundle: Bundle, form: Form, target: Path) -> None:
    config, words = bundle.config, metadata(bundle.config, form)
    if form.format == "torch":
        from effnet.runtime import torch

        torch.write(bundle.network, config.input, form.batch, words, target)
        return
    network = network_of(bundle)
    if form.format == "onnx":
        from effnet.runtime import onnx

        target.write_bytes(onnx.make(network, form.batch, words))
    else:
        from effnet.runtime import openvino

        openvino.write(openvino.make(network, form.batch, words), target / OPENVINO_FILE)


def _write_int8(bundle: Bundle, guard: Guard, batch: int | None, target: Path) -> tuple[Form, Exported, Beside]:
    """Find the version that holds the guard's limit, write it, and measure it beside fp32."""
    from effnet.exporting import int8 as quantize
    from effnet.runtime import openvino

    network, pixels = network_of(bundle), _images(bundle)
    made = quantize.guarded(network, guard, batch)
    last, layers = made.attempts[-1], quantize.eight_bits(made.model)
    judged = quantize.answers(made.model)(pixels)
    said = Int8(made.calibrated, last.kept, last.drop, *last.bounds, last.found.n, len(made.attempts))
    form, twin = Form("openvino", "int8", batch, said), Form("openvino", "fp32", batch)
    openvino.describe(made.model, metadata(bundle.config, form))
    openvino.write(made.model, target / OPENVINO_FILE)
    artifact = read_artifact(target)
    session = open_session(artifact)
    if not np.abs(session(pixels) - judged).max() <= REWRITTEN * np.abs(judged).max():
        raise RefusedError("int8 was not written: the file answers otherwise than the model that was judged")
    with tempfile.TemporaryDirectory() as folder, guard.watch("timing fp32 and int8 in turn", "rounds") as progress:
        _write(bundle, twin, Path(folder))
        size, reference = size_of(Path(folder)), open_session(read_artifact(folder))
        together = np.resize(pixels, (batch or 1, *pixels.shape[1:]))
        times = turn_about({"fp32": reference, "int8": session}, together, progress)
    found = compare(bundle, artifact, pixels)
    unreadable, eight = made.unreadable, sum(layers.values())
    return (
        form,
        found,
        Beside(made.attempts, unreadable, eight, len(layers), size, len(together), times["fp32"], times["int8"]),
    )


def _images(bundle: Bundle) -> NDArray[np.uint8]:
    """The packaged photos as the network sees them, where it sees photos, and noise."""
    see = bundle.config.input
    noise = np.random.default_rng(0).integers(0, 256, (NOISE, see.size, see.size, see.channels), dtype=np.uint8)
    if see.channels not in (1, 3):
        return noise
    photos = [load_pixels(file, see) for file in sorted(PHOTOS.glob("*.png"))]
    return np.concatenate([np.stack(photos), noise])
