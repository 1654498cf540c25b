"""What is measured side by side: a network or an artifact, and the backends that can run it here."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from effnet.errors import EXTRAS, ArgumentError
from effnet.files import size_of
from effnet.machine import this_machine
from effnet.runtime.artifact import ENGINES, Artifact, Model, artifact_path, read_artifact
from effnet.runtime.select import NEEDED, installed_engines
from effnet.runtime.session import TITLES, Backend, EngineName, EnginePrecision

INT8 = Backend("openvino", "int8")


@dataclass(frozen=True)
class Subject:
    """What is measured."""

    name: str  # as effnet.load takes it
    model: Model
    source: str | None = None  # the library that wrote a file of weights

    @classmethod
    def open(cls, name: str, source: str | None = None) -> Subject:
        """Open whatever effnet.load takes.

        Raises:
            ArgumentError: `source` is given for an artifact.
            UnknownNameError, CheckpointError, BundleError, ArtifactError, DownloadError: see effnet.load.
        """
        if artifact_path(name) is None:
            import torch

            from effnet.weights.load import open_model

            bundle = open_model(name, source=source)
            bundle.network.to(memory_format=torch.channels_last)  # as effnet.load runs it
            return cls(name, bundle, source)
        if source is not None:
            raise ArgumentError("source", source, f"does not apply to {name}, an artifact.")
        return cls(name, read_artifact(name))

    @property
    def artifact(self) -> Artifact | None:
        """The artifact; None for a network."""
        return self.model if isinstance(self.model, Artifact) else None

    @property
    def step(self) -> int:
        """Images that an artifact was exported for; 1 where any number can be measured."""
        return (self.artifact and self.artifact.form.batch) or 1

    @property
    def file_bytes(self) -> int:
        """Size on disk: of the artifact, or of the weights."""
        if self.artifact is not None:
            folder = self.artifact.form.format == "openvino"
            return size_of(self.artifact.path.parent if folder else self.artifact.path)
        from effnet.weights.bundle import WEIGHTS, is_bundle
        from effnet.weights.load import read

        path = Path(self.name)
        return size_of(path / WEIGHTS if is_bundle(path) else read(self.name, source=self.source).report.path)

    def list_backends(self, *, int8: bool = False) -> tuple[Backend, ...]:
        """The backends, for whole batches, that can run it here; the first is exact, and the reference for the others.

        Args:
            int8: whether a network is calibrated and measured in int8, too.

        Raises:
            ArgumentError: `int8` is asked of an artifact.
        """
        artifact, bf16 = self.artifact, this_machine().bf16
        names = installed_engines(artifact)
        if artifact is None:
            first: EngineName = "torch"
            found = {Backend(name) for name in names} | ({INT8} if int8 else set())
        elif int8:
            raise ArgumentError("int8", int8, f"is made of a network, and {self.name} is an artifact.")
        else:
            names = names or [ENGINES[artifact.form.format][0]]  # which fails, and says why
            first, precision = names[0], artifact.form.precision
            found = {Backend(name, precision) for name in names}
            bf16 = bf16 and precision != "int8"
            if precision == "bf16":
                found.add(Backend("openvino"))
        if bf16 and "openvino" in names:
            found.add(Backend("openvino", "bf16"))
        engines, precisions = [first, *TITLES], get_args(EnginePrecision)
        return tuple(sorted(found, key=lambda each: (engines.index(each.engine), precisions.index(each.precision))))

    def list_absent(self, backends: Container[Backend]) -> tuple[str, ...]:
        """Why engines and precisions are not among the backends."""
        artifact = self.artifact
        known, here = ENGINES[artifact.form.format] if artifact else tuple(TITLES), installed_engines(artifact)
        packages = {name: NEEDED[name][0 if artifact else -1] for name in known if name not in here}
        notes = [
            f"{TITLES[name]} is not installed: pip install 'effnet[{EXTRAS[package]}]'"
            for name, package in packages.items()
        ]
        if Backend("openvino") in backends and not this_machine().bf16:
            notes.append("No bf16: this processor does not multiply it")
        if artifact is None and INT8 not in backends:
            notes.append(f"int8 is calibrated first, which takes minutes: effnet bench {self.name} DATA --int8")
        return tuple(notes)
