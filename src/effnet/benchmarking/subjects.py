"""What is measured side by side: a network or an artifact, in every way that this machine can run it.

A way is opened in memory, as effnet.load does it, and kept as the file that would be shipped: an artifact of
effnet.exporting.export, or for torch the weights themselves. Needs torch only for networks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, get_args

from effnet.errors import ArgumentError, MissingExtraError
from effnet.exporting.export import export, size_of
from effnet.machine import this_machine
from effnet.runtime.artifact import ENGINES, Artifact, Format, artifact_path, read_artifact
from effnet.runtime.select import NEEDED, Selection, installed, installed_engines, open_session, select
from effnet.runtime.session import TITLES, Backend, EngineName, EnginePrecision, Session
from effnet.weights.bundle import BundleConfig

if TYPE_CHECKING:
    from effnet.exporting.int8 import Guard
    from effnet.weights.bundle import Bundle

INT8 = Backend("openvino", "int8")
EXTRAS = {"openvino": "openvino", "onnxruntime": "export"}  # what installs an engine so that it can take a network
FORMATS: dict[EngineName, tuple[Format, str]] = {  # what is exported for an engine, and its suffix
    "openvino": ("openvino", ""),
    "onnxruntime": ("onnx", ".onnx"),
}


@dataclass(frozen=True)
class Kept:
    """What a fresh process opens for a way, and how large that is on disk."""

    model: str
    bytes: int


class Subject(Protocol):
    """What is measured."""

    @property
    def model(self) -> str:
        """Its name, as effnet.load takes it."""

    @property
    def source(self) -> str | None:
        """The library that wrote it, where that has to be said."""

    @property
    def config(self) -> BundleConfig:
        """What it knows beside its weights."""

    @property
    def ways(self) -> tuple[Backend, ...]:
        """The ways that can be taken here, of whole batches; the first is what the others are compared with."""

    @property
    def left_out(self) -> tuple[str, ...]:
        """The ways that cannot be taken here, each with its reason."""

    @property
    def step(self) -> int:
        """Images that the smallest session takes."""

    def divided(self, way: Backend, batch: int) -> Backend:
        """The same for full batches, in the parts that effnet.load would take."""

    def keep(self, way: Backend, folder: Path, guard: Guard | None) -> Kept:
        """The file of a way, written into an empty folder where there is none yet."""

    def open(self, way: Backend, batch: int, kept: Kept | None) -> Session:
        """Itself, run in a way; `kept` is what `keep` gave, None where that failed."""


@dataclass(frozen=True)
class NetworkSubject:
    """A network in memory."""

    model: str
    source: str | None
    bundle: Bundle
    threads: int | None
    int8: bool = False  # whether it is calibrated and measured in int8, too
    step: int = 1

    @property
    def config(self) -> BundleConfig:
        """See Subject, as with all that follows."""
        return self.bundle.config

    @property
    def ways(self) -> tuple[Backend, ...]:
        """What effnet.load chooses between, and int8 where it was asked for."""
        found = [Backend(name) for name in installed_engines(None)]
        if Backend("openvino") in found and this_machine().bf16:
            found.append(Backend("openvino", "bf16"))
        return _ordered([*found, *([INT8] if self.int8 else [])])

    @property
    def left_out(self) -> tuple[str, ...]:
        """Engines that are not installed, precisions that the processor or nobody asked for."""
        here = {way.engine for way in self.ways if way != INT8}
        words = [
            f"{TITLES[name]} is not installed: pip install 'effnet[{EXTRAS[name]}]'"
            for name in NEEDED
            if name not in here
        ]
        if "openvino" in here and Backend("openvino", "bf16") not in self.ways:
            words.append("No bf16: this processor does not multiply it")
        if not self.int8:
            words.append(f"int8 is calibrated first, which takes minutes: effnet bench {self.model} DATA --int8")
        return tuple(words)

    def keep(self, way: Backend, folder: Path, guard: Guard | None) -> Kept:
        """An artifact for one image at a time; for torch the weights as they lie there."""
        if way.engine == "torch":
            return Kept(self.model, _weights(self.model, self.source).stat().st_size)
        format, suffix = FORMATS[way.engine]
        out = folder / f"{way.engine}-{way.precision}{suffix}"
        how = guard if way == INT8 else None
        made = export(self.bundle, out, format=format, precision=way.precision, guard=how)
        return Kept(str(made.path), made.bytes)

    def open(self, way: Backend, batch: int, kept: Kept | None) -> Session:
        """Compiled for the batch; int8 from its file, which is of one image, made one of so many."""
        if way.precision != "int8":
            return open_session(self.bundle, Selection(way, batch, ""))
        if kept is None:
            raise ArgumentError("precision", way.precision, "could not be calibrated.")
        return open_session(read_artifact(kept.model), batch=batch, threads=self.threads)

    def divided(self, way: Backend, batch: int) -> Backend:
        """See Subject."""
        how: Any = {"engine": way.engine, "precision": way.precision}
        if way.precision == "int8":
            return dataclasses.replace(way, threads=self.threads)
        return select(self.config.spec, batch=batch, threads=self.threads, **how).backend


@dataclass(frozen=True)
class ArtifactSubject:
    """An exported file."""

    model: str
    artifact: Artifact
    threads: int | None
    source: None = None

    @property
    def config(self) -> BundleConfig:
        """See Subject, as with all that follows."""
        return self.artifact.config

    @property
    def ways(self) -> tuple[Backend, ...]:
        """Its own engine and the others that know its format; OpenVINO in both precisions where it is in either."""
        form = self.artifact.form
        own, *others = ENGINES[form.format]
        own = own if installed(own) or not any(map(installed, others)) else others.pop(0)
        ways = [Backend(name, form.precision) for name in (own, *filter(installed, others))]
        if form.precision != "int8" and any(way.engine == "openvino" for way in ways):
            ways += [Backend("openvino", "fp32")]
            ways += [Backend("openvino", "bf16")] if this_machine().bf16 else []
        return _ordered(ways, first=own)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Engines that know its format and are not installed, and bf16 where the processor has none."""
        form, here = self.artifact.form, {way.engine for way in self.ways}
        words = [
            f"{TITLES[name]} is not installed: pip install 'effnet[{name}]'"
            for name in ENGINES[form.format]
            if name not in here
        ]
        if form.precision == "fp32" and "openvino" in here and not this_machine().bf16:
            words.append("No bf16: this processor does not multiply it")
        return tuple(words)

    @property
    def step(self) -> int:
        """Images that it was exported for; 1 where that is any number."""
        return self.artifact.form.batch or 1

    def divided(self, way: Backend, batch: int) -> Backend:
        """See Subject."""
        how: Any = {"engine": way.engine, "precision": way.precision, "threads": self.threads}
        return select(self.config.spec, batch=batch, artifact=self.artifact, **how).backend

    def keep(self, way: Backend, folder: Path, guard: Guard | None) -> Kept:
        """The artifact itself, and its weights where they lie beside it."""
        path = self.artifact.path
        beside = [path.with_suffix(".bin")] if self.artifact.form.format == "openvino" else []
        return Kept(self.model, sum(size_of(file) for file in (path, *beside)))

    def open(self, way: Backend, batch: int, kept: Kept | None) -> Session:
        """As effnet.load runs it."""
        return open_session(self.artifact, Selection(way, batch, ""))


