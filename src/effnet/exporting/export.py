"""Export in fp32 or bf16: an artifact appears only after its answers have been compared with the network's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from effnet.arch.spec import InputSpec
from effnet.data.image import views
from effnet.errors import ArgumentError, RefusedError
from effnet.fields import one_of, positive_int
from effnet.files import FILE_SUFFIXES, has_mark, size_of, write_file, write_folder
from effnet.machine import Precision
from effnet.runtime import openvino
from effnet.runtime.artifact import ENGINES, OPENVINO_FILE, SUFFIXES, Artifact, Form, Format, metadata, read_artifact
from effnet.runtime.graph import network_of
from effnet.runtime.seal import write_seal
from effnet.runtime.select import Selection, installed, open_session, select_for
from effnet.runtime.session import TITLES, Backend, Logits, Pixels
from effnet.weights.bundle import Bundle

LIMITS: dict[Precision, float] = {"fp32": 1e-4, "bf16": 0.1}  # largest Parity.difference
PHOTOS, NOISE = 2, 6  # images to compare answers on


@dataclass(frozen=True)
class Parity:
    """The differences between an artifact's answers and the network's."""

    against: str  # the engine that ran the network
    difference: float  # the largest of a logit, as a share of the largest logit
    agreement: int  # images that get the same class from both
    images: int

    def __str__(self) -> str:
        return (
            f"logits differ from the network's in {self.against} by at most {self.difference:.1e} of the largest, "
            f"{self.agreement} of {self.images} images get the same class"
        )


@dataclass(frozen=True)
class Exported:
    """A written artifact."""

    path: Path
    form: Form
    bytes: int
    parity: Parity
    is_new: bool = True  # else the newest version in a model server's folder already has these bytes


def export(
    bundle: Bundle,
    out: str | Path,
    *,
    format: Format = "openvino",
    precision: Precision = "fp32",
    batch: int | None = 1,
) -> Exported:
    """Write a network as an artifact, unless its answers differ from the network's.

    For int8, which always differs a little, see `int8.export_int8`.

    Args:
        bundle: the network with its context, from open_model.
        out: an .onnx or .pt2 file, or a folder for openvino.
        format: openvino, onnx or torch.
        precision: the precision to compute in; only OpenVINO has bf16.
        batch: images per call; None: any number, which is slower in some engines.

    Raises:
        ArgumentError: a value is outside its range, or `out` exists and effnet did not write it.
        RefusedError: the artifact's answers differ by more than LIMITS.
        MissingExtraError: the format's package is not installed.
    """
    one_of("format", format, Format)
    one_of("precision", precision, Precision)
    form = Form(format, precision, None if batch is None else positive_int("batch", batch))
    if precision != "fp32" and format != "openvino":
        raise ArgumentError("precision", precision, f"needs format openvino; {format} computes in fp32.")
    with artifact_place(out, format) as temporary:
        write_artifact(bundle, form, temporary)
        parity = check_parity(bundle, read_artifact(temporary))
        if not parity.difference <= LIMITS[precision]:
            raise RefusedError(f"{out} was not written: {parity}, more than {LIMITS[precision]:g}")
        size = size_of(temporary)
    return Exported(Path(out), form, size, parity)


@contextmanager
def artifact_place(out: str | Path, format: Format) -> Iterator[Path]:
    """A temporary path that replaces `out` if the block ends without an error.

    Raises:
        ArgumentError: `out` has another format's suffix, or exists and effnet did not write it.
    """
    path = Path(out)
    suffix = next((suffix for suffix, name in SUFFIXES.items() if name == format), None)
    if format == "openvino" and path.suffix in (*SUFFIXES, *FILE_SUFFIXES):
        raise ArgumentError("out", str(path), f"must name a folder; {path.suffix} is the name of a file.")
    if format != "openvino" and path.suffix != suffix:
        raise ArgumentError("out", str(path), f"must end with {suffix}.")
    if path.is_file() and not has_mark(path):
        raise ArgumentError("out", str(path), "exists, and effnet did not write it; choose another name.")
    with write_folder(path, "artifact") if format == "openvino" else write_file(path) as temporary:
        yield temporary


def write_artifact(bundle: Bundle, form: Form, target: Path) -> None:
    """Write the network to a file, or to a folder for OpenVINO."""
    config, about = bundle.config, metadata(bundle.config, form)
    if form.format == "torch":
        from effnet.runtime import torch

        torch.write(bundle.network, config.input, form.batch, about, target)
    elif form.format == "onnx":
        from effnet.runtime import onnx

        target.write_bytes(onnx.make(network_of(bundle), form.batch, about))
        write_seal(target)
    else:
        openvino.write(openvino.make(network_of(bundle), form.batch, about), target / OPENVINO_FILE)
        write_seal(target / OPENVINO_FILE)


def check_parity(bundle: Bundle, artifact: Artifact) -> Parity:
    """Compare an artifact's answers with the network's, on photos and noise.

    torch runs the network, or if it is not installed, the engine that the rules select.
    """
    pixels = parity_pixels(bundle.config.input)
    selection = select_for(bundle, engine="torch" if installed("torch") else None, precision="fp32")
    with open_session(bundle, selection) as session:
        expected = session(pixels)
    got = artifact_logits(artifact, pixels)
    difference = float(np.abs(got - expected).max() / (np.abs(expected).max() or 1))
    agreement = int((got.argmax(1) == expected.argmax(1)).sum())
    return Parity(TITLES[selection.backend.engine], difference, agreement, len(pixels))


def artifact_logits(artifact: Artifact, pixels: Pixels) -> Logits:
    """An artifact's logits, in its own engine, precision and batch size."""
    form = artifact.form
    backend = Backend(ENGINES[form.format][0], form.precision)
    with open_session(artifact, Selection(backend, form.batch or len(pixels), "as exported")) as session:
        return session(pixels)


def parity_pixels(input_spec: InputSpec) -> Pixels:
    """(N, size, size, C): views of the packaged photos, and noise."""
    photos = views(input_spec, PHOTOS)
    noise = np.random.default_rng(0).integers(0, 256, (NOISE, *photos.shape[1:]), dtype=np.uint8)
    return np.concatenate([photos, noise])
