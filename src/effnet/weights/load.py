"""Networks with weights: from the registry, a file, a hub or a bundle.

`create` gives the module alone, `open_model` the module with its context: how images are prepared, what its classes are
called and where its weights came from.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path

from effnet.arch.spec import NetworkSpec
from effnet.arch.specfile import SUFFIXES
from effnet.arch.variants import spec
from effnet.errors import ArgumentError, CheckpointError
from effnet.models.blocks import Norm
from effnet.models.efficientnet import EfficientNet
from effnet.weights import registry
from effnet.weights.bundle import Bundle, BundleConfig, is_bundle, open_bundle
from effnet.weights.convert import Checkpoint, Report, read_checkpoint

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
    """A network as a torch module.

    Args:
        network: "b0" ... "b8", "l2", "lite0" ... "lite4", a spec.yaml, or a NetworkSpec.
        weights: None for a fresh network; "default" for the registered weights of a variant; a name of the registry
            ("lite0", "b3", "timm/tf_efficientnet_b0.ns_jft_in1k"); a bundle; a file or hub folder of another library.
        num_classes: outputs of the classifier. Another number than the weights' lets the classifier start fresh, which
            is logged as a warning.
        in_channels: input channels; a stem with weights is adapted to another number.
        source: the library that wrote a file of weights, where its keys cannot tell (timm or timm-tf).
        norm: another normalisation layer, made from a number of channels; weights must have its tensors, and set its
            eps and momentum.

    Returns:
        The module, in training mode when fresh, in eval mode with weights.

    Raises:
        UnknownNameError: no network or weights have that name.
        ArgumentError: a value is outside its range.
        CheckpointError: the file cannot be used as asked.
        DownloadError: registered weights are neither here nor within reach.
    """
    if weights is None:
        return EfficientNet(spec(network, num_classes=num_classes, in_channels=in_channels), norm=norm)
    if str(weights).lower() == "default":
        weights = registry.default_for(spec(network).name).name
    checkpoint = read(str(weights), network, source=source, num_classes=num_classes, in_channels=in_channels)
    _warn(checkpoint.report)
    return build(checkpoint, norm=norm)


def open_model(model: str | Path, *, network: str | NetworkSpec | None = None, source: str | None = None) -> Bundle:
    """MODEL as every command takes it, with its context, in eval mode.

    Args:
        model: a name of the registry, a bundle, a file or hub folder of another library, "timm/NAME" or "hf:ORG/NAME".
        network: the network that a file's tensors are of, where they cannot tell.
        source: the library that wrote a file of weights, where its keys cannot tell.

    Raises:
        UnknownNameError: it is none of these.
        ArgumentError: `network` is said of a bundle, which knows.
        CheckpointError, BundleError, DownloadError: it is one of these and cannot be used.
    """
    if is_bundle(Path(model)):
        if network is not None:
            rule = f"is not to be said of {model}, a bundle, which knows its network."
            raise ArgumentError("model", str(network), rule)
        return open_bundle(model)
    checkpoint = read(str(model), network, source=source)
    _warn(checkpoint.report)
    see, classes = checkpoint.report.input, checkpoint.classes
    report = dataclasses.replace(checkpoint.report, spec=spec(checkpoint.report.spec, resolution=see.size))
    module = build(dataclasses.replace(checkpoint, report=report))
    return Bundle(module, BundleConfig(report.spec, report.policy, see, classes, f"{model} ({report.source})"))


def read(
    weights: str,
    network: str | NetworkSpec | None = None,
    *,
    source: str | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
) -> Checkpoint:
    """The file behind a name, read with all that is known of it; see `create` for the arguments.

    Where no `network` is asked for, the spec has the resolution that the weights want to see.
    """
    progress = sys.stderr.isatty()
    known = registry.REGISTRY.get(weights.lower().removeprefix("efficientnet_").removeprefix("efficientnet-"))
    if known and source not in (None, known.source):
        raise ArgumentError("source", source, f"is not {weights}'s, which comes from {known.source}.")
    if known is None and Path(weights).suffix.lower() in SUFFIXES:
        raise CheckpointError(
            f"{weights} describes a network without weights; effnet.create({weights!r}) builds it fresh"
        )
    if known is None and Path(weights).exists():
        path = Path(weights)
    elif known is None and weights.startswith(("hf:", "timm/")):
        path = registry.fetch_hub(weights, progress=progress)
    elif known is None and (Path(weights).suffix or Path(weights).name != weights):
        raise CheckpointError(f"{weights} does not exist")
    else:
        known = known or registry.find(weights)  # which raises with the nearest name
        path, source = registry.fetch(known, progress=progress), known.source
    checkpoint = read_checkpoint(path, network, source=source, num_classes=num_classes, in_channels=in_channels)
    report, classes = checkpoint.report, checkpoint.classes
    if is_bundle(path):
        config = open_bundle(path).config  # which checks that nothing was changed
        report = dataclasses.replace(report, policy=config.policy, input=config.input, notes=())
        classes = None if report.fresh else config.classes
    elif known:
        report = dataclasses.replace(report, input=known.input, notes=())
    see = report.input.with_channels(report.spec.in_channels)
    held = report.spec if network is not None else spec(report.spec, resolution=see.size)
    return Checkpoint(checkpoint.state, dataclasses.replace(report, input=see, spec=held), classes)


def build(checkpoint: Checkpoint, *, norm: Norm | None = None) -> EfficientNet:
    """The network of a checkpoint, in eval mode."""
    report = checkpoint.report
    network = EfficientNet(report.spec, policy=report.policy, norm=norm)
    try:
        missing, unexpected = network.load_state_dict(checkpoint.state, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{report.path} does not fit this norm: {error}") from error
    wrong = [
        key for key in (*missing, *unexpected) if key not in report.fresh and not key.endswith("num_batches_tracked")
    ]
    if wrong:
        raise CheckpointError(f"{report.path} does not fit this norm: {', '.join(wrong[:4])}")
    network.use_policy(report.policy)  # a norm that was passed in has its own constants, and the weights have theirs
    return network.eval()


def _warn(report: Report) -> None:
    """Log what was not taken over as it stands, and what was assumed."""
    parts = ((report.fresh, "starts fresh"), (report.adapted, "was adapted"), (report.left_over, "is not used"))
    for names, what in parts:
        if names:
            more = f" and {len(names) - 6} more" if len(names) > 6 else ""
            logger.warning("%s: %s%s %s", report.path.name, ", ".join(names[:6]), more, what)
    for note in report.notes:
        logger.warning("%s: %s", report.path.name, note)
