"""Loads networks with weights from the registry, a file, a hub or a bundle.

`create` returns the module, `open_model` the module with its context: preprocessing, class names and the origin of the
weights.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from effnet.arch.spec import NetworkSpec
from effnet.arch.specfile import SUFFIXES
from effnet.arch.variants import spec
from effnet.errors import ArgumentError, CheckpointError, optional_import
from effnet.progress import SILENT, Progress
from effnet.weights import registry
from effnet.weights.bundle import Bundle, BundleConfig, for_weights, is_bundle, open_bundle, to_tensors
from effnet.weights.convert import Checkpoint, read_checkpoint
from effnet.weights.layouts import COUNTER, list_names

if TYPE_CHECKING:
    from effnet.models.blocks import Norm
    from effnet.models.efficientnet import EfficientNet

logger = logging.getLogger("effnet")


def create(
    network: str | NetworkSpec = "b0",
    weights: str | Path | None = None,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    source: str | None = None,
    norm: Norm | None = None,
) -> EfficientNet:
    """Create a network as a torch module.

    Args:
        network: "b0" ... "b8", "l2", "lite0" ... "lite4", a spec.yaml, or a NetworkSpec.
        weights: None for a new network; "default" for the registered weights of a variant; a name of the registry
            ("lite0", "b3", "timm/tf_efficientnet_b0.ns_jft_in1k"); a bundle; a file or hub folder of another library.
        num_classes: outputs of the classifier. If the weights have another number, the classifier starts fresh, and a
            warning is logged.
        in_channels: input channels; if the weights have another number, the stem is adapted.
        source: the library that wrote a weight file, where its keys cannot tell (timm or timm-tf).
        norm: builds another normalisation layer for a number of channels; it must have the tensors of the weights, and
            gets their eps and momentum.

    Returns:
        The module, in training mode without weights, in eval mode with them.

    Raises:
        UnknownNameError, ArgumentError: no network or weights have that name; a value is outside its range.
        CheckpointError, DownloadError: the file cannot be used for this network; weights cannot be fetched.
    """
    if weights is None:
        with optional_import("effnet.create"):
            from effnet.models.efficientnet import EfficientNet

        return EfficientNet(spec(network, num_classes=num_classes, in_channels=in_channels), norm=norm)
    if str(weights).lower() == "default":
        weights = registry.weights_of(spec(network).name)[0].name
    checkpoint = read(str(weights), network, source=source, num_classes=num_classes, in_channels=in_channels)
    _warn(checkpoint)
    return build(checkpoint, norm=norm)


def open_model(
    model: str | Path,
    *,
    network: str | NetworkSpec | None = None,
    source: str | None = None,
    progress: Progress = SILENT,
) -> Bundle:
    """Open a model with weights and its context; its network is in eval mode.

    Args:
        model: a name of the registry, a bundle, a file or hub folder of another library, "timm/NAME" or "hf:ORG/NAME".
        network: the network of a file, where its tensors cannot tell.
        source: the library that wrote a weight file, where its keys cannot tell.
        progress: follows downloads.

    Raises:
        UnknownNameError: no weights have that name.
        ArgumentError: `network` is given for a bundle, which states its network.
        CheckpointError, BundleError, DownloadError: the weights cannot be read or fetched.
    """
    if is_bundle(Path(model)):
        if network is not None:
            raise ArgumentError("network", str(network), f"must not be given for {model}: a bundle states its network.")
        return open_bundle(model)
    checkpoint = read(str(model), network, source=source, progress=progress)
    _warn(checkpoint)
    found = spec(checkpoint.spec, resolution=checkpoint.input.size)
    origin = f"{model} ({checkpoint.source})"
    config = BundleConfig(found, checkpoint.policy, checkpoint.input, checkpoint.classes, origin)
    return Bundle(config, checkpoint.state)


def read(
    weights: str,
    network: str | NetworkSpec | None = None,
    *,
    source: str | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
    progress: Progress = SILENT,
) -> Checkpoint:
    """The weights of a name, file or folder, opened once; see `create` for the arguments.

    Without a `network` the spec has the resolution that the weights were made for.
    """
    known = registry.REGISTRY.get(weights.lower().removeprefix("efficientnet_").removeprefix("efficientnet-"))
    if known and source not in (None, known.source):
        raise ArgumentError("source", source, f"is not {weights}'s, which comes from {known.source}.")
    path = Path(weights)
    if known:
        path, source = registry.fetch(known, progress=progress), known.source
    elif path.suffix.lower() in SUFFIXES:
        raise CheckpointError(f"{weights} describes a network without weights: effnet.create({weights!r}) builds it")
    elif not path.exists() and weights.startswith(("hf:", "timm/")):
        path = registry.fetch_hub(weights, progress=progress)
    elif not path.exists() and not path.suffix and path.name == weights:
        registry.find(weights)  # raises an error with the nearest name
    checkpoint = read_checkpoint(path, network, source=source, num_classes=num_classes, in_channels=in_channels)
    if known:
        input_spec = known.input.with_channels(checkpoint.spec.in_channels)
        checkpoint = dataclasses.replace(checkpoint, input=input_spec, notes=())
    if network is None:
        checkpoint = dataclasses.replace(checkpoint, spec=spec(checkpoint.spec, resolution=checkpoint.input.size))
    return checkpoint


def build(checkpoint: Checkpoint, *, norm: Norm | None = None) -> EfficientNet:
    """The network of a checkpoint, in eval mode."""
    with optional_import("a network as a torch module"):
        from effnet.models.efficientnet import EfficientNet

    path, policy = checkpoint.file.path, checkpoint.policy
    misfit = f"{path} does not fit {'its network' if norm is None else 'this norm'}"
    with for_weights(checkpoint.fresh):
        network = EfficientNet(checkpoint.spec, policy=policy, norm=norm)
    try:
        missing, unexpected = network.load_state_dict(to_tensors(checkpoint.state), strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{misfit}: {error}") from error
    allowed = (COUNTER, *checkpoint.fresh)
    if wrong := [key for key in (*missing, *unexpected) if not key.endswith(allowed)]:
        raise CheckpointError(f"{misfit}: {list_names(wrong)}")
    network.use_policy(policy)  # a norm that was passed in has its own constants
    return network.eval()


def _warn(checkpoint: Checkpoint) -> None:
    for warning in checkpoint.warnings:
        logger.warning("%s: %s", checkpoint.file.path.name, warning)
