"""Artifacts: exported files that know their preprocessing, their class names and where they came from.

| format | what it is | who runs it |
|---|---|---|
| openvino | a folder with model.xml and model.bin | OpenVINO |
| onnx | a file .onnx | ONNX Runtime, OpenVINO |
| torch | a file .pt2, a torch.export program | torch |

What an artifact knows stands in the format's own metadata, as JSON under the name effnet.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from effnet.errors import ArgumentError, ArtifactError, MissingExtraError
from effnet.fields import one_of, positive_int, read_fields
from effnet.files import MARK
from effnet.runtime.engines import Batches, EngineName, Precision, Way
from effnet.runtime.graph import Array
from effnet.version import __version__
from effnet.weights.bundle import BundleConfig, parse_config

Format = Literal["openvino", "onnx", "torch"]

FORMAT = 1  # raised whenever an older effnet would misread an artifact
SUFFIXES: dict[str, Format] = {".xml": "openvino", ".onnx": "onnx", ".pt2": "torch"}
ENGINES: dict[Format, tuple[EngineName, ...]] = {  # the format's own first
    "openvino": ("openvino",),
    "onnx": ("onnxruntime", "openvino"),
    "torch": ("torch",),
}
OPENVINO_FILE = "model.xml"
LARGEST_BATCH = 64  # images that go together through an artifact of any batch


@dataclass(frozen=True)
class Int8:
    """How an int8 artifact was calibrated, and what it lost against fp32 on images that it was not trained on."""

    calibration_images: int
    kept: tuple[str, ...]  # parts in float, beside what is always so
    drop: float  # points of top-1; negative where int8 has more
    low: float  # the drop's interval at 95 %
    high: float
    val_images: int  # that the drop was counted on
    attempts: int  # versions that were judged on these images; this is the last

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ArgumentError: a value is outside its range.
        """
        for name in ("calibration_images", "val_images", "attempts"):
            positive_int(name, getattr(self, name))
        if not isinstance(self.kept, (list, tuple)) or not all(isinstance(name, str) for name in self.kept):
            raise ArgumentError("kept", self.kept, "must be names of parts.")
        object.__setattr__(self, "kept", tuple(self.kept))  # JSON knows lists alone
        for name in ("drop", "low", "high"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 100:
                raise ArgumentError(name, value, "must be points of top-1, from -100 to 100.")


@dataclass(frozen=True)
class Form:
    """How an artifact was exported."""

    format: Format
    precision: Precision  # that it computes with
    batch: int | None  # images that it takes at once; None: any number
    int8: Int8 | None = None  # where that is its precision

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ArgumentError: a value is unknown or outside its range.
        """
        one_of("format", self.format, Format)
        one_of("precision", self.precision, Precision)
        if self.batch is not None:
            positive_int("batch", self.batch)
        if (self.precision == "int8") != (self.int8 is not None):
            rule = "must say how it was calibrated where the precision is int8, and only there."
            raise ArgumentError("int8", self.int8, rule)


@dataclass(frozen=True)
class Artifact:
    """An artifact that was read: what it says of itself, and how it can be run."""

    path: Path
    config: BundleConfig
    form: Form
    threads: int | None  # how many an engine may use; None: one for each core
    read: Any  # OpenVINO's model or torch's program; None of an ONNX file

    def way(self, engine: EngineName | None = None, precision: Precision | None = None) -> Way:
        """How it is run by its own engine or another one, in its own precision or another one.

        Raises:
            ArgumentError: it cannot be run so.
        """
        form, known = self.form, ENGINES[self.form.format]
        if engine not in (None, *known):
            rule = f"cannot be chosen: {self.path} can be run by {' or '.join(known)}, by its format."
            raise ArgumentError("engine", engine, rule)
        if precision not in (None, form.precision) and "int8" in (precision, form.precision):
            rule = f"cannot be chosen: {self.path} was exported in {form.precision}; export it again with --precision."
            raise ArgumentError("precision", precision, rule)
        return Way(engine or known[0], precision or form.precision)

    @property
    def fixed(self) -> tuple[EngineName, ...]:
        """The engines that take as many images as it was exported for, and no other number.

        OpenVINO takes others; in int8 they are rounded otherwise than those that were judged.
        """
        if self.form.batch is None:
            return ()
        return ("onnxruntime", "openvino") if self.form.precision == "int8" else ("onnxruntime",)

    def open(self, way: Way, batch: int | None = None) -> Batches:
        """The function that it is: logits (N, K) float32 of any number of pixels (N, size, size, C) uint8.

        Args:
            way: how it is run.
            batch: images of a full batch; where the artifact takes a number of them, a multiple of that.

        Raises:
            MissingExtraError: the engine is not installed.
        """
        step = self.form.batch
        size = batch or step or LARGEST_BATCH
        if way.engine == "torch":
            return Batches(lambda *_: self.read, step or size, rest="padded" if step else "together", step=step or 1)
        if way.part is None:  # one session for all numbers of images
            whole = cache(lambda: self.session(way))
            return Batches(lambda *_: whole(), size, rest="padded" if step else "together", step=step or 1)
        opener = partial(self.session, way)
        least = self.form.batch if way.engine in self.fixed else None
        return Batches(opener, size, part=way.part, streams=way.streams, step=least or 1)

    def session(self, way: Way, images: int | None = None, streams: int = 1, *, recording: bool = False) -> Any:
        """A session of OpenVINO or ONNX Runtime.

        Args:
            way: engine and precision.
            images: that go together; None: as many as it was exported for, or any number.
            streams: requests side by side.
            recording: whether it records the time of its nodes.
        """
        if way.engine == "onnxruntime":
            from effnet.runtime.onnx import OnnxSession

            return OnnxSession(self.path, self.threads, images=images, streams=streams, recording=recording)
        from effnet.runtime import openvino

        model = self.read or openvino.read(self.path)[0]
        model = model if images in (None, self.form.batch) else openvino.for_batch(model, images)
        how: Any = {"precision": way.precision, "streams": streams, "recording": recording}
        return openvino.OpenVinoSession(model, self.threads, **how)

    @cached_property
    def _run(self) -> Batches:
        return self.open(self.way())

    def __call__(self, pixels: NDArray[np.uint8]) -> Array:
        """Logits (N, K) float32 of any number of pixels (N, size, size, C) uint8, by its own engine."""
        return self._run(pixels)


def artifact_path(model: str | Path) -> Path | None:
    """The file to open where MODEL is an artifact: itself, or in its folder; None where it is none."""
    path = Path(model)
    if path.is_dir() and (path / OPENVINO_FILE).exists():
        return path / OPENVINO_FILE
    return path if path.suffix.lower() in SUFFIXES else None


def about(config: BundleConfig, form: Form) -> dict[str, Any]:
    """What an artifact says of itself."""
    how = {name: value for name, value in dataclasses.asdict(form).items() if (name, value) != ("int8", None)}
    return {"format": FORMAT, MARK: __version__, "form": how, **dataclasses.asdict(config)}


def open_artifact(model: str | Path, *, threads: int | None = None) -> Artifact:
    """An artifact, read by its own engine.

    Args:
        model: the file, or OpenVINO's folder.
        threads: how many an engine may use; None: one for each core.

    Raises:
        ArtifactError: it is damaged, or effnet did not write it.
        ArgumentError: a value is outside its range.
        MissingExtraError: its engine is not installed.
    """
    path = artifact_path(model)
    if path is None:
        raise ArgumentError("model", str(model), f"is no artifact: a file {', '.join(SUFFIXES)} or OpenVINO's folder.")
    if not path.is_file():
        raise ArtifactError(f"{path} {'is a folder, not a file' if path.exists() else 'does not exist'}")
    threads = None if threads is None else positive_int("threads", threads)
    opened, words = _read(SUFFIXES[path.suffix.lower()], path, threads)
    return Artifact(path, *_parse(words, path), threads, opened)


def _read(format: Format, path: Path, threads: int | None) -> tuple[Any, str]:
    """What is opened of a file to read what it says of itself, and that; the former is None for an ONNX file."""
    if format == "openvino":
        from effnet.runtime import openvino

        return openvino.read(path)
    if format == "onnx":
        from effnet.runtime import onnx

        return None, onnx.words_in(path)
    try:
        from effnet.runtime.program import ProgramSession
    except ImportError as error:
        raise MissingExtraError("a torch.export program", "torch") from error
    session = ProgramSession(path, threads)
    return session, session.about


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
            how = dict(values["form"])
            if "int8" in how:
                how["int8"] = read_fields(Int8, how["int8"])
            return parse_config(rest), read_fields(Form, how)
    except (ArgumentError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{path} was changed: {error}") from error
    raise ArtifactError(f"{path} has format {written}; this effnet reads {FORMAT}: upgrade")
