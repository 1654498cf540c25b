"""A bundle: a folder that holds a network's weights and all that belongs to them.

    config.json         format, spec, numeric policy, InputSpec, class names, source, metrics, the weights' sha256
    model.safetensors   the tensors under native names

`read_config` needs no torch, so a bundle can be described and counted where it cannot be run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import effnet
from effnet.arch.spec import InputSpec, NetworkSpec, NumericPolicy, read_fields
from effnet.arch.variants import spec as make_spec
from effnet.errors import ArgumentError, BundleError
from effnet.weights.folders import MARK, appearing_folder

if TYPE_CHECKING:
    from effnet.models.efficientnet import EfficientNet

FORMAT = 1  # raised whenever an older effnet would misread a bundle
CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class BundleConfig:
    """What a bundle knows beside its weights."""

    spec: NetworkSpec
    policy: NumericPolicy
    input: InputSpec
    classes: tuple[str, ...] | None = None
    source: str = ""  # where the weights came from, in words
    metrics: Mapping[str, float] = field(default_factory=dict)
    sha256: str = ""  # of the file of weights


@dataclass(frozen=True)
class Bundle:
    """A network with its context, in memory."""

    network: EfficientNet
    config: BundleConfig


def save(
    network: EfficientNet,
    folder: str | Path,
    *,
    classes: Sequence[str] | None = None,
    input: InputSpec | None = None,
    source: str = "",
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Write a bundle; the folder appears whole or not at all.

    Args:
        network: what to save.
        folder: where to; a bundle that is there already is replaced, a folder with anything else in it is left alone.
        classes: the names of the outputs, in order.
        input: how images are prepared; by default at the spec's resolution, cut from 8/7 of it, with ImageNet's mean
            and std. The bundle's spec has its size as resolution.
        source: where the weights came from, in words.
        metrics: results worth keeping, by name.

    Returns:
        The folder.

    Raises:
        ArgumentError: the names do not match the outputs, `input` has other channels than the network, the network has
            other tensors than its spec says, or something that is no bundle is in the way.
    """
    from safetensors.torch import save as serialise

    from effnet.weights.layouts import NATIVE

    spec = network.spec
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()}
    if {key: tuple(tensor.shape) for key, tensor in state.items()} != NATIVE.shapes(spec):
        raise ArgumentError(
            "network", type(network).__name__, "must have the tensors of its spec; another norm has not."
        )
    see = input or InputSpec(spec.resolution, round(spec.resolution * 8 / 7)).with_channels(spec.in_channels)
    _check_channels(see, spec)
    spec = make_spec(spec, resolution=see.size)
    blob = serialise(state)
    config = BundleConfig(
        spec,
        _built_policy(network),
        see,
        _checked_classes(classes, spec),
        source,
        {name: float(value) for name, value in (metrics or {}).items()},
        hashlib.sha256(blob).hexdigest(),
    )
    values = {"format": FORMAT, MARK: effnet.__version__, **dataclasses.asdict(config)}
    values["digest"] = _digest(values)

    target = Path(folder)
    with appearing_folder(target, bundle=True) as temporary:
        (temporary / WEIGHTS).write_bytes(blob)
        (temporary / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    return target


def read_config(folder: str | Path) -> BundleConfig:
    """What a bundle says of itself, without opening its weights.

    Raises:
        BundleError: it is no bundle, comes from a newer effnet, or its config was damaged.
    """
    path = Path(folder) / CONFIG
    try:
        values = json.loads(path.read_text())
        digest, expected = values.pop("digest", None), _digest(values)
        written, version = values.pop("format"), values.pop(MARK)
    except FileNotFoundError as error:
        raise BundleError(f"{folder} is no bundle: it has no {CONFIG}") from error
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise BundleError(f"{path} is damaged or not effnet's ({type(error).__name__}: {error})") from error
    if written != FORMAT:
        raise BundleError(
            f"{folder} has format {written}, written by effnet {version}; this effnet reads {FORMAT}: upgrade"
        )
    try:
        config = read_fields(BundleConfig, values)
        spec = NetworkSpec.from_dict(values["spec"])
        config = dataclasses.replace(
            config,
            spec=spec,
            policy=read_fields(NumericPolicy, values["policy"]),
            input=read_fields(InputSpec, values["input"]),
            classes=_checked_classes(values.get("classes"), spec),
        )
        _check_channels(config.input, spec)
    except (ArgumentError, TypeError, ValueError) as error:
        raise BundleError(f"{path} was changed: {error}") from error
    if digest != expected:
        raise BundleError(f"{path} was changed since it was written; effnet.save writes a bundle with other values")
    return config


def open_bundle(folder: str | Path) -> Bundle:
    """The network of a bundle, in eval mode, with its context.

    Raises:
        BundleError: it is no bundle, was changed or cut short, or comes from a newer effnet.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    from effnet.models.efficientnet import EfficientNet

    config = read_config(folder)
    path = Path(folder) / WEIGHTS
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    if hashlib.sha256(blob).hexdigest() != config.sha256:
        raise BundleError(f"{path} was changed or cut short: its sha256 is not the one in {CONFIG}")
    network = EfficientNet(config.spec, policy=config.policy)
    try:
        network.load_state_dict(load(blob))
    except (SafetensorError, RuntimeError) as error:
        raise BundleError(f"{path} does not hold the network that {CONFIG} describes") from error
    return Bundle(network.eval(), config)


def is_bundle(path: Path) -> bool:
    """Whether a folder says that it is a bundle."""
    try:
        return bool(json.loads((path / CONFIG).read_text()).keys() >= {"format", MARK})
    except (OSError, ValueError, AttributeError):
        return False


def _digest(values: Mapping[str, Any]) -> str:
    """The sha256 of a config's entries, its own digest apart."""
    entries = {name: value for name, value in values.items() if name != "digest"}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _built_policy(network: EfficientNet) -> NumericPolicy:
    """What the network really computes with: its layers may have been changed since it was built."""
    from torch import nn

    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    built = {(norm.eps, norm.momentum) for norm in norms}
    if len(built) != 1:
        raise ArgumentError(
            "network", type(network).__name__, "must have one eps and momentum in all BatchNorm layers."
        )
    eps, momentum = built.pop()
    return dataclasses.replace(network.policy, bn_eps=eps, bn_momentum=momentum or network.policy.bn_momentum)


def _checked_classes(classes: Sequence[str] | None, spec: NetworkSpec) -> tuple[str, ...] | None:
    if classes is None:
        return None
    if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
        raise ArgumentError("classes", classes, "must be a sequence of names.")
    if len(classes) != spec.num_classes:
        raise ArgumentError("classes", f"{len(classes)} names", f"must name the network's {spec.num_classes} outputs.")
    if twice := next((name for name in classes if classes.count(name) > 1), None):
        raise ArgumentError("classes", twice, "stands twice; a name means one class.")
    return tuple(classes)


def _check_channels(see: InputSpec, spec: NetworkSpec) -> None:
    if see.channels != spec.in_channels:
        raise ArgumentError("input", f"{see.channels} channels", f"must have the network's {spec.in_channels}.")
