"""A model -> an artifact in fp32 or bf16, whose answers are compared with the network's before the file appears."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from effnet.data.image import load_pixels
from effnet.errors import ArgumentError, RefusedError
from effnet.fields import one_of, positive_int
from effnet.files import FILE_SUFFIXES, has_mark, size_of, write_file, write_folder
from effnet.machine import Precision
from effnet.runtime import openvino
from effnet.runtime.agreement import PHOTOS
from effnet.runtime.artifact import ENGINES, OPENVINO_FILE, SUFFIXES, Artifact, Form, Format, metadata, read_artifact
from effnet.runtime.graph import network_of
from effnet.runtime.select import Selection, open_session
from effnet.runtime.session import Backend, Logits, Pixels
from effnet.weights.bundle import Bundle

LIMITS: dict[Precision, float] = {"fp32": 1e-4, "bf16": 0.1}  # largest Parity.difference
NOISE = 6  # images of noise that are compared beside the photos


@dataclass(frozen=True)
class Parity:
    """How an artifact's answers differ from the network's."""

    difference: float  # largest difference of a logit, as a share of the largest logit
    agreement: int  # images for which both name the same class
    images: int

    def __str__(self) -> str:
        return (
            f"logits differ by at most {self.difference:.1e} of the largest, "
            f"{self.agreement} of {self.images} images get the same class"
        )


@dataclass(frozen=True)
class Exported:
    """An artifact that was written."""

    path: Path
    form: Form
    bytes: int
    parity: Parity


def export(
    bundle: Bundle,
    out: str | Path,
    *,
    format: Format = "openvino",
    precision: Precision = "fp32",
    batch: int | None = 1,
) -> Exported:
    """Write a network as an artifact; nothing is written where its answers differ from the network's.

    For int8, which always differs a little, see `int8.export_int8`.

    Args:
        bundle: the network with its context, as open_model gives it; it is in eval mode afterwards.
        out: a file .onnx or .pt2, or for openvino a folder.
        format: openvino, onnx or torch.
        precision: what it computes with; only OpenVINO computes in bf16.
        batch: images that it takes at once; None: any number, which is slower on some engines.

    Raises:
        ArgumentError: a value is outside its range, or `out` exists and effnet did not write it.
        RefusedError: the artifact's answers differ too much.
        MissingExtraError: the format's package is not installed.
    """
    one_of("format", format, Format)
    one_of("precision", precision, Precision)
    form = Form(format, precision, None if batch is None else positive_int("batch", batch))
    if precision != "fp32" and format != "openvino":
        raise ArgumentError("precision", precision, f"needs format openvino; {format} computes in fp32.")
    bundle.network.eval()
    with artifact_place(out, format) as temporary:
        write_artifact(bundle, form, temporary)
        parity = check_parity(bundle, read_artifact(temporary), parity_pixels(bundle))
        if not parity.difference <= LIMITS[precision]:
            raise RefusedError(f"{out} was not written: {parity}, more than {LIMITS[precision]:g}")
        size = size_of(temporary)
    return Exported(Path(out), form, size, parity)


@contextmanager
def artifact_place(out: str | Path, format: Format) -> Iterator[Path]:
    """A temporary path that takes the place of `out` when the block ends without an error.

    Raises:
        ArgumentError: `out` has the name of another format, or exists and effnet did not write it.
    """
    path = Path(out)
    if format == "openvino":
        if path.suffix in (*SUFFIXES, *FILE_SUFFIXES):
            other = f", as --format {SUFFIXES[path.suffix]} writes one" if path.suffix in (".onnx", ".pt2") else ""
            raise ArgumentError("out", str(path), f"must name a folder; {path.suffix} is the name of a file{other}.")
    else:
        suffix = next(suffix for suffix, name in SUFFIXES.items() if name == format)
        if path.suffix != suffix:
            raise ArgumentError("out", str(path), f"must end with {suffix}.")
    if path.is_file() and not has_mark(path):
        raise ArgumentError("out", str(path), "exists, and effnet did not write it; choose another name.")
    with write_folder(path, "artifact") if format == "openvino" else write_file(path) as temporary:
        yield temporary


def write_artifact(bundle: Bundle, form: Form, target: Path) -> None:
    """Write the network as a file, or for OpenVINO into a folder."""
    config, about = bundle.config, metadata(bundle.config, form)
    if form.format == "torch":
        from effnet.runtime import torch

        torch.write(bundle.network, config.input, form.batch, about, target)
    elif form.format == "onnx":
        from effnet.runtime import onnx

        target.write_bytes(onnx.make(network_of(bundle), form.batch, about))
    else:
        openvino.write(openvino.make(network_of(bundle), form.batch, about), target / OPENVINO_FILE)


def check_parity(bundle: Bundle, artifact: Artifact, pixels: Pixels) -> Parity:
    """How an artifact's answers differ from the network's in torch, for pixels (N, size, size, C) uint8."""
    from effnet.runtime.torch import compile_network

    expected = compile_network(bundle.network, bundle.config.input)(pixels)
    got = artifact_logits(artifact, pixels)
    difference = float(np.abs(got - expected).max() / np.abs(expected).max())
    return Parity(difference, int((got.argmax(1) == expected.argmax(1)).sum()), len(pixels))


def artifact_logits(artifact: Artifact, pixels: Pixels) -> Logits:
    """What an artifact answers in its own engine, precision and batch."""
    form = artifact.form
    backend = Backend(ENGINES[form.format][0], form.precision)
    session = open_session(artifact, Selection(backend, form.batch or len(pixels), "as exported"))
    try:
        return session(pixels)
    finally:
        session.close()


def parity_pixels(bundle: Bundle) -> Pixels:
    """The packaged photos as the network sees them, where it sees photos, and noise."""
    input_spec = bundle.config.input
    shape = NOISE, input_spec.size, input_spec.size, input_spec.channels
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    if input_spec.channels not in (1, 3):
        return noise
    photos = [load_pixels(file, input_spec) for file in sorted(PHOTOS.glob("*.png"))]
    return np.concatenate([np.stack(photos), noise])
