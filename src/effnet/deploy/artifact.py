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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import effnet
from effnet.arch.spec import read_fields
from effnet.deploy.engines import Batches, EngineName
from effnet.deploy.graph import Array, Session
from effnet.errors import ArgumentError, ArtifactError
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


def open_artifact(model: str | Path, *, threads: int | None = None, precision: Precision | None = None) -> Artifact:
    """An artifact in its engine.

    Args:
        model: the file, or OpenVINO's folder.
        threads: how many the engine may use; None: one for each core.
        precision: what OpenVINO computes with, in place of what the artifact says.

    Raises:
        ArtifactError: it is damaged, or effnet did not write it.
        MissingExtraError: its engine is not installed.
    """
    path = artifact_path(model)
    if path is None:
        raise ArgumentError("model", str(model), f"is no artifact: a file {', '.join(SUFFIXES)} or OpenVINO's folder.")
    if not path.exists():
        raise ArtifactError(f"{path} does not exist")
    session = _opener(SUFFIXES[path.suffix.lower()])(path, threads, precision)
    config, form = _parse(session.about, path)
    return Artifact(path, config, form, Batches(lambda _: session, form.batch or LARGEST_BATCH, single=not form.batch))


def _opener(format: Format) -> Callable[[Path, int | None, str | None], Session]:
    if format == "openvino":
        from effnet.deploy.openvino import OpenVinoSession

        return OpenVinoSession
    if format == "onnx":
        from effnet.deploy.onnx import OnnxSession

        return lambda path, threads, precision: OnnxSession(path, threads)
    from effnet.deploy.program import ProgramSession

    return lambda path, threads, precision: ProgramSession(path)


def _parse(values: Mapping[str, Any], path: Path) -> tuple[BundleConfig, Form]:
    if MARK not in values:
        raise ArtifactError(
            f"{path} was not exported by effnet: it does not say how images are prepared and what its classes are. "
            "Export it with: effnet export MODEL"
        )
    if values.get("format") != FORMAT:
        raise ArtifactError(f"{path} has format {values.get('format')}; this effnet reads {FORMAT}: upgrade")
    try:
        rest = {name: value for name, value in values.items() if name not in ("format", "form", MARK)}
        return parse_config(rest), read_fields(Form, values["form"])
    except (ArgumentError, TypeError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path} was changed: {error}") from error
