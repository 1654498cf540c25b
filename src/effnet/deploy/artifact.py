"""Artifacts: exported files that know their preprocessing, their class names and where they came from.

| format | what it is | who runs it |
|---|---|---|
| openvino | a folder with model.xml and model.bin | OpenVINO |
| onnx | a file .onnx | ONNX Runtime |
| torch | a file .pt2, a torch.export program | torch |

What an artifact knows stands in the format's own metadata, as JSON under the name effnet.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import effnet
from effnet.arch.spec import one_of, positive_int, read_fields
from effnet.deploy.engines import TORCH_S, Batches, EngineName
from effnet.deploy.graph import Array, Session
from effnet.errors import ArgumentError, ArtifactError, MissingExtraError
from effnet.weights.bundle import BundleConfig, parse_config
from effnet.weights.folders import MARK

Format = Literal["openvino", "onnx", "torch"]
Precision = Literal["fp32", "bf16"]

FORMAT = 1  # raised whenever an older effnet would misread an artifact
SUFFIXES: dict[str, Format] = {".xml": "openvino", ".onnx": "onnx", ".pt2": "torch"}
ENGINES: dict[Format, EngineName] = {"openvino": "openvino", "onnx": "onnxruntime", "torch": "torch"}
OPENVINO_FILE = "model.xml"
LARGEST_BATCH = 64  # images that go together through an artifact of any batch


@dataclass(frozen=True)
class Form:
    """How an artifact was exported."""

    format: Format
    precision: Precision  # that it computes with
    batch: int | None  # images that it takes at once; None: any number

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ArgumentError: a value is unknown or outside its range.
        """
        one_of("format", self.format, Format)
        one_of("precision", self.precision, Precision)
        if self.batch is not None:
            positive_int("batch", self.batch)


@dataclass(frozen=True)
class Artifact:
    """An artifact that is ready to run."""

    path: Path
    config: BundleConfig
    form: Form
    run: Callable[[NDArray[np.uint8]], Array]

    @property
    def engine(self) -> str:
        """What runs it."""
        return ENGINES[self.form.format]

    def __call__(self, pixels: NDArray[np.uint8]) -> Array:
        """Logits (N, K) float32 of any number of pixels (N, size, size, C) uint8; threads wait for each other."""
        return self.run(pixels)


def artifact_path(model: str | Path) -> Path | None:
    """The file to open where MODEL is an artifact: itself, or in its folder; None where it is none."""
    path = Path(model)
    if path.is_dir() and (path / OPENVINO_FILE).exists():
        return path / OPENVINO_FILE
    return path if path.suffix.lower() in SUFFIXES else None


def about(config: BundleConfig, form: Form) -> dict[str, Any]:
    """What an artifact says of itself."""
    return {"format": FORMAT, MARK: effnet.__version__, "form": dataclasses.asdict(form), **dataclasses.asdict(config)}


def open_artifact(model: str | Path, *, threads: int | None = None, batch: int | None = None) -> Artifact:
    """An artifact in its engine.

    Args:
        model: the file, or OpenVINO's folder.
        threads: how many OpenVINO or ONNX Runtime may use; None: one for each core.
        batch: images that go together through an artifact of any batch; None: at most LARGEST_BATCH.

    Raises:
        ArtifactError: it is damaged, or effnet did not write it.
        ArgumentError: a value is outside its range, or is the artifact's own.
        MissingExtraError: its engine is not installed.
    """
    path = artifact_path(model)
    if path is None:
        raise ArgumentError("model", str(model), f"is no artifact: a file {', '.join(SUFFIXES)} or OpenVINO's folder.")
    if not path.exists():
        raise ArtifactError(f"{path} does not exist")
    session = _opened(
        SUFFIXES[path.suffix.lower()], path, None if threads is None else positive_int("threads", threads)
    )
    config, form = _parse(session.about, path)
    if form.batch is None:
        size = LARGEST_BATCH if batch is None else positive_int("batch", batch)
        return Artifact(path, config, form, Batches(lambda _: session, size, rest="together"))
    if batch not in (None, form.batch):
        raise ArgumentError("batch", batch, f"cannot be chosen: {model} was exported for {form.batch}.")
    return Artifact(path, config, form, Batches(lambda _: session, form.batch, rest="padded"))


def _opened(format: Format, path: Path, threads: int | None) -> Session:
    if format == "openvino":
        from effnet.deploy.openvino import OpenVinoSession

        return OpenVinoSession(path, threads)
    if format == "onnx":
        from effnet.deploy.onnx import OnnxSession

        return OnnxSession(path, threads)
    if threads is not None:
        raise ArgumentError("threads", threads, TORCH_S)
    try:
        from effnet.deploy.program import ProgramSession
    except ImportError as error:
        raise MissingExtraError("a torch.export program", "torch") from error
    return ProgramSession(path)


def _parse(text: str, path: Path) -> tuple[BundleConfig, Form]:
    if not text:
        raise ArtifactError(
            f"{path} was not exported by effnet: it does not say how images are prepared and what its classes are. "
            "Export it with: effnet export MODEL"
        )
    try:
        values = json.loads(text)
        written = values["format"]
        if written == FORMAT:
            rest = {name: value for name, value in values.items() if name not in ("format", "form", MARK)}
            return parse_config(rest), read_fields(Form, values["form"])
    except (ArgumentError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{path} was changed: {error}") from error
    raise ArtifactError(f"{path} has format {written}; this effnet reads {FORMAT}: upgrade")
