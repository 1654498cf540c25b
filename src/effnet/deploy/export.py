"""A model -> an artifact, whose answers are compared with the network's before it appears."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from effnet.arch.spec import one_of, positive_int
from effnet.data.preprocess import load_pixels
from effnet.deploy.artifact import OPENVINO_FILE, SUFFIXES, Artifact, Form, Format, about, open_artifact
from effnet.deploy.engines import Precision, network_of
from effnet.errors import ArgumentError, RefusedError
from effnet.weights.folders import FILE_SUFFIXES, appearing_artifact, appearing_file, mentions_us

if TYPE_CHECKING:
    from effnet.weights.bundle import Bundle

LIMITS = {"fp32": 1e-4, "bf16": 0.1}  # largest difference of a logit, as a share of the largest logit
NOISE = 6  # images of noise that are compared beside the photos
PHOTOS = Path(__file__).parents[1] / "data" / "photos"


@dataclass(frozen=True)
class Exported:
    """An artifact and how its answers differ from the network's."""

    path: Path
    form: Form
    bytes: int
    difference: float  # largest of a logit, as a share of the largest logit
    agreement: int  # images of which both name the same class
    images: int

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
    precision: Precision = "fp32",
    batch: int | None = 1,
) -> Exported:
    """Write a network as an artifact; nothing is written where its answers are others than the network's.

    Args:
        bundle: the network with its context, as open_model gives it; it is in eval mode afterwards.
        out: a file .onnx or .pt2, or for openvino a folder.
        format: openvino, onnx or torch.
        precision: what it computes with; bf16 is OpenVINO's alone.
        batch: images that it takes at once; None: any number, which is slower on some engines.

    Raises:
        ArgumentError: a value is outside its range, or something that is no artifact is in the way.
        RefusedError: the artifact's answers differ too much.
        MissingExtraError: the format's package is not installed.
    """
    one_of("format", format, Format)
    one_of("precision", precision, Precision)
    batch = None if batch is None else positive_int("batch", batch)
    if precision != "fp32" and format != "openvino":
        raise ArgumentError("precision", precision, f"is OpenVINO's alone; {format} computes in fp32.")
    path, form = Path(out), Form(format, precision, batch)
    suffix = next(each for each, name in SUFFIXES.items() if name == format)
    if format != "openvino" and path.suffix != suffix:
        raise ArgumentError("out", str(path), f"must end with {suffix}.")
    if format == "openvino" and path.suffix in (*SUFFIXES, *FILE_SUFFIXES):
        raise ArgumentError("out", str(path), f"must name a folder; {path.suffix} is the name of a file.")
    if path.is_file() and not mentions_us(path):
        raise ArgumentError("out", str(path), "exists, and effnet did not write it; choose another name.")
    place: AbstractContextManager[Path] = appearing_file(path) if format != "openvino" else appearing_artifact(path)
    bundle.network.eval()
    with place as temporary:
        _write(bundle, form, temporary)
        found = compare(bundle, open_artifact(temporary), _images(bundle))
        if not found.difference <= LIMITS[precision]:
            raise RefusedError(f"{path} was not written: {found}, more than {LIMITS[precision]:g}")
    return Exported(path, form, size_of(path), found.difference, found.agreement, found.images)


def compare(bundle: Bundle, artifact: Artifact, pixels: NDArray[np.uint8]) -> Exported:
    """How an artifact's answers differ from the network's, for pixels (N, size, size, C) uint8."""
    expected, got = torch_logits(bundle, pixels), artifact(pixels)
    difference = float(np.abs(got - expected).max() / np.abs(expected).max())
    agreement = int((got.argmax(1) == expected.argmax(1)).sum())
    return Exported(artifact.path, artifact.form, 0, difference, agreement, len(pixels))


def torch_logits(bundle: Bundle, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What the network itself answers."""
    from effnet.deploy.runtime import torch_engine

    return torch_engine(bundle.network, bundle.config.input)(pixels)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))


def _write(bundle: Bundle, form: Form, target: Path) -> None:
    config, words = bundle.config, about(bundle.config, form)
    if form.format == "torch":
        from effnet.deploy import program

        program.write(bundle.network, config.input, form.batch, words, target)
        return
    network = network_of(bundle)
    if form.format == "onnx":
        from effnet.deploy import onnx

        target.write_bytes(onnx.make(network, form.batch, words))
    else:
        from effnet.deploy import openvino

        openvino.write(openvino.make(network, form.batch, words), target / OPENVINO_FILE)


def _images(bundle: Bundle) -> NDArray[np.uint8]:
    """The packaged photos as the network sees them, where it sees photos, and noise."""
    see = bundle.config.input
    noise = np.random.default_rng(0).integers(0, 256, (NOISE, see.size, see.size, see.channels), dtype=np.uint8)
    if see.channels not in (1, 3):
        return noise
    photos = [load_pixels(file, see) for file in sorted(PHOTOS.glob("*.png"))]
    return np.concatenate([np.stack(photos), noise])