def open_subject(model: str, *, source: str | None = None, threads: int | None = None, int8: bool = False) -> Subject:
    """A MODEL, opened to be measured.

    Args:
        model: whatever effnet.load takes.
        source: the library that wrote a file of weights, where its keys cannot tell.
        threads: how many an engine may use; None: one for each core.
        int8: whether OpenVINO's int8 takes part; it has to be calibrated first.

    Raises:
        ArgumentError: `source` or `int8` is said of an artifact.
        MissingExtraError: torch is not installed and the model is no artifact, or the artifact's engine is not.
        UnknownNameError, CheckpointError, BundleError, ArtifactError, DownloadError: see effnet.load.
    """
    if artifact_path(model) is not None:
        if source is not None:
            raise ArgumentError("source", source, f"is not to be said of {model}, an artifact.")
        if int8:
            raise ArgumentError("int8", int8, f"is made of a network, and {model} is an artifact.")
        return ArtifactSubject(model, read_artifact(model), threads)
    try:
        import torch

        from effnet.weights.load import open_model
    except ImportError as error:
        raise MissingExtraError(f"measuring {model!r}", "torch") from error
    bundle = open_model(model, source=source)
    bundle.network.to(memory_format=torch.channels_last)  # as effnet.load runs it
    return NetworkSubject(model, source, bundle, threads, int8)


def _ordered(ways: Sequence[Backend], first: str = "torch") -> tuple[Backend, ...]:
    """Each way once: by engine, `first` before the others, then from the highest precision down."""
    engines, precisions = [first, *TITLES], get_args(EnginePrecision)
    return tuple(sorted(set(ways), key=lambda way: (engines.index(way.engine), precisions.index(way.precision))))


def _weights(model: str, source: str | None) -> Path:
    """The file in which a network's weights lie."""
    from effnet.weights.bundle import WEIGHTS, is_bundle
    from effnet.weights.load import read

    return Path(model) / WEIGHTS if is_bundle(Path(model)) else read(model, source=source).report.path
