"""Opens models: `load` returns a Classifier for any MODEL, `read_model` what other commands run."""

from __future__ import annotations

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effnet.arch.spec import NetworkSpec
from effnet.errors import ArgumentError, optional_import
from effnet.fields import read_fields
from effnet.progress import SILENT, Progress
from effnet.runtime.artifact import Model, artifact_path, read_artifact
from effnet.runtime.options import LoadOptions
from effnet.weights.bundle import Bundle, is_bundle, open_bundle

if TYPE_CHECKING:
    from effnet.runtime.classifier import Classifier


def load(
    weights: str | Path, /, *, model: str | NetworkSpec | None = None, progress: Progress = SILENT, **options: Any
) -> Classifier:
    """Load a MODEL as a Classifier.

    Args:
        weights: registered weights ("lite0", "b0"), a bundle, an artifact from effnet export, another library's file or
            hub folder, "timm/NAME" or "hf:ORG/NAME". Reading them needs no torch.
        model: the network of a weight file ("b0"), if its tensors do not tell.
        progress: reports downloads.
        options: fields of LoadOptions: engine, precision, batch, threads, device, source, fit, decode.

    Raises:
        UnknownNameError: it is none of these.
        ArgumentError: a value is outside its range, or is fixed by the artifact.
        CheckpointError, BundleError, ArtifactError, DownloadError: it is one of these and cannot be used.
        MissingExtraError: no engine, or not the chosen one, is installed.
    """
    if not isinstance(weights, (str, os.PathLike)):
        raise ArgumentError("weights", weights, "must be a name or a path.")
    chosen = read_fields(LoadOptions, options)
    named = weights, model, chosen.source
    with ThreadPoolExecutor(1) as pool:
        # Read a bundle and compute its sha256 while its engine is imported, numpy first.
        reading = pool.submit(read_model, *named) if is_bundle(Path(weights)) else None
        from effnet.runtime.classifier import Classifier
        from effnet.runtime.select import open_session, select_for

        opened = reading.result() if reading else read_model(*named, progress=progress)
    pins: Any = {name: getattr(chosen, name) for name in ("engine", "precision", "batch", "threads", "device")}
    pins = {name: value for name, value in pins.items() if value != "auto"}
    selection = select_for(opened, **pins)
    config = opened.config
    if chosen.fit is not None:
        config = dataclasses.replace(config, input=dataclasses.replace(config.input, fit=chosen.fit))
    session = open_session(opened, selection)
    network = opened.network if isinstance(opened, Bundle) and selection.backend.engine == "torch" else None
    return Classifier(session, config, network=network, selection=selection, decode=chosen.decode)


def read_model(
    weights: str | Path,
    model: str | NetworkSpec | None = None,
    source: str | None = None,
    *,
    progress: Progress = SILENT,
) -> Model:
    """What `load` runs: an artifact, or weights with their context. See `load` for errors."""
    if not str(weights):
        raise ArgumentError("weights", str(weights), "must be a name or a path.")
    if artifact_path(weights) is not None:
        if source is not None or model is not None:
            raise ArgumentError("weights", str(weights), "is an artifact, which takes neither source nor model.")
        return read_artifact(weights)
    if model is None and is_bundle(Path(weights)):
        return open_bundle(weights)
    from effnet.weights.load import open_model  # with the table of known weights, which a bundle does not need

    with optional_import(f"reading the weights of {weights}"):
        return open_model(weights, network=model, source=source, progress=progress)
